"""Labels for train.py --teacher-labels from a teacher that is no torch module: an ONNX file here.

    python examples/teacher_labels.py teacher.onnx labels/ --data photos/ --views 4     # the other flags are train.py's
    python train.py --kd nkd --teacher-labels labels/ --data photos/ --model mobilenet_v2

The ONNX file is one of deploy/'s (or another with a FILE.onnx.json beside it, see deploy/README.md) of the data's own
classes in their order, for images of the student's size. from_answers is for a language model's server.
"""

import argparse
import hashlib
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from deploy.cli import UserError, show_error
from deploy.runtimes import load
from kdlite import top_k_logprobs
from kdlite.training.distributed import stop_signals
from kdlite.training.teacher_labels import begin_labels, describe_images, write_labels


def from_answers(answers: list[dict[int, float]], labels: list[int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What nkd_topk_loss takes, of answers as servers of language models give them.

    answers: of each prediction the log-probabilities by token, the label's own among them: of vLLM's prompt_logprobs
        {token: x.logprob for token, x in position.items()} of each position but the first, which is None
    labels: the tokens; -100 where nothing is to be learnt
    """
    log_t = torch.tensor([a[t] if t >= 0 else 0.0 for a, t in zip(answers, labels, strict=True)])
    others = [sorted(((p, i) for i, p in a.items() if i != t), reverse=True)[:k] for a, t in zip(answers, labels)]
    padded = [row + [(-math.inf, 0)] * (k - len(row)) for row in others]
    top, index = torch.tensor(padded, dtype=torch.float64).reshape(-1, k, 2).unbind(-1)
    return log_t, top.float(), index.long()


def write(file: Path, folder: Path, views: int, k: int, flags: list[str]) -> None:
    args = train.parse_args(flags)
    run = train.build(args)
    teacher, k = load(file), min(k, len(run.data.label_names) - 1)
    if teacher.metadata.label_names != run.data.label_names:
        raise UserError(f"{file} knows other classes than --data, or in another order")
    size, ours = teacher.metadata.input_size, run.config["input_size"]
    if list(size) != list(ours):
        raise UserError(f"{file} is for images of {size}, and the student's are {ours}: say --img-size")

    def ask(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = teacher.run(images.permute(0, 2, 3, 1).numpy())  # uint8, as every artefact of deploy/ takes them
        return top_k_logprobs(torch.from_numpy(logits), labels, k)

    header = describe_images(run.data.train, run.data.label_names, train.describe_view(*run.view))
    source = {"name": file.name, "digest": hashlib.sha256(file.read_bytes()).hexdigest()}
    header |= {"teacher": source, "seed": args.seed, "views": views, "k": k}
    with stop_signals() as stop, begin_labels(folder, header):
        whole = write_labels(
            folder, header, run.data.train, train.train_view(*run.view), ask, 64, args.workers, False, None, stop
        )
    if not whole:
        print(f"stopped by {stop.name}: what is whole in {folder} is kept, the same command goes on")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--top-k", type=int, default=10)
    args, flags = parser.parse_known_args()
    try:
        write(args.teacher, args.folder, args.views, args.top_k, flags)
    except UserError as error:
        show_error("teacher_labels.py", str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

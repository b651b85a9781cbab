"""Store the answers of a teacher that is not a torch module, here an ONNX file, for train.py --teacher-labels.

    python examples/teacher_labels.py teacher.onnx labels/ --views 4 --data photos/ --model mobilenet_v2
    python train.py --kd nkd --teacher-labels labels/ --data photos/ --model mobilenet_v2

The ONNX file comes from deploy/, or has a FILE.onnx.json next to it (deploy/README.md). It must have the classes of the
data in the same order, and the image size of the student. All flags except --views and --top-k are train.py's.
from_answers converts the answers of a language model's server.
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
from deploy.cli import UserError, run_command
from deploy.runtimes import Runtime, load
from kdlite import top_k_logprobs
from kdlite.training.data import open_run
from kdlite.training.distributed import log, stop_signals
from kdlite.training.teacher_labels import Answers, describe_images, lock_labels, write_labels


def from_answers(answers: list[dict[int, float]], labels: list[int], k: int) -> Answers:
    """Return the arguments of nkd_topk_loss from a server's answers: log T_t (N,), log T_i (N, k), indices (N, k).

    Args:
        answers: for each prediction a dict of log-probabilities by token, which must contain the label; from vLLM's
            prompt_logprobs: {token: x.logprob for token, x in position.items()} for each position except the first
        labels: the next tokens; -100 for positions that training ignores
        k: number of tokens to store, not counting the label
    """
    log_t = torch.tensor([a[t] if t >= 0 else 0.0 for a, t in zip(answers, labels, strict=True)])
    others = [sorted(((p, i) for i, p in a.items() if i != t), reverse=True)[:k] for a, t in zip(answers, labels)]
    padded = [row + [(-math.inf, 0)] * (k - len(row)) for row in others]
    top, index = torch.tensor(padded, dtype=torch.float64).reshape(-1, k, 2).unbind(-1)
    return log_t, top.float(), index.long()


class Asker:
    """Ask an exported teacher about a batch of images."""

    def __init__(self, teacher: Runtime, k: int) -> None:
        self.teacher, self.k = teacher, k

    def __call__(self, images: Tensor, labels: Tensor) -> Answers:
        # every file that deploy/ exports takes uint8 (B, H, W, C)
        logits = self.teacher.run(images.permute(0, 2, 3, 1).numpy())
        return top_k_logprobs(torch.from_numpy(logits), labels, self.k)


def write(file: Path, folder: Path, views: int, k: int, flags: list[str]) -> None:
    """Store the answers about all views of the training images. flags: the flags of train.py."""
    teacher = load(file)
    args, _, data = open_run(train.FLAGS, train.parse_flags(flags))
    _, _, config = train.build_student(args, data)  # size and preprocessing may depend on the student's weights
    k, size, ours = min(k, len(data.label_names) - 1), teacher.metadata.input_size, config.input_size
    if teacher.metadata.label_names != data.label_names:
        raise UserError(f"the classes of {file} are not those of --data, or have another order")
    if size != ours:
        raise UserError(f"{file} needs images of {size}, but the student's have {ours}: give --img-size")
    view = train.build_view(args, config)
    source = {"name": file.name, "digest": hashlib.sha256(file.read_bytes()).hexdigest()}
    header = describe_images(data, view) | {"teacher": source, "seed": args.seed, "views": views, "k": k}
    with stop_signals() as stop, lock_labels(folder, header):
        whole = write_labels(folder, header, data.train, view.transform(), Asker(teacher, k), args.workers, stop)
    if not whole:
        log(f"stopped by {stop.name}: the complete files in {folder} are kept; run the same command again to continue")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--top-k", type=int, default=10)
    args, flags = parser.parse_known_args()
    write(args.teacher, args.folder, args.views, args.top_k, flags)


if __name__ == "__main__":
    sys.exit(run_command("teacher_labels.py", main))

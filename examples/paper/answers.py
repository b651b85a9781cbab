"""What the networks of a run say of its images: the student, USKD's weak head, the teacher or its stored labels.

    python examples/paper/answers.py RUN ...       # run directories of train.py, with their last.pt

A line a network, of the training images and of the validation images, neither cropped nor flipped (but stored labels
are of their first view, as it was drawn); the student with the weights that are trained, not with their average
(--ema-decay):

    top-1       how often the largest probability is the label's, %
    label       its mean probability: S_t or T_t
    spread      the standard deviation of its square, by which P_t differs from the label in USKD's target term
    entropy     of the other classes, normalized among themselves, in nats; beside it what a uniform answer has

And of USKD, in %: how many of the first five ranks of R (Zipf's weights go by them) are the student's own.
"""

import argparse
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from deploy.cli import UserError, show_error
from deploy.config import Metadata
from deploy.preprocess import UnreadableImage
from deploy.student import load_weights
from kdlite import WithWeakHead
from kdlite.terms import cross_entropy, is_class, log_normalized, odds
from kdlite.training.checkpoint import load_checkpoint
from kdlite.training.data import SPLIT, read_split
from kdlite.training.loading import eval_view, make_loader
from kdlite.training.teacher_labels import StoredLabels


def describe(logits: Tensor, target: Tensor) -> str:
    """Of (N, C) logits and (N,) labels."""
    logits = logits.double()
    top1 = 100 * (logits.argmax(1) == target).double().mean()
    label = logits.softmax(1).gather(1, target.unsqueeze(1))
    others = log_normalized(logits, target)
    entropy = cross_entropy(others.exp(), others).mean()
    return (
        f"top-1 {top1:5.2f} %  label {label.mean():.3f}  spread {label.square().std():.3f}  "
        f"entropy {entropy:.2f} of {math.log(logits.shape[1] - 1):.2f}"
    )


def own_ranks(student: Tensor, weak: Tensor, target: Tensor, first: int = 5) -> float:
    """The part in percent of the first ranks of R_i = W_i / (1 - W_t) + S_i / (1 - S_t) that S alone would give."""
    first = min(first, student.shape[1] - 1)
    own = odds(student.double(), target)
    both = own + odds(weak.double(), target)
    ranked = (x.masked_fill(is_class(x, target), -torch.inf).topk(first).indices for x in (own, both))
    of_own, of_both = (torch.zeros_like(own).scatter(1, classes, 1.0) for classes in ranked)
    return 100 * (of_own * of_both).sum(1).mean().item() / first


@torch.inference_mode()
def answers(run: train.Training, images: object) -> tuple[dict[str, Tensor], Tensor]:
    """Logits by who gives them, and the labels, of a part of the data."""
    run.net.eval()
    if isinstance(run.net, WithWeakHead):
        run.net.training = True  # its own mode alone: it gives both logits, of a student that is in eval mode
    given: dict[str, list[Tensor]] = {}
    labels = []
    view = functools.partial(eval_view, metadata=Metadata.from_json(run.config, "the student"))
    for batch in make_loader(images, view, 256, False):
        if batch.corrupt:
            raise UserError(f"{batch.corrupt[0][0]} cannot be read: answers are of all images")
        seen = run.to_device(batch.images)
        student, weak = run.net(seen) if isinstance(run.net, WithWeakHead) else (run.net(seen), None)
        for who, logits in (("student", student), ("weak head", weak), ("teacher", run.teacher and run.teacher(seen))):
            if logits is not None:
                given.setdefault(who, []).append(logits.cpu())
        labels.append(batch.labels)
    return {who: torch.cat(logits) for who, logits in given.items()}, torch.cat(labels)


def stored_answers(stored: StoredLabels, target: Tensor) -> Tensor:
    """Log-probabilities (N, C) of the first view of each training image.

    Raises:
        UserError: some classes were not stored, so that the others would be taken for all
    """
    k, others = stored.header["k"], stored.header["classes"] - 1
    if k < others:
        raise UserError(f"{stored.folder} has {k} of {others} other classes: write labels with --top-k {others}")
    rows = torch.full((len(target), others + 1), -torch.inf, dtype=torch.float64)
    for index, label in enumerate(target):
        of_label, of_others, classes = stored(0, index)
        rows[index, classes.where(of_others > -torch.inf, label)] = of_others.double()
        rows[index, label] = of_label.double()
    return rows


def lines(folder: Path) -> Iterator[str]:
    args = train.parse_args(["--output", str(folder), "--resume"])
    loaded = load_checkpoint(folder, older=False)
    if loaded is None:
        raise UserError(f"{folder} has no last.pt: a run of train.py is wanted")
    where, saved = loaded
    run = train.build(args, known=saved["config"], sides=read_split(folder / SPLIT))
    load_weights(run.net, saved["model"], where)
    yield f"{folder}, {saved['progress']['epoch']} epochs"
    for part, images in (("training", run.data.train), ("validation", run.data.val)):
        given, target = answers(run, images)
        if run.stored and part == "training":
            given["labels"] = stored_answers(run.stored, target)
        for who, logits in given.items():
            yield f"  {part:10}  {who:9}  {describe(logits, target)}"
        if "weak head" in given:
            yield f"  {part:10}  own ranks  {own_ranks(given['student'], given['weak head'], target):.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    for folder in parser.parse_args().runs:
        try:
            for line in lines(folder):
                print(line, flush=True)
        except (UserError, UnreadableImage) as error:
            show_error("answers.py", str(error))
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

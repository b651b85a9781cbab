"""Measure predictions for a run's images: those of student, weak head, teacher and stored labels.

    python examples/paper/answers.py RUN ... [--model FILE.py:BUILD]

RUN is a run directory of train.py with a last.pt. If the run used your code (--model FILE.py:BUILD), repeat the flag.

The command prints two lines for each network: for the training images and for the validation images, without crop and
flip. Stored labels exist only for training images. They were predicted from images with a random crop and flip. The
student has its last weights, not their average (--ema-decay).

    top-1       accuracy, %
    label       mean probability of the label: S_t or T_t
    spread      standard deviation of the square of that probability (P_t of USKD contains this square)
    entropy     entropy of the renormalised other classes, in nats, "of" its maximum (all these classes equal)

USKD ranks the classes by R, and the first five ranks have the largest Zipf weights. For USKD the command also prints
how many of these five classes, in percent, are also the first five by the student's prediction alone.
"""

import argparse
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from deploy.cli import UserError, run_command
from deploy.config import Metadata
from deploy.student import load_weights
from kdlite import Teacher, WithWeakHead
from kdlite.terms import cross_entropy, is_class, log_normalized, odds
from kdlite.training.checkpoint import load_checkpoint
from kdlite.training.data import open_run
from kdlite.training.distributed import pick_device
from kdlite.training.loading import ToDevice, eval_loader, eval_view
from kdlite.training.teacher_labels import StoredLabels


def describe(logits: Tensor, target: Tensor) -> str:
    """Return the four measures of logits (N, C) with labels (N,), as text."""
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
    """Return the percentage of the first classes by R that are also the first classes by S, in any order.

    R_i is W_i / (1 - W_t) + S_i / (1 - S_t).
    """
    first = min(first, student.shape[1] - 1)
    own = odds(student.double(), target)
    both = own + odds(weak.double(), target)
    ranked = (x.masked_fill(is_class(x, target), -torch.inf).topk(first).indices for x in (own, both))
    of_own, of_both = (torch.zeros_like(own).scatter(1, classes, 1.0) for classes in ranked)
    return 100 * (of_own * of_both).sum(1).mean().item() / first


@torch.inference_mode()
def collect_logits(
    net: nn.Module, teacher: Teacher | None, images: Any, config: Metadata, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the logits (N, C) of each network by name, and the labels (N,)."""
    net.eval()
    if isinstance(net, WithWeakHead):
        net.training = True  # the wrapper in training mode returns both logits; the student stays in eval mode
    logits: dict[str, list[Tensor]] = {}
    labels, to_device = [], ToDevice(config.mean, config.std, device)
    for batch in eval_loader(images, functools.partial(eval_view, metadata=config), 256, workers=0):
        if batch.corrupt:
            raise UserError(f"{batch.corrupt[0][0]} cannot be read: answers.py needs every image")
        x = to_device.normalise(batch.images)
        student, weak = net(x) if isinstance(net, WithWeakHead) else (net(x), None)
        for name, values in (("student", student), ("weak head", weak), ("teacher", teacher and teacher(x))):
            if values is not None:
                logits.setdefault(name, []).append(values.cpu())
        labels.append(batch.labels)
    return {name: torch.cat(values) for name, values in logits.items()}, torch.cat(labels)


def stored_logprobs(stored: StoredLabels, target: Tensor, classes: int) -> Tensor:
    """Return the teacher's log-probabilities (N, C) of the first view of each training image.

    Raises:
        UserError: the labels have only a part of the classes, so the entropy is unknown
    """
    if stored.k < classes - 1:
        needed = f"write labels with --top-k {classes - 1}"
        raise UserError(f"{stored.folder} stores {stored.k} of the {classes - 1} non-target classes: {needed}")
    rows = [stored(0, index) for index in range(len(target))]
    return train.all_logprobs(tuple(map(torch.stack, zip(*rows))), target, classes)


def report(folder: Path, flags: list[str]) -> Iterator[str]:
    """Yield the lines of a run. flags: the flags of train.py that name your code."""
    args, _, data = open_run(train.FLAGS, train.parse_flags(["--output", str(folder), "--resume", *flags]))
    resumed = load_checkpoint(folder)
    if resumed is None:
        raise UserError(f"{folder} has no last.pt: expected a run directory of train.py")
    device = pick_device(args.device)
    _, net, config = train.build_student(args, data, resumed)
    source = train.build_teacher(args, data, config, resumed)
    teacher = source.to(device) if isinstance(source, Teacher) else None
    load_weights(net, resumed.content["model"], resumed.file)
    yield f"{folder}, {resumed.content['progress']['epoch']} epochs"
    for part, images in (("training", data.train), ("validation", data.val)):
        logits, target = collect_logits(net.to(device), teacher, images, config, device)
        if isinstance(source, StoredLabels) and part == "training":
            logits["labels"] = stored_logprobs(source, target, config.num_classes)
        for name, values in logits.items():
            yield f"  {part:10}  {name:9}  {describe(values, target)}"
        if "weak head" in logits:
            yield f"  {part:10}  own ranks  {own_ranks(logits['student'], logits['weak head'], target):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args, flags = parser.parse_known_args()
    for folder in args.runs:
        for line in report(folder, flags):
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_command("answers.py", main))

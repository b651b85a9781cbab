"""Choose the loss and its weights for your photographs: cross-entropy, KD or NKD, over temperature and gamma.

    python -m kdlite.training.tune --data photos/ --model mobilenet_v2 --teacher runs/001-ce/student --minutes 30

The flags are train.py's. A fifth of the training images is for the comparison; your validation images are not used. The
teacher's answers are stored once. All arms (a loss with its weights) get a short run; the better half gets a run twice
as long, and so on (successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943). The command prints a table with
the paired standard error of each difference, the arms that are not clearly worse than the best arm, and the command for
the training. After a stop, the same command continues.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import Parser, UserError, number, replacing, run_command, write_whole
from kdlite.training.data import Photos, draw_split, open_data
from kdlite.training.distributed import log
from kdlite.training.launch import gain, read_answers, read_rows, store_labels, train_once

ARMS: dict[str, list[str]] = {
    "cross-entropy": [],
    "KD T 1": ["--kd", "kd", "--temperature", "1"],
    "KD T 1, weight 3": ["--kd", "kd", "--temperature", "1", "--kd-weight", "3"],
    "KD T 4": ["--kd", "kd", "--temperature", "4"],
    "NKD gamma 0.25": ["--kd", "nkd", "--gamma", "0.25", "--temperature", "1"],
    "NKD gamma 0.5": ["--kd", "nkd", "--gamma", "0.5", "--temperature", "1"],
    "NKD gamma 1.5": ["--kd", "nkd", "--gamma", "1.5", "--temperature", "1"],
    "NKD gamma 1.5, T 3": ["--kd", "nkd", "--gamma", "1.5", "--temperature", "3"],
    "NKD gamma 3.5, T 3": ["--kd", "nkd", "--gamma", "3.5", "--temperature", "3"],
}
RUNGS = (9, 4, 2)  # arms of each round; the next round has twice the epochs
COST = sum(arms * 2**rung for rung, arms in enumerate(RUNGS))  # of all rounds, in runs of the first round's length
SHARE = 0.2  # share of the training images that compares the arms
OWN = ("--kd", "--gamma", "--temperature", "--kd-weight", "--teacher-labels", "--self-kd", "--epochs", "--resume")


def link_images(data: str, val_split: float | None, folder: Path) -> None:
    """Make folder/train and folder/val with links to the training images of a data set; val/ gets SHARE of a class."""
    photos = open_data(data, val_split).train
    if not isinstance(photos, Photos):
        raise UserError(f"--data {data}: expected a folder of photographs")
    files = photos.files()
    sides = draw_split(files, photos.targets, SHARE, seed=1)  # not the seed of the split by --val-split
    if folder.exists():
        shutil.rmtree(folder)
    with replacing(folder) as partial:
        for file, (path, target) in zip(files, photos.samples):
            link = partial / sides[file] / photos.classes[target] / file.replace("/", "-")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(path).resolve())


def run_arm(name: str, flags: Sequence[Any], epochs: int, labels: Path, output: Path) -> tuple[np.ndarray, float]:
    """Train an arm; return whether it classifies each validation image right, and the seconds of an epoch."""
    stored = ["--teacher-labels", labels] if ARMS[name] else []
    train_once([*flags, "--epochs", epochs, "--reference", 0, *ARMS[name], *stored], output)
    return read_answers(output), float(np.mean([float(row["seconds"]) for row in read_rows(output)]))


def make_plan(flags: Sequence[Any], labels: Path, output: Path, ends: float) -> int:
    """Run one epoch, and return the epochs of the first round that let all rounds end at `ends` (time.monotonic())."""
    began = time.monotonic()
    _, epoch = run_arm("cross-entropy", flags, 1, labels, output / "first")
    overhead = max(time.monotonic() - began - epoch, 0)  # seconds of a process outside its epochs
    epochs = int((ends - time.monotonic() - sum(RUNGS) * overhead) / (COST * epoch))
    if epochs < 1:
        needed = (COST * epoch + sum(RUNGS) * overhead) / 60
        raise UserError(f"--minutes is too short: after the labels the shortest plan takes {needed:.0f} minutes")
    return epochs


def tune(flags: Sequence[Any], labels: Path, output: Path, epochs: int) -> dict[str, np.ndarray]:
    """Run the rounds; return the answers of each arm in its longest run, the best arm first.

    epochs: number of epochs in the first round
    """
    names, found = list(ARMS), dict[str, np.ndarray]()
    for rung, arms in enumerate(RUNGS):
        names = names[:arms]
        for name in names:
            place = output / f"{epochs * 2**rung}-epochs" / name.replace(" ", "-").replace(",", "")
            found[name], _ = run_arm(name, flags, epochs * 2**rung, labels, place)
            log(f"{name}, {epochs * 2**rung} epochs: top-1 {100 * found[name].mean():.2f} %")
        names.sort(key=lambda name: -found[name].mean())
    return {name: found[name] for name in [*names, *(other for other in found if other not in names)]}


def report(found: dict[str, np.ndarray], rounds: Sequence[int]) -> str:
    """Print the table and the arms that are not clearly worse than the best arm; return the best arm's name."""
    best, *others = found
    print(f"| arm | round | top-1 on {len(found[best])} images, % | behind the best |\n|---|---|---|---|")
    alike = []
    for place, (name, right) in enumerate(found.items()):
        rung = 1 + sum(place < arms for arms in rounds[1:])
        behind, error = gain(found[best], right)
        same_round = place < rounds[-1]
        print(f"| {name} | {rung} | {100 * right.mean():.1f} | {f'{behind:.1f} +- {error:.1f}' if place else ''} |")
        alike += [name] if name in others and same_round and behind < 2 * error else []
    if alike:
        print(f"not told apart from {best} (less than two standard errors): {', '.join(alike)}")
    print("an arm of an earlier round had a shorter run")
    return best


def get_parser() -> Parser:
    parser = Parser(
        prog="tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, help="a folder of photographs, as train.py takes it")
    parser.add_argument("--val-split", type=number(float, 0, 1, above=True), help="flag of train.py")
    parser.add_argument("--teacher", required=True, help="the teacher, as train.py takes it")
    parser.add_argument("--views", type=number(int, 1), default=4, help="stored crops of each image (default: 4)")
    parser.add_argument("--minutes", type=number(float, 0, above=True), default=30.0, help="of all runs (default: 30)")
    parser.add_argument("--output", type=Path, default=Path("runs/tune"), help="for the runs (default: runs/tune)")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    args, flags = get_parser().parse_known_args(argv)
    if own := [flag for flag in flags if flag.partition("=")[0] in OWN]:
        raise UserError(f"{own[0]} is chosen here: leave it out")
    folder, labels = args.output / "images", args.output / "labels"
    began = time.monotonic()
    link_images(args.data, args.val_split, folder)
    classes = len(list((folder / "train").iterdir()))
    shared = ["--data", folder.resolve(), *flags]
    store_labels([*shared, "--teacher", args.teacher, "--top-k", classes - 1, "--views", args.views], labels)
    log(f"the teacher's answers are in {labels}: {time.monotonic() - began:.0f} s")
    plan, command = args.output / "plan.json", shlex.join(sys.argv[1:] if argv is None else argv)
    stored = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else {}
    epochs = stored.get("epochs") if stored.get("command") == command else None  # continue after a stop
    epochs = epochs or make_plan(shared, labels.resolve(), args.output, began + 60 * args.minutes)
    write_whole(plan, json.dumps({"command": command, "epochs": epochs}))
    log("plan: " + ", ".join(f"{arms} arms of {epochs * 2**rung} epochs" for rung, arms in enumerate(RUNGS)))
    best = report(tune(shared, labels.resolve(), args.output, epochs), RUNGS)
    split = ["--val-split", f"{args.val_split:g}"] if args.val_split else []
    teacher = ["--teacher", args.teacher] if ARMS[best] else []
    chosen = ["--data", args.data, *split, *flags, *ARMS[best], *teacher]
    log(f"next: torchrun train.py {shlex.join(chosen)}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("tune", functools.partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())

"""Choose the loss for your images: cross-entropy, KD or NKD, and its temperature and gamma.

    python -m kdlite.training.tune --data photos/ --model mobilenet_v2 --teacher runs/001-ce/student --minutes 30

The command also takes the flags of train.py, except those that it chooses itself. It stores the teacher's answers once.
Each run validates on a fifth of the training images, so the choice does not use the validation images. An arm is a loss
with its gamma and temperature. Every arm gets short runs, the better half gets runs of twice the epochs, and so on
(successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943). The command prints a table with the paired standard
error of each difference, then the arms that are not significantly behind the best, then the command to train with. Run
it again to continue after a stop.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deploy.cli import Parser, UserError, number, run_command, write_whole
from deploy.config import read_json
from deploy.flags import option, read_flags
from kdlite.training import launch
from kdlite.training.data import open_run
from kdlite.training.distributed import WORLD_SIZE, log
from kdlite.training.launch import ROOT, gain, of_labels, read_answers, read_rows, store_labels
from kdlite.training.teacher_labels import read_header

GAMMAS = (0.5, 1.5, 3.5)
ARMS: dict[str, list[str]] = {
    "cross-entropy": [],
    **{f"KD T {t}": ["--kd", "kd", "--temperature", f"{t}"] for t in (1, 4)},
    **{
        f"NKD gamma {gamma} T {t}": ["--kd", "nkd", "--gamma", f"{gamma}", "--temperature", f"{t}"]
        for gamma in GAMMAS
        for t in (1, 3)
    },
}
FIRST = "NKD gamma 1.5 T 1"  # the arm whose run of one epoch is measured
ANY_LABELS = ["cross-entropy", *(f"NKD gamma {gamma} T 1" for gamma in GAMMAS)]
PARTS = 5  # number of parts of the training images; a run validates on one part and trains on the others
MOST_CLASSES = 200  # with more, stored answers have the label and ten classes, which suit only ANY_LABELS
REFUSED = {"kd", "gamma", "temperature", "kd_weight", "self_kd", "unlabelled", "fold", "resume"}


# ---- a plan for the time -------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Hold the rounds of a search."""

    arms: list[int]  # number of arms in each round
    epochs: list[int]  # epochs of a run in each round
    parts: int  # runs of each arm in a round; each run validates on another part

    def __str__(self) -> str:
        rounds = ", ".join(f"{arms} arms of {epochs} epochs" for arms, epochs in zip(self.arms, self.epochs))
        return f"{rounds}; runs of an arm in a round: {self.parts}"


def make_plan(seconds: float, epoch: float, start: float, arms: int, full: int) -> Plan:
    """Return the plan with the most rounds that takes at most `seconds`; raise UserError if none fits.

    If several plans have this number of rounds, take the one with the most epochs (at most ``full``), then the one with
    the most parts.

    Args:
        seconds: the time that is left
        epoch: seconds of an epoch
        start: seconds that each run takes in addition to its epochs
        arms: number of arms in the first round
        full: epochs of the whole training
    """
    sizes = [arms]
    while sizes[-1] >= 4:
        sizes.append(sizes[-1] // 2)
    for rounds in range(len(sizes), 0, -1):
        for first in range(math.ceil(full / 2 ** (rounds - 1)), 0, -1):
            epochs = [min(full, first * 2**i) for i in range(rounds)]
            cost = sum(size * (count * epoch + start) for size, count in zip(sizes, epochs))
            if cost <= seconds:
                return Plan(sizes[:rounds], epochs, min(PARTS, int(seconds / cost)))
    need = f"a run of one epoch of each of {arms} arms takes {arms * (epoch + start) / 60:.2f} minutes"
    left = f"{max(seconds, 0) / 60:.2f} minutes are left"
    raise UserError(f"--minutes is too short: {left}, but {need}; finished work is kept")


# ---- runs ----------------------------------------------------------------------------------------------------------


class Trainer:
    """Run train.py for each arm.

    Args:
        flags: flags of train.py for every run
        labels: the folder of the teacher's answers
        args: epochs, warmup_epochs and seed of the whole training; a run of fewer epochs has less warm-up
        output: the folder of the run directories
    """

    def __init__(self, flags: Sequence[str], labels: Path, args: argparse.Namespace, output: Path) -> None:
        self.flags, self.labels, self.args, self.output = flags, labels, args, output

    def run(self, name: str, epochs: int, part: int) -> tuple[np.ndarray, float]:
        """Train an arm, unless its run is finished.

        Returns:
            For each image of the part, 1 if the student is right, else 0; and the seconds of an epoch

        Raises:
            UserError: the run fails
            KeyboardInterrupt: a signal stops the run
        """
        place = self.output / f"{epochs}-epochs" / f"{name.replace(' ', '-')}-{part}"
        if not is_finished(place, epochs):
            stored = ["--teacher-labels", self.labels] if ARMS[name] else []
            warmup = self.args.warmup_epochs * min(1, epochs / self.args.epochs)
            flags = [*self.flags, *ARMS[name], *stored, "--epochs", epochs, "--warmup-epochs", warmup]
            flags += ["--fold", part, PARTS, "--seed", self.args.seed + part, "--reference", 0]
            command = [sys.executable, ROOT / "train.py", *flags, "--output", place, "--resume"]
            launch.run(list(map(str, command)), place)
            if not is_finished(place, epochs):
                raise KeyboardInterrupt  # a signal stopped the run after a save
        return read_answers(place), float(np.mean([float(row["seconds"]) for row in read_rows(place)]))


def is_finished(run: Path, epochs: int) -> bool:
    return (run / "curves.png").exists() and len(read_rows(run)) == epochs  # the picture is written at the end


def measure(trainer: Trainer) -> tuple[float, float]:
    """Return the seconds of an epoch, and the seconds that a run takes in addition to its epochs."""
    began = time.monotonic()
    _, epoch = trainer.run(FIRST, 1, 0)
    return epoch, max(time.monotonic() - began - epoch, 0)


def search(trainer: Trainer, names: Sequence[str], plan: Plan, ends: float) -> list[dict[str, np.ndarray]]:
    """Run the rounds until time.monotonic() is `ends`; return the answers of each arm in each finished round.

    Each round validates on the next parts; after the last part it starts again with the first.
    """
    rounds: list[dict[str, np.ndarray]] = []
    for i, (arms, epochs) in enumerate(zip(plan.arms, plan.epochs)):
        names, found = names[:arms], dict[str, np.ndarray]()
        for name in names:
            answers = []
            try:
                for part in range(i * plan.parts, (i + 1) * plan.parts):
                    if time.monotonic() > ends:
                        log(f"the time ended in round {i + 1}: its results are ignored")
                        return rounds
                    answers.append(trainer.run(name, epochs, part % PARTS)[0])
            except UserError as error:  # such as a loss that is not finite
                log(f"round {i + 1}, {name} failed: {error}")
                continue
            found[name] = np.concatenate(answers)
            log(f"round {i + 1}, {name}, {epochs} epochs: top-1 {100 * found[name].mean():.2f} %")
        if not found:
            raise UserError(f"every run of round {i + 1} failed; the lines above give the reasons")
        rounds.append(found)
        names = sorted(found, key=lambda name: -found[name].mean())
    return rounds


# ---- the result ----------------------------------------------------------------------------------------------------


def report(rounds: Sequence[dict[str, np.ndarray]], epochs: Sequence[int]) -> str:
    """Print a table of all arms, then those that are not significantly behind the best; return the best's name.

    Each arm is compared with the best in the last round that has both.
    """
    best = max(rounds[-1], key=lambda name: rounds[-1][name].mean())
    last = {name: i for i, found in enumerate(rounds) for name in found}
    order = sorted(last, key=lambda name: (-last[name], -rounds[last[name]][name].mean()))
    alike = []
    print(f"| arm | epochs | images | top-1 % | points behind {best} |\n|---|---|---|---|---|")
    for name in order:
        found = rounds[last[name]]
        behind, error = gain(found[best], found[name])
        shown = "" if name == best else f"{behind:.1f} +- {error:.1f}"
        print(f"| {name} | {epochs[last[name]]} | {len(found[name])} | {100 * found[name].mean():.1f} | {shown} |")
        alike += [name] if name != best and behind <= 2 * error else []
    print("+-: the paired standard error over the images. Arms with fewer epochs left the search in an earlier round.")
    if alike:
        print(f"not significantly behind {best} (at most two standard errors): {', '.join(alike)}")
    return best


# ---- the command ---------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="tune", description=__doc__, formatter_class=form, allow_abbrev=False)
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--teacher", help="the teacher, as in train.py; its answers go to --output")
    teacher.add_argument("--teacher-labels", type=Path, help="a folder of stored answers instead of --teacher")
    parser.add_argument("--teacher-classes", help="only with --teacher: as in train.py")
    parser.add_argument("--views", type=number(int, 1), default=4, help="crops of each image (default: 4)")
    parser.add_argument(
        "--minutes", type=number(float, 0, above=True), default=30.0, help="time of the search (default: 30)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/tune"), help="folder of the search (default: runs/tune)"
    )
    return parser


def open_training(flags: Sequence[str], labels: Path) -> tuple[argparse.Namespace, int]:
    """Return the flags of the whole training, and the number of classes; raise UserError for a flag of REFUSED."""
    table = runpy.run_path(str(ROOT / "train.py"))["FLAGS"]
    typed = read_flags(table, flags)
    if chosen := sorted(map(option, typed.keys() & REFUSED)):
        raise UserError(f"{', '.join(chosen)}: tune chooses or does not support this flag: leave it out")
    args, _, data = open_run(table, typed | {"kd": "nkd", "teacher_labels": str(labels)})
    return args, len(data.label_names)


def run(argv: list[str]) -> None:
    if WORLD_SIZE > 1:
        raise UserError("start tune without torchrun: its runs have one process")
    began = time.monotonic()
    given, flags = get_parser().parse_known_args(argv)
    output = given.output.resolve()
    labels = (given.teacher_labels or output / "labels").resolve()
    args, classes = open_training(flags, labels)
    known = [f"{name} {value}" for name, value in sorted(vars(given).items()) if name != "minutes"] + flags
    measured = begin(output / "tune.json", known)
    if given.teacher:
        k = classes - 1 if classes <= MOST_CLASSES else 10
        asked = ["--teacher", given.teacher, "--top-k", k, "--views", given.views]
        asked += ["--teacher-classes", given.teacher_classes] if given.teacher_classes else []
        store_labels([*of_labels(flags), *asked], labels)
        log(f"the teacher's answers are in {labels}: {time.monotonic() - began:.0f} s")
    names = list(ARMS) if read_header(labels)["k"] == classes - 1 else ANY_LABELS
    if len(names) < len(ARMS):
        log(f"{labels} does not hold every class: KD is skipped, and NKD at temperatures other than 1")
    trainer = Trainer(flags, labels, args, output)
    ends = began + 60 * given.minutes
    if measured is None:
        epoch, start = measure(trainer)
        measured = [time.monotonic() - began, epoch, start]
        write_whole(output / "tune.json", json.dumps({"command": known, "measured": measured}))
    spent, epoch, start = measured
    log(f"an epoch takes {epoch:.1f} s, and the rest of a run {start:.1f} s")
    full = max(1, int(args.time_limit / epoch)) if args.time_limit else args.epochs
    plan = make_plan(60 * given.minutes - spent, epoch, start, len(names), full)
    log(f"plan: {plan}")
    rounds = search(trainer, names, plan, ends)
    if not rounds:
        raise UserError("the time ended in the first round: run the same command again to continue")
    best = report(rounds, plan.epochs)
    chosen = [*flags, *ARMS[best], *(["--teacher-labels", str(labels)] if ARMS[best] else [])]
    log(f"the search took {time.monotonic() - began:.0f} s")
    log(f"next: torchrun train.py {shlex.join(chosen)}")


def begin(file: Path, command: list[str]) -> list[float] | None:
    """Return the seconds that a stopped search measured, so that its plan stays the same; None if they are missing.

    Raise UserError if another command wrote the file, because this command would use the runs of that command.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"command": command, "measured": None}))
    stored = read_json(file.read_bytes(), file)
    if stored.get("command") != command:
        raise UserError(f"{file.parent} has the runs of another command: give another --output, or remove that folder")
    return stored.get("measured")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("tune", functools.partial(run, sys.argv[1:] if argv is None else list(argv)))


if __name__ == "__main__":
    sys.exit(main())

"""Run train.py, and the command that stores a teacher's labels, as separate processes; read their results."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.cli import UserError
from deploy.flags import by_name, option
from kdlite.training import teacher_labels
from kdlite.training.distributed import end_with_launcher

ROOT = Path(__file__).resolve().parents[2]


def train_once(flags: Sequence[Any], output: Path, script: Path = ROOT / "train.py") -> float:
    """Train a run, unless it is finished, and return top-1 of its last epoch.

    The function resumes a stopped run of the same command in `output`. It raises UserError if `output` has the run of
    another command.
    """
    command = list(map(str, [sys.executable, script, *flags, "--output", output, "--resume"]))
    try:
        before = json.loads((output / "args.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if before not in (None, shlex.join(command[1:])):
        raise UserError(f"{output} has the run of another command: remove this folder, or use another one")
    if not (output / "curves.png").exists():  # written at the end of a run
        run(command, output)
    return float(read_rows(output)[-1]["val_top1"])


def store_labels(flags: Sequence[Any], output: Path) -> None:
    """Store a teacher's answers for a training with these flags of train.py; stored answers in `output` stay."""
    command = [sys.executable, "-m", "kdlite.training.teacher_labels", *of_labels(flags), "--output", output.resolve()]
    run(list(map(str, command)), output)


def of_labels(flags: Sequence[Any]) -> list[str]:
    """Return the flags, with their values, that the command for labels also has."""
    names, kept, keeps = {option(name) for name in by_name(teacher_labels.FLAGS)}, list[str](), False
    for flag in map(str, flags):
        keeps = flag.partition("=")[0] in names if flag.startswith("--") else keeps
        kept += [flag] * keeps
    return kept


def run(command: list[str], output: Path) -> None:
    """Run a command whose lines go to log.txt next to `output`; raise UserError with the last line if it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / "log.txt", "a+", encoding="utf-8") as log:
        start = log.seek(0, 2)
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=end_with_launcher)
        try:
            status = process.wait()
        except BaseException:  # after a signal, train.py saves its state and ends too
            process.terminate()
            process.wait()
            raise
        log.seek(start)
        lines = log.read().strip().splitlines()
    if status:
        raise UserError(f"{output}: {lines[-1] if lines else f'status {status}'} (all lines: {log.name})")


def read_rows(output: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv."""
    with open(output / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_answers(output: Path) -> np.ndarray:
    """Return 1 for each validation image on which the student of the best epoch is right, else 0."""
    labels, predictions = torch.load(output / "last.pt", weights_only=True)["progress"]["answers"].numpy()
    return np.asarray(labels == predictions, float)


def gain(right: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Return the difference in top-1, in points, of two models on the same images, and its standard error."""
    difference = 100 * (right - base)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)

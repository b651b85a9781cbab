"""Run train.py in the process of the tests."""

import csv
from pathlib import Path

import train
from kdlite.training import teacher_labels
from kdlite.training.data import open_run


def run(*flags, check=0):
    """Call train.main and check its exit status."""
    assert train.main([str(flag) for flag in flags]) == check


def write_labels(*flags, check=0):
    """Call the command that stores a teacher's labels and check its exit status."""
    assert teacher_labels.main([str(flag) for flag in flags]) == check


def refused(capsys, *flags, command=run, program="train.py"):
    """Run a command with a mistake; return the one line that it prints."""
    capsys.readouterr()
    command(*flags, check=2)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"{program}: error: ")
    return lines[0]


def opened(*flags):
    """Return the flags of a run, the flags that its directory stores, and its data set."""
    return open_run(train.FLAGS, train.parse_flags([str(flag) for flag in flags]))


def args_of(*flags):
    return opened(*flags)[0]


def rows(output):
    """Return the rows of metrics.csv."""
    with open(Path(output) / "metrics.csv") as file:
        return list(csv.DictReader(file))

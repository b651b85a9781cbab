"""Run train.py in this process, for the tests of it."""

import csv
from pathlib import Path

import train
from kdlite.training import teacher_labels
from kdlite.training.data import open_run


def run(*flags, check=0):
    """Call train.main, which must end with this status."""
    assert train.main([str(flag) for flag in flags]) == check


def write_labels(*flags, check=0):
    """Call the command that stores a teacher's labels."""
    assert teacher_labels.main([str(flag) for flag in flags]) == check


def refused(capsys, *flags, command=run, program="train.py"):
    """Return the one line that answers a mistake."""
    capsys.readouterr()
    command(*flags, check=2)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"{program}: error: ")
    return lines[0]


def opened(*flags):
    """Return the flags of a run, what its directory would store of them, and its data set."""
    return open_run(train.FLAGS, train.parse_flags([str(flag) for flag in flags]))


def args_of(*flags):
    return opened(*flags)[0]


def rows(output):
    """Return the rows of metrics.csv."""
    with open(Path(output) / "metrics.csv") as file:
        return list(csv.DictReader(file))

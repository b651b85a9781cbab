"""Runs of train.py in this process, for the tests of it."""

import csv
from pathlib import Path

import train


def run(*flags, check=0):
    """train.main, which must end with this status."""
    assert train.main([str(flag) for flag in flags]) == check


def refused(capsys, *flags):
    """The one line a mistake is answered with."""
    capsys.readouterr()
    run(*flags, check=2)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("train.py: error: ")
    return lines[0]


def rows(output):
    """Of metrics.csv."""
    with open(Path(output) / "metrics.csv") as file:
        return list(csv.DictReader(file))

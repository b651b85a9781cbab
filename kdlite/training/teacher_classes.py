"""Find the column of the teacher's logits for each class of the data: by name, by WordNet id or from a file."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from deploy.cli import UserError
from deploy.per_class import confusion_matrix
from deploy.run_directory import read_csv
from kdlite.training.data import abbreviate
from kdlite.training.distributed import warn


def pick_columns(
    name: str, teacher: list[str] | None, count: int, data: list[str], classes_file: str | None
) -> tuple[list[int] | None, str | None]:
    """Return the teacher's column of each class (None: all columns in their order), and a line that reports them.

    name: --teacher; teacher: the names of its `count` classes, or None if they are unknown; data: the names of the
    classes of --data
    """
    found = f"teacher {name}: {len(data)} of its {count} classes"
    if classes_file:
        columns = [column_of(theirs, name, teacher, count, classes_file) for theirs in read_classes(classes_file, data)]
        if twice := [label for label, column in zip(data, columns) if columns.count(column) > 1]:
            raise UserError(f"{classes_file} gives {' and '.join(twice[:3])} the same class of --teacher {name}")
        return columns, f"{found}, from {classes_file}"
    if teacher is not None and teacher != data:
        columns = match(data, teacher, name)
        pairs = [(ours, teacher[column]) for ours, column in zip(data, columns)]
        guesses = [f"{ours} = {describe(theirs)}" for ours, theirs in pairs if plain(ours) != plain(theirs)]
        return columns, f"{found} match --data by name" + (f": {abbreviate(guesses)}" if guesses else "")
    if count != len(data):
        fault = f"--teacher {name} has {count} classes without names, but --data has {len(data)}"
        raise UserError(f"{fault}: give the teacher's class for each of them with --teacher-classes FILE")
    return None, None


def column_of(theirs: str, name: str, teacher: list[str] | None, count: int, classes_file: str) -> int:
    """Return the column for an entry of --teacher-classes: that of the class with this name, else the entry itself."""
    if teacher is not None and (not theirs.isdecimal() or plain(theirs) in map(plain, teacher)):
        return match([theirs], teacher, name)[0]
    if not theirs.isdecimal():
        fault = f"the names of --teacher {name}'s classes are unknown, so {theirs} cannot be found"
        raise UserError(f"{classes_file}: {fault}; give columns, from 0 to {count - 1}")
    if int(theirs) >= count:
        raise UserError(
            f"{classes_file}: column {theirs} is too large: --teacher {name} has the columns 0 to {count - 1}"
        )
    return int(theirs)


def match(data: list[str], teacher: list[str], name: str) -> list[int]:
    """Return the index in `teacher` of each class of the data; raise UserError if a name is missing or occurs twice.

    Names match if they differ only in case, or in hyphen, underscore and blank. ImageNet's classes also match by their
    other names.
    """
    exact: dict[str, set[int]] = defaultdict(set)
    loose: dict[str, set[int]] = defaultdict(set)
    for index, label in enumerate(teacher):
        exact[plain(label)].add(index)
        for other in imagenet_names().get(label, []):
            loose[other].add(index)
    columns: list[int] = []
    lacking = []
    for label in data:
        others = [plain(label), *imagenet_names().get(label, [])]
        found = exact[plain(label)] or set().union(*(loose[x] | exact[x] for x in others))
        if len(found) > 1:
            several = ", ".join(f"{teacher[i]} ({i})" for i in sorted(found)[:3])
            fault = f"--teacher {name} has several classes with the name {label}: {several}"
            raise UserError(f"{fault}; give the column with --teacher-classes FILE")
        columns += found
        lacking += [] if found else [label]
    if lacking:
        fault = f"--teacher {name} lacks {len(lacking)} of --data's {len(data)} classes: {abbreviate(lacking)}"
        advice = "give the teacher's names for them with --teacher-classes FILE"
        if len(lacking) == len(data):
            advice += ", or train a teacher on --data"
        raise UserError(f"{fault}; {advice}")
    if twice := [label for label, column in zip(data, columns) if columns.count(column) > 1]:
        fault = f"--teacher {name} has one class for {' and '.join(twice[:3])}"
        raise UserError(f"{fault}: give the columns with --teacher-classes FILE")
    return columns


def warn_of_teacher(labels: np.ndarray, predictions: np.ndarray, classes: int) -> None:
    """Warn if a teacher is not better than chance, or would be much better with its classes in another order.

    labels, predictions: class indices of the same images, (N,)
    """
    from scipy.optimize import linear_sum_assignment  # imported only here, because this import is slow

    count, right = len(labels), float((labels == predictions).mean())
    seen, pairs = np.unique([labels, predictions], return_inverse=True)  # a class that does not occur adds nothing
    rows, columns = np.reshape(pairs, (2, count))
    table = confusion_matrix(rows, columns, len(seen))
    reordered = float(table[linear_sum_assignment(table, maximize=True)].sum() / count)
    if classes > 1 and reordered > right + 0.2 and reordered > 2 * right:
        top1 = f"a top-1 of {100 * reordered:.0f} % instead of {100 * right:.0f} %"
        warn(f"in another order of its classes this teacher has {top1}: give the order with --teacher-classes FILE")
    elif right <= 1 / classes + 2 * math.sqrt((1 / classes) * (1 - 1 / classes) / count):
        fault = f"this teacher is not better than chance ({100 / classes:.2g} %)"
        warn(f"{fault}: check that the teacher is trained, and that its mean and std are those of its own training")


def describe(label: str) -> str:
    """Return the name of a class; for a WordNet id of ImageNet, its names too."""
    return f"{label} ({', '.join(imagenet_names()[label][:3])})" if label in imagenet_names() else label


def plain(label: str) -> str:
    """Return a name in one form: NFC, lower case, with blanks instead of - and _."""
    return " ".join(unicodedata.normalize("NFC", label).casefold().replace("_", " ").replace("-", " ").split())


@functools.cache
def imagenet_names() -> dict[str, list[str]]:
    """Return the names of ImageNet's classes by WordNet id: n01440764 is a tench, or Tinca tinca."""
    info = ImageNetInfo()
    return {label: [plain(x) for x in info.label_name_to_description(label).split(",")] for label in info.label_names()}


def read_classes(file: str, data: list[str]) -> list[str]:
    """Return, for each class of the data, its name or number in the teacher, from the file of --teacher-classes."""
    theirs: dict[str, str] = {}
    for row in read_csv(Path(file), "the teacher's classes"):
        row = [unicodedata.normalize("NFC", cell.strip()) for cell in row]
        if len(row) != 2:
            raise UserError(f"{file}: {','.join(row)!r}; expected two columns: class of --data, teacher's name")
        if row[0] in theirs:
            raise UserError(f"{file} has {row[0]} twice: give one line for each class")
        theirs[row[0]] = row[1]
    labels = [unicodedata.normalize("NFC", label) for label in data]
    if missing := [label for label in labels if label not in theirs]:
        raise UserError(f"{file} lacks {len(missing)} classes of --data: {abbreviate(missing)}")
    if unknown := [label for label in theirs if label not in labels]:
        raise UserError(f"{file} has {len(unknown)} classes that --data does not have: {abbreviate(unknown)}")
    return [theirs[label] for label in labels]

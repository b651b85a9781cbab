"""How a student does on each class, and what it takes for what. Needs numpy; the picture matplotlib, if it is there.

per_class.csv   label, n, precision, recall, f1: a line for each class, in the classes' order
confusion.png   rows are true classes, columns what they were taken for
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploy.cli import UserError, write_whole

MAX_DRAWN = 2000  # classes: with more a cell has less than a pixel


def write_per_class(folder: Path, labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str]) -> list[str]:
    """Write per_class.csv and confusion.png.

    Args:
        folder: where
        labels, predictions: class indices (N,), the true ones and those answered
        label_names: of the C classes

    Returns:
        What to print: the worst confusions, and why there is no picture where there is none.

    Raises:
        UserError: an index is of no class, or a file cannot be written
    """
    known = set(range(len(label_names)))
    if labels.shape != predictions.shape or not {*labels.tolist(), *predictions.tolist()} <= known:
        raise UserError(f"labels or answers do not fit the {len(known)} classes {', '.join(label_names[:3])}, ...")
    write_whole(folder / "per_class.csv", per_class_table(labels, predictions, label_names))
    lines = worst_confusions(labels, predictions, label_names)
    lines = ["most often taken for another class:", *(f"  {line}" for line in lines)] if lines else [
        f"none of {len(labels)} images was taken for another class"
    ]  # fmt: skip
    if len(label_names) > MAX_DRAWN:
        return [*lines, f"no confusion.png: {len(label_names)} classes are more than {MAX_DRAWN}"]
    if importlib.util.find_spec("matplotlib") is None:
        return [*lines, "no confusion.png: matplotlib is not installed"]
    from deploy.pictures import confusion_picture

    confusion_picture(folder / "confusion.png", confusion_matrix(labels, predictions, len(label_names)), label_names)
    return lines


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Images by true class (row) and answer (column): int64 (C, C)."""
    pairs = labels.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def per_class_table(labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str]) -> str:
    """per_class.csv. n: images of the class; shares from 0 to 1, an empty field where there is nothing to divide by:
    recall of a class without images, precision of one that was never answered."""
    n, answered, hits = (
        np.bincount(indices, minlength=len(label_names)).tolist()
        for indices in (labels, predictions, labels[labels == predictions])
    )

    def share(part: float, whole: float) -> str:
        return f"{part / whole:.4f}" if whole else ""

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "n", "precision", "recall", "f1"])
    for i, name in enumerate(label_names):
        f1 = share(2 * hits[i], n[i] + answered[i])
        writer.writerow([name, n[i], share(hits[i], answered[i]), share(hits[i], n[i]), f1])
    return text.getvalue()


def worst_confusions(
    labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str], count: int = 10
) -> list[str]:
    """The pairs of classes with most images, as "cat taken for dog: 12 of 40"; of equal ones the larger share first."""
    wrong = labels != predictions
    pairs, images = np.unique(np.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True)
    of = np.bincount(labels, minlength=len(label_names))
    worst = sorted(zip(images.tolist(), pairs[0].tolist(), pairs[1].tolist()), key=lambda x: (-x[0], of[x[1]], *x[1:]))
    return [
        f"{label_names[true]} taken for {label_names[taken]}: {k} of {of[true]}" for k, true, taken in worst[:count]
    ]

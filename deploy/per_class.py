"""Write precision and recall of each class, and with matplotlib also a picture of the confusion matrix.

per_class.csv   label, n, precision, recall, f1: a line for each class, in the order of the classes
confusion.png   a row for each true class, a column for each predicted class
"""

from __future__ import annotations

import csv
import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import UserError, printable, write_whole

LABELLED = 60  # with more classes, the axes have no names
NUMBERED = 20  # with more classes, the cells have no numbers
FORMULA = tuple("=+-@\t\r\n")  # first characters of a cell that a spreadsheet may compute
MAX_DRAWN = 2000  # largest number of classes of the picture; with more, a cell is smaller than a pixel


def write_per_class(folder: Path, labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str]) -> list[str]:
    """Write per_class.csv and confusion.png. Return lines to print: the worst confusions, and why a picture is missing.

    labels, predictions: true and predicted class indices (N,); an index out of range raises UserError
    """
    known = set(range(len(label_names)))
    if labels.shape != predictions.shape or not {*labels.tolist(), *predictions.tolist()} <= known:
        raise UserError(f"labels or answers do not fit the {len(known)} classes {', '.join(label_names[:3])}, ...")
    write_whole(folder / "per_class.csv", per_class_table(labels, predictions, label_names))
    lines = worst_confusions(labels, predictions, label_names)
    lines = ["worst confusions:", *(f"  {line}" for line in lines)] if lines else [f"all {len(labels)} are right"]
    if len(label_names) > MAX_DRAWN:
        return [*lines, f"no confusion.png: {len(label_names)} classes are more than {MAX_DRAWN}"]
    if importlib.util.find_spec("matplotlib") is None:
        return [*lines, "no confusion.png: matplotlib is not installed"]
    confusion_picture(folder / "confusion.png", confusion_matrix(labels, predictions, len(label_names)), label_names)
    return lines


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of images for each true class (row) and predicted class (column): int64 (C, C)."""
    pairs = labels.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def per_class_table(labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str]) -> str:
    """Return the text of per_class.csv. n is the number of images of the class; the other columns are from 0 to 1.

    A cell is empty if its denominator is 0, such as the recall of a class without images.
    """
    three = labels, predictions, labels[labels == predictions]
    n, answered, hits = (np.bincount(one, minlength=len(label_names)).tolist() for one in three)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # so that \r in a name is quoted
    writer.writerow(["label", "n", "precision", "recall", "f1"])
    for i, name in enumerate(label_names):
        f1 = share(2 * hits[i], n[i] + answered[i])
        writer.writerow([as_text(name), n[i], share(hits[i], answered[i]), share(hits[i], n[i]), f1])
    return text.getvalue()


def as_text(text: str) -> str:
    """Return a text, with an apostrophe in front if a spreadsheet would compute it as a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


def share(part: float, whole: float) -> str:
    return f"{part / whole:.4f}" if whole else ""


def worst_confusions(
    labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str], count: int = 10
) -> list[str]:
    """Return the most frequent confusions, as "cat taken for dog: 12 of 40"; sort equal counts by share."""
    wrong = labels != predictions
    pairs, images = np.unique(np.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True)
    n = np.bincount(labels, minlength=len(label_names))
    worst = sorted(zip(images.tolist(), pairs[0].tolist(), pairs[1].tolist()), key=lambda x: (-x[0], n[x[1]], *x[1:]))
    names = [printable(name) for name in label_names]
    return [f"{names[true]} taken for {names[taken]}: {k} of {n[true]}" for k, true, taken in worst[:count]]


def confusion_picture(path: Path, matrix: np.ndarray, label_names: Sequence[str]) -> None:
    """Draw a confusion matrix (C, C) as a PNG, true classes in rows, coloured by the share of the row.

    With many classes the axes show indices instead of names; a class without images is grey.
    """
    import matplotlib as mpl
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(label_names)
    labelled = classes <= LABELLED
    numbered = classes <= NUMBERED  # the numbers in the cells replace the colour bar
    side = max(4.0, 0.24 * classes) if labelled else 12.0
    figure = Figure(figsize=(side + (1.5 if numbered else 2.5), side + 1.5), layout="constrained")
    axis = figure.subplots()
    totals = matrix.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(totals == 0, matrix.shape), matrix / np.maximum(totals, 1))
    colours = mpl.colormaps["Blues"].with_extremes(bad="lightgrey")
    # coloured by the root of the share, so that a few per cent are still visible
    drawn = axis.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if not numbered:
        figure.colorbar(drawn, label="share of the images of the true class", shrink=0.7)
    order = "" if labelled else ", counted from 0 in the order of per_class.csv"
    axis.set(xlabel=f"taken for{order}", ylabel=f"true class{order}")
    right = f"{100 * np.trace(matrix) / max(matrix.sum(), 1):.1f} % right (chance: {100 / classes:.3g} %)"
    axis.set_title(f"{matrix.sum():.0f} validation images\n{right}", fontsize=11)
    if labelled:
        names, size = [shortened(name) for name in label_names], 10 if numbered else 8
        axis.set_xticks(range(classes), names, rotation=90, parse_math=False, fontsize=size)
        axis.set_yticks(range(classes), names, parse_math=False, fontsize=size)
    if numbered:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    save(path, figure)


def shortened(name: str, most: int = 24) -> str:
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def save(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as a PNG."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # characters that the font lacks become boxes
        figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())

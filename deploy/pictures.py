"""What a person looks at before reading: the confusions of classes, and a batch as the network sees it. By matplotlib,
which is imported when a picture is drawn."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import write_whole

LABELLED, NUMBERED = 60, 20  # classes up to which a confusion matrix has names, and a number in each cell


def confusion_picture(path: Path, matrix: np.ndarray, label_names: Sequence[str]) -> None:
    """A PNG of a confusion matrix (C, C), true classes in rows, coloured by the share of the row.

    With many classes the axes count them, in the order of label_names; a class without images is grey.
    """
    import matplotlib as mpl
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(label_names)
    labelled = classes <= LABELLED
    side = max(4.0, 0.24 * classes) if labelled else 12.0
    figure = Figure(figsize=(side + 2.5, side + 1.5), layout="constrained")
    axis = figure.subplots()
    totals = matrix.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(totals == 0, matrix.shape), matrix / np.maximum(totals, 1))
    colours = mpl.colormaps["Blues"].with_extremes(bad="lightgrey")
    # the root of the share: a few per cent taken for another class are still seen
    drawn = axis.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(drawn, label="share of the images of the true class", shrink=0.7)
    order = "" if labelled else ", counted from 0 in the order of per_class.csv"
    axis.set(xlabel=f"taken for{order}", ylabel=f"true class{order}")
    if labelled:
        names = [shortened(name) for name in label_names]
        axis.set_xticks(range(classes), names, rotation=90, parse_math=False, fontsize=8)
        axis.set_yticks(range(classes), names, parse_math=False, fontsize=8)
    if classes <= NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=6)
    save(path, figure)


def batch_picture(path: Path, images: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> None:
    """A PNG of a batch's first 32 images with their labels.

    Args:
        path: the file
        images: uint8 (N, H, W, 3) or (N, H, W, 1)
        labels: class indices (N,), or shares (N, C) where images are mixed: the two largest are told
        label_names: of the C classes
    """
    from matplotlib.figure import Figure

    count = min(len(images), 32)
    columns = min(count, 8)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(1.6 * columns, (1.6 * images.shape[1] / images.shape[2] + 0.4) * rows), layout="constrained"
    )
    for i, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.axis("off")
        if i < count:
            axis.imshow(np.broadcast_to(images[i], (*images.shape[1:3], 3)), interpolation="nearest")
            axis.set_title(caption(labels[i], label_names), parse_math=False, fontsize=7)
    save(path, figure)


def caption(label: Any, label_names: Sequence[str]) -> str:
    """The name of a class, or of two with their shares in percent."""
    shares = np.asarray(label)
    if shares.ndim == 0:
        return shortened(label_names[int(shares)])
    largest = [i for i in np.argsort(-shares, kind="stable")[:2] if shares[i] > 0]
    if len(largest) == 1:
        return shortened(label_names[largest[0]])
    return "\n".join(f"{shortened(label_names[i], 18)} {100 * shares[i]:.0f} %" for i in largest)


def shortened(name: str, most: int = 24) -> str:
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def save(path: Path, figure: Any) -> None:
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks becomes boxes
        figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())

"""reference.npz: prepared images of a run with the student's own answers, so that a device needs no data set.

train.py writes it into the run directory beside student/ (never in it: it holds training images). check compares with
its logits, quantize calibrates on its training images, benchmark times its validation images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.cli import UserError, first_line, write_whole
from deploy.config import read_config
from deploy.preprocess import UnreadableImage, prepare
from deploy.runtimes import RunOn, load, source_of

NAME = "reference.npz"


class Reference(NamedTuple):
    """The arrays of the file, under these names."""

    images: np.ndarray  # validation images, evenly spaced: uint8 (N, H, W, C), as deploy.preprocess.prepare makes them
    labels: np.ndarray  # their class indices: int64 (N,)
    logits: np.ndarray  # the student's own in full precision: float32 (N, C)
    train_images: np.ndarray  # training images, evenly spaced and prepared as for evaluation: uint8 (M, H, W, C)
    weights_sha256: np.ndarray  # of the weights that gave the logits: a string

    @property
    def digest(self) -> str:
        return str(self.weights_sha256.item())

    def some(self, count: int | None) -> Reference:
        """With only `count` of the validation images, evenly spaced; all where there are not more, or for None."""
        if count is None or count >= len(self.images):
            return self
        picked = evenly(len(self.images), count)
        return self._replace(images=self.images[picked], labels=self.labels[picked], logits=self.logits[picked])


def evenly(total: int, count: int) -> list[int]:
    """Indices of at most count of total things, evenly spaced."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist() if total else []


def write_reference(file: Path, reference: Reference) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **reference._asdict())
    write_whole(file, buffer.getbuffer())


def keep_reference(run: Path, val: Any, train: Any, count: int, model_files: Sequence[str] = ()) -> str:
    """Write a run's reference.npz: count images of each set and the answers of its student/, computed by torch.

    val, train: sequences of (PIL image, class index); what cannot be read is left out.

    Returns:
        What was written, for the user to read.
    """
    student = load(run / "student", RunOn("cpu", model_files=tuple(model_files)))

    def prepared(source: Any) -> tuple[np.ndarray, np.ndarray]:
        images, labels = [], []
        for index in evenly(len(source), count):
            with contextlib.suppress(UnreadableImage):
                image, label = source[index]
                images.append(prepare(image, student.metadata))
                labels.append(label)
        channels, height, width = student.metadata.input_size
        return np.array(images, np.uint8).reshape(-1, height, width, channels), np.array(labels, np.int64)

    (images, labels), (train_images, _) = prepared(val), prepared(train)
    if not len(images):
        return f"no {NAME}: none of the validation images drawn for it could be read"
    logits = np.concatenate([student.run(images[i : i + 32]) for i in range(0, len(images), 32)])
    digest = np.array(student.metadata.source["weights_sha256"])
    write_reference(run / NAME, Reference(images, labels, logits, train_images, digest))
    size = (run / NAME).stat().st_size / 1e6
    return f"{len(images)} validation and {len(train_images)} training images in {run / NAME}, {size:.1f} MB"


def add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=Path, help=f"(default: {NAME} of the run directory, beside student/)")


def find_reference(student: Path, given: Path | None) -> Path | None:
    """The run's reference.npz, or the file that --reference names; None where there is none."""
    if given and not given.is_file():
        raise UserError(f"--reference {given}: no such file")
    beside = student.resolve().parent / NAME
    return given or (beside if beside.is_file() else None)


def read_reference(student: Path, given: Path | None, otherwise: str) -> Reference:
    """The reference of a student/ folder.

    Raises:
        UserError: there is none (otherwise: what to do then), it is damaged, or of another student
    """
    file = find_reference(student, given)
    if file is None:
        raise UserError(f"no {NAME} beside {student} (train.py --reference N writes it): {otherwise}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            reference = Reference(**{name: np.atleast_1d(arrays[name]) for name in Reference._fields})
    except Exception as error:  # numpy and zipfile have a dozen
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    config = read_config(student)
    channels, height, width = config.input_size
    count, image = len(reference.images), (height, width, channels)
    said = [reference.images.shape, reference.train_images.shape[1:], reference.labels.shape, reference.logits.shape]
    expected = [(count, *image), image, (count,), (count, len(config.label_names))]
    if said != expected or not count:
        raise UserError(f"{file} is of another student than {student}: its arrays are {said} and not {expected}")
    if (student / "model.safetensors").is_file() and reference.digest != source_of(student)["weights_sha256"]:
        raise UserError(
            f"{file} is of other weights than {student}/model.safetensors: train.py --resume writes it anew"
        )
    return reference

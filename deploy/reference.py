"""Write and read reference.npz: prepared images and the student's own logits, so that a device needs no data set.

train.py writes the file into the run directory, not into student/, because it contains training images. deploy.check
compares a student's files with these logits. deploy.quantize calibrates on these training images. deploy.benchmark
times files on these validation images.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.cli import UserError, first_line, write_whole
from deploy.config import Metadata, read_config
from deploy.preprocess import UnreadableImage, prepare
from deploy.runtimes import RunOn, load, source_of

NAME = "reference.npz"


class Reference(NamedTuple):
    """Hold the arrays of the file, each under its name in the file."""

    images: np.ndarray  # validation images at equal steps, prepared: uint8 (N, H, W, C)
    labels: np.ndarray  # class indices of the images: int64 (N,)
    logits: np.ndarray  # logits of the student in full precision: float32 (N, C)
    train_images: np.ndarray  # training images at equal steps, prepared as for evaluation: uint8 (M, H, W, C)
    weights_sha256: np.ndarray  # digest of the weights that computed the logits: a string

    @property
    def digest(self) -> str:
        return str(self.weights_sha256.item())

    def some(self, count: int | None) -> Reference:
        """Return a reference with only `count` validation images, evenly spaced. None: all of them."""
        if count is None or count >= len(self.images):
            return self
        picked = evenly(len(self.images), count)
        return self._replace(images=self.images[picked], labels=self.labels[picked], logits=self.logits[picked])


def evenly(total: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced indices from 0 to total - 1."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist() if total else []


def keep_reference(run: Path, val: Any, train: Any, count: int, model_files: Sequence[str] = ()) -> str:
    """Write a run's reference.npz: up to `count` validation images, up to `count` training images, and torch's logits.

    val, train: sequences of (PIL image, class index); unreadable images are skipped

    Returns:
        A line for the user that describes the file.
    """
    student = load(run / "student", RunOn("cpu", model_files=tuple(model_files)))
    images, labels = prepare_some(val, count, student.metadata)
    train_images, _ = prepare_some(train, count, student.metadata)
    if not len(images):
        return f"no {NAME}: none of the validation images can be read"
    logits = student.run_in_parts(images, 32)
    digest = np.array(student.metadata.source["weights_sha256"])
    buffer = io.BytesIO()
    np.savez(buffer, **Reference(images, labels, logits, train_images, digest)._asdict())
    write_whole(run / NAME, buffer.getbuffer())
    size = (run / NAME).stat().st_size / 1e6
    return f"{len(images)} validation and {len(train_images)} training images in {run / NAME}, {size:.1f} MB"


def prepare_some(source: Any, count: int, metadata: Metadata) -> tuple[np.ndarray, np.ndarray]:
    """Return up to `count` prepared images of a data set and their labels; skip unreadable images."""
    images, labels = [], []
    for index in evenly(len(source), count):
        with contextlib.suppress(UnreadableImage):
            image, label = source[index]
            images.append(prepare(image, metadata))
            labels.append(label)
    return np.array(images, np.uint8).reshape(-1, *metadata.image_shape), np.array(labels, np.int64)


def folder_of(student: Path) -> Path:
    """Return the folder of the reference: the run directory, or the folder of student.pyz."""
    folder = student.resolve().parent
    # for the archive student.pyz, folder.is_file() would search inside it
    return Path(folder.parent if os.path.isfile(folder) else folder)


def find_reference(student: Path, given: Path | None) -> Path | None:
    """Return the file that --reference names, or the run's reference.npz, or None if it is missing.

    Raises:
        UserError: the file that --reference names does not exist.
    """
    if given and not given.is_file():
        raise UserError(f"--reference {given}: no such file")
    own = folder_of(student) / NAME
    return given or (own if own.is_file() else None)


def read_reference(student: Path, given: Path | None, otherwise: str) -> Reference:
    """Return the reference of a student/ folder; raise UserError if it is missing, damaged, or of another student.

    given: the file that --reference names, or None; otherwise: advice for the error if there is no reference
    """
    file = find_reference(student, given)
    if file is None:
        fault = (
            f"no {NAME} in {folder_of(student)} (train.py --reference N writes it; next to student.pyz, copy it there)"
        )
        raise UserError(f"{fault}: {otherwise}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            reference = Reference(**{name: np.atleast_1d(arrays[name]) for name in Reference._fields})
    except Exception as error:  # numpy and zipfile have a dozen exception classes
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    config = read_config(student)
    count, image = len(reference.images), config.image_shape
    found = [reference.images.shape, reference.train_images.shape[1:], reference.labels.shape, reference.logits.shape]
    expected = [(count, *image), image, (count,), (count, len(config.label_names))]
    if not count:
        raise UserError(f"{file} is without validation images: train.py --resume writes it again")
    if found != expected:
        raise UserError(
            f"{file} belongs to another student than {student}: its arrays are {found}, expected {expected}"
        )
    images, labels, logits, train_images, digest = reference
    indices = labels.dtype.kind in "iu" and ((labels >= 0) & (labels < len(config.label_names))).all()
    numbers = logits.dtype.kind == "f" and np.isfinite(logits).all()
    faults = {
        "images are not uint8": images.dtype != np.uint8 or train_images.dtype != np.uint8,
        "labels are not class indices": not indices,
        "logits are not finite numbers": not numbers,
        "logits are all zero": numbers and not logits.any(),
        "digest is not a text": digest.shape != (1,) or digest.dtype.kind != "U",
    }
    for fault, wrong in faults.items():
        if wrong:
            raise UserError(f"{file} is damaged: its {fault}")
    if (student / "model.safetensors").is_file() and reference.digest != source_of(student)["weights_sha256"]:
        again = "train.py --resume writes it again"
        raise UserError(f"{file} belongs to other weights than {student}/model.safetensors: {again}")
    return reference

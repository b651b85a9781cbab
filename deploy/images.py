"""The run's own images, prepared as train.py prepares them: for check, quantize and benchmark."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset

import train
from train import CorruptCount, Data, Samples, UserError, collate, eval_transform, make_loader, open_data, progress


class RunData(NamedTuple):
    """A run's data sets, and the flags that opened them."""

    data: Data
    flags: argparse.Namespace
    config: dict[str, Any]


def open_run_data(student: Path, config: dict[str, Any], args: argparse.Namespace) -> RunData:
    """The data a student was trained on, by its run's args.json; --data where it moved or the run is not there."""
    file = student.parent / "args.json"
    try:
        saved = json.loads(file.read_text())["flags"] if file.is_file() else {}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read: {error!r}; --data says where the images are") from error
    if not saved and not args.data:
        raise UserError(f"{student} lies in no run directory (no {file}): --data says where the run's images are")
    given = {name: getattr(args, name) for name in ("data", "data_dir", "workers") if getattr(args, name) is not None}
    defaults = train.parse_args(["--data", given.get("data", "digits")])
    flags = argparse.Namespace(**vars(defaults) | saved | given)
    data = open_data(flags)
    if [str(name) for name in data.label_names] != config["label_names"]:
        raise UserError(
            f"--data {flags.data} has other classes than {student}: {', '.join(map(str, data.label_names[:3]))}, ... "
            f"and not {', '.join(config['label_names'][:3])}, ..."
        )
    return RunData(data, flags, config)


def validation_batches(
    run: RunData, batch_size: int, limit: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(uint8 (B, H, W, 3), class indices (B,)) over the validation set, or an evenly spaced part of it."""
    source = run.data.val
    total = len(source)
    if limit is not None and limit < total and not isinstance(source, IterableDataset):
        samples = Samples(source, eval_transform(run.config), 0, train=False)
        picked = np.linspace(0, total - 1, limit).astype(int).tolist()
        loader: Any = (
            collate([samples[0, index] for index in picked[start : start + batch_size]])
            for start in range(0, len(picked), batch_size)
        )
    else:
        loader = make_loader(source, eval_transform(run.config), batch_size, False, run.flags, torch.device("cpu"))
        loader = itertools.islice(loader, None if limit is None else -(-limit // batch_size))
    corrupt = CorruptCount("validation", total)
    for images, labels, bad in progress(loader, "validation images"):
        corrupt.add(bad)
        if images is not None:
            yield as_numpy(images), labels.numpy()


def calibration_images(run: RunData, count: int) -> np.ndarray:
    """uint8 (count, H, W, 3) of the training set, drawn with a fixed seed, prepared as for evaluation."""
    source, transform = run.data.train, eval_transform(run.config)
    images: list[torch.Tensor] = []
    if isinstance(source, IterableDataset):
        for batch in make_loader(source, transform, 32, False, run.flags, torch.device("cpu")):
            images.extend([] if batch.images is None else batch.images)
            if len(images) >= count:
                break
    else:
        samples = Samples(source, transform, 0, train=False)
        corrupt = CorruptCount("training", len(samples))
        for index in np.random.default_rng(0).permutation(len(samples)):
            image, _, bad = samples[0, int(index)]
            corrupt.add(bad)
            images.extend([] if image is None else [image])
            if len(images) == count:
                break
    if not images:
        raise UserError("not one training image could be read")
    return as_numpy(torch.stack(images[:count]))


def as_numpy(images: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())

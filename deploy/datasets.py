"""What --data names: the embedded digits, CIFAR, or a folder of photographs. Needs torchvision; for train.py."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset

from deploy.cli import UserError
from deploy.preprocess import endings, open_image
from deploy.ranks import IS_MAIN, local_rank_zero_first


class Data(NamedTuple):
    train: Any  # datasets of (PIL image, class index)
    val: Any
    label_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fifth of each class held out."""

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        images, self.labels = (split[0], split[2]) if train else (split[1], split[3])
        self.images = (images * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_data(name: str, folder: str = "data", download: bool = False) -> Data:
    """The data set that --data names; folder: where cifar is kept."""
    if name == "digits":
        return Data(Digits(train=True), Digits(train=False), [str(i) for i in range(10)], (0.5,) * 3, (0.5,) * 3)
    if name in ("cifar10", "cifar100"):
        cifar = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        try:
            with local_rank_zero_first():
                train, val = (cifar(folder, train=train, download=download) for train in (True, False))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name} in {folder!r}: {error}; --download fetches it") from error
        return Data(train, val, train.classes, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return open_folder(name)


def open_folder(name: str) -> Data:
    root = Path(name)
    missing = [str(root / part) for part in ("train", "val") if not os.path.isdir(root / part)]
    if missing:
        expected = "a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or one of digits, cifar10, cifar100"
        raise UserError(f"--data {name}: no folder {' and no folder '.join(missing)}; expected {expected}")
    try:
        train, val = (Photos(str(root / part)) for part in ("train", "val"))
    except FileNotFoundError as error:
        raise UserError(f"--data {name}: {' '.join(str(error).split())}") from error
    if train.classes != val.classes:
        difference = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"--data {name}: train/ and val/ hold different classes: {', '.join(difference[:5])}")
    if len(train.classes) < 2:
        raise UserError(f"--data {name} has the one class {train.classes[0]}: at least 2 are needed")
    for part in (train, val):
        if part.left_out and IS_MAIN:
            kinds = ", ".join(f"{count} {end or 'without ending'}" for end, count in part.left_out.most_common(8))
            print(f"{part.root}: {sum(part.left_out.values())} files are no images by their names: {kinds}", flush=True)
    names = [os.fsencode(name).decode(errors="replace") for name in train.classes]  # UTF-8, whatever the locale
    return Data(train, val, names, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class Photos(torchvision.datasets.ImageFolder):
    """A folder for each class. What is hidden (.ipynb_checkpoints, ._photo.jpg) is no data; what else is left out is
    counted by its ending."""

    def __init__(self, root: str) -> None:
        self.left_out: collections.Counter[str] = collections.Counter()
        super().__init__(root, loader=open_image, is_valid_file=self.is_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: index for index, name in enumerate(names)}

    def is_image(self, path: str) -> bool:
        if os.sep + "." in path[len(self.root) :]:
            return False
        ending = os.path.splitext(path)[1].lower()
        if ending not in endings():
            self.left_out[ending] += 1
        return ending in endings()

"""What --data names: the embedded digits, CIFAR, or a folder of photographs. Needs torchvision; for train.py."""

from __future__ import annotations

import collections
import copy
import csv
import hashlib
import io
import math
import os
import statistics
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset

from deploy.cli import UserError, write_whole
from deploy.preprocess import UnreadableImage, endings, open_image, upright_size
from deploy.reference import evenly
from kdlite.training.distributed import IS_MAIN, local_rank_zero_first

EXPECTED = "a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or one of digits, cifar10, cifar100"
SPLIT = "split.csv"  # of a run directory: see write_split
# Folders of these names that hold folders are sets of images, and no classes.
SETS = ("train", "training", "val", "valid", "validation", "test", "testing")


class Data(NamedTuple):
    train: Any  # datasets of (PIL image, class index), which know their targets and classes
    val: Any
    label_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: list[tuple[str, str]] | None = None  # where val/ was split off: (file, "train" or "val"), for write_split


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fifth of each class held out."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        images, self.targets = (split[0], split[2]) if train else (split[1], split[3])
        self.images = (images * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


def open_data(
    name: str,
    folder: str = "data",
    download: bool = False,
    val_split: float | None = None,
    seed: int = 0,
    sides: Mapping[str, str] | None = None,
) -> Data:
    """The data set that --data names.

    Args:
        name: digits, cifar10, cifar100 or a folder
        folder: where cifar is kept
        val_split: of a folder without val/, the share of each class that is kept for validation, above 0 and below 1
        seed: of that split, which depends on nothing else than the files' names: equal on every machine
        sides: the split of a run that goes on (read_split), which is kept; files that are new go to training

    Raises:
        UserError: it is not there or not whole, or val_split does not fit it
    """
    if val_split is not None and not 0 < val_split < 1:
        raise UserError(f"--val-split must be above 0 and below 1, got {val_split:g}")
    if name in ("digits", "cifar10", "cifar100") and val_split is not None:
        raise UserError(f"--val-split {val_split:g}: {name} has validation images of its own; leave the flag out")
    if name == "digits":
        return Data(Digits(train=True), Digits(train=False), list(Digits.classes), (0.5,) * 3, (0.5,) * 3)
    if name in ("cifar10", "cifar100"):
        cifar = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        try:
            with local_rank_zero_first():
                train, val = (cifar(folder, train=train, download=download) for train in (True, False))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name} in {folder!r}: {error}; --download fetches it") from error
        return Data(train, val, train.classes, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return open_folder(name, val_split, seed, sides)


# ---- a folder of photographs --------------------------------------------------------------------------------------


class Photos(torchvision.datasets.ImageFolder):
    """A folder for each class, named in Unicode's composed form (NFC). What is hidden (.ipynb_checkpoints, ._photo.jpg)
    is no data; what else is left out is counted by its ending."""

    def __init__(self, root: str) -> None:
        self.left_out: collections.Counter[str] = collections.Counter()
        super().__init__(root, loader=open_image, is_valid_file=self.is_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        folders = sorted(visible_folders(directory), key=composed)
        names = [composed(folder) for folder in folders]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
            raise UserError(
                f"{directory} has two folders {some(twice)}, which differ in Unicode form alone: merge them"
            )
        return names, {folder: index for index, folder in enumerate(folders)}

    def is_image(self, path: str) -> bool:
        if os.sep + "." in path[len(self.root) :]:
            return False
        ending = os.path.splitext(path)[1].lower()
        if ending not in endings():
            self.left_out[ending] += 1
        return ending in endings()

    def files(self) -> list[str]:
        """CLASS/FILE of each image, written alike on every machine."""
        return [composed(path[len(self.root) :].lstrip(os.sep)).replace(os.sep, "/") for path, _ in self.samples]

    def part(self, indices: Iterable[int]) -> Photos:
        """Some of the images, of the same classes."""
        part = copy.copy(self)
        part.samples = part.imgs = [self.samples[index] for index in indices]
        part.targets = [target for _, target in part.samples]
        return part


def open_folder(name: str, val_split: float | None, seed: int, sides: Mapping[str, str] | None) -> Data:
    root = Path(name)
    split = None
    if all(os.path.isdir(root / part) for part in ("train", "val")):
        if val_split is not None:
            raise UserError(f"--val-split {val_split:g}: --data {name} has a val/ of its own; leave the flag out")
        if sides is not None:
            say(f"{root / 'val'} is there, and is taken in place of the images that the run split off")
        train, val = (read_photos(name, root / part) for part in ("train", "val"))
        compare_classes(name, train, val)
    else:
        source = find_classes_to_split(root, unsaid=val_split is None and sides is None)
        photos = read_photos(name, source)
        files = photos.files()
        if sides is not None:
            split, how = keep_split(files, sides), "as the run was split"
        else:
            assert val_split is not None
            split, how = draw_split(files, photos.targets, val_split, seed), f"{val_split:g} of each class"
        train, val = (photos.part(i for i, file in enumerate(files) if split[file] == s) for s in ("train", "val"))
        for part, purpose in ((train, "training"), (val, "validation")):
            if lacking := [label for label, count in zip(part.classes, class_counts(part)) if not count]:
                raise UserError(f"--data {name}: no image of {some(lacking)} for {purpose}: a class needs at least 2")
        say(f"{source}: classes {some(train.classes)}; {len(train)} images to train, {len(val)} to validate, {how}")
    if len(train.classes) < 2:
        raise UserError(f"--data {name} has the one class {train.classes[0]}: at least 2 are needed")
    rows = sorted(split.items()) if split else None
    return Data(train, val, train.classes, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, rows)


def read_photos(name: str, root: Path) -> Photos:
    try:
        photos = Photos(str(root))
    except FileNotFoundError as error:
        raise UserError(f"--data {name}: {' '.join(str(error).split())}") from error
    if photos.left_out:
        kinds = ", ".join(f"{count} {end or 'without ending'}" for end, count in photos.left_out.most_common(8))
        say(f"{root}: {sum(photos.left_out.values())} files are no images by their names: {kinds}")
    return photos


def compare_classes(name: str, train: Photos, val: Photos) -> None:
    faults = []
    for here, there, part, other in (("train", "val", train, val), ("val", "train", val, train)):
        if alone := sorted(set(part.classes) - set(other.classes)):
            faults.append(f"{here}/ has {some(alone)} and {there}/ has not")
    if faults:
        raise UserError(f"--data {name}: {'; '.join(faults)}")
    if unlike := sorted(set(train.class_to_idx) - set(val.class_to_idx)):
        say(f"{name}: train/ and val/ write {some(map(composed, unlike))} in two Unicode forms: taken as the same")


def find_classes_to_split(root: Path, unsaid: bool) -> Path:
    """The folder that holds a folder for each class, train/ or root itself, where there is no val/.

    unsaid: how to split it was not said
    """
    folders = visible_folders(root) if os.path.isdir(root) else []
    sets = [folder for folder in folders if folder.lower() in SETS and visible_folders(root / folder)]
    ask = "--val-split 0.1 of train.py keeps a tenth of each class for validation"
    if "train" in sets and "val" not in folders:
        if unsaid:
            others = "".join(f"; or rename {folder}/ to val/" for folder in sets if folder.lower().startswith("val"))
            raise UserError(f"--data {root}: no folder {root / 'val'}: {ask}{others}")
        return root / "train"
    missing = " and ".join(f"no folder {root / part}" for part in ("train", "val") if not os.path.isdir(root / part))
    if sets or not folders or "val" in folders:
        held = f"; it holds {some(folders)}" if folders else ""
        raise UserError(f"--data {root}: {missing}; expected {EXPECTED}{held}")
    if runs := [folder for folder in folders if any((root / folder).glob("[0-9]*/args.json"))]:
        raise UserError(f"--data {root}: {some(runs)} would be a class, but holds runs of train.py: move it elsewhere")
    if unsaid:
        raise UserError(f"--data {root}: {missing}; if its folders are the classes ({some(folders)}), {ask}")
    return root


def visible_folders(folder: str | Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def composed(name: str) -> str:
    """A file's name as text, in Unicode's composed form: UTF-8 whatever the locale, and macOS writes é as e and ´."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode(errors="replace"))


def some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def say(line: str) -> None:
    if IS_MAIN:
        print(line, flush=True)


# ---- validation images split off ----------------------------------------------------------------------------------


def draw_split(files: Sequence[str], targets: Sequence[int], share: float, seed: int) -> dict[str, str]:
    """File -> "train" or "val", by class: the share whose names have the smallest digests, but at least one image.

    A file's place depends on its name and the seed, so that a few more files leave most of the others where they were.
    """
    members = collections.defaultdict(list)
    for file, target in zip(files, targets):
        members[target].append(file)
    sides = dict.fromkeys(files, "train")
    for of_class in members.values():
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        by_digest = sorted(of_class, key=lambda file: hashlib.sha256(f"{seed} {file}".encode()).digest())
        sides |= dict.fromkeys(by_digest[:count], "val")
    return sides


def keep_split(files: Sequence[str], sides: Mapping[str, str]) -> dict[str, str]:
    """The split of a run that goes on: what is new is trained on, what is gone keeps its side for when it is back."""
    there = set(files)
    new, gone = sorted(there - set(sides)), sorted(set(sides) - there)
    if new:
        say(f"new since this run was split, so to train on: {some(new)}")
    if gone:
        say(f"gone since this run was split: {some(gone)}")
    return {**sides, **dict.fromkeys(new, "train")}


def write_split(file: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Data.split as a CSV file: which image went where."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file", "side"), *rows])
    write_whole(file, text.getvalue())


def read_split(file: Path) -> dict[str, str] | None:
    """What write_split wrote; None where there is no such file.

    Raises:
        UserError: it is no such file
    """
    if not file.exists():
        return None
    header, *rows = read_csv(file, "a run's split") or [[]]
    wrong = [row for row in rows if len(row) != 2 or row[1] not in ("train", "val")]
    if header != ["file", "side"] or wrong or not rows:
        raise UserError(f"{file} is not a run's split: a line is not FILE,train or FILE,val: {(wrong or [header])[0]}")
    return dict(rows)  # type: ignore[arg-type]


def read_csv(file: Path, what: str) -> list[list[str]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            return [row for row in csv.reader(lines) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as {what}: {' '.join(str(error).split())}") from error


# ---- what a data set is like --------------------------------------------------------------------------------------


def class_counts(source: Any) -> list[int]:
    """Images of each class of Data.train or Data.val; none is decoded."""
    return np.bincount(source.targets, minlength=len(source.classes)).tolist()


def class_weights(spec: str, label_names: Sequence[str], counts: Sequence[int]) -> list[float]:
    """A weight for each class: of the loss of its images.

    Args:
        spec: "balanced", which is n / (C * n_c), so that the mean over the n training images is 1; or a CSV file with a
            line name,weight for each class
        label_names: of the C classes
        counts: n_c, training images of each class

    Raises:
        UserError: spec is neither, or the file's names or weights do not fit
    """
    if spec == "balanced":
        if absent := [name for name, count in zip(label_names, counts) if not count]:
            raise UserError(f"--class-weights balanced: no training image of {some(absent)}")
        return [sum(counts) / (len(counts) * count) for count in counts]
    if not os.path.isfile(spec):
        raise UserError(f"--class-weights {spec}: expected balanced, or a CSV file of name,weight for each class")
    weights: dict[str, float] = {}
    rows = read_csv(Path(spec), "class weights")
    for row in rows[1:] if rows and [cell.strip().lower() for cell in rows[0]] == ["name", "weight"] else rows:
        name = unicodedata.normalize("NFC", row[0].strip())
        try:
            weight = float(row[1])
        except (IndexError, ValueError):
            weight = math.nan
        if len(row) != 2 or not (0 <= weight < math.inf):
            raise UserError(f"{spec}: expected name,weight with a weight of at least 0, got {','.join(row)[:100]}")
        if name in weights:
            raise UserError(f"{spec} names {name} twice")
        weights[name] = weight
    for names, fault in (
        ([name for name in label_names if name not in weights], "lacks"),
        ([name for name in weights if name not in label_names], "names classes that --data has not:"),
    ):
        if names:
            raise UserError(f"{spec} {fault} {some(names)}")
    if not any(weights.values()):
        raise UserError(f"{spec}: every weight is 0, so nothing would be learned")
    return [weights[name] for name in label_names]


def median_size(photos: Photos, count: int = 200) -> tuple[int, int]:
    """(height, width) in pixels, the median over an even sample of the files; read from their headers.

    Raises:
        UserError: none of the sample can be read
    """
    sizes, reason = [], ""
    for index in evenly(len(photos), count):
        try:
            with open_image(photos.samples[index][0]) as image:
                sizes.append(upright_size(image)[::-1])
        except UnreadableImage as error:
            reason = f"{photos.samples[index][0]}: {error}"
    if not sizes:
        raise UserError(f"not one of {min(count, len(photos))} images can be read; the last is {reason}")
    return tuple(round(statistics.median(side)) for side in zip(*sizes))  # type: ignore[return-value]

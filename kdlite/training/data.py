"""Open the data set that --data names: the embedded digits, CIFAR, or a folder of photographs."""

from __future__ import annotations

import argparse
import collections
import copy
import hashlib
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset, Subset

from deploy.cli import UserError, files_in, is_code, is_hidden
from deploy.flags import Table, pick_recipe, settle_flags
from deploy.preprocess import UnreadableImage, endings, open_image, upright_size
from deploy.reference import evenly
from deploy.run_directory import SPLIT, nfc, read_csv, read_given, read_split
from deploy.student import is_folder
from kdlite.training.distributed import from_rank_zero, local_rank_zero_first, log

EXPECTED = "a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or one of digits, cifar10, cifar100"
NO_LABEL = -1  # the target of an image of --unlabelled
FOLDER = "data"  # the folder for the downloads of CIFAR
# A folder with one of these names is not a class if it contains folders.
SETS = ("train", "training", "val", "valid", "validation", "test", "testing")


class Data(NamedTuple):
    """Hold a data set."""

    train: Any  # a sequence of (PIL image, class index) with the attributes targets and classes
    val: Any
    label_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: list[tuple[str, str]] | None = None  # (file, "train" or "val") if this run splits the images
    unlabelled: int = 0  # number of images at the end of train, whose target is NO_LABEL

    @property
    def labelled(self) -> Any:
        """Return the training images with a label."""
        return self.train.part(range(len(self.train) - self.unlabelled)) if self.unlabelled else self.train

    @property
    def before_fold(self) -> Any:
        """Return the training images as they are without --fold, because stored labels cover all of them."""
        return self.train.dataset if isinstance(self.train, Fold) else self.train

    def preprocessing(self, channels: int, interpolation: str, crop: float) -> dict[str, Any]:
        """Return mean, std, interpolation and crop for images of 3 channels or of 1."""
        mean, std = ([sum(x) / 3] if channels == 1 else list(x) for x in (self.mean, self.std))
        return {"mean": mean, "std": std, "interpolation": interpolation, "crop": crop}

    def digest(self, part: Any, *settings: Any) -> str:
        """Return a digest of the names and classes of the images of train or val, and of any settings."""
        names = part.files() if hasattr(part, "files") else map(str, range(len(part)))
        digest = hashlib.sha256("".join(map(str, settings)).encode())
        for name, target in zip(names, part.targets):
            label = "" if target == NO_LABEL else self.label_names[int(target)]
            digest.update(f"{name}\0{label}\n".encode())
        return digest.hexdigest()


class Digits(Dataset):
    """Hold scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fifth of each class is for validation."""

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


def open_data(name: str, val_split: float | None = None, seed: int = 0, sides: Mapping[str, str] | None = None) -> Data:
    """Open a data set; raise UserError if it is missing or damaged, or if val_split does not fit it.

    Args:
        name: digits, cifar10, cifar100 (downloaded into data/) or a folder
        val_split: share of each class for validation, above 0 and below 1; for a folder without val/
        seed: seed of the split; the split depends only on it and on the names of the files
        sides: the split of a resumed run (read_split); new files become training images
    """
    if val_split is not None and not 0 < val_split < 1:
        raise UserError(f"--val-split must be above 0 and below 1, got {val_split:g}")
    if name not in ("digits", "cifar10", "cifar100"):
        return open_folder(name, val_split, seed, sides)
    if val_split is not None:
        raise UserError(f"--val-split {val_split:g}: {name} has its own validation images; leave the flag out")
    if name == "digits":
        return Data(Digits(train=True), Digits(train=False), list(Digits.classes), (0.5,) * 3, (0.5,) * 3)
    cifar = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        with local_rank_zero_first():
            train, val = (cifar(FOLDER, train=train, download=True) for train in (True, False))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is not in {FOLDER}/ and could not be downloaded: {reason}") from error
    return Data(train, val, train.classes, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def open_run(table: Table, typed: dict[str, Any]) -> tuple[argparse.Namespace, dict[str, Any], Data]:
    """Return the value of every flag, the flags that a run directory stores, and the data set.

    Without --recipe, a folder of images gets a recipe that fits its images; the run prints it.
    """
    saved, sides = {}, None
    if typed.get("resume"):
        folder = Path(typed["output"])
        saved, sides = from_rank_zero(read_given, folder), from_rank_zero(read_split, folder / SPLIT)
    args, given = settle_flags(table, typed, saved)
    data = open_data(args.data, args.val_split, sides=sides)
    if args.unlabelled:
        data = add_unlabelled(data, Path(args.unlabelled))
    if args.recipe is None:
        pretrained = bool(args.pretrained or is_folder(args.model))
        size = from_rank_zero(median_size, data.labelled)
        recipe, why = pick_recipe(len(data.train), len(data.label_names), size, pretrained, given.get("img_size"))
        if is_code(args.model):
            recipe = recipe | {"small_stem": False}  # the user's own model keeps its stem
        overridden = [f"--{name.replace('_', '-')} {given[name]}" for name in recipe if name in given]
        log(f"{why}; you gave {', '.join(overridden)}" if overridden else f"{why} (--recipe or a flag changes them)")
        args, given = settle_flags(table, typed, saved, recipe)
    if fold := vars(args).get("fold"):  # teacher_labels.py has no --fold: it stores all training images
        data = hold_out(data, *fold)
    return args, given, data


# ---- a folder of photographs --------------------------------------------------------------------------------------


class Photos(torchvision.datasets.ImageFolder):
    """Hold the images of a folder with one subfolder for each class; class names are in Unicode's composed form (NFC).

    Hidden files and folders (.ipynb_checkpoints, ._photo.jpg) and __MACOSX are skipped. Other files whose ending is not
    that of an image are skipped too; a line names the eight most frequent endings.
    """

    def __init__(self, root: Path) -> None:
        self.left_out: collections.Counter[str] = collections.Counter()
        outside = 0
        for file in files_in(root):  # raises UserError for a folder that cannot be read and for a loop of links
            outside += os.path.dirname(file) == str(root) and ending_of(file) in endings()
        if outside:
            log(f"{root}: skipped {outside} images outside the folders of the classes")
        super().__init__(str(root), loader=open_image, is_valid_file=self.is_image, allow_empty=True)
        counts = class_counts(self)
        if empty := [name for name, count in zip(self.classes, counts) if not count]:
            kinds = f" (skipped in all folders: {self.describe_left_out()})" if self.left_out else ""
            raise UserError(f"{root}: no image in {abbreviate(empty)}{kinds}: add images, or remove the folder")
        if self.left_out:
            count, kinds = sum(self.left_out.values()), self.describe_left_out()
            log(f"{root}: skipped {count} files without the extension of an image: {kinds}")

    def describe_left_out(self) -> str:
        kinds = [f"{count} {end or 'without ending'}" for end, count in self.left_out.most_common(8)]
        if self.left_out.keys() & {".heic", ".heif"}:
            kinds += ["convert HEIC to JPEG first (magick mogrify -format jpg FILES)"]
        return ", ".join(kinds)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        folders = sorted(visible_folders(directory), key=nfc)
        names = [nfc(folder) for folder in folders]
        if not names:
            raise UserError(f"{directory}: expected a folder for each class, found none")
        if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
            folders_of = f"two folders {abbreviate(twice)}"
            raise UserError(f"{directory} has {folders_of} that differ only in their Unicode form: merge them")
        return names, {folder: index for index, folder in enumerate(folders)}

    def is_image(self, path: str, root: Path | None = None) -> bool:
        if any(map(is_hidden, Path(path).relative_to(root or self.root).parts)):
            return False
        if (ending := ending_of(path)) not in endings():
            self.left_out[ending] += 1
        return ending in endings()

    def files(self) -> list[str]:
        """Return CLASS/FILE of each image, the same text on every machine."""
        return [nfc(Path(os.path.relpath(path, self.root)).as_posix()) for path, _ in self.samples]

    def part(self, indices: Iterable[int]) -> Photos:
        """Return a part of the images, with all classes."""
        part = copy.copy(self)
        part.samples = part.imgs = [self.samples[index] for index in indices]
        part.targets = [target for _, target in part.samples]
        return part


def add_unlabelled(data: Data, folder: Path) -> Data:
    """Return the data set with the images of a folder and its subfolders added as training images without a label."""
    if not isinstance(data.train, Photos):
        raise UserError(f"--unlabelled {folder} needs a folder of photographs as --data")
    if not folder.is_dir():
        raise UserError(f"--unlabelled {folder}: no such folder")
    train = data.train.part(range(len(data.train)))
    train.left_out = collections.Counter()
    found = sorted(file for file in files_in(folder) if train.is_image(file, folder))
    labelled = {os.path.realpath(path) for part in (data.train, data.val) for path, _ in part.samples}
    files = [file for file in found if os.path.realpath(file) not in labelled]
    skipped = f", skipped: {train.describe_left_out()}" if train.left_out else ""
    skipped += f", skipped: {len(found) - len(files)} images of --data" if len(files) < len(found) else ""
    if not files:
        raise UserError(f"--unlabelled {folder}: no image in it{skipped}")
    train.samples = train.imgs = [*train.samples, *((file, NO_LABEL) for file in files)]
    train.targets = [target for _, target in train.samples]
    log(f"{folder}: {len(files)} images without a label{skipped}")
    return data._replace(train=train, unlabelled=len(files))


def open_folder(name: str, val_split: float | None, seed: int, sides: Mapping[str, str] | None) -> Data:
    """Open a folder with train/ and val/, or split a folder of classes."""
    root = Path(name)
    rows = None
    if all(os.path.isdir(root / part) for part in ("train", "val")):
        if val_split is not None:
            raise UserError(f"--val-split {val_split:g}: --data {name} has its own val/; leave the flag out")
        if sides is not None:
            log(f"{root / 'val'} exists now and replaces the validation images that the run had split off")
        train, val = (Photos(root / part) for part in ("train", "val"))
        compare_classes(name, train, val)
    else:
        source = find_classes_to_split(root, asks=val_split is None and sides is None)
        photos = Photos(source)
        files = photos.files()
        if sides is not None:
            split, how = keep_split(files, sides), "with the split of the run"
        else:
            assert val_split is not None
            split, how = draw_split(files, photos.targets, val_split, seed), f"{val_split:g} of each class"
        train, val = (photos.part(i for i, file in enumerate(files) if split[file] == s) for s in ("train", "val"))
        for part, purpose in ((train, "training"), (val, "validation")):
            if lacking := [label for label, count in zip(part.classes, class_counts(part)) if not count]:
                raise UserError(f"--data {name}: no image of {abbreviate(lacking)} for {purpose}: a class needs 2")
        sizes = f"{len(train)} images to train, {len(val)} to validate"
        log(f"{source}: classes {abbreviate(train.classes)}; {sizes}, {how}")
        rows = sorted(split.items())
    if len(train.classes) < 2:
        raise UserError(f"--data {name} has only the class {train.classes[0]}: at least 2 are needed")
    return Data(train, val, train.classes, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, rows)


def compare_classes(name: str, train: Photos, val: Photos) -> None:
    faults = []
    for here, there, part, other in (("train", "val", train, val), ("val", "train", val, train)):
        if alone := sorted(set(part.classes) - set(other.classes)):
            faults.append(f"{here}/ has {abbreviate(alone)}, but {there}/ has not")
    if faults:
        raise UserError(f"--data {name}: {'; '.join(faults)}")
    if unlike := sorted(set(train.class_to_idx) - set(val.class_to_idx)):
        forms = "two Unicode forms of the name in train/ and val/ count as one class"
        log(f"{name}: {abbreviate(map(nfc, unlike))}: {forms}")


def find_classes_to_split(root: Path, asks: bool) -> Path:
    """Return the folder of the class folders, for a data set without val/: train/ if it exists, else root.

    asks: instead of returning a folder, raise a UserError that advises --val-split
    """
    folders = visible_folders(root) if os.path.isdir(root) else []
    sets = [folder for folder in folders if folder.lower() in SETS and visible_folders(root / folder)]
    ask = "--val-split 0.1 of train.py keeps a tenth of each class for validation"
    if "train" in sets and "val" not in folders:
        if asks:
            others = "".join(f"; or rename {folder}/ to val/" for folder in sets if folder.lower().startswith("val"))
            raise UserError(f"--data {root}: no folder {root / 'val'}: {ask}{others}")
        return root / "train"
    missing = " and ".join(f"no folder {root / part}" for part in ("train", "val") if not os.path.isdir(root / part))
    missing = missing if os.path.exists(root) else "no such folder"
    if os.path.isfile(root):
        raise UserError(f"--data {root} is a file; expected {EXPECTED}")
    if sets or not folders or "val" in folders:
        held = f"; it holds {abbreviate(folders)}" if folders else ""
        classes = "" if folders or not os.path.isdir(root) else "; or with --val-split a folder with CLASS/*.jpg"
        raise UserError(f"--data {root}: {missing}; expected {EXPECTED}{classes}{held}")
    if runs := [folder for folder in folders if any((root / folder).glob("[0-9]*/args.json"))]:
        raise UserError(f"--data {root}: {abbreviate(runs)} holds runs of train.py and is not a class: move it away")
    if asks:
        raise UserError(f"--data {root}: {missing}; if its folders are the classes ({abbreviate(folders)}), {ask}")
    return root


def ending_of(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def visible_folders(folder: str | Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def abbreviate(names: Iterable[str]) -> str:
    """Return the first five names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- validation on a part of the training images -------------------------------------------------------------------


class Fold(Subset):
    """Hold some images of a data set. An image keeps its number, because its random seed and stored labels need it."""

    def __init__(self, whole: Any, numbers: Sequence[int]) -> None:
        super().__init__(whole, numbers)
        self.classes, self.targets = whole.classes, [int(whole.targets[i]) for i in numbers]
        self.samples = [whole.samples[i] for i in numbers] if hasattr(whole, "samples") else []

    def files(self) -> list[str]:
        """Return the names of the images in the whole set: CLASS/FILE, or numbers."""
        whole: Any = self.dataset
        names = whole.files() if hasattr(whole, "files") else list(map(str, range(len(whole))))
        return [names[i] for i in self.indices]


def hold_out(data: Data, part: int, parts: int) -> Data:
    """Return the data set with one part of its training images for validation, the rest for training.

    The parts are disjoint, and each class is split evenly between them; data.val is not used.

    Args:
        data: the data set
        part: the number of the part, from 0
        parts: number of parts
    """
    if data.unlabelled or not part < parts or parts < 2:
        raise UserError(f"--fold {part} {parts}: expected I N with I < N and N of at least 2, and no --unlabelled")
    whole = Fold(data.train, range(len(data.train)))
    members = collections.defaultdict(list)
    for number, (file, target) in enumerate(zip(whole.files(), whole.targets)):
        members[target].append((hashlib.sha256(f"fold {file}".encode()).digest(), number))
    held = {number for of_class in members.values() for _, number in sorted(of_class)[part::parts]}
    train = Fold(data.train, [number for number in range(len(whole)) if number not in held])
    if lacking := [name for name, count in zip(train.classes, class_counts(train)) if not count]:
        raise UserError(f"--fold {part} {parts}: no image of {abbreviate(lacking)} is left to train on: add images")
    if not held:
        raise UserError(f"--fold {part} {parts}: no image is left to validate on: use a smaller N")
    return data._replace(train=train, val=Fold(data.train, sorted(held)))


# ---- the split of a folder without val/ ----------------------------------------------------------------------------


def draw_split(files: Sequence[str], targets: Sequence[int], share: float, seed: int) -> dict[str, str]:
    """Return "train" or "val" for each file: in each class, the names with the smallest digests are for validation.

    A digest depends only on the name and the seed, so new files move only a few old files between training and
    validation. Each class of two or more files has at least one file for validation.
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
    """Return the split of a resumed run: new files become training images, missing files stay in it."""
    there = set(files)
    new, gone = sorted(there - set(sides)), sorted(set(sides) - there)
    if new:
        log(f"new since this run was split, added to the training images: {abbreviate(new)}")
    if gone:
        log(f"missing since this run was split: {abbreviate(gone)}")
    return {**sides, **dict.fromkeys(new, "train")}


# ---- statistics of a data set --------------------------------------------------------------------------------------


def class_counts(source: Any) -> list[int]:
    """Return the number of labelled images of each class, without decoding images."""
    targets = np.asarray(source.targets, np.int64)
    return np.bincount(targets[targets != NO_LABEL], minlength=len(source.classes)).tolist()


def class_weights(spec: str, label_names: Sequence[str], counts: Sequence[int]) -> list[float]:
    """Return a weight for the loss of each class; the mean over the training images is 1, so that --lr keeps its scale.

    Args:
        spec: "balanced" (weights of n / (C * n_c)), or a CSV file with a line name,weight for each class
        label_names: names of the C classes
        counts: n_c, the number of training images of each class
    """
    if spec == "balanced":
        if absent := [name for name, count in zip(label_names, counts) if not count]:
            raise UserError(f"--class-weights balanced: no training image of {abbreviate(absent)}")
        weights = {name: 1 / count for name, count in zip(label_names, counts)}
    elif os.path.isfile(spec):
        weights = read_class_weights(Path(spec))
        if lacking := [name for name in label_names if name not in weights]:
            raise UserError(f"{spec} lacks {abbreviate(lacking)}")
        if unknown := [name for name in weights if name not in label_names]:
            raise UserError(f"{spec} names classes that --data does not have: {abbreviate(unknown)}")
    else:
        raise UserError(f"--class-weights {spec}: expected balanced, or a CSV file of name,weight for each class")
    total = sum(weights[name] * count for name, count in zip(label_names, counts))
    if not 0 < total < math.inf:
        raise UserError(f"{spec}: the weights of the training images sum to {total:g}: expected a finite sum above 0")
    return [weights[name] * sum(counts) / total for name in label_names]


def read_class_weights(file: Path) -> dict[str, float]:
    weights: dict[str, float] = {}
    rows = read_csv(file, "class weights")
    for row in rows[1:] if rows and [cell.strip().lower() for cell in rows[0]] == ["name", "weight"] else rows:
        name = nfc(row[0].strip())
        try:
            weight = float(row[1])
        except (IndexError, ValueError):
            weight = math.nan
        if len(row) != 2 or not (0 <= weight < math.inf):
            raise UserError(f"{file}: expected name,weight with a weight of at least 0, got {','.join(row)[:100]}")
        if name in weights:
            raise UserError(f"{file} names {name} twice")
        weights[name] = weight
    return weights


def median_size(photos: Photos, count: int = 200) -> tuple[int, int]:
    """Return the median (height, width) in pixels of `count` evenly spaced files.

    Raise UserError if all of them are unreadable.
    """
    sizes, reason = [], ""
    for index in evenly(len(photos), count):
        try:
            with open_image(photos.samples[index][0]) as image:
                sizes.append(upright_size(image)[::-1])
        except UnreadableImage as error:
            reason = f"{photos.samples[index][0]}: {error}"
    if not sizes:
        raise UserError(f"none of the {min(count, len(photos))} images can be read; the last is {reason}")
    return tuple(round(statistics.median(side)) for side in zip(*sizes))  # type: ignore[return-value]

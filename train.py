"""Train an image classifier, with a teacher (NKD, classic KD), with itself (USKD), or plainly.

    torchrun train.py --self-kd uskd --model mobilenet_v2                     # 1,797 digits, nothing to download
    python train.py --model resnet18 --small-stem                             # cross-entropy, the baseline
    python train.py --kd nkd --teacher runs/001-resnet18-ce/student           # a run's student as the teacher
    python train.py --data photos/ --model mobilenet_v2 --self-kd uskd        # photos/train/CLASS/*.jpg, photos/val/...
    torchrun --nproc-per-node 8 train.py --data /imagenet --model resnet18 --teacher resnet34 --kd nkd
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...
    python train.py --output runs/002-mobilenet_v2-uskd --resume              # go on where it stopped

One flat file, in the order it runs: arguments, data, models, losses, evaluation, run directory, training.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchvision.transforms import v2
from tqdm import tqdm

from deploy.cli import Parser, UserError, explain, show_error, write_whole
from deploy.preprocess import RESAMPLING, UnreadableImage, open_image, prepare, to_rgb
from deploy.reference import NAME, Reference, evenly, write_reference
from deploy.runtimes import source_of
from deploy.student import build_model, check_forward, find_architecture, load_student, load_weights, save_student
from kdlite import WithWeakHead, nkd_loss, uskd_loss

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
IS_MAIN = RANK == 0


class RankError(UserError):
    """One that this rank alone may meet, so that it must say so itself."""


# ---- arguments ----------------------------------------------------------------------------------------------------

# Groups of defaults; any flag overrides. cifar, imagenet-cnn and imagenet-vit: the schedules and hyperparameters
# behind the paper's tables (arXiv 2303.13005 and its official configs).
RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(
        epochs=15, batch_size=32, opt="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=1,
        step_epochs=[8, 12], step_factor=0.1, img_size=32, crop="pad", hflip=0.0,
        gamma=1.5, temperature=1.0, alpha=1.0, beta=0.1, mu=0.005,
    ),
    "cifar": dict(
        epochs=200, batch_size=128, opt="momentum", lr=0.1, weight_decay=5e-4, schedule="step",
        step_epochs=[60, 120, 160], step_factor=0.2, img_size=32, crop="pad", hflip=0.5, small_stem=True,
        gamma=3.5, temperature=3.0, alpha=0.1, beta=0.1, mu=0.1,
    ),
    "imagenet-cnn": dict(
        epochs=100, batch_size=256, opt="momentum", lr=0.1, weight_decay=1e-4, schedule="step",
        step_epochs=[30, 60, 90], step_factor=0.1, img_size=224, crop="resized", hflip=0.5, eval_crop=0.875,
        gamma=1.5, temperature=1.0, alpha=1.0, beta=0.1, mu=0.005,
    ),
    "imagenet-vit": dict(
        epochs=300, batch_size=1024, opt="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=5,
        step_epochs=[150, 225], step_factor=0.1, img_size=224, crop="resized", hflip=0.5, eval_crop=0.9,
        interpolation="bicubic", mixup=0.8, cutmix=1.0,
        label_smoothing=0.1, randaugment=[2, 9], random_erasing=0.25,
        gamma=1.0, temperature=1.0, alpha=1.0, beta=0.1, mu=0.005,
    ),
}  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    recipes = (f"{name}: {', '.join(f'{k} {v}' for k, v in values.items())}" for name, values in RECIPES.items())
    parser = Parser(description=(__doc__ or "").partition("\n\n")[0], epilog="Recipes. " + ". ".join(recipes))
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    group.add_argument("--data", default="digits", help="digits (embedded), cifar10, cifar100, a folder with train/ "
                       "and val/, or a timm dataset name (hfds/..., torch/...)")  # fmt: skip
    group.add_argument("--data-dir", default="data", help="where cifar and timm datasets are kept")
    group.add_argument("--download", action="store_true", help="fetch cifar or timm datasets that are not there yet")
    group.add_argument("--num-classes", type=int, help="for timm datasets that do not say how many they have")
    group.add_argument("--img-size", type=int, help="height and width the student sees, in pixels")
    group.add_argument("--crop", choices=["resized", "pad", "none"],
                       help="training crop: random resized, random after padding by 1/8, or none")  # fmt: skip
    group.add_argument("--hflip", type=float, help="probability of a horizontal flip")
    group.add_argument("--randaugment", type=int, nargs=2, metavar=("OPS", "MAGNITUDE"), help="RandAugment; 0 0 is off")
    group.add_argument("--random-erasing", type=float, default=0.0, help="probability of random erasing")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha of mixup, 0 is off")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha of cutmix, 0 is off")
    group.add_argument("--eval-crop", type=float, default=1.0, help="share of the resized side kept in evaluation")
    group.add_argument("--interpolation", choices=sorted(RESAMPLING), default="bilinear", help="of every resize")
    group.add_argument("--cache", choices=["none", "device"], default="none",
                       help="device: decode all images once, keep them in device memory at --img-size, and crop and "
                       "flip them there; for data sets of small images")  # fmt: skip
    group.add_argument("--workers", type=int, help="data loading processes per process (default: the cores it has)")

    group = parser.add_argument_group("models")
    group.add_argument("--model", default="mobilenet_v2", help="torchvision's or timm's name, a run's student/ folder "
                       "to start from, or your own path/to/file.py:build, called as build(num_classes=C)")  # fmt: skip
    group.add_argument("--model-args", nargs="+", default=[], metavar="KEY=VALUE", help="passed on to the model")
    group.add_argument("--small-stem", action=flag, default=False,
                       help="for images of 64 px and less: 3x3 first convolution, no stride, no max-pool")  # fmt: skip
    group.add_argument("--teacher", help="as --model; a library's name means its ImageNet weights (a download)")

    group = parser.add_argument_group("distillation, added to the cross-entropy")
    group.add_argument("--kd", choices=["nkd", "kd"], help="with --teacher: NKD, or classic temperature KD")
    group.add_argument("--self-kd", choices=["uskd"], help="without a teacher: USKD")
    group.add_argument("--tap", help="layer whose feature feeds USKD's weak head (default: by architecture)")
    group.add_argument("--gamma", type=float, help="NKD: weight of the non-target term")
    group.add_argument("--temperature", type=float, help="NKD: of the non-target term")
    group.add_argument("--kd-weight", type=float, default=1.0, help="KD: weight of the temperature-squared KL term")
    group.add_argument("--kd-temperature", type=float, default=4.0, help="KD: temperature")
    group.add_argument("--alpha", type=float, help="USKD: weight of the target term")
    group.add_argument("--beta", type=float, help="USKD: weight of the non-target term")
    group.add_argument("--mu", type=float, help="USKD: weight of the weak head's cross-entropy")

    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=sorted(RECIPES), help="a group of defaults (default: by --data: digits, "
                       "cifar, else imagenet-cnn)")  # fmt: skip
    group.add_argument("--epochs", type=int, help="the recipe's warm-up and step epochs are stretched to fit")
    group.add_argument("--batch-size", type=int, help="images per optimizer step, over all processes")
    group.add_argument("--grad-accum", type=int, default=1, help="split each optimizer step into this many passes")
    group.add_argument("--opt", help="a timm optimizer: momentum (plain SGD), sgd (Nesterov), adamw, ...")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--schedule", choices=["cosine", "step"])
    group.add_argument("--warmup-epochs", type=float, help="linear warm-up, part of --epochs")
    group.add_argument("--step-epochs", type=float, nargs="+", help="step schedule: when")
    group.add_argument("--step-factor", type=float, help="step schedule: times what")
    group.add_argument("--label-smoothing", type=float, default=0.0, help="of the cross-entropy alone")
    group.add_argument("--clip-grad", type=float, help="largest gradient norm")
    group.add_argument("--ema-decay", type=float, default=0.0, help="average of the weights, evaluated and saved in "
                       "their place; 0 is off")  # fmt: skip
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                       help="mixed precision; auto: bf16 where the GPU has it, else fp16, off on CPU")  # fmt: skip
    group.add_argument("--compile", action=flag, default=False, help="torch.compile student and teacher")
    group.add_argument("--channels-last", action=flag, default=True, help="memory layout of images and weights")
    group.add_argument("--sync-bn", action="store_true", help="batch-norm statistics over all GPUs")

    group = parser.add_argument_group("run directory")
    group.add_argument("--output", help="where the run is kept (default: the next number under runs/)")
    group.add_argument("--resume", action="store_true", help="go on from last.pt in --output, if it is there")
    group.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    group.add_argument("--reference", type=int, default=256, metavar="N",
                       help="at the end keep N validation and N training images, prepared, with the student's answers "
                       "in reference.npz, for deploy/; 0: none")  # fmt: skip
    group.add_argument("--log-interval", type=int, default=50, help="optimizer steps between looks at the losses")
    for action in parser._actions:
        by_recipe = any(action.dest in values for values in RECIPES.values())
        default = "by recipe" if by_recipe else action.default
        if default not in (None, False, [], argparse.SUPPRESS):
            action.help = f"{action.help or ''} (default: {default})".strip()
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, on top of the recipe's defaults or, with --resume, of those the run was started with."""
    parser = get_parser()
    first, unset = parser.parse_args(argv), parser.parse_args([])
    if first.resume and not first.output:
        parser.error("--resume needs --output, the run directory to go on in")
    saved = {}
    if first.resume and first.overwrite:
        parser.error("--resume goes on with a run, --overwrite replaces it: give one of them")
    if first.resume and (Path(first.output) / "args.json").exists():
        try:
            saved = dict(json.loads((Path(first.output) / "args.json").read_text())["flags"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"cannot read {first.output}/args.json to resume from: {error!r}")
        saved = {name: value for name, value in saved.items() if name not in ("resume", "overwrite", "output")}
    by_data = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar"}
    recipe = first.recipe or saved.get("recipe") or by_data.get(saved.get("data", first.data), "imagenet-cnn")
    parser.set_defaults(**RECIPES[recipe] | {"step_epochs": None, "warmup_epochs": None} | saved | {"recipe": recipe})
    args = parser.parse_args(argv)
    # the recipe's milestones and warm-up keep their place in a shorter or longer run
    stretch = args.epochs / RECIPES[recipe]["epochs"]
    if args.step_epochs is None:
        args.step_epochs = [epoch * stretch for epoch in RECIPES[recipe].get("step_epochs", [])]
    if args.warmup_epochs is None:
        args.warmup_epochs = RECIPES[recipe].get("warmup_epochs", 0) * stretch

    if args.kd and not args.teacher:
        parser.error(f"--kd {args.kd} needs --teacher: a model name, a run's student/ folder or file.py:build")
    if args.teacher and not args.kd:
        parser.error("--teacher needs --kd nkd or --kd kd")
    of_method = {
        "--kd nkd": (args.kd == "nkd", ["gamma", "temperature"]),
        "--kd kd": (args.kd == "kd", ["kd_weight", "kd_temperature"]),
        "--self-kd uskd": (args.self_kd == "uskd", ["tap", "alpha", "beta", "mu"]),
    }
    for method, (chosen, names) in of_method.items():
        for name in names:
            if not chosen and getattr(first, name) != getattr(unset, name):
                parser.error(f"--{name.replace('_', '-')} needs {method}")
    if Path(args.model).is_dir() and (args.model_args or "--small-stem" in (sys.argv if argv is None else argv)):
        parser.error("--model is a student/ folder, which has its own --model-args and --small-stem")
    if args.randaugment and not (args.randaugment[0] >= 0 and 0 <= args.randaugment[1] <= 30):
        parser.error(f"--randaugment takes at least 0 operations and a magnitude of 0 to 30, got {args.randaugment}")
    if args.randaugment and args.randaugment[0] and args.cache == "device":
        parser.error("--randaugment works on single images, --cache device on whole batches: say --randaugment 0 0")
    at_least = dict(
        epochs=1, batch_size=1, grad_accum=1, img_size=1, log_interval=1, workers=0, lr=0, weight_decay=0,
        warmup_epochs=0, gamma=0, alpha=0, beta=0, mu=0, kd_weight=0, mixup=0, cutmix=0, num_classes=2, seed=0,
        reference=0,
    )  # fmt: skip
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("temperature", "kd_temperature", "clip_grad", "eval_crop", "step_factor"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
    for name in ("hflip", "random_erasing", "label_smoothing", "ema_decay", "eval_crop"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(args, name)}")
    if args.batch_size % (WORLD_SIZE * args.grad_accum):
        parser.error(
            f"--batch-size {args.batch_size} must be a multiple of processes x --grad-accum = "
            f"{WORLD_SIZE} x {args.grad_accum}"
        )
    return args


def pick_device(args: argparse.Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; leave it out to train on the CPU")
    if args.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise UserError(f"{torch.cuda.device_count()} GPUs, but local rank {LOCAL_RANK}: lower --nproc-per-node")
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)


def pick_amp(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, None for full precision."""
    if args.amp == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """For what may download: one rank of a machine fetches, then the others find it."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()


# ---- data ---------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    train: Any  # datasets of (PIL image, class index)
    val: Any
    label_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Corrupt(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


Sample = tuple[Tensor | None, int, list[Corrupt]]


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


def open_data(name: str, folder: str = "data", download: bool = False, num_classes: int | None = None) -> Data:
    """The data set that --data names; folder: where cifar and timm data sets are kept."""
    if name == "digits":
        half = (0.5, 0.5, 0.5)
        data = Data(Digits(train=True), Digits(train=False), [str(i) for i in range(10)], half, half)
    elif name in ("cifar10", "cifar100"):
        data = open_cifar(name, folder, download)
    elif re.match(r"(hfds|hfids|wds|tfds|torch)/", name) and not Path(name).is_dir():
        data = open_timm_data(name, folder, download, num_classes)
    else:
        data = open_folder(name)
    if len(data.label_names) < 2:
        raise UserError(f"--data {name} has the one class {data.label_names[0]}: at least 2 are needed")
    return data


def open_cifar(name: str, folder: str, download: bool) -> Data:
    cifar = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        with local_rank_zero_first():
            train, val = (cifar(folder, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name} in {folder!r}: {error}; --download fetches it") from error
    return Data(train, val, train.classes, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def open_folder(name: str) -> Data:
    root = Path(name)
    missing = [str(root / part) for part in ("train", "val") if not (root / part).is_dir()]
    if missing:
        known = "digits, cifar10, cifar100, hfds/NAME, torch/NAME"
        raise UserError(
            f"--data {name}: no folder {' and no folder '.join(missing)}; expected a folder with "
            f"train/CLASS/*.jpg and val/CLASS/*.jpg, or one of {known}"
        )
    try:
        train, val = (
            torchvision.datasets.ImageFolder(str(root / part), loader=open_image) for part in ("train", "val")
        )
    except FileNotFoundError as error:
        raise UserError(f"--data {name}: {' '.join(str(error).split())}") from error
    if train.classes != val.classes:
        difference = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"--data {name}: train/ and val/ hold different classes: {', '.join(difference[:5])}")
    return Data(train, val, train.classes, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def open_timm_data(name: str, folder: str, download: bool, num_classes: int | None) -> Data:
    options = dict(root=folder, download=download)
    try:
        with local_rank_zero_first():
            train = timm.data.create_dataset(name, split="train", is_training=True, **options)
            val = timm.data.create_dataset(name, split="validation", is_training=False, **options)
    except Exception as error:  # each backend has errors of its own
        raise UserError(f"--data {name} through timm: {type(error).__name__}: {error}") from error
    if isinstance(train, IterableDataset) or isinstance(val, IterableDataset):
        raise UserError(f"--data {name} is a stream, whose images have no numbers to draw by: unpack it into a folder")
    names = getattr(train, "classes", None) or sorted(
        getattr(getattr(train, "reader", None), "class_to_idx", None) or {}
    )
    if not names and not num_classes:
        raise UserError(f"--data {name} does not say how many classes it has: give --num-classes")
    names = [str(label) for label in names or range(num_classes or 0)]
    return Data(train, val, names, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, of an image that is not decoded yet: of a large JPEG no more is decoded than the crop needs."""

    def forward(self, image: Image.Image) -> Image.Image:
        whole_width, whole_height = image.size
        top, left, height, width = self.make_params([image]).values()
        image = to_rgb(image, (self.size[1] * whole_width / width, self.size[0] * whole_height / height))
        if image.size == (whole_width, whole_height):
            return v2.functional.resized_crop(image, top, left, height, width, self.size, self.interpolation)
        x, y = image.width / whole_width, image.height / whole_height
        right, bottom = min((left + width) * x, image.width), min((top + height) * y, image.height)
        resampling = RESAMPLING[self.interpolation.value]
        return image.resize((self.size[1], self.size[0]), resampling, (left * x, top * y, right, bottom))


def train_view(
    size: int, crop: str, hflip: float, interpolation: str, randaugment: Sequence[int] | None = None
) -> v2.Transform:
    """Opened PIL image -> augmented uint8 (3, H, W). What can be done to whole batches is done on the device."""
    mode = v2.InterpolationMode(interpolation)
    steps: list[Any]
    if crop == "resized":
        steps = [RandomResizedCrop(size, interpolation=mode)]
    else:
        steps = [functools.partial(to_rgb, needed=(size, size)), v2.Resize((size, size), interpolation=mode)]
    if crop == "pad":
        steps += [v2.RandomCrop(size, padding=size // 8)]
    if hflip:
        steps += [v2.RandomHorizontalFlip(hflip)]
    if randaugment and randaugment[0]:
        steps += [v2.RandAugment(*randaugment, interpolation=mode)]
    return v2.Compose([*steps, v2.PILToTensor()])


def eval_view(image: Image.Image, config: dict[str, Any]) -> Tensor:
    """Opened PIL image -> uint8 (3, H, W) as a student's config.json says; normalisation comes after, on the device."""
    return torch.from_numpy(prepare(image, config).copy()).permute(2, 0, 1)


class Samples(Dataset):
    """(epoch, index) -> (transformed image or None, class index, the images that could not be read).

    Each sample's augmentation has a seed of its own, so it does not depend on the worker, the rank or a resume. In
    training the next readable image takes a corrupt one's place, so that batches keep their size; in evaluation none.
    """

    def __init__(self, source: Any, view: Callable[[Image.Image], Tensor], seed: int, train: bool) -> None:
        self.source, self.view, self.seed, self.train = source, view, seed, train

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, first = key
        corrupt = []
        for index in range(first, first + (10 if self.train else 1)):
            index %= len(self)
            state = torch.get_rng_state()
            torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * len(self) + first) % 2**63)
            try:
                image, label = self.read(index)
                return self.view(image), label, corrupt
            except UnreadableImage as error:
                corrupt.append(Corrupt(self.name(index), str(error)))
            finally:
                torch.set_rng_state(state)
        return None, -1, corrupt

    def read(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self.source, timm.data.ImageDataset):  # which itself puts another image in a broken one's place
            file, label = self.source.reader[index][:2]
            return open_image(file), label
        image, label = self.source[index]
        return image, label

    def name(self, index: int) -> str:
        samples = getattr(self.source, "samples", None)
        return str(samples[index][0]) if samples else f"sample {index}"


class EpochSampler(DistributedSampler):
    """DistributedSampler that hands the epoch on with each index, for the seed of the sample's augmentation."""

    def __iter__(self) -> Any:
        return ((self.epoch, index) for index in super().__iter__())


class Batch(NamedTuple):
    images: Tensor | None  # uint8 (B, 3, H, W); None when not one of the batch could be read
    labels: Tensor | None
    corrupt: list[Corrupt]

    def pin_memory(self) -> Batch:
        if self.images is None or self.labels is None:
            return self
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.corrupt)


def collate(samples: list[Sample]) -> Batch:
    corrupt = [bad for _, _, some in samples for bad in some]
    pairs = [(image, label) for image, label, _ in samples if image is not None]
    if not pairs:
        return Batch(None, None, corrupt)
    return Batch(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs]), corrupt)


def make_loader(
    source: Any,
    view: Callable[[Image.Image], Tensor],
    batch_size: int,
    train: bool,
    seed: int = 0,
    workers: int | None = None,
    pin_memory: bool = False,
    indices: Sequence[int] | None = None,
) -> DataLoader:
    """Training: each rank a part of the shuffle, whole batches only. Evaluation: each sample on exactly one rank.

    indices: evaluate on these alone
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        in_memory = isinstance(source, Digits)
        workers = 0 if in_memory else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    dataset = Samples(source, view, seed, train)
    sampler: Any
    if train:
        sampler = EpochSampler(dataset, WORLD_SIZE, RANK, seed=seed, drop_last=True)
    else:
        sampler = [(0, index) for index in (indices or range(len(dataset)))[RANK::WORLD_SIZE]]
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=train,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=end_with_the_training_process,
        generator=torch.Generator(),  # else starting workers would draw from the state that --resume restores
    )


def make_loaders(
    data: Data, config: dict[str, Any], batch_size: int, args: argparse.Namespace, device: torch.device
) -> tuple[Any, Any]:
    """Batches for training and, twice as large, for evaluation: made as they are needed, or kept on the device."""
    view = functools.partial(eval_view, config=config)
    machine = dict(workers=args.workers, pin_memory=device.type == "cuda")
    if args.cache == "none":
        augmented = train_view(args.img_size, args.crop, args.hflip, args.interpolation, args.randaugment)
        return (
            make_loader(data.train, augmented, batch_size, True, args.seed, **machine),
            make_loader(data.val, view, 2 * batch_size, False, **machine),
        )
    plain = train_view(args.img_size, "none", 0.0, args.interpolation)
    try:
        decoded_train = make_loader(data.train, plain, 256, False, **machine)
        decoded_val = make_loader(data.val, view, 256, False, **machine)
        return (
            DeviceLoader(decoded_train, batch_size, True, args, device),
            DeviceLoader(decoded_val, 2 * batch_size, False, args, device),
        )
    except torch.OutOfMemoryError as error:
        raise RankError(
            f"--cache device: {len(data.train) + len(data.val)} images of {args.img_size} px do not fit in the "
            "device's memory: leave it out"
        ) from error


def worker_context() -> Any:
    """Data loading processes come from a clean one: forks of this one may hang on the locks its threads held."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision"])
    return context


def end_with_the_training_process(_worker: int) -> None:
    """torch's workers end when their parent does, which is the fork server here, and that waits for them."""

    def wait() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class DeviceLoader:
    """Batches of images that were decoded once and are kept in the device's memory (--cache device).

    Each process has its share of the data set, every WORLD_SIZE-th image. In training the share is shuffled, and each
    image cropped and flipped by itself; what is drawn depends on seed, epoch and rank alone, so that a resume agrees.
    """

    def __init__(
        self, decoded: DataLoader, batch_size: int, train: bool, args: argparse.Namespace, device: torch.device
    ) -> None:
        self.args, self.batch_size, self.train, self.epoch = args, batch_size, train, 0
        self.share = len(decoded.dataset) // WORLD_SIZE  # type: ignore[arg-type]
        images = torch.empty(0)
        labels = torch.empty(self.share + 1, dtype=torch.int64, device=device)
        self.corrupt: list[Corrupt] = []
        self.count = 0
        for some, their_labels, corrupt in progress(decoded, "decode"):
            self.corrupt += corrupt
            if some is None:
                continue
            if not self.count:
                images = torch.empty(self.share + 1, *some.shape[1:], dtype=torch.uint8, device=device)
            images[self.count : self.count + len(some)] = some
            labels[self.count : self.count + len(some)] = their_labels
            self.count += len(some)
        self.images, self.labels = images[: self.count], labels[: self.count]

    def __len__(self) -> int:
        return self.share // self.batch_size if self.train else math.ceil(self.count / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        device = self.images.device
        generator = torch.Generator(device).manual_seed((self.args.seed * 1_000_003 + self.epoch) * WORLD_SIZE + RANK)
        if not self.count:
            yield Batch(None, None, self.corrupt)
            return
        order = torch.arange(self.count, device=device)
        if self.train:  # every rank needs as many batches: where images could not be read, others come twice
            shuffled = torch.randperm(self.count, generator=generator, device=device)
            order = shuffled[torch.arange(len(self) * self.batch_size, device=device) % self.count]
        for chosen in order.split(self.batch_size):
            images = self.images[chosen]
            if self.train:
                images = crop_and_flip(images, self.args, generator)
            yield Batch(images, self.labels[chosen], self.corrupt)


def crop_and_flip(images: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """--crop and --hflip of a uint8 (B, 3, S, S) batch on its device, drawn for each image by itself.

    The resized crop has torchvision's distribution (8 to 100 % of the area, sides 3:4 to 4:3) but for the few crops
    wider or higher than the image, which are cut down to it where torchvision would draw again.
    """
    n, _, size, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator, device=images.device)

    flip = uniform(0, 1) < args.hflip
    if args.crop == "resized":
        area, ratio = uniform(0.08, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)  # of the crop's centre; the image is -1 to 1
        zero = torch.zeros_like(x)
        theta = torch.cat([torch.where(flip, -width, width), zero, x, zero, height, y], 1).view(n, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        cut = F.grid_sample(images.float(), grid, args.interpolation, padding_mode="border", align_corners=False)
        return cut.round_().clamp_(0, 255).to(torch.uint8)
    column = row = torch.arange(size, device=images.device).expand(n, size)
    column = torch.where(flip, size - 1 - column, column)
    if args.crop == "pad":
        pad = size // 8
        images = F.pad(images, [pad] * 4)
        row, column = (side + uniform(0, 2 * pad + 1).long() for side in (row, column))
    sample = torch.arange(n, device=images.device).view(n, 1, 1)
    return images[sample, :, row.unsqueeze(2), column.unsqueeze(1)].permute(0, 3, 1, 2)


class CorruptCount:
    """Names each image that could not be read once, and stops the run when they are more than one in a hundred."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.seen = what, total, set[str]()

    def add(self, corrupt: list[Corrupt]) -> None:
        for name, reason in corrupt:
            if name not in self.seen:
                self.seen.add(name)
                print(f"skipped a corrupt image ({len(self.seen)} so far in {self.what}): {name}: {reason}",
                      file=sys.stderr, flush=True)  # fmt: skip
        if len(self.seen) > max(1, 0.01 * self.total):
            raise RankError(
                f"{len(self.seen)} of {self.total} {self.what} images cannot be read, more than 1 %: "
                f"mend or remove them; the last one is {corrupt[-1].name if corrupt else sorted(self.seen)[-1]}"
            )

    def share(self) -> None:
        """Count over all ranks; once an epoch."""
        if WORLD_SIZE > 1:
            seen: list[Any] = [None] * WORLD_SIZE
            dist.all_gather_object(seen, self.seen)
            self.seen = set().union(*seen)
            self.add([])


# ---- models -------------------------------------------------------------------------------------------------------


def make_student(args: argparse.Namespace, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The student, and the config.json that says all that is needed to use it."""
    num_classes = len(data.label_names)
    if Path(args.model).is_dir():
        model, config = load_student(Path(args.model))
        if config["num_classes"] != num_classes:
            raise UserError(
                f"--model {args.model} has {config['num_classes']} classes, --data {args.data} {num_classes}"
            )
        if config["input_size"][1:] != [args.img_size, args.img_size]:
            height, width = config["input_size"][1:]
            raise UserError(f"--model {args.model} takes {height}x{width} pixels, --img-size is {args.img_size}")
        return model, config | {"label_names": data.label_names}
    architecture = find_architecture(args.model, args.model_args, args.small_stem)
    model = build_model(architecture, num_classes, args.img_size)
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "label_names": data.label_names,
        "mean": list(data.mean),
        "std": list(data.std),
        "input_size": [3, args.img_size, args.img_size],
        "interpolation": args.interpolation,
        "crop": args.eval_crop,
    }
    return model, config


class Teacher(nn.Module):
    """A frozen classifier, always in eval mode, which takes the student's normalised batch.

    It sees the same view, brought to its own normalisation and its own size.
    """

    def __init__(self, model: nn.Module, mean: Any, std: Any, input_size: Any, student: dict[str, Any]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.size = tuple(input_size[1:])
        mean, std, student_mean, student_std = (
            torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (mean, std, student["mean"], student["std"])
        )
        self.register_buffer("scale", (student_std / std).float())
        self.register_buffer("shift", ((student_mean - mean) / std).float())

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.shift
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images)


def make_teacher(args: argparse.Namespace, student: dict[str, Any]) -> Teacher:
    name = args.teacher
    if Path(name).is_dir():
        model, config = load_student(Path(name))
        mean, std, input_size, classes = (config[k] for k in ("mean", "std", "input_size", "num_classes"))
        check_classes(name, classes, student, args)
        if config["label_names"] != student["label_names"]:
            pair = next(p for p in zip(config["label_names"], student["label_names"]) if p[0] != p[1])
            raise UserError(f"--teacher {name} has other classes than --data {args.data}: {pair[0]} and not {pair[1]}")
    else:
        architecture = find_architecture(name)
        classes = student["num_classes"]
        if architecture["library"] == "file":  # its weights, and these three if they differ, are its own business
            model = build_model(architecture, classes, student["input_size"][1])
            mean, std, input_size = (getattr(model, k, student[k]) for k in ("mean", "std", "input_size"))
        elif architecture["library"] == "torchvision":
            choices = torchvision.models.get_model_weights(name)
            weights = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)  # V1: those of the paper's teachers
            classes, preset = len(weights.meta["categories"]), weights.transforms()
            mean, std, input_size = preset.mean, preset.std, (3, preset.crop_size[0], preset.crop_size[0])
        else:
            config = timm.get_pretrained_cfg(name)
            mean, std, input_size, classes = config.mean, config.std, config.input_size, config.num_classes
        check_classes(name, classes, student, args)  # before a download
        if architecture["library"] != "file":
            try:
                with local_rank_zero_first():
                    if architecture["library"] == "torchvision":
                        model = torchvision.models.get_model(name, weights=weights)
                    else:
                        model = timm.create_model(name, pretrained=True)
            except Exception as error:  # each source has errors of its own
                raise UserError(
                    f"--teacher {name}: its ImageNet weights could not be fetched ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:200]}); give a run's student/ folder or file.py:build instead"
                ) from error
    check_forward(model.eval(), f"--teacher {name}", input_size, classes)
    return Teacher(model, mean, std, input_size, student)


def check_classes(name: str, classes: int, student: dict[str, Any], args: argparse.Namespace) -> None:
    if classes != student["num_classes"]:
        raise UserError(
            f"--teacher {name} has {classes} classes, --data {args.data} has {student['num_classes']}: "
            "take a teacher trained on the same classes"
        )


# ---- losses -------------------------------------------------------------------------------------------------------


def named_losses(
    logits: Tensor, weak_logits: Tensor | None, teacher_logits: Tensor | None, target: Tensor, args: argparse.Namespace
) -> dict[str, Tensor]:
    """The terms of the objective by name; their sum is what is minimised."""
    losses = {"ce": F.cross_entropy(logits.float(), target, label_smoothing=args.label_smoothing)}
    if args.kd == "nkd":
        losses["nkd"] = nkd_loss(logits, teacher_logits, target, gamma=args.gamma, temperature=args.temperature)
    elif args.kd == "kd":  # Hinton et al. 2015, arXiv 1503.02531
        t = args.kd_temperature
        student, teacher = ((x.float() / t).log_softmax(1) for x in (logits, teacher_logits))
        losses["kd"] = args.kd_weight * t**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    if args.self_kd == "uskd":
        losses["uskd"] = uskd_loss(logits, weak_logits, target, alpha=args.alpha, beta=args.beta, mu=args.mu)
    return losses


def forward_backward(
    net: nn.Module, teacher: nn.Module | None, images: Tensor, target: Tensor, amp: torch.dtype | None,
    scaler: torch.amp.GradScaler, args: argparse.Namespace,
) -> dict[str, Tensor]:  # fmt: skip
    """The named losses of a batch, their gradients added to the parameters'; nothing waits for the device."""
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        teacher_logits = teacher(images) if teacher else None
        out = net(images)
    logits, weak_logits = out if args.self_kd else (out, None)
    losses = named_losses(logits, weak_logits, teacher_logits, target, args)
    scaler.scale(torch.stack(list(losses.values())).sum() / args.grad_accum).backward()
    return losses


def update(net: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, args: argparse.Namespace) -> None:
    """An optimizer step with the gradients that there are, which are then gone."""
    if args.clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


class LossLog:
    """Keeps each step's losses on the device and reads them at intervals, so that no step waits for the device."""

    def __init__(self, skips_steps: bool) -> None:
        self.skips_steps = skips_steps  # fp16: GradScaler skips a step whose gradients are not finite
        self.names: list[str] = []
        self.waiting: list[tuple[int, Tensor]] = []
        self.sums: dict[str, float] = {}
        self.count = 0
        self.skipped_in_a_row = 0

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        self.names = list(losses)
        self.waiting.append((step, torch.stack([loss.detach() for loss in losses.values()])))

    def read(self) -> None:
        """Take in what waits; stop the run at the first step whose loss is not finite."""
        if not self.waiting:
            return
        steps = [step for step, _ in self.waiting]
        values = torch.stack([value for _, value in self.waiting]).double().cpu()
        self.waiting = []
        finite = values.isfinite().all(1)
        self.skipped_in_a_row = 0 if finite.any() else self.skipped_in_a_row + len(steps)
        if not finite.all() and (not self.skips_steps or self.skipped_in_a_row > 20):
            bad = int(finite.int().argmin())
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values[bad].tolist()))
            raise RankError(
                f"the loss is not finite at step {steps[bad]}: {terms}; try a lower --lr, --clip-grad 5, "
                "longer --warmup-epochs, or --amp off; the last checkpoint is kept"
            )
        for name, value in zip(self.names, values[finite].sum(0).tolist()):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += int(finite.sum())

    def means(self, device: torch.device) -> dict[str, float]:
        """Mean of each term over all ranks since the last call, and of their sum."""
        totals = torch.tensor([*self.sums.values(), self.count], dtype=torch.float64, device=device)
        if WORLD_SIZE > 1:
            dist.all_reduce(totals)
        *sums, count = totals.tolist()
        self.sums, self.count = {}, 0
        means = {f"loss_{name}": value / max(count, 1) for name, value in zip(self.names, sums)}
        return {"train_loss": sum(means.values())} | means


class BatchAugmentation:
    """What is done to normalised batches on the device: random erasing, then mixup or cutmix, which soften targets."""

    def __init__(self, args: argparse.Namespace, num_classes: int, device: torch.device) -> None:
        self.erase = RandomErasing(args.random_erasing, mode="pixel", device=device) if args.random_erasing else None
        mixers = [
            mixer(alpha=alpha, num_classes=num_classes)
            for mixer, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
            if alpha
        ]
        self.mix = v2.RandomChoice(mixers) if mixers else None

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.erase:
            images = self.erase(images)
        return self.mix(images, target) if self.mix else (images, target)


def make_optimizer(args: argparse.Namespace, net: nn.Module, updates_per_epoch: int) -> tuple[Any, Any]:
    """A timm optimizer and schedule; the schedule is a function of the step, so a resume needs no state of it."""
    if args.opt not in timm.optim.list_optimizers():
        near = difflib.get_close_matches(args.opt, timm.optim.list_optimizers(), n=5)
        raise UserError(f"--opt {args.opt} is no timm optimizer; near matches: {', '.join(near) or 'momentum, adamw'}")
    optimizer = create_optimizer_v2(
        net,
        args.opt,
        args.lr,
        args.weight_decay,
        args.momentum,
        filter_bias_and_bn=args.opt not in ("momentum", "sgd"),  # the paper's SGD recipes decay every parameter
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "multistep" if args.schedule == "step" else "cosine",
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.lr * 1e-3,
        decay_milestones=args.step_epochs,
        decay_rate=args.step_factor,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return optimizer, scheduler


# ---- evaluation ---------------------------------------------------------------------------------------------------


class ToDevice(nn.Module):
    """uint8 (B, 3, H, W) on the host -> normalised float on the device."""

    def __init__(self, mean: Any, std: Any, device: torch.device, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.device, self.memory_format = device, memory_format
        self.mean = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(-1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return (images.float() - self.mean) / self.std


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader, to_device: ToDevice, amp: torch.dtype | None, corrupt: CorruptCount
) -> dict[str, float]:
    """Top-1 and top-5 in percent and the cross-entropy, each sample of all ranks counted once."""
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=to_device.device)  # loss, top-1, top-5, samples
    for images, labels, bad in progress(loader, "validate"):
        corrupt.add(bad)
        if images is None:
            continue
        labels = labels.to(to_device.device, non_blocking=True)
        with torch.autocast(to_device.device.type, amp, enabled=amp is not None):
            logits = model(to_device(images)).float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)).to(loss)])
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    loss, top1, top5, count = totals.tolist()
    if not count:
        raise UserError("not one validation image could be read")
    return {"val_loss": loss / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}


def progress(loader: Any, what: str, total: int | None = None) -> Any:
    return tqdm(loader, what, total=total, leave=False, disable=not (IS_MAIN and sys.stdout.isatty()))


# ---- run directory ------------------------------------------------------------------------------------------------


def make_run_dir(args: argparse.Namespace) -> Path:
    """The run's directory: --output, or the next number under runs/. The same on every rank."""
    answer: list[Any] = [None]
    if IS_MAIN:
        try:
            answer[0] = claim_run_dir(args)
        except UserError as error:
            answer[0] = error
        except OSError as error:
            answer[0] = UserError(f"cannot make the run directory {args.output or 'runs/'}: {error.strerror}")
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def claim_run_dir(args: argparse.Namespace) -> Path:
    if args.output:
        output = Path(args.output)
        if (output / "args.json").exists() and not (args.resume or args.overwrite):
            raise UserError(f"{output} already holds a run: --resume goes on with it, --overwrite replaces it")
        output.mkdir(parents=True, exist_ok=True)
        if args.overwrite and not args.resume:
            for name in ("args.json", "metrics.csv", "curves.png", "last.pt", "best.pt", NAME,
                         "student/model.safetensors", "student/config.json"):  # fmt: skip
                (output / name).unlink(missing_ok=True)
            for events in output.glob("events.out.tfevents.*"):
                events.unlink()
        return output
    method = "-".join(filter(None, [args.kd, args.self_kd])) or "ce"
    folder = Path(args.model).resolve()
    if folder.is_dir():
        model = folder.parent.name if folder.name == "student" else folder.name
    else:
        model = Path(args.model.rpartition(":")[0]).stem or args.model
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    taken = [int(m[1]) for p in runs.iterdir() if (m := re.match(r"(\d+)", p.name))]
    for number in itertools.count(max(taken, default=0) + 1):
        output = runs / f"{number:03d}-{model}-{method}"
        if not list(runs.glob(f"{number:03d}-*")):
            output.mkdir()
            return output
    raise AssertionError("unreachable")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise UserError(f"{path} cannot be read as a checkpoint: {type(error).__name__}") from error


def describe_run(args: argparse.Namespace, device: torch.device) -> str:
    import importlib.metadata

    packages = ("torch", "torchvision", "timm", "numpy")
    return json.dumps(
        {
            "flags": vars(args),
            "command": shlex.join(sys.argv),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "hardware": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                "processes": WORLD_SIZE,
                "cpu_cores": os.cpu_count(),
                "platform": platform.platform(),
            },
        },
        indent=2,
    )


def append_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """The whole file each time: a resumed run drops the rows after its checkpoint, and no row is half-written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1])
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    terms = ", ".join(f"{name[5:]} {value:.3f}" for name, value in row.items() if name.startswith("loss_"))
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f} ({terms})  "
        f"top-1 {row['val_top1']:.2f} %  top-5 {row['val_top5']:.2f} %  lr {row['lr']:.2g}  "
        f"{row['images_per_s']:.0f} images/s  {row['seconds']:.1f} s"
        + (f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else "")
    )


def plot_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for name in (key for key in rows[-1] if "loss" in key):
        left.plot(epochs, [row[name] for row in rows], label=name)
    for name in ("val_top1", "val_top5"):
        right.plot(epochs, [row[name] for row in rows], label=name)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    write_whole(path, image.getvalue())


def peak_memory(device: torch.device) -> int:
    """MiB: of GPU memory on CUDA, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak >> (20 if sys.platform == "darwin" else 10)


def random_states(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    states = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def keep_reference(output: Path, data: Data, count: int) -> str:
    """Write reference.npz: some images as the best student sees them, and its answers in full precision."""
    model, config = load_student(output)

    def prepared(source: Any) -> tuple[np.ndarray, np.ndarray]:
        samples = Samples(source, functools.partial(eval_view, config=config), 0, train=False)
        drawn = (samples[0, index] for index in evenly(len(samples), count))
        pairs = [(image.permute(1, 2, 0).numpy(), label) for image, label, _ in drawn if image is not None]
        return np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])

    (images, labels), (train_images, _) = prepared(data.val), prepared(data.train)
    to_device = ToDevice(config["mean"], config["std"], torch.device("cpu"), torch.contiguous_format)
    with torch.inference_mode():
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(32)
        logits = torch.cat([model.eval()(to_device(batch)) for batch in batches]).numpy()
    digest = np.array(source_of(output)["weights_sha256"])
    write_reference(output / NAME, Reference(images, labels, logits, train_images, digest))
    size = (output / NAME).stat().st_size / 1e6
    return f"{len(images)} validation and {len(train_images)} training images in {output / NAME}, {size:.1f} MB"


# ---- training -----------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    started = time.time()
    device = pick_device(args)
    amp = pick_amp(args, device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format

    # data and models
    data = open_data(args.data, args.data_dir, args.download, args.num_classes)
    torch.manual_seed(args.seed)
    student, config = make_student(args, data)
    micro_batch = args.batch_size // (WORLD_SIZE * args.grad_accum)
    check_forward(student, f"--model {args.model}", config["input_size"], config["num_classes"], min(micro_batch, 2))
    if args.sync_bn and WORLD_SIZE > 1:
        if device.type != "cuda":
            raise UserError("--sync-bn needs CUDA devices")
        student = convert_sync_batchnorm(student)
    teacher = make_teacher(args, config).to(device, memory_format=memory_format) if args.teacher else None
    net = student
    if args.self_kd:
        try:
            net = WithWeakHead(
                student, args.tap, config["num_classes"], example_input=torch.zeros(2, *config["input_size"])
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--self-kd uskd on {args.model} (--tap names the layer): {error}") from error
    net.to(device, memory_format=memory_format)
    to_device = ToDevice(config["mean"], config["std"], device, memory_format)

    train_loader, val_loader = make_loaders(data, config, micro_batch, args, device)
    updates_per_epoch = len(train_loader) // args.grad_accum
    if updates_per_epoch == 0:
        raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data.train)} training images")
    corrupt_train = CorruptCount("training", len(data.train))
    corrupt_val = CorruptCount("validation", len(data.val))
    augment_batch = BatchAugmentation(args, config["num_classes"], device)

    # optimizer
    optimizer, scheduler = make_optimizer(args, net, updates_per_epoch)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    executed = [0]  # optimizer steps really taken; GradScaler leaves some out
    optimizer.register_step_post_hook(lambda *_: executed.__setitem__(0, executed[0] + 1))

    # resume, EMA, compile, DDP, in this order
    output = make_run_dir(args)
    torch.manual_seed(args.seed + RANK)
    random.seed(args.seed + RANK)
    first_epoch, best, rows = 0, -1.0, []
    state = load_checkpoint(output / "last.pt") if args.resume and (output / "last.pt").exists() else None
    if state:
        load_weights(net, state["model"], str(output / "last.pt"))
        if state["args"]["opt"] != args.opt:
            raise UserError(f"{output}/last.pt was saved with --opt {state['args']['opt']}, not {args.opt}")
        options = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(optimizer.param_groups, options):
            group.update(now)  # --weight-decay and the like are those of this call
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        first_epoch, best, rows = state["epoch"] + 1, state["best"], state["rows"]
        if len(state["random"]) == WORLD_SIZE:
            set_random_states(state["random"][RANK], device)
    ema = ModelEmaV3(student, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
    if ema and state:
        load_weights(ema.module, state["ema"] or student.state_dict(), str(output / "last.pt"))
    compiled: Any = net
    if args.compile:
        compiled = torch.compile(net)
        if teacher:
            teacher.model = torch.compile(teacher.model)
    parallel: Any = compiled
    if WORLD_SIZE > 1:
        parallel = DistributedDataParallel(
            compiled, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    board = None
    if IS_MAIN:
        from torch.utils.tensorboard import SummaryWriter

        write_whole(output / "args.json", describe_run(args, device))
        board = SummaryWriter(str(output), purge_step=first_epoch if state else None)
        millions = sum(p.numel() for p in student.parameters()) / 1e6
        method = " + ".join(filter(None, ["cross-entropy", args.kd, args.self_kd]))
        print(
            f"{args.model} ({millions:.2f} M parameters), {method}"
            + (f" with {args.teacher}" if teacher else "")
            + (f" at {net.tap}" if isinstance(net, WithWeakHead) else "")
            + f"; {len(data.train)} training and {len(data.val)} validation images of {len(data.label_names)} classes"
            + f"; {WORLD_SIZE} x {device}, {str(amp or torch.float32).removeprefix('torch.')} -> {output}",
            flush=True,
        )
        if args.resume:
            print(
                f"going on after epoch {first_epoch}" if state else f"no {output}/last.pt yet: starting anew",
                flush=True,
            )

    log = LossLog(skips_steps=scaler.is_enabled())
    for epoch in range(first_epoch, args.epochs):
        for shuffler in (train_loader, getattr(train_loader, "sampler", None)):
            if hasattr(shuffler, "set_epoch"):
                shuffler.set_epoch(epoch)
        parallel.train()
        epoch_started, step, executed[0] = time.time(), epoch * updates_per_epoch, 0
        batches = itertools.islice(train_loader, updates_per_epoch * args.grad_accum)
        for i, (images, labels, bad) in enumerate(progress(batches, f"epoch {epoch + 1}", len(train_loader))):
            corrupt_train.add(bad)
            if images is None:
                raise RankError(f"not one image of a training batch could be read, the first is {bad[0].name}")
            last_pass = (i + 1) % args.grad_accum == 0
            images = to_device(images)
            target = labels.to(device, non_blocking=True)
            images, target = augment_batch(images, target)

            if WORLD_SIZE > 1:
                parallel.require_backward_grad_sync = last_pass
            log.add(step, forward_backward(parallel, teacher, images, target, amp, scaler, args))
            if not last_pass:
                continue

            scheduler.step_update(step)
            if step == epoch * updates_per_epoch:
                lr = optimizer.param_groups[0]["lr"]
            update(net, optimizer, scaler, args)
            if ema:
                ema.update(student, step + 1)
            step += 1
            if step % args.log_interval == 0:
                log.read()
        log.read()
        images_per_s = updates_per_epoch * args.batch_size / (time.time() - epoch_started)

        corrupt_train.share()
        if WORLD_SIZE > 1:  # each rank has batch-norm statistics of its own: all must evaluate the same model
            distribute_bn(student, WORLD_SIZE, reduce=True)
            if ema:
                distribute_bn(ema.module, WORLD_SIZE, reduce=True)
        chosen = ema.module if ema else compiled
        metrics = evaluate(chosen, val_loader, to_device, amp, corrupt_val)
        corrupt_val.share()
        rows.append(
            {"epoch": epoch + 1}
            | log.means(device)
            | metrics
            | {
                "lr": lr,  # of the epoch's first step
                "skipped_steps": updates_per_epoch - executed[0],
                "images_per_s": images_per_s,
                "seconds": time.time() - epoch_started,
                "memory_mib": peak_memory(device),
            }
        )
        rank_random: list[Any] = [random_states(device)]
        if WORLD_SIZE > 1:
            rank_random *= WORLD_SIZE
            dist.all_gather_object(rank_random, random_states(device))
        improved = metrics["val_top1"] >= best
        best = max(best, metrics["val_top1"])
        if not IS_MAIN:
            continue
        assert board is not None
        print(epoch_line(rows[-1], args.epochs), flush=True)
        for name, value in rows[-1].items():
            board.add_scalar(name, value, epoch + 1)
        checkpoint = {
            "model": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "ema": ema.module.state_dict() if ema else None,
            "epoch": epoch,
            "best": best,
            "rows": rows,
            "random": rank_random,
            "args": vars(args),
            "config": config,
        }
        if improved:
            plain = ema.module if ema else student
            save_student(output / "student", plain, config | {"metrics": {"epoch": epoch + 1} | metrics})
            save_checkpoint(output / "best.pt", checkpoint)
        append_metrics(output / "metrics.csv", rows)
        save_checkpoint(output / "last.pt", checkpoint)  # the last: what a resume starts from knows of the rest

    if IS_MAIN:
        assert board is not None
        board.close()
        plot_curves(output / "curves.png", rows)
        if args.reference:
            print(keep_reference(output, data, args.reference), flush=True)
        print(
            f"last top-1 {rows[-1]['val_top1']:.2f} %, best {best:.2f} % -> {output}/student; "
            f"{time.time() - started:.0f} s, {peak_memory(device)} MiB at most",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    """Run; a mistake of the user's is one line on stderr and status 2."""
    try:
        train(parse_args(argv))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        if IS_MAIN:
            print("\ninterrupted: --output RUN --resume goes on after the last whole epoch", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error) or explain_lost_rank(error)
        if message is None:
            raise
        everywhere = isinstance(error, UserError) and not isinstance(error, RankError)
        if not everywhere or IS_MAIN:
            show_error("train.py", ("" if everywhere or WORLD_SIZE == 1 else f"rank {RANK}: ") + message)
        else:
            time.sleep(2)  # rank 0 says it; torchrun would stop it as soon as this rank has ended
    return 2


def explain_lost_rank(error: Exception) -> str | None:
    lost = isinstance(error, RuntimeError) and re.search("closed by peer|reset by peer|NCCL", str(error))
    return "lost another rank, which says why" if lost and WORLD_SIZE > 1 else None


if __name__ == "__main__":
    sys.exit(main())

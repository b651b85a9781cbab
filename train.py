"""Train an image classifier, with a teacher (NKD, classic KD), with itself (USKD), or plainly.

    torchrun train.py --self-kd uskd --model mobilenet_v2                     # 1,797 digits, nothing to download
    python train.py --model resnet18 --small-stem                             # cross-entropy, the baseline
    python train.py --kd nkd --teacher runs/001-resnet18-ce/student           # a run's student as the teacher
    python train.py --data photos/ --model mobilenet_v2 --self-kd uskd        # photos/train/CLASS/*.jpg, photos/val/...
    torchrun --nproc-per-node 8 train.py --data /imagenet --model resnet18 --teacher resnet34 --kd nkd
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...
    python train.py --output runs/002-mobilenet_v2-uskd --resume              # go on where it stopped

Read it from here down: flags, losses and step, data, models, evaluation, run directory; then build() puts a run
together, and train() is the loop. Only parse_args, build and train know the flags by name.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import functools
import importlib.metadata
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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from deploy.reference import NAME as REFERENCE
from deploy.reference import Reference, evenly, write_reference
from deploy.runtimes import source_of
from deploy.student import build_model, check_forward, find_architecture, load_student, load_weights, save_student
from kdlite import Teacher, WithWeakHead, nkd_loss, uskd_loss

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
IS_MAIN = RANK == 0


class RankError(UserError):
    """An error that may occur on one rank only; that rank prints it."""


# ---- flags --------------------------------------------------------------------------------------------------------

# What holds where neither the recipe nor the user says otherwise.
DEFAULTS: dict[str, Any] = dict(
    data="digits", data_dir="data", download=False, num_classes=None, randaugment=None, random_erasing=0.0, mixup=0.0,
    cutmix=0.0, eval_crop=1.0, interpolation="bilinear", cache="none", workers=None,
    model="mobilenet_v2", model_args=[], small_stem=False, teacher=None,
    kd=None, self_kd=None, tap=None, kd_weight=1.0, kd_temperature=4.0,
    grad_accum=1, momentum=0.9, label_smoothing=0.0, clip_grad=None, ema_decay=0.0, seed=0, warmup_epochs=0.0,
    step_epochs=[], step_factor=0.1,
    device="auto", amp="auto", compile=False, channels_last=True, sync_bn=False,
    output=None, resume=False, overwrite=False, reference=256, log_interval=50,
)  # fmt: skip

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
BY_DATA = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar"}  # of a folder: imagenet-cnn
# Flags that belong to a method: without it they would be ignored, so they are refused.
OF_METHOD = {
    "--kd nkd": ("gamma", "temperature"),
    "--kd kd": ("kd_weight", "kd_temperature"),
    "--self-kd uskd": ("tap", "alpha", "beta", "mu"),
}


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """The type of a flag: a finite number from low to high, or above low."""
    at_least = f"greater than {low}" if above else f"at least {low}"
    span = at_least if high == math.inf else f"between {low} and {high}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value) and not (above and value == low)):
            raise argparse.ArgumentTypeError(f"must be {span}, got {text}")
        return value

    return read


def get_parser() -> argparse.ArgumentParser:
    """Of what is typed alone: a flag that is left out has no value here."""
    recipes = (f"{name}: {', '.join(f'{k} {v}' for k, v in values.items())}" for name, values in RECIPES.items())
    parser = Parser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Recipes. " + ". ".join(recipes),
        argument_default=argparse.SUPPRESS,
    )

    def flag(name: str, help: str, **options: Any) -> None:
        dest = name.removeprefix("--").replace("-", "_")
        default = "by recipe" if any(dest in values for values in RECIPES.values()) else DEFAULTS.get(dest)
        said = "" if default in (None, False, []) else f" (default: {default})"
        group.add_argument(name, help=help + said, **options)

    yes_no: Any = argparse.BooleanOptionalAction
    count, weight, share = number(int, 1), number(float, 0), number(float, 0, 1)
    mixing = number(float, 0, 1000)

    group = parser.add_argument_group("data")
    flag("--data", "digits (embedded), cifar10, cifar100, a folder with train/ and val/, or a timm dataset name "
         "(hfds/..., torch/...)")  # fmt: skip
    flag("--data-dir", "where cifar and timm datasets are kept")
    flag("--download", "fetch cifar or timm datasets that are not there yet", action="store_true")
    flag("--num-classes", "for timm datasets that do not say how many they have", type=number(int, 2))
    flag("--img-size", "height and width the student sees, in pixels", type=count)
    flag("--crop", "training crop: random resized, random after padding by 1/8, or none",
         choices=["resized", "pad", "none"])  # fmt: skip
    flag("--hflip", "probability of a horizontal flip", type=share)
    flag("--randaugment", "RandAugment: operations (0: off) and their magnitude, 0 to 30", type=number(int, 0, 30),
         nargs=2, metavar=("OPS", "MAGNITUDE"))  # fmt: skip
    flag("--random-erasing", "probability of random erasing", type=share)
    flag("--mixup", "alpha of mixup; 0: off", type=mixing)
    flag("--cutmix", "alpha of cutmix; 0: off", type=mixing)
    flag("--eval-crop", "share of the resized side kept in evaluation", type=number(float, 0.1, 1))
    flag("--interpolation", "filter of every resize", choices=sorted(RESAMPLING))
    flag("--cache", "device: decode all images once, keep them in device memory at --img-size, and crop and flip them "
         "there; for data sets of small images", choices=["none", "device"])  # fmt: skip
    flag("--workers", "data loading processes per process (default: the cores it has)", type=number(int, 0))

    group = parser.add_argument_group("models")
    flag("--model", "torchvision's or timm's name, a run's student/ folder to start from, or your own "
         "path/to/file.py:build, called as build(num_classes=C)")  # fmt: skip
    flag("--model-args", "passed on to the model", nargs="+", metavar="KEY=VALUE")
    flag("--small-stem", "for images of 64 px and less: 3x3 first convolution, no stride, no max-pool", action=yes_no)
    flag("--teacher", "as --model; a library's name means its ImageNet weights (a download)")

    group = parser.add_argument_group("distillation, added to the cross-entropy")
    flag("--kd", "with --teacher: NKD, or classic temperature KD", choices=["nkd", "kd"])
    flag("--self-kd", "without a teacher: USKD", choices=["uskd"])
    flag("--tap", "layer whose feature feeds USKD's weak head (default: by architecture)")
    flag("--gamma", "NKD: weight of the non-target term", type=weight)
    flag("--temperature", "NKD: temperature of the non-target term", type=number(float, 0, above=True))
    flag("--kd-weight", "KD: weight of the temperature-squared KL term", type=weight)
    flag("--kd-temperature", "KD: temperature", type=number(float, 0, above=True))
    flag("--alpha", "USKD: weight of the target term", type=weight)
    flag("--beta", "USKD: weight of the non-target term", type=weight)
    flag("--mu", "USKD: weight of the weak head's cross-entropy", type=weight)

    group = parser.add_argument_group("training")
    flag("--recipe", "a group of defaults (default: by --data: digits, cifar, else imagenet-cnn)",
         choices=sorted(RECIPES))  # fmt: skip
    flag("--epochs", "the recipe's warm-up and step epochs are stretched to fit", type=count)
    flag("--batch-size", "images per optimizer step, over all processes", type=count)
    flag("--grad-accum", "split each optimizer step into this many passes", type=count)
    flag("--opt", "a timm optimizer: momentum (plain SGD), sgd (Nesterov), adamw, ...")
    flag("--lr", "peak learning rate", type=weight)
    flag("--momentum", "momentum of SGD and its relatives", type=share)
    flag("--weight-decay", "weight decay", type=weight)
    flag("--schedule", "of the learning rate", choices=["cosine", "step"])
    flag("--warmup-epochs", "linear warm-up, part of --epochs", type=weight)
    flag("--step-epochs", "step schedule: the epochs at which the rate falls", type=weight, nargs="+")
    flag("--step-factor", "step schedule: what the rate is multiplied by", type=number(float, 0, above=True))
    flag("--label-smoothing", "of the cross-entropy alone", type=share)
    flag("--clip-grad", "largest gradient norm", type=number(float, 0, above=True))
    flag("--ema-decay", "average of the weights, evaluated and saved in their place; 0: off", type=share)
    flag("--seed", "of weights, order and augmentation", type=number(int, 0, 2**32 - 1))

    group = parser.add_argument_group("machine")
    flag("--device", "where to train; auto: a GPU if there is one", choices=["auto", "cpu", "cuda"])
    flag("--amp", "mixed precision; auto: bf16 where the GPU has it, else fp16, off on CPU",
         choices=["auto", "bf16", "fp16", "off"])  # fmt: skip
    flag("--compile", "torch.compile student and teacher", action=yes_no)
    flag("--channels-last", "memory layout of images and weights", action=yes_no)
    flag("--sync-bn", "batch-norm statistics over all GPUs", action="store_true")

    group = parser.add_argument_group("run directory")
    flag("--output", "where the run is kept (default: the next number under runs/)")
    flag("--resume", "go on from last.pt in --output, if it is there", action="store_true")
    flag("--overwrite", "replace the run that --output holds", action="store_true")
    flag("--reference", "keep N validation and N training images, prepared, with the student's answers in "
         "reference.npz, for deploy/; 0: none", type=number(int, 0), metavar="N")  # fmt: skip
    flag("--log-interval", "optimizer steps between looks at the losses", type=count)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags: the defaults, then the recipe's, then with --resume what the run was started with, then what is typed.

    ``args.given``: what was typed, now and, with --resume, before.
    """
    parser = get_parser()
    typed = vars(parser.parse_args(argv))
    if typed.get("resume") and not typed.get("output"):
        parser.error("--resume needs --output, the run directory to go on in")
    if typed.get("resume") and typed.get("overwrite"):
        parser.error("--resume goes on with a run, --overwrite replaces it: give one of them")
    given = (saved_flags(Path(typed["output"])) if typed.get("resume") else {}) | typed
    recipe = given.get("recipe") or BY_DATA.get(given.get("data", DEFAULTS["data"]), "imagenet-cnn")
    args = argparse.Namespace(**DEFAULTS | RECIPES[recipe] | given | {"recipe": recipe})
    kept = {name: value for name, value in given.items() if name not in ("resume", "overwrite", "output")}
    args.given = kept
    stretch = args.epochs / RECIPES[recipe]["epochs"]  # the recipe's milestones keep their place in a shorter run
    if "step_epochs" not in given:
        args.step_epochs = [epoch * stretch for epoch in args.step_epochs]
    if "warmup_epochs" not in given:
        args.warmup_epochs *= stretch

    if args.kd and not args.teacher:
        parser.error(f"--kd {args.kd} needs --teacher: a model name, a run's student/ folder or file.py:build")
    if args.teacher and not args.kd:
        parser.error("--teacher needs --kd nkd or --kd kd")
    for method, names in OF_METHOD.items():
        misplaced = typed.keys() & set(names)
        if misplaced and f"--kd {args.kd}" != method and f"--self-kd {args.self_kd}" != method:
            parser.error(f"--{min(misplaced).replace('_', '-')} needs {method}")
    if Path(args.model).is_dir() and typed.keys() & {"model_args", "small_stem"}:
        parser.error("--model is a student/ folder, which has its own --model-args and --small-stem")
    if args.cache == "device" and (args.crop == "resized" or (args.randaugment and args.randaugment[0])):
        parser.error("--cache device cuts and flips whole batches: say --crop pad or none, and --randaugment 0 0")
    if args.batch_size % (WORLD_SIZE * args.grad_accum):
        parser.error(
            f"--batch-size {args.batch_size} must be a multiple of processes x --grad-accum = "
            f"{WORLD_SIZE} x {args.grad_accum}"
        )
    return args


def saved_flags(output: Path) -> dict[str, Any]:
    """What the run was started with; nothing where there is no run yet."""
    file = output / "args.json"
    try:
        saved = json.loads(file.read_text()) if file.exists() else {"given": {}}
        return dict(saved["given"] if "given" in saved else saved["flags"])  # runs of before had the flags alone
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} to resume from: {error!r}") from error


# ---- losses and step ----------------------------------------------------------------------------------------------


def named_losses(
    logits: Tensor, weak_logits: Tensor | None, teacher_logits: Tensor | None, target: Tensor, *,
    kd: str | None = None, label_smoothing: float = 0.0, gamma: float = 1.5, temperature: float = 1.0,
    kd_weight: float = 1.0, kd_temperature: float = 4.0, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005,
) -> dict[str, Tensor]:  # fmt: skip
    """The terms of the objective by name; their sum is what is minimised. USKD: where there are weak logits."""
    losses = {"ce": F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)}
    if kd == "nkd":
        assert teacher_logits is not None
        losses["nkd"] = nkd_loss(logits, teacher_logits, target, gamma=gamma, temperature=temperature)
    elif kd == "kd":  # Hinton et al. 2015, arXiv 1503.02531
        assert teacher_logits is not None
        student, teacher = ((x.float() / kd_temperature).log_softmax(1) for x in (logits, teacher_logits))
        kl = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        losses["kd"] = kd_weight * kd_temperature**2 * kl
    if weak_logits is not None:
        losses["uskd"] = uskd_loss(logits, weak_logits, target, alpha=alpha, beta=beta, mu=mu)
    return losses


def forward_backward(
    net: nn.Module, teacher: nn.Module | None, images: Tensor, target: Tensor, objective: Callable[..., dict[str, Tensor]],
    amp: torch.dtype | None, scaler: torch.amp.GradScaler, grad_accum: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """The named losses of a batch, their gradients added to the parameters'; nothing waits for the device."""
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        teacher_logits = teacher(images) if teacher else None
        out = net(images)
    logits, weak_logits = out if isinstance(out, tuple) else (out, None)
    losses = objective(logits, weak_logits, teacher_logits, target)
    scaler.scale(torch.stack(list(losses.values())).sum() / grad_accum).backward()
    return losses


def update(net: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, clip_grad: float | None = None) -> None:
    """Unscale, clip, step, clear the gradients."""
    if clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), clip_grad)
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
        """Take in the steps since the last call; stop the run at the first step whose loss is not finite."""
        if not self.waiting:
            return
        steps = [step for step, _ in self.waiting]
        values = torch.stack([value for _, value in self.waiting]).double().cpu()
        self.waiting = []
        finite = values.isfinite().all(1)
        self.skipped_in_a_row = 0 if finite.any() else self.skipped_in_a_row + len(steps)
        if not finite.all() and (not self.skips_steps or self.skipped_in_a_row > 20):
            first = int(finite.int().argmin())
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values[first].tolist()))
            raise RankError(
                f"the loss is not finite at step {steps[first]}: {terms}; try a lower --lr, --clip-grad 5, "
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


def make_optimizer(
    net: nn.Module, opt: str, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """A timm optimizer by name."""
    known = timm.optim.list_optimizers()
    if opt not in known:
        near = difflib.get_close_matches(opt, known, n=5)
        raise UserError(f"--opt {opt} is no timm optimizer; near matches: {', '.join(near) or 'momentum, adamw'}")
    # the paper's SGD recipes decay every parameter
    return create_optimizer_v2(net, opt, lr, weight_decay, momentum, filter_bias_and_bn=opt not in ("momentum", "sgd"))


def make_scheduler(
    optimizer: Any, schedule: str, epochs: int, lr: float, warmup_epochs: float, step_epochs: Sequence[float],
    step_factor: float, updates_per_epoch: int,
) -> Any:  # fmt: skip
    """A timm schedule, a function of the optimizer step: a resume needs no state of it."""
    return create_scheduler_v2(
        optimizer,
        "multistep" if schedule == "step" else "cosine",
        num_epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=lr * 1e-3,
        decay_milestones=step_epochs,
        decay_rate=step_factor,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )[0]


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


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """For what may download: one rank of a machine fetches, then the others find it."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()


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
    """(epoch, index) -> (the image as a tensor, class index, None), or (None, -1, what could not be read).

    Each sample's augmentation has a seed of its own, so it depends neither on the worker nor on the rank, and a resumed
    run sees the same images.
    """

    def __init__(self, source: Any, view: Callable[[Image.Image], Tensor], seed: int = 0) -> None:
        self.source, self.view, self.seed = source, view, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, Corrupt | None]:
        epoch, index = key
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * len(self) + index) % 2**63)
        try:
            image, label = self.read(index)
            return self.view(image), label, None
        except UnreadableImage as error:
            samples = getattr(self.source, "samples", None)
            return None, -1, Corrupt(str(samples[index][0]) if samples else f"sample {index}", str(error))
        finally:
            torch.set_rng_state(state)

    def read(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self.source, timm.data.ImageDataset):  # which itself puts another image in a broken one's place
            file, label = self.source.reader[index][:2]
            return open_image(file), label
        image, label = self.source[index]
        return image, label


class EpochSampler(DistributedSampler):
    """DistributedSampler that hands the epoch on with each index, for the seed of the sample's augmentation."""

    def __iter__(self) -> Any:
        return ((self.epoch, index) for index in super().__iter__())


class Batch(NamedTuple):
    images: Tensor | None  # uint8 (B, 3, H, W); None when not one of the batch could be read
    labels: Tensor | None
    corrupt: list[Corrupt]


def collate(samples: list[tuple[Tensor | None, int, Corrupt | None]]) -> Batch:
    corrupt = [unreadable for _, _, unreadable in samples if unreadable]
    pairs = [(image, label) for image, label, _ in samples if image is not None]
    if not pairs:
        return Batch(None, None, corrupt)
    return Batch(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs]), corrupt)


def make_loader(
    source: Any, view: Callable[[Image.Image], Tensor], batch_size: int, train: bool, seed: int = 0,
    workers: int | None = None, pin_memory: bool = False, indices: Sequence[int] | None = None,
) -> DataLoader:  # fmt: skip
    """Training: each rank a part of the shuffle, whole batches only. Evaluation: each sample on exactly one rank.

    indices: evaluate on these alone
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if isinstance(source, Digits) else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    dataset = Samples(source, view, seed)
    sampler: Any = [(0, index) for index in (indices or range(len(dataset)))[RANK::WORLD_SIZE]]
    if train:
        sampler = EpochSampler(dataset, WORLD_SIZE, RANK, seed=seed, drop_last=True)
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


def worker_context() -> Any:
    """Data loading processes come from a clean one: forks of this one may hang on the locks its threads held."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision"])
    return context


def end_with_the_training_process(_worker: int) -> None:
    """Workers watch their parent, here the fork server, which waits for them: without this they outlive a killed run."""

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
        self, decoded: DataLoader, batch_size: int, device: torch.device, train: bool, seed: int = 0, crop: str = "none",
        hflip: float = 0.0,
    ) -> None:  # fmt: skip
        self.batch_size, self.train, self.seed, self.crop, self.hflip = batch_size, train, seed, crop, hflip
        self.epoch, self.count, self.corrupt = 0, 0, list[Corrupt]()
        self.share = len(decoded.dataset) // WORLD_SIZE  # type: ignore[arg-type]
        self.images = torch.empty(0, device=device)
        self.labels = torch.empty(self.share + 1, dtype=torch.int64, device=device)
        for images, labels, corrupt in progress(decoded, "decode"):
            self.corrupt += corrupt
            if images is None:
                continue
            if not self.count:
                self.images = torch.empty(self.share + 1, *images.shape[1:], dtype=torch.uint8, device=device)
            part = slice(self.count, self.count + len(images))
            self.images[part], self.labels[part] = images, labels
            self.count = part.stop

    def __len__(self) -> int:
        return self.share // self.batch_size if self.train else math.ceil(self.count / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        device = self.images.device
        generator = torch.Generator(device).manual_seed((self.seed * 1_000_003 + self.epoch) * WORLD_SIZE + RANK)
        if not self.count:
            yield Batch(None, None, self.corrupt)
            return
        order = torch.arange(self.count, device=device)
        if self.train:  # every rank needs as many batches: where images could not be read, others come twice
            shuffled = torch.randperm(self.count, generator=generator, device=device)
            order = shuffled[torch.arange(len(self) * self.batch_size, device=device) % self.count]
        for picked in order.split(self.batch_size):
            images = self.images[picked]
            if self.train:
                images = crop_and_flip(images, self.crop, self.hflip, generator)
            yield Batch(images, self.labels[picked], self.corrupt)


def crop_and_flip(images: Tensor, crop: str, hflip: float, generator: torch.Generator) -> Tensor:
    """--crop pad or none and --hflip of a uint8 (B, 3, S, S) batch on its device, drawn for each image by itself."""
    n, _, size, _ = images.shape

    def uniform(high: float) -> Tensor:
        return high * torch.rand(n, 1, generator=generator, device=images.device)

    flip = uniform(1) < hflip
    column = row = torch.arange(size, device=images.device).expand(n, size)
    column = torch.where(flip, size - 1 - column, column)
    if crop == "pad":
        pad = size // 8
        images = F.pad(images, [pad] * 4)
        row, column = (side + uniform(2 * pad + 1).long() for side in (row, column))
    sample = torch.arange(n, device=images.device).view(n, 1, 1)
    return images[sample, :, row.unsqueeze(2), column.unsqueeze(1)].permute(0, 3, 1, 2)


def batch_augmentation(
    random_erasing: float, mixup: float, cutmix: float, num_classes: int, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of normalised batches on the device: random erasing, then mixup or cutmix, which soften the targets."""
    erase = RandomErasing(random_erasing, mode="pixel", device=device) if random_erasing else None
    mixers = [
        mixer(alpha=alpha, num_classes=num_classes)
        for mixer, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha
    ]
    mix = v2.RandomChoice(mixers) if mixers else None

    def augment(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        images = erase(images) if erase else images
        return mix(images, target) if mix else (images, target)

    return augment


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
                    f"mend or remove them; the last one is {name}"
                )


# ---- models -------------------------------------------------------------------------------------------------------


def make_student(
    name: str, data: Data, data_name: str, img_size: int, model_args: Sequence[str] = (), small_stem: bool = False,
    interpolation: str = "bilinear", eval_crop: float = 1.0,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """The student, and the config.json that says all that is needed to use it."""
    num_classes = len(data.label_names)
    if Path(name).is_dir():
        model, config = load_student(Path(name))
        if config["num_classes"] != num_classes:
            raise UserError(f"--model {name} has {config['num_classes']} classes, --data {data_name} {num_classes}")
        if config["input_size"][1:] != [img_size, img_size]:
            height, width = config["input_size"][1:]
            raise UserError(f"--model {name} takes {height}x{width} pixels, --img-size is {img_size}")
        return model, config | {"label_names": data.label_names}
    architecture = find_architecture(name, model_args, small_stem)
    return build_model(architecture, num_classes, img_size), {
        "architecture": architecture,
        "num_classes": num_classes,
        "label_names": data.label_names,
        "mean": list(data.mean),
        "std": list(data.std),
        "input_size": [3, img_size, img_size],
        "interpolation": interpolation,
        "crop": eval_crop,
    }


def make_teacher(name: str, student: dict[str, Any], data_name: str) -> Teacher:
    """The teacher that --teacher names, for a student of this config.json."""
    if Path(name).is_dir():
        model, config = load_student(Path(name))
        check_classes(name, config["num_classes"], student, data_name)
        if config["label_names"] != student["label_names"]:
            pair = next(p for p in zip(config["label_names"], student["label_names"]) if p[0] != p[1])
            raise UserError(f"--teacher {name} has other classes than --data {data_name}: {pair[0]} and not {pair[1]}")
        mean, std, input_size = (config[key] for key in ("mean", "std", "input_size"))
    else:
        architecture = find_architecture(name)
        if architecture["library"] == "file":  # its weights, and these three if they differ, are its own business
            model = build_model(architecture, student["num_classes"], student["input_size"][1])
            mean, std, input_size = (getattr(model, key, student[key]) for key in ("mean", "std", "input_size"))
        else:
            model, mean, std, input_size = fetch_teacher(name, architecture["library"], student, data_name)
    check_forward(model.eval(), f"--teacher {name}", input_size, student["num_classes"])
    return Teacher(model, mean, std, student["mean"], student["std"], input_size[1:])


def fetch_teacher(name: str, library: str, student: dict[str, Any], data_name: str) -> tuple[nn.Module, Any, Any, Any]:
    """A library's model with its ImageNet weights, their mean and std, and the size of an image."""
    if library == "torchvision":
        choices = torchvision.models.get_model_weights(name)
        weights = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)  # V1: those of the paper's teachers
        preset = weights.transforms()
        mean, std, input_size = preset.mean, preset.std, (3, preset.crop_size[0], preset.crop_size[0])
        classes, fetch = len(weights.meta["categories"]), lambda: torchvision.models.get_model(name, weights=weights)
    else:
        config = timm.get_pretrained_cfg(name)
        mean, std, input_size = config.mean, config.std, config.input_size
        classes, fetch = config.num_classes, lambda: timm.create_model(name, pretrained=True)
    check_classes(name, classes, student, data_name)  # before a download
    try:
        with local_rank_zero_first():
            return fetch(), mean, std, input_size
    except Exception as error:  # each source has errors of its own
        raise UserError(
            f"--teacher {name}: its ImageNet weights could not be fetched ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); give a run's student/ folder or file.py:build instead"
        ) from error


def check_classes(name: str, classes: int, student: dict[str, Any], data_name: str) -> None:
    if classes != student["num_classes"]:
        raise UserError(
            f"--teacher {name} has {classes} classes, --data {data_name} has {student['num_classes']}: "
            "take a teacher trained on the same classes"
        )


# ---- evaluation ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[Batch], to_device: ToDevice, amp: torch.dtype | None, corrupt: CorruptCount
) -> dict[str, float]:
    """Top-1 and top-5 in percent and the cross-entropy, each sample of all ranks counted once."""
    model.eval()
    device = to_device.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, samples
    for images, labels, unreadable in progress(loader, "validate"):
        corrupt.add(unreadable)
        if images is None:
            continue
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, amp, enabled=amp is not None):
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

WRITTEN = ("args.json", "metrics.csv", "curves.png", "last.pt", "best.pt", REFERENCE, "student/model.safetensors",
           "student/config.json")  # fmt: skip


def make_run_dir(output: str | None, resume: bool, overwrite: bool, model: str, method: str) -> Path:
    """The run's directory: --output, or the next number under runs/. The same on every rank."""
    answer: list[Any] = [None]
    if IS_MAIN:
        try:
            answer[0] = claim_run_dir(output, resume, overwrite, model, method)
        except UserError as error:
            answer[0] = error
        except OSError as error:
            answer[0] = UserError(f"cannot make the run directory {output or 'runs/'}: {error.strerror}")
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def claim_run_dir(output: str | None, resume: bool, overwrite: bool, model: str, method: str) -> Path:
    if output:
        folder = Path(output)
        if (folder / "args.json").exists() and not (resume or overwrite):
            raise UserError(f"{folder} already holds a run: --resume goes on with it, --overwrite replaces it")
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*map(folder.joinpath, WRITTEN), *folder.glob("events.out.tfevents.*")) if overwrite else ():
            file.unlink(missing_ok=True)
        return folder
    if Path(model).is_dir():
        parts = Path(model).resolve().parts
        model = parts[-2] if parts[-1] == "student" else parts[-1]
    else:
        model = Path(model.rpartition(":")[0]).stem or model
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    taken = [int(match[1]) for path in runs.iterdir() if (match := re.match(r"(\d+)", path.name))]
    for number in itertools.count(max(taken, default=0) + 1):  # until one is ours: other runs may start just now
        claim = runs / f".{number:03d}"
        try:
            claim.mkdir()
        except FileExistsError:
            continue
        folder = runs / f"{number:03d}-{model}-{method}"
        claimed = not list(runs.glob(f"{number:03d}-*"))
        if claimed:
            folder.mkdir()
        claim.rmdir()
        if claimed:
            return folder
    raise UserError("no free number under runs/")


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
    """args.json: what was typed and what came of it, versions and hardware."""
    flags = {name: value for name, value in vars(args).items() if name != "given"}
    packages = ("torch", "torchvision", "timm", "numpy")
    about = {
        "flags": flags,
        "given": args.given,
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "processes": WORLD_SIZE,
            "cpu_cores": os.cpu_count(),
            "platform": platform.platform(),
        },
    }
    return json.dumps(about, indent=2)


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
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

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses = [name for name in rows[-1] if "loss" in name]
    for axis, names, label in zip(axes, (losses, ["val_top1", "val_top5"]), ("loss", "accuracy (%)")):
        for name in names:
            axis.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=name)
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend()
        axis.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    write_whole(path, image.getvalue())


def keep_reference(output: Path, data: Data, count: int) -> str:
    """Write reference.npz: some images as the best student sees them, and its answers in full precision."""
    model, config = load_student(output)

    def prepared(source: Any) -> tuple[np.ndarray, np.ndarray]:
        samples = Samples(source, functools.partial(eval_view, config=config))
        drawn = (samples[0, index] for index in evenly(len(samples), count))
        pairs = [(image.permute(1, 2, 0).numpy(), label) for image, label, _ in drawn if image is not None]
        return np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])

    (images, labels), (train_images, _) = prepared(data.val), prepared(data.train)
    to_device = ToDevice(config["mean"], config["std"], torch.device("cpu"), torch.contiguous_format)
    with torch.inference_mode():
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(32)
        logits = torch.cat([model.eval()(to_device(batch)) for batch in batches]).numpy()
    digest = np.array(source_of(output)["weights_sha256"])
    write_reference(output / REFERENCE, Reference(images, labels, logits, train_images, digest))
    size = (output / REFERENCE).stat().st_size / 1e6
    return f"{len(images)} validation and {len(train_images)} training images in {output / REFERENCE}, {size:.1f} MB"


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


# ---- a run --------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """Everything a run is made of; what happens to it is in train()."""

    data: Data
    config: dict[str, Any]  # the student's config.json
    student: nn.Module  # what is saved
    net: nn.Module  # what is optimised: the student, with USKD's weak head where there is one
    teacher: Teacher | None
    objective: Callable[..., dict[str, Tensor]]  # named_losses with its weights
    to_device: ToDevice
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    train_loader: Any
    val_loader: Any
    updates_per_epoch: int
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    device: torch.device
    amp: torch.dtype | None


def build(args: argparse.Namespace, data: Data | None = None, teacher: Teacher | None = None) -> Training:
    """Put a run together as the flags say; data and teacher may be given in place of those they name."""
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    data = data or open_data(args.data, args.data_dir, args.download, args.num_classes)

    torch.manual_seed(args.seed)
    student, config = make_student(
        args.model, data, args.data, args.img_size, args.model_args, args.small_stem, args.interpolation, args.eval_crop
    )
    num_classes, input_size = config["num_classes"], config["input_size"]
    micro_batch = args.batch_size // (WORLD_SIZE * args.grad_accum)
    check_forward(student, f"--model {args.model}", input_size, num_classes, min(micro_batch, 2))
    if args.sync_bn and WORLD_SIZE > 1:
        if device.type != "cuda":
            raise UserError("--sync-bn needs CUDA devices")
        student = convert_sync_batchnorm(student)
    if args.teacher and teacher is None:
        teacher = make_teacher(args.teacher, config, args.data)
    if teacher:
        teacher = teacher.to(device, memory_format=memory_format)
    net = student
    if args.self_kd:
        try:
            net = WithWeakHead(student, args.tap, num_classes, example_input=torch.zeros(2, *input_size))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--self-kd uskd on {args.model} (--tap names the layer): {error}") from error
    net.to(device, memory_format=memory_format)

    view = functools.partial(eval_view, config=config)
    loader = functools.partial(make_loader, workers=args.workers, pin_memory=device.type == "cuda")
    train_loader: Any
    val_loader: Any
    if args.cache == "none":
        augmented = train_view(args.img_size, args.crop, args.hflip, args.interpolation, args.randaugment)
        train_loader = loader(data.train, augmented, micro_batch, True, args.seed)
        val_loader = loader(data.val, view, 2 * micro_batch, False)
    else:
        try:
            decoded = loader(data.train, train_view(args.img_size, "none", 0.0, args.interpolation), 256, False)
            train_loader = DeviceLoader(decoded, micro_batch, device, True, args.seed, args.crop, args.hflip)
            val_loader = DeviceLoader(loader(data.val, view, 256, False), 2 * micro_batch, device, False)
        except torch.OutOfMemoryError as error:
            count = len(data.train) + len(data.val)
            raise RankError(
                f"--cache device: {count} images of {args.img_size} px do not fit in the device's memory: leave it out"
            ) from error
    updates_per_epoch = len(train_loader) // args.grad_accum
    if updates_per_epoch == 0:
        raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data.train)} training images")

    optimizer = make_optimizer(net, args.opt, args.lr, args.weight_decay, args.momentum)
    scheduler = make_scheduler(
        optimizer, args.schedule, args.epochs, args.lr, args.warmup_epochs, args.step_epochs, args.step_factor,
        updates_per_epoch,
    )  # fmt: skip
    weights = ("kd", "label_smoothing", "gamma", "temperature", "kd_weight", "kd_temperature", "alpha", "beta", "mu")
    return Training(
        data=data,
        config=config,
        student=student,
        net=net,
        teacher=teacher,
        objective=functools.partial(named_losses, **{name: getattr(args, name) for name in weights}),
        to_device=ToDevice(config["mean"], config["std"], device, memory_format),
        augment=batch_augmentation(args.random_erasing, args.mixup, args.cutmix, num_classes, device),
        train_loader=train_loader,
        val_loader=val_loader,
        updates_per_epoch=updates_per_epoch,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        device=device,
        amp=amp,
    )


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; leave it out to train on the CPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise UserError(f"{torch.cuda.device_count()} GPUs, but local rank {LOCAL_RANK}: lower --nproc-per-node")
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, None for full precision."""
    if name == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


def restore(run: Training, state: dict[str, Any], opt: str, where: str) -> None:
    """Weights, optimizer, scaler and random states of a checkpoint; weight decay and the like are those of this call."""
    load_weights(run.net, state["model"], where)
    if state["args"]["opt"] != opt:
        raise UserError(f"{where} was saved with --opt {state['args']['opt']}, not {opt}")
    options = [{name: group[name] for name in group if name != "params"} for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(state["optimizer"])
    for group, now in zip(run.optimizer.param_groups, options):
        group.update(now)
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    if len(state["random"]) == WORLD_SIZE:
        set_random_states(state["random"][RANK], run.device)


def train_epoch(
    parallel: nn.Module, run: Training, epoch: int, corrupt: CorruptCount, log: LossLog, log_interval: int,
    grad_accum: int, clip_grad: float | None, ema: ModelEmaV3 | None,
) -> float:  # fmt: skip
    """One pass over the training images; returns the learning rate of its first step. parallel: run.net, wrapped."""
    parallel.train()
    lr = 0.0
    step = epoch * run.updates_per_epoch
    for part in (run.train_loader, getattr(run.train_loader, "sampler", None)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    batches = itertools.islice(run.train_loader, run.updates_per_epoch * grad_accum)
    for i, (images, labels, unreadable) in enumerate(progress(batches, f"epoch {epoch + 1}", len(run.train_loader))):
        corrupt.add(unreadable)
        if images is None:
            raise RankError(f"not one image of a training batch could be read, the first is {unreadable[0].name}")
        images, target = run.augment(run.to_device(images), labels.to(run.device, non_blocking=True))
        last_pass = (i + 1) % grad_accum == 0
        if isinstance(parallel, DistributedDataParallel):
            # gradients are exchanged at the last pass alone; DDP.no_sync() sets the same, as a context
            parallel.require_backward_grad_sync = last_pass
        losses = forward_backward(parallel, run.teacher, images, target, run.objective, run.amp, run.scaler, grad_accum)
        log.add(step, losses)
        if not last_pass:
            continue
        run.scheduler.step_update(step)
        lr = lr or run.optimizer.param_groups[0]["lr"]
        update(run.net, run.optimizer, run.scaler, clip_grad)
        step += 1
        if ema:
            ema.update(run.student, step)
        if step % log_interval == 0:
            log.read()
    log.read()
    return lr


def train(args: argparse.Namespace) -> None:
    started = time.time()
    device = pick_device(args.device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    run = build(args)
    executed = 0  # optimizer steps really taken; GradScaler leaves some out

    def count_step(*_: Any) -> None:
        nonlocal executed
        executed += 1

    run.optimizer.register_step_post_hook(count_step)

    # resume, EMA, compile, DDP, in this order
    method = "-".join(filter(None, [args.kd, args.self_kd])) or "ce"
    output = make_run_dir(args.output, args.resume, args.overwrite, args.model, method)
    torch.manual_seed(args.seed + RANK)
    random.seed(args.seed + RANK)
    last, first_epoch, best, rows = output / "last.pt", 0, -1.0, []
    state = load_checkpoint(last) if args.resume and last.exists() else None
    if state:
        restore(run, state, args.opt, str(last))
        first_epoch, best, rows = state["epoch"] + 1, state["best"], state["rows"]
    ema = ModelEmaV3(run.student, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
    if ema and state:
        load_weights(ema.module, state["ema"] or run.student.state_dict(), str(last))
    compiled: Any = torch.compile(run.net) if args.compile else run.net
    if args.compile and run.teacher:
        run.teacher.model = torch.compile(run.teacher.model)  # type: ignore[assignment]
    parallel: Any = compiled
    if WORLD_SIZE > 1:
        ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(compiled, device_ids=ids, gradient_as_bucket_view=True)

    board: Any = None
    if IS_MAIN:
        from torch.utils.tensorboard import SummaryWriter

        write_whole(output / "args.json", describe_run(args, device))
        board = SummaryWriter(str(output), purge_step=first_epoch if state else None)
        say_what_starts(args, run, output)
        if args.resume:
            print(f"going on after epoch {first_epoch}" if state else f"no {last} yet: starting anew", flush=True)

    log = LossLog(skips_steps=run.scaler.is_enabled())
    corrupt = {part: CorruptCount(part, len(source)) for part, source in
               (("training", run.data.train), ("validation", run.data.val))}  # fmt: skip
    for epoch in range(first_epoch, args.epochs):
        began, executed = time.time(), 0
        lr = train_epoch(
            parallel, run, epoch, corrupt["training"], log, args.log_interval, args.grad_accum, args.clip_grad, ema
        )
        images_per_s = run.updates_per_epoch * args.batch_size / (time.time() - began)
        if WORLD_SIZE > 1:  # each rank has batch-norm statistics of its own: all must evaluate the same model
            for model in filter(None, (run.student, ema and ema.module)):
                distribute_bn(model, WORLD_SIZE, reduce=True)
        evaluated = ema.module if ema else compiled
        metrics = evaluate(evaluated, run.val_loader, run.to_device, run.amp, corrupt["validation"])
        rows.append(
            {"epoch": epoch + 1}
            | log.means(device)
            | metrics
            | {
                "lr": lr,  # of the epoch's first step
                "skipped_steps": run.updates_per_epoch - executed,
                "images_per_s": images_per_s,
                "seconds": time.time() - began,
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
        print(epoch_line(rows[-1], args.epochs), flush=True)
        for name, value in rows[-1].items():
            board.add_scalar(name, value, epoch + 1)
        checkpoint = {
            "model": run.net.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "ema": ema.module.state_dict() if ema else None,
            "epoch": epoch,
            "best": best,
            "rows": rows,
            "random": rank_random,
            "args": vars(args),
            "config": run.config,
        }
        if improved:
            plain = ema.module if ema else run.student
            save_student(output / "student", plain, run.config | {"metrics": {"epoch": epoch + 1} | metrics})
            save_checkpoint(output / "best.pt", checkpoint)
        write_metrics(output / "metrics.csv", rows)
        save_checkpoint(last, checkpoint)  # the last: what a resume starts from knows of the rest

    if IS_MAIN:
        board.close()
        plot_curves(output / "curves.png", rows)
        if args.reference:
            print(keep_reference(output, run.data, args.reference), flush=True)
        print(
            f"last top-1 {rows[-1]['val_top1']:.2f} %, best {best:.2f} % -> {output}/student; "
            f"{time.time() - started:.0f} s, {peak_memory(device)} MiB at most",
            flush=True,
        )


def say_what_starts(args: argparse.Namespace, run: Training, output: Path) -> None:
    millions = sum(p.numel() for p in run.student.parameters()) / 1e6
    method = " + ".join(filter(None, ["cross-entropy", args.kd, args.self_kd]))
    sizes = f"{len(run.data.train)} training and {len(run.data.val)} validation images"
    print(
        f"{args.model} ({millions:.2f} M parameters), {method}"
        + (f" with {args.teacher}" if run.teacher else "")
        + (f" at {run.net.tap}" if isinstance(run.net, WithWeakHead) else "")
        + f"; {sizes} of {len(run.data.label_names)} classes; {WORLD_SIZE} x {run.device}, "
        + f"{str(run.amp or torch.float32).removeprefix('torch.')} -> {output}",
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

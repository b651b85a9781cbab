"""Train an image classifier, with a teacher (NKD, classic KD), with itself (USKD), or plainly.

    torchrun train.py --self-kd uskd --model mobilenet_v2                     # 1,797 digits, nothing to download
    python train.py --model resnet18 --small-stem                             # cross-entropy, the baseline
    python train.py --kd nkd --teacher runs/002-resnet18-ce/student           # a run's student as the teacher
    python train.py --data photos/ --model mobilenet_v2 --self-kd uskd        # photos/train/CLASS/*.jpg, photos/val/...
    torchrun --nproc-per-node 8 train.py --data /imagenet --model resnet18 --teacher resnet34 --kd nkd
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...
    python train.py --output runs/001-mobilenet_v2-uskd --resume              # go on where it stopped
    torchrun --max-restarts 3 train.py --output runs/mine --resume auto ...   # start or go on: what a job script wants

Read it from here down: flags, losses and step, data, evaluation, checkpoints; then build() puts a run together, and
train() is the loop. Functions take what they read: only parse_args, build and train know the flags.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from deploy import run_directory
from deploy.cli import Parser, UserError, explain, number, show_error, student_folder, terminals, write_whole
from deploy.config import Metadata, read_config
from deploy.flags import BY_DATA, RECIPES, pick_recipe
from deploy.per_class import write_per_class
from deploy.preprocess import RESAMPLING
from deploy.reference import evenly, keep_reference
from deploy.student import call_own, check_forward, is_own, own_function
from kdlite import Teacher, WithWeakHead, nkd_loss, nkd_topk_loss, top_k_logprobs, uskd_loss
from kdlite.training import distributed as ranks
from kdlite.training import outputs
from kdlite.training.checkpoint import LossLog, Progress, State, load_checkpoint, write_run
from kdlite.training.data import (
    SPLIT,
    Data,
    class_counts,
    class_weights,
    median_size,
    open_data,
    read_split,
    say,
    write_split,
)
from kdlite.training.distributed import IS_MAIN, RANK, WORLD_SIZE, Ranks, StopRequest, from_rank_zero, pick_device
from kdlite.training.loading import (
    Batch,
    CorruptCount,
    DeviceLoader,
    describe_view,
    eval_view,
    image_progress,
    make_loader,
    train_view,
)
from kdlite.training.outputs import batch_picture, save_student
from kdlite.training.teacher_labels import StoredLabels, begin_labels, describe_images, digest_of, write_labels
from kdlite.training.weights import load_teacher, open_student, settle_batch_norm

# ---- flags --------------------------------------------------------------------------------------------------------


def distillation(name: str) -> str:
    if name not in ("nkd", "kd") and not is_own(name):
        raise argparse.ArgumentTypeError(f"{name!r} is none of nkd, kd and path/to/file.py:function")
    return name


# Flags that belong to a method: without it they would be ignored, so they are refused.
OF_METHOD = {
    "--kd nkd": ("gamma", "temperature"),
    "--kd kd": ("kd_weight", "kd_temperature"),
    "--self-kd uskd": ("tap", "alpha", "beta", "mu"),
    "--write-labels": ("views", "top_k"),
}

COUNT, WEIGHT, SHARE, POSITIVE = number(int, 1), number(float, 0), number(float, 0, 1), number(float, 0, above=True)
MIXING = number(float, 0.01, 1000, or_zero=True)
YES_NO, YES = dict(action=argparse.BooleanOptionalAction), dict(action="store_true")
RECIPE = "by recipe"  # a default that the recipe gives
# Every flag: its default, its help, and what argparse is told.
FLAGS: dict[str, dict[str, tuple[Any, str, dict[str, Any]]]] = {
    "data": {
        "data": ("digits", "digits (embedded), cifar10, cifar100, or a folder with train/ and val/, or of classes", {}),
        "data_dir": ("data", "where cifar is kept", {}),
        "download": (False, "fetch cifar if it is not there yet", YES),
        "val_split": (None, "share of each class to validate on, of a folder without val/",
                      dict(type=number(float, 0, 1, above=True))),
        "img_size": (RECIPE, "pixels a side that the student sees, or height and width", dict(type=COUNT, nargs="+")),
        "in_chans": (3, "channels that the student sees; 1: images are made grey", dict(type=int, choices=[1, 3])),
        "crop": (RECIPE, "random crop: resized, or padded by 1/8, or none", dict(choices=["resized", "pad", "none"])),
        "hflip": (RECIPE, "probability of a horizontal flip", dict(type=SHARE)),
        "randaugment": (None, "operations (0: off) and magnitude, to 30", dict(type=number(int, 0, 30), nargs=2)),
        "random_erasing": (0.0, "probability of random erasing", dict(type=SHARE)),
        "mixup": (0.0, "alpha of mixup; 0: off", dict(type=MIXING)),
        "cutmix": (0.0, "alpha of cutmix; 0: off", dict(type=MIXING)),
        "eval_crop": (1.0, "share of the resized side kept in evaluation", dict(type=number(float, 0.1, 1))),
        "interpolation": ("bilinear", "filter of every resize", dict(choices=sorted(RESAMPLING))),
        "cache": ("none", "device: decode small images once and keep them there", dict(choices=["none", "device"])),
        "workers": (None, "data loading processes per process; left out: the cores", dict(type=number(int, 0))),
    },
    "models": {
        "model": ("mobilenet_v2", "torchvision's or timm's name, a student/ folder, or path/to/file.py:build", {}),
        "model_args": ([], "passed on to the model", dict(nargs="+", metavar="KEY=VALUE")),
        "model_file": ([], "file.py:build of a student/ folder that is a model of your own; runs it", dict(nargs="+")),
        "small_stem": (False, "for images of 64 px and less: 3x3 first convolution, no stride, no max-pool", YES_NO),
        "pretrained": (False, "start from the library's ImageNet weights (a download), with a new classifier", YES),
        "init": (None, "start from what fits of a student/ folder, a .safetensors or a .pth of weights", {}),
        "teacher": (None, "as --model; a library's name means its ImageNet weights (a download), NAME:FILE those in a "
                    "file", {}),
        "write_labels": (None, "keep what --teacher says of every training image in this folder, and end", {}),
        "views": (10, "--write-labels: how many epochs' crops and flips of each image", dict(type=COUNT)),
        "top_k": (None, "--write-labels: classes kept of each answer (default: 10)", dict(type=COUNT)),
        "teacher_labels": (None, "such a folder, in place of --teacher", {}),
        "teacher_classes": (None, "file of lines CLASS,WHAT THE TEACHER CALLS IT; left out: matched by name", {}),
    },
    "distillation, added to the cross-entropy": {
        "kd": (None, "with --teacher: nkd; kd, classic temperature KD; or path/to/file.py:function of (student_logits, "
               "teacher_logits, target)", dict(type=distillation)),
        "self_kd": (None, "without a teacher: USKD", dict(choices=["uskd"])),
        "tap": (None, "layer whose feature feeds USKD's weak head; left out: by architecture", {}),
        "gamma": (1.5, "NKD: weight of the non-target term", dict(type=WEIGHT)),
        "temperature": (1.0, "NKD: temperature of the non-target term", dict(type=POSITIVE)),
        "kd_weight": (1.0, "KD: weight of the temperature-squared KL term", dict(type=WEIGHT)),
        "kd_temperature": (4.0, "KD: temperature", dict(type=POSITIVE)),
        "alpha": (1.0, "USKD: weight of the target term", dict(type=WEIGHT)),
        "beta": (0.1, "USKD: weight of the non-target term", dict(type=WEIGHT)),
        "mu": (0.005, "USKD: weight of the weak head's cross-entropy", dict(type=WEIGHT)),
    },
    "training": {
        "recipe": (None, "a group of defaults, see below; left out: by --data, of a folder by its images",
                   dict(choices=sorted(RECIPES))),
        "epochs": (RECIPE, "the recipe's warm-up and step epochs are stretched to fit", dict(type=COUNT)),
        "batch_size": (RECIPE, "images per optimizer step, over all processes", dict(type=COUNT)),
        "grad_accum": (1, "split each optimizer step into this many passes", dict(type=COUNT)),
        "opt": (RECIPE, "a timm optimizer: momentum (plain SGD), sgd (Nesterov), adamw, ...", {}),
        "lr": (RECIPE, "peak learning rate", dict(type=WEIGHT)),
        "momentum": (0.9, "momentum of SGD and its relatives", dict(type=SHARE)),
        "weight_decay": (RECIPE, "weight decay", dict(type=WEIGHT)),
        "layer_decay": (None, "fine-tuning: factor of the learning rate from each layer to the one before it",
                        dict(type=number(float, 0, 1, above=True))),
        "schedule": (RECIPE, "schedule of the learning rate", dict(choices=["cosine", "step"])),
        "warmup_epochs": (0.0, "linear warm-up, part of --epochs", dict(type=WEIGHT)),
        "step_epochs": (RECIPE, "step schedule: the epochs at which the rate falls", dict(type=WEIGHT, nargs="+")),
        "step_factor": (RECIPE, "step schedule: what the rate is multiplied by", dict(type=POSITIVE)),
        "label_smoothing": (0.0, "label smoothing of the cross-entropy alone", dict(type=SHARE)),
        "class_weights": (None, "weight every loss by class: balanced, or a CSV file of name,weight", {}),
        "clip_grad": (None, "largest gradient norm", dict(type=POSITIVE)),
        "ema_decay": (0.0, "average of the weights, evaluated and saved in their place; 0: off", dict(type=SHARE)),
        "seed": (0, "seed of weights, order and augmentation", dict(type=number(int, 0, 2**32 - 1))),
    },
    "machine": {
        "device": ("auto", "where to train; auto: a GPU if there is one", dict(choices=["auto", "cpu", "cuda"])),
        "amp": ("auto", "mixed precision; auto: the GPU's, off on CPU", dict(choices=["auto", "bf16", "fp16", "off"])),
        "compile": (False, "torch.compile student and teacher", YES_NO),
        "channels_last": (True, "memory layout of images and weights", YES_NO),
        "sync_bn": (False, "batch-norm statistics over all GPUs", YES),
        "timeout": (5.0, "minutes after which a process that does not answer ends the run", dict(type=POSITIVE)),
    },
    "run directory": {
        "output": (None, "where the run is kept; left out: the next number under runs/", {}),
        "resume": (None, "go on from last.pt in --output, if it is there; auto: from the one before if it is damaged",
                   dict(nargs="?", const="last", choices=["last", "auto"])),
        "save_every": (10.0, "minutes between checkpoints within an epoch; 0: after epochs alone", dict(type=WEIGHT)),
        "overwrite": (False, "replace the run that --output holds", YES),
        "reference": (256, "images of each set in reference.npz, for deploy/; 0: none", dict(type=number(int, 0))),
        "log_interval": (50, "optimizer steps between looks at the losses", dict(type=COUNT)),
    },
}  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    """Of what is typed alone: a flag that is left out has no value here."""
    epilog = "; ".join(
        f"{name}: {', '.join(f'{k} {v}' for k, v in values.items())}" for name, values in RECIPES.items()
    )
    description = (__doc__ or "").partition("\n\n")[0]
    parser = Parser(description=description, epilog=f"Recipes. {epilog}", argument_default=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (default, help, options) in flags.items():
            default = RECIPE if any(name in values for values in RECIPES.values()) else default
            said = "" if default in (None, False, []) else f" (default: {default})"
            group.add_argument(f"--{name.replace('_', '-')}", help=help + said, **options)
    return parser


def read_flags(argv: list[str] | None = None) -> dict[str, Any]:
    """What is typed, with the paths in it made absolute: --resume may be called from another folder."""
    typed = vars(get_parser().parse_args(argv))
    paths = ("data", "data_dir", "model", "init", "teacher", "teacher_classes", "write_labels", "teacher_labels", "kd",
             "class_weights")  # fmt: skip
    for name in paths:
        if name in typed and typed[name] not in {"data": BY_DATA, "kd": ("nkd", "kd")}.get(name, ()):
            typed[name] = absolute(typed[name])
    typed |= {"model_file": list(map(absolute, typed["model_file"]))} if "model_file" in typed else {}
    if typed.get("resume") and not typed.get("output"):
        raise UserError("--resume needs --output, the run directory to go on in")
    if typed.get("resume") and typed.get("overwrite"):
        raise UserError("--resume goes on with a run, --overwrite replaces it: give one of them")
    return typed


def absolute(name: str) -> str:
    """A path that is there, made absolute, ~ for the home folder; any other name as it is."""
    path, function = (name.rpartition(":")[0], ":" + name.rpartition(":")[2]) if is_own(name) else (name, "")
    path = os.path.expanduser(path)
    if os.path.lexists(path):
        return os.path.abspath(path) + function
    model, _, file = name.partition(":")  # of --teacher
    return f"{model}:{absolute(file)}" if file and not function else name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The defaults, then the recipe's, then with --resume what was typed before, then what is typed now."""
    typed = read_flags(argv)
    saved = from_rank_zero(lambda: run_directory.read_given(Path(typed["output"])) if typed.get("resume") else {})
    defaults = {name: default for flags in FLAGS.values() for name, (default, _, _) in flags.items()}
    before = saved.get("val_split")
    if saved and typed.get("val_split", before) != before:
        raise UserError(
            f"--val-split was {before} when this run began, and stays so: split.csv says which file is where"
        )
    given = saved | {name: typed[name] for name in typed if name not in ("resume", "overwrite", "output", "timeout")}
    args = argparse.Namespace(**defaults | given | typed | {"given": given, "opened": None})
    if args.recipe is None and args.data not in BY_DATA and not saved:
        args.opened = data = open_data(args.data, val_split=args.val_split)
        started, size = bool(args.pretrained or args.init or os.path.isdir(args.model)), given.get("img_size")
        given["fitted"] = from_rank_zero(lambda: fit_recipe(data, started, is_own(args.model), size))
    # a run on a folder from before there were fitted defaults had imagenet-cnn
    args.recipe = args.recipe or BY_DATA.get(args.data, "fitted" if "fitted" in given else "imagenet-cnn")
    recipe = given["fitted"] if args.recipe == "fitted" else RECIPES[args.recipe]
    args.__dict__ |= {name: value for name, value in recipe.items() if name not in given}
    stretch = args.epochs / recipe["epochs"]  # the recipe's milestones keep their place in a shorter run
    if "step_epochs" not in given:
        args.step_epochs = [epoch * stretch for epoch in args.step_epochs]
    if "warmup_epochs" not in given:
        args.warmup_epochs *= stretch

    check_methods(args.kd, args.teacher, args.write_labels, args.teacher_labels)
    useless = typed.keys() & {"output", "resume", "overwrite", "self_kd"}
    if args.write_labels and useless:
        raise UserError(f"--write-labels trains nothing: leave --{min(useless).replace('_', '-')} out")
    chosen = {f"--kd {args.kd}", f"--self-kd {args.self_kd}", "--write-labels" if args.write_labels else ""}
    for method, names in OF_METHOD.items():
        misplaced = typed.keys() & set(names)
        if misplaced and method not in chosen:
            raise UserError(f"--{min(misplaced).replace('_', '-')} needs {method}")
    if os.path.isdir(args.model) and typed.keys() & {"model_args", "small_stem", "interpolation", "eval_crop"}:
        raise UserError("--model is a student/ folder, which has its own arguments, stem, interpolation and crop")
    named = [flag for flag, given in (("--pretrained", args.pretrained), ("--init", args.init)) if given]
    named += ["a folder as --model"] * os.path.isdir(args.model)
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: a student starts from one of them")
    if args.teacher_classes and not args.teacher:
        raise UserError("--teacher-classes needs --teacher")
    if 0 < args.epochs <= args.warmup_epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs:g} is all of --epochs {args.epochs}: it is a part of them"
        )
    if os.path.isdir(args.model) and "img_size" not in given:
        args.in_chans, *args.img_size = read_config(student_folder(Path(args.model))).input_size
    args.img_size = [args.img_size] * 2 if isinstance(args.img_size, int) else list(args.img_size) * 2
    if len(args.img_size) not in (2, 4):
        raise UserError("--img-size takes one number, or height and width")
    args.img_size = args.img_size[:2]
    if args.write_labels or args.teacher_labels:
        mixing = [name for name in ("mixup", "cutmix", "random_erasing") if getattr(args, name)]
        if mixing or args.cache == "device":
            off = [f"--{name.replace('_', '-')} 0" for name in mixing] + ["--cache none"] * (args.cache == "device")
            raise UserError(f"stored labels are of single images, as each is cropped by itself: say {' '.join(off)}")
    if args.cache == "device" and (args.crop == "resized" or (args.randaugment and args.randaugment[0])):
        raise UserError("--cache device cuts and flips whole batches: say --crop pad or none, and --randaugment 0 0")
    if args.batch_size % (WORLD_SIZE * args.grad_accum):
        passes = f"processes x --grad-accum = {WORLD_SIZE} x {args.grad_accum}"
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of {passes}")
    return args


def check_methods(kd: str | None, teacher: str | None, write_labels: str | None, teacher_labels: str | None) -> None:
    """Raise unless the flags about a teacher go together."""
    if write_labels and (kd or teacher_labels or not teacher):
        raise UserError("--write-labels needs --teacher, and neither --kd nor --teacher-labels: nothing is trained")
    if teacher_labels and (not kd or teacher):
        raise UserError("--teacher-labels needs --kd, and no --teacher")
    if kd in ("nkd", "kd") and not (teacher or teacher_labels):
        raise UserError(f"--kd {kd} needs --teacher: a model name, a run's student/ folder or file.py:build")
    if teacher and not (kd or write_labels):
        raise UserError("--teacher needs --kd: nkd, kd or file.py:function")


def fit_recipe(data: Data, started: bool, own: bool, img_size: Sequence[int] | None) -> dict[str, Any]:
    """Defaults for a folder of photographs, by what it holds; said in the run's first line.

    started: from weights; own: the model is the user's, whose stem stays as it is; img_size: as typed
    """
    photos = data.train
    recipe, why = pick_recipe(len(photos), len(data.label_names), median_size(photos), started, img_size)
    say(why + " (--recipe or any flag overrides)")
    return recipe | {"small_stem": recipe.get("small_stem", False) and not own}


# ---- losses and step ----------------------------------------------------------------------------------------------


def named_losses(
    logits: Tensor, weak_logits: Tensor | None, teacher: Any, target: Tensor, *,
    kd: str | Callable[..., Tensor] | None = None, label_smoothing: float = 0.0, gamma: float = 1.5,
    temperature: float = 1.0, kd_weight: float = 1.0, kd_temperature: float = 4.0, alpha: float = 1.0,
    beta: float = 0.1, mu: float = 0.005, class_weights: Tensor | None = None, group: Any = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The terms of the objective by name; their sum is what is minimised. USKD: where there are weak logits.

    teacher: its logits, or of NKD a tuple of log T_t, log T_i and indices, the top-k of nkd_topk_loss
    kd: nkd, kd, or a loss of one's own of (student_logits, teacher_logits, target), one value or one a row
    class_weights: of each image's losses, by its class; for mixed labels the mean of theirs
    group: the processes that share a batch. USKD's mean over the batch is then over all of it, but for one pass of
        --grad-accum, whose logits are all that is known before its backward
    """
    each: Any = {"reduction": "none"}
    losses = {"ce": F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing, **each)}
    if isinstance(teacher, tuple) and (kd != "nkd" or temperature != 1):
        log_t, top, index = teacher  # of every class: parse_args and build see to it
        index = index.where(top > -torch.inf, target.unsqueeze(1))  # it is none: left at a probability of 0
        every = torch.full_like(logits, -1e30, dtype=torch.float32)
        teacher = every.scatter(1, index, top).scatter(1, target.unsqueeze(1), log_t.unsqueeze(1))
    if kd == "nkd" and isinstance(teacher, tuple):
        losses["nkd"] = nkd_topk_loss(logits, teacher[0], teacher[1], teacher[2], target, gamma=gamma, **each)
    elif kd == "nkd":
        losses["nkd"] = nkd_loss(logits, teacher, target, gamma=gamma, temperature=temperature, **each)
    elif kd == "kd":  # Hinton et al. 2015, arXiv 1503.02531
        student, teacher = ((x.float() / kd_temperature).log_softmax(1) for x in (logits, teacher))
        kl = F.kl_div(student, teacher, log_target=True, **each).sum(1)
        losses["kd"] = kd_weight * kd_temperature**2 * kl
    elif callable(kd):
        losses["own"] = loss = kd(logits.float(), None if teacher is None else teacher.float(), target)
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        if shape != logits.shape[:1] and (shape != () or class_weights is not None):
            raise UserError(
                f"--kd must return a loss a row, or one if there are no --class-weights; it returned {shape}"
            )
    if weak_logits is not None:
        losses["uskd"] = uskd_loss(logits, weak_logits, target, alpha=alpha, beta=beta, mu=mu, group=group, **each)
    if class_weights is not None:
        weights = class_weights[target] if target.ndim == 1 else target @ class_weights
        losses = {name: weights * loss for name, loss in losses.items()}
    return {name: loss.mean() for name, loss in losses.items()}


def forward_backward(
    net: nn.Module, teacher: Any, images: Tensor, target: Tensor, objective: Callable[..., Any],
    amp: torch.dtype | None, scaler: torch.amp.GradScaler, grad_accum: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """The named losses of a batch, their gradients added to the parameters'; nothing waits for the device.

    teacher: gives logits of the images; or what it said of them already, the top-k of named_losses
    """
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        teacher_logits = teacher(images) if callable(teacher) else teacher
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


def make_optimizer(
    net: nn.Module, opt: str, lr: float, weight_decay: float, momentum: float, schedule: str, epochs: int,
    warmup_epochs: float, step_epochs: Sequence[float], step_factor: float, updates_per_epoch: int,
    layer_decay: float | None = None,
) -> tuple[torch.optim.Optimizer, Any]:  # fmt: skip
    """A timm optimizer and schedule; the schedule is a function of the step, so a resume needs no state of it."""
    known = timm.optim.list_optimizers()
    if opt not in known:
        near = difflib.get_close_matches(opt, known, n=5)
        raise UserError(f"--opt {opt} is no timm optimizer; near matches: {', '.join(near) or 'momentum, adamw'}")
    decay_all = opt in ("momentum", "sgd")  # as the paper's SGD recipes do
    try:
        optimizer = create_optimizer_v2(
            net, opt, lr, weight_decay, momentum, filter_bias_and_bn=not decay_all, layer_decay=layer_decay
        )
    except (ValueError, TypeError, AssertionError, ImportError, RuntimeError) as error:
        raise UserError(f"--opt {opt} cannot be made: {' '.join(str(error).split())[:200]}") from error
    scheduler, _ = create_scheduler_v2(
        optimizer, "multistep" if schedule == "step" else "cosine", num_epochs=epochs, warmup_epochs=warmup_epochs,
        warmup_lr=lr * 1e-3, decay_milestones=step_epochs, decay_rate=step_factor, step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )  # fmt: skip
    return optimizer, scheduler


# ---- data ---------------------------------------------------------------------------------------------------------


def batch_augmentation(
    random_erasing: float, mixup: float, cutmix: float, num_classes: int, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of normalised batches on the device: random erasing, then mixup or cutmix, which soften the targets."""
    erase = RandomErasing(random_erasing, mode="pixel", device=device) if random_erasing else None
    mixers = [mixer(alpha=a, num_classes=num_classes) for mixer, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
    mix = v2.RandomChoice(mixers) if mixers else None

    def augment(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        images = erase(images) if erase else images
        return mix(images, target) if mix else (images, target)

    return augment


class ToDevice:
    """uint8 (B, 3, H, W) on the host -> normalised float on the device."""

    def __init__(self, mean: Any, std: Any, device: torch.device, memory_format: torch.memory_format) -> None:
        self.device, self.memory_format = device, memory_format
        self.mean, self.std = (255 * torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return (images.float() - self.mean) / self.std

    def undo(self, images: Tensor) -> Any:
        """Normalised (B, C, H, W) -> a uint8 array (B, H, W, C), to look at."""
        pixels = (images * self.std + self.mean).round().clamp(0, 255)
        return pixels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


# ---- evaluation ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[Batch], to_device: ToDevice, amp: torch.dtype | None, corrupt: CorruptCount,
    stop: StopRequest | None = None, answers: list[Tensor] | None = None,
) -> dict[str, float] | None:  # fmt: skip
    """Top-1 and top-5 in percent and the cross-entropy, each sample of all ranks counted once; None: asked to stop.

    answers: gets the labels and what was answered of this rank's samples, (2, N)
    """
    model.eval()
    device, pairs = to_device.device, []
    totals = torch.zeros(5, dtype=torch.float64, device=device)  # loss, top-1, top-5, samples, ranks asked to stop
    for images, labels, unreadable, _ in image_progress(loader, "validate"):
        corrupt.add(unreadable)
        if stop and stop.name:
            totals[4] += 1
            break
        if images is None:
            continue
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(to_device(images)).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.unsqueeze(1)
        pairs.append(torch.stack([labels, best[:, 0]]))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[:4] += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))])
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    loss, top1, top5, count, stopped = totals.tolist()
    if stopped:
        return None
    if not count:
        raise UserError("not one validation image could be read")
    if answers is not None:
        answers += [pair.int().cpu() for pair in pairs]
    return {"val_loss": loss / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}


# ---- a run --------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """Everything a run is made of; what happens to it is in train()."""

    data: Data
    config: dict[str, Any]  # the student's config.json
    student: nn.Module  # what is saved
    net: nn.Module  # what is optimised: the student, with USKD's weak head where there is one
    teacher: Teacher | None
    stored: StoredLabels | None  # what a teacher said, in its place
    view: tuple[Any, ...]  # what train_view and describe_view are told
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


def build(
    args: argparse.Namespace, data: Data | None = None, teacher: Teacher | None = None,
    known: dict[str, Any] | None = None, sides: dict[str, str] | None = None,
) -> Training:  # fmt: skip
    """Put a run together as the flags say; data and teacher may be given in place of those they name.

    known: the student's config.json in the checkpoint that the run goes on from, which brings the weights
    sides: of a run that goes on, which image of --val-split was for what
    """
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    data = data or args.opened or open_data(args.data, args.data_dir, args.download, args.val_split, sides=sides)

    torch.manual_seed(args.seed)
    weights_decide = (args.pretrained or args.init) and not known
    interpolation, crop = (
        None if weights_decide and name not in args.given else getattr(args, name)
        for name in ("interpolation", "eval_crop")
    )
    input_size = [args.in_chans, *args.img_size]
    mean, std = ([sum(x) / 3] if args.in_chans == 1 else x for x in (data.mean, data.std))
    student, config, said = open_student(
        args.model, data.label_names, input_size, mean, std, interpolation, crop, args.model_args, args.small_stem,
        args.model_file, args.pretrained and not known, None if known else args.init, ranks.local_rank_zero_first,
    )  # fmt: skip
    config |= {name: known[name] for name in ("mean", "std", "interpolation", "crop")} if known else {}
    config["training"] = {
        "data": os.path.basename(args.data), "train_images": len(data.train), "val_images": len(data.val),
        "method": describe_method(args.kd, args.self_kd), "teacher": args.teacher and os.path.basename(args.teacher),
        "began": os.path.basename(args.init or "") or ("ImageNet weights" if args.pretrained else "noise"),
        "epochs": args.epochs,
    }  # fmt: skip
    num_classes = config["num_classes"]
    micro_batch = args.batch_size // (WORLD_SIZE * args.grad_accum)
    check_forward(student, f"--model {args.model}", input_size, num_classes, min(micro_batch, 2))
    if args.sync_bn and WORLD_SIZE > 1:
        if device.type != "cuda":
            raise UserError("--sync-bn needs CUDA devices")
        student = convert_sync_batchnorm(student)
    if args.teacher and teacher is None:
        loaded = load_teacher(args.teacher, config, ranks.local_rank_zero_first, args.model_file, args.teacher_classes)
        teacher = Teacher(
            loaded.model, loaded.mean, loaded.std, config["mean"], config["std"], loaded.input_size[1:], loaded.columns
        )
        said = "\n".join(filter(None, [said, loaded.said]))
    if teacher:
        teacher.to(device=device).to(memory_format=memory_format)
    net = student
    if args.self_kd:
        try:
            net = WithWeakHead(student, args.tap, num_classes, example_input=torch.zeros(2, *input_size))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--self-kd uskd on {args.model} (--tap names the layer): {error}") from error
    net.to(device=device).to(memory_format=memory_format)
    if said:
        say(said)

    view = functools.partial(eval_view, metadata=Metadata.from_json(config, "the student"))
    loader = functools.partial(make_loader, workers=args.workers, pin_memory=device.type == "cuda")
    train_loader: Any
    augmented = input_size, args.crop, args.hflip, config["interpolation"], args.randaugment
    stored = None
    if args.teacher_labels:
        ours = describe_images(data.train, data.label_names, describe_view(*augmented))
        stored = StoredLabels(Path(args.teacher_labels), ours)
        if (args.kd != "nkd" or args.temperature != 1) and stored.header["k"] < num_classes - 1:
            other = "--kd nkd at another temperature than 1" if args.kd == "nkd" else f"--kd {args.kd}"
            raise UserError(f"{other} wants all of a teacher's answer, of which {args.teacher_labels} has the "
                            f"top-{stored.header['k']}: write labels with --top-k {num_classes - 1}")  # fmt: skip
        if known and known["training"].get("teacher") not in (None, str(stored)):
            raise UserError(f"this run began with labels of {known['training']['teacher']}; now they are of {stored}")
        config["training"]["teacher"] = str(stored)
    if args.cache == "none":
        train_loader = loader(data.train, train_view(*augmented), micro_batch, True, args.seed, stored=stored)
        val_loader: Any = loader(data.val, view, 2 * micro_batch, False)
    else:
        decoded = loader(data.train, train_view(input_size, "none", 0.0, config["interpolation"]), 256, False)
        train_loader = DeviceLoader(decoded, micro_batch, device, True, args.seed, args.crop, args.hflip)
        val_loader = DeviceLoader(loader(data.val, view, 256, False), 2 * micro_batch, device, False)
    updates_per_epoch = len(train_loader) // args.grad_accum
    if updates_per_epoch == 0:
        raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data.train)} training images")
    if getattr(train_loader, "num_workers", 0):
        ranks.check_shared_memory(2 * train_loader.num_workers * 2 * micro_batch * math.prod(input_size))
    settled = settle_batch_norm(net, args.epochs * updates_per_epoch)
    if settled:
        say(settled)

    optimizer, scheduler = make_optimizer(
        net, args.opt, args.lr, args.weight_decay, args.momentum, args.schedule, args.epochs, args.warmup_epochs,
        args.step_epochs, args.step_factor, updates_per_epoch, args.layer_decay,
    )  # fmt: skip
    weights = ("kd", "label_smoothing", "gamma", "temperature", "kd_weight", "kd_temperature", "alpha", "beta", "mu")
    group = dist.group.WORLD if WORLD_SIZE > 1 else None
    by_class = None
    if args.class_weights:
        values = class_weights(args.class_weights, data.label_names, class_counts(data.train))
        by_class = torch.tensor(values, device=device)
        say(f"class weights, {args.class_weights}: {by_class.min():.3g} to {by_class.max():.3g}")
    options = {name: getattr(args, name) for name in weights}
    if args.kd and is_own(args.kd):
        options["kd"] = functools.partial(call_own, own_function(args.kd), args.kd)
    objective = functools.partial(named_losses, class_weights=by_class, group=group, **options)
    to_device = ToDevice(config["mean"], config["std"], device, memory_format)
    augment = batch_augmentation(args.random_erasing, args.mixup, args.cutmix, num_classes, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    return Training(
        data, config, student, net, teacher, stored, augmented, objective, to_device, augment, train_loader, val_loader,
        updates_per_epoch, optimizer, scheduler, scaler, device, amp,
    )  # fmt: skip


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, None for full precision."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def train_epoch(
    parallel: nn.Module, run: Training, progress: Progress, corrupt: CorruptCount, log: LossLog, log_interval: int,
    grad_accum: int, clip_grad: float | None, ema: ModelEmaV3 | None, after_step: Callable[[], bool],
    look: Callable[[Tensor, Tensor], Any],
) -> bool:  # fmt: skip
    """The training images, from where progress says; True once after_step, called after optimizer steps, says stop.

    look: is shown the first batch of all as the network sees it
    """
    parallel.train()
    began, first = time.time() - progress.seconds, progress.step * grad_accum
    sampler = getattr(run.train_loader, "sampler", run.train_loader)
    sampler.set_epoch(progress.epoch, first * run.train_loader.batch_size)
    batches = itertools.islice(run.train_loader, run.updates_per_epoch * grad_accum - first)
    each = run.train_loader.batch_size
    total = run.updates_per_epoch * grad_accum * each * WORLD_SIZE
    shown = image_progress(batches, f"epoch {progress.epoch + 1}", total, each, first)
    for i, batch in enumerate(shown):
        corrupt.add(batch.corrupt)
        if batch.images is None:
            raise UserError(f"not one image of a training batch could be read, the first is {batch.corrupt[0][0]}")
        images, target = run.augment(run.to_device(batch.images), batch.labels.to(run.device, non_blocking=True))
        teacher = run.teacher or tuple(x.to(run.device, non_blocking=True) for x in batch.beside) or None
        if i == progress.epoch == progress.step == 0:
            look(images, target)
        last_pass = (i + 1) % grad_accum == 0
        if isinstance(parallel, DistributedDataParallel):
            # gradients are exchanged at the last pass alone; DDP.no_sync() sets the same, as a context
            parallel.require_backward_grad_sync = last_pass
        losses = forward_backward(parallel, teacher, images, target, run.objective, run.amp, run.scaler, grad_accum)
        step = progress.epoch * run.updates_per_epoch + progress.step
        log.add(step, losses)
        if not last_pass:
            continue
        run.scheduler.step_update(step)
        progress.lr = progress.lr or run.optimizer.param_groups[0]["lr"]
        update(run.net, run.optimizer, run.scaler, clip_grad)
        progress.step += 1
        progress.seconds = time.time() - began
        if ema:
            ema.update(run.student, step + 1)
        if progress.step % log_interval == 0:
            shown.postfix = f"loss {log.read():.4g}"
        if after_step():
            return True
    log.read()
    return False


def train(args: argparse.Namespace, stop: StopRequest, terminal: Any) -> None:
    started = time.time()
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    loaded = load_checkpoint(Path(args.output), args.resume == "auto") if args.resume else None
    sides = from_rank_zero(lambda: read_split(Path(args.output) / SPLIT)) if args.resume else None
    run = build(args, known=loaded and loaded[1]["config"], sides=sides)
    if args.write_labels:
        write_answers(run, Path(args.write_labels), args.teacher, args.seed, args.views, args.top_k, args.workers, stop)
        return
    with ExitStack() as at_the_end:
        method = "-".join(filter(None, [args.kd and args.kd.rpartition(":")[2], args.self_kd])) or "ce"

        def claim() -> Path:
            folder = run_directory.claim(args.output, args.model, method, bool(args.resume), args.overwrite)
            at_the_end.enter_context(run_directory.locked(folder))
            if args.overwrite:
                run_directory.clear(folder)
            if run.data.split:
                write_split(folder / SPLIT, run.data.split)
            terminal.log = open(folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            return folder

        output = from_rank_zero(claim)
        disk = at_the_end.enter_context(ThreadPoolExecutor(1))  # writes while training goes on
        train_in(output, args, run, loaded, stop, disk, started)


def write_answers(
    run: Training, folder: Path, name: str, seed: int, views: int, k: int | None, workers: int | None, stop: StopRequest
) -> None:
    """--write-labels: the teacher's top-k of every view of the training images."""
    assert run.teacher
    classes = len(run.data.label_names)
    k = min(10, classes - 1) if k is None else k
    if k >= classes:
        raise UserError(f"--top-k {k}: of {classes} classes {classes - 1} are left beside the label")
    header = describe_images(run.data.train, run.data.label_names, describe_view(*run.view))
    teacher = {"name": os.path.basename(name), "digest": digest_of(run.teacher), "size": list(run.teacher.size or ()),
               "seen_at": run.config["input_size"]}  # fmt: skip
    header |= {"teacher": teacher, "seed": seed, "views": views, "k": k}

    @torch.inference_mode()
    def ask(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
            logits = run.teacher(run.to_device(images))  # type: ignore[misc]
        return top_k_logprobs(logits, labels.to(run.device), k)

    with begin_labels(folder, header):
        began = time.time()
        check_teacher(run, name, workers, CorruptCount("validation", len(run.data.val)))
        images_per_s = min(2000, len(run.data.val)) / (time.time() - began)
        whole = write_labels(folder, header, run.data.train, train_view(*run.view), ask, 64, workers,
                             run.device.type == "cuda", images_per_s, stop)  # fmt: skip
    if IS_MAIN:
        by = stop.name or "a signal to another rank"
        stopped = f"stopped by {by}: what is whole in {folder} is kept, the same command goes on"
        print(f"--kd nkd --teacher-labels {folder} trains from them" if whole else stopped, flush=True)


def train_in(
    output: Path, args: argparse.Namespace, run: Training, loaded: tuple[str, dict[str, Any]] | None, stop: StopRequest,
    disk: ThreadPoolExecutor, started: float,
) -> None:  # fmt: skip
    """Train in a run directory that is this run's alone: resume, EMA, compile, DDP, in this order, then the epochs."""
    device = run.device
    torch.manual_seed(args.seed + RANK)
    random.seed(args.seed + RANK)
    try:
        ema = ModelEmaV3(run.student, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
    except RuntimeError as error:
        raise UserError(
            f"--ema-decay needs a model that can be copied: {' '.join(str(error).split())[:200]}"
        ) from error
    averaged = ema.module if ema else None
    log, progress = LossLog(skips_steps=run.scaler.is_enabled()), Progress()
    state = State(run.net, averaged, run.optimizer, run.scaler, progress, log)
    if loaded:
        state.restore(loaded[1], args.opt, run.data.label_names, loaded[0])
        same = loaded[1]["args"]["batch_size"] == args.batch_size and progress.step <= run.updates_per_epoch
        if progress.step and not same:
            raise UserError(
                f"{loaded[0]} is {progress}: take the same --batch-size and images, or resume after an epoch"
            )
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

        cpu = f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        write_whole(output / "args.json", run_directory.describe(flags_of(args), name, WORLD_SIZE))
        board = SummaryWriter(str(output), purge_step=progress.epoch + 1 if loaded else None)
        say_what_starts(args, run, output)
        if args.resume:
            going_on = f"going on from {loaded[0]}, {progress}" if loaded else ""
            print(going_on or f"no {output}/last.pt yet: starting anew", flush=True)

    corrupt = {part: CorruptCount(part, len(source) // WORLD_SIZE) for part, source in
               (("training", run.data.train), ("validation", run.data.val))}  # fmt: skip
    known = {}
    if run.teacher:
        known["teacher_top1"] = check_teacher(run, args.teacher, args.workers, corrupt["validation"])
    agreement, saved_at, waiting = ranks.Agreement(), time.time(), Future[None]()
    waiting.set_result(None)

    def look(images: Tensor, target: Tensor) -> None:
        nonlocal waiting
        if IS_MAIN:
            pixels, labels = run.to_device.undo(images[:32]), target[:32].cpu().numpy()
            waiting = disk.submit(batch_picture, output / "batch.png", pixels, labels, run.data.label_names)

    def count_step(*_: Any) -> None:
        progress.executed += 1

    def save(*others: Callable[[], Any], best: bool = False) -> None:
        """Copy the state; a thread writes it, after the other files."""
        nonlocal saved_at, waiting
        saved_at = time.time()
        content = state.copy(flags_of(args), run.config)
        if IS_MAIN:
            waiting.result()  # of the last save, which raises what went wrong there
            waiting = disk.submit(write_run, output, content, others, best)

    def after_step() -> bool:
        due = IS_MAIN and 0 < args.save_every * 60 < time.time() - saved_at
        stopping, saving = agreement.ask(stop.name is not None, due)
        if saving or stopping:
            log.read()
            save()
        return stopping

    run.optimizer.register_step_post_hook(count_step)
    while progress.epoch < args.epochs:
        stopped = train_epoch(parallel, run, progress, corrupt["training"], log, args.log_interval, args.grad_accum,
                              args.clip_grad, ema, after_step, look)  # fmt: skip
        began, answers = time.time(), list[Tensor]()
        metrics = None
        if not stopped:
            if WORLD_SIZE > 1:  # each rank has batch-norm statistics of its own: all must evaluate the same model
                for model in filter(None, (run.student, averaged)):
                    distribute_bn(model, WORLD_SIZE, reduce=True)
            metrics = evaluate(
                averaged or compiled, run.val_loader, run.to_device, run.amp, corrupt["validation"], stop, answers
            )
            if metrics is None:
                save()
        if metrics is None:
            waiting.result()
            if IS_MAIN:
                name = stop.name or "a signal to another rank"
                print(f"stopped by {name} {progress}: {output}/last.pt is saved, --resume goes on", flush=True)
            break
        progress.rows.append({
            "epoch": progress.epoch + 1, **log.means(device), **metrics, **known, "lr": progress.lr,
            "skipped_steps": run.updates_per_epoch - progress.executed,
            "images_per_s": run.updates_per_epoch * args.batch_size / progress.seconds,
            "seconds": progress.seconds + time.time() - began, "memory_mib": peak_memory(device),
        })  # fmt: skip
        improved = math.isfinite(metrics["val_loss"]) and metrics["val_top1"] >= progress.best
        progress.next_epoch(best=metrics["val_top1"] if improved else progress.best)
        if improved:
            progress.answers = ranks.gather(torch.cat(answers, 1))
        if IS_MAIN:
            print(outputs.epoch_line(progress.rows[-1], args.epochs), flush=True)
            for name, value in progress.rows[-1].items():
                board.add_scalar(name, value, progress.epoch)
        others: list[Callable[[], Any]] = [
            functools.partial(outputs.write_metrics, output / "metrics.csv", list(progress.rows))
        ]
        if improved and IS_MAIN:
            config = run.config | {"metrics": {"epoch": progress.epoch} | metrics}
            others.append(save_student(output / "student", averaged or run.student, config, later=True))
        save(*others, best=improved)

    if IS_MAIN:
        waiting.result()
        board.close()
    if IS_MAIN and progress.epoch == args.epochs:
        outputs.plot_curves(output / "curves.png", progress.rows)
        if progress.answers is not None:
            labels, predictions = progress.answers.numpy()
            print(*write_per_class(output, labels, predictions, run.data.label_names), sep="\n")
        if args.reference:
            own = [args.model] if is_own(args.model) else args.model_file
            print(keep_reference(output, run.data.val, run.data.train, args.reference, own), flush=True)
        print(f"last top-1 {progress.rows[-1]['val_top1']:.2f} %, best {progress.best:.2f} % -> {output}/student; "
              f"{time.time() - started:.0f} s, {peak_memory(device)} MiB at most", flush=True)  # fmt: skip


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a run keeps of its flags."""
    return {name: value for name, value in vars(args).items() if name != "opened"}


def peak_memory(device: torch.device) -> int:
    """MiB: of GPU memory on CUDA, else resident memory of this process."""
    return torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else outputs.resident_mib()


def check_teacher(run: Training, name: str, workers: int | None, corrupt: CorruptCount) -> float:
    """The teacher's own top-1 on up to 2,000 validation images, said before the first epoch."""
    view = functools.partial(eval_view, metadata=Metadata.from_json(run.config, "the student"))
    loader = make_loader(run.data.val, view, 64, False, workers=workers, indices=evenly(len(run.data.val), 2000))
    assert run.teacher
    metrics = evaluate(run.teacher, loader, run.to_device, run.amp, corrupt)
    assert metrics
    chance = 100 / len(run.data.label_names)
    if IS_MAIN:
        print(f"teacher {name}: top-1 {metrics['val_top1']:.2f} % on {min(2000, len(run.data.val))} validation images",
              flush=True)  # fmt: skip
        if metrics["val_top1"] < 2 * chance:
            print(f"warning: that is below twice chance ({chance:.2g} %): are its classes in another order, is it "
                  "untrained, are its mean and std not its own?", file=sys.stderr, flush=True)  # fmt: skip
    return metrics["val_top1"]


def describe_method(kd: str | None, self_kd: str | None) -> str:
    return " + ".join(filter(None, ["cross-entropy", kd and kd.rpartition(":")[2], self_kd]))


def say_what_starts(args: argparse.Namespace, run: Training, output: Path) -> None:
    millions = sum(p.numel() for p in run.student.parameters()) / 1e6
    method = describe_method(args.kd, args.self_kd)
    teacher = f" with {args.teacher or run.stored}" if run.teacher or run.stored else ""
    tap = f" at {run.net.tap}" if isinstance(run.net, WithWeakHead) else ""
    sizes = f"{len(run.data.train)} training and {len(run.data.val)} validation images"
    machine = f"{WORLD_SIZE} x {run.device}, {str(run.amp or torch.float32).removeprefix('torch.')}"
    print(f"{args.model} ({millions:.2f} M parameters), {method}{teacher}{tap}; {sizes} of {len(run.data.label_names)} "
          f"classes; {machine} -> {output}", flush=True)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run; a mistake of the user's is one line on stderr and status 2. What asks for a stop gets a checkpoint and 0."""
    with terminals() as (stdout, stderr), ranks.stop_signals() as stop:
        try:
            ranks.connect(read_flags(argv).get("timeout", 5.0))
            train(parse_args(argv), stop, stdout)
            return 0
        except KeyboardInterrupt:
            if IS_MAIN:
                print("\ninterrupted: --output RUN --resume, or the same --write-labels, goes on", file=sys.stderr)
            return 130
        except Exception as error:
            message = explain(error)
            stderr.log, stdout.log = stdout.log, None
            if Ranks.here and re.search(
                "(?i)closed by peer|reset by peer|NCCL|gloo|timed out|timeout", message or str(error)
            ):
                lost = Ranks.here.silent()
                if lost is None:
                    return 2  # another has failed, and says why
                message = f"lost rank {lost[0]}: it has ended or hangs" if lost else f"a rank does not answer: {error}"
            if message is None:
                raise
            if Ranks.here is None and not IS_MAIN:
                time.sleep(2)  # rank 0 says it; torchrun would stop it as soon as this one has ended
            elif Ranks.here is None or Ranks.here.first_to_say(message):
                show_error("train.py", f"rank {RANK}: {message}" if RANK else message)
            else:
                time.sleep(1)
            return 2
        finally:
            ranks.disconnect()


if __name__ == "__main__":
    sys.exit(main())

"""Train an image classifier: with a teacher (NKD, classic KD), with itself (USKD), or with cross-entropy alone.

    torchrun train.py --self-kd uskd --model mobilenet_v2                     # 1,797 digits, nothing to download
    python train.py --model resnet18 --small-stem                             # cross-entropy, the baseline
    python train.py --kd nkd --teacher runs/002-resnet18-ce/student           # a run's student as the teacher
    python train.py --data photos/ --model mobilenet_v2 --self-kd uskd        # photos/train/CLASS/*.jpg, photos/val/...
    torchrun --nproc-per-node 8 train.py --data /imagenet --model resnet18 --teacher resnet34 --kd nkd
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...
    python train.py --output runs/001-mobilenet_v2-uskd --resume              # resume a run
    torchrun --max-restarts 3 train.py --output runs/mine --resume ...        # start or resume: for a job script

From top to bottom: flags; losses and a step; evaluation; build_*, which make the parts of a run; train, the loop.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

from deploy.cli import UserError, is_code, number, run_command
from deploy.flags import BY_RECIPE, RECIPES, Flag, Table, read_duration, read_flags, settle_flags

# ---- flags --------------------------------------------------------------------------------------------------------


def distillation(name: str) -> str:
    if name not in ("nkd", "kd") and not is_code(name):
        raise argparse.ArgumentTypeError(f"{name!r}: expected nkd, kd or path/to/file.py:function")
    return name


def count_or_time(text: str) -> int | str:
    """Return a number of epochs, or the text of a time."""
    if read_duration(text):
        return text
    try:
        return number(int, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; a time has a unit and no space: 90s, 30min, 8h") from error


COUNT, WEIGHT, SHARE, POSITIVE = number(int, 1), number(float, 0), number(float, 0, 1), number(float, 0, above=True)
RATIO, MIXING = number(float, 0, 1, above=True), number(float, 0.01, 1000, or_zero=True)
YES_NO, USKD = argparse.BooleanOptionalAction, ["self_kd", "uskd"]
FLAGS: Table = {
    "data": {
        "data": Flag("digits", "digits (embedded), cifar10, cifar100 (downloaded), or a folder with train/ and val/ or "
                     "with a folder for each class", path=True),
        "val_split": Flag(None, "share of each class to validate on, for a folder without val/", type=RATIO),
        "fold": Flag(None, "I N: instead of val/, validate on part I of N parts of the training images",
                     type=number(int, 0), nargs=2),
        "unlabelled": Flag(None, "a folder of more photographs without labels; the student learns the teacher's "
                           "answers about them", needs=["kd"], path=True),
        "img_size": Flag(BY_RECIPE, "size of the student's images: pixels a side, or height and width", type=COUNT,
                         nargs="+"),
        "in_chans": Flag(3, "channels of the student's images; 1: grey", type=int, choices=[1, 3]),
        "crop": Flag(BY_RECIPE, "random crop: resized, padded by 1/8, or none", choices=["resized", "pad", "none"]),
        "hflip": Flag(BY_RECIPE, "probability of a horizontal flip", type=SHARE),
        "randaugment": Flag(None, "operations (0: off) and magnitude, up to 30", type=number(int, 0, 30), nargs=2),
        "mixup": Flag(0.0, "alpha of mixup; 0: off", type=MIXING),
        "cutmix": Flag(0.0, "alpha of cutmix; 0: off", type=MIXING),
        "cache": Flag("none", "device: decode small images once and store them on the device",
                      choices=["none", "device"]),
        "workers": Flag(None, "data loading workers per rank; default: one for each of the rank's cores, 0 for digits",
                        type=number(int, 0)),
    },
    "models": {
        "model": Flag("mobilenet_v2", "a model of torchvision or timm, a student/ folder, or file.py:build", path=True),
        "model_args": Flag([], "arguments of the model", nargs="+", metavar="KEY=VALUE"),
        "model_file": Flag([], "file.py:build, your own model in a student/ folder; the run executes it", path=True,
                           nargs="+"),
        "small_stem": Flag(False, "for images of 64 px and less: 3x3 first convolution, no stride, no max-pool",
                           action=YES_NO),
        "pretrained": Flag(False, "start from the library's ImageNet weights (a download), or from the matching "
                           "weights of a student/ folder, a .safetensors or a .pth", path=True, nargs="?", const=True,
                           metavar="FILE"),
        "teacher": Flag(None, "as --model; the name of a library's model loads its ImageNet weights (a "
                        "download), and NAME:FILE loads the weights of FILE", path=True),
        "teacher_labels": Flag(None, "a folder of stored answers instead of --teacher; python -m "
                               "kdlite.training.teacher_labels writes it", path=True),
        "teacher_classes": Flag(None, "CSV file; each line has a class, then the teacher's name for it or its index in "
                                "the teacher's logits; default: classes are matched by name", needs=["teacher"],
                                path=True),
    },
    "distillation, added to the cross-entropy": {
        "kd": Flag(None, "loss with --teacher: nkd; kd (classic temperature KD); or file.py:function, a function of "
                   "(student_logits, teacher_logits, target)", path=True, type=distillation),
        "self_kd": Flag(None, "self-distillation, which needs no teacher: USKD", choices=["uskd"]),
        "tap": Flag(None, "layer whose feature feeds USKD's weak head; default: by architecture", needs=USKD),
        "gamma": Flag(1.5, "NKD: weight of the non-target term", needs=["kd", "nkd"], type=WEIGHT),
        "temperature": Flag(None, "of NKD or KD; default: 1 for nkd, 4 for kd, or by recipe", needs=["kd", "nkd", "kd"],
                            type=POSITIVE),
        "kd_weight": Flag(1.0, "KD: weight of the temperature-squared KL term", needs=["kd", "kd"], type=WEIGHT),
        "alpha": Flag(1.0, "USKD: weight of the target term", needs=USKD, type=WEIGHT),
        "beta": Flag(0.1, "USKD: weight of the non-target term", needs=USKD, type=WEIGHT),
        "mu": Flag(0.005, "USKD: weight of the weak head's cross-entropy", needs=USKD, type=WEIGHT),
    },
    "training": {
        "recipe": Flag(None, "a group of defaults, see below; default: by --data, for a folder by its images",
                       choices=sorted(RECIPES)),
        "epochs": Flag(BY_RECIPE, "a number, or a time for the run: 90s, 30min, 8h; warm-up and milestones are "
                       "stretched to fit", type=count_or_time),
        "batch_size": Flag(BY_RECIPE, "images per optimizer step, over all processes", type=COUNT),
        "grad_accum": Flag(1, "forward and backward passes per optimizer step, each on a part of the batch",
                           type=COUNT),
        "opt": Flag(BY_RECIPE, "a timm optimizer: momentum (plain SGD), sgd (Nesterov), adamw, ..."),
        "lr": Flag(BY_RECIPE, "peak learning rate", type=WEIGHT),
        "weight_decay": Flag(BY_RECIPE, "weight decay", type=WEIGHT),
        "layer_decay": Flag(None, "fine-tuning: learning rate of a layer, divided by that of the next layer",
                            type=RATIO),
        "schedule": Flag(BY_RECIPE, "schedule of the learning rate", choices=["cosine", "step"]),
        "warmup_epochs": Flag(0.0, "epochs of linear warm-up, which count in --epochs", type=WEIGHT),
        "label_smoothing": Flag(0.0, "label smoothing of the cross-entropy alone", type=SHARE),
        "class_weights": Flag(None, "weight every loss by class: balanced, or a CSV file of name,weight", path=True),
        "clip_grad": Flag(None, "largest gradient norm", type=POSITIVE),
        "ema_decay": Flag(0.0, "decay of an average of the weights, which is evaluated and saved instead of "
                          "them; 0: off", type=SHARE),
        "seed": Flag(0, "seed of weights, order and augmentation", type=number(int, 0, 2**32 - 1)),
    },
    "machine": {
        "device": Flag("auto", "where to train; auto: a GPU if there is one", choices=["auto", "cpu", "cuda"]),
        "amp": Flag("auto", "mixed precision; auto: bf16 or fp16 on a GPU, else off",
                    choices=["auto", "bf16", "fp16", "off"]),
        "compile": Flag(False, "torch.compile student and teacher", action=YES_NO),
    },
    "run directory": {
        "output": Flag(None, "the run directory; default: the next number under runs/"),
        "resume": Flag(False, "resume the run in --output, or start it there", action="store_true"),
        "save_every": Flag(10.0, "minutes between checkpoints within an epoch; 0: only after epochs", type=WEIGHT),
        "reference": Flag(256, "number of validation and of training images in reference.npz for deploy/; 0: no file",
                          type=number(int, 0)),
    },
}  # fmt: skip


def parse_flags(argv: list[str] | None = None) -> dict[str, Any]:
    """Return the flags on the command line; raise UserError if they contradict each other."""
    typed = read_flags(FLAGS, argv, __doc__ or "")
    if not typed.get("resume"):  # the other flags of a resumed run are in its directory
        settle_flags(FLAGS, typed)
    return typed


def check_flags() -> None:
    parse_flags()
    needed = ("torch", "torchvision", "timm", "safetensors", "sklearn", "matplotlib", "tensorboard")
    if missing := [name for name in needed if find_spec(name) is None]:
        advice = "pip install -c constraints.txt -e '.[train]', or activate the environment that has these packages"
        raise UserError(f"packages that are not installed here: {', '.join(missing)}; {advice}")


# --help and a mistake in the flags end here, because the import of torch takes seconds.
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0" and (status := run_command("train.py", check_flags)):
    sys.exit(status)

import difflib
import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F

from deploy.config import Metadata
from deploy.student import call_own, check_forward, own_function
from kdlite import Teacher, WithWeakHead, nkd_loss, nkd_topk_loss, uskd_loss
from kdlite.training import distributed, loading, outputs
from kdlite.training.checkpoint import Checkpoint, LossLog, Progress, Saver, State, load_checkpoint
from kdlite.training.data import NO_LABEL, Data, class_counts, class_weights, open_run
from kdlite.training.distributed import IS_MAIN, RANK, WORLD_SIZE, StopRequest, gather, log
from kdlite.training.loading import Augment, Batch, CorruptCount, DeviceLoader, ToDevice, View, image_progress
from kdlite.training.probe import MOST_IMAGES, fit_classifiers
from kdlite.training.teacher_classes import warn_of_teacher
from kdlite.training.teacher_labels import StoredLabels, describe_images
from kdlite.training.time_budget import Length
from kdlite.training.weights import (
    PREPROCESSING,
    copy_for_average,
    find_new_classifiers,
    freeze_batch_norm,
    load_teacher,
    open_student,
    settle_batch_norm,
)

Amp = torch.dtype | None  # the type of autocast; None: full precision
LOG_EVERY = 50  # optimizer steps between reads of the losses; at each read the host waits for the device

# ---- losses and a step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """Hold the losses that are added to the cross-entropy, and their weights."""

    kd: str | Callable[..., Tensor] | None = None  # nkd, kd, or a function of (student_logits, teacher_logits, target)
    gamma: float = 1.5
    temperature: float = 1.0  # for nkd or kd
    kd_weight: float = 1.0
    alpha: float = 1.0
    beta: float = 0.1
    mu: float = 0.005
    label_smoothing: float = 0.0  # for the cross-entropy alone
    class_weights: Tensor | None = None  # (C,): the losses of an image are multiplied by the weight of its class
    unlabelled: bool = False  # whether a target may be NO_LABEL
    group: Any = None  # the processes that share a batch; USKD's batch mean is over the images of all of them


def loss_terms(
    method: Method, logits: Tensor, weak_logits: Tensor | None, teacher: Any, target: Tensor
) -> dict[str, Tensor]:
    """Return the terms of the objective by name; their sum is minimised.

    Args:
        method: the losses
        logits: the student's, (N, C)
        weak_logits: the weak head's; None without USKD
        teacher: the teacher's logits (N, C), or its stored log T_t, log T_i and indices, as nkd_topk_loss takes them
        target: class indices (N,), or class probabilities (N, C). The class weight of a mixed image is the mean over
            its classes. For an image with NO_LABEL the cross-entropy is 0, and the teacher's probabilities are the
            target of the other losses
    """
    each: Any = {"reduction": "none"}
    if isinstance(teacher, tuple) and (method.kd != "nkd" or method.temperature != 1 or method.unlabelled):
        teacher = all_logprobs(teacher, target, logits.shape[1])  # build_teacher checked that they have all classes
    labelled = None
    if method.unlabelled:
        labelled = target != NO_LABEL
        one_hot = F.one_hot(target.clamp(min=0), logits.shape[1]).float()
        target = one_hot.where(labelled.unsqueeze(1), teacher.float().softmax(1))
    losses = {"ce": F.cross_entropy(logits.float(), target, label_smoothing=method.label_smoothing, **each)}
    if labelled is not None:
        losses["ce"] = losses["ce"] * labelled
    if method.kd == "nkd" and isinstance(teacher, tuple):
        log_t, top, index = teacher
        losses["nkd"] = nkd_topk_loss(logits, log_t, top, index, target, gamma=method.gamma, **each)
    elif method.kd == "nkd":
        losses["nkd"] = nkd_loss(logits, teacher, target, gamma=method.gamma, temperature=method.temperature, **each)
    elif method.kd == "kd":  # Hinton et al. 2015, arXiv 1503.02531
        student, teacher = ((x.float() / method.temperature).log_softmax(1) for x in (logits, teacher))
        kl = F.kl_div(student, teacher, log_target=True, **each).sum(1)
        losses["kd"] = method.kd_weight * method.temperature**2 * kl
    elif callable(method.kd):
        losses["own"] = loss = method.kd(logits.float(), None if teacher is None else teacher.float(), target)
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        if shape != logits.shape[:1] and (shape != () or method.class_weights is not None):
            raise UserError(
                f"--kd must return (N,), a loss for each row, or (without --class-weights) one value: got {shape}"
            )
    if weak_logits is not None:
        each |= {"alpha": method.alpha, "beta": method.beta, "mu": method.mu, "group": method.group}
        losses["uskd"] = uskd_loss(logits, weak_logits, target, **each)
    if method.class_weights is not None:
        weight = method.class_weights[target] if target.ndim == 1 else target @ method.class_weights
        losses = {name: weight * loss for name, loss in losses.items()}
    return {name: loss.mean() for name, loss in losses.items()}


def all_logprobs(stored: tuple[Tensor, ...], target: Tensor, classes: int) -> Tensor:
    """Return stored log-probabilities as a matrix (N, C); classes without a stored value get -1e30.

    For an image without a label, `index` holds all classes except the teacher's most probable one, and log_t holds the
    value of that class.
    """
    log_t, top, index = stored
    target = target.where(target != NO_LABEL, classes * (classes - 1) // 2 - index.sum(1))
    index = index.where(top > -torch.inf, target.unsqueeze(1))  # padding points at the target, which is set last
    every = log_t.new_full((len(target), classes), -1e30, dtype=torch.float32)
    return every.scatter(1, index, top).scatter(1, target.unsqueeze(1), log_t.unsqueeze(1))


def train_step(
    net: nn.Module, teacher: Teacher | None, batch: Batch, method: Method, amp: Amp, scaler: GradScaler, passes: int = 1
) -> dict[str, Tensor]:
    """Add the gradients of one batch (one of `passes` in a step) to those of the parameters, and return its loss terms.

    The host does not wait for the device.
    """
    with torch.autocast(batch.images.device.type, amp, enabled=amp is not None):
        answers = teacher(batch.images) if teacher else batch.teacher or None
        output = net(batch.images)
    logits, weak_logits = output if isinstance(output, tuple) else (output, None)
    losses = loss_terms(method, logits, weak_logits, answers, batch.labels)
    scaler.scale(torch.stack(list(losses.values())).sum() / passes).backward()
    return losses


def optimizer_step(net: nn.Module, optimizer: Any, scaler: GradScaler, clip_grad: float | None) -> None:
    """Unscale, clip, step, and clear the gradients."""
    if clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


# ---- evaluation ---------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Hold the result of an evaluation."""

    metrics: dict[str, float]  # over the images of all ranks: cross-entropy, top-1 and top-5 in percent
    answers: Tensor  # (2, N): labels and predictions of this rank's images


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Any, to_device: ToDevice, amp: Amp, corrupt: CorruptCount, stop: StopRequest | None = None
) -> Scores | None:
    """Evaluate each sample of all ranks once; return None if a signal asked any rank to stop."""
    model.eval()
    device, answers = to_device.device, [torch.empty(2, 0, dtype=torch.int32)]
    totals = torch.zeros(5, dtype=torch.float64, device=device)  # loss, top-1, top-5, samples, ranks asked to stop
    for batch in image_progress(loader, "validate"):
        corrupt.report(batch)
        if stop and stop.name:
            totals[4] += 1
            break
        if batch.images is None:
            continue
        images, labels, *_ = to_device(batch)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.unsqueeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[:4] += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))])
        answers.append(torch.stack([labels, best[:, 0]]).int())
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    loss, top1, top5, count, stopped = totals.tolist()
    if stopped:
        return None
    if not count:
        raise UserError("no validation image can be read: replace the damaged files")
    metrics = {"val_loss": loss / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}
    return Scores(metrics, torch.cat([x.cpu() for x in answers], 1))


# ---- the parts of a run -------------------------------------------------------------------------------------------


def build_student(
    args: argparse.Namespace, data: Data, resumed: Checkpoint | None = None
) -> tuple[nn.Module, nn.Module, Metadata]:
    """Return the student, the network to train (the student, or with USKD also its weak head), and the config."""
    torch.manual_seed(args.seed)
    images = data.preprocessing(args.in_chans, args.interpolation, args.eval_crop)
    student, config, report = open_student(args, data.label_names, images, False if resumed else args.pretrained)
    if resumed:
        config = replace(config, **{name: getattr(resumed.config, name) for name in PREPROCESSING})
    config = replace(config, training=outputs.describe_training(args, data))
    batch = args.batch_size // (WORLD_SIZE * args.grad_accum)
    name, shape = f"--model {args.model}", (config.input_size, config.num_classes)
    check_forward(student, name, *shape, min(batch, 2))
    check_forward(student.eval(), f"{name} in eval mode", *shape)
    student.train()
    log(report)
    if not args.self_kd:
        return student, student, config
    try:
        example = torch.zeros(2, *config.input_size)
        return student, WithWeakHead(student, args.tap, config.num_classes, example_input=example), config
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--self-kd uskd does not work with {args.model}: {error}; --tap sets the layer") from error


def build_teacher(
    args: argparse.Namespace, data: Data, config: Metadata, resumed: Checkpoint | None = None
) -> Teacher | StoredLabels | None:
    """Return the teacher, or its stored answers about the training images."""
    if args.teacher:
        return load_teacher(args.teacher, config, args.model_file, args.teacher_classes).wrap(config)
    if not args.teacher_labels:
        return None
    stored = StoredLabels(Path(args.teacher_labels), describe_images(data, build_view(args, config)))
    config.training["teacher"] = str(stored)
    others = config.num_classes - 1
    if (args.kd != "nkd" or args.temperature != 1 or args.unlabelled) and stored.k < others:
        method = f"--kd {args.kd}" + (f" --temperature {args.temperature:g}" if args.kd == "nkd" else "")
        method = "--unlabelled" if args.unlabelled else method
        held = f"{args.teacher_labels} has only its top-{stored.k}: write labels with --top-k {others}"
        raise UserError(f"{method} needs the teacher's answer about every class, but {held}")
    before = resumed.config.training.get("teacher") if resumed else None
    if before not in (None, str(stored)):
        fault = f"this run began with labels of {before}, but --teacher-labels has labels of {stored}"
        raise UserError(f"{fault}: give the former folder, or start a new run")
    return stored


def build_view(args: argparse.Namespace, config: Metadata) -> View:
    return View(config.input_size, args.crop, args.hflip, config.interpolation, args.randaugment)


def build_loaders(
    args: argparse.Namespace, data: Data, config: Metadata, stored: StoredLabels | None, device: torch.device
) -> tuple[Any, Any]:
    """Return the loaders of training and validation images. stored: a teacher's labels; they determine the crops."""
    batch, pin = args.batch_size // (WORLD_SIZE * args.grad_accum), device.type == "cuda"
    view, evaluation = build_view(args, config), functools.partial(loading.eval_view, metadata=config)
    train: Any
    if args.cache == "none":
        train = loading.train_loader(data.train, view.transform(), batch, args.seed, args.workers, pin, stored)
        val: Any = loading.eval_loader(data.val, evaluation, 2 * batch, args.workers, pin)
        if train.num_workers:
            distributed.check_shared_memory(2 * train.num_workers * 2 * batch * math.prod(config.input_size))
    else:
        uncropped = replace(view, crop="none", hflip=0.0).transform()
        decoded = loading.eval_loader(data.train, uncropped, 256, args.workers, pin)
        train = DeviceLoader(decoded, batch, device, view, args.seed)
        val = DeviceLoader(loading.eval_loader(data.val, evaluation, 256, args.workers, pin), 2 * batch, device)
    if len(train) < args.grad_accum:
        raise UserError(f"--batch-size {args.batch_size} is larger than the {len(data.train)} training images")
    return train, val


def build_optimizer(net: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return a timm optimizer."""
    known = timm.optim.list_optimizers()
    if args.opt not in known:
        near = difflib.get_close_matches(args.opt, known, n=5)
        raise UserError(f"--opt {args.opt} is not a timm optimizer; near matches: {', '.join(near) or 'adamw'}")
    decay_all = args.opt in ("momentum", "sgd")  # the paper's SGD recipes decay all parameters
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": 0.9, "filter_bias_and_bn": not decay_all}
    try:
        probe = nn.Linear(2, 2)  # a step that needs a second gradient or a closure fails here
        trial = create_optimizer_v2(probe, args.opt, **options)
        probe(torch.ones(1, 2)).sum().backward()
        trial.step()
        optimizer = create_optimizer_v2(net, args.opt, layer_decay=args.layer_decay, **options)
    except Exception as error:  # each optimizer has its own errors
        raise UserError(f"--opt {args.opt} cannot be used: {' '.join(str(error).split())[:200]}") from error
    return optimizer


def build_schedule(net: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps: int) -> Any:
    """Return timm's schedule of the learning rate for epochs of `steps` steps: a function of the step, without state.

    The batch norms of the network get a momentum that fits the number of steps, unless they are frozen.
    """
    if not args.freeze_batch_norm:
        log(settle_batch_norm(net, args.epochs * steps))
    for group in optimizer.param_groups:  # a checkpoint or an earlier schedule may have set another rate
        group["lr"] = group["initial_lr"] = args.lr
    kind = "multistep" if args.schedule == "step" else "cosine"
    warmup = {"warmup_epochs": args.warmup_epochs, "warmup_lr": args.lr * 1e-3}
    decay = {"num_epochs": args.epochs, "decay_milestones": args.step_epochs, "decay_rate": args.step_factor}
    units = {"step_on_epochs": False, "updates_per_epoch": steps}
    return create_scheduler_v2(optimizer, kind, **warmup, **decay, **units)[0]


def build_method(args: argparse.Namespace, data: Data, device: torch.device) -> Method:
    """Return the losses that the flags name."""
    names = ("kd", "gamma", "temperature", "kd_weight", "alpha", "beta", "mu", "label_smoothing")
    options = {name: getattr(args, name) for name in names}
    if is_code(args.kd):
        options["kd"] = functools.partial(call_own, own_function(args.kd), args.kd)
    if args.class_weights:
        weights = torch.tensor(class_weights(args.class_weights, data.label_names, class_counts(data.labelled)))
        log(f"class weights, {args.class_weights}: {weights.min():.3g} to {weights.max():.3g}")
        options["class_weights"] = weights.to(device)
    return Method(**options, unlabelled=bool(args.unlabelled), group=distributed.Group.steps)


# ---- training -----------------------------------------------------------------------------------------------------


# It is one long function on purpose: the parts, then the loop, in the order in which they run.
def train(typed: dict[str, Any], stop: StopRequest) -> None:
    """Train in a run directory: make the parts, restore a checkpoint, then train, evaluate and save each epoch."""
    started = time.monotonic()
    args, given, data = open_run(FLAGS, typed)
    device = distributed.pick_device(args.device)
    amp = distributed.pick_amp(args.amp, device)
    resumed = load_checkpoint(Path(args.output)) if args.resume else None
    student, net, config = build_student(args, data, resumed)
    source = build_teacher(args, data, config, resumed)
    teacher, stored = (source, None) if isinstance(source, Teacher) else (None, source)
    for module in filter(None, (net, teacher)):
        module.to(device=device).to(memory_format=torch.channels_last)
    train_batches, val_batches = build_loaders(args, data, config, stored, device)
    optimizer = build_optimizer(net, args)
    method, scaler = build_method(args, data, device), GradScaler(device.type, enabled=amp == torch.float16)
    to_device = ToDevice(config.mean, config.std, device)
    augment = Augment(args.random_erasing, args.mixup, args.cutmix, config.num_classes, device)
    corrupt = CorruptCount("training", len(data.train) // WORLD_SIZE)
    corrupt_val = CorruptCount("validation", len(data.val) // WORLD_SIZE)

    with outputs.RunFolder(args, given, data, device, resumed) as folder:
        torch.manual_seed(args.seed + RANK)
        random.seed(args.seed + RANK)
        if args.pretrained and not resumed and (heads := find_new_classifiers(student, config.num_classes)):
            view = functools.partial(loading.eval_view, metadata=config)
            images = loading.eval_loader(data.labelled, view, 64, args.workers, most=MOST_IMAGES)
            log(fit_classifiers(student, heads, images, to_device, corrupt, method.class_weights))
        ema = copy_for_average(student, args.ema_decay)
        progress, losses = Progress(), LossLog(skips_steps=scaler.is_enabled())
        state = State(net, ema.module if ema else None, optimizer, scaler, progress, losses)
        if resumed:
            state.restore(resumed, vars(args), config)
            if progress.epoch < args.epochs:  # else the run trains nothing with these flags
                distributed.from_rank_zero(folder.store_flags, folder.path)
        progress.check_validation(data.digest(data.val, config.input_size))
        length = Length(args, len(train_batches) // args.grad_accum, progress, started, len(data.val) / len(data.train))
        schedule = build_schedule(net, optimizer, args, length.steps)
        folder.report_start(config, net, amp, progress)
        known = check_teacher(teacher, args, data, config, to_device, amp) if teacher else {}
        compiled: Any = torch.compile(net) if args.compile else net
        if args.compile and teacher:
            teacher.model = torch.compile(teacher.model)  # type: ignore[assignment]
        parallel = distributed.exchange_gradients(compiled, device)
        trained, evaluated = (ema.module, ema.module) if ema else (student, compiled)
        optimizer.register_step_post_hook(progress.count_executed)

        with Saver(folder.path, state, vars(args), config, stop) as saver:
            while progress.epoch < args.epochs:
                parallel.train()
                if args.freeze_batch_norm:
                    freeze_batch_norm(net)
                epoch, steps = progress.epoch, length.steps
                first, began = progress.step * args.grad_accum, time.monotonic() - progress.seconds
                shown = loading.epoch_batches(train_batches, epoch, first, steps * args.grad_accum)
                for i, batch in enumerate(shown, 1):
                    corrupt.report(batch)
                    if batch.images is None:
                        fault = f"{batch.corrupt[0][0]} cannot be read, nor any other image of its part of the batch"
                        raise UserError(f"{fault}: repair or remove it, or give a larger --batch-size")
                    batch = augment(to_device(batch))
                    if not epoch and not first and i == 1:
                        folder.show_batch(to_device.undo(batch.images[:32]), batch.labels[:32])
                    last_pass = i % args.grad_accum == 0
                    with distributed.gradient_sync(parallel, last_pass):
                        terms = train_step(parallel, teacher, batch, method, amp, scaler, args.grad_accum)
                    step = epoch * steps + progress.step
                    losses.add(step, terms)
                    if not last_pass:
                        continue
                    schedule.step_update(step)
                    progress.lr = progress.lr or optimizer.param_groups[0]["lr"]
                    optimizer_step(net, optimizer, scaler, args.clip_grad)
                    progress.step, progress.seconds = progress.step + 1, time.monotonic() - began
                    if ema:
                        ema.update(student, step + 1)
                    if progress.step % LOG_EVERY == 0:
                        left = (args.epochs * steps - step - 1) * progress.seconds / progress.step
                        shown.postfix = f"loss {losses.read():.4g}{outputs.describe_left(left, ', ')}"
                    if saver.after_step():
                        saver.wait()
                        return folder.report_stop(stop, progress)
                    if length.refit():
                        schedule = build_schedule(net, optimizer, args, length.steps)
                    if progress.step == length.steps:
                        break
                distributed.average_batch_norm(*state.models())
                scores = evaluate(evaluated, val_batches, to_device, amp, corrupt_val, stop)
                if scores is None:
                    saver.save()
                    saver.wait()
                    return folder.report_stop(stop, progress)
                row = {"epoch": epoch + 1, **losses.means(device), **scores.metrics, **known, "lr": progress.lr}
                speed = length.steps * args.batch_size / progress.seconds
                row |= {"skipped_steps": length.steps - progress.executed, "images_per_s": speed}
                row |= {"seconds": time.monotonic() - began, "memory_mib": distributed.peak_memory(device)}

                progress.end_epoch(row, torch.cat(gather(scores.answers), 1))
                if length.refit(epoch_ended=True):
                    schedule = build_schedule(net, optimizer, args, length.steps)
                folder.report_epoch(row)
                writers = [folder.write_metrics(progress.rows)]
                if progress.is_best and IS_MAIN:
                    about = config.training | {"epochs": args.epochs}  # --epochs 30min may have changed it
                    best = replace(config, training=about, metrics={"epoch": epoch + 1} | scores.metrics)
                    writers += [outputs.save_student(folder.path / "student", trained, best, later=True)]
                saver.save(*writers, best=progress.is_best)
        folder.finish(progress, started)


def check_teacher(
    teacher: Teacher, args: argparse.Namespace, data: Data, config: Metadata, to_device: ToDevice, amp: Amp
) -> dict[str, float]:
    """Print the teacher's own top-1 on up to 2,000 validation images, and warn if its classes do not seem to fit."""
    view = functools.partial(loading.eval_view, metadata=config)
    loader = loading.eval_loader(data.val, view, 64, args.workers, most=2000)
    scores = evaluate(teacher, loader, to_device, amp, CorruptCount("validation", len(data.val)))
    assert scores
    images, top1 = f"{min(len(data.val), 2000)} validation images", scores.metrics["val_top1"]
    log(f"teacher {args.teacher}: top-1 {top1:.2f} % on {images}, cropped as the student's")
    labels, predictions = torch.cat(gather(scores.answers), 1).numpy()
    warn_of_teacher(labels, predictions, len(data.label_names))
    return {"teacher_top1": top1}


def run_rank(argv: list[str] | None) -> None:
    with distributed.reported_once():
        typed = parse_flags(argv)
    with distributed.stop_signals() as stop, distributed.process_group(), distributed.reported_once():
        train(typed, stop)


def main(argv: list[str] | None = None) -> int:
    """Run train.py and return its exit status: 0, also after a signal stopped the run; 2 after a user's mistake.

    A user's mistake prints one line on stderr.
    """
    with outputs.tee():
        return run_command("train.py", functools.partial(run_rank, argv))


if __name__ == "__main__":
    sys.exit(main())

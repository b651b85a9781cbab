"""Load the weights of a student and of a teacher: a library's ImageNet weights, a file or a student/ folder.

A student loads those tensors of a file whose shapes fit. A teacher loads all tensors. If the teacher has more classes
than the data, or another order, teacher_classes.py finds the columns of its logits.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploy.cli import UserError, first_line, is_code
from deploy.config import Metadata, read_config
from deploy.student import (
    build_model,
    check_forward,
    find_architecture,
    is_folder,
    is_library_model,
    load_student,
    load_weights,
)
from kdlite import Teacher
from kdlite.training.distributed import local_rank_zero_first, log
from kdlite.training.teacher_classes import pick_columns

PREPROCESSING = ("mean", "std", "interpolation", "crop")  # fields of config.json, next to the input size
Images = dict[str, Any]  # the values of PREPROCESSING


class Pretrained(NamedTuple):
    """Describe a library's ImageNet weights before the download."""

    label_names: list[str] | None  # None: unknown
    num_classes: int
    input_size: list[int]  # [3, H, W]
    images: Images
    where: str  # advice on how to get the file by hand
    fetch: Callable[[], nn.Module]  # may download


def find_pretrained(name: str, library: str) -> Pretrained:
    """Return torchvision's first weights (those of the paper's teachers) or timm's default weights.

    Raise UserError if the library has no weights for this model.
    """
    if library == "torchvision":
        choices = torchvision.models.get_model_weights(name)
        weights = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
        preset = weights.transforms()
        side, whole = preset.crop_size[0], preset.resize_size[0]
        values = list(preset.mean), list(preset.std), preset.interpolation.value, round(side / whole, 4)
        where = f"put {weights.url} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        build = functools.partial(torchvision.models.get_model, name, weights=weights)
        names, count = ImageNetInfo().label_names(), len(weights.meta["categories"])
        return Pretrained(names, count, [3, side, side], dict(zip(PREPROCESSING, values)), where, build)
    config = timm.get_pretrained_cfg(name)
    if not config.has_weights:
        raise UserError(f"timm has no weights for {name}")
    subset = infer_imagenet_subset(config.to_dict())
    names = ImageNetInfo(subset).label_names() if subset else []
    interpolation = config.interpolation if config.interpolation in ("bilinear", "bicubic") else "bicubic"
    images = dict(zip(PREPROCESSING, (list(config.mean), list(config.std), interpolation, config.crop_pct)))
    url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    build = functools.partial(timm.create_model, name, pretrained=True)
    known, where = len(names) == config.num_classes, f"fetch its model.safetensors from {url}"
    return Pretrained(names if known else None, config.num_classes, list(config.input_size), images, where, build)


def fetch(pretrained: Pretrained, flag: str, by_hand: str) -> nn.Module:
    """Download a library's model with its weights; one process of each machine downloads first."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each of ten attempts
    try:
        with local_rank_zero_first():
            return pretrained.fetch()
    except Exception as error:  # each source raises other errors
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        fault = f"{flag}: its ImageNet weights are not on this machine, and the download failed ({reason})"
        raise UserError(f"{fault}; {pretrained.where}; {by_hand}") from error


# ---- a student ----------------------------------------------------------------------------------------------------


def open_student(
    args: argparse.Namespace, label_names: list[str], images: Images, pretrained: bool | str = False
) -> tuple[nn.Module, Metadata, str | None]:
    """Return a model to train, its config.json, and a line that reports the source of its weights.

    Args:
        args: in_chans; img_size [H, W]; model, model_args and small_stem, as for find_architecture. model may also name
            a student/ folder with these classes and this size. Then the preprocessing, arguments and stem of the folder
            replace the flags, and its code runs only if model_file names it
        label_names: names of the classes
        images: preprocessing, unless the weights have their own
        pretrained: True: start from the library's ImageNet weights; a path of a student/ folder or a file of weights:
            start from those of its tensors that fit the model
    """
    size, classes = [args.in_chans, *args.img_size], len(label_names)
    if os.path.exists(args.model) and is_library_model(args.model):
        log(f"--model {args.model} is the model of a library; ./{args.model} names the file or folder here")
    if is_folder(args.model):
        source = f"starts from the weights of the folder {args.model}"
        return *start_from_folder(args.model, label_names, size, args.model_file), source
    architecture = find_architecture(args.model, args.model_args, args.small_stem, size)
    model = build_model(architecture, classes, size, [args.model])
    refuse_partial_patches(model, args.model, size)
    report = None
    if pretrained:
        check_forward(model, f"--model {args.model}", size, classes, 2)  # gives lazy layers their shapes
        start = find_start(args.model, architecture, pretrained)
        images = start.images or images
        numbers = ", ".join(f"{key} {images[key]}" for key in PREPROCESSING)
        same = None if start.label_names is None else start.label_names == label_names
        report = f"{load_matching(model, start.weights, start.source, classes, same)}"
        report += f"; preprocessing of these weights: {numbers}"
    if len(images["mean"]) != size[0]:  # grey images, but values for three channels
        images = images | {key: [sum(images[key]) / len(images[key])] * size[0] for key in ("mean", "std")}
    config = {"num_classes": classes, "label_names": label_names, "input_size": size}
    return model, Metadata.from_json(architecture | config | images, "the student"), report


class Start(NamedTuple):
    """Hold the weights that a student starts from."""

    weights: dict[str, Tensor]
    images: Images | None  # their preprocessing; None: unknown
    label_names: list[str] | None  # names of their classes; None: unknown
    source: str


def find_start(name: str, architecture: dict[str, Any], pretrained: bool | str) -> Start:
    """Return the weights of a library (True), a student/ folder or a file, for a model with this architecture."""
    library = architecture["library"]
    if isinstance(pretrained, str):
        weights, config = read_weights(pretrained)
        if config:
            if config.architecture == architecture["architecture"] and config.small_stem != architecture["small_stem"]:
                flag = "--small-stem" if config.small_stem else "--no-small-stem"
                raise UserError(f"--pretrained {pretrained} was trained with {flag}: give {flag} too")
            own = {key: getattr(config, key) for key in PREPROCESSING}
            return Start(weights, own, config.label_names, pretrained)
        images = None
        if library != "file":
            with contextlib.suppress(UserError):  # the library may lack weights for the model
                images = find_pretrained(name, library).images
        return Start(weights, images, None, pretrained)
    if library == "file":
        raise UserError("--pretrained without a value is for torchvision's and timm's models: give --pretrained FILE")
    found = find_pretrained(name, library)
    weights = fetch(found, f"--pretrained {name}", "--pretrained FILE loads it").state_dict()
    return Start(weights, found.images, found.label_names, f"the ImageNet weights of {name}")


def start_from_folder(
    folder: str, label_names: list[str], input_size: list[int], model_files: Sequence[str]
) -> tuple[nn.Module, Metadata]:
    """Load a student/ folder, to train it further on these classes at this size."""
    model, config = load_student(Path(folder), model_files)
    theirs, ours = ("x".join(map(str, size)) for size in (config.input_size, input_size))
    fault = f"takes {theirs} (--in-chans and --img-size), not {ours}" if theirs != ours else ""
    if config.num_classes != len(label_names):
        fault = f"has {config.num_classes} classes, but --data has {len(label_names)}"
    elif config.label_names != label_names:
        theirs, ours = next(pair for pair in zip(config.label_names, label_names) if pair[0] != pair[1])
        fault = f"has other classes than --data, or another order: {theirs} there, {ours} here"
    if fault:
        advice = f"--model {config.architecture} --pretrained {shlex.quote(folder)} loads the tensors that fit"
        raise UserError(f"--model {folder} {fault}: {advice}")
    return model, replace(config, label_names=label_names, temperature=None, threshold=None)  # fitted again at the end


def read_weights(name: str) -> tuple[dict[str, Tensor], Metadata | None]:
    """Return the tensors in a student/ folder, a .safetensors, a .pth or a .pt, and the config.json of a folder.

    Raise UserError if the file is missing or damaged, or holds no tensors. Other entries of the file are ignored.
    """
    path, config = Path(name), None
    if path.is_dir():
        folder = path / "student" if (path / "student").is_dir() else path
        config = read_config(folder)
        path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{name} is neither a file of weights nor a student/ folder")
    try:
        safe = path.suffix == ".safetensors"
        found: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises other errors
        expected = "expected a .safetensors or .pth file of tensors, or a student/ folder"
        reason = first_line(error)
        if isinstance(error, UnpicklingError):  # torch's own text advises to run the pickle
            others = "Unsupported" in str(error)
            reason = "its pickle holds other objects than tensors" if others else "torch.save did not write it"
        raise UserError(f"{path} cannot be read as weights: {reason}; {expected}") from error
    found = found if isinstance(found, dict) else {}
    nested = ("model_ema", "state_dict_ema", "ema", "state_dict", "model")  # keys that training scripts use
    sets = [key for key in nested if isinstance(found.get(key), dict)]
    if len(sets) > 1:
        log(f"{path} holds {' and '.join(sets)}: {sets[0]} is used")
    tensors = {k: v for k, v in (found[sets[0]] if sets else found).items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights: expected a dictionary of tensors by name")
    for key, value in tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(f"{path}: {key} has values that are not finite: use the weights of another run or file")
    return tensors, config


def load_matching(
    model: nn.Module, weights: dict[str, Tensor], source: str, classes: int, same_classes: bool | None = None
) -> str:
    """Load every tensor that fits the model, set a new classifier to zero, and return a line that reports both.

    same_classes: whether the weights have the model's classes, so that their classifier fits; None: unknown

    timm's functions resample position embeddings, and sum colour filters for grey images. A classifier of zeros has a
    first loss of ln C; a random classifier may have twice that loss, which disturbs the features. fit_classifiers
    (probe.py) gives a linear classifier a better start. Raise UserError if no parameter fits.
    """
    own, classifiers = model.state_dict(), find_classifiers(model, classes)
    prefix = common_prefix(own, weights)
    taken, new = {}, []
    for name, value in own.items():
        theirs = weights.get(prefix + name)
        fitted = None if theirs is None else convert_tensor(model, name, theirs, value)
        if fitted is not None and same_classes is False and name.rpartition(".")[0] in classifiers:
            new.append(f"{name} (of other classes there)")
        elif fitted is None:
            new.append(f"{name} ({'missing there' if theirs is None else f'{list(theirs.shape)} there'})")
        else:
            taken[name] = fitted
    if not taken.keys() & dict(model.named_parameters()).keys():
        names = (", ".join(list(tensors)[:3]) for tensors in (weights, own))
        held = "it has {}, ..., the model has {}, ...".format(*names)
        raise UserError(f"{source} holds no tensor that fits {type(model).__name__}: {held}")
    model.load_state_dict(taken, strict=False)
    report = f"{source}: {len(taken)} of {len(own)} tensors loaded"
    report += f"; new: {', '.join(new[:4])}{', ...' if len(new) > 4 else ''}" if new else ""
    body = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in classifiers]
    others = sum(name not in taken for name in body)
    if classifiers and others > len(body) // 10:
        report += f"; new outside the classifier: {others} of {len(body)}. Are these the weights of another model?"
    if not classifiers:
        report += "; no layer is known as the classifier, so no layer starts at zero"
    elif same_classes is None and f"{next(iter(classifiers))}.weight" in taken:
        report += "; the classifier is loaded too: check that it has the classes of --data in this order"
    for name, head in classifiers.items():
        if f"{name}.weight" not in taken:
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
    return report


def find_new_classifiers(model: nn.Module, classes: int) -> dict[str, nn.Module]:
    """Return the classifiers, by name, that load_matching has set to zero."""
    heads = find_classifiers(model, classes)
    return {name: head for name, head in heads.items() if not cast(Tensor, head.weight).any()}


def find_classifiers(model: nn.Module, classes: int) -> dict[str, nn.Module]:
    """Return the classifiers by name: those that timm names, else the last linear layer with an output for each class.

    A convolution of 1x1 counts as linear.
    """
    weighted = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    if hasattr(model, "get_classifier"):
        found: Any = model.get_classifier()  # type: ignore[operator]
        heads: list[Any] = list(found) if isinstance(found, (tuple, list)) else [found]
    else:
        heads = [m for m in weighted.values() if len(cast(Tensor, m.weight)) == classes and is_linear(m)][-1:]
    linear = [m for m in heads if is_linear(m)]
    return {name: module for name, module in weighted.items() if any(module is head for head in linear)}


def refuse_partial_patches(model: nn.Module, name: str, size: Sequence[int]) -> None:
    """Raise UserError if timm's patch embedding would ignore the last rows or columns of an image."""
    embed: Any = getattr(model, "patch_embed", None)
    proj = getattr(embed, "proj", None)
    if not isinstance(proj, nn.Conv2d) or proj.stride != proj.kernel_size or getattr(embed, "dynamic_img_pad", False):
        return  # without patches, with patches that overlap, or with padding
    for side, step in zip(size[1:], proj.stride):
        if side % step:
            near = " or ".join(str(one * step) for one in (side // step, side // step + 1) if one)
            raise UserError(f"{name} cuts an image into patches of {step} px: give --img-size {near}, not {side}")


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def common_prefix(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """Return the prefix of a wrapper (module., model., _orig_mod.); "" if not more names match with it than without."""
    count = Counter({"": sum(name in weights for name in own)})
    for key in weights:
        parts = key.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in own:
                count[".".join(parts[:i]) + "."] += 1
    return count.most_common(1)[0][0]


def convert_tensor(model: nn.Module, name: str, theirs: Tensor, ours: Tensor) -> Tensor | None:
    """Convert a tensor of another model to the shape of ours; return None if it does not fit."""
    if theirs.shape == ours.shape:
        return theirs
    if "pos_embed" in name and theirs.ndim == 3 and theirs.shape[2] == ours.shape[2]:
        tokens = ours.shape[1]
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or [math.isqrt(tokens)] * 2
        prefix = tokens - grid[0] * grid[1]  # class and register tokens
        patches = max(theirs.shape[1] - prefix, 0)
        if patches and math.isqrt(patches) ** 2 == patches:
            return resample_abs_pos_embed(theirs.float(), list(grid), num_prefix_tokens=prefix)
    if theirs.ndim == 4 and theirs.shape[1] == 3 and theirs[:, :1].shape == ours.shape:
        return adapt_input_conv(1, theirs)
    return None


def settle_batch_norm(net: nn.Module, steps: int) -> str | None:
    """Raise the momentum of batch norms whose running averages would not settle in `steps` steps; return a report.

    A momentum of 0.01 is for long training: after 90 steps the initial value still has a weight of 40 % in an average,
    so evaluation fails although training works. With the raised momentum that weight is at most 1e-4.
    """
    least = 1 - 1e-4 ** (1 / steps)
    slow = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.momentum is not None and m.momentum < least]
    report = slow and f"batch-norm momentum {slow[0].momentum:g} is too slow for {steps} steps: raised to {least:.2g}"
    for module in slow:
        module.momentum = least
    return report or None


def freeze_batch_norm(net: nn.Module) -> None:
    """Make trained batch norms use their running averages in training too, because statistics of few images are worse.

    net.train() undoes this. A batch norm with initial averages still trains.
    """
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None and (module.running_var != 1).any():
            module.eval()


def copy_for_average(student: nn.Module, decay: float) -> ModelEmaV3 | None:
    try:
        return ModelEmaV3(student, decay=decay, use_warmup=True) if decay else None
    except RuntimeError as error:
        raise UserError(f"--ema-decay needs a model that deepcopy can copy: {first_line(error)}") from error


# ---- a teacher ----------------------------------------------------------------------------------------------------


class LoadedTeacher(NamedTuple):
    model: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    input_size: Sequence[int]  # (channels, H, W)
    columns: list[int] | None  # column of each class of the student; None: all in their order
    report: str | None  # the line of pick_columns about them

    def wrap(self, student: Metadata) -> Teacher:
        """Print the report, and return the frozen teacher for batches that are normalised for a student."""
        log(self.report)
        own, theirs = (self.mean, self.std), (student.mean, student.std)
        return Teacher(self.model, *own, *theirs, size=self.input_size[1:], columns=self.columns)


def load_teacher(
    name: str, student: Metadata, model_files: Sequence[str] = (), classes_file: str | None = None
) -> LoadedTeacher:
    """Load a teacher, which may have more classes or another order; raise UserError if it lacks a class of the student.

    Args:
        name: a student/ folder; a library's model with its ImageNet weights; model:file with weights in a file; or
            path/to/file.py:function, which returns a model with weights. The model must have the attributes mean, std
            and input_size if they differ from the student's
        student: the student's config.json
        model_files: as for load_student
        classes_file: the file of --teacher-classes, or None
    """
    count = student.num_classes
    names: list[str] | None = None
    if os.path.exists(name) and is_library_model(name):
        log(f"--teacher {name} is the model of a library; ./{name} names the file or folder here")
    if is_folder(name):
        model, config = load_student(Path(name), model_files)
        mean, std, input_size, names = config.mean, config.std, config.input_size, config.label_names
        count = len(names)
    elif is_code(name):
        model = build_model(find_architecture(name), count, student.input_size, [name])
        mean, std, input_size = attributes_of(model, name, student)
    else:
        model_name, _, file = name.partition(":")
        found = find_pretrained(model_name, find_architecture(model_name)["library"])
        mean, std, input_size = found.images["mean"], found.images["std"], found.input_size
        names, count = found.label_names, found.num_classes
        if file:
            model, count = load_from_file(model_name, file, input_size)
            names = names if names and count == len(names) else None
        else:
            pick_columns(name, names, count, student.label_names, classes_file)  # raises before the download
            model = fetch(found, f"--teacher {name}", f"--teacher {name}:FILE loads it").float()
    if input_size[0] < student.input_size[0]:
        raise UserError(
            f"--teacher {name} takes grey images, but the student takes colour images: use --in-chans 1 for both"
        )
    check_forward(model.eval(), f"--teacher {name}", input_size, count)
    columns, report = pick_columns(name, names, count, student.label_names, classes_file)
    return LoadedTeacher(model, mean, std, input_size, columns, report)


def attributes_of(model: nn.Module, name: str, student: Metadata) -> tuple[list[float], list[float], list[int]]:
    """Return mean, std and input_size of a teacher from the user's code; the student's values replace missing ones.

    Print the attributes that the teacher has, because they may mean something else in the user's code.
    """
    values = {key: getattr(student, key) for key in ("mean", "std", "input_size")}
    own = {key: getattr(model, key) for key in values if hasattr(model, key)}
    own = {key: x.flatten().tolist() if hasattr(x, "flatten") else x for key, x in own.items()}  # tensors and arrays
    if own:
        log(f"teacher {name}: " + ", ".join(f"{key} {x}" for key, x in own.items()) + " (attributes of the model)")
    others = {key: getattr(student, key) for key in ("label_names", "interpolation", "crop")}
    found = Metadata.from_json(others | values | own, f"--teacher {name}: the attributes of the model")
    return found.mean, found.std, found.input_size


def load_from_file(name: str, file: str, input_size: Sequence[int]) -> tuple[nn.Module, int]:
    """Return a library's model with the weights in a file, and its number of classes according to the weights."""
    weights, _ = read_weights(file)
    architecture = find_architecture(name, (), False, input_size)
    model = build_model(architecture, 2, input_size)
    prefix = common_prefix(model.state_dict(), weights)
    weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    heads = [key for key, value in model.state_dict().items() if value.ndim >= 1 and value.shape[0] == 2]
    counts = Counter(weights[key].shape[0] for key in heads if key in weights)
    if not counts:
        raise UserError(f"--teacher {name}:{file}: the file lacks the classifier of {name}: {', '.join(heads[:2])}")
    classes = counts.most_common(1)[0][0]
    model = build_model(architecture, classes, input_size)
    load_weights(model, weights, f"--teacher {name}:{file}")
    return model, classes

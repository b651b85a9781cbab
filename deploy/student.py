"""What a student/ folder is: its model is found, built, loaded and saved here. Needs torch, torchvision and timm.

    model, config = load_student(Path("runs/001-mobilenet_v2-uskd/student"))

config.json says all that is needed to use the weights in model.safetensors: the architecture, the classes by name, the
size and the preprocessing of an image.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
import os
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from deploy.cli import UserError, first_line, write_whole
from deploy.config import check_arguments, read_config


def find_architecture(name: str, arguments: Sequence[str] = (), small_stem: bool = False) -> dict[str, Any]:
    """What config.json stores of a model, enough to build it again: library, name, arguments, stem.

    Args:
        name: torchvision's or timm's, or path/to/file.py:function
        arguments: "KEY=VALUE" each, passed on to the model
        small_stem: see shrink_stem
    """
    if is_own(name):
        library, name = "file", Path(name).name  # where the file lies is this machine's business
    elif is_torchvisions(name):
        library = "torchvision"
    elif timm.is_model(name):
        library = "timm"
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            raise UserError(f"unknown model {name!r}: {error}") from error
    else:
        known = torchvision.models.list_models(module=torchvision.models) + timm.list_models()
        near = difflib.get_close_matches(name, dict.fromkeys(known), n=5, cutoff=0.5)
        raise UserError(
            f"unknown model {name!r}: neither torchvision's nor timm's, no student/ folder, no file.py:build; "
            + (f"near matches: {', '.join(near)}" if near else "python -c 'import timm; print(timm.list_models())'")
        )
    options = {}
    for item in arguments:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--model-args takes KEY=VALUE, got {item!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[key] = value
    check_arguments(options, "--model-args")
    return {"library": library, "name": name, "args": options, "small_stem": small_stem}


def is_torchvisions(name: str) -> bool:
    return name in torchvision.models.list_models(module=torchvision.models)


def is_own(name: str) -> bool:
    """Whether the name is path/to/file.py:function."""
    return re.fullmatch(r".+\.py:\w+", name) is not None


def pick_model_file(name: str, model_files: Sequence[str]) -> str:
    """Of what the command line names, the path/to/file.py:function for an architecture called file.py:function.

    Raises:
        UserError: there is none; code is run only if the user names its file
    """
    for model_file in model_files:
        if not is_own(model_file):
            raise UserError(f"--model-file takes path/to/file.py:function, got {model_file}")
    named = [model_file for model_file in model_files if Path(model_file).name == name] or list(model_files)
    if len(named) != 1:
        raise UserError(
            f"its model is built by code of somebody's own, {name}, which is run only if you name it: "
            f"--model-file path/to/{name}"
        )
    return named[0]


def build_model(
    architecture: dict[str, Any], num_classes: int, img_size: int, model_files: Sequence[str] = ()
) -> nn.Module:
    """The model an architecture says, with random weights; model_files: what may be run where it is somebody's own."""
    library, name = architecture["library"], architecture["name"]
    options = dict(architecture["args"])
    known = {"torchvision": is_torchvisions, "timm": timm.is_model}
    if library in known and not known[library](name):
        raise UserError(f"{library} has no model {name!r}")
    try:
        if library == "file":
            model = build_own_model(pick_model_file(name, model_files), num_classes, options)
        elif library == "torchvision":
            if name.startswith("vit_"):
                options.setdefault("image_size", img_size)
            elif name.startswith("maxvit"):
                options.setdefault("input_size", (img_size, img_size))
            elif name in ("googlenet", "inception_v3"):  # their extra classifiers would return a tuple
                options = {"aux_logits": False, "init_weights": True} | options
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
        else:
            if timm.get_pretrained_cfg(name).fixed_input_size:
                options.setdefault("img_size", img_size)
            model = timm.create_model(name, num_classes=num_classes, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"cannot build {name} for {num_classes} classes at {img_size} px: {error}") from error
    if architecture["small_stem"]:
        shrink_stem(model)
    return model


def is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # too long to be a path
        return False


def open_student(
    name: str, label_names: list[str], img_size: int, mean: Sequence[float], std: Sequence[float],
    interpolation: str = "bilinear", crop: float = 1.0, arguments: Sequence[str] = (), small_stem: bool = False,
    model_files: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """A model to train, and the config.json that says all that is needed to use it.

    name: as of find_architecture, for random weights; or a student/ folder of these classes and this size, whose
    preprocessing and arguments are its own
    """
    if is_folder(name):
        return start_from(name, label_names, img_size, model_files)
    architecture = find_architecture(name, arguments, small_stem)
    model = build_model(architecture, len(label_names), img_size, [name])
    config = {"architecture": architecture, "num_classes": len(label_names), "label_names": label_names}
    preprocessing = {"mean": list(mean), "std": list(std), "input_size": [3, img_size, img_size]}
    return model, config | preprocessing | {"interpolation": interpolation, "crop": crop}


class Pretrained(NamedTuple):
    """A library's ImageNet weights, before they are fetched."""

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    input_size: Sequence[int]  # (3, H, W)
    fetch: Callable[[], nn.Module]  # may download


def find_pretrained(name: str, library: str) -> Pretrained:
    """torchvision's first weights, which are those of the paper's teachers, or timm's own choice."""
    if library == "torchvision":
        choices = torchvision.models.get_model_weights(name)
        weights = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
        preset = weights.transforms()
        fetch = functools.partial(torchvision.models.get_model, name, weights=weights)
        size = (3, preset.crop_size[0], preset.crop_size[0])
        return Pretrained(len(weights.meta["categories"]), preset.mean, preset.std, size, fetch)
    config = timm.get_pretrained_cfg(name)
    fetch = functools.partial(timm.create_model, name, pretrained=True)
    return Pretrained(config.num_classes, config.mean, config.std, config.input_size, fetch)


def build_own_model(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The user's file.py:function; whatever goes wrong in there is told with its line."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"no file {path}, which should build the model")
    try:
        folder = os.path.dirname(os.path.abspath(path))
        if folder not in sys.path:
            sys.path.insert(0, folder)  # as Python does for a script: it may import its neighbours
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if build is None:
            raise UserError(f"{path} has no function {function!r}")
        model = build(num_classes=num_classes, **options)
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{name} failed: {type(error).__name__}: {error} ({where})") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} must return an nn.Module, got {type(model).__name__}")
    return model


def shrink_stem(model: nn.Module) -> None:
    """The usual stem for images of 64 px and less: first convolution 3x3 with stride 1, no max-pool after it."""
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            if conv.stride[0] > 1 and conv.kernel_size != conv.stride:  # else there is nothing to shrink, or patches
                stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
                nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, stem)
            break
    for name, child in model.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(model, name, nn.Identity())


def load_student(folder: Path, model_files: Sequence[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the config.json of a run's student/ folder, or of the run directory that holds it.

    Args:
        folder: which may come from anybody: no code in it is run
        model_files: path/to/file.py:function of models of one's own, any of which may be asked for

    Raises:
        UserError: the folder is not whole, or not what it says it is
    """
    if (folder / "student").is_dir():
        folder = folder / "student"
    config = read_config(folder)
    try:
        model = build_model(config["architecture"], config["num_classes"], config["input_size"][1], model_files)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/model.safetensors cannot be read: {first_line(error)}") from error
    except SafetensorError as error:
        raise UserError(f"{folder}/model.safetensors is damaged: {error}") from error
    load_weights(model, weights, str(folder))
    return model, config


def start_from(
    folder: str, label_names: list[str], img_size: int, model_files: Sequence[str]
) -> tuple[nn.Module, dict[str, Any]]:
    """The student in a student/ folder, to be trained further on these classes at this size."""
    model, config = load_student(Path(folder), model_files)
    if config["num_classes"] != len(label_names):
        raise UserError(f"--model {folder} has {config['num_classes']} classes, --data has {len(label_names)}")
    if config["input_size"][1:] != [img_size, img_size]:
        height, width = config["input_size"][1:]
        raise UserError(f"--model {folder} takes {height}x{width} pixels, --img-size is {img_size}")
    return model, config | {"label_names": label_names}


def load_teacher(
    name: str,
    student: dict[str, Any],
    fetching: Callable[[], AbstractContextManager[None]] = nullcontext,
    model_files: Sequence[str] = (),
) -> tuple[nn.Module, Sequence[float], Sequence[float], Sequence[int]]:
    """A teacher of a student's classes: the model, its own mean and std, and the (3, H, W) it takes.

    Args:
        name: a student/ folder, a library's model, which comes with its ImageNet weights, or path/to/file.py:function,
            with weights of its own and, where they are not the student's, attributes mean, std and input_size
        student: the student's config.json
        fetching: what is held during a download
        model_files: as of load_student

    Raises:
        UserError: no such teacher, one of other classes, or weights that cannot be fetched
    """

    def check_classes(classes: int) -> None:
        if classes != student["num_classes"]:
            raise UserError(
                f"--teacher {name} has {classes} classes, --data has {student['num_classes']}: "
                "take a teacher trained on the same classes"
            )

    if is_folder(name):
        model, config = load_student(Path(name), model_files)
        check_classes(config["num_classes"])
        for theirs, ours in zip(config["label_names"], student["label_names"]):
            if theirs != ours:
                raise UserError(f"--teacher {name} has other classes than --data: {theirs} and not {ours}")
        mean, std, input_size = (config[key] for key in ("mean", "std", "input_size"))
    elif (architecture := find_architecture(name))["library"] == "file":
        model = build_model(architecture, student["num_classes"], student["input_size"][1], [name])
        mean, std, input_size = (getattr(model, key, student[key]) for key in ("mean", "std", "input_size"))
    else:
        classes, mean, std, input_size, fetch = find_pretrained(name, architecture["library"])
        check_classes(classes)  # before a download
        try:
            with fetching():
                model = fetch()
        except Exception as error:  # each source has errors of its own
            raise UserError(
                f"--teacher {name}: its ImageNet weights could not be fetched ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); give a run's student/ folder or file.py:build instead"
            ) from error
    check_forward(model.eval(), f"--teacher {name}", input_size, student["num_classes"])
    return model, mean, std, input_size


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """load_state_dict, with one line on what differs."""
    versioned = OrderedDict(weights)
    # A file of tensors has no versions of the modules' layouts, without which MNASNet refuses its own weights.
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(versioned)
    except RuntimeError as error:
        own = model.state_dict()
        differing = [f"{k} is missing" for k in own if k not in weights]
        differing += [f"{k} is unknown" for k in weights if k not in own]
        differing += [
            f"{k} is {tuple(weights[k].shape)} and not {tuple(own[k].shape)}"
            for k in own
            if k in weights and weights[k].shape != own[k].shape
        ]
        what = "; ".join(differing[:3]) or str(error)
        raise UserError(
            f"{where} holds the weights of another architecture than {type(model).__name__}: {what}"
        ) from error


def check_forward(model: nn.Module, name: str, input_size: Any, num_classes: int, batch: int = 1) -> None:
    """A blank batch through the model, in the mode it is in: whether it runs and what it returns.

    Lazy layers get their shapes here; what the batch did to the running statistics is undone.
    """
    kept = {key: value.clone() for key, value in model.named_buffers() if not is_lazy(value)}
    try:
        with torch.no_grad():
            logits = model(torch.zeros(batch, *input_size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        size = "x".join(map(str, (batch, *input_size)))
        raise UserError(f"{name} does not run on a {size} batch: {' '.join(str(error).split())[:300]}") from error
    for key, value in model.named_buffers():
        if key in kept:
            value.copy_(kept[key])
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (batch, num_classes):
        raise UserError(f"{name} must return logits of shape (N, {num_classes}), got {shape} for N = {batch}")
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise UserError(
            f"{name} returns probabilities, which add up to 1: take its last softmax out, logits are needed"
        )


def settle_batch_norm(net: nn.Module, steps: int) -> str | None:
    """Raise the momentum of batch norms whose running averages would not settle in so many steps; what was done.

    A momentum of 0.01 is made for long training: after 90 steps 40 % of an average is what it began with, and
    evaluation fails where training goes well. A ten-thousandth is left: deep layers vary by much less than that 1.
    """
    least = 1 - 1e-4 ** (1 / steps)
    slow = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.momentum is not None and m.momentum < least]
    said = slow and f"batch-norm momentum {slow[0].momentum:g} is too slow for {steps} steps: raised to {least:.2g}"
    for module in slow:
        module.momentum = least
    return said or None


def save_student(folder: Path, model: nn.Module, config: dict[str, Any], later: bool = False) -> Callable[[], None]:
    """Write what deploy/ needs and people share: the plain student, no weak head, no optimizer.

    later: write when what is returned is called; the weights are copied now
    """
    values = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = safetensors_bytes(values)

    def write() -> None:
        write_whole(folder / "model.safetensors", weights)
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")

    if not later:
        write()
    return write

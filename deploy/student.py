"""What a student/ folder is: its model is found, built, loaded and saved here. Needs torch, torchvision and timm.

    model, config = load_student(Path("runs/001-mobilenet_v2-uskd/student"))

config.json says all that is needed to use the weights in model.safetensors: the architecture, the classes by name, the
size and the preprocessing of an image.
"""

from __future__ import annotations

import ast
import copy
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

from deploy.cli import UserError, write_whole


def find_architecture(name: str, arguments: Sequence[str] = (), small_stem: bool = False) -> dict[str, Any]:
    """What config.json stores of a model, enough to build it again: library, name, arguments, stem.

    Args:
        name: torchvision's or timm's, or path/to/file.py:function
        arguments: "KEY=VALUE" each, passed on to the model
        small_stem: see shrink_stem
    """
    own = re.fullmatch(r"(.+\.py):(\w+)", name)
    if own:
        library, name = "file", f"{os.path.abspath(own[1])}:{own[2]}"
    elif name in torchvision.models.list_models(module=torchvision.models):
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
        except (ValueError, SyntaxError):
            options[key] = value
    return {"library": library, "name": name, "args": options, "small_stem": small_stem}


def build_model(architecture: dict[str, Any], num_classes: int, img_size: int) -> nn.Module:
    """The model an architecture says, with random weights."""
    library, name = architecture["library"], architecture["name"]
    options = dict(architecture["args"])
    try:
        if library == "file":
            model = build_own_model(name, num_classes, options)
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


def open_student(
    name: str, label_names: list[str], img_size: int, mean: Sequence[float], std: Sequence[float],
    interpolation: str = "bilinear", crop: float = 1.0, arguments: Sequence[str] = (), small_stem: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """A model to train, and the config.json that says all that is needed to use it.

    name: as of find_architecture, for random weights; or a student/ folder of these classes and this size, whose
    preprocessing and arguments are its own
    """
    if Path(name).is_dir():
        return start_from(name, label_names, img_size)
    architecture = find_architecture(name, arguments, small_stem)
    model = build_model(architecture, len(label_names), img_size)
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


def load_student(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the config.json of a run's student/ folder, or of the run directory that holds it."""
    if (folder / "student").is_dir():
        folder = folder / "student"
    try:
        config = json.loads((folder / "config.json").read_text())
        for key in ("label_names", "mean", "std", "interpolation", "crop"):
            config[key]  # missing: KeyError
        model = build_model(config["architecture"], config["num_classes"], config["input_size"][1])
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a whole student/ folder: {type(error).__name__}: {error}") from error
    except SafetensorError as error:
        raise UserError(f"{folder}/model.safetensors is damaged: {error}") from error
    load_weights(model, weights, str(folder))
    return model, config


def start_from(folder: str, label_names: list[str], img_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """The student in a student/ folder, to be trained further on these classes at this size."""
    model, config = load_student(Path(folder))
    if config["num_classes"] != len(label_names):
        raise UserError(f"--model {folder} has {config['num_classes']} classes, --data has {len(label_names)}")
    if config["input_size"][1:] != [img_size, img_size]:
        height, width = config["input_size"][1:]
        raise UserError(f"--model {folder} takes {height}x{width} pixels, --img-size is {img_size}")
    return model, config | {"label_names": label_names}


def load_teacher(
    name: str, student: dict[str, Any], fetching: Callable[[], AbstractContextManager[None]] = nullcontext
) -> tuple[nn.Module, Sequence[float], Sequence[float], Sequence[int]]:
    """A teacher of a student's classes: the model, its own mean and std, and the (3, H, W) it takes.

    Args:
        name: a student/ folder, a library's model, which comes with its ImageNet weights, or path/to/file.py:function,
            with weights of its own and, where they are not the student's, attributes mean, std and input_size
        student: the student's config.json
        fetching: what is held during a download

    Raises:
        UserError: no such teacher, one of other classes, or weights that cannot be fetched
    """

    def check_classes(classes: int) -> None:
        if classes != student["num_classes"]:
            raise UserError(
                f"--teacher {name} has {classes} classes, --data has {student['num_classes']}: "
                "take a teacher trained on the same classes"
            )

    if Path(name).is_dir():
        model, config = load_student(Path(name))
        check_classes(config["num_classes"])
        for theirs, ours in zip(config["label_names"], student["label_names"]):
            if theirs != ours:
                raise UserError(f"--teacher {name} has other classes than --data: {theirs} and not {ours}")
        mean, std, input_size = (config[key] for key in ("mean", "std", "input_size"))
    elif (architecture := find_architecture(name))["library"] == "file":
        model = build_model(architecture, student["num_classes"], student["input_size"][1])
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
    """A blank batch through a copy of the model, in the mode it is in: whether it runs and what it returns."""
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model)(torch.zeros(batch, *input_size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        size = "x".join(map(str, (batch, *input_size)))
        raise UserError(f"{name} does not run on a {size} batch: {' '.join(str(error).split())[:300]}") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (batch, num_classes):
        raise UserError(f"{name} must return logits of shape (N, {num_classes}), got {shape} for N = {batch}")


def save_student(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """What deploy/ needs and people share: the plain student, no weak head, no optimizer."""
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_whole(folder / "model.safetensors", safetensors_bytes(weights))
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")

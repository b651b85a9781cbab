"""What a student/ folder is: its model is found, built, loaded and saved here. Needs torch, torchvision and timm.

    model, config = load_student(Path("runs/001-mobilenet_v2-uskd/student"))

config.json says all that is needed to use the weights in model.safetensors: the architecture, the classes by name, the
size and the preprocessing of an image.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deploy.cli import UserError, first_line
from deploy.config import Metadata, check_arguments, read_config


def find_architecture(
    name: str, arguments: Sequence[str] = (), small_stem: bool = False, input_size: Sequence[int] | None = None
) -> dict[str, Any]:
    """What config.json stores of a model, enough to build it again: library, architecture, model_args, small_stem.

    Args:
        name: torchvision's or timm's, or path/to/file.py:function
        arguments: "KEY=VALUE" each, passed on to the model
        small_stem: see shrink_stem
        input_size: (channels, H, W), for those that are told it when they are built
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
    architecture = {"library": library, "architecture": name, "model_args": options, "small_stem": small_stem}
    return architecture | {"model_args": size_arguments(architecture, input_size)} if input_size else architecture


def size_arguments(architecture: dict[str, Any], input_size: Sequence[int]) -> dict[str, Any]:
    """The model's arguments, with the size of its images for those that need it, and what makes its answer a tensor."""
    library, name = architecture["library"], architecture["architecture"]
    channels, height, width = input_size
    side = height if height == width else [height, width]
    options: dict[str, Any] = {}
    if library == "torchvision":
        if name.startswith("vit_"):
            options = {"image_size": side}
        elif name.startswith("maxvit"):
            options = {"input_size": [height, width]}
        elif name in ("googlenet", "inception_v3"):  # their extra classifiers would return a tuple
            options = {"aux_logits": False, "init_weights": True}
    elif library == "timm":
        if timm.get_pretrained_cfg(name).fixed_input_size:
            options = {"img_size": side}
        if channels != 3:
            options["in_chans"] = channels
    return options | architecture["model_args"]


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
    architecture: dict[str, Any], num_classes: int, input_size: int | Sequence[int], model_files: Sequence[str] = ()
) -> nn.Module:
    """The model that find_architecture or a config.json describes, with random weights.

    input_size: (channels, H, W), or the side of square colour images
    model_files: what may be run where the model is somebody's own
    """
    library, name = architecture["library"], architecture["architecture"]
    known = {"torchvision": is_torchvisions, "timm": timm.is_model}
    if library in known and not known[library](name):
        raise UserError(f"{library} has no model {name!r}")
    channels, height, width = (3, input_size, input_size) if isinstance(input_size, int) else input_size
    options = size_arguments(architecture, (channels, height, width))
    try:
        if library == "file":
            model = build_own_model(pick_model_file(name, model_files), num_classes, options)
        elif library == "torchvision":
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
            if channels != 3:
                take_channels(model, channels)
        else:
            model = timm.create_model(name, num_classes=num_classes, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        size = f"{height} px" if height == width else f"{height}x{width} px"
        raise UserError(f"cannot build {name} for {num_classes} classes at {size}: {error}") from error
    if architecture["small_stem"]:
        shrink_stem(model)
    return model.float()  # whatever precision the user's own comes in


def take_channels(model: nn.Module, channels: int) -> None:
    """Let the first convolution read so many channels."""
    name, conv = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, child = name.rpartition(".")
    options: Any = {key: getattr(conv, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    ours = nn.Conv2d(channels, conv.out_channels, bias=conv.bias is not None, **options)
    setattr(model.get_submodule(parent), child, ours)


def is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # too long to be a path
        return False


def build_own_model(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The user's file.py:function; whatever goes wrong in there is told with its line."""
    model = call_own(own_function(name), name, num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} must return an nn.Module, got {type(model).__name__}")
    return model


def own_function(name: str) -> Callable[..., Any]:
    """The function of the user's file.py:function, which is run."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"no file {path}, which should have {function}")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script: it may import its neighbours
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look themselves up there
    call_own(spec.loader.exec_module, name, module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}")
    return getattr(module, function)  # type: ignore[no-any-return]


def call_own(function: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
    """Call what comes from the user's file; an error is told with its line."""
    try:
        return function(*args, **options)
    except UserError:
        raise
    except Exception as error:
        path = name.rpartition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{name} failed: {type(error).__name__}: {error} ({where})") from error


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


def load_student(folder: Path, model_files: Sequence[str] = ()) -> tuple[nn.Module, Metadata]:
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
        model = build_model(config.to_json(), config.num_classes, config.input_size, model_files)
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

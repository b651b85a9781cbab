"""Find, build and load the model of a student/ folder, with torch, torchvision and timm.

    model, metadata = load_student(Path("runs/001-mobilenet_v2-uskd/student"))

config.json describes how to use the weights in model.safetensors: architecture, class names, image size and
preprocessing.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from deploy.cli import UserError, first_line, is_code, student_folder, write_whole
from deploy.config import Metadata, check_arguments, read_config


def find_architecture(
    name: str, arguments: Sequence[str] = (), small_stem: bool = False, input_size: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the fields of config.json that describe a model: library, architecture, model_args, small_stem.

    name: a model of torchvision or timm, or path/to/file.py:function; arguments: the model's, each "KEY=VALUE"
    input_size: (channels, H, W), for models whose constructor needs it
    """
    if is_code(name):
        library, name = "file", Path(name).name  # without the folder, which is private
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
        more = f"near matches: {', '.join(near)}" if near else "python -c 'import timm; print(timm.list_models())'"
        places = "not in torchvision, not in timm, not a student/ folder, not file.py:build"
        if os.sep in name and ":" not in name and not near:
            raise UserError(f"no model {name!r}: expected a student/ folder, a file.py:build, or the name of a model")
        raise UserError(f"unknown model {name!r}: {places}; {more}")
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
    """Return the model's arguments, with the image size if the model needs it, and with extra outputs off."""
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


def pick_model_file(name: str, model_files: Sequence[str]) -> str:
    """Return the --model-file named "file.py:function", else the only one; raise UserError unless one remains."""
    for model_file in model_files:
        if not is_code(model_file):
            raise UserError(f"--model-file takes path/to/file.py:function, got {model_file}")
    named = [model_file for model_file in model_files if Path(model_file).name == name] or list(model_files)
    if len(named) != 1:
        code = f"its model is built by the code of {name}, which runs only if you name the file"
        raise UserError(f"{code}: --model-file path/to/{name}")
    return named[0]


def build_model(
    architecture: dict[str, Any], num_classes: int, input_size: int | Sequence[int], model_files: Sequence[str] = ()
) -> nn.Module:
    """Build the model that find_architecture or a config.json describes, with random weights.

    input_size: (channels, H, W), or the side of square colour images; model_files: the user's files, which may run
    """
    library, name = architecture["library"], architecture["architecture"]
    known = {"torchvision": is_torchvisions, "timm": timm.is_model}
    if library in known and not known[library](name):
        raise UserError(f"{library} has no model {name!r}")
    channels, height, width = (3, input_size, input_size) if isinstance(input_size, int) else input_size
    options = size_arguments(architecture, (channels, height, width))
    try:
        if library == "file":
            own = pick_model_file(name, model_files)
            model = call_own(own_function(own), own, num_classes=num_classes, **options)
            if not isinstance(model, nn.Module):
                raise UserError(f"{own} must return an nn.Module, got {type(model).__name__}")
        elif library == "torchvision":
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
            if channels != 3:
                first, conv = convolutions(model)[0]
                options = {key: getattr(conv, key) for key in ("kernel_size", "stride", "padding", "dilation")}
                ours = nn.Conv2d(channels, conv.out_channels, bias=conv.bias is not None, **options)
                model.set_submodule(first, ours)
        else:
            model = timm.create_model(name, num_classes=num_classes, **options)
    except UserError:
        raise
    except Exception as error:  # the arguments of a config.json can raise any exception
        size = f"{height} px" if height == width else f"{height}x{width} px"
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot build {name} for {num_classes} classes at {size}: {reason}") from error
    if architecture["small_stem"]:
        shrink_stem(model)
    return model.float()  # the user's own model may have another precision


def convolutions(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def is_library_model(name: str) -> bool:
    return is_torchvisions(name) or bool(timm.is_model(name))


def is_folder(name: str) -> bool:
    """Return whether a name is a folder; resnet18 is the model of a library, ./resnet18 the folder."""
    return os.path.isdir(name) and not is_library_model(name)


def own_function(name: str) -> Callable[..., Any]:
    """Run the user's file.py and return its function."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"no file {path}, which should contain the function {function}")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a script: the file may import its neighbours
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look up their module there
    call_own(spec.loader.exec_module, name, module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}")
    return getattr(module, function)  # type: ignore[no-any-return]


def call_own(function: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
    """Call a function of the user's file; raise UserError with the line in the file if it fails."""
    try:
        return function(*args, **options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        path = name.rpartition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{name} failed: {type(error).__name__}: {error} ({where})") from error


def shrink_stem(model: nn.Module) -> None:
    """Give the model the usual stem for images of up to 64 px: a first 3x3 convolution of stride 1, no max-pool."""
    for name, conv in convolutions(model)[:1]:
        if conv.stride[0] > 1 and conv.kernel_size != conv.stride:  # else the stem is small already, or cuts patches
            stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
            model.set_submodule(name, stem)
    for name, child in model.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(model, name, nn.Identity())


def load_student(folder: Path, model_files: Sequence[str] = ()) -> tuple[nn.Module, Metadata]:
    """Load the model and the config.json of a student/ folder, or of the run directory that holds it.

    The folder may come from other people. So its code never runs, and the shapes of the model are compared with the
    file before the model takes memory.
    """
    folder = student_folder(folder)
    metadata = read_config(folder)
    file = folder / "model.safetensors"
    try:
        if not file.is_file():
            raise UserError(f"{file} is missing or not a regular file")
        with safe_open(file, "pt") as header:
            shapes = {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    try:
        if metadata.library == "file":  # the user's code, which may not run on the meta device
            model = build_model(metadata.to_json(), metadata.num_classes, metadata.input_size, model_files)
        else:
            model = build_bounded(metadata, shapes, str(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    load_weights(model, load_file(file), str(folder))
    return model, metadata


def write_random(
    folder: Path, architecture: dict[str, Any], input_size: Sequence[int], num_classes: int, model_file: str
) -> None:
    """Write a student/ folder with random weights, to measure the speed of a network that is not trained yet.

    Noise sets the batch norms' statistics. Otherwise some logits would be 1e-9, and every comparison would pass.

    architecture: as find_architecture returns it; model_file: file.py:function, run only for the user's own model
    """
    torch.manual_seed(0)
    model = build_model(architecture, num_classes, input_size, [model_file])
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain mean over batches
    with torch.no_grad():
        model.train()(torch.randn(4, *input_size))
    names, count = [str(i) for i in range(num_classes)], input_size[0]
    norm: Any = {"mean": [0.5] * count, "std": [0.25] * count, "interpolation": "bilinear", "crop": 1.0}
    config = Metadata(names, list(input_size), **norm, num_classes=num_classes, **architecture)
    write_whole(folder / "config.json", json.dumps(config.to_json(), indent=2) + "\n")
    save_file({name: x.clone().contiguous() for name, x in model.state_dict().items()}, folder / "model.safetensors")


def published_top1(architecture: dict[str, Any]) -> tuple[float, int] | None:
    """Return a network's top-1 on ImageNet with torchvision's newest weights, in percent, and the side of its images.

    Return None for the user's own networks, and for timm's, because timm's package has no table of results.
    """
    if architecture["library"] != "torchvision":
        return None
    weights = torchvision.models.get_model_weights(architecture["architecture"]).DEFAULT  # type: ignore[attr-defined]
    return weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], weights.transforms.keywords["crop_size"]


class ParameterLimit:
    """Stop, in a `with` block, the construction of a model with many more parameters than its file has.

    The hook runs before a parameter is initialised, so before its memory is used.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        # twice the number: some libraries build layers and then replace them
        self.tensors, self.elements = 2 * len(shapes) + 1000, 2 * sum(map(math.prod, shapes.values())) + 10**7

    def __enter__(self) -> None:
        self.hook = register_module_parameter_registration_hook(self)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def __call__(self, module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None:
            self.tensors, self.elements = self.tensors - 1, self.elements - parameter.numel()
        if self.tensors < 0 or self.elements < 0:
            raise UserError("its config.json describes a far larger model than model.safetensors: they do not fit")


def build_bounded(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], where: str) -> nn.Module:
    """Build the model of a config.json, which may describe any size, such as a million layers.

    First build it without memory (on torch's meta device), and compare its shapes with those of the weights.
    """
    fields = metadata.to_json(), metadata.num_classes, metadata.input_size
    try:
        with torch.device("meta"), ParameterLimit(shapes):
            model = build_model(*fields)
        compare_shapes(type(model).__name__, model.state_dict(), shapes, where)
    except UserError as error:
        if not isinstance(error.__cause__, NotImplementedError):  # RegNet reads values in its constructor
            raise
    with ParameterLimit(shapes):
        return build_model(*fields)


def compare_shapes(name: str, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError, with the first three differences, unless the shapes fit the model's tensors."""
    differing = [f"{key} is missing" for key in own if key not in shapes]
    differing += [f"{key} is unknown" for key in shapes if key not in own]
    expected = {key: tuple(value.shape) for key, value in own.items() if key in shapes and not is_lazy(value)}
    differing += [f"{key} is {shapes[key]} and not {one}" for key, one in expected.items() if shapes[key] != one]
    if differing:
        raise UserError(f"{where} holds the weights of another architecture than {name}: {'; '.join(differing[:3])}")


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load a state_dict; raise UserError, with the differences, if it does not fit."""
    versioned = OrderedDict(weights)
    # The file lacks the version numbers of the modules, and MNASNet rejects weights without a version.
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(versioned)
    except RuntimeError as error:
        name, shapes = type(model).__name__, {key: tuple(value.shape) for key, value in weights.items()}
        compare_shapes(name, model.state_dict(), shapes, where)
        raise UserError(f"{where} holds the weights of another architecture than {name}: {error}") from error


def check_forward(model: nn.Module, name: str, input_size: Any, num_classes: int, batch: int = 1) -> None:
    """Run a blank batch through the model, in its present mode, and raise UserError unless it returns logits.

    The run gives lazy layers their shapes. After it, the buffers get their former values.
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
        raise UserError(f"{name} returns probabilities, whose sum is 1; expected logits: remove its last softmax")

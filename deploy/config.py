"""config.json of a student: what is read from it is checked, and nothing in it is run. Needs no torch.

The keys are timm's where it has one (architecture, model_args, num_classes, label_names), so that timm opens the folder
of a timm student; pretrained_cfg is for timm alone, and not read here.

A student/ folder is what people share, so its config.json may be anybody's: it names an architecture of torchvision or
timm and plain arguments. Code (a model of one's own) and weights from elsewhere are named on the command line alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.cli import UserError
from deploy.preprocess import RESAMPLING

LIBRARIES = ("torchvision", "timm", "file")
MAX_SIDE = 16_384  # pixels
# Arguments of a model that fetch or load something, by the first letters of their names.
LOADING = re.compile(r"(pretrained|checkpoint|weights|cache_dir|file|url|state_dict|hf_|hub_)")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_count(value: Any, most: float = math.inf) -> bool:
    return type(value) is int and 0 < value <= most


def is_plain(value: Any, depth: int = 4) -> bool:
    """Whether a model may be given this as an argument: a number, a text, a truth value, or a list of such."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(is_plain(v, depth - 1) for v in value)
    return value is None or isinstance(value, (bool, str)) or is_number(value)


def is_list(value: Any, length: int | None, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) in (length, length or len(value)) and all(map(accepts, value))


# Of a student and of every file made of it: what its images and its labels are read by.
PREPROCESSING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_names": (
        lambda v: is_list(v, None, lambda label: isinstance(label, str)) and len(v) > 0,
        "the names of the classes",
    ),
    "input_size": (
        lambda v: is_list(v, 3, lambda side: is_count(side, MAX_SIDE)) and v[0] in (1, 3),
        f"three whole numbers: channels, which are 3 or 1, height and width, at most {MAX_SIDE}",
    ),
    "mean": (lambda v: is_list(v, None, is_number), "a number per channel"),
    "std": (lambda v: is_list(v, None, lambda x: is_number(x) and x > 0), "a number above 0 per channel"),
    "interpolation": (lambda v: isinstance(v, str) and v in RESAMPLING, f"one of {', '.join(sorted(RESAMPLING))}"),
    "crop": (lambda v: is_number(v) and 0.01 <= v <= 1, "a share of the side, above 0 and at most 1"),
}
STUDENT: dict[str, tuple[Callable[[Any], bool], str]] = {
    **PREPROCESSING,
    "num_classes": (is_count, "the number of classes"),
    "library": (lambda v: isinstance(v, str) and v in LIBRARIES, f"one of {', '.join(LIBRARIES)}"),
    "architecture": (lambda v: isinstance(v, str) and 0 < len(v) <= 200, "the name of a model"),
    "model_args": (lambda v: isinstance(v, dict), "the model's arguments by name"),
    "small_stem": (lambda v: isinstance(v, bool), "true or false"),
}
FORMER = {"library": "library", "architecture": "name", "model_args": "args", "small_stem": "small_stem"}


def check_fields(values: dict[str, Any], fields: dict[str, tuple[Callable[[Any], bool], str]], where: str) -> None:
    """Raise, in one line that names the field, unless each is there and what it should be."""
    for name, (accepts, expected) in fields.items():
        if name not in values:
            raise UserError(f"{where} has no {name}: expected {expected}")
        if not accepts(values[name]):
            raise UserError(f"{where}: {name} is {repr(values[name])[:80]}; expected {expected}")
    for name in {"mean", "std"} & fields.keys():
        if len(values[name]) != values["input_size"][0]:
            raise UserError(f"{where}: {name} has {len(values[name])} numbers for {values['input_size'][0]} channels")


def check_arguments(arguments: dict[str, Any], where: str) -> None:
    """Raise unless a model may be built with these: nothing that loads weights, nothing but plain values."""
    for name, value in arguments.items():
        if LOADING.match(name):
            raise UserError(
                f"{where}: {name[:80]!r} would load or fetch weights, which no argument of a model does here; those of "
                "a student are its model.safetensors"
            )
        if not name.isidentifier() or not is_plain(value):
            raise UserError(
                f"{where}: {name[:80]!r} is {repr(value)[:80]}; expected a number, a text or a list of them"
            )


def read_json(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} was not made by deploy/: it has no metadata that can be read")
    return metadata


def read_config(student: Path) -> dict[str, Any]:
    """The config.json of a student/ folder.

    Raises:
        UserError: it cannot be read, or a field is missing, of another type, out of range, or at odds with another
    """
    file = student / "config.json"
    try:
        config = read_json(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    former = config.get("architecture")
    if isinstance(former, dict):  # of kdlite 0.1
        config |= {ours: former[theirs] for ours, theirs in FORMER.items() if theirs in former}
    check_fields(config, STUDENT, str(file))
    check_arguments(config["model_args"], f"{file}: model_args")
    if len(config["label_names"]) != config["num_classes"]:
        raise UserError(f"{file}: {len(config['label_names'])} label_names for {config['num_classes']} classes")
    return config

"""Read config.json of a student and the metadata of its artefacts into one dataclass, and check each field.

Some keys are timm's (architecture, model_args, num_classes, label_names), so that timm opens the folder of a timm
student. Only timm reads the key pretrained_cfg. This module needs no torch.

People share student/ folders, so config.json is untrusted: it can only name an architecture of torchvision or timm and
plain arguments. Only the command line can name code and other weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from deploy.cli import LARGEST, MAX_JSON, UserError, read_file

LIBRARIES = ("torchvision", "timm", "file")
INTERPOLATIONS = ("bicubic", "bilinear")
UINT8, FLOAT = "uint8 NHWC", "float32 NCHW"  # the input of an artefact; the caller normalises float32
MAX_SIDE = 16_384  # pixels
MAX_ARGUMENT = 10**6  # largest argument of a model, such as its depth: building a billion layers takes minutes
# Arguments of a model that download or load weights start with one of these words.
LOADING = re.compile(r"(pretrained|checkpoint|weights|cache_dir|file|url|state_dict|hf_|hub_)")


def is_text(value: Any) -> bool:
    """Return whether a value is a text that UTF-8 can encode: JSON may contain half of a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def is_count(value: Any, most: float = LARGEST) -> bool:
    return type(value) is int and 0 < value <= most


def is_plain(value: Any, depth: int = 4) -> bool:
    """Return whether a model may get this value: None, a number, a text, a truth value, or a list of them."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(is_plain(v, depth - 1) for v in value)
    return value is None or isinstance(value, (bool, str)) or (is_number(value) and abs(value) <= MAX_ARGUMENT)


def is_list(value: Any, length: int | None, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) in (length, length or len(value)) and all(map(accepts, value))


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


Check = tuple[Callable[[Any], bool], str]  # a test of a value, and a description of valid values
OF_PIXELS = "from 0 to 1 (pixels are from 0 to 1, not to 255)"
PREPROCESSING: dict[str, Check] = {
    "label_names": (lambda v: is_list(v, None, is_text) and len(v) > 0, "the names of the classes"),
    "input_size": (
        lambda v: is_list(v, 3, lambda side: is_count(side, MAX_SIDE)) and v[0] in (1, 3),
        f"three whole numbers: channels (1 or 3), height and width (at most {MAX_SIDE})",
    ),
    "mean": (lambda v: is_list(v, None, is_share), f"a number per channel, {OF_PIXELS}"),
    "std": (lambda v: is_list(v, None, is_share) and all(v), f"a number above 0 per channel, {OF_PIXELS}"),
    "interpolation": (lambda v: v in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop": (lambda v: is_number(v) and 0.01 <= v <= 1, "a share of the side, from 0.01 to 1"),
}
STUDENT: dict[str, Check] = {
    "num_classes": (is_count, "the number of classes"),
    "library": (lambda v: v in LIBRARIES, f"one of {', '.join(LIBRARIES)}"),
    "architecture": (lambda v: is_text(v) and 0 < len(v) <= 200, "the name of a model"),
    "model_args": (is_object, "the model's arguments by name"),
    "small_stem": (lambda v: isinstance(v, bool), "true or false"),
}
ARTEFACT: dict[str, Check] = {
    "precision": (lambda v: is_text(v) and 0 < len(v) <= 200, "fp32, fp16, int8-cpu or int8-tensorrt"),
    "input": (lambda v: v in (UINT8, FLOAT), f"{UINT8} or {FLOAT}"),
    "source": (is_object, "the digest of the weights"),
}
ENGINE: dict[str, Check] = {
    "onnx": (is_text, "the name of the ONNX file"),
    "built": (is_object, "the build: library, version, gpu, max_batch"),
}
REST: dict[str, Check] = {
    "temperature": (lambda v: is_number(v) and 0.01 <= v <= 100, "a number from 0.01 to 100, which divides the logits"),
    "threshold": (lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1; below it: 'none of these'"),
    "tensors": (lambda v: is_list(v, 2, is_text), "the names of the input and the output"),
    "calibration": (is_object, "how the file was quantised"),
    "metrics": (is_object, "the metrics of the student by name"),
    "training": (is_object, "how the student was trained"),
}
BUILT: dict[str, Check] = {
    "library": (is_text, "tensorrt or tensorrt_rtx"),
    "version": (is_text, "the library's version"),
    "gpu": (lambda v: v is None or is_text(v), "the name of the GPU, or null"),
    "max_batch": (lambda v: is_count(v, 2**20), "the largest batch"),
}
# field -> its key in kdlite 0.1
FORMER = {"library": "library", "architecture": "name", "model_args": "args", "small_stem": "small_stem"}


def check_fields(values: dict[str, Any], checks: dict[str, Check], where: str) -> None:
    """Raise UserError, with the name of the field, if a field is missing or invalid."""
    for name, (accepts, expected) in checks.items():
        if name not in values:
            raise UserError(f"{where} has no {name}: expected {expected}")
        if not accepts(values[name]):
            raise UserError(f"{where}: {name} is {repr(values[name])[:80]}; expected {expected}")


def check_arguments(arguments: dict[str, Any], where: str) -> None:
    """Raise UserError if an argument of a model is not a plain value, or loads weights."""
    for name, value in arguments.items():
        argument = f"{where}: {name[:80]!r}"
        if LOADING.match(name):
            raise UserError(f"{argument} would load or fetch weights: leave it out, because model.safetensors has them")
        if not name.isidentifier() or not is_plain(value):
            expected = f"a number up to {MAX_ARGUMENT}, a text or a list"
            raise UserError(f"{argument} is {repr(value)[:80]}; expected {expected}")


@dataclass(frozen=True)
class Metadata:
    """Hold the fields of config.json and of an artefact's metadata; an attribute has the name of its JSON key.

    A field that the JSON lacks keeps its empty default.
    """

    label_names: list[str]
    input_size: list[int]  # channels, height, width
    mean: list[float]
    std: list[float]
    interpolation: str
    crop: float
    # fields of a student/ folder
    num_classes: int = 0
    library: str = ""
    architecture: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    small_stem: bool = False
    temperature: float | None = None  # divides the logits before the softmax; None: not fitted, so 1
    threshold: float | None = None  # the answer is "none of these" if the largest probability is below it; None: never
    # fields of an artefact
    precision: str = ""
    input: str = ""
    source: dict[str, Any] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)  # names of input and output, if an ONNX file is from elsewhere
    calibration: dict[str, Any] = field(default_factory=dict)
    onnx: str = ""
    built: dict[str, Any] = field(default_factory=dict)
    # information for people
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)  # keys that no program here reads

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape of a prepared image, (H, W, channels)."""
        channels, height, width = self.input_size
        return height, width, channels

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Return the shape of an image in the artefact's input: (H, W, channels) or (channels, H, W)."""
        return self.image_shape if self.input == UINT8 else tuple(self.input_size)

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str, required: Iterable[str] = ()) -> Metadata:
        """Return the metadata of a JSON object; raise UserError if a field is missing or invalid.

        where: name of the file, for the errors
        required: fields that must exist in addition to PREPROCESSING, such as STUDENT or ARTEFACT
        """
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        checks = PREPROCESSING | STUDENT | ARTEFACT | ENGINE | REST
        needed = {*PREPROCESSING, *required}
        check_fields(values, {name: check for name, check in checks.items() if name in {*values, *needed}}, where)
        channels = values["input_size"][0]
        for name in ("mean", "std"):
            if len(values[name]) != channels:
                raise UserError(f"{where}: {name} has {len(values[name])} numbers for {channels} channels")
        labels, classes = len(values["label_names"]), values.get("num_classes")
        if classes not in (None, labels):
            raise UserError(f"{where}: {labels} label_names for {classes} classes")
        check_arguments(values.get("model_args", {}), f"{where}: model_args")
        if "built" in values:
            check_fields(values["built"], BUILT, f"{where}: built")
        known = {name: values[name] for name in checks if name in values}
        return cls(**known, others={key: value for key, value in values.items() if key not in checks})

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object: the fields that are set, and the unknown keys that from_json has stored."""
        kept = {*PREPROCESSING, *(STUDENT if self.library else ()), *(ARTEFACT if self.precision else ())}
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "others"}
        return {name: value for name, value in values.items() if name in kept or value} | self.others


def read_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in a text, or raise UserError with the file's name."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} was not made by deploy/: it has no metadata that can be read")
    return values


def read_config(student: Path, required: Iterable[str] = STUDENT) -> Metadata:
    """Return the config.json of a student/ folder; raise UserError if it is unreadable or a field is invalid.

    required: fields that must exist in addition to PREPROCESSING; () if the file may be packed and not from kdlite
    """
    file = student / "config.json"
    values = read_json(read_file(file, MAX_JSON), file)
    former = values.get("architecture")
    if isinstance(former, dict):  # the format of kdlite 0.1
        values |= {ours: former[theirs] for ours, theirs in FORMER.items() if theirs in former}
    return Metadata.from_json(values, str(file), required)

"""Where the weights of a student and of a teacher come from: a library's ImageNet weights, a file, a student/ folder.

A student takes of a file what fits its own tensors, and says what it took. A teacher is taken whole; where it knows
more classes than the data, or has them in another order, the columns of its logits are found by the classes' names.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploy.cli import UserError, first_line
from deploy.config import read_config
from deploy.student import (
    build_model,
    check_forward,
    find_architecture,
    is_folder,
    is_own,
    load_student,
    load_weights,
)
from kdlite.training.data import read_csv, say

Fetching = Callable[[], AbstractContextManager[None]]  # what is held during a download


class Pretrained(NamedTuple):
    """A library's ImageNet weights, before they are fetched."""

    label_names: list[str] | None  # None: not known
    num_classes: int
    mean: list[float]
    std: list[float]
    input_size: list[int]  # [3, H, W]
    interpolation: str
    crop: float
    where: str  # what to fetch by hand, and where it is looked for
    fetch: Callable[[], nn.Module]  # may download


def find_pretrained(name: str, library: str) -> Pretrained:
    """torchvision's first weights, which are those of the paper's teachers, or timm's own choice.

    Raises:
        UserError: there are none
    """
    if library == "torchvision":
        choices = torchvision.models.get_model_weights(name)
        weights = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
        preset = weights.transforms()
        side, whole = preset.crop_size[0], preset.resize_size[0]
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return Pretrained(
            ImageNetInfo().label_names(), len(weights.meta["categories"]), list(preset.mean), list(preset.std),
            [3, side, side], preset.interpolation.value, round(side / whole, 4),
            f"put {weights.url} into {folder}",
            functools.partial(torchvision.models.get_model, name, weights=weights),
        )  # fmt: skip
    config = timm.get_pretrained_cfg(name)
    if not config.has_weights:
        raise UserError(f"timm has no weights of {name}")
    subset = infer_imagenet_subset(config.to_dict())
    names = ImageNetInfo(subset).label_names() if subset else None
    interpolation = config.interpolation if config.interpolation in ("bilinear", "bicubic") else "bicubic"
    url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    return Pretrained(
        names if names and len(names) == config.num_classes else None, config.num_classes, list(config.mean),
        list(config.std), list(config.input_size), interpolation, config.crop_pct,
        f"fetch its model.safetensors from {url}",
        functools.partial(timm.create_model, name, pretrained=True),
    )  # fmt: skip


def fetch(pretrained: Pretrained, flag: str, by_hand: str, fetching: Fetching) -> nn.Module:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it tries again, ten times
    try:
        with fetching():
            return pretrained.fetch()
    except Exception as error:  # each source has errors of its own
        raise UserError(
            f"{flag}: its ImageNet weights are not here and could not be fetched ({type(error).__name__}: "
            f"{first_line(error)[:100]}); {pretrained.where}; {by_hand}"
        ) from error


# ---- a student ----------------------------------------------------------------------------------------------------


def open_student(
    name: str, label_names: list[str], input_size: Sequence[int], mean: Sequence[float], std: Sequence[float],
    interpolation: str | None = None, crop: float | None = None, arguments: Sequence[str] = (),
    small_stem: bool = False, model_files: Sequence[str] = (), pretrained: bool = False, init: str | None = None,
    fetching: Fetching = nullcontext,
) -> tuple[nn.Module, dict[str, Any], str | None]:  # fmt: skip
    """A model to train, the config.json that says all that is needed to use it, and where its weights come from.

    Args:
        name: as of find_architecture; or a student/ folder of these classes and this size, whose preprocessing and
            arguments are its own
        input_size: (channels, H, W)
        mean, std: of the data, for weights that have none of their own
        interpolation, crop: None leaves them to the weights, else bilinear and 1
        pretrained: start from the library's ImageNet weights
        init: a student/ folder or a file of weights to start from, in place of a network
        fetching: what is held during a download
    """
    if is_folder(name):
        return *start_from(name, label_names, input_size, model_files), None
    architecture = find_architecture(name, arguments, small_stem, input_size)
    model = build_model(architecture, len(label_names), input_size, [name])
    config = architecture | {"num_classes": len(label_names), "label_names": label_names}
    own: dict[str, Any] = {"mean": list(mean), "std": list(std), "interpolation": "bilinear", "crop": 1.0}
    said = None
    if pretrained or init:
        check_forward(model, f"--model {name}", input_size, len(label_names), 2)  # lazy layers get their shapes
    if pretrained:
        if architecture["library"] == "file":
            raise UserError("--pretrained is for torchvision's and timm's models: --init takes a file for your own")
        found = find_pretrained(name, architecture["library"])
        weights = fetch(found, f"--pretrained {name}", "--init FILE takes it", fetching).state_dict()
        own = preprocessing_of(found)
        said = adopt(model, weights, f"the ImageNet weights of {name}")
    elif init:
        weights, theirs = read_weights(init)
        if theirs is None and architecture["library"] != "file":
            with contextlib.suppress(UserError):  # the library has no weights of it: the data's own numbers
                theirs = preprocessing_of(find_pretrained(name, architecture["library"]))
        own = theirs or own
        said = adopt(model, weights, init)
    if said:
        numbers = ", ".join(f"{key} {own[key]}" for key in ("mean", "std", "interpolation", "crop"))
        said += f"; images as these weights know them: {numbers}"
    if len(own["mean"]) != input_size[0]:  # of colour images, for grey ones
        own |= {key: [sum(own[key]) / len(own[key])] * input_size[0] for key in ("mean", "std")}
    own |= {"interpolation": interpolation or own["interpolation"], "crop": crop or own["crop"]}
    return model, config | {"input_size": list(input_size)} | own, said


def preprocessing_of(found: Pretrained) -> dict[str, Any]:
    return {key: getattr(found, key) for key in ("mean", "std", "interpolation", "crop")}


def start_from(
    folder: str, label_names: list[str], input_size: Sequence[int], model_files: Sequence[str]
) -> tuple[nn.Module, dict[str, Any]]:
    """The student in a student/ folder, to be trained further on these classes at this size."""
    model, metadata = load_student(Path(folder), model_files)
    config = metadata.to_json()
    otherwise = f"--model {config['architecture']} --init {folder} takes what fits"
    if config["num_classes"] != len(label_names):
        raise UserError(
            f"--model {folder} has {config['num_classes']} classes, --data has {len(label_names)}: {otherwise}"
        )
    if config["input_size"] != list(input_size):
        theirs, ours = ("x".join(map(str, size)) for size in (config["input_size"], input_size))
        raise UserError(f"--model {folder} takes {theirs} (--in-chans and --img-size), and not {ours}: {otherwise}")
    return model, config | {"label_names": label_names}


def read_weights(name: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors in a student/ folder, a .safetensors, or a .pth or .pt of tensors; of a folder its preprocessing too.

    Raises:
        UserError: no such file, a damaged one, or one that holds more than tensors
    """
    path, config = Path(name), None
    if path.is_dir():
        folder = path / "student" if (path / "student").is_dir() else path
        known = read_config(folder)
        config = {key: getattr(known, key) for key in ("mean", "std", "interpolation", "crop")}
        path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{name}: no such file of weights, and no student/ folder")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has a dozen
        raise UserError(f"{path} cannot be read as weights: {first_line(error)}") from error
    nested = ("model_ema", "state_dict_ema", "ema", "state_dict", "model")  # as training scripts nest them
    sets = [key for key in nested if isinstance(found, dict) and isinstance(found.get(key), dict)]
    if sets:
        found = found[sets[0]]
    if len(sets) > 1:
        say(f"{path} holds {' and '.join(sets)}: {sets[0]} was taken")
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no weights: expected a dictionary of tensors by their names")
    return tensors, config


def adopt(model: nn.Module, weights: dict[str, Tensor], where: str) -> str:
    """Give the model every tensor that fits it, and say how many did and which did not.

    Position embeddings are resampled, and colour filters summed for grey images, by timm's functions.

    Raises:
        UserError: not one parameter was taken
    """
    own = model.state_dict()
    prefix = common_prefix(own, weights)
    taken, new = {}, []
    for name, value in own.items():
        theirs = weights.get(prefix + name)
        fitted = None if theirs is None else fit(model, name, theirs, value)
        if fitted is None:
            new.append(f"{name} ({'not there' if theirs is None else f'{list(theirs.shape)} there'})")
        else:
            taken[name] = fitted
    if not taken.keys() & dict(model.named_parameters()).keys():
        raise UserError(
            f"{where} holds not one tensor that fits {type(model).__name__}: it has {', '.join(list(weights)[:3])}, "
            f"..., the model {', '.join(list(own)[:3])}, ..."
        )
    model.load_state_dict(taken, strict=False)
    said = f"{where}: {len(taken)} of {len(own)} tensors taken"
    return said + (f"; new: {', '.join(new[:4])}{', ...' if len(new) > 4 else ''}" if new else "")


def common_prefix(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """What wrappers (module., model., _orig_mod.) have put before the names; "" where nothing else fits better."""
    count = Counter({"": sum(name in weights for name in own)})
    for key in weights:
        parts = key.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in own:
                count[".".join(parts[:i]) + "."] += 1
    return count.most_common(1)[0][0]


def fit(model: nn.Module, name: str, theirs: Tensor, ours: Tensor) -> Tensor | None:
    """A tensor of another model in the shape of ours; None where it does not fit."""
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


# ---- a teacher ----------------------------------------------------------------------------------------------------


class LoadedTeacher(NamedTuple):
    model: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    input_size: Sequence[int]  # (channels, H, W) that it takes
    columns: list[int] | None  # of its logits, one for each of the student's classes; None: all, as they are
    said: str | None  # how they were found


def load_teacher(
    name: str,
    student: dict[str, Any],
    fetching: Fetching = nullcontext,
    model_files: Sequence[str] = (),
    classes_file: str | None = None,
) -> LoadedTeacher:
    """A teacher of a student's classes, which may know more of them, or know them in another order.

    Args:
        name: a student/ folder; a library's model, which comes with its ImageNet weights, or model:file for weights in
            a file; or path/to/file.py:function, with weights of its own and, where they are not the student's,
            attributes mean, std and input_size
        student: the student's config.json
        fetching: what is held during a download
        model_files: as of load_student
        classes_file: lines of a class of the data, a comma, and what the teacher calls it, or its column

    Raises:
        UserError: no such teacher, weights that cannot be had, or a class that it lacks
    """
    num_classes, label_names = student["num_classes"], student["label_names"]
    model_name, _, file = name.partition(":")
    names: list[str] | None
    if is_folder(name):
        model, config = load_student(Path(name), model_files)
        mean, std, input_size, names = (getattr(config, key) for key in ("mean", "std", "input_size", "label_names"))
        theirs = len(names)
    elif is_own(name):
        model = build_model(find_architecture(name), num_classes, student["input_size"], [name])
        mean, std, input_size = (getattr(model, key, student[key]) for key in ("mean", "std", "input_size"))
        names, theirs = None, num_classes
    else:
        library = find_architecture(model_name)["library"]
        found = find_pretrained(model_name, library)
        mean, std, input_size = found.mean, found.std, found.input_size
        names, theirs = found.label_names, found.num_classes
        if file:
            model, theirs = load_from_file(model_name, file, input_size)
            names = names if names and theirs == len(names) else None
        else:
            pick_columns(name, names, theirs, label_names, classes_file)  # before a download
            model = fetch(found, f"--teacher {name}", f"--teacher {name}:FILE takes it", fetching).float()
    if input_size[0] < student["input_size"][0]:
        raise UserError(f"--teacher {name} takes grey images, the student colour: --in-chans 1 makes both grey")
    check_forward(model.eval(), f"--teacher {name}", input_size, theirs)
    columns, said = pick_columns(name, names, theirs, label_names, classes_file)
    return LoadedTeacher(model, mean, std, input_size, columns, said)


def load_from_file(name: str, file: str, input_size: Sequence[int]) -> tuple[nn.Module, int]:
    """A library's model with weights from a file, which say how many classes it has."""
    weights, _ = read_weights(file)
    architecture = find_architecture(name, (), False, input_size)
    model = build_model(architecture, 2, input_size)
    prefix = common_prefix(model.state_dict(), weights)
    weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    heads = [key for key, value in model.state_dict().items() if value.ndim >= 1 and value.shape[0] == 2]
    counts = Counter(weights[key].shape[0] for key in heads if key in weights)
    if not counts:
        raise UserError(f"--teacher {name}:{file}: the file has no classifier of {name}: {', '.join(heads[:2])}")
    classes = counts.most_common(1)[0][0]
    model = build_model(architecture, classes, input_size)
    load_weights(model, weights, f"--teacher {name}:{file}")
    return model, classes


def pick_columns(
    name: str, teacher: list[str] | None, count: int, data: list[str], classes_file: str | None
) -> tuple[list[int] | None, str | None]:
    """Which of a teacher's columns each of the data's classes is, by name, and a line that says so.

    teacher: the names of its classes, None where they are not known
    """
    if classes_file:
        told = read_classes(classes_file, data)
        named = [label for label in told if not label.isdecimal()]
        if named and teacher is None:
            unknown = f"the names of --teacher {name}'s classes are not known, so neither is {named[0]}"
            raise UserError(f"{classes_file}: {unknown}; give columns, from 0 to {count - 1}")
        by_name = dict(zip(named, match(named, teacher or [], name)))
        columns = [by_name[label] if label in by_name else int(label) for label in told]
        if max(columns) >= count:
            raise UserError(f"{classes_file}: column {max(columns)}, but --teacher {name} has {count}, from 0")
        if twice := [label for label, column in zip(data, columns) if columns.count(column) > 1]:
            raise UserError(f"{classes_file} gives {' and '.join(twice[:3])} one class of --teacher {name}")
        return columns, f"teacher {name}: {len(data)} of its {count} classes, as {classes_file} says"
    if teacher is None or teacher == data:
        if count != len(data):
            raise UserError(
                f"--teacher {name} has {count} classes of unknown names, --data has {len(data)}: "
                "--teacher-classes FILE says which is which"
            )
        return None, None
    columns = match(data, teacher, name)
    return columns, f"teacher {name}: {len(data)} of its {count} classes are --data's, matched by name"


def match(data: list[str], teacher: list[str], name: str) -> list[int]:
    """The index in `teacher` of each class; names are alike but for case, - and _, or as ImageNet's classes are called.

    Raises:
        UserError: a class that the teacher lacks, or that several of its classes are called
    """
    exact: dict[str, set[int]] = defaultdict(set)
    loose: dict[str, set[int]] = defaultdict(set)
    for index, label in enumerate(teacher):
        exact[plain(label)].add(index)
        for other in also_called(label):
            loose[other].add(index)
    columns: list[int] = []
    lacking = []
    for label in data:
        found = exact[plain(label)] or set().union(*(loose[x] | exact[x] for x in (plain(label), *also_called(label))))
        if len(found) == 1:
            columns += found
        elif found:
            several = ", ".join(f"{teacher[i]} ({i})" for i in sorted(found)[:3])
            raise UserError(f"--teacher {name} has several classes called {label}: {several}; --teacher-classes FILE")
        else:
            lacking.append(label)
    if lacking:
        raise UserError(
            f"--teacher {name} lacks {len(lacking)} of --data's {len(data)} classes: {', '.join(lacking[:5])}"
            f"{', ...' if len(lacking) > 5 else ''}; --teacher-classes FILE says what it calls them"
        )
    twice = [data[i] for i, column in enumerate(columns) if columns.count(column) > 1]
    if twice:
        raise UserError(f"--teacher {name} has one class for {' and '.join(twice[:3])}: --teacher-classes FILE")
    return columns


def plain(label: str) -> str:
    return " ".join(unicodedata.normalize("NFC", label).casefold().replace("_", " ").replace("-", " ").split())


def also_called(label: str) -> list[str]:
    """The other names of ImageNet's class of a WordNet id: n01440764 is a tench, or Tinca tinca."""
    return imagenet_names().get(label, [])


@functools.cache
def imagenet_names() -> dict[str, list[str]]:
    info = ImageNetInfo()
    return {label: [plain(x) for x in info.label_name_to_description(label).split(",")] for label in info.label_names()}


def read_classes(file: str, data: list[str]) -> list[str]:
    """What --teacher-classes says of each class of the data: the teacher's name for it, or its column."""
    rows = [[cell.strip() for cell in row] for row in read_csv(Path(file), "the teacher's classes")]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong:
        raise UserError(f"{file}: {','.join(wrong)!r}; expected a class of --data, a comma, what the teacher calls it")
    told = dict(rows)
    missing = [label for label in data if label not in told]
    if missing:
        raise UserError(f"{file} lacks {len(missing)} classes of --data: {', '.join(missing[:5])}")
    return [told[label] for label in data]

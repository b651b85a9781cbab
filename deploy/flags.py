"""Read the flags of train.py from one table, add a recipe, and reject flags that contradict each other.

    typed = read_flags(FLAGS, argv)                       # only the flags on the command line
    args, given = settle_flags(FLAGS, typed, saved)       # defaults < recipe < resumed run < command line

This module does not import torch, because that takes seconds, and `--help` and errors about flags must be fast. It is
in deploy/ because every module of kdlite imports torch.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deploy.cli import LARGEST, Parser, UserError, is_code, student_folder
from deploy.config import read_config

Table = dict[str, dict[str, "Flag"]]  # group -> name -> flag
BY_RECIPE = "by recipe"  # the default of a flag that every recipe sets
# Values that only recipes and pretrained weights set.
RECIPE_ONLY: dict[str, Any] = dict(
    eval_crop=1.0, interpolation="bilinear", random_erasing=0.0, warmup_epochs=0.0, freeze_batch_norm=False
)
RENAMED = {"kd_temperature": "temperature", "init": "pretrained"}  # name in older run directories -> present name
# Former flags, and the only value that train.py still supports; None: any value, because the flag has no effect.
FORMER = dict(momentum=0.9, channels_last=True, timeout=None, log_interval=None, data_dir=None, download=None)
# Flags that a resume cannot change.
AT_THE_START = ("val_split", "fold", "pretrained", "tap", "small_stem", "model_args")

CNN = dict(
    epochs=100, batch_size=256, opt="momentum", lr=0.1, weight_decay=1e-4, schedule="step",
    step_epochs=[30, 60, 90], step_factor=0.1, img_size=224, crop="resized", hflip=0.5, eval_crop=0.875,
)  # fmt: skip
CIFAR = dict(
    epochs=200, batch_size=128, opt="momentum", lr=0.1, weight_decay=5e-4, schedule="step",
    step_epochs=[60, 120, 160], step_factor=0.2, img_size=32, crop="pad", hflip=0.5, small_stem=True,
    gamma=3.5, temperature=3.0, alpha=0.1, mu=0.1,
)  # fmt: skip
# Groups of defaults; any flag overrides them. cifar, imagenet-cnn and imagenet-vit: the schedules and hyperparameters
# of the paper's tables (arXiv 2303.13005 and its official configs). crd: the protocol of Tian et al., arXiv 1910.10699.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(
        epochs=10, batch_size=32, opt="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=1,
        step_epochs=[5, 8], step_factor=0.1, img_size=32, crop="pad", hflip=0.0,
    ),
    "cifar": CIFAR,
    "crd": CIFAR | dict(
        epochs=240, batch_size=64, lr=0.05, step_epochs=[150, 180, 210], step_factor=0.1, small_stem=False,
    ),
    "imagenet-cnn": CNN,
    "imagenet-mobilenet": CNN | dict(
        epochs=300, lr=0.045, weight_decay=4e-5, step_epochs=list(range(1, 300)), step_factor=0.98,
    ),
    "imagenet-vit": dict(
        epochs=300, batch_size=1024, opt="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=5,
        step_epochs=[150, 225], step_factor=0.1, img_size=224, crop="resized", hflip=0.5, eval_crop=0.9,
        interpolation="bicubic", mixup=0.8, cutmix=1.0, label_smoothing=0.1, randaugment=[2, 9], random_erasing=0.25,
        gamma=1.0,
    ),
}  # fmt: skip
BY_DATA = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar"}  # for a folder see pick_recipe
LARGE = 100_000  # smallest number of training images for imagenet-cnn
STEPS = 12_000  # optimizer steps of a run on a smaller folder, from random weights
FINE_TUNING_STEPS = 600  # the same from pretrained weights, with a classifier that starts as a linear probe


class Flag:
    """Describe a flag of a command.

    Args:
        default: the value if neither the command line nor a recipe sets it
        help: its line in --help
        needs: the name of another flag that must be set, then its allowed values; without values: any value
        path: whether the value may be a path; read_flags makes it absolute, because a resume may start elsewhere
        options: more arguments of argparse.add_argument
    """

    def __init__(self, default: Any, help: str, needs: Sequence[str] = (), path: bool = False, **options: Any) -> None:
        self.default, self.help, self.needs, self.path, self.options = default, help, needs, path, options


# ---- the command line ---------------------------------------------------------------------------------------------


def get_parser(table: Table, doc: str, program: str) -> argparse.ArgumentParser:
    """Return a parser that stores only the flags on the command line."""
    short = {name: dict(recipe) for name, recipe in RECIPES.items()}
    for recipe in short.values():
        if len(recipe["step_epochs"]) > 9:
            recipe["step_epochs"] = f"[{recipe['step_epochs'][0]}, ..., {recipe['step_epochs'][-1]}]"
    lines = [f"{name}: {', '.join(f'{k} {v}' for k, v in recipe.items())}" for name, recipe in short.items()]
    about, epilog = doc.partition("\n\n")[0], f"Recipes. {'; '.join(lines)}"
    parser = Parser(prog=program, description=about, epilog=epilog, argument_default=argparse.SUPPRESS)
    for title, flags in table.items():
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            defaults = [] if flag.default in (None, False, [], BY_RECIPE) else [str(flag.default)]
            defaults += [BY_RECIPE] if any(name in recipe for recipe in RECIPES.values()) else []
            suffix = f" (default: {', or '.join(defaults)})" if defaults and "default:" not in flag.help else ""
            group.add_argument(option(name), help=flag.help + suffix, **flag.options)
    return parser


def read_flags(table: Table, argv: Sequence[str] | None, doc: str = "", program: str = "train.py") -> dict[str, Any]:
    """Return the flags on the command line by name, with absolute paths."""
    typed = vars(get_parser(table, doc, program).parse_args(argv))
    for name, flag in by_name(table).items():
        value = typed.get(name)
        if value == "" or (isinstance(value, list) and "" in value):
            raise UserError(f"{option(name)} is empty: give a value, or leave the flag out")
        if flag.path and isinstance(value, list):
            typed[name] = [absolute(item) for item in value]
        elif flag.path and isinstance(value, str) and value not in (*BY_DATA, *flag.options.get("choices", ())):
            typed[name] = absolute_model(value) if name in ("model", "teacher") else absolute(value)
    if typed.get("resume") and not typed.get("output"):
        raise UserError("--resume needs --output, the run directory to resume")
    return typed


def by_name(table: Table) -> dict[str, Flag]:
    return {name: flag for flags in table.values() for name, flag in flags.items()}


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def absolute(name: str) -> str:
    """Return the absolute path of an existing path, with ~ as the home folder; return any other name unchanged."""
    path, function = (name.rpartition(":")[0], ":" + name.rpartition(":")[2]) if is_code(name) else (name, "")
    path = os.path.expanduser(path)
    if os.path.lexists(path) and path not in ("nkd", "kd"):
        return os.path.abspath(path) + function
    model, _, file = name.partition(":")  # --teacher MODEL:FILE
    return f"{model}:{absolute(file)}" if file and not function else name


def absolute_model(name: str) -> str:
    """Return the absolute path of an existing path. A name without a / that a library's model has stays unchanged."""
    if os.sep not in name and os.path.exists(name):
        from deploy.student import is_library_model  # only now, because it imports torch

        return name if is_library_model(name) else absolute(name)
    return absolute(name)


def is_path_of_folder(model: str) -> bool:
    return os.path.isabs(model) and os.path.isdir(model)  # read_flags makes paths absolute


# ---- defaults < recipe < resumed run < command line: the later one overrides ----------------------------------------


def settle_flags(
    table: Table, typed: dict[str, Any], saved: dict[str, Any] | None = None, fitted: dict[str, Any] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the value of every flag, and the flags that a run directory stores.

    Raise UserError if flags contradict each other, if one has no effect, or if a resume cannot change one.

    Args:
        typed: as read_flags returns them
        saved: the second result of this function, as the run to resume stored it
        fitted: the recipe for a folder of images (pick_recipe). Without it `args.recipe` is None for such a folder,
            and the values of the recipe are not set yet.
    """
    flags = by_name(table)
    saved = check_saved(table, flags, saved, typed) if saved else {}
    given = saved | {name: typed[name] for name in typed if name not in ("resume", "output")}
    if fitted is not None:
        given["fitted"] = fitted
    defaults = RECIPE_ONLY | {name: flag.default for name, flag in flags.items()}
    args = argparse.Namespace(**{name: value for name, value in (defaults | given | typed).items() if name != "fitted"})
    check_methods(args, typed, flags)
    args.recipe = args.recipe or BY_DATA.get(args.data) or ("fitted" if "fitted" in given else None)
    if args.recipe is None:
        return args, given
    recipe = given["fitted"] if args.recipe == "fitted" else RECIPES[args.recipe]
    vars(args).update({name: value for name, value in recipe.items() if name not in given})
    if "temperature" not in given:
        args.temperature = 4.0 if vars(args).get("kd") == "kd" else recipe.get("temperature", 1.0)
    args.time_limit = read_duration(args.epochs)
    epochs, args.epochs = args.epochs, recipe["epochs"]
    if not args.time_limit:
        stretch_epochs(args, epochs, fixed=given)  # the recipe's milestones keep their place in a shorter run
    settle_size(args, given)
    if "kd" in args:
        check_values(args)
    return args, given


def read_duration(text: Any) -> float | None:
    """Return the seconds of a text such as 90s, 30min or 1.5h; None if it is not a time."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text) if isinstance(text, str) else None
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]] if found else None


def stretch_epochs(args: argparse.Namespace, epochs: int, fixed: Iterable[str] = ()) -> None:
    """Set args.epochs, and move warm-up and milestones in proportion, except those whose names are in `fixed`."""
    stretch, args.epochs = epochs / args.epochs, epochs
    if "step_epochs" not in fixed:
        args.step_epochs = [epoch * stretch for epoch in args.step_epochs]
    if "warmup_epochs" not in fixed:
        args.warmup_epochs *= stretch


def check_saved(table: Table, flags: dict[str, Flag], saved: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Return the stored flags of a run under their present names; raise UserError for flags that cannot be resumed."""
    saved = {RENAMED.get(name, name): value for name, value in saved.items()}
    known = {*flags, "fitted", *(name for recipe in RECIPES.values() for name in recipe)}
    for name in saved.keys() - known:
        if name not in FORMER or FORMER[name] not in (None, saved[name]):
            unknown = f"{option(name)[:80]} {repr(saved[name])[:80]}"
            fault = f"the run was started with {unknown}, which this train.py does not have"
            raise UserError(f"{fault}: start a new run")
    named = saved.get("recipe") or BY_DATA.get(str(saved.get("data", "digits")))
    recipe = saved["fitted"] if isinstance(saved.get("fitted"), dict) else RECIPES.get(str(named), {})
    for name, flag in flags.items():
        value = saved.get(name)
        values = value if isinstance(value, list) else [value]
        code = next((value for value in values if flag.path and is_code(value)), None)
        if code and name not in typed:
            fault = f"the run was started with code, {option(name)} {code}: give that flag again"
            raise UserError(f"{fault}; train.py runs code only if the command line names it")
        before = saved.get(name, recipe.get(name, flag.default))
        if saved and name in AT_THE_START and typed.get(name, before) != before:
            fault = f"{option(name)} was {before} when this run began"
            raise UserError(f"{fault}, and a resume cannot change it: leave the flag out, or start a new run")
    saved = {name: value for name, value in saved.items() if name in known}
    if "fitted" in saved:
        saved["fitted"] = check_recipe(table, saved["fitted"])
    return check_recipe(table, saved, needed=())


def check_recipe(table: Table, values: Any, needed: Iterable[str] = CNN) -> dict[str, Any]:
    """Check stored values with the parser of the command line and return them; raise UserError if one is invalid."""
    if not isinstance(values, dict) or not set(needed) <= values.keys():
        raise UserError("args.json of the run is damaged: its recipe lacks values; restore it, or start a new run")
    flags, argv = by_name(table), list[str]()
    for name, value in values.items():
        if name not in flags:
            template: Any = next((group[name] for group in (RECIPE_ONLY, *RECIPES.values()) if name in group), {})
            if not is_like(value, template):
                raise UserError(f"args.json of the run is damaged: {name} is {repr(value)[:80]}")
        elif value is True and flags[name].options.keys() & {"action", "const"}:
            argv += [option(name)]
        elif value is False and flags[name].options.get("action") == argparse.BooleanOptionalAction:
            argv += [f"--no-{option(name)[2:]}"]
        elif value is None or value is False or value == []:  # only a default can have these values
            defaults = [flags[name].default, *(recipe[name] for recipe in RECIPES.values() if name in recipe)]
            if not any(value == default and type(value) is type(default) for default in defaults):
                raise UserError(f"args.json of the run is damaged: {name} is {value}")
        elif isinstance(value, list):
            argv += [option(name), *map(str, value)]
        else:
            argv += [f"{option(name)}={value}"]
    try:
        return values | vars(get_parser(table, "", "args.json").parse_args(argv))
    except UserError as error:
        raise UserError(f"args.json of the run is damaged: {error}") from error


def is_like(value: Any, template: Any) -> bool:
    """Return whether a value has the type of the template: a finite number, a list of numbers, a text, a dictionary."""
    if isinstance(template, list):
        return isinstance(value, list) and len(value) > 0 and all(is_like(item, template[0]) for item in value)
    if isinstance(template, (int, float)) and not isinstance(template, bool):
        return isinstance(value, (int, float)) and abs(value) <= LARGEST
    return isinstance(value, type(template))


def settle_size(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Set args.img_size to [height, width]. If the model is a student/ folder, the default is its size."""
    if is_path_of_folder(args.model) and "img_size" not in given:
        channels, *args.img_size = read_config(student_folder(Path(args.model))).input_size
        args.in_chans = args.in_chans if "in_chans" in given else channels
    args.img_size = [args.img_size] * 2 if isinstance(args.img_size, int) else list(args.img_size) * 2
    if len(args.img_size) not in (2, 4):
        raise UserError("--img-size takes one number, or height and width")
    args.img_size = args.img_size[:2]


# ---- checks ------------------------------------------------------------------------------------------------------


def check_methods(args: argparse.Namespace, typed: dict[str, Any], flags: dict[str, Flag]) -> None:
    """Raise UserError if the flags of methods and models contradict each other."""
    if "kd" in args:
        if args.teacher_labels and (not args.kd or args.teacher):
            raise UserError("--teacher-labels needs --kd, without --teacher")
        if args.kd in ("nkd", "kd") and not (args.teacher or args.teacher_labels):
            raise UserError(f"--kd {args.kd} needs --teacher: a model name, a run's student/ folder or file.py:build")
        if args.teacher and not args.kd:
            raise UserError("--teacher needs --kd: nkd, kd or file.py:function")
    for name in sorted(typed.keys() & flags.keys()):
        if flags[name].needs:
            other, *values = flags[name].needs
            if not getattr(args, other) or (values and getattr(args, other) not in values):
                raise UserError(f"{option(name)} needs {option(other)} {' or '.join(values)}".rstrip())
    if is_path_of_folder(args.model):
        if typed.keys() & {"model_args", "small_stem"}:
            raise UserError("--model is a student/ folder, which has its own arguments and stem")
        if args.pretrained:
            raise UserError("--model is a folder with weights and --pretrained is set: use one of them")


def check_values(args: argparse.Namespace) -> None:
    """Raise UserError if the values of the training flags, with those of the recipe, contradict each other."""
    if args.teacher_labels:
        args.random_erasing = 0.0  # the stored labels are for whole images; RunFolder prints a line
        mixing = [f"--{name} 0" for name in ("mixup", "cutmix") if getattr(args, name)]
        mixing += ["--cache none"] * (args.cache == "device")
        if mixing:
            raise UserError(f"stored labels need single images, each with its own crop: give {' '.join(mixing)}")
    if args.unlabelled and (args.mixup or args.cutmix):
        raise UserError("--unlabelled: an image without a label cannot be mixed: give --mixup 0 --cutmix 0")
    if args.unlabelled and args.self_kd:
        raise UserError("--unlabelled and --self-kd: USKD needs a label for each image; leave one of these flags out")
    if args.epochs <= args.warmup_epochs:
        fault = f"--warmup-epochs {args.warmup_epochs:g} must be below --epochs, which is {args.epochs}"
        raise UserError(f"{fault}: give fewer warm-up epochs, or more epochs")
    if args.cache == "device" and (args.crop == "resized" or (args.randaugment and args.randaugment[0])):
        raise UserError("--cache device crops and flips whole batches: give --crop pad or none, and --randaugment 0 0")
    size = os.environ.get("WORLD_SIZE", "1")
    processes = int(size) if size.isdecimal() else 1
    if args.batch_size % (max(1, processes) * args.grad_accum):
        passes = f"processes x --grad-accum = {processes} x {args.grad_accum}"
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of {passes}")


# ---- a recipe for a folder of images --------------------------------------------------------------------------------


def pick_recipe(
    images: int, classes: int, size: tuple[int, int], pretrained: bool, img_size: Sequence[int] | None = None
) -> tuple[dict[str, Any], str]:
    """Return a recipe that fits a folder of photographs, and a line that explains it.

    With random weights, 100,000 or more images of at least 100 px get imagenet-cnn. Any other folder gets AdamW, a
    cosine schedule, and batches of 16 to 64 images (32 from about 2,500 images, fewer than 16 if the folder has
    fewer). Its epochs make about STEPS or FINE_TUNING_STEPS steps, within limits.

    Args:
        images: number of training images
        classes: number of classes
        size: (height, width) of a typical image, in pixels
        pretrained: whether the student starts from pretrained weights; the recipe leaves their mean, std, interpolation
            and crop unchanged
        img_size: a side, or height and width, of the student's images; None: chosen by `size`
    """
    short = min(size)
    seen = f"defaults for {images} images of {classes} classes, {size[1]}x{size[0]} pixels"
    if images >= LARGE and short >= 100 and not pretrained:
        return RECIPES["imagenet-cnn"], f"{seen}: as imagenet-cnn"
    # pretrained weights expect objects of 100 pixels and more, so small photographs are enlarged
    wanted = max(128.0, 2.5 * short) if pretrained else short
    side = min(img_size) if img_size else min(max(32, 32 * round(wanted / 32)), 224)
    batch_size = 2 ** min(max(round(math.log2(3.2 * images**0.25)), 4), 6, int(math.log2(images)))
    steps, fewest, most, lr = (FINE_TUNING_STEPS, 5, 30, 2e-4) if pretrained else (STEPS, 30, 200, 2e-3)
    epochs = min(max(round(steps / (images // batch_size)), fewest), most)
    small_stem = side <= 64 and not pretrained
    recipe: dict[str, Any] = dict(epochs=epochs, batch_size=batch_size, lr=lr, img_size=side, small_stem=small_stem)
    recipe |= dict(warmup_epochs=epochs / 20, step_epochs=[epochs / 2, epochs * 3 / 4], step_factor=0.1)
    recipe |= dict(opt="adamw", weight_decay=0.05, schedule="cosine", hflip=0.5, label_smoothing=0.1)
    recipe |= dict(crop="resized", eval_crop=0.875) if side > 64 else dict(crop="pad", eval_crop=1.0)
    if pretrained:  # batch norms have poor statistics after few images: freezing gains 9 points (examples/paper/LOG.md)
        recipe |= dict(freeze_batch_norm=True)
    start = (
        "pretrained weights with frozen batch norms" if pretrained else "a 3x3 stem" if small_stem else "random weights"
    )
    length = f"{epochs} epochs of {images // batch_size} steps of {batch_size} images"
    return recipe, f"{seen}: {start} at {side} px, AdamW {lr:g}, cosine, {length}"

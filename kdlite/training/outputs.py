"""Write the files of a run for people and for deploy/: student, model card, metrics, curves, pictures, log.txt."""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from deploy.cli import ProgressBar, UserError, is_code, prepare_streams, printable, write_whole
from deploy.confidence import ANSWERED, FEWEST, fit_confidence
from deploy.config import Metadata, read_config
from deploy.flags import RECIPES, option
from deploy.per_class import save, shortened, write_per_class
from deploy.reference import evenly, keep_reference
from deploy.run_directory import SPLIT, claim, describe, locked, open_in_run, write_split
from deploy.runtimes import RunOn, load
from deploy.student import is_folder
from kdlite import WithWeakHead
from kdlite.training.checkpoint import Checkpoint, Progress, changed_since
from kdlite.training.data import Data, class_counts
from kdlite.training.distributed import IS_MAIN, WORLD_SIZE, StopRequest, from_rank_zero, log, peak_memory
from kdlite.training.loading import Samples, data_loader, eval_view

SHOWN = 12  # a run with at most this many classes prints the size of each class
IMBALANCE = 10  # ratio of class sizes from which a run prints advice about class weights

# ---- the run directory --------------------------------------------------------------------------------------------


class RunFolder:
    """Make, lock and fill the directory of a run, on rank 0.

    given: the flags that a resumed run uses again; resumed: the checkpoint of a resumed run
    """

    def __init__(
        self,
        args: argparse.Namespace,
        given: dict[str, Any],
        data: Data,
        device: torch.device,
        resumed: Checkpoint | None = None,
    ) -> None:
        self.args, self.given, self.data, self.device, self.resumed = args, given, data, device, resumed
        self.at_the_end = ExitStack()

    def __enter__(self) -> RunFolder:
        self.path: Path = from_rank_zero(self.begin)
        return self

    def begin(self) -> Path:
        """Make the directory, lock it, and open log.txt; store the flags of a new run."""
        path = claim(self.args.output, self.args.model, "-".join(added_losses(self.args)) or "ce", self.args.resume)
        self.at_the_end.enter_context(locked(path))
        if self.args.resume and changed_since(self.resumed, path):
            raise UserError(f"another process saved a checkpoint in {path} while this run started: start it again")
        for partial in (*path.glob(".*.partial"), *path.glob("student/.*.partial")):  # of a run killed while it saved
            shutil.rmtree(partial, ignore_errors=True)
        Tee.log = self.at_the_end.enter_context(open_in_run(path / "log.txt", "a"))
        Tee.log.write("".join(Tee.early))
        if not self.resumed:
            self.store_flags(path)
        return path

    def store_flags(self, path: Path) -> None:
        """Write args.json and split.csv; a resumed run calls this after it has accepted its flags."""
        if self.data.split:
            write_split(path / SPLIT, self.data.split)
        cpu = f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu
        write_whole(path / "args.json", describe(vars(self.args), self.given, name, WORLD_SIZE))

    def report_start(self, config: Metadata, net: nn.Module, amp: torch.dtype | None, progress: Progress) -> None:
        """Print model, method and data, and whether the run resumes; open TensorBoard's file.

        The file loses the rows that a resumed run repeats.
        """
        if not IS_MAIN:
            return
        args, student = self.args, net.model if isinstance(net, WithWeakHead) else net
        millions = sum(p.numel() for p in student.parameters()) / 1e6
        teacher = args.teacher or config.training["teacher"]
        method = config.training["method"] + (f" with {teacher}" if teacher else "")
        method += f" at {net.tap}, {net.pooling}" if isinstance(net, WithWeakHead) else ""
        more = f" ({self.data.unlabelled} of them without a label)" if self.data.unlabelled else ""
        sizes = f"{len(self.data.train)} training{more} and {len(self.data.val)} validation images"
        machine = f"{WORLD_SIZE} x {self.device}, {str(amp or torch.float32).removeprefix('torch.')}"
        of_classes = f"{sizes} of {config.num_classes} classes"
        log(f"{args.model} ({millions:.2f} M parameters), {method}; {of_classes}; {machine} -> {self.path}")
        if args.teacher_labels and RECIPES.get(args.recipe, {}).get("random_erasing"):
            log("random erasing is off: the stored labels are about whole images")
        log(describe_balance(self.data, args.class_weights is not None))
        if self.resumed:
            log(f"resuming from {self.resumed.file}, {progress}")
            former, new = self.resumed.content["args"], vars(args)
            names = [x for x in self.given if x in former and x not in ("epochs", "output", "resume")]
            changed = [f"{option(x)} {former[x]} -> {new[x]}" for x in names if former[x] != new[x]]
            if changed and progress.epoch < args.epochs:
                log(f"changed by this resume: {', '.join(changed)}")
            if progress.epoch >= args.epochs:
                log(f"the run has finished its {args.epochs} epochs; a larger --epochs continues it")
        elif args.resume:
            log(f"no checkpoint in {args.output} yet: a new run starts")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.path), purge_step=progress.epoch + 1 if self.resumed else None)
        self.at_the_end.callback(self.board.close)

    def report_epoch(self, row: dict[str, Any]) -> None:
        """Print the row of an epoch, and add it to TensorBoard."""
        if not IS_MAIN:
            return
        terms = [f"{name[5:]} {value:.3f}" for name, value in row.items() if name.startswith("loss_")]
        each = f" ({', '.join(terms)})" if len(terms) > 1 else ""
        skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
        left = describe_left((self.args.epochs - row["epoch"]) * row["seconds"], "  ")
        log(
            f"epoch {row['epoch']}/{self.args.epochs}  loss {row['train_loss']:.3f}{each}  "
            f"top-1 {row['val_top1']:.2f} %  top-5 {row['val_top5']:.2f} %  lr {row['lr']:.2g} at the start  "
            f"{row['images_per_s']:.0f} images/s  {row['seconds']:.1f} s{skipped}{left}"
        )
        for name, value in row.items():
            self.board.add_scalar(name, value, row["epoch"])

    def report_stop(self, stop: StopRequest, progress: Progress) -> None:
        log(f"stopped by {stop} {progress}: {self.path}/last.pt is saved, --resume continues")

    def write_metrics(self, rows: list[dict[str, Any]]) -> Callable[[], None]:
        """Return a function that writes the whole metrics.csv, because a resume may remove rows or add columns."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        return functools.partial(write_whole, self.path / "metrics.csv", text.getvalue())

    def show_batch(self, images: np.ndarray, labels: torch.Tensor) -> None:
        """Write batch.png: the first images as the network gets them, uint8 (N, H, W, C)."""
        if IS_MAIN:
            batch_picture(self.path / "batch.png", images, labels.cpu().numpy(), self.data.label_names)

    def finish(self, progress: Progress, started: float) -> None:
        """Write the files about the whole run: curves, accuracy by class, confidence and reference.npz."""
        if not IS_MAIN or not progress.rows:
            return
        plot_curves(self.path / "curves.png", progress.rows, len(self.data.label_names))
        if progress.answers is not None:
            labels, predictions = progress.answers.numpy()
            print(*write_per_class(self.path, labels, predictions, self.data.label_names), sep="\n")
        if not (self.path / "student").is_dir():
            return log("no student is saved, because no epoch had a finite validation loss")
        own = [self.args.model] if is_code(self.args.model) else self.args.model_file
        epochs = len(progress.rows)
        log(keep_confidence(self.path / "student", self.data.val, self.device, self.args.workers, own, epochs))
        if self.args.reference:
            log(keep_reference(self.path, self.data.val, self.data.train, self.args.reference, own))
        best = f"best {progress.best:.2f} %"
        if progress.answers is None:
            best = "no best epoch on the new validation images"
        top1 = f"last top-1 {progress.rows[-1]['val_top1']:.2f} %, {best} -> {self.path}/student"
        peak = f"{peak_memory(self.device)} MiB of {'GPU memory' if self.device.type == 'cuda' else 'memory'} at most"
        log(f"{top1}; {time.monotonic() - started:.0f} s, {peak}")
        files = "".join(f" --model-file {shlex.quote(name)}" for name in own)
        log(f"next: python -m deploy.export {shlex.quote(str(self.path))}{files}")

    def __exit__(self, *error: Any) -> None:
        if error[0] is KeyboardInterrupt and IS_MAIN and (self.path / "last.pt").exists():
            log(f"\n{self.path}/last.pt is kept; --resume continues from it")
        if isinstance(error[1], Exception):
            self.at_the_end.pop_all()  # log.txt stays open for the line of the error
        else:
            Tee.log = None
            self.at_the_end.close()


class Tee:
    """Copy lines to a stream and to log.txt, even after the stream's terminal or pipe has closed."""

    log: Any = None  # the open log.txt of this process, for both streams
    early: ClassVar[list[str]] = []  # texts from before log.txt is open

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if IS_MAIN and "\r" not in text:  # a text with "\r" comes from a progress bar
            with contextlib.suppress(OSError, ValueError):
                (self.log.write if self.log else self.early.append)(text)
        self.forward(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        if self.log:
            with contextlib.suppress(OSError, ValueError):
                self.log.flush()
        self.forward(self.stream.flush)

    def forward(self, method: Callable[..., Any], *values: Any) -> None:
        try:
            method(*values)
        except (OSError, ValueError):  # ValueError: the stream was closed
            with contextlib.suppress(Exception):  # otherwise the interpreter fails at its last flush
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def tee() -> Iterator[None]:
    """Replace stdout and stderr by Tees."""
    prepare_streams()
    before = sys.stdout, sys.stderr
    Tee.early.clear()
    sys.stdout, sys.stderr = Tee(sys.stdout), Tee(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if Tee.log:
            Tee.log.close()
        Tee.log = None


def describe_left(seconds: float, before: str = "") -> str:
    """Return the remaining time of a run as a text, or "" for less than a minute. before: text in front of it"""
    if seconds < 60:
        return ""
    left = f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"
    return f"{before}about {left} left for the whole run"


def describe_balance(data: Data, weighted: bool) -> str:
    """Return lines for the user: class sizes, advice if they differ much, and the part of one image in top-1."""
    counts, names = class_counts(data.train), [printable(name) for name in data.label_names]
    few, many = (pick(range(len(counts)), key=counts.__getitem__) for pick in (min, max))
    each = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
    span = f"from {counts[few]} ({names[few]}) to {counts[many]} ({names[many]})"
    lines = [f"training images of each class: {each if len(counts) <= SHOWN else span}"]
    if counts[many] >= IMBALANCE * max(1, counts[few]) and not weighted:
        sizes = f"{counts[many]} training images of {names[many]}, {counts[few]} of {names[few]}"
        lines.append(f"{sizes}: --class-weights balanced gives each class the same share of the loss")
    images = len(data.val)
    lines.append(f"{images} validation images: one image is {100 / images:.2g} points of top-1")
    return "\n".join(lines)


def added_losses(args: argparse.Namespace) -> list[str]:
    return [name.rpartition(":")[2] for name in (args.kd, args.self_kd) if name]


def describe_training(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Return the field `training` of the student's config.json."""
    smoothing = f" with label smoothing {args.label_smoothing:g}" if args.label_smoothing else ""
    weights = "ImageNet weights" if args.pretrained is True else os.path.basename(args.pretrained or "random")
    weights = str(Path(*Path(args.model).parts[-2:])) if is_folder(args.model) else weights
    about = {"data": os.path.basename(args.data), "train_images": len(data.train), "val_images": len(data.val)}
    about |= {"unlabelled": data.unlabelled} if data.unlabelled else {}
    about |= {"method": " + ".join([f"cross-entropy{smoothing}", *added_losses(args)])}
    about |= {"teacher": args.teacher and os.path.basename(args.teacher), "began": weights, "epochs": args.epochs}
    return about


# ---- pictures -----------------------------------------------------------------------------------------------------


def plot_curves(path: Path, rows: list[dict[str, Any]], classes: int) -> None:
    """Write losses and accuracies over the epochs as a PNG, with the accuracy by chance."""
    from matplotlib.figure import Figure  # imported here, because each data loading process imports this module
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [name for name in rows[-1] if "loss" in name]
    for axis, names in ((left, losses), (right, ["val_top1", "val_top5"])):
        for name in names:
            values = [row.get(name, math.nan) for row in rows]
            axis.plot([row["epoch"] for row in rows], values, marker="o", markersize=3, label=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.axhline(
        100 / classes, color="0.5", linestyle="--", linewidth=1, label=f"top-1 by chance, {100 / classes:.3g} %"
    )
    left.set(title="losses (val: on the validation images)", xlabel="epoch", ylabel="loss")
    right.set(title="accuracy on the validation images", xlabel="epoch", ylabel="accuracy (%)", ylim=(0, None))
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    save(path, figure)


def batch_picture(path: Path, images: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> None:
    """Write the first 32 images of a batch with their labels as a PNG.

    Args:
        images: uint8 (N, H, W, 3) or (N, H, W, 1)
        labels: class indices (N,), or class probabilities (N, C); the picture shows the two largest
    """
    from matplotlib.figure import Figure

    count = min(len(images), 32)
    columns = min(count, 8)
    height, width = images.shape[1:3]
    gap, line = max(1, width // 16), max(1, width // 8)  # between images; height of a caption line
    step = height + gap + 2 * line, width + gap
    # one picture on one axis, because 32 axes take 1.25 seconds
    grid = np.full((math.ceil(count / columns) * step[0], columns * step[1], 3), 255, np.uint8)
    figure = Figure(figsize=(1.6 * columns, 1.6 * columns * grid.shape[0] / grid.shape[1]))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for i, label in enumerate(labels[:count]):
        top, left = i // columns * step[0] + 2 * line, i % columns * step[1]
        grid[top : top + height, left : left + width] = images[i]
        where = {"x": left + width / 2 - 0.5, "y": top - 0.5 - line / 4}
        axis.text(s=caption(label, label_names), ha="center", va="bottom", parse_math=False, fontsize=7, **where)
    axis.imshow(grid, interpolation="nearest", aspect="auto")
    save(path, figure)


def caption(label: Any, label_names: Sequence[str]) -> str:
    """Return the name of a class, or of the two most probable classes with percentages; (no label) for an index < 0."""
    shares = np.asarray(label)
    if shares.ndim == 0:
        return shortened(label_names[int(shares)]) if shares >= 0 else "(no label)"
    largest = [i for i in np.argsort(-shares, kind="stable")[:2] if shares[i] > 0]
    if len(largest) == 1:
        return shortened(label_names[largest[0]])
    return "\n".join(f"{shortened(label_names[i], 18)} {100 * shares[i]:.0f} %" for i in largest)


# ---- the student and its model card -------------------------------------------------------------------------------


def save_student(folder: Path, model: nn.Module, config: Metadata, later: bool = False) -> Callable[[], None]:
    """Write the files of the plain student, without weak head and optimizer, for deploy/ and for sharing.

    later: copy the weights now, and write the files when the caller calls the returned function
    """
    # copies, because safetensors refuses layers that share their weights
    plain: dict[str, Any] = dict(copy=True, memory_format=torch.contiguous_format)
    weights = safetensors_bytes({name: x.detach().to("cpu", **plain) for name, x in model.state_dict().items()})
    content = {"format": 2} | config.to_json()
    if config.library == "timm":  # timm needs these to prepare images, and to find the first and the last layer
        known = timm.get_pretrained_cfg(config.architecture).to_dict()
        kept = {k: known[k] for k in ("first_conv", "classifier", "fixed_input_size", "pool_size") if k in known}
        names = ("input_size", "num_classes", "mean", "std", "interpolation", "label_names")
        kept |= {name: getattr(config, name) for name in names} | {"crop_pct": config.crop}
        content["pretrained_cfg"] = kept
    write = functools.partial(write_student, folder, weights, content, model_card(config))
    if not later:
        write()
    return write


def write_student(folder: Path, weights: bytes, content: dict[str, Any], card: str) -> None:
    write_whole(folder / "model.safetensors", weights)
    write_description(folder, content, card)


def write_description(folder: Path, content: dict[str, Any], card: str) -> None:
    """Write config.json and README.md; a README.md without MARK belongs to the user and stays."""
    write_whole(folder / "config.json", json.dumps(content, indent=2) + "\n")
    file = folder / "README.md"
    if not file.exists() or MARK in file.read_text(encoding="utf-8", errors="replace"):
        write_whole(file, card)


MOST, MOST_LOGITS = 10_000, 10**7  # limits of the fit: validation images, images times classes


def keep_confidence(
    folder: Path, val: Any, device: torch.device, workers: int | None, model_files: Sequence[str], epochs: int
) -> str:
    """Fit temperature and threshold of a finished student on validation images, and store them in its config.json.

    folder: the student/ folder; val: (image, class index); the fit uses at most MOST of them, evenly spaced
    epochs: number of epochs of the finished run, which config.json stores too

    Returns:
        Lines for the user.
    """
    student = load(folder, RunOn(device.type, model_files=tuple(model_files)))
    classes = len(student.metadata.label_names)
    indices = evenly(len(val), max(FEWEST, min(MOST, MOST_LOGITS // classes)))
    samples = Samples(val, functools.partial(eval_view, metadata=student.metadata))
    loader = data_loader(samples, [(0, index) for index in indices], 64, workers, pin_memory=False)
    logits, labels = [np.empty((0, classes), np.float32)], [np.empty(0, np.int64)]
    for batch in ProgressBar(loader, "temperature", len(indices), 64, unit="images"):
        if batch.images is not None:
            logits.append(student.run(batch.images.permute(0, 2, 3, 1).contiguous().numpy()))
            labels.append(batch.labels.numpy())
    found = fit_confidence(np.concatenate(logits), np.concatenate(labels), replace(student.metadata, temperature=None))
    config = read_config(folder)
    about = config.training | {"epochs": epochs}
    config = replace(config, training=about, temperature=found.temperature, threshold=found.threshold)
    write_description(folder, config.to_json(), model_card(config))
    return found.description


MARK = "<!-- Written by kdlite at every save of the student, until this line is removed. -->"
LOADING = {
    "timm": """\
```python
import timm

model = timm.create_model("local-dir:student", pretrained=True).eval()  # this folder; hf-hub:USER/NAME once uploaded
```
""",
    "torchvision": """\
```python
import json, torchvision
from safetensors.torch import load_model

config = json.load(open("student/config.json"))  # this folder
model = torchvision.models.get_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
load_model(model, "student/model.safetensors")
model.eval()
```
""",
    "file": "The network is built by code that is not in this folder: the function `{architecture}`.\n",
    "changed": "Its first layers are not the library's own: `deploy.student.load_student` of kdlite loads it.\n",
}


def model_card(config: Metadata) -> str:
    """Return the README.md of a student/ folder: Markdown under the Hugging Face Hub's metadata header."""
    about, metrics = config.training, config.metrics
    library = config.library if config.library in ("timm", "torchvision") else "kdlite"
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-classification", "license: other"]
    lines += ["license_name: unknown", "tags:", "- image-classification", "- knowledge-distillation", "- kdlite", "---"]
    lines += [MARK, "", f"# {config.architecture}, {config.num_classes} classes", ""]
    lines += [f"Trained by kdlite: {about.get('method', 'method unknown')}.", ""]
    sizes = about.get("train_images", "?"), about.get("val_images", "?")
    size = "{} channels, {} x {} pixels".format(*config.input_size)
    facts = {
        "data": "{}, {} training and {} validation images".format(about.get("data", "unknown"), *sizes),
        "weights at the start": about.get("began", "random"),
        "teacher": about.get("teacher"),
        "epoch": f"{metrics.get('epoch', '?')}, the best of {about.get('epochs', '?')}",
        "input": f"{size}, {config.interpolation}, centre crop of {100 * config.crop:g} %",
        "mean and std of the normalisation": f"{config.mean}, {config.std}",
    }
    if "val_top1" in metrics:
        scores = f"top-1 {metrics['val_top1']:.2f} %, top-5 {metrics['val_top5']:.2f} %"
        facts["accuracy on the validation images"] = f"{scores} (n = {sizes[1]})"
    if config.temperature:
        facts["temperature"] = f"{config.temperature:g}, which divides the logits before the softmax"
    if config.threshold:
        share = f"{100 * ANSWERED:g} % of the validation images are above"
        facts["none of these"] = f"the answer if the largest probability is below {config.threshold:g}; {share}"
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += ["- licence of the weights: *to be filled in, here and in the header*"]
    lines += ["- licence of the data: *to be filled in*", "", "## Use", ""]
    changed = config.small_stem or (library == "torchvision" and config.input_size[0] != 3)
    kind = "changed" if changed and config.library != "file" else config.library
    lines += [LOADING[kind].replace("{architecture}", config.architecture)]
    names = ", ".join(map(json.dumps, config.label_names[:20]))
    more = f" and {config.num_classes - 20} more, in config.json" if config.num_classes > 20 else ""
    return "\n".join([*lines, f"Classes, in the order of the logits: {names}{more}.", ""])

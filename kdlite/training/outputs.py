"""What a person looks at before reading: the confusions of classes, and a batch as the network sees it. By matplotlib,
which is imported when a picture is drawn."""

from __future__ import annotations

import csv
import io
import json
import math
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
from safetensors.torch import save as safetensors_bytes
from torch import nn

from deploy.cli import write_whole
from deploy.per_class import save, shortened


def batch_picture(path: Path, images: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> None:
    """A PNG of a batch's first 32 images with their labels.

    Args:
        path: the file
        images: uint8 (N, H, W, 3) or (N, H, W, 1)
        labels: class indices (N,), or shares (N, C) where images are mixed: the two largest are told
        label_names: of the C classes
    """
    from matplotlib.figure import Figure

    count = min(len(images), 32)
    columns = min(count, 8)
    height, width = images.shape[1:3]
    gap, line = max(1, width // 16), max(1, width // 8)  # between images; of a caption, which has up to two
    step = height + gap + 2 * line, width + gap
    # one picture and one axis: 32 axes take a second and a quarter
    grid = np.full((math.ceil(count / columns) * step[0], columns * step[1], 3), 255, np.uint8)
    corners = [(i // columns * step[0] + 2 * line, i % columns * step[1]) for i in range(count)]
    for image, (top, left) in zip(images, corners):
        grid[top : top + height, left : left + width] = image
    figure = Figure(figsize=(1.6 * columns, 1.6 * columns * grid.shape[0] / grid.shape[1]))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.imshow(grid, interpolation="nearest", aspect="auto")
    for label, (top, left) in zip(labels, corners):
        where = {"x": left + width / 2 - 0.5, "y": top - 0.5 - line / 4}
        axis.text(s=caption(label, label_names), ha="center", va="bottom", parse_math=False, fontsize=7, **where)
    save(path, figure)


def caption(label: Any, label_names: Sequence[str]) -> str:
    """The name of a class, or of two with their shares in percent."""
    shares = np.asarray(label)
    if shares.ndim == 0:
        return shortened(label_names[int(shares)])
    largest = [i for i in np.argsort(-shares, kind="stable")[:2] if shares[i] > 0]
    if len(largest) == 1:
        return shortened(label_names[largest[0]])
    return "\n".join(f"{shortened(label_names[i], 18)} {100 * shares[i]:.0f} %" for i in largest)


# ---- the student, and its model card

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
    "file": "The network is built by code that does not come with it: the function `{architecture}`.\n",
}


def model_card(config: dict[str, Any]) -> str:
    """Markdown under a metadata header in YAML, of a student's config.json."""
    about, metrics = config.get("training", {}), config.get("metrics", {})
    quoted = json.dumps  # a JSON string is a YAML string
    library = config["library"] if config["library"] in ("timm", "torchvision") else "kdlite"
    data, sizes = about.get("data", "unknown"), (about.get("train_images", "?"), about.get("val_images", "?"))
    lines = [
        "---", f"library_name: {library}", "pipeline_tag: image-classification", "license: other",
        "license_name: unknown", "tags:", "- image-classification", "- knowledge-distillation", "- kdlite", "---", MARK,
        "", f"# {config['architecture']}, {config['num_classes']} classes", "",
        f"Trained by kdlite: {about.get('method', 'method unknown')}.", "",
    ]  # fmt: skip
    facts = {
        "data": "{}, {} training and {} validation images".format(data, *sizes),
        "weights began as": about.get("began", "noise"),
        "teacher": about.get("teacher"),
        "epochs": f"{metrics.get('epoch', '?')}, the best of {about.get('epochs', '?')}",
        "input": "{} channels, {} x {} pixels".format(*config["input_size"])
        + f", {config['interpolation']}, {100 * config['crop']:g} % of the resized side",
        "mean and std of the normalisation": f"{config['mean']}, {config['std']}",
    }
    if "val_top1" in metrics:
        facts["accuracy on the validation images"] = (
            f"top-1 {metrics['val_top1']:.2f} %, top-5 {metrics['val_top5']:.2f} % (n = {sizes[1]})"
        )
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += ["- licence of the weights: *to be filled in, here and in the header*"]
    lines += ["- licence of the data: *to be filled in*", "", "## Use", ""]
    plain = not config["small_stem"] and not (library == "torchvision" and config["input_size"][0] != 3)
    usable = config["library"] == "file" or plain
    lines += [LOADING[config["library"]].replace("{architecture}", config["architecture"])] if usable else [
        "Its first layers are not the library's own: `deploy.student.load_student` of kdlite loads it.\n"
    ]  # fmt: skip
    names = ", ".join(map(quoted, config["label_names"][:20]))
    more = f" and {config['num_classes'] - 20} more, in config.json" if config["num_classes"] > 20 else ""
    return "\n".join([*lines, f"Classes, in the order of the logits: {names}{more}.", ""])


def timm_config(config: dict[str, Any]) -> dict[str, Any]:
    """The block of config.json by which timm makes a model's images, and finds its first and last layers."""
    known = timm.get_pretrained_cfg(config["architecture"]).to_dict()
    kept = {key: known[key] for key in ("first_conv", "classifier", "fixed_input_size", "pool_size") if key in known}
    ours = {key: config[key] for key in ("input_size", "num_classes", "mean", "std", "interpolation", "label_names")}
    return kept | ours | {"crop_pct": config["crop"]}


def save_student(folder: Path, model: nn.Module, config: dict[str, Any], later: bool = False) -> Callable[[], None]:
    """Write what deploy/ needs and people share: the plain student, no weak head, no optimizer.

    later: write when what is returned is called; the weights are copied now
    """
    values = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = safetensors_bytes(values)
    whole = {"format": 2} | config | ({"pretrained_cfg": timm_config(config)} if config["library"] == "timm" else {})

    def write() -> None:
        write_whole(folder / "model.safetensors", weights)
        write_whole(folder / "config.json", json.dumps(whole, indent=2) + "\n")
        card = folder / "README.md"
        if not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace"):
            write_whole(card, model_card(config))

    if not later:
        write()
    return write


# ---- metrics


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """The whole file each time: a resumed run drops the rows after its checkpoint, and no row is half-written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))  # a resume may add some
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """What is printed of an epoch."""
    terms = ", ".join(f"{name[5:]} {value:.3f}" for name, value in row.items() if name.startswith("loss_"))
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f} ({terms})  "
        f"top-1 {row['val_top1']:.2f} %  top-5 {row['val_top5']:.2f} %  lr {row['lr']:.2g}  "
        f"{row['images_per_s']:.0f} images/s  {row['seconds']:.1f} s"
        + (f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else "")
    )


def resident_mib() -> int:
    """The most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak >> (20 if sys.platform == "darwin" else 10)


def plot_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Losses and accuracies over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses = [name for name in rows[-1] if "loss" in name]
    for axis, names, label in zip(figure.subplots(1, 2), (losses, ["val_top1", "val_top5"]), ("loss", "accuracy (%)")):
        for name in names:
            axis.plot([row["epoch"] for row in rows], [row.get(name, math.nan) for row in rows], label=name)
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend()
        axis.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())

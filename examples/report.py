"""Write one page that compares runs of train.py: a conclusion, sizes, curves, calibration, soft labels, mistakes.

    python examples/report.py runs/*                     # writes runs/report.html, one file

The command reads args.json, metrics.csv and student/ of each run. It also reads these files, if they exist:
reference.npz (for calibration, mistakes and sample images), the reference.npz of the teacher's run (for the teacher's
answers), confusion.png, last.pt (for the paired comparison), and student/benchmark.json of deploy.benchmark. A section
prints the name of a missing file.
"""

import argparse
import base64
import csv
import html
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.cli import UserError, command, make_parser, student_folder, write_whole  # noqa: E402
from deploy.confidence import BINS, Calibration, calibration  # noqa: E402
from deploy.config import read_config  # noqa: E402
from deploy.per_class import shortened  # noqa: E402
from deploy.reference import NAME, Reference, read_reference  # noqa: E402
from deploy.run_directory import SPLIT  # noqa: E402
from deploy.runtimes import softmax  # noqa: E402
from kdlite.training.launch import gain  # noqa: E402

matplotlib.rcParams["text.parse_math"] = False  # a name of a run may contain dollar signs

SAMPLES, BARS, MISTAKES = 6, 5, 24
SIDE = 160  # largest side of an image on the page, pixels
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2, h3, p { overflow-wrap: anywhere } h1 { font-size: 1.6rem } .conclusion { font-size: 1.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top } td { white-space: nowrap }
thead th { border-bottom: 2px solid #888 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 0; max-width: 100% } figcaption { font-size: .8rem; overflow-wrap: anywhere }
svg, img.wide { max-width: 100%; height: auto } .photo { width: 6rem; image-rendering: pixelated }
.bar { display: grid; grid-template-columns: 4.5rem 4rem 2.5rem; gap: .3rem; font-size: .8rem; align-items: center }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap } .bar b { font-weight: normal }
.bar i { background: #4878a8; height: .7rem; display: block } .bar.target i { background: #d08030 }
.remark { color: #555 } .grid { display: flex; flex-wrap: wrap; gap: 1rem } .photos figure { width: 7rem }
.panels figure { width: 15rem }
"""


class Run(NamedTuple):
    name: str  # name of the folder, or its path if another run has the same name
    folder: Path
    flags: dict[str, Any]  # of args.json
    epochs: list[int]
    top1: list[float]  # after each epoch, %
    labels: list[str]  # names of the classes
    temperature: float | None  # of config.json
    reference: Reference | None
    missing: str  # the reason why the reference is missing, else ""
    seconds: float = 0.0  # of training and validation; 0: metrics.csv has no seconds
    answers: np.ndarray | None = None  # (2, N): labels and predictions of the validation images in the best epoch
    split: str = ""  # content of split.csv

    @property
    def method(self) -> str:
        kd, smoothing = self.flags.get("kd"), self.flags.get("label_smoothing")
        smoothed = f"label smoothing {smoothing:g}" if smoothing else None
        own = kd and kd.rpartition("/")[2]  # of path/to/file.py:function
        return " + ".join(filter(None, [own, self.flags.get("self_kd"), smoothed])) or "cross-entropy"

    @property
    def model(self) -> str:
        return str(self.flags["model"]).rpartition("/")[2]

    @property
    def images(self) -> tuple[Any, ...]:
        """Return the identity of the validation images: runs with an equal identity are compared image by image."""
        assert self.answers is not None
        return self.flags.get("data"), self.split, *self.labels, self.answers[0].tobytes()

    @property
    def right(self) -> np.ndarray:
        """Return 1 for each validation image that the student of the best epoch classifies correctly, else 0."""
        assert self.answers is not None
        return np.asarray(self.answers[0] == self.answers[1], float)


def read_run(folder: Path, name: str = "") -> Run | None:
    """Return a run; None if the folder is not a run or has no finished epoch."""
    try:
        flags = json.loads((folder / "args.json").read_text(encoding="utf-8"))["flags"]
        with open(folder / "metrics.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        epochs, top1 = [int(row["epoch"]) for row in rows], [float(row["val_top1"]) for row in rows]
        seconds = sum(float(row.get("seconds") or 0) for row in rows)
        config = read_config(folder / "student")
        flags["model"]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    reference, missing = None, ""
    try:
        reference = read_reference(folder / "student", None, "train.py --output RUN --resume writes it")
    except UserError as error:
        missing = str(error)
    split = (folder / SPLIT).read_text(encoding="utf-8") if (folder / SPLIT).exists() else ""
    about = config.label_names, config.temperature, reference, missing, seconds, read_answers(folder), split
    return Run(name or folder.name, folder, flags, epochs, top1, *about) if epochs else None


def read_answers(folder: Path) -> np.ndarray | None:
    """Return labels and predictions (2, N) of the best epoch from last.pt; None if the file has none."""
    try:
        answers = torch.load(folder / "last.pt", weights_only=True, mmap=True)["progress"]["answers"].numpy()
    except Exception:  # torch and pickle raise many exceptions for a damaged file
        return None
    return answers if answers.ndim == 2 and len(answers) == 2 and answers.size else None


def size_of(run: Run) -> tuple[float, float] | None:
    """Return the millions of parameters and the MB of model.safetensors; None if the file is missing or damaged."""
    file = run.folder / "student/model.safetensors"
    try:
        with safe_open(file, "numpy") as weights:
            tensors = [(name, weights.get_slice(name)) for name in weights.keys()]  # noqa: SIM118 - not a dict
            floats = [x for name, x in tensors if "F" in x.get_dtype() and ".running_" not in name]
            return sum(int(np.prod(x.get_shape())) for x in floats) / 1e6, file.stat().st_size / 1e6
    except Exception:  # safetensors has its own exception, which is not an OSError
        return None


def calibration_of(run: Run, temperature: float | None) -> Calibration:
    """Return the calibration of a run's student on its reference images."""
    assert run.reference is not None
    p = softmax(run.reference.logits / (temperature or 1.0))
    return calibration(p.max(1), p.argmax(1) == run.reference.labels)


def teachers_logits(run: Run) -> tuple[np.ndarray | None, str]:
    """Return the teacher's logits on the run's reference images and ""; or None and the reason.

    The logits come from the reference.npz of the teacher's own run, if that file has the same images.
    """
    teacher = run.flags.get("teacher")
    if run.flags.get("teacher_labels"):
        return None, "The teacher is not shown: its stored labels belong to other images. "
    if not teacher or run.reference is None:
        return None, ""
    try:
        known = read_run(student_folder(Path(teacher)).parent)
    except UserError:
        known = None
    if known is None or known.reference is None or known.labels != run.labels:
        return None, "The teacher is not shown: its run was not found, or has no reference.npz with these classes. "
    if not np.array_equal(known.reference.images, run.reference.images):
        return None, "The teacher is not shown: the reference of its run has other images, or another size. "
    return known.reference.logits, ""


def without_target(weights: np.ndarray, target: int) -> np.ndarray:
    """Return the weights of the other classes, normalised to a sum of 1."""
    weights = np.where(np.arange(len(weights)) == target, 0.0, weights)
    return weights / weights.sum()


def soft_label(run: Run, teacher: np.ndarray | None, index: int) -> tuple[str, np.ndarray] | None:
    """Return an image's soft label: its weights in words, and its values (C,) over the classes except the target."""
    assert run.reference is not None
    target, flags = int(run.reference.labels[index]), run.flags
    if flags.get("kd") == "nkd" and teacher is not None:
        power = flags["temperature"]
        words = f"T_t {softmax(teacher[index])[target]:.2f}; the others N(T), weight {flags['gamma'] * power**2:g}"
        return words, without_target(softmax(teacher[index] / power), target)
    if flags.get("self_kd"):
        student = softmax(run.reference.logits)
        squares = student[np.arange(len(student)), run.reference.labels] ** 2
        ranks = 1 + np.argsort(np.argsort(-student[index], kind="stable"), kind="stable")
        words = f"P_t {1 + squares[index] - squares.mean():.2f}; the others N(Z), weight {flags['beta']:g}"
        return words, without_target(1 / ranks, target)
    return None


def bars(values: np.ndarray, labels: list[str], target: int) -> str:
    """Return the largest values as HTML, one line for each class: name, bar, number."""
    lines = []
    for i in np.argsort(-values, kind="stable")[:BARS]:
        lines.append(
            f'<div class="bar{" target" * int(i == target)}"><span>{html.escape(labels[i])}</span>'
            f'<b><i style="width:{100 * values[i]:.0f}%"></i></b><span>{values[i]:.2f}</span></div>'
        )
    return "".join(lines)


def picture(content: bytes, alternative: str, style: str, kind: str = "png") -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{style}" alt="{html.escape(alternative)}" src="data:image/{kind};base64,{data}">'


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """Return an image, uint8 (H, W, 3) or (H, W, 1), as a PNG or JPEG file with sides of at most SIDE pixels."""
    image, content = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(content, kind, quality=85)
    return content.getvalue()


def remark(text: str) -> str:
    return f'<p class="remark">{html.escape(text)}</p>'


def scrolling(head: str, rows: list[str]) -> str:
    """Return a table that scrolls inside its own box if the screen is narrow."""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def samples(run: Run) -> str:
    """Return a table with one reference image for each of the first classes: teacher, student, soft label."""
    title = f"<h3>{html.escape(run.name)} ({html.escape(run.method)})</h3>"
    if run.reference is None:
        return title + remark(run.missing)
    teacher, remarks = teachers_logits(run)
    if run.flags.get("self_kd"):
        remarks += (
            "Here the order of the classes in N(Z) comes from the student alone. In training it also comes from the "
            "weak head, which no file stores. "
            "The mean in P_t is over the reference images here, and over a batch in training. "
        )
    rows, heads = (
        [],
        ["image"] + ["the teacher answers"] * (teacher is not None) + ["the student answers", "soft label"],
    )
    for index in sorted(np.unique(run.reference.labels, return_index=True)[1])[:SAMPLES]:
        target, pixels = int(run.reference.labels[index]), run.reference.images[index]
        label = soft_label(run, teacher, index)
        cells = [
            picture(encoded(pixels, "PNG"), run.labels[target], "photo") + f"<br>{html.escape(run.labels[target])}",
            *([bars(softmax(teacher[index]), run.labels, target)] if teacher is not None else []),
            bars(softmax(run.reference.logits[index]), run.labels, target),
            *([f"{html.escape(label[0])}{bars(label[1], run.labels, target)}"] if label else []),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{x}</th>" for x in heads[: len(cells)])
    remarks += "The first reference image of each of the first classes; orange: the true class."
    return title + remark(remarks) + scrolling(head, rows)


def mistakes(run: Run) -> str:
    """Return at most MISTAKES reference images that the student classifies wrongly, the most certain first."""
    title = f"<h2>Mistakes: {html.escape(run.name)}</h2>"
    if run.reference is None:
        return title + remark(run.missing)
    images, labels, logits = run.reference[:3]
    p = softmax(logits / (run.temperature or 1.0))
    wrong = np.flatnonzero(p.argmax(1) != labels)
    shown = wrong[np.argsort(-p.max(1)[wrong], kind="stable")][:MISTAKES]
    cells = []
    for index in shown:
        true, taken = run.labels[labels[index]], run.labels[p[index].argmax()]
        caption = f"{true}, taken for {taken}, {100 * p[index].max():.0f} %"
        cells.append(
            f"<figure>{picture(encoded(images[index], 'JPEG'), caption, 'photo', 'jpeg')}"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    count = f"The student is wrong on {len(wrong)} of the {len(labels)} validation images of {NAME}"
    about = f"{count}. {len(shown)} are shown as the network gets them, the most certain answers first."
    return f'{title}{remark(about)}<div class="grid photos">{"".join(cells)}</div>'


@contextmanager
def plot(
    body: list[str], alternative: str, size: tuple[float, float] = (5.4, 3.8), caption: str = ""
) -> Iterator[plt.Axes]:
    """Yield axes to draw on, and append them to the page as an inline SVG. alternative: the text for screen readers."""
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = f'<div role="img" aria-label="{html.escape(alternative)}">{svg[svg.index("<svg") :]}</div>'
    body.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")


def comparable(runs: list[Run]) -> list[Run]:
    """Return the runs of the largest group with the same validation images, the best first; [] if each is alone."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.answers is not None:
            groups.setdefault(run.images, []).append(run)
    group = max(groups.values(), key=len, default=[])
    return sorted(group, key=lambda run: -run.right.mean()) if len(group) > 1 else []


def conclusion(runs: list[Run]) -> tuple[str, str]:
    """Return the first line of the page, with the better run, and a remark about the figures."""
    group = comparable(runs)
    compared = {run.name for run in group}
    without = [run.name for run in runs if run.answers is None]
    others = [run.name for run in runs if run.answers is not None and run.name not in compared]
    reasons = [f"last.pt of {', '.join(without)} has no answers"] * bool(without)
    reasons += [f"{', '.join(others)}: other validation images"] * (bool(others) and len(runs) - len(without) > 1)
    if len(runs) == 1:
        return f"{runs[0].name} ({runs[0].method}) reaches a top-1 of {with_error(runs[0])}", "One run is shown."
    if not group:
        return f"No paired comparison: {'; '.join(reasons)}", "The table below compares nothing image by image."
    best, second = group[:2]
    points, error = gain(best.right, second.right)
    figure = f"{points:.1f} ± {error:.1f} points"
    text = f"{best.name} is ahead of {second.name} by {figure}"
    if points <= 2 * error:
        difference = f"by {figure}, which is at most two standard errors"
        text = f"{best.name} and {second.name} do not differ significantly: {difference}"
    text += speed(best, second)
    about = (
        f"Top-1 of the best epochs on the same {len(best.right)} validation images; ± is one standard error of the "
        "paired difference over these images. Another seed can change the result by more. "
    )
    return text, about + (f"Not compared: {'; '.join(reasons)}." if reasons else "")


def with_error(run: Run) -> str:
    """Return the best top-1 of a run, with its standard error if the answers to the images are stored."""
    top1 = max(run.top1)
    if run.answers is None:
        return f"{top1:.1f} %"
    images = len(run.right)
    error = (top1 * (100 - top1) / images) ** 0.5
    return f"{top1:.1f} ± {error:.1f} % on {images} validation images (± is one standard error)"


def speed(best: Run, second: Run) -> str:
    """Return the end of the conclusion, with the faster of two runs; "" if their times cannot be compared."""
    file = shared_file([best, second])
    if file is None:
        return ""
    ratio = timings(second)[file]["p50_ms"] / timings(best)[file]["p50_ms"]
    if 1 / 1.05 < ratio < 1.05:
        return "; both are equally fast"
    fast, slow, times = (best, second, ratio) if ratio > 1 else (second, best, 1 / ratio)
    return f"; {fast.name} is {times:.1f} times as fast as {slow.name} ({file[0]})"


def table(runs: list[Run]) -> str:
    """Return the first table: accuracy, speed, size and time of each run. A narrow screen shows the first columns."""
    group, file = comparable(runs), shared_file([run for run in runs if timings(run)])
    paired = {run.name: gain(group[0].right, run.right) for run in group[1:]}
    against = [f"behind {group[0].name}, points"] if group else []
    heads = ["top-1 %, best", *against, "ms", "MB", "parameters, M", "training, s", "epochs", "top-1 %, last"]
    lines = []
    for run in runs:
        behind = ["{:.1f} ± {:.1f}".format(*paired[run.name]) if run.name in paired else "-"] * len(against)
        millions, mb = size_of(run) or (None, None)
        numbers = [short(x) for x in (timings(run)[file]["p50_ms"] if file in timings(run) else None, mb, millions)]
        numbers = [f"{max(run.top1):.2f}", *behind, *numbers, f"{run.seconds:.0f}" if run.seconds else "-"]
        numbers += [str(run.epochs[-1]), f"{run.top1[-1]:.2f}"]
        cells = [run.name, *numbers, run.model, run.method]
        kinds = ["", *[" class=n"] * len(numbers), "", ""]
        lines.append(f"<tr>{''.join(f'<td{k}>{html.escape(x)}</td>' for k, x in zip(kinds, cells))}</tr>")
    names = ["run", *heads, "model", "trained with"]
    head = "".join(f"<th{k}>{html.escape(x)}</th>" for k, x in zip(kinds, names))
    about = "Top-1 on the validation images of each run. MB: model.safetensors. ms: "
    if file:
        about += f"median for one image, {describe_file(file)}, {file[4]}."
    else:
        about += "no kind of file was timed for all measured runs on one machine; use python -m deploy.benchmark RUN."
    return scrolling(head, lines) + remark(about)


def short(value: float | None) -> str:
    """Return a number with three digits, "-" for None."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def timings(run: Run) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows of deploy.benchmark that have batch 1 and an accuracy, by file, settings and machine."""
    try:
        known = json.loads((run.folder / "student/benchmark.json").read_text(encoding="utf-8"))
        rows, machine = known["rows"], known.get("machine", {})
        on = f"{machine.get('cpu', 'unknown CPU')}, GPU {str(machine.get('gpu', 'unknown')).partition(',')[0]}"
        rows = [row for row in rows if row.get("batch") == 1 and row.get("p50_ms") and row.get("top1") is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {(*(row.get(name) for name in ("artefact", "precision", "provider", "threads")), on): row for row in rows}


def shared_file(runs: list[Run]) -> tuple[Any, ...] | None:
    """Return the file that is timed alike in all runs and is fastest in the first one; None without such a file."""
    known = [timings(run) for run in runs]
    shared = [file for file in known[0] if all(file in rows for rows in known)] if known else []
    return min(shared, key=lambda file: known[0][file]["p50_ms"], default=None)


def describe_file(file: tuple[Any, ...]) -> str:
    artefact, precision, provider, threads, _ = file
    return f"{artefact}, {precision}, {provider}, {threads} thread{'s' * (threads != 1)}"


def curves(runs: list[Run]) -> list[str]:
    """Return top-1 over the epochs with the chance level; no plot if no run has two epochs."""
    if max(len(run.epochs) for run in runs) < 2:
        return []
    body = ["<h2>Accuracy over the epochs</h2>"]
    with plot(body, "top-1 by epoch of each run") as axes:
        for run in runs:
            axes.plot(run.epochs, run.top1, marker="o", markersize=3, label=run.name)
        for classes in sorted({len(run.labels) for run in runs}):
            label = f"chance: {100 / classes:.3g} % of {classes} classes"
            axes.axhline(100 / classes, color="0.5", linestyle="--", linewidth=1, label=label)
        axes.set(title="Top-1 on the validation images", xlabel="epoch", ylabel="top-1, %", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return body


RELIABILITY = (
    f"Each dot is a bin of images of {NAME}, and its size is their share. On the line, 80 % of the answers with a "
    "confidence of 80 % are right. Below the line the student is too confident. The error is the mean distance from "
    f"the line ({BINS} bins). The temperature divides the logits and changes no answer. It was "
    "fitted on half of the validation images. If they are few, it can make the error larger, above all on new images."
)


def reliability(runs: list[Run]) -> list[str]:
    """Return a small plot for each run with a reference: accuracy against confidence, before and after the fit."""
    runs = [run for run in runs if run.reference is not None]
    if not runs:
        return []
    body = ["<h2>Reliability: is a confident answer right?</h2>"]
    body.append(remark(RELIABILITY))
    body.append('<div class="grid panels">')
    for run in runs:
        known = [("#999", "as trained", calibration_of(run, None))]
        if run.temperature:
            about = f"with the temperature {run.temperature:.3g}"
            known.append(("#1f77b4", about, calibration_of(run, run.temperature)))
        errors = [
            f"{about} ({colour}) {100 * one.error:.1f} %" for (_, about, one), colour in zip(known, ("grey", "blue"))
        ]
        caption = f"error {', '.join(errors)}" + ("" if run.temperature else "; no temperature was fitted")
        with plot(body, f"accuracy against confidence of {run.name}", (2.5, 2.6), f"{run.name}: {caption}") as axes:
            axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
            for colour, _, one in known:
                axes.scatter(one.confidence, one.accuracy, 6 + 200 * one.share, color=colour, alpha=0.7, linewidth=0)
            axes.set(title=shortened(run.name), xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(-0.03, 1.03))
    return [*body, "</div>"]


def latencies(runs: list[Run]) -> list[str]:
    """Return top-1 against the time for one image of each measured file."""
    files = sorted({file for run in runs for file in timings(run)}, key=str)
    timed = [(i, files.index(file), row) for i, run in enumerate(runs) for file, row in timings(run).items()]
    body = ["<h2>Latency against accuracy</h2>"]
    if not timed:
        return [*body, remark(f"Not measured: run python -m deploy.benchmark RUN; the accuracy needs {NAME}.")]
    with plot(body, "top-1 against latency of each file", (5.4, 3.2 + 0.18 * len(timed))) as axes:
        for i, number, row in timed:
            label = f"{runs[i].name}: {describe_file(files[number])}"
            axes.plot(row["p50_ms"], row["top1"], f"C{i % 10}{'osD^v'[number % 5]}", label=label)
        title = "Top-1 against the median time for one image"
        axes.set(title=title, xlabel="ms", ylabel="top-1, %", xlim=(0, None))
    return body


SOFT_LABELS = (
    "With cross-entropy the target of the true class is 1, and the target of every other class is 0. A soft label also "
    "has a value for each other class: a 7 looks a little like a 1 and not at all like an 8. NKD takes the soft label "
    "from a teacher. T_t, the teacher's probability of the true class, is the weight of that class. N(T), the "
    "teacher's other probabilities scaled to a sum of 1, is the target for the other classes. USKD has no teacher. P_t "
    "comes from the student's own probability of the true class, and N(Z) from the order of its other classes. The "
    'number after "weight" multiplies the part of the loss about the other classes.'
)


def page(runs: list[Run]) -> str:
    """Return the whole page as HTML."""
    names = [run.name for run in runs]
    data = sorted({os.path.basename(str(run.flags["data"])) for run in runs if run.flags.get("data")})
    title = " against ".join(names) if len(names) < 4 else f"{len(names)} runs, from {names[0]} to {names[-1]}"
    title += f" on {' and '.join(data)}" if data else ""
    first, about = conclusion(runs)
    body = [f'<h1>{html.escape(title)}</h1><p class="conclusion"><b>{html.escape(first)}.</b></p>', remark(about)]
    body += [table(runs), *curves(runs), *reliability(runs)]
    distilled = [run for run in runs if run.flags.get("kd") == "nkd" or run.flags.get("self_kd")]
    if distilled:
        body += [
            "<h2>Soft labels: targets for the other classes</h2>",
            remark(SOFT_LABELS),
            *map(samples, distilled),
        ]
    for run in runs:
        file = run.folder / "confusion.png"
        if file.is_file():
            body.append(f"<h2>Confusions: {html.escape(run.name)}</h2>")
            body.append(picture(file.read_bytes(), f"confusion matrix of {run.name}", "wide"))
    body += [*map(mistakes, runs), *latencies(runs)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


parser = make_parser(__doc__, "report.py")
parser.add_argument("runs", nargs="+", type=Path, help="run directories; files among them are skipped")
parser.add_argument("-o", "--output", type=Path, help="the page (default: report.html next to the first run)")


def run(args: argparse.Namespace) -> None:
    missing = [str(path) for path in args.runs if not path.exists()]
    if missing:
        raise UserError(f"no folder {', '.join(missing)}")
    folders = [path for path in args.runs if path.is_dir()]
    times = Counter(folder.resolve().name for folder in folders)
    named = {folder: folder.resolve().name for folder in folders}
    found = {folder: read_run(folder, str(folder) if times[name] > 1 else name) for folder, name in named.items()}
    runs = [known for known in found.values() if known]
    if not runs:
        raise UserError(
            f"no run of train.py among {', '.join(map(str, args.runs))}: expected a folder with args.json, metrics.csv "
            "of at least one epoch, and student/"
        )
    for folder in (folder for folder, known in found.items() if not known):
        print(f"skipped: {folder} is not a run of train.py, or has no finished epoch", file=sys.stderr)
    output = args.output or Path(os.path.abspath(runs[0].folder)).parent / "report.html"
    write_whole(output, page(runs))
    print(output)


if __name__ == "__main__":
    sys.exit(command(parser, run))

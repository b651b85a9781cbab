"""Write one page about runs of train.py: table, curves, calibration, soft labels, confusions, mistakes, latency.

    python examples/report.py runs/*                     # writes runs/report.html, a file that needs no other

The command reads args.json, metrics.csv and student/ of each run. If they exist, it also reads reference.npz (for
calibration, mistakes and sample images), the reference.npz of the teacher's run (for the teacher's answers),
confusion.png, and student/benchmark.json of deploy.benchmark. A section without its file names the missing file.
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
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.cli import UserError, command, make_parser, student_folder, write_whole  # noqa: E402
from deploy.confidence import BINS, Calibration, calibration  # noqa: E402
from deploy.config import read_config  # noqa: E402
from deploy.reference import NAME, Reference, read_reference  # noqa: E402
from deploy.runtimes import softmax  # noqa: E402

SAMPLES, BARS, MISTAKES = 6, 5, 24
SIDE = 160  # largest side of an image on the page, pixels
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }
thead th { border-bottom: 2px solid #888 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
svg, img.wide { max-width: 100%; height: auto } .photo { width: 6rem; image-rendering: pixelated }
.bar { display: grid; grid-template-columns: 8rem 7rem 3rem; gap: .4rem; font-size: .8rem; align-items: center }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap } .bar b { font-weight: normal }
.bar i { background: #4878a8; height: .7rem; display: block } .bar.target i { background: #d08030 }
.remark { color: #666 } .grid { display: flex; flex-wrap: wrap; gap: .8rem }
.grid figure { margin: 0; width: 7rem; font-size: .8rem; overflow-wrap: anywhere }
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

    @property
    def method(self) -> str:
        kd, smoothing = self.flags.get("kd"), self.flags.get("label_smoothing")
        smoothed = f"label smoothing {smoothing:g}" if smoothing else None
        own = kd and kd.rpartition("/")[2]  # of path/to/file.py:function
        return " + ".join(filter(None, [own, self.flags.get("self_kd"), smoothed])) or "cross-entropy"

    @property
    def model(self) -> str:
        return str(self.flags["model"]).rpartition("/")[2]


def read_run(folder: Path, name: str = "") -> Run | None:
    """Return a run; None if the folder is not a run or has no finished epoch."""
    try:
        flags = json.loads((folder / "args.json").read_text(encoding="utf-8"))["flags"]
        with open(folder / "metrics.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        epochs, top1 = [int(row["epoch"]) for row in rows], [float(row["val_top1"]) for row in rows]
        config = read_config(folder / "student")
        flags["model"]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    reference, missing = None, ""
    try:
        reference = read_reference(folder / "student", None, "train.py --output RUN --resume writes it")
    except UserError as error:
        missing = str(error)
    about = config.label_names, config.temperature, reference, missing
    return Run(name or folder.name, folder, flags, epochs, top1, *about) if epochs else None


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
        return None, "The teacher is not shown: no run of it with a reference of the same classes was found. "
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


def samples(run: Run) -> str:
    """Return a table with one reference image for each of the first classes: teacher, student, soft label."""
    title = f"<h3>{html.escape(run.name)} ({html.escape(run.method)})</h3>"
    if run.reference is None:
        return title + remark(run.missing)
    teacher, remarks = teachers_logits(run)
    if run.flags.get("self_kd"):
        remarks += (
            "Z is ranked here by the student alone; in training also by the weak head, which is not stored. "
            "The mean in P_t is over the reference images here, and over a batch in training. "
        )
    rows = []
    for index in sorted(np.unique(run.reference.labels, return_index=True)[1])[:SAMPLES]:
        target, pixels = int(run.reference.labels[index]), run.reference.images[index]
        label = soft_label(run, teacher, index)
        cells = [
            picture(encoded(pixels, "PNG"), run.labels[target], "photo") + f"<br>{html.escape(run.labels[target])}",
            bars(softmax(teacher[index]), run.labels, target) if teacher is not None else "",
            bars(softmax(run.reference.logits[index]), run.labels, target),
            f"{html.escape(label[0])}{bars(label[1], run.labels, target)}" if label else "",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "<th>image</th><th>teacher T</th><th>student S</th><th>the loss's soft label</th>"
    remarks += "The first reference image of each of the first classes; the target's bars are orange."
    return f"{title}{remark(remarks)}<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


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
    count = f"{len(wrong)} of the {len(labels)} validation images of {NAME} are answered wrongly"
    about = f"{count}; {len(shown)} are shown as the network gets them, the most certain answers first."
    return f'{title}{remark(about)}<div class="grid">{"".join(cells)}</div>'


@contextmanager
def plot(body: list[str], alternative: str, size: tuple[float, float] = (8, 4.2)) -> Iterator[plt.Axes]:
    """Yield axes to draw on, and append them to the page as an inline SVG. alternative: the text for screen readers."""
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    body.append(f'<figure role="img" aria-label="{html.escape(alternative)}">{svg[svg.index("<svg") :]}</figure>')


def table(runs: list[Run], calibrations: dict[str, Calibration]) -> str:
    lines = []
    for run in runs:
        fitted = run.reference is not None and run.temperature
        error = f"{100 * calibration_of(run, run.temperature).error:.1f}" if fitted else "-"
        raw = f"{100 * calibrations[run.name].error:.1f}" if run.name in calibrations else "-"
        words = "".join(f"<td>{html.escape(x)}</td>" for x in (run.name, run.model, run.method))
        numbers = (run.epochs[-1], f"{run.top1[-1]:.2f}", f"{max(run.top1):.2f}", raw, error)
        lines.append(f"<tr>{words}{''.join(f'<td class=n>{x}</td>' for x in numbers)}</tr>")
    heads = "".join(f"<th>{x}</th>" for x in ("run", "model", "trained with"))
    heads += "".join(f"<th class=n>{x}</th>" for x in ("epochs", "top-1 %, last", "best", "ECE %", "with temperature"))
    sizes = sorted({len(run.reference.labels) for run in runs if run.reference is not None})
    images = f"{' or '.join(map(str, sizes))} images of {NAME}" if sizes else f"images of {NAME}, which no run has"
    about = (
        f"A run in each row, top-1 on its validation images. ECE: expected calibration error in {BINS} bins, on the "
    )
    about += f"{images}; with the temperature of config.json, which was fitted on validation images, next to it."
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>{remark(about)}"


def timings(run: Run) -> list[dict[str, Any]]:
    """Return the rows of deploy.benchmark that have batch 1 and an accuracy."""
    try:
        rows = json.loads((run.folder / "student/benchmark.json").read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if row.get("batch") == 1 and row.get("p50_ms") and row.get("top1") is not None]


def page(runs: list[Run]) -> str:
    """Return the whole page as HTML."""
    calibrations = {run.name: calibration_of(run, None) for run in runs if run.reference is not None}
    timed = [(run.name, row) for run in runs for row in timings(run)]
    distilled = [run for run in runs if run.flags.get("kd") or run.flags.get("self_kd")]
    body = ["<h1>Runs</h1><h2>Table</h2>", table(runs, calibrations), "<h2>Curves</h2>"]
    with plot(body, "top-1 by epoch of each run") as axes:
        for run in runs:
            axes.plot(run.epochs, run.top1, label=run.name)
        axes.set(xlabel="epoch", ylabel="top-1, %")
    if calibrations:
        body.append("<h2>Reliability</h2>")
        with plot(body, "accuracy against confidence of each run", (5, 5)) as axes:
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
            for name, known in calibrations.items():
                label = f"{name}, ECE {100 * known.error:.1f} %"
                axes.scatter(known.confidence, known.accuracy, 4 + 400 * known.share, alpha=0.6, label=label)
            axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        body.append(remark("A dot is a bin; its size is the bin's share of the images."))
    if distilled:
        body += ["<h2>Soft labels</h2>", *map(samples, distilled)]
    for run in runs:
        file = run.folder / "confusion.png"
        if file.is_file():
            body.append(f"<h2>Confusions: {html.escape(run.name)}</h2>")
            body.append(picture(file.read_bytes(), f"confusion matrix of {run.name}", "wide"))
    body += map(mistakes, runs)
    body.append("<h2>Latency against accuracy</h2>")
    if timed:
        with plot(body, "top-1 against latency of each file") as axes:
            for number, (name, row) in enumerate(timed):
                label = f"{name}/{row['artefact']}, {row['precision']}, {row['provider']}"
                axes.plot(row["p50_ms"], row["top1"], "osD^v"[number % 5], label=label)
            axes.set(xlabel="ms for an image, batch 1, median", ylabel="top-1, %", xlim=(0, None))
    else:
        body.append(remark(f"Not measured: run python -m deploy.benchmark RUN; the accuracy needs {NAME}."))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Runs</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'
    )


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

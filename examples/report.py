"""One page of any runs of train.py: curves, table, calibration, what the labels say, confusion, latency.

    python examples/report.py runs/*                     # runs/report.html, which needs nothing beside it

Takes what is there: metrics.csv and args.json of each run; reference.npz for calibration and sample images, a teacher's
answers where its run is there too; confusion.png; student/benchmark.json of deploy.benchmark. What is missing is said.
"""

import argparse
import base64
import csv
import html
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.cli import write_whole  # noqa: E402
from deploy.reference import NAME, Reference  # noqa: E402

SAMPLES, BARS, BINS = 6, 5, 15
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }
thead th { border-bottom: 2px solid #888 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
svg, img.wide { max-width: 100%; height: auto } .photo { width: 6rem; image-rendering: pixelated }
.bar { display: grid; grid-template-columns: 8rem 7rem 3rem; gap: .4rem; font-size: .8rem; align-items: center }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap } .bar b { font-weight: normal }
.bar i { background: #4878a8; height: .7rem; display: block } .bar.target i { background: #d08030 }
.said { color: #666 }
"""


class Run(NamedTuple):
    folder: Path
    flags: dict
    rows: list[dict[str, str]]  # metrics.csv
    labels: list[str]  # the classes' names
    reference: Reference | None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def method(self) -> str:
        return " + ".join(filter(None, [self.flags.get("kd"), self.flags.get("self_kd")])) or "cross-entropy"


def read_run(folder: Path) -> Run | None:
    """None where it is not a run, or not one whole epoch of it."""
    try:
        flags = json.loads((folder / "args.json").read_text())["flags"]
        with open(folder / "metrics.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        labels = json.loads((folder / "student/config.json").read_text(encoding="utf-8"))["label_names"]
    except (OSError, ValueError, KeyError):
        return None
    try:
        with np.load(folder / NAME, allow_pickle=False) as arrays:
            reference = Reference(**{name: arrays[name] for name in Reference._fields})
    except (OSError, ValueError, KeyError):
        reference = None
    return Run(folder, flags, rows, labels, reference) if rows else None


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def calibration(
    p: np.ndarray, labels: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Confidence, accuracy and share of the images of each bin that holds any, and the expected calibration error.

    p: probabilities (N, C); labels: (N,). The error, of Guo et al. 2017 (arXiv 1706.04599), is the mean over images of
    their bin's |accuracy - confidence|.
    """
    confidence, right = p.max(1), p.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    held = np.unique(which)
    means = np.array([[confidence[which == b].mean(), right[which == b].mean()] for b in held]).reshape(-1, 2)
    share = np.array([(which == b).mean() for b in held])
    return means[:, 0], means[:, 1], share, float((share * abs(means[:, 1] - means[:, 0])).sum())


def answers(teacher: str | None, run: Run) -> np.ndarray | None:
    """The teacher's logits of the run's reference images, where the teacher's own run has the same ones."""
    known = read_run(Path(teacher).parent) if teacher and run.reference is not None else None
    if known is None or known.reference is None or known.labels != run.labels:
        return None
    same = np.array_equal(known.reference.images, run.reference.images)
    return known.reference.logits if same else None


def without_target(weights: np.ndarray, target: int) -> np.ndarray:
    """Renormalised over the other classes."""
    weights = np.where(np.arange(len(weights)) == target, 0.0, weights)
    return weights / weights.sum()


def soft_label(run: Run, teacher: np.ndarray | None, index: int) -> tuple[str, np.ndarray] | None:
    """What stands at log S_t, in words, and the label of the other classes, (C,)."""
    assert run.reference is not None
    target = int(run.reference.labels[index])
    student = softmax(run.reference.logits)
    if run.flags.get("kd") == "nkd" and teacher is not None:
        power = run.flags["temperature"]
        return (f"target T_t {softmax(teacher[index])[target]:.2f}; the others N(T), weight {run.flags['gamma']:g}",
                without_target(softmax(teacher[index] / power), target))  # fmt: skip
    if run.flags.get("self_kd"):
        squares = student[np.arange(len(student)), run.reference.labels] ** 2
        zipf = 1.0 / (1 + np.argsort(np.argsort(-student[index], kind="stable"), kind="stable"))
        return (f"target P_t {1 + squares[index] - squares.mean():.2f}; the others N(Z), weight {run.flags['beta']:g}",
                without_target(zipf, target))  # fmt: skip
    return None


def bars(values: np.ndarray, labels: list[str], target: int) -> str:
    """The largest values as lines of a name, a bar and a number."""
    lines = []
    for i in np.argsort(-values, kind="stable")[:BARS]:
        lines.append(
            f'<div class="bar{" target" * int(i == target)}"><span>{html.escape(labels[i])}</span>'
            f'<b><i style="width:{100 * values[i]:.0f}%"></i></b><span>{values[i]:.2f}</span></div>'
        )
    return "".join(lines)


def picture(content: bytes, words: str, name: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{name}" alt="{html.escape(words)}" src="data:image/png;base64,{data}">'


def samples(run: Run) -> str:
    """The first reference image of each of the first classes: teacher, student and soft label side by side."""
    reference = run.reference
    if reference is None or not len(reference.images):
        return f'<p class="said">{html.escape(run.name)}: no {NAME}, no samples.</p>'
    teacher = answers(run.flags.get("teacher"), run)
    firsts = sorted(np.unique(reference.labels, return_index=True)[1])[:SAMPLES]
    rows = []
    for index in firsts:
        target = int(reference.labels[index])
        png = io.BytesIO()
        Image.fromarray(reference.images[index]).save(png, "PNG")
        cells = [
            picture(png.getvalue(), run.labels[target], "photo") + f"<br>{html.escape(run.labels[target])}",
            bars(softmax(teacher[index]), run.labels, target) if teacher is not None else "",
            bars(softmax(reference.logits[index]), run.labels, target),
        ]
        label = soft_label(run, teacher, index)
        cells.append(f"{html.escape(label[0])}{bars(label[1], run.labels, target)}" if label else "")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    said = ""
    if run.flags.get("self_kd"):
        said = "Z is ranked here by the student alone; in training the weak head, which is not kept, has its say too. "
    elif teacher is None and run.flags.get("kd"):
        said = "The teacher is not shown: its run, with the same reference images, is not there. "
    heads = "<th>image</th><th>teacher T</th><th>student S</th><th>the loss's soft label</th>"
    return (
        f"<h3>{html.escape(run.name)} ({html.escape(run.method)})</h3>"
        f"<p class='said'>{said}The first image of each class; the target's bars are orange.</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def drawn(draw: Callable[[plt.Axes], None], words: str, square: bool = False) -> str:
    """An SVG, inline."""
    figure, axes = plt.subplots(figsize=(5, 5) if square else (8, 4.2), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return f'<figure role="img" aria-label="{html.escape(words)}">{svg[svg.index("<svg") :]}</figure>'


def page(runs: list[Run]) -> str:
    """The whole page."""
    measured = [run for run in runs if run.reference is not None and len(run.reference.labels)]
    errors = {run.name: calibration(softmax(run.reference.logits), run.reference.labels) for run in measured}  # type: ignore[union-attr]

    table = []
    for run in runs:
        error = f"{100 * errors[run.name][3]:.1f}" if run.name in errors else "-"
        last, best = float(run.rows[-1]["val_top1"]), max(float(row["val_top1"]) for row in run.rows)
        words = [run.name, str(run.flags["model"]), run.method]
        numbers = [run.rows[-1]["epoch"], f"{last:.2f}", f"{best:.2f}", error]
        table.append(
            "".join(f"<td>{html.escape(x)}</td>" for x in words) + "".join(f'<td class="n">{x}</td>' for x in numbers)
        )
    heads = "".join(f"<th>{x}</th>" for x in ("run", "model", "trained with")) + "".join(
        f'<th class="n">{x}</th>' for x in ("epochs", "top-1 %, last", "best", "ECE %"))  # fmt: skip
    images = len(measured[0].reference.labels) if measured else 0  # type: ignore[union-attr]
    body = [
        f"<h2>Table</h2><table><thead><tr>{heads}</tr></thead><tbody>",
        *(f"<tr>{row}</tr>" for row in table),
        "</tbody></table><p class='said'>Top-1 on the validation images, one run each. ",
        f"ECE: expected calibration error in {BINS} bins, on the {images} images of {NAME}.</p>",
    ]

    def curves(axes: plt.Axes) -> None:
        for run in runs:
            axes.plot(
                [int(row["epoch"]) for row in run.rows], [float(row["val_top1"]) for row in run.rows], label=run.name
            )
        axes.set(xlabel="epoch", ylabel="top-1, %")

    def reliability(axes: plt.Axes) -> None:
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for name, (confidence, accuracy, share, error) in errors.items():
            axes.scatter(confidence, accuracy, 4 + 400 * share, alpha=0.6, label=f"{name}, ECE {100 * error:.1f} %")
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))

    body += ["<h2>Curves</h2>", drawn(curves, "top-1 by epoch of each run")]
    if errors:
        body += [
            "<h2>Reliability</h2>",
            drawn(reliability, "accuracy against confidence of each run", square=True),
            "<p class='said'>A dot a bin, as large as its share of the images.</p>",
        ]
    body += ["<h2>What the labels say</h2>", *(samples(run) for run in runs if run.method != "cross-entropy")]

    for run in runs:
        file = run.folder / "confusion.png"
        if file.is_file():
            body += [f"<h2>What is taken for what: {html.escape(run.name)}</h2>",
                     picture(file.read_bytes(), f"confusion matrix of {run.name}", "wide")]  # fmt: skip

    timed = []
    for run in runs:
        try:
            rows = json.loads((run.folder / "student/benchmark.json").read_text())["rows"]
            timed += [(run.name, row) for row in rows if row.get("batch") == 1 and row.get("p50_ms")]
        except (OSError, ValueError, KeyError):
            continue

    def latency(axes: plt.Axes) -> None:
        for number, (name, row) in enumerate(timed):
            label = f"{name}/{row['artefact']}, {row['precision']}, {row['provider']}"
            axes.plot(row["p50_ms"], row["top1"], "osD^v"[number % 5], label=label)
        axes.set(xlabel="ms an image, batch 1, median", ylabel="top-1, %", xlim=(0, None))

    body.append("<h2>Latency against accuracy</h2>")
    if timed:
        body.append(drawn(latency, "top-1 against latency of each file"))
    else:
        body.append("<p class='said'>Not measured: <code>python -m deploy.benchmark RUN</code> does.</p>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Runs</title>'
    text = "".join(body)
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>Runs</h1>{text}</body></html>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: report.html beside the first run")
    args = parser.parse_args()
    found = {folder: read_run(folder) for folder in args.runs if folder.is_dir()}
    runs = [run for run in found.values() if run]
    if not runs:
        parser.error(
            f"no run of train.py among {', '.join(map(str, args.runs))}: a folder with args.json and metrics.csv"
        )
    for folder in (folder for folder, run in found.items() if not run):
        print(f"left out: {folder} is no run of train.py, or has no whole epoch", file=sys.stderr)
    output = args.output or Path(os.path.abspath(runs[0].folder)).parent / "report.html"
    write_whole(output, page(runs))
    print(output)


if __name__ == "__main__":
    main()

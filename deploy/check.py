"""Is every artefact still the same classifier? One table over all of them.

    python -m deploy.check runs/001-mobilenet_v2-uskd                     # every artefact in student/
    python -m deploy.check runs/001-mobilenet_v2-uskd student.onnx        # these alone
    python -m deploy.check runs/001-mobilenet_v2-uskd --data              # on the run's whole validation set

The images and the student's own logits are those of the run's reference.npz: neither torch nor the data set is needed,
so that the device that will serve can ask. --data takes the whole validation set and asks torch, on a workstation.

Top-1 and top-5, the difference to torch's fp32 answers, how often the two agree on the class, the largest error of a
logit and the smallest cosine between two rows of logits, at batches of 1, 2, 5 and 64. Exit status 1 when an artefact
is outside the tolerance of its precision, cannot be run here, or was made from other weights. Written to check.json;
beside it, of torch's own answers, per_class.csv and confusion.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import (
    Parser,
    ProgressBar,
    UserError,
    add_device,
    add_json,
    add_quiet,
    command,
    first_line,
    make_folder,
    make_parser,
    need,
    note,
    student_folder,
    write_whole,
)
from deploy.config import read_config
from deploy.per_class import write_per_class
from deploy.reference import NAME, Reference, add_reference, evenly, read_reference
from deploy.runtimes import LOADERS, TORCH_KINDS, RunOn, Runtime, has_torch, load, products_saturate, source_of

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # uint8 (B, H, W, 3), class indices (B,), the student's logits (B, C)
BATCHES = (1, 2, 5, 64)
# What each precision may cost: largest error of a logit relative to the largest logit, smallest agreement in percent,
# largest loss of top-1 in points. fp32's and fp16's error: five times the worst of nine architectures
# (tests/deploy/test_deploy.py). On a GPU fp32 may be TF32, which has fp16's mantissa.
TOLERANCES = {
    "fp32": dict(error=1e-4, agreement=99.9, drop=0.1),
    "fp16": dict(error=3e-2, agreement=99.0, drop=0.5),
    "int8": dict(error=float("inf"), agreement=90.0, drop=2.0),
}
COLUMNS = {
    "artefact": "", "provider": "", "precision": "", "top1": ".2f", "top5": ".2f", "top1_difference": "+.2f",
    "agreement": ".2f", "max_abs_error": ".1e", "cosine": ".6f", "batches": "", "verdict": "",
}  # fmt: skip


class Tally:
    """Counts over batches of logits: accuracy, and what differs from the reference."""

    def __init__(self) -> None:
        self.images = self.top1 = self.top5 = self.agree = 0
        self.error, self.scale, self.cosine = 0.0, 0.0, 1.0

    def add(self, logits: np.ndarray, labels: np.ndarray, expected: np.ndarray) -> None:
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        hits = order == labels[:, None]
        self.images += len(labels)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.agree += int((order[:, 0] == expected.argmax(1)).sum())
        self.compare(logits, expected)

    def compare(self, logits: np.ndarray, expected: np.ndarray) -> None:
        norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
        self.error = float(np.maximum(self.error, np.abs(logits - expected).max()))  # a NaN stays
        self.scale = max(self.scale, float(np.abs(expected).max()))
        cosine = (logits * expected).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
        self.cosine = float(np.minimum(self.cosine, cosine.min()))

    def percent(self, count: int) -> float:
        return 100 * count / self.images


def check_artefacts(
    artefacts: list[Path],
    batches: Iterable[Batch],
    weights_sha256: str,
    torch_student: Runtime | None = None,
    on: RunOn = RunOn(),  # noqa: B008 - frozen
) -> list[dict[str, Any]]:
    """A row for the student itself and one for each artefact, with a verdict; see the module.

    Args:
        artefacts: files that deploy/ made of the student
        batches: validation images, their labels, and the student's own logits
        weights_sha256: of the student's weights
        torch_student: what computed the logits, if not reference.npz: it answers the same images at each batch size
        on: where the artefacts are run
    """
    provider = torch_student.provider if torch_student else "reference.npz"
    rows: list[dict[str, Any]] = [{"artefact": "student/", "provider": provider, "precision": "fp32"}]
    runtimes: dict[int, Runtime] = {}
    for artefact in artefacts:
        row: dict[str, Any] = {"artefact": artefact.name}
        rows.append(row)
        try:
            runtime = load(artefact, on)
            row |= {"provider": runtime.provider, "precision": runtime.metadata.precision}
            if runtime.metadata.source.get("weights_sha256") != weights_sha256:
                raise UserError("was made from other weights than this student's: export it again")
            runtimes[len(rows) - 1] = runtime
        except UserError as error:
            row["verdict"] = f"not checked: {error}"

    tallies = {0: Tally()} | {index: Tally() for index in runtimes}
    for images, labels, expected in batches:
        first = not tallies[0].images
        tallies[0].add(expected, labels, expected)
        for index, runtime in list(runtimes.items()):
            try:
                tallies[index].add(run_in_parts(runtime, images, max(BATCHES)), labels, expected)
                if first:
                    check_batches(runtime, images, expected, tallies[index])
            except Exception as error:  # each runtime has its own
                rows[index]["verdict"] = f"failed: {first_line(error)}"
                del runtimes[index]
    if not tallies[0].images:
        raise UserError("not one validation image could be read")

    for index in [0, *runtimes]:
        row, tally = rows[index], tallies[index]
        row |= {
            "top1": tally.percent(tally.top1),
            "top5": tally.percent(tally.top5),
            "top1_difference": tally.percent(tally.top1) - tallies[0].percent(tallies[0].top1),
            "agreement": tally.percent(tally.agree),
            "max_abs_error": tally.error,
            "cosine": tally.cosine,
            "images": tally.images,
        }
        if index:
            row["batches"] = " ".join(str(size) for size in sizes_of(runtimes[index]))
            row["verdict"] = judge(row, tally)
    return rows


def check_batches(runtime: Runtime, images: np.ndarray, expected: np.ndarray, tally: Tally) -> None:
    """The same answers at each batch size; the largest error goes into the tally."""
    picked = np.arange(max(BATCHES)) % len(images)
    for size in sizes_of(runtime):
        tally.compare(run_in_parts(runtime, images[picked], size), expected[picked])


def sizes_of(runtime: Runtime) -> list[int]:
    sizes = [size for size in BATCHES if size <= (runtime.max_batch or size)]
    return sizes if runtime.max_batch is None or runtime.max_batch in sizes else [*sizes, runtime.max_batch]


def run_in_parts(runtime: Runtime, images: np.ndarray, size: int) -> np.ndarray:
    """The logits of all images in batches of at most size, and of what the runtime takes."""
    size = min(size, runtime.max_batch or size)
    return np.concatenate([runtime.run(images[i : i + size]) for i in range(0, len(images), size)])


def judge(row: dict[str, Any], tally: Tally) -> str:
    """pass, or what is outside the tolerance."""
    on_gpu = "cpu" not in row["provider"].lower()
    precision = "fp16" if row["precision"] == "fp32" and on_gpu else row["precision"].partition("-")[0]
    allowed = TOLERANCES[precision]
    relative = tally.error / tally.scale
    faults = []
    if not relative <= allowed["error"]:
        faults.append(f"error {relative:.1e} of the largest logit > {allowed['error']:.0e}")
    if not row["agreement"] >= allowed["agreement"]:
        faults.append(f"agreement {row['agreement']:.2f} < {allowed['agreement']} %")
    if not -row["top1_difference"] <= allowed["drop"]:
        faults.append(f"top-1 loses {-row['top1_difference']:.2f} > {allowed['drop']} points")
    if faults and precision == "int8" and not on_gpu and products_saturate():
        faults.append("but 8-bit products saturate on this CPU, which has no VNNI (quantize --reduce-range)")
    return f"FAIL: {'; '.join(faults)}" if faults else "pass"


def reference_batches(reference: Reference) -> Iterator[Batch]:
    for start in range(0, len(reference.images), max(BATCHES)):
        part = slice(start, start + max(BATCHES))
        yield reference.images[part], reference.labels[part], reference.logits[part]


def validation_batches(
    student: Path, limit: int | None, data: str, data_dir: str | None, workers: int | None, torch_student: Runtime
) -> Iterator[Batch]:
    """The run's whole validation set, or an evenly spaced part; data: as of --data, "" for what args.json says.

    What the run split off for validation is what its split.csv says.
    """
    from kdlite.training.data import SPLIT, open_data, read_split  # torchvision's, on a workstation
    from kdlite.training.loading import CorruptCount, eval_view, image_progress, make_loader

    file, config = student.resolve().parent / "args.json", torch_student.metadata
    try:
        flags = json.loads(file.read_bytes())["flags"] if file.is_file() else {}
        name, folder = data or flags["data"], data_dir or flags.get("data_dir") or "data"
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "does not say" if file.is_file() else "is not there to say"
        raise UserError(f"{file} {what} where the run's images are: --data DATA does") from error
    source = open_data(name, folder, sides=read_split(file.with_name(SPLIT)))
    if [str(label) for label in source.label_names] != config.label_names:
        raise UserError(
            f"--data {name} has other classes than {student}: {', '.join(map(str, source.label_names[:3]))}, ... "
            f"and not {', '.join(config.label_names[:3])}, ..."
        )
    picked = None if limit is None else evenly(len(source.val), limit)
    view = functools.partial(eval_view, metadata=config)
    corrupt = CorruptCount("validation", len(source.val))
    loader = make_loader(source.val, view, max(BATCHES), False, workers=workers, indices=picked)
    for batch in image_progress(loader, "check"):
        corrupt.add(batch.corrupt)
        if batch.images is not None:
            pixels = np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy())
            yield pixels, batch.labels.numpy(), torch_student.run(pixels)


def find_artefacts(student: Path, names: list[str]) -> list[Path]:
    """Those named, as paths or as files of the student's folder; else all that the folder holds."""
    if not names:
        found = sorted(file for file in student.iterdir() if file.suffix in LOADERS and file.suffix)
        if found and not has_torch():
            left_out = [file for file in found if file.suffix in TORCH_KINDS]
            found = [file for file in found if file not in left_out]
            if left_out:
                note(f"left out, since torch is not installed: {', '.join(file.name for file in left_out)}")
        if not found:
            raise UserError(f"{student} has no artefact yet: python -m deploy.export {student}")
        return found
    paths = [Path(name) if Path(name).exists() else student / name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"no artefact {path.name}: neither a file of that name, nor in {student}")
    return paths


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as text, a column per key, numbers right, a missing value as -."""
    names = list(columns)
    cells = [names] + [
        [format(row[name], columns[name]) if row.get(name) is not None else "-" for name in names] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    left = [not columns[name] for name in names]
    return "\n".join(
        "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left)).rstrip()
        for line in cells
    )


def get_parser() -> Parser:
    parser = make_parser(__doc__, "check")
    add_quiet(parser)
    parser.add_argument("student", type=Path, help="a run's student/ folder, or the run directory")
    parser.add_argument("artefacts", nargs="*", help="files to check (default: all in the folder)")
    parser.add_argument("--images", type=int, help="so many of the images, evenly spaced (default: all)")
    add_reference(parser)
    parser.add_argument("--data", nargs="?", const="", metavar="DATA",
                        help="the run's whole validation set instead, and torch's own answers (needs torch, "
                        "torchvision and timm); DATA: as train.py --data (default: what args.json says)")  # fmt: skip
    parser.add_argument("--data-dir", help="with --data: as train.py --data-dir")
    parser.add_argument("--workers", type=int, help="with --data: processes that decode images (default: the cores)")
    parser.add_argument("--output", type=Path, help="folder of check.json (default: the student's)")
    add_json(parser, "check.json")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.images is not None and args.images < 1:
        raise UserError(f"--images must be at least 1, got {args.images}")
    if args.data is None and (args.data_dir or args.workers is not None):
        raise UserError("--data-dir and --workers need --data")
    student = student_folder(args.student)
    artefacts = find_artefacts(student, args.artefacts)
    output = args.output or student
    make_folder(output)
    on = RunOn.from_args(args)
    torch_student = None
    batches: Iterable[Batch]
    if args.data is None:
        otherwise = "on a workstation, python -m deploy.check RUN --data takes the run's validation set"
        reference = read_reference(student, args.reference, otherwise).some(args.images)
        batches = ProgressBar(reference_batches(reference), "check", len(reference.images), max(BATCHES), unit="images")
        digest, what = reference.digest, f"the {NAME} of {student}"
    else:
        torch_student = load(student, dataclasses.replace(on, device=on.device.replace("tensorrt", "cuda")))
        need("torch", "").backends.cudnn.allow_tf32 = False  # the reference is fp32
        digest, what = source_of(student)["weights_sha256"], args.data or f"the data of {student}"
        batches = validation_batches(student, args.images, args.data, args.data_dir, args.workers, torch_student)
    answers: list[tuple[np.ndarray, np.ndarray]] = []

    def noted() -> Iterator[Batch]:
        for images, labels, logits in batches:
            answers.append((labels, logits.argmax(1)))
            yield images, labels, logits

    rows = check_artefacts(artefacts, noted(), digest, torch_student, on)
    text = json.dumps(rows, indent=2)
    write_whole(output / "check.json", text + "\n")
    labels, predictions = map(np.concatenate, zip(*answers))
    confusions = write_per_class(output, labels, predictions, read_config(student).label_names)
    if args.json:
        print(text)
    else:
        note(f"{rows[0]['images']} validation images of {what}; percent, against torch's fp32 logits\n")
        print(table(rows, COLUMNS), "", *confusions, sep="\n")
    return int(any(row["verdict"] != "pass" for row in rows[1:]))


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

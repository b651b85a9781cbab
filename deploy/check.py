"""Check that every artefact is still the same classifier as its student, and print one table.

    python -m deploy.check runs/001-mobilenet_v2-uskd                     # every artefact in student/
    python -m deploy.check runs/001-mobilenet_v2-uskd student.onnx        # only these
    python -m deploy.check runs/001-mobilenet_v2-uskd --images val/       # on the photographs of val/CLASS/

The images and the student's own logits come from the run's reference.npz, so the check needs neither torch nor the data
set, and runs on the device too. --images reads photographs instead. Then torch computes the expected logits; without
torch or the weights, student.onnx or student-fp16.onnx computes them.

The columns:

    top1, top5        accuracy in percent
    top1_difference   the difference from the student's own top-1, in points
    agreement         the percentage of images for which file and student predict the same class
    max_abs_error     the largest error of a logit, at batches of 1, 2, 5 and 64
    cosine            the smallest cosine between the file's and the student's logits of an image
    ece_raw, ece      the calibration error in percent, without a temperature and with the file's own
    answered          the percentage of images whose largest probability reaches the file's threshold
    top1_answered     the top-1 of these images; the answer to the others is "none of these"

The exit status is 1 if an artefact is outside the tolerance of its precision or has no tolerance, cannot run here, or
was made from other weights. If you name no file, the command skips files that need torch if torch is missing, and
files that need ncnn if ncnn is missing, and prints their names. The command writes check.json, and per_class.csv of the
student's own answers; with matplotlib also confusion.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy import cli
from deploy.cli import Parser, ProgressBar, UserError, files_in, first_line, is_hidden, log, printable, show
from deploy.confidence import calibration
from deploy.config import Metadata, read_config
from deploy.per_class import write_per_class
from deploy.preprocess import UnreadableImage, endings, open_image, prepare
from deploy.reference import NAME, evenly, read_reference
from deploy.run_directory import SPLIT, nfc, read_split
from deploy.runtimes import (
    LOADERS,
    OPENVINO,
    TORCH_KINDS,
    RunOn,
    Runtime,
    has_torch,
    is_answered,
    load,
    probabilities,
    products_saturate,
    softmax,
)

BATCHES = (1, 2, 5, 64)
LARGEST = max(BATCHES)
# Largest error of a logit relative to the largest logit, smallest agreement in percent, largest loss of top-1 in
# points. Each error is five times the largest error of nine architectures. On a GPU fp32 may be computed in TF32, so
# the values of fp16 apply there.
TOLERANCES = {
    "fp32": dict(error=1e-4, agreement=99.9, drop=0.1),
    "fp16": dict(error=3e-2, agreement=99.0, drop=0.5),
    "int8": dict(error=float("inf"), agreement=90.0, drop=2.0),
}
INT8_ADVICE = (
    "calibrate on more images (train.py --reference N), or, if you gave no --max-drop, try quantize --max-drop 2"
)


COLUMNS = (  # columns of the table, and their formats
    "artefact: provider: precision: top1:.2f top5:.2f top1_difference:+.2f agreement:.2f max_abs_error:.1e cosine:.6f "
    "batches: ece_raw:.2f ece:.2f answered:.2f top1_answered:.2f verdict:"
)
UNREADABLE = 0.01  # share of the images that may be unreadable, but always at least one
Batch = tuple[np.ndarray, ...]  # images uint8 (B, H, W, 3), labels (B,) and logits (B, C)


@dataclass(frozen=True)
class Expected:
    """Hold the images to check on, and the logits to compare every artefact with."""

    batches: Iterable[Batch]  # each of at most LARGEST images
    images: int
    provider: str  # the backend that computed the logits
    weights_sha256: str
    description: str  # the source of the images


class Tally:
    """Add up the accuracy, and the differences from the expected logits, over batches."""

    def __init__(self) -> None:
        self.images = self.top1 = self.top5 = self.agree = 0
        self.error, self.scale, self.cosine = 0.0, 0.0, 1.0
        self.certainty: list[np.ndarray] = []  # (3, B): top probability without and with temperature; is it right

    def add(self, logits: np.ndarray, labels: np.ndarray, expected: np.ndarray, metadata: Metadata) -> None:
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        hits = order == labels[:, None]
        self.images += len(labels)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.agree += int((order[:, 0] == expected.argmax(1)).sum())
        self.certainty += [np.stack([softmax(logits).max(1), probabilities(logits, metadata).max(1), hits[:, 0]])]
        self.compare(logits, expected)

    def compare(self, logits: np.ndarray, expected: np.ndarray) -> None:
        norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
        self.error = float(np.maximum(self.error, np.abs(logits - expected).max()))  # a NaN stays
        self.scale = max(self.scale, float(np.abs(expected).max()))
        cosine = (logits * expected).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
        self.cosine = float(np.minimum(self.cosine, cosine.min()))

    def columns(self, student: Tally, metadata: Metadata) -> dict[str, Any]:
        """Return the columns of the table. student: the tally of the expected logits"""
        counts = {"top1": self.top1, "top5": self.top5, "agreement": self.agree}
        row: dict[str, Any] = {name: 100 * count / self.images for name, count in counts.items()}
        row["top1_difference"] = row["top1"] - 100 * student.top1 / student.images
        row |= {"max_abs_error": self.error, "cosine": self.cosine, "images": self.images}
        return row | self.confidence(metadata)

    def confidence(self, metadata: Metadata) -> dict[str, Any]:
        """Return the columns about temperature and threshold; skip a number that the metadata lacks."""
        raw, by_temperature, right = np.concatenate(self.certainty, 1)
        if not np.isfinite(raw).all():
            return {}
        row: dict[str, Any] = {"temperature": metadata.temperature, "threshold": metadata.threshold}
        row |= {"ece_raw": 100 * calibration(raw, right).error}
        if metadata.temperature:
            row |= {"ece": 100 * calibration(by_temperature, right).error}
        if metadata.threshold:
            answered = is_answered(by_temperature, metadata)
            row |= {"answered": 100 * answered.mean()}
            row |= {"top1_answered": 100 * right[answered].mean() if answered.any() else None}
        return row


class Candidate:
    """Hold an artefact under test. `fault` is "", or the reason why the rest of its test is skipped."""

    def __init__(self, artefact: Path, weights_sha256: str, on: RunOn) -> None:
        self.name, self.fault, self.tally = artefact.name, "", Tally()
        if on.device == OPENVINO:
            self.name += " in OpenVINO"
        self.runtime: Runtime | None = None
        try:
            self.runtime = load(artefact, on)
            if self.runtime.metadata.source.get("weights_sha256") != weights_sha256:
                raise UserError("was made from other weights than this student's: export it again")
        except UserError as error:
            self.fault = f"not checked: {error}"

    def add(self, images: np.ndarray, labels: np.ndarray, expected: np.ndarray, first: bool) -> None:
        """Run a batch of images; run images of the first batch also at each size of :func:`sizes_of`."""
        if self.runtime is None or self.fault:
            return
        try:
            self.tally.add(self.runtime.run_in_parts(images, LARGEST), labels, expected, self.runtime.metadata)
            if first:
                picked = np.arange(LARGEST) % len(images)
                for size in sizes_of(self.runtime):
                    self.tally.compare(self.runtime.run_in_parts(images[picked], size), expected[picked])
        except Exception as error:  # each runtime has exceptions of its own
            self.fault = f"failed: {first_line(error)}"

    def row(self, student: Tally) -> dict[str, Any]:
        """Return the row of the table, with a verdict."""
        row: dict[str, Any] = {"artefact": self.name, "verdict": self.fault}
        if self.runtime:
            row |= {"provider": self.runtime.provider, "precision": self.runtime.metadata.precision}
        if self.runtime is None or self.fault:
            return row
        row |= self.tally.columns(student, self.runtime.metadata) | {
            "batches": " ".join(map(str, sizes_of(self.runtime)))
        }
        return row | {"verdict": judge(row, self.tally)}


def check_artefacts(
    artefacts: list[Path], expected: Expected, on: RunOn, metadata: Metadata
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Return a row for the student and for each artefact, the labels, and the student's predicted classes.

    metadata: the student's
    """
    candidates = [Candidate(artefact, expected.weights_sha256, on) for artefact in artefacts]
    if on.device in ("auto", "cpu") and importlib.util.find_spec("openvino"):
        by_openvino = dataclasses.replace(on, device=OPENVINO)
        onnx_files = [artefact for artefact in artefacts if artefact.suffix == ".onnx"]
        candidates += [Candidate(artefact, expected.weights_sha256, by_openvino) for artefact in onnx_files]
    student, answers = Tally(), []
    for images, labels, logits in ProgressBar(expected.batches, "check", expected.images, LARGEST, unit="images"):
        for candidate in candidates:
            candidate.add(images, labels, logits, first=not student.images)
        student.add(logits, labels, logits, metadata)
        answers.append((labels, logits.argmax(1)))
    if not student.images:
        raise UserError("no validation image can be read: replace the damaged files")
    row = {"artefact": "student/", "provider": expected.provider, "precision": "fp32"}
    row |= student.columns(student, metadata)
    labels, predictions = map(np.concatenate, zip(*answers))
    return [row, *(candidate.row(student) for candidate in candidates)], labels, predictions


def sizes_of(runtime: Runtime) -> list[int]:
    sizes = [size for size in BATCHES if size <= (runtime.max_batch or size)]
    return sizes if runtime.max_batch is None or runtime.max_batch in sizes else [*sizes, runtime.max_batch]


def judge(row: dict[str, Any], tally: Tally) -> str:
    """Return "pass", or the measures that are outside the tolerance."""
    on_gpu = "cpu" not in row["provider"].lower()
    precision = row["precision"].partition("-")[0]
    allowed = TOLERANCES.get("fp16" if precision == "fp32" and on_gpu else precision)
    if allowed is None:
        return f"not judged: no tolerance for precision {row['precision']}"
    error = tally.error / max(tally.scale, float(np.finfo(np.float32).tiny))
    agreement, drop = row["agreement"], -row["top1_difference"]
    faults = []
    if not error <= allowed["error"]:  # not `>`, because a NaN is a fault
        faults.append(f"error {error:.1e} of the largest logit > {allowed['error']:.0e}")
    if not agreement >= allowed["agreement"]:
        faults.append(f"agreement {agreement:.2f} < {allowed['agreement']} %")
    if not drop <= allowed["drop"]:
        faults.append(f"top-1 loses {drop:.2f} > {allowed['drop']} points")
    if faults and precision == "int8":
        saturates = not on_gpu and products_saturate()
        vnni = "8-bit products saturate on this CPU, which has no VNNI: quantize --reduce-range"
        faults.append(vnni if saturates else INT8_ADVICE)
    return f"FAIL: {'; '.join(faults)}" if faults else "pass"


# ---- the images ----------------------------------------------------------------------------------------------------


def from_reference(student: Path, given: Path | None, count: int | None) -> Expected:
    """Return the images and logits of the run's reference.npz."""
    otherwise = "or check on photographs: --images FOLDER, with a folder for each class"
    reference = read_reference(student, given, otherwise).some(count)
    arrays, count = (reference.images, reference.labels, reference.logits), len(reference.images)
    batches = (tuple(array[i : i + LARGEST] for array in arrays) for i in range(0, count, LARGEST))
    return Expected(batches, count, NAME, reference.digest, f"the {NAME} of {student}")


def from_photographs(student: Path, folder: Path, count: int | None, on: RunOn) -> Expected:
    """Return the photographs of folder/CLASS/ and the student's own logits, from torch or an exported file."""
    files = [student / name for name in ("student.onnx", "student-fp16.onnx")]
    if has_torch() and (student / "model.safetensors").is_file():
        path = student
        cli.need("torch", "").backends.cudnn.allow_tf32 = False  # the expected logits are fp32
        on = dataclasses.replace(on, device=on.device.replace("tensorrt", "cuda"))
    elif found := [file for file in files if file.is_file()]:
        path = found[0]
        log(f"torch or the weights are missing: compared with {path.name}")
    else:
        raise UserError(f"--images needs torch and the weights, or an exported {files[0]}: neither is here")
    runtime = load(path, on)
    photographs = without_training_images(list_photographs(folder, runtime.metadata.label_names), folder, student)
    photographs = [photographs[i] for i in evenly(len(photographs), count or len(photographs))]
    batches, digest = photograph_batches(photographs, runtime), str(runtime.metadata.source.get("weights_sha256"))
    return Expected(batches, len(photographs), runtime.provider, digest, str(folder))


def without_training_images(photographs: list[tuple[Path, int]], folder: Path, student: Path) -> list[tuple[Path, int]]:
    """Return the photographs that the run's split.csv does not list for training; without that file, return all."""
    split = read_split(student.resolve().parent / SPLIT) or {}
    names = [nfc(file.relative_to(folder).as_posix()) for file, _ in photographs]
    kept = [one for one, name in zip(photographs, names) if split.get(name) != "train"]
    if len(kept) < len(photographs):
        log(f"{len(photographs) - len(kept)} of {len(photographs)} photographs were training images and are skipped")
    if not kept:
        raise UserError(f"--images {folder}: every photograph was a training image of this student")
    return kept


def list_photographs(folder: Path, label_names: list[str]) -> list[tuple[Path, int]]:
    """Return the image files of folder/CLASS/ with their class indices, in the order of the classes.

    Folders are matched with the labels in Unicode's composed form. Hidden files and __MACOSX are skipped. Raise
    UserError if no folder has an image, or if a folder is not named like a class.
    """
    classes = {nfc(label): i for i, label in enumerate(label_names)}
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    except OSError as error:
        raise UserError(f"--images {folder} cannot be read: {error.strerror}") from error
    by_class = {nfc(path.name): path for path in found}
    if len(by_class) < len(found):
        raise UserError(f"--images {folder}: two folders have the same name in two Unicode forms: join them")
    if unknown := sorted(by_class.keys() - classes.keys()):
        names = f"expected folders named like its {len(classes)} classes: {', '.join(label_names[:3])}, ..."
        raise UserError(f"--images {folder}: the student has no class {', '.join(unknown[:3])}; {names}")
    files, others = [], 0
    for name, path in sorted(by_class.items(), key=lambda item: classes[item[0]]):
        images, more = image_files(path)
        files += [(file, classes[name]) for file in images]
        others += more
    if not files:
        raise UserError(f"--images {folder}: no image in a folder named like a class, such as {label_names[0]}/")
    if missing := sorted(classes.keys() - by_class.keys()):
        log(f"{folder} has no folder for {len(missing)} of {len(classes)} classes: {', '.join(missing[:3])}")
    if others:
        log(f"{folder}: skipped {others} files without the extension of an image")
    return files


def image_files(folder: Path) -> tuple[list[Path], int]:
    """Return the image files of a folder and its subfolders, by their extensions, and the number of other files."""
    inside = sorted(map(Path, files_in(folder)))
    images = [file for file in inside if file.suffix.lower() in endings()]
    return images, len(inside) - len(images)


def photograph_batches(files: list[tuple[Path, int]], runtime: Runtime) -> Iterator[Batch]:
    """Yield prepared photographs, their labels and the runtime's logits; print and count unreadable files."""
    unreadable = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), LARGEST):
            paths, indices = zip(*files[start : start + LARGEST])
            images, labels = [], []
            read = pool.map(read_photograph, paths, [runtime.metadata] * len(paths))
            for path, index, image in zip(paths, indices, read):
                if isinstance(image, np.ndarray):
                    images.append(image)
                    labels.append(index)
                    continue
                unreadable += 1
                print(printable(f"skipped an unreadable image: {path}: {image}"), file=sys.stderr)
                if unreadable > max(1, UNREADABLE * len(files)):
                    raise UserError(f"{unreadable} of {len(files)} images cannot be read, more than 1 %: {path}")
            if images:
                pixels = np.stack(images)
                yield pixels, np.array(labels), runtime.run_in_parts(pixels, LARGEST)


def read_photograph(path: Path, metadata: Metadata) -> np.ndarray | UnreadableImage:
    try:
        return prepare(open_image(path), metadata)
    except UnreadableImage as error:
        return error


# ---- the command ---------------------------------------------------------------------------------------------------


def find_artefacts(student: Path, names: list[str]) -> list[Path]:
    """Return the named artefacts, or all in the student's folder if no name is given.

    names: paths, or names of files in the student's folder
    """
    if not names:
        visible = (file for file in student.iterdir() if file.is_file() and not file.name.startswith("."))
        found = sorted(file for file in visible if file.suffix in LOADERS and file.suffix)
        found = [file for file in found if not any(part.startswith(".pnnx") for part in file.suffixes)]  # files of pnnx
        for package, kinds in (("torch", TORCH_KINDS), ("ncnn", (".param",))):
            missing = [file for file in found if file.suffix in kinds and not importlib.util.find_spec(package)]
            if missing:
                log(f"skipped because {package} is not installed: {', '.join(file.name for file in missing)}")
            found = [file for file in found if file not in missing]
        if not found:
            raise UserError(f"{student} has no artefact yet: python -m deploy.export {shlex.quote(str(student))}")
        return found
    paths = [cli.file_of(student, name) for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"no artefact {path.name}: give the path of a file, or the name of one in {student}")
    return paths


def table(rows: list[dict[str, Any]], columns: str) -> str:
    """Return rows as text, with numbers aligned right and - for a missing value.

    columns: "name:format name:format ..."
    """
    texts = []
    for name, form in (column.split(":") for column in columns.split()):
        column = [printable(format(row[name], form)) if row.get(name) is not None else "-" for row in rows]
        width = max(map(len, [name, *column]))
        texts.append([f"{text:{'>' if form else '<'}{width}}" for text in [name, *column]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*texts))


def in_json(value: Any) -> Any:
    """Return a value, or None instead of a number that JSON does not have: NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def get_parser() -> Parser:
    parser = cli.make_parser(__doc__, "check", "student", "--quiet", "--json", "--reference", *cli.DEVICE)
    add = parser.add_argument
    add("artefacts", nargs="*", help="files to check (default: all in the folder)")
    add("--count", type=cli.number(int, 1), metavar="N", help="check on N images, evenly spaced (default: all)")
    add("--images", type=Path, metavar="FOLDER", help="photographs in FOLDER/CLASS/ instead of reference.npz")
    add("--output", type=Path, help="folder of check.json (default: the student's)")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.images and args.reference:
        raise UserError("--images reads photographs instead of the reference: leave out --reference")
    student = cli.student_folder(args.student)
    artefacts, output, on = find_artefacts(student, args.artefacts), args.output or student, RunOn.from_args(args)
    cli.make_folder(output)
    if args.images:
        expected = from_photographs(student, args.images, args.count, on)
    else:
        expected = from_reference(student, args.reference, args.count)
    config = read_config(student)
    rows, labels, predictions = check_artefacts(artefacts, expected, on, config)
    finite = [{key: in_json(value) for key, value in row.items()} for row in rows]
    text = json.dumps(finite, indent=2, allow_nan=False)
    cli.write_whole(output / "check.json", text + "\n")
    confusions = write_per_class(output, labels, predictions, config.label_names)
    if args.json:
        print(text)
    else:
        measure = f"in percent, compared with the student's logits by {expected.provider}"
        log(f"{rows[0]['images']} images of {expected.description}; {measure}\n")
        show(table(rows, COLUMNS), "", *confusions)
    return int(any(row["verdict"] != "pass" for row in rows[1:]))


if __name__ == "__main__":
    sys.exit(cli.command(get_parser(), run))

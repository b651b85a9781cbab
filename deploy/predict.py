"""Classify photographs with a student or one of its artefacts.

    python -m deploy.predict runs/001-mobilenet_v2-uskd/student/student.onnx photo.jpg
    python -m deploy.predict runs/001-mobilenet_v2-uskd photos/ --csv answers.csv     # a folder and its subfolders
    python -m deploy.predict runs/001-mobilenet_v2-uskd photos/ --least-certain 50 -o sheet.png   # those to label next

The answer to a photograph is "none of these" if its largest probability is below the student's threshold. The sheet
shows the images as the network gets them, the least certain image first; the command prints their paths in the same
order. Unreadable images of a folder are skipped, listed and counted.

The CSV file has a line for each image: file, label, index, probability, answered (no if it is below the threshold),
second_label, second_probability, and error for an image that could not be read. The file is UTF-8; a byte of a name
that is not UTF-8 becomes \\udcNN. A spreadsheet may compute a cell that starts with = + - @, so such a path gets ./ in
front, and such a label gets an apostrophe. A program should read the index, not the label.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deploy.check import image_files, read_photograph
from deploy.cli import (
    Parser,
    ProgressBar,
    UserError,
    add_device,
    command,
    log,
    make_parser,
    number,
    printable,
    refuse_special,
    show,
    write_whole,
)
from deploy.per_class import as_text
from deploy.preprocess import endings
from deploy.runtimes import RunOn, Runtime, is_answered, load, top_labels, usable_cpus

BATCH = 32
TILE, LINE = 160, 14  # pixels: a side of an image on the sheet, the height of a line of its caption
CAPTION = 25  # characters of a caption that fit below a tile
COLUMNS = ["file", "label", "index", "probability", "answered", "second_label", "second_probability", "error"]
NO_IMAGE = np.empty((0, 0, 3), np.uint8)


class Answer(NamedTuple):
    """Hold the answer to a file."""

    file: Path
    best: list[tuple[str, float, int]]  # label, probability and class index, the best first; [] if it is unreadable
    answered: bool  # False: the answer is "none of these"
    image: np.ndarray  # prepared, uint8 (H, W, C)
    error: str = ""  # the reason why it cannot be read

    @property
    def certainty(self) -> float:
        return self.best[0][1] if math.isfinite(self.best[0][1]) else 0.0

    def __str__(self) -> str:
        labels = ", ".join(f"{printable(label)} {p:.1%}" for label, p, _ in self.best)
        return f"{printable(str(self.file))}: {'' if self.answered else 'none of these; nearest: '}{labels}"


def predict(runtime: Runtime, files: Sequence[Path], count: int = 5) -> Iterator[Answer]:
    """Yield the answer to each file, in the given order, with the `count` most probable classes."""
    metadata = runtime.metadata
    with ThreadPoolExecutor(min(8, usable_cpus())) as pool:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            images = list(pool.map(read_photograph, part, [metadata] * len(part)))
            read = [image for image in images if isinstance(image, np.ndarray)]
            logits = iter(runtime.run_in_parts(np.stack(read), BATCH) if read else ())
            for file, image in zip(part, images):
                if isinstance(image, np.ndarray):
                    best = top_labels(next(logits), metadata, count)
                    yield Answer(file, best, is_answered(best[0][1], metadata), image)
                else:
                    yield Answer(file, [], False, NO_IMAGE, str(image))


def list_files(given: Sequence[Path]) -> list[Path]:
    """Return the given files, and the images in the given folders and their subfolders.

    Raise UserError if a folder has no image.
    """
    files = []
    for path in given:
        if not path.is_dir():
            files.append(path)
            continue
        images, others = image_files(path)
        if not images:
            raise UserError(f"{path}: no image in this folder")
        if others:
            log(f"{printable(str(path))}: skipped {others} files without the extension of an image")
        files += images
    return files


# ---- a table and a sheet -------------------------------------------------------------------------------------------


def answers_table(answers: Sequence[Answer]) -> bytes:
    """Return the content of the CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # so that \r in a name is quoted
    writer.writerow(COLUMNS)
    for answer in answers:
        row = [str(answer.file) if as_text(str(answer.file)) == str(answer.file) else os.path.join(".", answer.file)]
        if answer.error:
            writer.writerow([*row, *[""] * (len(COLUMNS) - 2), as_text(answer.error)])
            continue
        (label, p, index), *others = answer.best
        row += [as_text(label), str(index), f"{p:.4f}", "yes" if answer.answered else "no"]
        row += [as_text(others[0][0]), f"{others[0][1]:.4f}"] if others else ["", ""]
        writer.writerow([*row, ""])
    return text.getvalue().encode("utf-8", "backslashreplace")


def contact_sheet(answers: Sequence[Answer]) -> bytes:
    """Return a PNG of the images with a number, a label and its probability below each."""
    columns = min(10, math.ceil(math.sqrt(len(answers))))
    width, height = TILE + 8, TILE + 2 * LINE + 8
    sheet = Image.new("RGB", (columns * width, math.ceil(len(answers) / columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, answer in enumerate(answers):
        left, top = i % columns * width + 4, i // columns * height + 4
        pixels = answer.image[..., 0] if answer.image.shape[-1] == 1 else answer.image
        scale = TILE / max(pixels.shape[:2])
        size = max(1, round(scale * pixels.shape[1])), max(1, round(scale * pixels.shape[0]))
        picture = Image.fromarray(pixels)
        sheet.paste(
            picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BILINEAR), (left, top)
        )
        label, p, _ = answer.best[0]
        captions = f"{i + 1}: {'' if answer.answered else 'none of these'}", f"{p:.1%} {printable(label)}"
        for line, caption in enumerate(captions):  # in any version of Pillow the font has Latin-1
            text = caption[:CAPTION].encode("latin-1", "replace").decode("latin-1")
            draw.text((left, top + TILE + line * LINE), text, "black", font)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def check_writable(file: Path) -> None:
    """Make the folder of a file; raise UserError if the file cannot be written, before the images are classified."""
    refuse_special(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        reason = "is a folder" if file.is_dir() else "" if os.access(file.parent, os.W_OK) else "is read-only"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise UserError(f"cannot write {file}: {reason}; name another file")


# ---- the command ---------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    parser = make_parser(__doc__, "predict", "--quiet")
    add = parser.add_argument
    add("student", type=Path, help="a run directory, its student/ folder, or an artefact")
    add("images", type=Path, nargs="+", help="image files, or folders of them")
    add("--csv", type=Path, metavar="FILE", help="write the answers to this file instead of the screen")
    add(
        "--least-certain",
        type=number(int, 1, 1000),
        metavar="N",
        help="print only the N least certain images, and draw them on one sheet",
    )
    add("-o", "--sheet", type=Path, metavar="FILE", help="the sheet, a PNG file (default: least-certain.png)")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.sheet and not args.least_certain:
        raise UserError(f"--sheet {args.sheet} is the picture of the least certain images: give --least-certain N too")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {args.sheet}: expected a .png file")
    if args.least_certain:
        args.sheet = args.sheet or Path("least-certain.png")
    if args.csv and args.csv.suffix.lower() in endings():
        raise UserError(f"--csv {args.csv} has the name of a photograph: give a name such as answers.csv after --csv")
    for file in filter(None, (args.csv, args.sheet)):
        check_writable(file)
    runtime, named = load(args.student, RunOn.from_args(args)), set(args.images)
    files, quiet = list_files(args.images), bool(args.csv or args.least_certain)
    answers: list[Answer] = []
    least: list[Answer] = []
    for answer in ProgressBar(predict(runtime, files), "predict", len(files), unit="images", shown=quiet):
        if answer.error and answer.file in named:
            raise UserError(f"cannot read {answer.file}: {answer.error}")
        if answer.error:
            print(printable(f"skipped an unreadable image: {answer.file}: {answer.error}"), file=sys.stderr)
        elif args.least_certain:
            least = heapq.nsmallest(args.least_certain, [*least, answer], key=lambda one: one.certainty)
        if not (answer.error or quiet):
            show(str(answer))
        answers.append(answer._replace(best=answer.best[:2], image=NO_IMAGE))
    read = [answer for answer in answers if not answer.error]
    if not read:
        raise UserError(f"none of the {len(files)} images can be read: replace the damaged files")
    if args.csv:
        write_whole(args.csv, answers_table(answers))
    if least:
        write_whole(args.sheet, contact_sheet(least))
        show(*(f"{i}  {answer}" for i, answer in enumerate(least, 1)))
    unknown, unreadable = sum(not answer.answered for answer in read), len(answers) - len(read)
    if quiet or unreadable:
        written = " and ".join(str(file) for file in (args.csv, args.sheet) if file)
        counts = f"{len(read)} images, {unknown} below the threshold; {unreadable} could not be read"
        log(f"{written}: {counts}" if written else counts)


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

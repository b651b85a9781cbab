"""Compare a device, or a port to another language, with the stored answers of a student (the vectors).

    python -m deploy.selftest runs/001-mobilenet_v2-uskd      # on a device: python3 student.pyz selftest

deploy.pack writes the vectors next to the file that it packs: student/vectors/ holds ten drawn pictures, the prepared
bytes of each, and index.json with the logits of the file. deploy/porting.md describes the vectors and preprocessing.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deploy import cli
from deploy.cli import MAX_JSON, Parser, UserError, command, make_parser, printable, read_file, show
from deploy.config import Metadata, read_json
from deploy.preprocess import UnreadableImage, open_image, prepare
from deploy.runtimes import RunOn, Runtime, load

FOLDER, INDEX = "vectors", "index.json"
LARGEST_SIDE = 512  # pixels; the pictures for a larger input are those for an input of this size
# Largest error of a logit, relative to the largest logit. In fp32 a device may add in another order. In fp16 it may
# also store sums in 16 bits. In INT8 it may round a value to another step, which changes the layers after it.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}
TOLERANCE_INT8 = 0.1


class Picture(NamedTuple):
    """Describe a picture of the vectors: its size relative to the input's side, and its file."""

    file: str
    width: float
    height: float
    mode: str = "RGB"
    orientation: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012  # options of Image.save


PICTURES = (
    Picture("jpeg-420-16x9.jpg", 2.84, 1.6, options={"subsampling": "4:2:0", "quality": 90}),
    Picture("jpeg-444-tall.jpg", 0.7, 2.3, options={"subsampling": "4:4:4", "quality": 95}),
    Picture("jpeg-grey.jpg", 1.7, 1.3, "L", options={"quality": 90}),
    Picture("jpeg-turned-6.jpg", 1.9, 1.2, orientation=6, options={"subsampling": "4:2:0", "quality": 90}),
    Picture("jpeg-mirrored-5-progressive.jpg", 1.2, 1.5, orientation=5, options={"progressive": True, "quality": 85}),
    Picture("png-grey.png", 1.33, 1, "L"),
    Picture("png-alpha.png", 1.1, 1.4, "RGBA"),
    Picture("png-palette.png", 1, 1, "P"),
    Picture("png-wide.png", 4.1, 0.4),
    Picture("png-tiny.png", 0.06, 0.04),
)


# ---- writing -------------------------------------------------------------------------------------------------------


def draw(picture: Picture, side: int) -> bytes:
    """Return a picture's file. The picture has ramps, waves from coarse to fine, and discs with sharp edges."""
    width, height = (max(3, round(share * side)) for share in (picture.width, picture.height))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    across, down = x / width, y / height
    waves = 127.5 + 127.5 * np.sin(across**2 * side) * np.sin(down**2 * side)
    pixels = np.stack([255 * across, waves, 255 * down], -1)
    for i in range(4):
        inside = (across - 0.2 - 0.2 * i) ** 2 + (down - 0.75 + 0.17 * i) ** 2 < 0.012
        pixels[inside] = 255 * (np.array([i & 1, i >> 1, i == 0]))
    image = Image.fromarray(pixels.round().astype(np.uint8))
    if picture.mode == "RGBA":
        image.putalpha(Image.fromarray((255 * (1 - across) ** 0.5).round().astype(np.uint8)))
    elif picture.mode == "P":
        image = image.quantize(32)
    else:
        image = image.convert(picture.mode)
    exif, options, file = Image.Exif(), picture.options, io.BytesIO()
    if picture.orientation > 1:
        exif[0x0112] = picture.orientation
        options = {**options, "exif": exif}
    if picture.mode == "P":
        options = {**options, "transparency": 3}
    image.save(file, "JPEG" if picture.file.endswith("jpg") else "PNG", **options)
    return file.getvalue()


def is_int8(precision: str) -> bool:
    return precision.startswith("int8")


def tolerance_of(precision: str) -> float:
    return TOLERANCE.get(precision, TOLERANCE_INT8 if is_int8(precision) else TOLERANCE["fp32"])


def make_vectors(runtime: Runtime, former: Path) -> dict[str, bytes]:
    """Return the files of the vectors by name: pictures, their prepared bytes, and index.json with the logits.

    former: the folder of earlier vectors; the function keeps its logits of this student's other files
    """
    metadata = runtime.metadata
    names = ("input_size", "crop", "interpolation", "mean", "std", "label_names")
    about: dict[str, Any] = {"format": 1} | {name: getattr(metadata, name) for name in names}
    about |= {"weights_sha256": metadata.source.get("weights_sha256"), "pictures": []}
    files: dict[str, bytes] = {}
    images = []
    for picture in PICTURES:
        content = draw(picture, min(max(metadata.input_size[1:]), LARGEST_SIDE))
        image = prepare(open_image(content), metadata)
        prepared = f"{picture.file.partition('.')[0]}.bin"
        about["pictures"].append({"file": picture.file, "prepared": prepared, "crc32": zlib.crc32(image.tobytes())})
        files |= {picture.file: content, prepared: image.tobytes()}
        images.append(image)
    logits = kept_logits(former / INDEX, about)
    values = [[float(f"{x:.9g}") for x in row] for row in runtime.run_in_parts(np.stack(images), 1).tolist()]
    precision = metadata.precision
    logits[runtime.file] = {
        "precision": precision,
        "temperature": metadata.temperature,
        "threshold": metadata.threshold,
        "tolerance": tolerance_of(precision),
        "values": values,
    }
    return files | {INDEX: json.dumps(about | {"logits": logits}).encode() + b"\n"}


def kept_logits(index: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the logits of an existing index.json, or {} if its student or its pictures are different."""
    try:
        former = read_json(read_file(index, MAX_JSON), index) if index.is_file() else {}
    except UserError:  # a damaged file is written again
        former = {}
    logits = former.get("logits", {})
    same = all(former.get(name) == value for name, value in about.items())
    return logits if same and isinstance(logits, dict) else {}


def as_one_object(vectors: dict[str, bytes], file: str) -> dict[str, Any]:
    """Return the vectors of a file for student.html: with the pictures in base64, and without prepared bytes."""
    index = json.loads(vectors[INDEX])
    logits, pictures = index["logits"][file], index["pictures"]
    pictures = [p | {"content": base64.b64encode(vectors[p["file"]]).decode()} for p in pictures]
    return {"pictures": pictures, "tolerance": logits["tolerance"], "logits": logits["values"]}


# ---- checking ------------------------------------------------------------------------------------------------------


def is_name(value: Any) -> bool:
    return isinstance(value, str) and value == Path(value).name and value not in ("", "..")


def read_vectors(folder: Path) -> dict[str, Any]:
    """Return the content of index.json; raise UserError if it is missing or has another format."""
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"no {INDEX} in {folder}: python -m deploy.pack writes the vectors of the file that it packs")
    vectors = read_json(read_file(index, MAX_JSON), index)
    try:
        pictures, logits = vectors["pictures"], vectors["logits"]
        valid = all(is_name(p["file"]) and is_name(p["prepared"]) for p in pictures)
        valid = valid and len(pictures) > 0 and len(logits) > 0
        rows = [np.asarray(one["values"], np.float32) for one in logits.values()]
        valid = valid and all(row.ndim == 2 and len(row) == len(pictures) and row.size for row in rows)
        valid = valid and all(isinstance(one["tolerance"], (int, float)) for one in logits.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        valid = False
    if not valid or vectors.get("format") != 1:
        raise UserError(f"{index} has no vectors of format 1, which python -m deploy.pack writes")
    return vectors


def different_bytes(folder: Path, picture: dict[str, Any], expected: np.ndarray, metadata: Metadata) -> str:
    """Prepare a picture. Return a text about the bytes that differ from the expected bytes, or "" if all are equal."""
    try:
        image = prepare(open_image(read_file(folder / picture["file"])), metadata)
    except UnreadableImage as error:
        return f"cannot be read: {error}"
    distance = np.abs(image.astype(int) - expected)
    if not distance.any():
        return ""
    return f"{np.count_nonzero(distance)} of {image.size} bytes differ, by up to {distance.max()}"


def pick_vectors(logits: dict[str, Any], runtime: Runtime) -> str:
    """Return the file whose logits a runtime must give: its own, its engine's, or one of its kind (INT8 or float)."""
    precision = runtime.metadata.precision
    alike = [name for name, one in logits.items() if is_int8(one.get("precision", "")) == is_int8(precision)]
    same = sorted(alike, key=lambda name: logits[name].get("precision") != precision)
    for name in (runtime.file, runtime.metadata.onnx, *same):
        if name in logits:
            return name
    fault = f"the vectors are those of {', '.join(map(printable, logits))}, not of {runtime.file} ({precision})"
    raise UserError(f"{fault}: python -m deploy.pack --file writes those of another file")


def check(runtime: Runtime, folder: Path) -> bool:
    """Run the vectors of a folder and print a line about each picture; return whether all are within tolerance."""
    vectors, metadata = read_vectors(folder), runtime.metadata
    logits, file = vectors["logits"], pick_vectors(vectors["logits"], runtime)
    digests = vectors.get("weights_sha256"), metadata.source.get("weights_sha256")
    if all(digests) and digests[0] != digests[1]:
        raise UserError(f"{folder} belongs to other weights than {runtime.file}: python -m deploy.pack writes it again")
    expected = np.asarray(logits[file]["values"], np.float32)
    tolerance = max(logits[file]["tolerance"], tolerance_of(metadata.precision))
    largest, passed, errors = np.abs(expected).max() or 1.0, True, []
    if expected.shape[1] != len(metadata.label_names) or vectors.get("input_size") != metadata.input_size:
        raise UserError(f"{folder} has the vectors of another student than {runtime.file}")
    for picture, row in zip(vectors["pictures"], expected):
        data = np.frombuffer(read_file(folder / picture["prepared"]), np.uint8)
        if data.size != np.prod(metadata.image_shape):
            raise UserError(f"{folder / picture['prepared']} has {data.size} bytes, not those of a prepared image")
        prepared = data.reshape(metadata.image_shape)
        difference = different_bytes(folder, picture, prepared, metadata)
        errors.append(float(np.abs(runtime.run(prepared[None])[0] - row).max() / largest))
        good = not difference and errors[-1] <= tolerance
        passed &= good
        state = "ok  " if good else "FAIL"
        show(f"{state} {picture['file']:34} {difference or 'bytes equal'}; logits differ by {errors[-1]:.1e}")
    name = runtime.file if file == runtime.file else f"{runtime.file} compared with {printable(file)}"
    verdict = f"{'passed' if passed else 'FAILED'}: {len(errors)} pictures, {name}"
    show(f"{verdict}: logits differ by {max(errors):.1e} of the largest, at most {tolerance:.0e} is allowed")
    return passed


def get_parser() -> Parser:
    parser = make_parser(__doc__, "selftest", "student")
    parser.add_argument("artefact", nargs="?", help="the file to check (default: the student's student.onnx)")
    cli.add_device(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    student = cli.student_folder(args.student)
    artefact = cli.file_of(student, args.artefact) if args.artefact else student / "student.onnx"
    return 0 if check(load(artefact, RunOn.from_args(args)), student / FOLDER) else 1


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

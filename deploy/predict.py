"""Classify photographs with a student or one of its artefacts.

python -m deploy.predict runs/001-mobilenet_v2-uskd/student/student.onnx photo.jpg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.cli import Parser, UserError, add_device, command, make_parser, printable, show
from deploy.preprocess import UnreadableImage, open_image, prepare
from deploy.runtimes import RunOn, Runtime, load, top_labels


def predict(runtime: Runtime, file: Path, count: int = 5) -> list[tuple[str, float, int]]:
    """Return (label, probability, class index) of the most probable classes of a photograph, the best first."""
    try:
        image = prepare(open_image(file), runtime.metadata)
    except UnreadableImage as error:
        raise UserError(f"cannot read {file}: {error}") from error
    return top_labels(runtime.run(image[None])[0], runtime.metadata.label_names, count)


def get_parser() -> Parser:
    parser = make_parser(__doc__, "predict")
    parser.add_argument("student", type=Path, help="a run's student/ folder, or an artefact of it")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    runtime = load(args.student, RunOn.from_args(args))
    for file in args.images:
        show(f"{file}: {', '.join(f'{printable(label)} {p:.1%}' for label, p, _ in predict(runtime, file))}")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

"""Classify photographs with a student or any artefact of it.

python -m deploy.predict runs/001-mobilenet_v2-uskd/student/student.onnx photo.jpg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.cli import Parser, UserError, add_device, command, make_parser
from deploy.preprocess import UnreadableImage, open_image, prepare
from deploy.runtimes import RunOn, Runtime, load, top_labels


def predict(runtime: Runtime, file: Path, count: int = 5) -> list[tuple[str, float, int]]:
    """(label, probability, class index) of the most probable classes of the photograph in a file, the best first."""
    try:
        image = prepare(open_image(file), runtime.metadata)
    except UnreadableImage as error:
        raise UserError(f"cannot read {file}: {error}") from error
    return top_labels(runtime.run(image[None])[0], runtime.metadata.label_names, count)


def get_parser() -> Parser:
    parser = make_parser(__doc__, "predict")
    parser.add_argument("student", type=Path, help="a run's student/ folder, or a file that deploy/ made of it")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    runtime = load(args.student, RunOn.from_args(args))
    for file in args.images:
        print(f"{file}: {', '.join(f'{label} {p:.1%}' for label, p, _ in predict(runtime, file))}")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

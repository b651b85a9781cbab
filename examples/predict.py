"""Classify images with a student or any artefact of it: python examples/predict.py runs/001-.../student photo.jpg"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.cli import add_device, command, make_parser
from deploy.images import as_numpy
from deploy.runtimes import load
from train import UserError, eval_transform, open_image


def run(args: argparse.Namespace) -> None:
    runtime = load(args.student, args.device, args.threads, args.allow_fallback)
    transform, labels = eval_transform(runtime.metadata), runtime.metadata["label_names"]
    for file in args.images:
        try:
            images = as_numpy(transform(open_image(file)).unsqueeze(0))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        (logits,) = runtime.run(images)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[:5]
        print(f"{file}: {', '.join(f'{labels[i]} {probabilities[i]:.1%}' for i in best)}")


parser = make_parser(__doc__, "predict.py")
parser.add_argument("student", type=Path, help="a run's student/ folder, or a file that deploy/ made of it")
parser.add_argument("images", nargs="+", help="image files")
add_device(parser)

if __name__ == "__main__":
    sys.exit(command(parser, run))

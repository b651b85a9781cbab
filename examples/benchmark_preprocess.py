"""Measure the gain from decoding large JPEGs at a reduced scale: python examples/benchmark_preprocess.py STUDENT PHOTOS

To measure the time, the script resizes the largest photograph to 12 megapixels, and prepares it with and without the
reduced scale, in turns. To measure the change of the result, it saves square crops of all photographs as JPEGs at least
eight times as large as the student's resize, and prepares each crop in both ways. It prints the mean difference between
the pixels of the two prepared images, and the share of crops that get the same class in both ways.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy import preprocess
from deploy.cli import UserError, command, make_parser
from deploy.config import Metadata
from deploy.runtimes import RunOn, load, softmax

MARGIN = preprocess.DRAFT_MARGIN


def prepared(file: bytes, config: Metadata, reduced: bool) -> tuple[np.ndarray, float]:
    """Return the prepared image and the CPU seconds that it took."""
    preprocess.DRAFT_MARGIN = MARGIN if reduced else 10**6
    started = time.process_time()
    return preprocess.prepare(preprocess.open_image(file), config), time.process_time() - started


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def run(args: argparse.Namespace) -> None:
    runtime = load(args.student, RunOn("cpu"))
    config = runtime.metadata
    files = sorted(file for file in args.photos.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    photos = [preprocess.to_rgb(preprocess.open_image(file)) for file in files]
    side = 2 * MARGIN * min(preprocess.resized_size((1, 1), config))
    photos = [photo for photo in photos if min(photo.size) >= side]
    if not photos:
        raise UserError(f"{args.photos} has no JPEG of at least {side} pixels a side, eight times the resize")

    large = jpeg(max(photos, key=lambda photo: photo.width).resize((4000, 3000), Image.Resampling.BICUBIC))
    rounds = [[1e3 * prepared(large, config, reduced)[1] for reduced in (False, True)] for _ in range(args.rounds)]
    whole, reduced = (statistics.median(times) for times in zip(*rounds))
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"a JPEG of 4000x3000, {len(large) / 1e6:.1f} MB, for {config.input_size[1:]}: CPU ms {whole:.0f} whole, "
          f"{reduced:.0f} at a reduced scale: {ratio:.2f} times as fast (median of {args.rounds})")  # fmt: skip

    random = np.random.default_rng(0)
    differences, same, sure = [], [], []
    for i in range(args.crops):
        photo = photos[i % len(photos)]
        size = int(random.integers(side, min(photo.size) + 1))
        left, top = (int(random.integers(0, length - size + 1)) for length in photo.size)
        file = jpeg(photo.crop((left, top, left + size, top + size)))
        pair = [prepared(file, config, reduced)[0] for reduced in (False, True)]
        differences.append(np.abs(pair[0].astype(int) - pair[1]).mean())
        logits, others = (runtime.run(image[None])[0] for image in pair)
        same.append(logits.argmax() == others.argmax())
        sure.append(softmax(logits).max() > 0.5)
    same, sure = np.array(same), np.array(sure)
    certain = f"{100 * same[sure].mean():.1f} %" if sure.any() else "none"
    print(
        f"{args.crops} crops of {len(photos)} photographs: mean difference {np.mean(differences):.2f} of 255; the same "
        f"class for {100 * same.mean():.1f} %, and for {certain} of the {sure.sum()} with a probability above 0.5"
    )


parser = make_parser(__doc__, "benchmark_preprocess.py")
parser.add_argument("student", type=Path, help="a student/ folder, or an artefact of a student")
parser.add_argument("photos", type=Path, help="a folder of large JPEG photographs")
parser.add_argument("--crops", type=int, default=500, help="crops to compare (default: 500)")
parser.add_argument("--rounds", type=int, default=11, help="measurements of the time (default: 11)")

if __name__ == "__main__":
    sys.exit(command(parser, run))

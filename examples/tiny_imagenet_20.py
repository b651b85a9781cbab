"""Real photographs on a CPU: 20 classes of Tiny-ImageNet at 32 px, four methods, several seeds, mean and deviation.

    python examples/tiny_imagenet_20.py path/to/tiny-imagenet-200

The folder has train/nXXXXXXXX/ and val/nXXXXXXXX/ with the images anywhere below. About 80 minutes on one core;
runs that are complete are not repeated. Everything was fixed before any method was run.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    "--data", "runs/tiny_imagenet_20/images", "--recipe", "cifar",
    "--model", str(ROOT / "examples/small_resnet.py:resnet"),
    "--no-small-stem", "--batch-size", "64", "--lr", "0.05", "--schedule", "cosine", "--warmup-epochs", "1",
    "--workers", "0",
]  # fmt: skip
STUDENT = ["--model-args", "width=8", "--epochs", "10"]
TEACHER = ["--model-args", "width=16", "--epochs", "15"]
DISTILL = ["--teacher", "runs/tiny_imagenet_20/teacher/student"]
METHODS = {
    "cross-entropy": [],
    "KD": ["--kd", "kd", *DISTILL],
    "NKD": ["--kd", "nkd", *DISTILL],
    "USKD": ["--self-kd", "uskd"],
}


def make_images(source: Path, target: Path) -> None:
    """Every tenth class in alphabetical order, each image resized to 32x32 and stored without loss."""
    classes = sorted(path.name for path in (source / "train").iterdir())[::10]
    for part in ("train", "val"):
        for name in classes:
            for path in sorted((source / part / name).rglob("*.JPEG")):
                file = target / part / name / f"{path.stem}.png"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR).save(file)


def last_top1(output: Path, epochs: int) -> float | None:
    """Top-1 of the last epoch, in percent; None when the run is not complete."""
    if not (output / "metrics.csv").exists():
        return None
    with open(output / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return float(rows[-1]["val_top1"]) if len(rows) == epochs else None


def run(name: str, flags: list[str]) -> float:
    output = Path("runs/tiny_imagenet_20") / name
    epochs = int(flags[flags.index("--epochs") + 1])
    if last_top1(output, epochs) is None:
        command = [sys.executable, str(ROOT / "train.py"), *COMMON, *flags, "--output", str(output), "--overwrite"]
        subprocess.run(command, check=True)
    top1 = last_top1(output, epochs)
    assert top1 is not None
    return top1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("source", type=Path, help="the unpacked Tiny-ImageNet")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    args = parser.parse_args()
    if not (args.source / "train").is_dir():
        parser.error(f"{args.source} has no train/ folder")
    make_images(args.source, Path("runs/tiny_imagenet_20/images"))

    teacher = run("teacher", TEACHER)
    tops = {
        name: [run(f"{name.lower()}-{s}", [*STUDENT, *flags, "--seed", str(s)]) for s in range(args.seeds)]
        for name, flags in METHODS.items()
    }
    print(f"\nteacher {teacher:.2f} %; students, top-1 of the last epoch, {args.seeds} seeds:")
    for name, values in tops.items():
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        gains = [value - base for value, base in zip(values, tops["cross-entropy"])]
        print(
            f"{name:14} {statistics.mean(values):6.2f} +- {deviation:.2f} %   "
            f"{statistics.mean(gains):+.2f} over cross-entropy   {'  '.join(f'{value:.2f}' for value in values)}"
        )


if __name__ == "__main__":
    main()

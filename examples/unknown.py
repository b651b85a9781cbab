"""Measure "none of these": train on 8 of the 10 digits, and classify images of the other two, the unknown images.

    python examples/unknown.py --draws 5 --output build/unknown        # about 2 minutes on a free core

Each draw leaves out its own two classes, splits the rest by 3 : 1 : 1 into training, validation and test images, and
runs train.py, which fits a temperature. A score orders the images. 95 % of the validation images reach its threshold.
The table has mean and standard deviation over the draws of four measures: AUROC (50 % if the score does not separate
known from unknown images), the share of unknown images below the threshold (refused), the share of known test images
that reach it (answered), and the share of right answers among these.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.cli import command, make_parser, number, show  # noqa: E402
from deploy.confidence import ANSWERED, calibration  # noqa: E402
from deploy.preprocess import prepare  # noqa: E402
from deploy.runtimes import RunOn, Runtime, load, softmax  # noqa: E402

MODEL = f"{ROOT}/examples/paper/cifar_models.py:resnet8"
FLAGS = ["--model", MODEL, "--img-size", "16", "--recipe", "digits", "--epochs", "10", "--workers", "0"]
NO_LABEL = -1


def split(draw: int, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the indices of train, val, test and unknown images, and the known classes."""
    g = np.random.default_rng(draw)
    classes = np.sort(g.permutation(10)[:8])
    known = g.permutation(np.flatnonzero(np.isin(labels, classes)))
    ends = 3 * len(known) // 5, 4 * len(known) // 5
    parts = dict(zip(("train", "val", "test"), np.split(known, ends)))
    return parts | {"unknown": np.flatnonzero(~np.isin(labels, classes))}, classes


def train_student(folder: Path, draw: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float | None]:
    """Train on a draw; return logits and labels of val, test and unknown images by name, and the temperature."""
    digits = load_digits()
    parts, classes = split(draw, digits.target)
    images = [Image.fromarray((pixels * (255 / 16)).astype(np.uint8)) for pixels in digits.images]
    for name in ("train", "val"):
        for index in parts[name]:
            file = folder / "data" / name / str(digits.target[index]) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            images[index].save(file)
    flags = [*FLAGS, "--data", folder / "data", "--output", folder / "run", "--seed", draw, "--device", "cpu"]
    subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
    student = load(folder / "run/student", RunOn("cpu", model_files=(MODEL,)))
    logits = {name: answers(student, [images[i] for i in parts[name]]) for name in ("val", "test", "unknown")}
    position = {label: index for index, label in enumerate(classes)}
    labels = {name: np.array([position.get(digits.target[i], NO_LABEL) for i in parts[name]]) for name in logits}
    return logits, labels, student.metadata.temperature


def answers(student: Runtime, images: list[Image.Image]) -> np.ndarray:
    return student.run_in_parts(np.stack([prepare(image, student.metadata) for image in images]), 64)


def scores_of(logits: np.ndarray, temperature: float | None) -> dict[str, np.ndarray]:
    """Return each score's values of all images."""
    largest = logits.max(1)
    return {
        "largest probability, temperature 1": softmax(logits).max(1),
        "largest probability, temperature fitted": softmax(logits / (temperature or 1.0)).max(1),
        "largest logit": largest,
        "energy": largest + np.log(np.exp(logits - largest[:, None]).sum(1)),
    }


def measure(
    logits: dict[str, np.ndarray], labels: dict[str, np.ndarray], temperature: float | None
) -> dict[str, list[float]]:
    """Return for each score, in percent: AUROC, unknown images refused, known images answered, and top-1 of these."""
    by_part = {name: scores_of(values, temperature) for name, values in logits.items()}
    right = logits["test"].argmax(1) == labels["test"]
    rows = {}
    for score, val in by_part["val"].items():
        test, unknown = by_part["test"][score], by_part["unknown"][score]
        threshold = np.sort(val)[int((1 - ANSWERED) * len(val))]
        is_known = np.repeat([1, 0], [len(test), len(unknown)])
        answered = test >= threshold
        auroc = roc_auc_score(is_known, np.concatenate([test, unknown]))
        shares = auroc, (unknown < threshold).mean(), answered.mean(), right[answered].mean()
        rows[score] = [100 * float(share) for share in shares]
    return rows


parser = make_parser(__doc__, "unknown.py")
parser.add_argument("--draws", type=number(int, 1), default=5, help="pairs of classes that are left out (default: 5)")
parser.add_argument("--output", type=Path, default=Path("build/unknown"), help="a new folder (default: build/unknown)")


def run(args: argparse.Namespace) -> None:
    tables, errors, sizes = [], [], []
    for draw in range(args.draws):
        logits, labels, temperature = train_student(args.output / str(draw), draw)
        tables.append(measure(logits, labels, temperature))
        right = logits["test"].argmax(1) == labels["test"]
        both = [100 * calibration(softmax(logits["test"] / t).max(1), right).error for t in (1.0, temperature or 1.0)]
        errors.append([100 * float(right.mean()), temperature or 1.0, *both])
        sizes.append([len(labels[name]) for name in ("test", "unknown")])
        show(f"draw {draw}: top-1, temperature, calibration error before and after: {np.round(errors[-1], 2).tolist()}")
    known, unknown = np.sum(sizes, 0)
    show(f"n = {args.draws} draws, {known} known and {unknown} unknown images in all", "")
    show("| score | AUROC | unknown refused, % | known answered, % | of these right, % |", "|---|---|---|---|---|")
    for score in tables[0]:
        values = np.array([table[score] for table in tables])
        cells = [f"{mean:.1f} +- {deviation:.1f}" for mean, deviation in zip(values.mean(0), values.std(0, ddof=1))]
        show(f"| {score} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(command(parser, run))

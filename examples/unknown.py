"""Measure how well a student refuses unknown images: those of a fifth of the classes, left out of training.

    python examples/unknown.py                       # 1,797 digits, 5 draws: about 2 minutes on a free core
    python examples/unknown.py --data photos/ --flags "--model tf_efficientnet_lite0 --pretrained lite0.safetensors"

photos/ has a folder for each class. Each draw leaves out its own classes, splits the rest by 3 : 1 : 1 into training,
validation and test images, and runs train.py, which fits a temperature. Four scores are compared. The threshold of each
score is set so that 95 % of the validation images reach it. The table has four measures, each as mean and standard
deviation over the draws:

    AUROC              50 % if the score does not separate known from unknown images
    unknown refused    share of the unknown images that are below the threshold
    known answered     share of the known test images that reach it
    of these right     share of right answers among these
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.check import image_files  # noqa: E402
from deploy.cli import UserError, command, make_parser, number, show  # noqa: E402
from deploy.confidence import ANSWERED, calibration  # noqa: E402
from deploy.preprocess import open_image, prepare  # noqa: E402
from deploy.runtimes import RunOn, load, softmax  # noqa: E402
from kdlite.training.launch import train_once  # noqa: E402

MODEL = f"{ROOT}/examples/paper/cifar_models.py:resnet8"
DIGITS = f"--model {MODEL} --img-size 16 --recipe digits --epochs 10 --workers 0"
NO_LABEL = -1

Parts = dict[str, list[tuple[Path, int]]]  # part -> its images, with their class index


def write_digits(folder: Path) -> None:
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        file = folder / str(label) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(file)


def split(data: Path, draw: int, classes: int, images: int) -> Parts:
    """Return the images of train, val, test and unknown.

    Args:
        classes: number of classes that the draw takes; 0: all
        images: number of images that it takes of each class; 0: all
    """
    g = np.random.default_rng(draw)
    folders = sorted(path for path in data.iterdir() if path.is_dir())
    if len(folders) < max(classes, 3):
        raise UserError(f"{data} has {len(folders)} class folders: expected at least {max(classes, 3)}")
    chosen = g.permutation(len(folders))[: classes or None]
    known = sorted(chosen[: -max(1, len(chosen) // 5)])
    parts: Parts = {"train": [], "val": [], "test": [], "unknown": []}
    for folder in sorted(chosen):
        files, _ = image_files(folders[folder])
        files = [files[i] for i in g.permutation(len(files))[: images or None]]
        if folder not in known:
            parts["unknown"] += [(file, NO_LABEL) for file in files]
            continue
        ends = 3 * len(files) // 5, 4 * len(files) // 5
        if ends[0] == 0 or ends[0] == ends[1]:
            raise UserError(f"{folders[folder]} has {len(files)} images: expected at least 3")
        for part, those in zip(parts, (files[: ends[0]], files[ends[0] : ends[1]], files[ends[1] :])):
            parts[part] += [(file, known.index(folder)) for file in those]
    return parts


def train_student(
    parts: Parts, flags: list[str], folder: Path, draw: int
) -> tuple[dict[str, np.ndarray], float | None]:
    """Train on a draw; return the logits of val, test and unknown images by name, and the temperature."""
    for part in ("train", "val"):
        for position, (file, label) in enumerate(parts[part]):
            copy = folder / "data" / part / f"{label:04}" / f"{position}{file.suffix}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    train_once([*flags, "--data", folder / "data", "--seed", draw, "--device", "cpu"], folder / "run")
    student = load(folder / "run/student", RunOn("cpu", model_files=(MODEL,)))
    logits = {
        part: student.run_in_parts(
            np.stack([prepare(open_image(file), student.metadata) for file, _ in parts[part]]), 64
        )
        for part in ("val", "test", "unknown")
    }
    return logits, student.metadata.temperature


def scores_of(logits: np.ndarray, temperature: float | None) -> dict[str, np.ndarray]:
    """Return the value of each score for each image."""
    largest = logits.max(1)
    return {
        "largest probability, temperature 1": softmax(logits).max(1),
        "largest probability, temperature fitted": softmax(logits / (temperature or 1.0)).max(1),
        "largest logit": largest,
        "energy": largest + np.log(np.exp(logits - largest[:, None]).sum(1)),
    }


def measure(logits: dict[str, np.ndarray], right: np.ndarray, temperature: float | None) -> dict[str, list[float]]:
    """Return for each score, in percent: AUROC, unknown images refused, known images answered, and top-1 of these."""
    by_part = {name: scores_of(values, temperature) for name, values in logits.items()}
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
parser.add_argument("--data", type=Path, help="a folder for each class (default: the digits of scikit-learn)")
parser.add_argument("--classes", type=number(int, 3), default=0, help="classes of a draw (default: all)")
parser.add_argument("--images", type=number(int, 3), default=0, help="images of a class (default: all)")
parser.add_argument("--flags", help="flags of train.py, needed with --data (default: a ResNet-8 at 16 px)")
parser.add_argument("--draws", type=number(int, 2), default=5, help="sets of classes that are left out (default: 5)")
parser.add_argument("--output", type=Path, default=Path("build/unknown"), help="a new folder (default: build/unknown)")


def run(args: argparse.Namespace) -> None:
    if args.data and args.flags is None:
        raise UserError("--data needs --flags, the flags of train.py for your student: --flags '--model resnet18'")
    if args.output.exists():
        raise UserError(f"{args.output} exists: name a new folder with --output")
    data, output = args.data or args.output / "digits", args.output.resolve()
    if args.data is None:
        write_digits(data)
    elif not data.is_dir():
        raise UserError(f"no folder {data}: expected a folder for each class in it")
    flags = shlex.split(DIGITS if args.flags is None else args.flags)
    tables, errors, sizes = [], [], []
    for draw in range(args.draws):
        parts = split(data, draw, args.classes, args.images)
        logits, temperature = train_student(parts, flags, output / str(draw), draw)
        right = logits["test"].argmax(1) == [label for _, label in parts["test"]]
        tables.append(measure(logits, right, temperature))
        both = [100 * calibration(softmax(logits["test"] / t).max(1), right).error for t in (1.0, temperature or 1.0)]
        errors.append([100 * float(right.mean()), temperature or 1.0, *both])
        sizes.append([len(parts[name]) for name in parts])
        show(f"draw {draw}: top-1, temperature T, calibration error at 1 and at T: {np.round(errors[-1], 2).tolist()}")
    train, val, known, unknown = np.sum(sizes, 0)
    show(f"n = {args.draws} draws; images over all draws: {train} for training, {val} for validation, "
         f"{known} known ones and {unknown} unknown ones for the test", "")  # fmt: skip
    show("| score | AUROC, % | unknown refused, % | known answered, % | of these right, % |", "|---|---|---|---|---|")
    for score in tables[0]:
        values = np.array([table[score] for table in tables])
        cells = [f"{mean:.1f} +- {deviation:.1f}" for mean, deviation in zip(values.mean(0), values.std(0, ddof=1))]
        show(f"| {score} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(command(parser, run))

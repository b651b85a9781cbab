"""Compare the fine-tuning defaults of our train.py with fastai, timm's train.py and a linear probe.

    python examples/paper/fine_tuning.py SOURCE --fastai PYTHON --timm TRAIN.PY      # 3 folders, 3 draws

SOURCE is the unpacked Tiny-ImageNet. Each draw has new random classes and training images, 5 validation images a class,
and 2,000 test images (1,475 with 5 classes). Only the result uses the test images. Every method starts from the same
ImageNet weights (tf_efficientnet_lite0) at 96 px on one thread. The others get about as many epochs as our train.py.
They took 1.2 to 2 times its CPU seconds, and fastai's seconds include the predictions for the test images. PYTHON is an
interpreter with fastai, TRAIN.PY is timm's script; without them, their runs are skipped. The command appends a line for
each run to results/fine_tuning.csv, skips finished runs, and prints the table.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]
from finetune import STUDENT, fetch  # noqa: E402

from deploy.cli import UserError, run_command, write_whole  # noqa: E402
from deploy.config import Metadata  # noqa: E402
from deploy.preprocess import open_image, prepare  # noqa: E402
from deploy.student import load_student  # noqa: E402
from kdlite.training import teacher_labels  # noqa: E402
from kdlite.training.data import hold_out, open_data  # noqa: E402
from kdlite.training.probe import fit_linear  # noqa: E402
from kdlite.training.weights import find_classifiers  # noqa: E402

RUNS, RESULTS = Path("runs/fine_tuning"), HERE / "results" / "fine_tuning.csv"
FOLDERS = {"10x50": (10, 50), "20x25": (20, 25), "5x200": (5, 200)}  # classes, training images a class
SIZE = 96
EPOCHS = {  # with 500 training images, with 1,000
    "kdlite": (8, 4),
    "fastai": (7, 3),
    "timm": (8, 4),
    "timm, AdamW": (8, 4),
}
# Usual flags for fine-tuning, because the defaults of timm's script are for 300 epochs of ImageNet.
ADAMW = ["--opt", "adamw", "--lr", "5e-4", "--warmup-epochs", "1", "-b", "16"]


def draw_folder(source: Path, root: Path, seed: str, classes: int, parts: dict[str, slice]) -> Path:
    """Copy images of random classes to root/PART/CLASS (unlabelled "more": to root/more), and return root.

    Args:
        source: the unpacked Tiny-ImageNet
        root: the new folder; an existing folder stays
        seed: seed of the classes and of the order of their images
        classes: number of classes
        parts: part -> a slice of the shuffled images of each class
    """
    if root.exists():
        return root
    chance, partial = random.Random(seed), root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for label in sorted(chance.sample(sorted(path.name for path in (source / "train").iterdir()), classes)):
        files = sorted((source / "train" / label).rglob("*.JPEG"))
        chance.shuffle(files)
        for part, images in parts.items():
            folder = partial / part if part == "more" else partial / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for file in files[images]:
                shutil.copy(file, folder / file.name)
    partial.rename(root)
    return root


def draw(source: Path, name: str, seed: int) -> Path:
    classes, train = FOLDERS[name]
    val, test = train + 5, train + 5 + min(2000 // classes, 295)
    parts = {"data/train": slice(train), "data/val": slice(train, val), "test": slice(val, test)}
    return draw_folder(source, RUNS / "images" / f"{name}-{seed}", f"{name} {seed}", classes, parts)


def read_arguments(parser: argparse.ArgumentParser, draws: int) -> argparse.Namespace:
    """Add SOURCE and --draws, parse the command line, and use one thread; raise UserError if SOURCE is incomplete."""
    parser.add_argument("source", type=Path, help="the unpacked Tiny-ImageNet")
    parser.add_argument("--draws", type=int, default=draws, help=f"number of draws (default: {draws})")
    args = parser.parse_args()
    if not (args.source / "train").is_dir():
        raise UserError(f"{args.source} has no train/ folder: expected the unpacked Tiny-ImageNet")
    torch.set_num_threads(1)
    return args


def read_results(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; [] if it does not exist."""
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.exists() else []


def write_results(file: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def run_draws(
    doc: str | None, draws: int, run_draw: Callable[[Path, int], list[dict[str, str]]], runs: Path, results: Path
) -> list[dict[str, str]]:
    """Read the command line, run the draws that a CSV file lacks, write the rows of each into it, and return all rows.

    Args:
        doc: text of --help
        draws: the default of --draws
        run_draw: function of the source and the draw's number; its runs in runs/NUMBER are removed afterwards
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = read_arguments(parser, draws)
    rows = read_results(results)
    for seed in range(args.draws):
        if any(row["draw"] == str(seed) for row in rows):
            continue
        rows += [{"draw": str(seed)} | row for row in run_draw(args.source, seed)]
        write_results(results, rows)
        shutil.rmtree(runs / str(seed))
        print(f"draw {seed} is finished", flush=True)
    return rows


def read_images(files: Iterable[Path], config: Metadata) -> np.ndarray:
    return np.stack([prepare(open_image(file), config) for file in files])


def images_of(folder: Path, config: Metadata) -> tuple[np.ndarray, torch.Tensor]:
    """Return the images of class folders, prepared by a student's config.json, and their labels."""
    names, files = sorted(path.name for path in folder.iterdir()), sorted(folder.glob("*/*"))
    return read_images(files, config), torch.tensor([names.index(file.parent.name) for file in files])


@torch.inference_mode()
def logits_of(model: torch.nn.Module, images: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    shift, scale = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    parts = (
        torch.from_numpy(part).permute(0, 3, 1, 2) / 255 for part in np.array_split(images, max(1, len(images) // 50))
    )
    return torch.cat([model.eval()((part - shift) / scale) for part in parts])


def top1(model: torch.nn.Module, config: Metadata, folder: Path) -> float:
    """Return the top-1 of a model on class folders."""
    images, labels = images_of(folder, config)
    return 100 * (logits_of(model, images, config.mean, config.std).argmax(1) == labels).float().mean().item()


def join_folds(folders: list[Path], data: Path, output: Path) -> None:
    """Write labels in which the answer about a photograph comes from the teacher that was not trained on it.

    Args:
        folders: the stored labels of the teachers, the teacher of `--fold I N` at position I
        data: folder of the photographs
        output: the new folder of labels
    """
    photographs, header = open_data(str(data)), teacher_labels.read_header(folders[0])
    held = [hold_out(photographs, fold, len(folders)).val.indices for fold in range(len(folders))]
    output.mkdir(parents=True, exist_ok=True)
    for part in teacher_labels.parts(header):
        of_teacher = [np.load(folder / part.name) for folder in folders]
        joined = of_teacher[0].copy()
        for rows, indices in zip(of_teacher, held):
            joined[indices] = rows[indices]
        teacher_labels.write_part(output / part.name, joined)
    digests = "".join(teacher_labels.read_header(folder)["teacher"]["digest"] for folder in folders)
    header["teacher"] |= {"name": "out of fold", "digest": hashlib.sha256(digests.encode()).hexdigest()}
    write_whole(output / teacher_labels.HEADER, json.dumps(header))


def run_timed(command: list) -> tuple[str, float]:
    """Return the output of a command on one thread, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))[:200]} failed: {done.stderr[-300:]}")
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_ours(root: Path, weights: Path, epochs: int, seed: int, output: Path) -> dict[str, tuple[float, float]]:
    """Return (top-1, CPU seconds) of train.py's defaults, and of the linear probe that they start from."""
    flags = ["--data", root / "data", "--model", STUDENT, "--pretrained", weights, "--img-size", SIZE, "--workers", 0]
    flags += ["--epochs", epochs, "--seed", seed, "--reference", 0, "--device", "cpu", "--output", output]
    shutil.rmtree(output, ignore_errors=True)
    _, seconds = run_timed([sys.executable, ROOT / "train.py", *flags])
    model, config = load_student(output / "student")
    ours = top1(model, config, root / "test")

    before = resource.getrusage(resource.RUSAGE_SELF)
    probe = timm.create_model(STUDENT, num_classes=config.num_classes)
    probe.load_state_dict({k: v for k, v in load_file(weights).items() if "classifier" not in k}, strict=False)
    (head,) = find_classifiers(probe, config.num_classes).values()
    train, train_labels = images_of(root / "data" / "train", config)
    features: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    logits_of(probe, train, config.mean, config.std)
    handle.remove()
    with torch.no_grad():
        weight, bias, _ = fit_linear(torch.cat(features), train_labels, config.num_classes)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "kdlite": (ours, seconds),
        "linear probe": (top1(probe, config, root / "test"), spent),
    }


def run_timm(root: Path, weights: Path, script: Path, flags: list, seed: int, output: Path) -> tuple[float, float]:
    """Return (top-1, CPU seconds) of timm's train.py."""
    shutil.rmtree(output, ignore_errors=True)
    classes = len(list((root / "test").iterdir()))
    common = ["--data-dir", root / "data", "--train-split", "train", "--val-split", "val", "--model", STUDENT]
    common += ["--pretrained", "--pretrained-path", weights, "--num-classes", classes, "--img-size", SIZE, "-j", 0]
    common += ["--device", "cpu", "--seed", seed, "--output", output.parent, "--experiment", output.name]
    _, seconds = run_timed([sys.executable, script, *common, *flags])
    saved = torch.load(output / "last.pth.tar", map_location="cpu", weights_only=False)
    model = timm.create_model(STUDENT, num_classes=classes)
    model.load_state_dict(saved["state_dict"])
    ours = RUNS / f"kdlite-{root.name}" / "student"
    if not ours.is_dir():
        raise UserError(f"no {ours}, whose preprocessing the test needs: run --rows kdlite first")
    config = load_student(ours)[1]  # the same evaluation: 96 px, crop 0.875
    return top1(model, config, root / "test"), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastai", type=Path, help="a Python with fastai")
    parser.add_argument("--timm", type=Path, help="timm's train.py")
    parser.add_argument("--rows", nargs="+", default=list(EPOCHS), choices=EPOCHS, help="methods to run (default: all)")
    args = read_arguments(parser, draws=3)
    weights = fetch(STUDENT).resolve()
    rows = read_results(RESULTS)
    there = {(row["folder"], row["draw"], row["row"]) for row in rows}
    for seed in range(args.draws):
        for name, (classes, train) in FOLDERS.items():
            root = draw(args.source, name, seed).resolve()
            long = classes * train > 500
            for row, lengths in EPOCHS.items():
                if (name, str(seed), row) in there or row not in args.rows:
                    continue
                epochs, output = lengths[long], RUNS / f"{row.replace(', ', '-')}-{name}-{seed}"
                if row == "kdlite":
                    found = run_ours(root, weights, epochs, seed, output)
                elif row == "fastai" and args.fastai:
                    text, seconds = run_timed(
                        [args.fastai, HERE / "fastai_fine_tune.py", root / "data", weights, SIZE, epochs, seed]
                    )
                    found = {row: (float(text.split("top1")[1]), seconds)}
                elif row.startswith("timm") and args.timm:
                    more = ADAMW if "AdamW" in row else []
                    flags = ["--epochs", epochs, *more]
                    found = {row: run_timm(root, weights, args.timm.resolve(), flags, seed, output.resolve())}
                else:
                    continue
                for what, (percent, seconds) in found.items():
                    passes = "" if what == "linear probe" else epochs
                    rows.append({"folder": name, "draw": str(seed), "row": what, "epochs": passes,
                                 "top1": f"{percent:.2f}", "cpu_s": f"{seconds:.0f}"})  # fmt: skip
                    print(*rows[-1].values(), flush=True)
                write_results(RESULTS, rows)
    print(f"| | {' | '.join(FOLDERS)} | CPU seconds |\n|---|{'---|' * (len(FOLDERS) + 1)}")
    for what in ("kdlite", "linear probe", "fastai", "timm", "timm, AdamW"):
        mine = [row for row in rows if row["row"] == what]
        cells = [[float(row["top1"]) for row in mine if row["folder"] == name] for name in FOLDERS]
        seconds = [float(row["cpu_s"]) for row in mine]
        if mine:
            means = [f"{statistics.mean(cell):.1f}" if cell else "" for cell in cells]
            print(f"| {what} | {' | '.join(means)} | {min(seconds):.0f} to {max(seconds):.0f} |")


if __name__ == "__main__":
    sys.exit(run_command("fine_tuning.py", main))

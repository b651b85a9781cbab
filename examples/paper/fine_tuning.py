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
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import timm
import torch
from draws import HERE, ROOT, draw_folder, images_of, logits_of, read_arguments, read_results, top1, write_results
from finetune import STUDENT, fetch
from safetensors.torch import load_file

from deploy.cli import UserError, run_command
from deploy.student import load_student
from kdlite.training.probe import fit_linear
from kdlite.training.weights import find_classifiers

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


def draw(source: Path, name: str, seed: int) -> Path:
    classes, train = FOLDERS[name]
    val, test = train + 5, train + 5 + min(2000 // classes, 295)
    parts = {"data/train": slice(train), "data/val": slice(train, val), "test": slice(val, test)}
    return draw_folder(source, RUNS / "images" / f"{name}-{seed}", f"{name} {seed}", classes, parts)


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
                for label, (percent, seconds) in found.items():
                    passes = "" if label == "linear probe" else epochs
                    rows.append({"folder": name, "draw": str(seed), "row": label, "epochs": passes,
                                 "top1": f"{percent:.2f}", "cpu_s": f"{seconds:.0f}"})  # fmt: skip
                    print(*rows[-1].values(), flush=True)
                write_results(RESULTS, rows)
    print(f"| | {' | '.join(FOLDERS)} | CPU seconds |\n|---|{'---|' * (len(FOLDERS) + 1)}")
    for label in ("kdlite", "linear probe", "fastai", "timm", "timm, AdamW"):
        mine = [row for row in rows if row["row"] == label]
        cells = [[float(row["top1"]) for row in mine if row["folder"] == name] for name in FOLDERS]
        seconds = [float(row["cpu_s"]) for row in mine]
        if mine:
            means = [f"{statistics.mean(cell):.1f}" if cell else "" for cell in cells]
            print(f"| {label} | {' | '.join(means)} | {min(seconds):.0f} to {max(seconds):.0f} |")


if __name__ == "__main__":
    sys.exit(run_command("fine_tuning.py", main))

"""Run train.py for all rows of a table on Tiny-ImageNet. Each run gives a row of results/*.csv.

    python examples/paper/tiny_imagenet.py SOURCE few-epochs    # CPU: 20 classes at 32 px, a student that underfits
    python examples/paper/tiny_imagenet.py SOURCE few-images    # CPU: 20 classes at 32 px, a student that fits
    python examples/paper/tiny_imagenet.py SOURCE nkd-parts     # CPU: ablations of NKD, in the setting of few-epochs
    python examples/paper/tiny_imagenet.py SOURCE uskd-parts    # CPU: ablations of USKD, in the setting of few-images
    python examples/paper/tiny_imagenet.py SOURCE lite-sweep    # CPU: weights of KD and NKD, ImageNet teacher
    python examples/paper/tiny_imagenet.py SOURCE lite-sharp    # CPU: the same search at temperatures below 1
    python examples/paper/tiny_imagenet.py SOURCE lite          # CPU: all methods, ImageNet teacher, same seeds
    python examples/paper/tiny_imagenet.py SOURCE lite-fits     # CPU: the student fits; also lite-fits-sweep
    python examples/paper/tiny_imagenet.py SOURCE lite-own      # CPU: the images of lite, a teacher trained on them
    python examples/paper/tiny_imagenet.py SOURCE lite-50       # CPU: as lite, 50 classes; also lite-50-sweep
    python examples/paper/tiny_imagenet.py SOURCE self-50       # CPU: no teacher, 50 classes; also self-20, self-100
    python examples/paper/tiny_imagenet.py SOURCE self-50-fits  # CPU: no teacher, 50 classes, nearer to fitting
    python examples/paper/tiny_imagenet.py SOURCE full          # one GPU: all 200 classes at 64 px, four networks

SOURCE has train/nXXXXXXXX/ and val/nXXXXXXXX/, with the images in any folder below them. Runs are stored under
runs/tiny_imagenet. The command does not repeat a finished run. README.md explains the choice of the settings. Then run
examples/paper/report.py.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
from finetune import TEACHER, fetch  # noqa: E402

RUNS = Path("runs/tiny_imagenet")
MODELS = HERE / "cifar_models.py"


class Setting(NamedTuple):
    """Hold the images of a table, and the flags of train.py that its runs share."""

    classes: int
    size: int  # pixels
    train: int  # training images a class, the first in alphabetical order
    held_out: int  # training images a class that are kept for validation, besides its 50 validation images
    common: list[str]
    teacher: list[str]  # flags of the teacher's training; empty: no teacher, or an ImageNet teacher
    student: list[str]
    copies: int = 1  # copies of each training image in an epoch
    views: int = 0  # views of each training image for an ImageNet teacher's stored answers; 0: no such teacher


class Table(NamedTuple):
    setting: str
    seeds: int
    runs: dict[str, list[str]]  # name: flags; "{teacher}": student/ of the teacher's run, or its stored labels
    first_seed: int = 0


COSINE = "--schedule cosine --warmup-epochs"
SMALL = shlex.split(f"--recipe cifar --no-small-stem --batch-size 64 --lr 0.05 {COSINE} 1 --cache device")
LITE = [*SMALL[: SMALL.index("--cache")], "--model", f"{MODELS}:resnet8", "--crop", "none"]
LITE_STUDENT = ["--img-size", "32", "--workers", "0", "--epochs"]
LARGE = shlex.split(f"--recipe cifar --img-size 64 --batch-size 256 --lr 0.2 {COSINE} 1 --epochs 8 --cache device")
DEIT = shlex.split(
    "--recipe imagenet-vit --img-size 64 --batch-size 512 --warmup-epochs 2 --epochs 20 --randaugment 0 0 --crop pad "
    "--cache device --model deit_tiny_patch16_224 --model-args patch_size=8"
)
SETTINGS = {
    "few-epochs": Setting(
        20, 32, train=400, held_out=50, common=SMALL,
        teacher=["--model", f"{MODELS}:resnet20", "--epochs", "16"],
        student=["--model", f"{MODELS}:resnet8", "--epochs", "8"],
    ),
    "few-images": Setting(
        20, 32, train=50, held_out=50, common=SMALL,
        teacher=["--model", f"{MODELS}:resnet20", "--epochs", "100"],
        student=["--model", f"{MODELS}:resnet8", "--epochs", "64", "--crop", "none"],
    ),
    # few-epochs and few-images with stored answers of a teacher that gets larger images
    "lite": Setting(
        20, 64, train=400, held_out=50, common=LITE, teacher=[], student=[*LITE_STUDENT, "8"], views=2,
    ),
    "lite-fits": Setting(
        20, 64, train=50, held_out=50, common=LITE, teacher=[], student=[*LITE_STUDENT, "16"], copies=4, views=2,
    ),
    "lite-50": Setting(  # the same number of images, but more classes
        50, 64, train=160, held_out=0, common=LITE, teacher=[], student=[*LITE_STUDENT, "8"], views=2,
    ),
    "lite-own": Setting(  # lite with a teacher that was trained on the same images
        20, 64, train=400, held_out=50, common=LITE,
        teacher=["--model", f"{MODELS}:resnet20", *LITE_STUDENT, "16"], student=[*LITE_STUDENT, "8"],
    ),
    # few-epochs without its teacher; 8,000 training images in all, for each number of classes
    **{
        f"self-{classes}": Setting(
            classes, 32, train=8000 // classes, held_out=50, common=SMALL, teacher=[],
            student=["--model", f"{MODELS}:resnet8", "--epochs", "8"],
        )
        for classes in (20, 50, 100)
    },
    "self-50-fits": Setting(  # few-images with the same number of images, but more classes
        50, 32, train=20, held_out=50, common=SMALL, teacher=[],
        student=["--model", f"{MODELS}:resnet8", "--epochs", "16", "--crop", "none"], copies=4,
    ),
    "full": Setting(200, 64, train=500, held_out=0, common=[], teacher=[*LARGE, "--model", "resnet34"], student=[]),
}  # fmt: skip

OWN = ["--model-file", f"{MODELS}:resnet20"]  # the teacher's code
KD, NKD = (["--kd", method, "--teacher", "{teacher}", *OWN] for method in ("kd", "nkd"))
USKD = ["--self-kd", "uskd"]
METHODS = {
    "cross-entropy": [],
    "label smoothing": ["--label-smoothing", "0.1"],
    "KD": KD,
    "NKD": NKD,
    "USKD": USKD,
}


def labels(kd: str, *flags: str) -> list[str]:
    return ["--kd", kd, "--teacher-labels", "{teacher}", *flags]


def lite_kd(temperature: float, weight: float) -> list[str]:
    return labels("kd", "--temperature", f"{temperature:g}", "--kd-weight", f"{weight:g}")


def lite_nkd(gamma: float, temperature: float) -> list[str]:
    return labels("nkd", "--gamma", f"{gamma:g}", "--temperature", f"{temperature:g}")


OTHERS = ROOT / "examples/losses.py"
LITE_METHODS = {
    "cross-entropy": [],
    "label smoothing": METHODS["label smoothing"],
    "KD tuned": lite_kd(1, 1),  # the best of lite-sweep
    "KD T 0.5 weight 3": lite_kd(0.5, 3),  # the best of lite-sharp; added after the other rows were run
    "NKD tuned": lite_nkd(0.25, 2),  # the best of both sweeps
    "NKD": lite_nkd(3.5, 3),  # the paper's values for CIFAR-100
    "NKD gamma 1.5 T 1": lite_nkd(1.5, 1),  # the paper's values for ImageNet
    **{name: labels(f"{OTHERS}:{name}") for name in ("dkd", "standardised_kd", "wttm", "dist")},
}
SELF_METHODS = {
    "cross-entropy": [],
    "label smoothing": METHODS["label smoothing"],
    "Tf-KD": ["--kd", f"{OTHERS}:tf_kd"],
    "USKD": USKD,
}
TABLES = {
    "few-epochs": Table("few-epochs", 15, METHODS),
    "few-images": Table("few-images", 15, METHODS),
    "nkd-parts": Table(
        "few-epochs", 3,
        {
            "cross-entropy": [],
            "NKD target": [*NKD, "--gamma", "0"],
            "NKD non-target": [*NKD, "variant=nkd_without_target"],
            "NKD": NKD,  # gamma 3.5, temperature 3: the paper's values for CIFAR-100
            "NKD gamma 1.5": [*NKD, "--gamma", "1.5"],
            "NKD gamma 7": [*NKD, "--gamma", "7"],
            "NKD temperature 1": [*NKD, "--temperature", "1"],
            "NKD temperature 5": [*NKD, "--temperature", "5"],
        },
    ),
    "uskd-parts": Table(
        "few-images", 3,
        {
            "cross-entropy": [],
            "USKD target": [*USKD, "--beta", "0", "--mu", "0"],
            "USKD weak": [*USKD, "--alpha", "0", "--beta", "0"],
            "USKD non-target, weak": [*USKD, "--alpha", "0"],
            "USKD": USKD,  # tapped at layer2
            "USKD ranked by log S": [*USKD, "variant=uskd_ranked_by_log"],
            "USKD tapped at layer1": [*USKD, "--tap", "layer1"],
            "USKD tapped at layer3": [*USKD, "--tap", "layer3"],
        },
    ),
    "lite": Table("lite", 5, LITE_METHODS),
    "lite-fits": Table(  # KD tuned is also the best of lite-fits-sweep
        "lite-fits", 5, {**LITE_METHODS, "NKD tuned here": lite_nkd(1.5, 3)}
    ),
    "lite-50": Table(
        "lite-50", 5, {**LITE_METHODS, "KD tuned here": lite_kd(1, 3), "NKD tuned here": lite_nkd(0.5, 1)}
    ),
    "lite-own": Table(
        "lite-own", 3, {"cross-entropy": [], "KD T 1 weight 1": [*KD, "--temperature", "1"], "NKD": NKD}
    ),
    **{name: Table(name, 5, SELF_METHODS) for name in ("self-20", "self-50", "self-100", "self-50-fits")},
    "lite-sweep": Table(  # twelve settings of each method, on a seed that is not in the tables
        "lite", 1, first_seed=100,
        runs={
            "cross-entropy": [],
            **{f"KD T {t} weight {w}": lite_kd(t, w) for t in (1, 2, 4, 8) for w in (1, 3)},
            **{f"NKD gamma {g} T {t}": lite_nkd(g, t) for g in (0.25, 0.5, 1.5, 3.5) for t in (1, 2)},
            # the best settings above were at the edge of the grid: these have smaller weights
            **{f"KD T {t} weight {w}": lite_kd(t, w) for t, w in ((1, 0.3), (2, 0.1), (2, 0.25), (4, 0.06))},
            **{f"NKD gamma {g} T {t}": lite_nkd(g, t) for t, g in ((1, 0.1), (2, 0.1), (4, 0.06), (4, 0.25))},
        },
    ),
    "lite-sharp": Table(  # temperatures that sharpen the teacher's answers about the other classes
        "lite", 1, first_seed=100,
        runs={
            **{f"NKD gamma {g} T {t}": lite_nkd(g, t) for g, t in ((3.5, 0.5), (1.5, 0.5), (6, 0.5), (6, 0.25))},
            **{f"KD T 0.5 weight {w}": lite_kd(0.5, w) for w in (1, 3)},
        },
    ),
    "lite-fits-sweep": Table(  # larger weights and temperatures, for a student that fits
        "lite-fits", 1, first_seed=100,
        runs={
            **{f"KD T {t} weight {w}": lite_kd(t, w) for t, w in ((1, 1), (1, 3), (2, 3), (2, 9), (4, 1), (4, 3))},
            **{f"NKD gamma {g} T {t}": lite_nkd(g, t) for g, t in ((1.5, 1), (3.5, 1), (1.5, 3), (3.5, 3), (7, 3))},
        },
    ),
    "lite-50-sweep": Table(  # settings near the best ones with 20 classes
        "lite-50", 1, first_seed=100,
        runs={
            **{f"KD T {t} weight {w}": lite_kd(t, w) for t, w in ((1, 1), (1, 3), (2, 1), (0.5, 3))},
            **{f"NKD gamma {g} T {t}": lite_nkd(g, t) for g, t in ((0.25, 2), (0.5, 1), (0.5, 2), (1.5, 3))},
        },
    ),
    "full": Table(
        "full", 3,
        {
            **{f"{model} {method}": [*LARGE, "--model", model, *flags]
               for model in ("resnet18", "mobilenet_v2") for method, flags in METHODS.items()},
            **{f"deit_tiny {method}": [*DEIT, *METHODS[method]] for method in ("cross-entropy", "NKD", "USKD")},
        },
    ),
}  # fmt: skip


def make_images(source: Path, target: Path, setting: Setting) -> None:
    """Write the images of evenly spaced classes in alphabetical order, resized and stored without loss."""
    classes = sorted(path.name for path in (source / "train").iterdir())
    for name in classes[:: max(1, len(classes) // setting.classes)][: setting.classes]:
        train, val = (sorted((source / part / name).rglob("*.JPEG")) for part in ("train", "val"))
        if not val:
            raise SystemExit(f"no images in {source / 'val' / name}: README.md has the commands that unpack the source")
        val += train[setting.train :][-setting.held_out :] if setting.held_out else []
        for part, files in (("train", train[: setting.train]), ("val", val)):
            folder = target / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                image = Image.open(file).convert("RGB")
                copies = [f"_{i}" for i in range(setting.copies)] if part == "train" and setting.copies > 1 else [""]
                for copy in copies:
                    if image.size == (setting.size, setting.size):
                        shutil.copy(file, folder / f"{file.stem}{copy}{file.suffix}")
                    else:
                        image = image.resize((setting.size, setting.size), Image.Resampling.BILINEAR)
                        image.save(folder / f"{file.stem}{copy}.png")


def result(output: Path, command: list[str]) -> dict[str, str] | None:
    """Return the last epoch of a run and facts of args.json; None if its command differs or it is not finished."""
    try:
        about = json.loads((output / "args.json").read_text())
        with open(output / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError):
        return None
    if about["command"] != shlex.join(command[1:]) or int(rows[-1]["epoch"]) != about["flags"]["epochs"]:
        return None
    seconds = sorted(float(row["seconds"]) for row in rows)[len(rows) // 2]
    keys = ("epoch", "train_loss", "loss_ce", "val_loss", "val_top1", "val_top5", "memory_mib")
    return {key: rows[-1][key] for key in keys} | {
        "seconds_per_epoch": f"{seconds:.4g}",
        "hardware": "{processes} x {device}, {cpu_cores} CPU cores".format(**about["hardware"]),
        "versions": " ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "command": about["command"].replace(f"{ROOT}/", ""),
    }


def write_labels(folder: Path, images: Path, setting: Setting) -> None:
    """Store the answers of the ImageNet teacher about the images; skip complete files of labels."""
    command = [sys.executable, "-m", "kdlite.training.teacher_labels", "--output", folder, "--data", images]
    command += ["--teacher", f"{TEACHER}:{fetch(TEACHER)}", "--views", setting.views, "--top-k", setting.classes - 1]
    command += ["--recipe", "cifar", "--model", f"{MODELS}:resnet8", "--img-size", setting.size, "--crop", "none"]
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def run(name: str, flags: list[str]) -> dict[str, str]:
    """Run train.py, or ablation.py with a variant, unless the run is finished; return its row."""
    variants = [flag.removeprefix("variant=") for flag in flags if flag.startswith("variant=")]
    script = [str(HERE / "ablation.py"), *variants] if variants else [str(ROOT / "train.py")]
    output = RUNS / name.replace(",", "").replace(" ", "-")
    command = [sys.executable, *script, *(flag for flag in flags if not flag.startswith("variant="))]
    command += ["--output", str(output)]
    row = result(output, command)
    if row is None:
        if (output / "args.json").exists():  # the run has another command, or was stopped
            shutil.rmtree(output)
        done = subprocess.run(command, capture_output=True, text=True)
        row = result(output, command)
        if done.returncode or row is None:
            raise SystemExit(f"{shlex.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    print(f"{name:40} top-1 {float(row['val_top1']):6.2f} %  {row['seconds_per_epoch']} s an epoch", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("source", type=Path, help="the unpacked Tiny-ImageNet")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, help="number of seeds of each row (default: the table's)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time, on CPU, with one thread each (default: 1)"
    )
    parser.add_argument("--flags", default="", help="more flags of train.py for every run, for small test runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the table")
    args = parser.parse_args()
    if not (args.source / "train").is_dir():
        parser.error(f"{args.source} has no train/ folder: expected the unpacked Tiny-ImageNet")
    table = TABLES[args.table]
    setting = SETTINGS[table.setting]
    images = RUNS / f"{table.setting}-images"
    if not images.exists():
        partial = RUNS / f"{table.setting}-images.partial"
        make_images(args.source, partial, setting)
        partial.rename(images)

    common = ["--data", str(images), *setting.common]
    more = shlex.split(args.flags)
    rows = {}
    teacher = Path()
    if setting.views:
        teacher = RUNS / table.setting / "labels"
        write_labels(teacher, images, setting)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    if setting.teacher:
        name = f"{table.setting}/teacher"
        rows["teacher", 0] = run(name, [*common, *setting.teacher, *more])
        teacher = RUNS / name / "student"
    runs = {}
    for seed in range(table.first_seed, table.first_seed + (args.seeds or table.seeds)):
        for method, flags in table.runs.items():
            filled = [flag.format(teacher=teacher) for flag in flags]
            shared = [known for known in METHODS if METHODS[known] == flags]  # another table may have the same run
            name = f"{table.setting}/{shared[0] if shared else method}-{seed}"
            runs[method, seed] = (name, [*common, *setting.student, *filled, *more, "--seed", str(seed)])
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            rows |= zip(runs, pool.map(lambda arguments: run(*arguments), runs.values()))
        except BaseException:  # after a failed run or Ctrl-C, do not start the waiting runs
            pool.shutdown(cancel_futures=True)
            raise

    args.results.mkdir(parents=True, exist_ok=True)
    partial = args.results / f"{args.table}.csv.partial"
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, ["method", "seed", *next(iter(rows.values()))])
        writer.writeheader()
        writer.writerows({"method": method, "seed": seed} | row for (method, seed), row in rows.items())
    partial.rename(args.results / f"{args.table}.csv")


if __name__ == "__main__":
    main()

"""Measure which part of USKD helps, and which network must rank the classes. Students learn 500 images.

    python examples/paper/uskd.py SOURCE            # 5 draws of 16 runs and 6 teachers: about 2 core hours

SOURCE is the unpacked Tiny-ImageNet. A draw has 20 classes of its own: 25 training images a class, 5 for validation,
and 345 for the test. The student is a ResNet-8 at 32 px, which learns its images by heart. It is tested after its last
epoch. The teachers are ResNet-8s too:

    domain       trained on the student's images and on 125 more a class
    out of fold  five teachers each learn four fifths of the images. Each answers about the fifth that it did not
                 learn; its best epoch was chosen on that fifth

The command writes a row for each run into results/uskd.csv, skips finished draws, and prints the table.
"""

import statistics
import sys
from pathlib import Path

import torch
from draws import HERE, draw_folder, join_folds, run_draws, top1
from finetune import run_command
from paired import describe, holm, p_of

from deploy.student import load_student
from kdlite.training.launch import ROOT, store_labels, train_once

RUNS, RESULTS = Path("runs/uskd"), HERE / "results" / "uskd.csv"
CLASSES, FOLDS, VIEWS = 20, 5, 8
PARTS = {"data/train": slice(25), "more/train": slice(150), "test": slice(155, 500)}
PARTS |= {"data/val": slice(150, 155), "more/val": slice(150, 155)}
MODEL, LOSSES = f"{HERE}/cifar_models.py:resnet8", f"{HERE}/zipf.py"
FLAGS = ["--model", MODEL, "--recipe", "cifar", "--no-small-stem", "--img-size", 32, "--crop", "none", "--workers", 0]
FLAGS += ["--batch-size", 32, "--lr", 0.05, "--schedule", "cosine", "--warmup-epochs", 1, "--device", "cpu"]
FLAGS += ["--reference", 0]
EPOCHS, EPOCHS_OF_DOMAIN = 80, 16  # 1,200 and 1,488 steps
USKD = ["--self-kd", "uskd"]
BASELINE = "cross-entropy"
ARMS = {
    BASELINE: [],
    "cross-entropy twice": ["--kd", f"{LOSSES}:cross_entropy_again"],
    "USKD, target term alone, alpha 1": [*USKD, "--alpha", 1, "--beta", 0, "--mu", 0],
    "USKD, weak head alone, mu 0.1": [*USKD, "--alpha", 0, "--beta", 0],  # added after the other rows were run
    "USKD 0.1, 0.1, 0.1": USKD,
    "USKD 1, 0.1, 0.005": [*USKD, "--alpha", 1, "--mu", 0.005],
}
BETAS = {"01": 0.1, "1": 1}


def arms_of_ranks(labels: dict[str, Path]) -> dict[str, tuple[list, Path]]:
    """Return the flags and the script of the rows with the non-target term.

    The rows in which the weak head ranks the classes also train this head.
    """
    train, found = ROOT / "train.py", {}
    for name, beta in BETAS.items():
        for who in ("random", "student"):
            found[f"Zipf by {who}, beta {beta:g}"] = (["--kd", f"{LOSSES}:{who}_{name}"], train)
        weak = [*USKD, "--alpha", 0, "--beta", beta]
        found[f"Zipf by weak head, beta {beta:g}"] = (["uskd_ranked_by_weak", *weak], HERE / "ablation.py")
        for teacher, folder in labels.items():
            flags = ["--kd", f"{LOSSES}:teacher_{name}", "--teacher-labels", folder]
            found[f"Zipf by {teacher}, beta {beta:g}"] = (flags, train)
    return found


def measure(output: Path, root: Path) -> float:
    """Return the top-1 of a run's last epoch on the test images."""
    model, config = load_student(output / "student", [MODEL])
    weights = torch.load(output / "last.pt", weights_only=True)["model"]
    model.load_state_dict({name: weights.get(f"model.{name}", weights.get(name)) for name in model.state_dict()})
    return top1(model, config, root / "test")


def run_draw(source: Path, seed: int) -> list[dict[str, str]]:
    """Return the name and the top-1 of each row."""
    root = draw_folder(source, RUNS / "images" / str(seed), f"uskd {seed}", CLASSES, PARTS).resolve()
    runs = (RUNS / str(seed)).resolve()
    flags = [*FLAGS, "--data", root / "data", "--seed", seed, "--epochs", EPOCHS]
    labelling = [*flags, "--views", VIEWS, "--top-k", CLASSES - 1, "--model-file", MODEL]
    found = {}
    of_domain = [*FLAGS, "--data", root / "more", "--seed", seed, "--epochs", EPOCHS_OF_DOMAIN]
    train_once(of_domain, runs / "domain-teacher")
    found["the domain teacher"] = measure(runs / "domain-teacher", root)
    labels = {"domain teacher": runs / "domain-labels", "teachers out of fold": runs / "fold-labels"}
    store_labels([*labelling, "--teacher", runs / "domain-teacher" / "student"], labels["domain teacher"])
    of_fold = [runs / f"fold-{fold}-labels" for fold in range(FOLDS)]
    for fold, folder in enumerate(of_fold):
        teacher = runs / f"fold-{fold}-teacher"
        train_once([*flags, "--fold", fold, FOLDS], teacher)
        store_labels([*labelling, "--teacher", teacher / "student"], folder)
    join_folds(of_fold, root / "data", labels["teachers out of fold"])
    arms = {row: (loss, ROOT / "train.py") for row, loss in ARMS.items()} | arms_of_ranks(labels)
    for row, (loss, script) in arms.items():
        train_once([*loss, *flags], runs / row, script)
        found[row] = measure(runs / row, root)
    return [{"row": row, "top1": f"{percent:.2f}"} for row, percent in found.items()]


def print_table(rows: list[dict[str, str]]) -> None:
    names = list(dict.fromkeys(row["row"] for row in rows))
    of_draw = {name: {row["draw"]: float(row["top1"]) for row in rows if row["row"] == name} for name in names}
    tops = {name: list(found.values()) for name, found in of_draw.items()}
    gains = {name: [top - of_draw[BASELINE][draw] for draw, top in found.items()] for name, found in of_draw.items()}
    del gains[BASELINE]
    students = [name for name in gains if name != "the domain teacher" and len(gains[name]) > 1]
    p_values = dict(zip(students, holm([p_of(gains[name]) for name in students])))
    print(f"n = {len(tops[BASELINE])} draws, 95 % intervals, p corrected by Holm\n")
    print("| row | top-1 % | over cross-entropy | p |\n|---|---|---|---|")
    for name in names:
        cells = [f"{statistics.mean(tops[name]):.2f}", describe(gains[name]) if name in gains else ""]
        print(f"| {name} | {' | '.join(cells)} | {f'{p_values[name]:.2g}' if name in p_values else ''} |")


def main() -> None:
    print_table(run_draws(__doc__, 5, run_draw, RUNS, RESULTS))


if __name__ == "__main__":
    sys.exit(run_command("uskd.py", main))

"""Measure the gain from photographs without labels, with a teacher's answers (KD, NKD) or with pseudo-labels.

    python examples/paper/unlabelled.py SOURCE              # 2 folders, 5 draws, 50 runs: an hour on a core

SOURCE is the unpacked Tiny-ImageNet. A draw has 10 classes of its own: 5 (or 50) labelled photographs a class, 95 (or
400) without a label, 5 for validation and 45 for the test. The student is EfficientNet-Lite0, the teacher Lite2, both
from ImageNet weights at 64 px. The teacher is trained on the labelled photographs alone. A pseudo-label is the
teacher's most probable class. Pseudo-labels, KD and NKD train for the same number of steps. The command writes a row
for each run into results/unlabelled.csv, and skips finished draws.
"""

import shutil
import statistics
import sys
from pathlib import Path

from draws import HERE, draw_folder, logits_of, read_images, run_draws, top1
from finetune import STUDENT, TEACHER, fetch, run_command
from paired import describe

from deploy.student import load_student
from kdlite.training.launch import store_labels, train_once

RUNS, RESULTS = Path("runs/unlabelled"), HERE / "results" / "unlabelled.csv"
FOLDERS = {"50 + 950": (5, 95), "500 + 4,000": (50, 400)}  # photographs a class: with a label, without
EPOCHS = {"50 + 950": (20, 3), "500 + 4,000": (8, 1)}  # of the labelled photographs alone, of all photographs
CLASSES, SIZE = 10, 64
METHODS = {"KD": ["--kd", "kd", "--temperature", "1"], "NKD": ["--kd", "nkd"]}
ROWS = ("the student alone", "the teacher", "pseudo-labels", *METHODS)


def draw(source: Path, name: str, seed: int) -> Path:
    """Make a folder with data/train, data/val, more, and test, and return it."""
    labelled, more = FOLDERS[name]
    parts = {
        "data/train": slice(labelled),
        "data/val": slice(50, 55),
        "test": slice(55, 100),
        "more": slice(-more, None),
    }
    return draw_folder(source, RUNS / "images" / f"{labelled}-{seed}", f"unlabelled {seed}", CLASSES, parts)


def test(output: Path, root: Path) -> float:
    return top1(*load_student(output / "student"), root / "test")


def pseudo_label(root: Path, teacher: Path) -> Path:
    """Return a folder with the labelled photographs, and with the others in the folders of their pseudo-labels."""
    folder = root / "pseudo"
    if not folder.exists():
        partial = root / "pseudo.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(root / "data", partial)
        model, config = load_student(teacher / "student")
        files = sorted((root / "more").iterdir())
        images = read_images(files, config)
        answers = logits_of(model, images, config.mean, config.std).argmax(1).tolist()
        for file, answer in zip(files, answers):
            shutil.copy(file, partial / "train" / config.label_names[answer] / file.name)
        partial.rename(folder)
    return folder


def run_folder(source: Path, name: str, seed: int) -> dict[str, float]:
    """Return the top-1 of each row of a folder."""
    root = draw(source, name, seed).resolve()
    alone, whole = EPOCHS[name]
    flags = ["--img-size", SIZE, "--workers", 0, "--device", "cpu", "--reference", 0, "--seed", seed]
    flags += ["--batch-size", 16]
    student = [*flags, "--model", STUDENT, "--pretrained", fetch(STUDENT).resolve()]
    teacher = [*flags, "--model", TEACHER, "--pretrained", fetch(TEACHER).resolve()]
    of_folder, runs = ["--data", root / "data"], RUNS / str(seed) / root.name
    train_once([*student, *of_folder, "--epochs", alone], runs / "alone")
    train_once([*teacher, *of_folder, "--epochs", alone], runs / "teacher")
    asked = [*student, *of_folder, "--unlabelled", root / "more"]
    store_labels([*asked, "--teacher", (runs / "teacher/student").resolve(), "--views", whole], runs / "labels")
    found = {"the student alone": test(runs / "alone", root), "the teacher": test(runs / "teacher", root)}
    train_once([*student, "--data", pseudo_label(root, runs / "teacher"), "--epochs", whole], runs / "pseudo")
    found["pseudo-labels"] = test(runs / "pseudo", root)
    for method, loss in METHODS.items():
        more = ["--unlabelled", root / "more", "--teacher-labels", (runs / "labels").resolve(), "--epochs", whole]
        train_once([*student, *of_folder, *more, *loss], runs / method)
        found[method] = test(runs / method, root)
    return found


def run_draw(source: Path, seed: int) -> list[dict[str, str]]:
    """Return the folder, the row and the top-1 of each run."""
    return [
        {"folder": name, "row": row, "top1": f"{percent:.2f}"}
        for name in FOLDERS
        for row, percent in run_folder(source, name, seed).items()
    ]


def print_table(rows: list[dict[str, str]]) -> None:
    tops = {(row["folder"], row["row"], row["draw"]): float(row["top1"]) for row in rows}
    draws = list(dict.fromkeys(row["draw"] for row in rows))
    print(f"| top-1 %, n = {len(draws)} | {' | '.join(FOLDERS)} |\n|---|{'---|' * len(FOLDERS)}")
    for row in ROWS:
        cells = [f"{statistics.mean(tops[name, row, draw] for draw in draws):.1f}" for name in FOLDERS]
        if row != ROWS[0]:
            gains = [[tops[name, row, draw] - tops[name, ROWS[0], draw] for draw in draws] for name in FOLDERS]
            cells = [f"{cell}, {describe(gain)}" for cell, gain in zip(cells, gains)]
        print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    print_table(run_draws(__doc__, 5, run_draw, RUNS, RESULTS))


if __name__ == "__main__":
    sys.exit(run_command("unlabelled.py", main))

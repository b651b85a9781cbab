"""Measure the gain from photographs without labels, with a teacher's answers (KD, NKD) or with pseudo-labels.

    python examples/paper/unlabelled.py SOURCE              # 2 folders, 5 draws, 50 runs: an hour on a core

SOURCE is the unpacked Tiny-ImageNet. A draw has 10 classes of its own: 5 (or 50) labelled photographs a class, 95 (or
400) without a label, 5 for validation and 45 for the test. The student is EfficientNet-Lite0, the teacher Lite2, both
from ImageNet weights at 64 px. The teacher is trained on the labelled photographs alone. A pseudo-label is the
teacher's most probable class. The rows with unlabelled photographs take equal numbers of steps. The command writes a
row for each run into results/unlabelled.csv, and skips finished draws.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from fine_tuning import (
    HERE,
    draw_folder,
    images_of,
    logits_of,
    read_arguments,
    read_images,
    read_results,
    top1,
    write_results,
)
from finetune import STUDENT, TEACHER, fetch, run_command

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
    model, config = load_student(output / "student")
    images, labels = images_of(root / "test", config)
    return top1(logits_of(model, images, config.mean, config.std), labels)


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


def run_draw(source: Path, name: str, seed: int) -> dict[str, float]:
    """Return the top-1 of each row."""
    root = draw(source, name, seed).resolve()
    alone, whole = EPOCHS[name]
    flags = ["--img-size", SIZE, "--workers", 0, "--device", "cpu", "--reference", 0, "--seed", seed]
    flags += ["--batch-size", 16]
    student = [*flags, "--model", STUDENT, "--pretrained", fetch(STUDENT).resolve()]
    teacher = [*flags, "--model", TEACHER, "--pretrained", fetch(TEACHER).resolve()]
    of_folder, runs = ["--data", root / "data"], RUNS / root.name
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = read_arguments(parser, draws=5)
    rows = read_results(RESULTS)
    for name in FOLDERS:
        for seed in range(args.draws):
            if any((row["folder"], row["draw"]) == (name, str(seed)) for row in rows):
                continue
            for row, percent in run_draw(args.source, name, seed).items():
                rows.append({"folder": name, "draw": str(seed), "row": row, "top1": f"{percent:.2f}"})
                print(*rows[-1].values(), flush=True)
            write_results(RESULTS, rows)
    print(f"| top-1 %, n = {args.draws} | {' | '.join(FOLDERS)} |\n|---|{'---|' * len(FOLDERS)}")
    for what in ROWS:
        cells = []
        for name in FOLDERS:
            top = {row["draw"]: float(row["top1"]) for row in rows if (row["folder"], row["row"]) == (name, what)}
            base = {row["draw"]: float(row["top1"]) for row in rows if (row["folder"], row["row"]) == (name, ROWS[0])}
            gains = [top[seed] - base[seed] for seed in top]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
            gain = f" ({statistics.mean(gains):+.1f} +- {error:.1f})" if what != ROWS[0] else ""
            cells.append(f"{statistics.mean(top.values()):.1f}{gain}")
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(run_command("unlabelled.py", main))

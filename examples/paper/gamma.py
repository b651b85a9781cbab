"""Compare NKD with a constant gamma and with rules, such as a gamma for each image.

    python examples/paper/gamma.py SOURCE           # 3 draws of 31 runs: about 60 core minutes a draw

SOURCE is the unpacked Tiny-ImageNet. A draw has 20 random classes, and 295 test images of each. The student is a
ResNet-8 at 32 px from random weights. It is tested after its last epoch. The rules are in gamma_rules.py. The settings:

    foreign, underfits    200 images a class, 1,000 steps; the teacher is ImageNet's EfficientNet-Lite2
    foreign, fits         25 images a class, 960 steps; the same teacher
    own, underfits        200 images a class, 1,000 steps; the teacher is a ResNet-20, trained on these images

A student that fits has learned its training images; a student that underfits has not.

The command writes a row for each run into results/gamma.csv, skips finished draws, and prints the tables.
"""

import shutil
import statistics
import sys
from pathlib import Path

from draws import HERE, draw_folder, run_draws
from finetune import TEACHER, fetch, run_command
from gamma_rules import CONSTANTS, RULES
from paired import describe
from uskd import FLAGS, measure

from kdlite.training.launch import store_labels, train_once

RUNS, RESULTS = Path("runs/gamma"), HERE / "results" / "gamma.csv"
CLASSES, VIEWS = 20, 2
PARTS = {"many/train": slice(200), "few/train": slice(25), "test": slice(205, 500)}
PARTS |= {"many/val": slice(200, 205), "few/val": slice(200, 205)}
OWN = f"{HERE}/cifar_models.py:resnet20"
EPOCHS = {"many": 8, "few": 64}
SETTINGS = {"foreign, underfits": "many", "foreign, fits": "few", "own, underfits": "many"}


def run_draw(source: Path, seed: int) -> list[dict[str, str]]:
    """Return the setting, the rule and the top-1 of each run."""
    root = draw_folder(source, RUNS / "images" / str(seed), f"gamma {seed}", CLASSES, PARTS).resolve()
    runs = (RUNS / str(seed)).resolve()
    own = [*FLAGS, "--model", OWN, "--data", root / "many", "--seed", seed, "--epochs", 2 * EPOCHS["many"]]
    train_once(own, runs / "own-teacher")
    teachers = {
        "foreign": ["--teacher", f"{TEACHER}:{fetch(TEACHER).resolve()}", "--img-size", 64],  # the size of the images
        "own": ["--teacher", runs / "own-teacher" / "student", "--model-file", OWN],
    }
    found = []
    for setting, images in SETTINGS.items():
        flags = [*FLAGS, "--data", root / images, "--seed", seed, "--epochs", EPOCHS[images]]
        labels, teacher = runs / f"labels-{setting}", teachers[setting.partition(",")[0]]
        store_labels([*flags, *teacher, "--views", VIEWS, "--top-k", CLASSES - 1], labels)
        for rule in RULES:
            output = runs / f"{setting}-{rule}"
            if not (output / "curves.png").exists():  # no resume: a checkpoint has no state of a rule
                shutil.rmtree(output, ignore_errors=True)
            train_once([*flags, "--kd", f"{HERE}/gamma_rules.py:{rule}", "--teacher-labels", labels], output)
            found.append({"setting": setting, "rule": rule, "top1": f"{measure(output, root):.2f}"})
    return found


def print_tables(rows: list[dict[str, str]]) -> None:
    """Print each rule's top-1, and its difference from the constant with the best mean of the setting."""
    for setting in SETTINGS:
        here = [row for row in rows if row["setting"] == setting]
        of_draw = {rule: {row["draw"]: float(row["top1"]) for row in here if row["rule"] == rule} for rule in RULES}
        tops = {rule: list(found.values()) for rule, found in of_draw.items()}
        best = max(CONSTANTS, key=lambda rule: statistics.mean(tops[rule]))
        print(f"\n{setting} (n = {len(tops[best])} draws)\n\n| gamma | top-1 % | over {best} |\n|---|---|---|")
        for rule, values in tops.items():
            difference = (
                "" if rule == best else describe([top - of_draw[best][draw] for draw, top in of_draw[rule].items()])
            )
            print(f"| {rule} | {statistics.mean(values):.2f} | {difference} |")


def main() -> None:
    print_tables(run_draws(__doc__, 3, run_draw, RUNS, RESULTS))


if __name__ == "__main__":
    sys.exit(run_command("gamma.py", main))

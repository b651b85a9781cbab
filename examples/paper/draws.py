"""Help the experiments that repeat with random classes (draws): folders, rows in a CSV file, top-1, joined labels."""

import argparse
import csv
import hashlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]
from deploy.cli import UserError, write_whole  # noqa: E402
from deploy.config import Metadata  # noqa: E402
from deploy.preprocess import open_image, prepare  # noqa: E402
from kdlite.training import teacher_labels  # noqa: E402
from kdlite.training.data import hold_out, open_data  # noqa: E402


def draw_folder(source: Path, root: Path, seed: str, classes: int, parts: dict[str, slice]) -> Path:
    """Copy images of random classes to root/PART/CLASS, and return root. The part "more" has no class folders.

    Args:
        source: the unpacked Tiny-ImageNet
        root: the new folder; an existing folder stays
        seed: seed of the classes and of the order of their images
        classes: number of classes
        parts: part -> a slice of the shuffled images of each class
    """
    if root.exists():
        return root
    chance, partial = random.Random(seed), root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for label in sorted(chance.sample(sorted(path.name for path in (source / "train").iterdir()), classes)):
        files = sorted((source / "train" / label).rglob("*.JPEG"))
        chance.shuffle(files)
        for part, images in parts.items():
            folder = partial / part if part == "more" else partial / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for file in files[images]:
                shutil.copy(file, folder / file.name)
    partial.rename(root)
    return root


def read_arguments(parser: argparse.ArgumentParser, draws: int) -> argparse.Namespace:
    """Add SOURCE and --draws, parse the command line, and use one thread; raise UserError if SOURCE is incomplete."""
    parser.add_argument("source", type=Path, help="the unpacked Tiny-ImageNet")
    parser.add_argument("--draws", type=int, default=draws, help=f"number of draws (default: {draws})")
    args = parser.parse_args()
    if not (args.source / "train").is_dir():
        raise UserError(f"{args.source} has no train/ folder: expected the unpacked Tiny-ImageNet")
    torch.set_num_threads(1)
    return args


def read_results(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; [] if it does not exist."""
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.exists() else []


def write_results(file: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def run_draws(
    doc: str | None, draws: int, run_draw: Callable[[Path, int], list[dict[str, str]]], runs: Path, results: Path
) -> list[dict[str, str]]:
    """Read the command line, run the draws that a CSV file lacks, write the rows of each into it, and return all rows.

    Args:
        doc: text of --help
        draws: the default of --draws
        run_draw: function of the source and the draw's number; its runs in runs/NUMBER are removed afterwards
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = read_arguments(parser, draws)
    rows = read_results(results)
    for seed in range(args.draws):
        if any(row["draw"] == str(seed) for row in rows):
            continue
        rows += [{"draw": str(seed)} | row for row in run_draw(args.source, seed)]
        write_results(results, rows)
        shutil.rmtree(runs / str(seed))
        print(f"draw {seed} is finished", flush=True)
    return rows


def read_images(files: Iterable[Path], config: Metadata) -> np.ndarray:
    return np.stack([prepare(open_image(file), config) for file in files])


def images_of(folder: Path, config: Metadata) -> tuple[np.ndarray, torch.Tensor]:
    """Return the images of class folders, prepared by a student's config.json, and their labels."""
    names, files = sorted(path.name for path in folder.iterdir()), sorted(folder.glob("*/*"))
    return read_images(files, config), torch.tensor([names.index(file.parent.name) for file in files])


@torch.inference_mode()
def logits_of(model: torch.nn.Module, images: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    shift, scale = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    parts = (
        torch.from_numpy(part).permute(0, 3, 1, 2) / 255 for part in np.array_split(images, max(1, len(images) // 50))
    )
    return torch.cat([model.eval()((part - shift) / scale) for part in parts])


def top1(model: torch.nn.Module, config: Metadata, folder: Path) -> float:
    """Return the top-1 of a model on class folders."""
    images, labels = images_of(folder, config)
    return 100 * (logits_of(model, images, config.mean, config.std).argmax(1) == labels).float().mean().item()


def join_folds(folders: list[Path], data: Path, output: Path) -> None:
    """Write labels in which the answer about a photograph comes from the teacher that was not trained on it.

    Args:
        folders: the stored labels of the teachers, the teacher of `--fold I N` at position I
        data: folder of the photographs
        output: the new folder of labels
    """
    photographs, header = open_data(str(data)), teacher_labels.read_header(folders[0])
    held = [hold_out(photographs, fold, len(folders)).val.indices for fold in range(len(folders))]
    output.mkdir(parents=True, exist_ok=True)
    for part in teacher_labels.parts(header):
        of_teacher = [np.load(folder / part.name) for folder in folders]
        joined = of_teacher[0].copy()
        for rows, indices in zip(of_teacher, held):
            joined[indices] = rows[indices]
        teacher_labels.write_part(output / part.name, joined)
    digests = "".join(teacher_labels.read_header(folder)["teacher"]["digest"] for folder in folders)
    header["teacher"] |= {"name": "out of fold", "digest": hashlib.sha256(digests.encode()).hexdigest()}
    write_whole(output / teacher_labels.HEADER, json.dumps(header))

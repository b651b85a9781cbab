"""A run directory: claimed, described and filled by train.py, read by the commands of deploy/. Needs no torch.

runs/001-mobilenet_v2-uskd/   args.json  metrics.csv  curves.png  log.txt  last.pt  previous.pt  best.pt
                              reference.npz  student/
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.cli import UserError, version, write_whole

WRITTEN = ("args.json", "split.csv", "batch.png", "metrics.csv", "curves.png", "per_class.csv", "confusion.png",
           "log.txt", "last.pt", "previous.pt", "best.pt", "reference.npz",
           "student/model.safetensors", "student/config.json", "student/README.md")  # fmt: skip
LAST, PREVIOUS = "last.pt", "previous.pt"  # the two newest checkpoints
MARK = b"kdlite sha256 "  # and 64 digits, which end a checkpoint
PACKAGES = ("torch", "torchvision", "timm", "numpy")


def claim(output: str | None, model: str, method: str, resume: bool = False, overwrite: bool = False) -> Path:
    """The directory of a run: output, or the next number under runs/, which is this run's alone.

    Raises:
        UserError: output holds a run, and neither resume nor overwrite is said; or it cannot be made
    """
    try:
        if not output:
            return claim_number(Path("runs"), model, method)
        folder = Path(output)
        if (folder / "args.json").exists() and not (resume or overwrite):
            raise UserError(f"{folder} already holds a run: --resume goes on with it, --overwrite replaces it")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise UserError(f"cannot make the run directory {output or 'runs/'}: {error.strerror}") from error


def claim_number(runs: Path, model: str, method: str) -> Path:
    """runs/NNN-model-method; of several that start at once each gets a number of its own."""
    if os.path.isdir(model):
        parts = Path(model).resolve().parts
        model = parts[-2] if parts[-1] == "student" else parts[-1]
    else:
        model = Path(model.rpartition(":")[0]).stem or model
    runs.mkdir(exist_ok=True)
    taken = [int(match[1]) for path in runs.iterdir() if (match := re.match(r"(\d+)", path.name))]
    for number in itertools.count(max(taken, default=0) + 1):
        folder = runs / f"{number:03d}-{model}-{method}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        if len(list(runs.glob(f"{number:03d}-*"))) == 1:
            break
        folder.rmdir()  # another run has the number
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory: one run at a time. The kernel lets go of it when a run is killed.

    Raises:
        UserError: another run holds it; the message names its host and process
    """
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read().strip() or 'another run'}: wait, or stop it"
            ) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def clear(folder: Path) -> None:
    """Remove what a run has written."""
    for file in (*map(folder.joinpath, WRITTEN), *folder.glob("events.out.tfevents.*")):
        file.unlink(missing_ok=True)


# ---- checkpoints, as bytes ----------------------------------------------------------------------------------------


def seal(content: bytearray) -> bytearray:
    """Append a digest to a zip archive, as its comment: torch.load reads it as before, and no bit changes unseen."""
    comment = len(MARK) + 64
    content[-2:] = comment.to_bytes(2, "little")  # the archive's last field
    return content + MARK + hashlib.sha256(content).hexdigest().encode()


def is_whole(content: bytes) -> bool:
    """Whether the bytes are those that seal() made."""
    body, mark = memoryview(content)[: -len(MARK) - 64], bytes(content[-len(MARK) - 64 :])
    return mark == MARK + hashlib.sha256(body).hexdigest().encode()


def write_checkpoint(folder: Path, content: bytes | bytearray, best: bool = False) -> None:
    """The newest checkpoint; the one before it is kept. best: it is also that of the best epoch."""
    if best:
        write_whole(folder / "best.pt", content)
    write_whole(folder / LAST, content, keep=folder / PREVIOUS)


def read_checkpoint(folder: Path, older: bool = False) -> tuple[Path, bytes] | None:
    """The newest checkpoint of a run; None where there is none. older: take the one before if the newest is damaged.

    Raises:
        UserError: it is damaged, or no checkpoint of train.py; what else there is, is named
    """
    files = [file for file in (folder / LAST, folder / PREVIOUS) if file.exists()]
    damaged: list[Path] = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        if is_whole(content):
            if damaged and not older:
                raise UserError(f"{damaged[0]} is damaged or no checkpoint of train.py; {file} is whole: "
                                f"--resume auto takes it")  # fmt: skip
            return file, content
        damaged.append(file)
    if damaged:
        names = " and ".join(map(str, damaged))
        raise UserError(f"{names}: damaged, or no checkpoint of train.py; --overwrite starts anew")
    return None


# ---- what a person reads ------------------------------------------------------------------------------------------


def describe(flags: dict[str, Any], device: str, processes: int) -> str:
    """args.json: what came of the flags and, under flags["given"], what was typed; versions and hardware."""
    about = {
        "flags": {name: value for name, value in flags.items() if name not in ("given", "fitted")},
        "given": flags["given"],
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "hardware": {
            "device": device,
            "processes": processes,
            "cpu_cores": os.cpu_count(),
            "platform": platform.platform(),
        },
    }
    return json.dumps(about, indent=2)


def read_given(output: Path) -> dict[str, Any]:
    """The flags that a run was started with; nothing where there is no run yet."""
    file = output / "args.json"
    try:
        about = json.loads(file.read_bytes()) if file.exists() else {"given": {}}
        return dict(about["given"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {file} to resume from: {error!r}") from error


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """The whole file each time: a resumed run drops the rows after its checkpoint, and no row is half-written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))  # a resume may add some
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """What is printed of an epoch."""
    terms = ", ".join(f"{name[5:]} {value:.3f}" for name, value in row.items() if name.startswith("loss_"))
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f} ({terms})  "
        f"top-1 {row['val_top1']:.2f} %  top-5 {row['val_top5']:.2f} %  lr {row['lr']:.2g}  "
        f"{row['images_per_s']:.0f} images/s  {row['seconds']:.1f} s"
        + (f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else "")
    )


def resident_mib() -> int:
    """The most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak >> (20 if sys.platform == "darwin" else 10)


def plot_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Losses and accuracies over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses = [name for name in rows[-1] if "loss" in name]
    for axis, names, label in zip(figure.subplots(1, 2), (losses, ["val_top1", "val_top5"]), ("loss", "accuracy (%)")):
        for name in names:
            axis.plot([row["epoch"] for row in rows], [row.get(name, math.nan) for row in rows], label=name)
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend()
        axis.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())

"""A run directory: claimed, described and filled by train.py, read by the commands of deploy/. Needs no torch.

runs/001-mobilenet_v2-uskd/   args.json  metrics.csv  curves.png  log.txt  last.pt  previous.pt  best.pt
                              reference.npz  student/
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.cli import UserError, version

WRITTEN = ("args.json", "split.csv", "batch.png", "metrics.csv", "curves.png", "per_class.csv", "confusion.png",
           "log.txt", "last.pt", "previous.pt", "best.pt", "reference.npz",
           "student/model.safetensors", "student/config.json", "student/README.md")  # fmt: skip
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

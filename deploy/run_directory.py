"""Make and read a run directory. train.py makes and fills it, and the commands of deploy/ read it.

runs/001-mobilenet_v2-uskd/   args.json  metrics.csv  curves.png  log.txt  last.pt  previous.pt  best.pt
                              reference.npz  student/  and the pictures and tables of kdlite/training/outputs.py
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import os
import platform
import re
import shlex
import socket
import stat
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deploy.cli import UserError, read_file, version, write_whole

SPLIT = "split.csv"
PACKAGES = ("torch", "torchvision", "timm", "numpy")


def claim(output: str | None, model: str, method: str, resume: bool = False) -> Path:
    """Return the directory of a run: `output`, or a new one under runs/ with the next number.

    Raise UserError if output has a run already and resume is not set, or if the directory cannot be made.
    """
    try:
        if not output:
            return claim_number(Path("runs"), model, method)
        folder = Path(output)
        if (folder / "args.json").exists() and not resume:
            raise UserError(f"{folder} already holds a run: --resume continues it; remove the folder to start again")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise UserError(f"cannot make the run directory {output or 'runs/'}: {error.strerror}") from error


def claim_number(runs: Path, model: str, method: str) -> Path:
    """Make runs/NNN-model-method; runs that start at the same time get different numbers."""
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


def open_in_run(path: Path, mode: str) -> IO[str]:
    """Open a text file of a run directory; raise UserError for a link or a pipe, which another user may have made."""
    try:
        file = open(path, mode, encoding="utf-8", errors="backslashreplace", opener=open_no_link)  # noqa: SIM115
    except OSError as error:
        reason = "it is a link; remove it" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"cannot open {path}: {reason}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"cannot open {path}: it is not a regular file; remove it")
    return file


def open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run directory for one run; raise UserError, with host and process, if another run has the lock.

    The kernel releases the lock when a run is killed.
    """
    import fcntl  # imported here: Windows has no fcntl, but it can run most commands of deploy/

    with open_in_run(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another run"
            raise UserError(f"{folder} is in use by {holder}: wait, or stop it") from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def describe(flags: dict[str, Any], given: dict[str, Any], device: str, processes: int) -> str:
    """Return the text of args.json: the value of every flag, the flags that a resume repeats, versions and hardware."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    machine = {"device": device, "processes": processes, "cpu_cores": os.cpu_count(), "platform": platform.platform()}
    about = {"flags": flags, "given": given, "command": shlex.join(sys.argv)}
    return json.dumps(about | {"versions": versions, "hardware": machine}, indent=2)


def read_given(output: Path) -> dict[str, Any]:
    """Return the flags of a run, or {} before it starts; raise UserError if args.json is damaged or removed."""
    file = output / "args.json"
    try:
        if not file.exists():
            if any((output / name).exists() for name in ("last.pt", "previous.pt")):
                raise UserError(f"{file} is missing, so the flags of the run are unknown: restore it")
            return {}
        given = json.loads(read_file(file))["given"]
        if not isinstance(given, dict):
            raise TypeError(f"its flags are a {type(given).__name__}, expected an object")
        return given
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {file}, which a resume needs: {error!r}; start a new run") from error


# ---- validation images that a run split off -------------------------------------------------------------------------


def nfc(name: str) -> str:
    """Return a file's name in Unicode's composed form, read as UTF-8: macOS stores é as e and ´."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode(errors="replace"))


def write_split(file: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write a CSV file that assigns images to training or validation. rows: (CLASS/FILE, "train" or "val")"""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([("file", "side"), *rows])  # so that \r in a name is quoted
    write_whole(file, text.getvalue())


def read_split(file: Path) -> dict[str, str] | None:
    """Return the rows that write_split wrote, or None if the file is missing; raise UserError if a row is invalid."""
    if not file.exists():
        return None
    header, *rows = read_csv(file, "a run's split") or [[]]
    wrong = [row for row in rows if len(row) != 2 or row[1] not in ("train", "val")]
    if header != ["file", "side"] or wrong or not rows:
        raise UserError(f"{file} is not a run's split: expected FILE,train or FILE,val, got {(wrong or [header])[0]}")
    return dict(rows)  # type: ignore[arg-type]


def read_csv(file: Path, content: str) -> list[list[str]]:
    try:
        lines = io.StringIO(read_file(file).decode("utf-8-sig"), newline="")
        return [row for row in csv.reader(lines) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as {content}: {' '.join(str(error).split())}") from error

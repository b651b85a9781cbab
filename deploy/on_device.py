"""Run `python student.pyz ...`: the commands of deploy/ on the student in the archive.

Nothing is unpacked: the artefact is read into memory. This module imports only the standard library until a command
runs, so that --requirements works before any package is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib
import os
import shlex
import stat
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploy.cli import Parser, Run, UserError, command, run_command

KINDS = (".onnx", ".engine")
COMMANDS = ("benchmark", "build", "check", "selftest", "serve")
OF_STUDENT = ("benchmark", "check", "selftest")  # these take the student/ folder before the artefact
WRITING = ("benchmark", "build", "check")  # these write next to the artefact; here, into the current folder
# The lower limits are the oldest versions that were tried. The upper limits are those of the last onnxruntime for
# JetPack 6 (Python 3.10, aarch64).
RUNNING = """\
numpy>=1.24,<2; python_version < "3.11" and platform_machine == "aarch64"
numpy>=1.24; python_version >= "3.11" or platform_machine != "aarch64"
pillow>=10
"""
ONNX = """\
onnxruntime>=1.17,<1.24; python_version < "3.11"
onnxruntime>=1.17; python_version >= "3.11"
"""
TENSORRT = "# tensorrt: JetPack's own (apt-get install python3-libnvinfer), in a venv with --system-site-packages\n"
SERVING = """\
starlette>=0.40
uvicorn>=0.30
prometheus-client>=0.20
python-multipart>=0.0.18
"""

if TYPE_CHECKING:
    SystemPath = Path
else:
    SystemPath = type(Path())  # PosixPath, which Python 3.10 and 3.11 can only subclass in this way


class PackedPath(SystemPath):
    """Read a path inside an archive, such as student.pyz/student/student.onnx, like a path on the disk.

    Each call opens the archive, so that a server can load its file again after the archive was replaced.
    """

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[zipfile.ZipFile, str]]:
        """Yield the archive and the name inside it; raise OSError if one of them is missing or damaged."""
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        archive = next((Path(parent) for parent in self.parents if os.path.isfile(parent)), None)
        if archive is None:
            raise missing
        try:
            with zipfile.ZipFile(archive) as packed:
                yield packed, self.relative_to(archive).as_posix()
        except KeyError:
            raise missing from None
        except zipfile.BadZipFile as error:
            raise OSError(errno.EIO, f"not a whole archive: {error}", str(archive)) from error

    def is_file(self, **_: Any) -> bool:
        with contextlib.suppress(OSError), self.opened() as (packed, name):
            return name in packed.namelist()
        return False

    def is_dir(self, **_: Any) -> bool:
        with contextlib.suppress(OSError), self.opened() as (packed, name):
            return any(other.startswith(f"{name}/") for other in packed.namelist())
        return False

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[PackedPath]:  # type: ignore[override]
        with self.opened() as (packed, name):
            names = [other.removeprefix(f"{name}/") for other in packed.namelist() if other.startswith(f"{name}/")]
        return (self / other for other in names if "/" not in other)

    def read_bytes(self) -> bytes:
        with self.opened() as (packed, name):
            return packed.read(name)

    def stat(self, **_: Any) -> os.stat_result:
        with self.opened() as (packed, name):
            size = packed.getinfo(name).file_size
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, size, 0, 0, 0))


def requirements(artefact: str) -> str:
    """Return the lines of requirements.txt for running and serving an artefact."""
    return RUNNING + (TENSORRT if artefact.endswith(".engine") else ONNX) + SERVING


def main(argv: list[str]) -> int:
    """Run a command on the packed file, or on the file that --file names; return the exit status."""
    archive = Path(sys.argv[0])
    return run_command(archive.name, functools.partial(dispatch, archive, argv))


def dispatch(archive: Path, argv: list[str]) -> int | None:
    """Run the command that the command line names, predict by default."""
    student = PackedPath(archive / "student")
    if (student / "candidates.json").is_file():
        return dispatch_candidates(archive, student, argv)
    artefact: Path = next(file for file in student.iterdir() if file.suffix in KINDS)
    if argv and argv[0].startswith("--file="):
        argv = ["--file", argv[0].partition("=")[2], *argv[1:]]
    if argv[:1] == ["--file"] and len(argv) > 1:
        artefact, argv = Path(argv[1]), argv[2:]
    if argv == ["--requirements"]:
        print(requirements(artefact.name), end="")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        commands = " | ".join((*COMMANDS, "--requirements"))
        another = "--file names another file, such as an engine that was built here. Each command has --help."
        usage = f"usage: {archive.name} [--file FILE] photo.jpg ... | {commands}"
        print(f"{usage}\n\nThe student is {artefact.name}; {another}")
        return 0
    name, rest = (argv[0], argv[1:]) if argv[0] in COMMANDS else ("predict", argv)
    module = import_command(archive, name)
    parser: Parser = module.get_parser()
    parser.prog = archive.name if name == "predict" else f"{archive.name} {name}"
    describe(parser, name, artefact)
    flags = ["--output", "."] if name in WRITING else []  # typed flags come later and override it
    files = [student, artefact.absolute()] if name in OF_STUDENT else [artefact]
    run = functools.partial(run_packed, module.run, student, artefact)
    return command(parser, run, [*map(str, files), *flags, *rest])


def import_command(archive: Path, name: str) -> ModuleType:
    """Import a module of deploy/. If packages are missing, raise UserError with the command that installs them."""
    try:
        return importlib.import_module(f"deploy.{name}")
    except (ImportError, UserError) as error:
        listed = f"python3 {shlex.quote(archive.name)} --requirements > requirements.txt"
        install = f"{listed}, then pip install -r requirements.txt"
        raise UserError(f"{name} needs packages that are not installed ({error}): {install}") from error


def dispatch_candidates(archive: Path, folder: Path, argv: list[str]) -> int | None:
    """Run the only command of an archive that deploy.candidates wrote."""
    if argv == ["--requirements"]:
        print(RUNNING + ONNX, end="")
        return 0
    module = import_command(archive, "candidates")
    parser: Parser = module.get_device_parser()
    parser.prog = archive.name
    return command(parser, functools.partial(module.measure, folder), argv)


def describe(parser: Parser, name: str, artefact: Path) -> None:
    """Shorten --help for an archive: hide the flags that name the student, and the examples with a run directory."""
    first = (parser.description or "").partition("\n\n")[0]
    parser.description = f"{first}\n\nThe student is {artefact.name}."
    for action in parser._actions:  # argparse has no public way to hide an argument
        if action.dest in ("student", "artefact", "artefacts", "onnx", "model_file"):
            action.help = argparse.SUPPRESS
        elif action.dest == "output":
            action.help = "the folder to write to (default: the current folder)"
    parser.usage = f"{parser.prog} {'photo.jpg ... ' if name == 'predict' else ''}[flags]"


def run_packed(run: Run, student: Path, artefact: Path, args: argparse.Namespace) -> int | None:
    """Run a command with paths that read from the archive."""
    packed = {str(student): student, str(artefact): artefact}
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, packed.get(str(value), value))
    return run(args)

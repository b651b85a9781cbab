"""What `python student.pyz ...` does: the commands of deploy/ on the student that deploy.pack put beside them.

Imports the standard library alone until a command runs, so that --requirements works where nothing is installed yet.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import zipfile
from pathlib import Path

from deploy.cli import command, first_line, show_error

KINDS = (".onnx", ".engine")
COMMANDS = ("benchmark", "build", "check", "serve")
# The oldest of each that was tried, and what the last onnxruntime for JetPack 6 (Python 3.10, aarch64) was built for.
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


def requirements(artefact: str) -> str:
    """What pip must install to run an artefact and to serve it."""
    return RUNNING + (TENSORRT if artefact.endswith(".engine") else ONNX) + SERVING


def main(argv: list[str]) -> int:
    """A command on the packed file, or on the one that --file names; returns the exit status."""
    archive = Path(sys.argv[0])
    with zipfile.ZipFile(archive) as packed, tempfile.TemporaryDirectory(prefix="student-") as folder:
        for entry in packed.namelist():
            if entry.startswith("student/"):
                packed.extract(entry, folder)
        student = Path(folder) / "student"
        artefact = next(file for file in student.iterdir() if file.suffix in KINDS)
        if argv and argv[0].startswith("--file="):
            argv = ["--file", argv[0].partition("=")[2], *argv[1:]]
        if argv[:1] == ["--file"] and len(argv) > 1:
            artefact, argv = Path(argv[1]), argv[2:]
        if argv == ["--requirements"]:
            print(requirements(artefact.name), end="")
            return 0
        if not argv or argv[0] in ("-h", "--help"):
            commands = " | ".join((*COMMANDS, "--requirements"))
            print(f"usage: {archive.name} [--file FILE] photo.jpg ... | {commands}\n\nThe student is {artefact.name}; "
                  "--file takes another, such as an engine that was built here. Each command has --help.")  # fmt: skip
            return 0
        name, rest = (argv[0], argv[1:]) if argv[0] in COMMANDS else ("predict", argv)
        try:
            module = importlib.import_module(f"deploy.{name}")
        except ImportError as error:
            show_error(archive.name, f"{first_line(error)}: {archive.name} --requirements lists what to install")
            return 2
        parser = module.get_parser()
        parser.prog = archive.name if name == "predict" else f"{archive.name} {name}"
        # what is typed comes after the default, and wins
        flags = ["--output", "."] if name in ("benchmark", "build", "check") else []
        files = [student, artefact.resolve()] if name in ("benchmark", "check") else [artefact]
        return command(parser, module.run, [*map(str, files), *flags, *rest])

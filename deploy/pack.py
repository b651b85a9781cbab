"""Write one file for a device: the student, its labels and preprocessing, and the programs that use it. No torch.

    python -m deploy.pack runs/001-mobilenet_v2-uskd -o student.pyz                      # of student.onnx
    python -m deploy.pack runs/001-mobilenet_v2-uskd --file student-int8-cpu.onnx -o student.pyz

On the device, with Python 3.10 or later:

    python3 student.pyz --requirements > requirements.txt      # the wheels it needs, with markers
    python3 -m pip install -r requirements.txt
    python3 student.pyz photo.jpg
    python3 student.pyz benchmark --threads 1
    python3 student.pyz check --reference reference.npz        # copied from the run: still the same classifier?
    python3 student.pyz serve --host 0.0.0.0 --token-file token
    python3 student.pyz build --max-batch 8                    # by TensorRT, for this device: ./student.engine
    python3 student.pyz --file student.engine serve

The file is a zip archive as of the standard library's zipapp: unzip -l lists it. It runs from memory and unpacks
nothing.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy import cli
from deploy.cli import Parser, UserError, command, read_file, replacing, show
from deploy.on_device import KINDS
from deploy.runtimes import RunOn, load
from deploy.tensorrt import read_engine_metadata

WORKSTATION = ("student", "torch_runtimes", "export", "flags", "quantize", "triton", "pack")
SHEBANG = b"#!/usr/bin/env python3\n"
# The program is copied into memory, so that the archive may be replaced while it runs; child processes read it there.
MAIN = """\
import os, sys, zipfile

if hasattr(os, "memfd_create"):
    memory = os.memfd_create("student")
    with zipfile.ZipFile(sys.path[0]) as whole, os.fdopen(os.dup(memory), "wb") as file:
        with zipfile.ZipFile(file, "w") as program:
            for name in whole.namelist():
                if not name.startswith("student/"):
                    program.writestr(name, whole.read(name))
    sys.path[0] = f"/proc/{os.getpid()}/fd/{memory}"

from deploy.on_device import main

sys.exit(main(sys.argv[1:]))
"""


def pack(artefact: Path, output: Path) -> None:
    """Write the archive `output` around an artefact, whose metadata becomes the config.json in the archive.

    Raises:
        UserError: an artefact that needs torch, that is not ours, or cannot be loaded here
    """
    if artefact.suffix not in KINDS:
        raise UserError(f"{artefact} does not run without torch: pack an .onnx or .engine file")
    engine = artefact.suffix == ".engine"
    metadata = read_engine_metadata(artefact) if engine else load(artefact, RunOn("cpu")).metadata
    sidecar = artefact.with_name(artefact.name + ".json")  # of an engine, or of an ONNX file from elsewhere
    files: dict[str, str | Path] = {"student/config.json": json.dumps(metadata.to_json(), indent=2) + "\n"}
    files |= {f"student/{file.name}": file for file in (artefact, sidecar) if file == artefact or file.is_file()}
    write_archive(output, files)


def write_archive(output: Path, files: Mapping[str, str | Path]) -> None:
    """Write an archive of the programs of a device and of further files, by their names in it: texts, or paths."""
    number = cli.version("kdlite").replace("not installed", "0")
    about = f"Metadata-Version: 2.1\nName: kdlite\nVersion: {number}\n"
    contents: dict[str, str | bytes | Path] = {"__main__.py": MAIN, f"kdlite-{number}.dist-info/METADATA": about}
    contents |= parts(importlib.resources.files("deploy"), "deploy/")
    contents.update(files)
    cli.make_folder(output.parent)
    with replacing(output) as partial:
        with open(partial, "wb") as stream:
            stream.write(SHEBANG)
            with zipfile.ZipFile(stream, "w") as archive:
                for name, content in contents.items():
                    packed = zipfile.ZIP_STORED if name.endswith(KINDS) else zipfile.ZIP_DEFLATED
                    data = read_file(content) if isinstance(content, Path) else content
                    archive.writestr(zipfile.ZipInfo(name), data, packed)  # weights do not shrink
        partial.chmod(0o755)


def parts(package: Any, prefix: str) -> dict[str, bytes]:
    """Return the files of deploy/ that run on a device, by name: all but the modules of the workstation."""
    contents: dict[str, bytes] = {}
    for entry in package.iterdir():
        if entry.is_dir():
            contents |= parts(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".py", ".html")) and entry.name.removesuffix(".py") not in WORKSTATION:
            contents[prefix + entry.name] = entry.read_bytes()
    return contents


def get_parser() -> Parser:
    parser = cli.make_parser(__doc__, "pack", "student")
    parser.add_argument("--file", default="student.onnx", help="the file of the folder to pack (default: student.onnx)")
    parser.add_argument("-o", "--output", type=Path, default=Path("student.pyz"), help="(default: student.pyz)")
    return parser


def run(args: argparse.Namespace) -> None:
    student = cli.student_folder(args.student)
    artefact = Path(args.file) if Path(args.file).is_file() else student / args.file
    if not artefact.is_file():
        raise UserError(f"no {artefact.name} in {student}: python -m deploy.export {student} writes student.onnx")
    pack(artefact, args.output)
    size = args.output.stat().st_size / 1e6
    show(f"{args.output}  {size:.1f} MB; next, on the device: python3 {args.output.name} --requirements")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

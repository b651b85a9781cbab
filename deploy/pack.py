"""Write one file for a device: the student, its labels and preprocessing, and the programs that use it, without torch.

    python -m deploy.pack runs/001-mobilenet_v2-uskd -o student.pyz                      # packs student.onnx
    python -m deploy.pack runs/001-mobilenet_v2-uskd --file student-int8-cpu.onnx -o student.pyz
    python -m deploy.pack runs/001-mobilenet_v2-uskd -o student.html    # for a browser: double-click it

For an .onnx file the command also writes student/vectors/: ten pictures with the student's answers, for `selftest`.

On the device, with Python 3.10 or later:

    python3 student.pyz --requirements > requirements.txt      # the wheels it needs, with markers
    python3 -m pip install -r requirements.txt
    python3 student.pyz photo.jpg
    python3 student.pyz benchmark --threads 1
    python3 student.pyz selftest                               # does this device answer like the workstation?
    python3 student.pyz check --reference reference.npz        # copy the run's reference.npz first
    python3 student.pyz serve --host 0.0.0.0 --token-file token
    python3 student.pyz build --max-batch 8                    # writes ./student.engine for this device
    python3 student.pyz --file student.engine serve

student.pyz is a zip archive like those of the standard library's zipapp: unzip -l lists its files. On Linux it
runs from memory and unpacks nothing. student.html holds ONNX Runtime Web: npm fetches it once (33 MB), or --runtime
names its archive.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import shlex
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy import cli, page, selftest
from deploy.cli import Parser, UserError, command, log, read_file, replacing, show, write_whole
from deploy.on_device import KINDS
from deploy.runtimes import RunOn, Runtime, load, refuse_stale
from deploy.tensorrt import read_engine_metadata

WORKSTATION = ("student", "torch_runtimes", "export", "flags", "quantize", "triton", "pack")
SHEBANG = b"#!/usr/bin/env python3\n"
# On Linux the programs run from a copy in memory, also in child processes, so you may replace the file at any time.
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


def pack(artefact: Path, output: Path, runtime: Path | None = None) -> None:
    """Pack an artefact into the file `output`: a page if `output` ends with .html, else an archive.

    The metadata of the artefact becomes the config.json in the archive. The vectors of an .onnx file are written
    next to it, if the folder is writable. runtime: see deploy.page.write_html

    Raises:
        UserError: the artefact needs torch, is not ours, or cannot be loaded here
    """
    if artefact.suffix not in KINDS:
        raise UserError(f"{artefact} does not run without torch: pack an .onnx or .engine file")
    engine = artefact.suffix == ".engine"
    if engine and is_page(output):
        raise UserError(f"{artefact.name} does not run in a browser: pack an .onnx file")
    vectors: dict[str, bytes] = {}  # stays empty for an engine, because this machine may have no GPU to run it
    if engine:
        metadata = read_engine_metadata(artefact)
    else:
        student = load(artefact, RunOn("cpu"))
        refuse_stale(artefact, student.metadata)
        metadata, vectors = student.metadata, write_vectors(student, artefact.parent / selftest.FOLDER)
    if is_page(output):
        cli.make_folder(output.parent)
        page.write_html(artefact, metadata, selftest.as_one_object(vectors, artefact.name), runtime, output)
        return
    sidecar = artefact.with_name(artefact.name + ".json")  # engines and ONNX files from elsewhere have one
    files: dict[str, str | bytes | Path] = {"student/config.json": json.dumps(metadata.to_json(), indent=2) + "\n"}
    files |= {f"student/{file.name}": file for file in (artefact, sidecar) if file == artefact or file.is_file()}
    files |= {f"student/{selftest.FOLDER}/{name}": data for name, data in vectors.items()}
    write_archive(output, files)


def write_archive(output: Path, files: Mapping[str, str | bytes | Path]) -> None:
    """Write an archive of the device's programs and of `files`: name in the archive -> content, or path of a file."""
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


def is_page(output: Path) -> bool:
    return output.suffix.lower() in (".html", ".htm")


def write_vectors(student: Runtime, folder: Path) -> dict[str, bytes]:
    """Return the conformance vectors of a student, and write them to a folder if that is writable."""
    vectors = selftest.make_vectors(student, folder)
    if os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
        for name, data in vectors.items():
            write_whole(folder / name, data)
    else:
        log(f"{folder} cannot be written to: the vectors are only in the packed file")
    return vectors


def parts(package: Any, prefix: str) -> dict[str, bytes]:
    """Return the .py and .html files of deploy/ that a device needs, by name: all except those in WORKSTATION."""
    contents: dict[str, bytes] = {}
    for entry in package.iterdir():
        if entry.is_dir():
            contents |= parts(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".py", ".html")) and entry.name.removesuffix(".py") not in WORKSTATION:
            contents[prefix + entry.name] = entry.read_bytes()
    return contents


def get_parser() -> Parser:
    parser = cli.make_parser(__doc__, "pack", "student")
    parser.add_argument("--file", help="the file to pack (default: the student's student.onnx)")
    kinds = "student.pyz, or student.html for a browser (default: student.pyz)"
    parser.add_argument("-o", "--output", type=Path, default=Path("student.pyz"), help=kinds)
    archive = f"{page.PACKAGE}-{page.VERSION}.tgz, for student.html (default: npm fetches it once)"
    parser.add_argument("--runtime", type=Path, metavar="FILE", help=archive)
    return parser


def run(args: argparse.Namespace) -> None:
    student = cli.student_folder(args.student)
    artefact = cli.file_of(student, args.file) if args.file else student / "student.onnx"
    if not artefact.is_file():
        raise UserError(
            f"no {artefact.name} in {student}: python -m deploy.export {shlex.quote(str(student))} writes student.onnx"
        )
    if args.runtime and not is_page(args.output):
        raise UserError("--runtime is for student.html: give --output a name that ends with .html")
    if not is_page(args.output) and args.output.suffix != ".pyz":  # it could replace a file of the student
        raise UserError(f"--output {args.output}: expected a name that ends with .pyz or .html")
    pack(artefact, args.output, args.runtime)
    size, name = args.output.stat().st_size / 1e6, args.output.name
    following = f"on the device: python3 {shlex.quote(name)} --requirements"
    if is_page(args.output):
        following = f"open it in a browser, or {name}?selftest"
    show(f"{args.output}  {size:.1f} MB; next, {following}")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

"""One file for a device: the student, its labels and preprocessing, and the programs that use it. No torch.

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

A zip of the standard library's zipapp: unzip -l shows what is in it.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import sys
import tempfile
import zipapp
from pathlib import Path
from typing import Any

from deploy.cli import Parser, UserError, command, make_folder, make_parser, student_folder, version
from deploy.on_device import KINDS
from deploy.runtimes import RunOn, load
from deploy.tensorrt import read_engine_metadata

WORKSTATION = ("student", "torch_runtimes", "export", "flags", "run_directory", "quantize", "triton", "pack")
MAIN = "import sys\n\nfrom deploy.on_device import main\n\nsys.exit(main(sys.argv[1:]))\n"


def pack(artefact: Path, output: Path) -> None:
    """Write the archive `output` around an artefact; what it says of itself is its config.json there.

    Raises:
        UserError: an artefact that needs torch, that is not ours, or cannot be loaded here
    """
    if artefact.suffix not in KINDS:
        raise UserError(f"{artefact} does not run without torch: pack an .onnx or .engine file")
    files = {f"student/{artefact.name}": artefact}
    if artefact.suffix == ".engine":
        metadata = read_engine_metadata(artefact)
        files[f"student/{artefact.name}.json"] = artefact.with_name(artefact.name + ".json")
    else:
        metadata = load(artefact, RunOn("cpu")).metadata
    make_folder(output.parent)
    package = importlib.resources.files("deploy")
    number = version("kdlite") if version("kdlite") != "not installed" else "0"
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=output.parent) as partial:
        tree, whole = Path(partial) / "tree", Path(partial) / output.name
        texts = {
            "__main__.py": MAIN,
            "student/config.json": json.dumps(metadata.to_json(), indent=2) + "\n",
            f"kdlite-{number}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: kdlite\nVersion: {number}\n",
        }
        contents = {name: text.encode() for name, text in texts.items()}
        contents |= {f"deploy/{name}": content for name, content in parts(package).items()}
        contents |= {name: file.read_bytes() for name, file in files.items()}
        for name, content in contents.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)
        zipapp.create_archive(tree, whole, interpreter="/usr/bin/env python3", compressed=True)
        os.replace(whole, output)


def parts(package: Any, prefix: str = "") -> dict[str, bytes]:
    """Return the files of deploy/ that run on a device, by name: all but the modules of the workstation."""
    contents: dict[str, bytes] = {}
    for entry in package.iterdir():
        if entry.is_dir():
            contents |= parts(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".py", ".html")) and entry.name.removesuffix(".py") not in WORKSTATION:
            contents[prefix + entry.name] = entry.read_bytes()
    return contents


def get_parser() -> Parser:
    parser = make_parser(__doc__, "pack")
    parser.add_argument("student", type=Path, help="a run's student/ folder, or the run directory")
    parser.add_argument("--file", default="student.onnx", help="what to pack, of the folder (default: student.onnx)")
    parser.add_argument("-o", "--output", type=Path, default=Path("student.pyz"), help="(default: student.pyz)")
    return parser


def run(args: argparse.Namespace) -> None:
    student = student_folder(args.student)
    artefact = Path(args.file) if Path(args.file).is_file() else student / args.file
    if not artefact.is_file():
        raise UserError(f"no {artefact.name} in {student}: python -m deploy.export {student} writes student.onnx")
    pack(artefact, args.output)
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}  {size:.1f} MB; next, on the device: python3 {args.output.name} --requirements")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

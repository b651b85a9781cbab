"""Write a Triton model repository for an ONNX file or a TensorRT engine, to serve from more than one machine.

    python -m deploy.triton runs/001-mobilenet_v2-uskd/student/student-fp16.onnx --output models --name digits
    tritonserver --model-repository models

models/digits/config.pbtxt, models/digits/labels.txt and models/digits/1/model.onnx (or model.plan). Clients of
deploy.serve work unchanged, with the same names, shapes and protocol.
examples/triton/ has manifests for Docker and KServe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from deploy.cli import Parser, UserError, command, make_folder, make_parser, replacing, show
from deploy.config import UINT8, Metadata
from deploy.runtimes import RunOn, load, tensor_names
from deploy.tensorrt import read_engine_metadata

BACKENDS = {".onnx": ("onnxruntime", "model.onnx"), ".engine": ("tensorrt", "model.plan")}


def write_repository(
    artefact: Path,
    output: Path,
    name: str,
    max_batch: int = 8,
    delay_us: int = 1000,
    instances: int = 1,
    gpu: bool = True,
) -> Path:
    """Write the model `name` into the repository `output` and return its folder.

    Args:
        artefact: an .onnx file of deploy.export or deploy.quantize, or an .engine of deploy.build
        max_batch: largest number of images that Triton gathers into one call
        delay_us: microseconds that a request may wait for others
        instances: copies of the model that run side by side
        gpu: run on GPUs, else on the CPU

    Raises:
        UserError: another kind of file, a model of this name in the repository, or an engine of smaller batches
    """
    if artefact.suffix not in BACKENDS:
        raise UserError(
            f"{artefact} is neither .onnx nor .engine, which Triton's onnxruntime and tensorrt backends take"
        )
    if artefact.suffix == ".onnx":
        metadata = load(artefact, RunOn("cpu")).metadata
    else:
        metadata = read_engine_metadata(artefact)
        largest = metadata.built["max_batch"]
        if metadata.built["library"] != "tensorrt":
            raise UserError(f"{artefact} was built by TensorRT-RTX, which Triton does not run: build it with tensorrt")
        if max_batch > largest:
            raise UserError(f"--max-batch {max_batch}, but {artefact.name} takes {largest} at most")
        if not gpu:
            raise UserError(f"{artefact.name} is a TensorRT engine, which needs a GPU; leave --cpu out")
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"--name {name!r} must be the name of a folder")
    folder = output / name
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or give another --name or --output")
    make_folder(output)
    backend, file = BACKENDS[artefact.suffix]
    with replacing(folder) as whole:
        (whole / "1").mkdir(parents=True)
        shutil.copyfile(artefact, whole / "1" / file)
        labels = "".join(f"{' '.join(x.split())}\n" for x in metadata.label_names)
        config = config_text(metadata, name, backend, max_batch, delay_us, instances, gpu)
        (whole / "labels.txt").write_text(labels, encoding="utf-8")
        (whole / "config.pbtxt").write_text(config, encoding="utf-8")
    return folder


def config_text(
    metadata: Metadata, name: str, backend: str, max_batch: int, delay_us: int, instances: int, gpu: bool
) -> str:
    """Return Triton's model configuration; dims leave out the batch."""
    channels, height, width = metadata.input_size
    uint8 = metadata.input == UINT8
    dims = [height, width, channels] if uint8 else [channels, height, width]
    classes = len(metadata.label_names)
    inputs, outputs = tensor_names(metadata)
    return f"""name: {json.dumps(name)}
backend: "{backend}"
max_batch_size: {max_batch}
input [ {{ name: "{inputs}", data_type: {"TYPE_UINT8" if uint8 else "TYPE_FP32"}, dims: {dims} }} ]
output [
  {{ name: "{outputs}", data_type: TYPE_FP32, dims: [{classes}], label_filename: "labels.txt" }}
]
dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}
instance_group [ {{ count: {instances}, kind: {"KIND_GPU" if gpu else "KIND_CPU"} }} ]
"""


def get_parser() -> Parser:
    parser = make_parser(__doc__, "triton")
    parser.add_argument("artefact", type=Path, help="an .onnx or .engine file of deploy/")
    parser.add_argument("--output", type=Path, default=Path("models"), help="the model repository (default: models)")
    parser.add_argument("--name", default="student", help="name of the model (default: student)")
    parser.add_argument("--max-batch", type=int, default=8, help="images in one call (default: 8)")
    parser.add_argument("--delay-us", type=int, default=1000, help="microseconds to wait for others (default: 1000)")
    parser.add_argument("--instances", type=int, default=1, help="copies that run side by side (default: 1)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU (default: on GPUs)")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.max_batch < 1 or args.instances < 1 or args.delay_us < 0:
        raise UserError("--max-batch and --instances must be at least 1, --delay-us at least 0")
    folder = write_repository(
        args.artefact, args.output, args.name, args.max_batch, args.delay_us, args.instances, not args.cpu
    )
    show(f"{folder}: tritonserver --model-repository {args.output}")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

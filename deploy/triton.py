"""Write a Triton model repository for an ONNX file or a TensorRT engine, to serve from more than one machine.

    python -m deploy.triton runs/001-mobilenet_v2-uskd/student/student-fp16.onnx --output models --name digits
    tritonserver --model-repository models

The command writes models/digits/config.pbtxt, labels.txt and 1/model.onnx (or model.plan). If the file takes
uint8 images, clients of deploy.serve work unchanged, because names, shapes and protocol are the same.
examples/triton/ has manifests for Docker and KServe.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.cli import Parser, UserError, command, make_folder, make_parser, number, replacing, show
from deploy.config import UINT8, Metadata
from deploy.runtimes import RunOn, load, refuse_stale, tensor_names
from deploy.tensorrt import read_engine_metadata

BACKENDS = {".onnx": ("onnxruntime", "model.onnx"), ".engine": ("tensorrt", "model.plan")}


@dataclass(frozen=True)
class Model:
    """Describe a model of a repository; deploy.triton has a flag for each field."""

    name: str = "student"
    max_batch: int = 8  # largest number of images that Triton gathers into one call
    delay_us: int = 1000  # microseconds that a request may wait for others
    instances: int = 1  # copies of the model that run in parallel
    gpu: bool = True  # run on GPUs, else on the CPU


def write_repository(artefact: Path, output: Path, model: Model) -> Path:
    """Write an .onnx or .engine file of deploy/ as a model into the repository `output`, and return its folder.

    Raises:
        UserError: the file is of another kind or takes only one image, the name exists already, or the engine's largest
            batch is too small
    """
    if artefact.suffix not in BACKENDS:
        raise UserError(f"{artefact} is neither .onnx nor .engine: Triton's backends take only these")
    if artefact.suffix == ".onnx":
        student = load(artefact, RunOn("cpu"))
        metadata, largest = student.metadata, model.max_batch
        if student.call(np.zeros((1, *metadata.image_shape), np.uint8)).dtype != np.float32:
            raise UserError(f"{artefact} returns other logits than float32: add a Cast to float at its end")
        if student.max_batch == 1:  # Triton's backend needs a free batch, or another form of config.pbtxt
            raise UserError(f"{artefact} takes only batches of 1 image: export it with a dynamic batch for Triton")
    else:
        metadata = read_engine_metadata(artefact)
        largest = metadata.built["max_batch"]
        if metadata.built["library"] != "tensorrt":
            raise UserError(f"{artefact} was built by TensorRT-RTX, which Triton does not run: build it with tensorrt")
        if not model.gpu:
            raise UserError(f"{artefact.name} is a TensorRT engine, which needs a GPU; leave --cpu out")
    refuse_stale(artefact, metadata)
    if model.max_batch > largest:
        raise UserError(f"--max-batch {model.max_batch}, but {artefact.name} takes at most {largest}")
    if not model.name or "/" in model.name or model.name.startswith("."):
        raise UserError(f"--name {model.name!r} must be the name of a folder")
    folder = output / model.name
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or give another --name or --output")
    make_folder(output)
    backend, file = BACKENDS[artefact.suffix]
    with replacing(folder) as whole:
        (whole / "1").mkdir(parents=True)
        shutil.copyfile(artefact, whole / "1" / file)
        labels = "".join(f"{' '.join(x.split())}\n" for x in metadata.label_names)
        (whole / "labels.txt").write_text(labels, encoding="utf-8")
        (whole / "config.pbtxt").write_text(config_text(metadata, backend, model), encoding="utf-8")
    return folder


def config_text(metadata: Metadata, backend: str, model: Model) -> str:
    """Return Triton's model configuration; its dims do not include the batch."""
    (inputs, outputs), classes = tensor_names(metadata), len(metadata.label_names)
    kind = "TYPE_UINT8" if metadata.input == UINT8 else "TYPE_FP32"
    return f"""name: {json.dumps(model.name)}
backend: "{backend}"
max_batch_size: {model.max_batch}
input [ {{ name: {json.dumps(inputs)}, data_type: {kind}, dims: {list(metadata.tensor_shape)} }} ]
output [
  {{ name: {json.dumps(outputs)}, data_type: TYPE_FP32, dims: [{classes}], label_filename: "labels.txt" }}
]
dynamic_batching {{ max_queue_delay_microseconds: {model.delay_us} }}
instance_group [ {{ count: {model.instances}, kind: {"KIND_GPU" if model.gpu else "KIND_CPU"} }} ]
"""


def get_parser() -> Parser:
    parser, default = make_parser(__doc__, "triton"), Model()
    add, at_least_1 = parser.add_argument, number(int, 1)
    add("artefact", type=Path, help="an .onnx or .engine file of deploy/")
    add("--output", type=Path, default=Path("models"), help="the model repository (default: models)")
    add("--name", default=default.name, help="name of the model (default: %(default)s)")
    add("--max-batch", type=at_least_1, default=default.max_batch, help="images in one call (default: %(default)s)")
    add("--delay-us", type=number(int, 0), default=default.delay_us, help="longest wait, in us (default: %(default)s)")
    add("--instances", type=at_least_1, default=default.instances, help="parallel copies (default: %(default)s)")
    add("--cpu", action="store_true", help="run on the CPU (default: on GPUs)")
    return parser


def run(args: argparse.Namespace) -> None:
    model = Model(args.name, args.max_batch, args.delay_us, args.instances, not args.cpu)
    folder = write_repository(args.artefact, args.output, model)
    show(f"{folder}: tritonserver --model-repository {shlex.quote(str(args.output))}")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

"""Write a trained student as ONNX, TorchScript and torch.export files, after a comparison of each file with torch.

    python -m deploy.export runs/001-mobilenet_v2-uskd/student                    # student.onnx, .ts, .pt2
    python -m deploy.export runs/001-mobilenet_v2-uskd/student --format onnx --precision fp16

The command writes the files next to the weights. They take any number of images, uint8 (N, H, W, 3), resized and
cropped but not normalised, and return float32 logits (N, C). They carry labels, preprocessing, metrics and the digest
of the weights. They contain only the student, without weak head, teacher and hooks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy import cli, onnx_tools
from deploy.cli import Parser, ProgressBar, UserError, command, first_line, need, needs, replacing, show
from deploy.config import FLOAT, UINT8, Metadata
from deploy.runtimes import INPUT_NAME, OUTPUT_NAME, RunOn, as_input, load, source_of

with needs("export rebuilds the network, on a workstation: pip install '.[deploy]'", __name__):
    import torch
    from timm.utils import reparameterize_model
    from torch.nn.utils import remove_weight_norm
    from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
    from torch.nn.utils.weight_norm import WeightNorm

    from deploy.student import load_student
    from deploy.torch_runtimes import ImageClassifier

FORMATS = {"onnx": ".onnx", "torchscript": ".ts", "torch.export": ".pt2"}
# Largest |logit - torch's fp32 logit|, relative to the largest |logit|. Measured on nine architectures: fp32 at most
# 2e-5, fp16 at most 6e-3 (tests/deploy/test_export.py).
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}
# The example batch has 2 images, because torch would freeze a batch size of 1.
ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)


def export_student(
    student: Path,
    formats: Sequence[str] = tuple(FORMATS),
    precision: str = "fp32",
    layout: str = UINT8,
    opset: int = 18,
    output: Path | None = None,
    model_file: str | None = None,
    tolerance: float | None = None,
) -> list[Path]:
    """Export a student/ folder, or the one in a run directory, compare each file with torch, and return the files.

    Raise UserError if the student is damaged or cannot be exported. No half-written file stays.

    precision: "fp32", or "fp16" for weights and arithmetic; the input and the logits keep their types
    layout: UINT8, normalised in the graph, or FLOAT, normalised by the caller
    output: folder of the files; default: the student's own
    tolerance: largest error of a logit, relative to the largest logit; default: that of the precision
    """
    student = cli.student_folder(student)
    output = output or student
    model, config = load_student(student, [model_file] if model_file else [])
    versions = {"kdlite": cli.version("kdlite"), "torch": torch.__version__}
    metadata = dataclasses.replace(config, precision=precision, input=layout, source=source_of(student) | versions)
    noise = np.random.default_rng(0).integers(0, 76, (5, *config.image_shape))
    images = (noise + 45 * np.arange(5).reshape(5, 1, 1, 1)).astype(np.uint8)  # from dark to bright
    batch = torch.from_numpy(as_input(images[:2], metadata))
    reference = ImageClassifier(model, metadata)
    with torch.no_grad():
        singly = torch.from_numpy(as_input(images, metadata)).split(1)  # shows whether a file mixes images of a batch
        expected = torch.cat([reference(image) for image in singly]).numpy()
    classifier = ImageClassifier(fuse(model), metadata, half=precision == "fp16")

    name = "student" + ("-nchw" if layout == FLOAT else "") + ("-fp16" if precision == "fp16" else "")
    files = []
    cli.make_folder(output)
    for kind in ProgressBar(formats, "export", unit="files"):
        with replacing(output / (name + FORMATS[kind])) as file:
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    WRITERS[kind](classifier, batch, metadata, file, opset)
            except (UserError, OSError):
                raise
            except Exception as error:  # the exporters have dozens of exception classes
                raise UserError(f"{config.architecture} cannot be exported to {kind}: {first_line(error)}") from error
            compare(file, images, expected, tolerance or TOLERANCE[precision])
        files.append(output / file.name)
    return files


def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Fold layers that only training needs into the weights, in place, and return the model.

    timm's function turns the branches of RepVGG, MobileOne and FastViT into one convolution. A weight norm becomes the
    weight that it computes. export_student compares the exported file with the model before this change.
    """
    for module in model.modules():
        if is_parametrized(module):
            for name in dict(module.parametrizations):  # type: ignore[arg-type, call-overload]
                remove_parametrizations(module, name)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
    return reparameterize_model(model, inplace=True)


def write_onnx(model: ImageClassifier, batch: torch.Tensor, metadata: Metadata, file: Path, opset: int) -> None:
    need("onnx", "pip install '.[deploy]'")
    need("onnxscript", "pip install '.[deploy]'")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names: Any = dict(input_names=[INPUT_NAME], output_names=[OUTPUT_NAME], opset_version=opset)
    options: Any = dict(dynamo=True, external_data=False, verbose=False)
    program = torch.onnx.export(model, (batch,), dynamic_shapes=ANY_BATCH, **names, **options)
    assert program is not None
    onnx_tools.write(program.model_proto, metadata, file)


def write_torchscript(model: ImageClassifier, batch: torch.Tensor, metadata: Metadata, file: Path, _: int) -> None:
    traced = torch.jit.trace(model, (batch,), check_trace=False)  # compare() runs other batches
    torch.jit.save(traced, str(file), _extra_files={"metadata.json": json.dumps(metadata.to_json())})
    with zipfile.ZipFile(file) as saved:
        records = {entry.filename: saved.read(entry) for entry in saved.infolist()}
    with zipfile.ZipFile(file, "w") as plain:
        for name, content in records.items():
            if not name.endswith(".debug_pkl"):  # source lines and paths of this machine
                plain.writestr(zipfile.ZipInfo(name), content)


def write_exported(model: ImageClassifier, batch: torch.Tensor, metadata: Metadata, file: Path, _: int) -> None:
    program = torch.export.export(model, (batch,), dynamic_shapes=ANY_BATCH, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines and paths of this machine
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata.to_json())})


WRITERS = {"onnx": write_onnx, "torchscript": write_torchscript, "torch.export": write_exported}


def compare(file: Path, images: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Run the file on the CPU in batches of 1, 2 and 5; raise UserError if its logits differ from torch's."""
    runtime = load(file, RunOn("cpu"))
    for size in (1, 2, 5):
        logits = runtime.run_in_parts(images, size)
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        if not error <= tolerance:
            found = f"its logits differ from torch's by {error:.1e} of the largest, more than {tolerance:.0e}"
            raise UserError(f"{file.name} was not kept: in batches of {size} {found}")


def get_parser() -> Parser:
    parser = cli.make_parser(__doc__, "export", "student", "--quiet", "--model-file")
    add, kinds = parser.add_argument, sorted(FORMATS)
    add(
        "--format", nargs="+", choices=kinds, default=kinds, metavar="FORMAT", help=f"{', '.join(kinds)} (default: all)"
    )
    add("--precision", choices=list(TOLERANCE), default="fp32", help="type of arithmetic and weights (default: fp32)")
    layouts = "uint8: NHWC, normalised in the graph; float: NCHW, normalised by you (default: uint8)"
    add("--input", choices=["uint8", "float"], default="uint8", help=layouts)
    add("--opset", type=int, choices=[18, 20], default=18, help="ONNX opset (default: 18)")
    add("--output", type=Path, help="folder to write to (default: the student's)")
    return parser


def run(args: argparse.Namespace) -> None:
    layout = UINT8 if args.input == "uint8" else FLOAT
    for file in export_student(
        args.student, args.format, args.precision, layout, args.opset, args.output, args.model_file
    ):
        show(f"{file}  {file.stat().st_size / 1e6:.1f} MB, same logits as torch at batches of 1, 2 and 5")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

"""INT8 by static quantisation of student.onnx, calibrated on the training images of the run's reference.npz.

    python -m deploy.quantize runs/001-mobilenet_v2-uskd/student --target cpu
    python -m deploy.quantize runs/001-mobilenet_v2-uskd/student --target tensorrt

The two targets want different files. cpu: uint8 activations, which ONNX Runtime's CPU kernels need and TensorRT's
parser rejects. tensorrt: symmetric int8 activations and per-channel weights as Q/DQ pairs, no quantised bias.
Where there is a LayerNormalization (ViT, Swin, ConvNeXt) only Conv, Gemm and MatMul by a weight are quantised: softmax,
norms and attention scores lose too much in 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deploy import onnx_tools
from deploy.cli import (
    Parser,
    ProgressBar,
    UserError,
    add_quiet,
    command,
    first_line,
    make_folder,
    make_parser,
    need,
    note,
    student_folder,
)
from deploy.config import FLOAT
from deploy.reference import add_reference, evenly, read_reference
from deploy.runtimes import INPUT_NAME, RunOn, as_input, load, products_saturate

CONTRACTIONS = ["Conv", "Gemm", "MatMul"]
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


def quantize_student(
    onnx_file: Path,
    images: np.ndarray,
    target: str,
    op_types: list[str] | None = None,
    method: str = "minmax",
    reduce_range: bool | None = None,
    output: Path | None = None,
) -> tuple[Path, float]:
    """Quantise an fp32 ONNX file of deploy.export; returns the INT8 file and its agreement with the fp32 file.

    Args:
        onnx_file: student.onnx
        images: for calibration, uint8 (N, H, W, 3), prepared as for evaluation
        target: "cpu" or "tensorrt"
        op_types: ONNX operators to quantise; default: all that can be, or CONTRACTIONS beside a LayerNormalization
        method: of calibration: "minmax", "entropy", "percentile"
        reduce_range: 7 bits for weights: for x86 CPUs without VNNI, whose 8-bit products saturate; default: for the
            target "cpu", if this is one
        output: folder of the file; default: the ONNX file's own

    Returns:
        The file, and the share of the images, in percent, to which it gives the same class as the fp32 file.
    """
    onnx = need("onnx", "pip install onnx")
    quantization = need("onnxruntime.quantization", "pip install onnxruntime onnx")
    need("onnxruntime", "pip install onnxruntime").set_default_logger_severity(3)
    runtime = load(onnx_file, RunOn("cpu"))
    metadata = runtime.metadata
    if metadata.precision != "fp32":
        raise UserError(f"{onnx_file} is {metadata.precision} already: quantise the fp32 file of deploy.export")
    output = output or onnx_file.parent
    layout = "-nchw" if metadata.input == FLOAT else ""
    file = output / f"student{layout}-int8-{target}.onnx"
    make_folder(output)

    if reduce_range is None:
        reduce_range = target == "cpu" and products_saturate()
    size = max(size for size in range(1, 17) if len(images) % size == 0)  # two methods want batches of one size
    parts = np.split(images, len(images) // size)
    batches = iter(ProgressBar(parts, "calibrate", each=size, unit="images"))

    class Images(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {INPUT_NAME: as_input(batch, metadata)}

    quint8, qint8 = quantization.QuantType.QUInt8, quantization.QuantType.QInt8
    extra: dict[str, Any] = {}
    if target == "tensorrt":
        extra = dict(
            ActivationSymmetric=True, WeightSymmetric=True, QuantizeBias=False, AddQDQPairToWeight=True,
            DedicatedQDQPair=True,
        )  # fmt: skip
    logger = logging.getLogger()
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # the quantiser's advice is for those who call it by hand
        with tempfile.TemporaryDirectory(prefix=".quantize-", dir=output) as partial:
            prepared, quantised = Path(partial) / "prepared.onnx", Path(partial) / file.name
            quantization.shape_inference.quant_pre_process(str(onnx_file), str(prepared), skip_symbolic_shape=True)
            model = onnx.load(prepared)
            if op_types is None and any(node.op_type == "LayerNormalization" for node in model.graph.node):
                op_types = CONTRACTIONS
            quantization.quantize_static(
                str(prepared),
                str(quantised),
                Images(),
                op_types_to_quantize=op_types,
                nodes_to_exclude=preprocessing_nodes(model) + attention_products(model),
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=qint8 if target == "tensorrt" else quint8,
                weight_type=qint8,
                calibrate_method=quantization.CalibrationMethod[METHODS[method]],
                extra_options=extra,
            )
            model = onnx.load(quantised)
            if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
                raise UserError(f"{onnx_file} has no {' or '.join(op_types or [])} to quantise: see --op-types")
            calibration = dict(images=len(images), method=method, op_types=op_types, reduce_range=reduce_range)
            said = dataclasses.replace(metadata, precision=f"int8-{target}", calibration=calibration)
            onnx_tools.write(model, said, quantised)
            agreement = compare_classes(load(quantised, RunOn("cpu")).run, runtime.run, images)
            if agreement < 50:
                raise UserError(
                    f"{file.name} was not kept: it gives the fp32 file's class on {agreement:.1f} % of the calibration "
                    "images; try --method percentile, --op-types Conv Gemm or more --images"
                )
            os.replace(quantised, file)
    except (UserError, OSError):
        raise
    except Exception as error:  # onnx and onnxruntime have dozens
        raise UserError(f"{onnx_file} cannot be quantised: {first_line(error)}") from error
    finally:
        logger.setLevel(level)
    return file, agreement


def preprocessing_nodes(model: Any) -> list[str]:
    """The nodes between the input and the first convolution or product: normalisation, to be left in float."""
    reached, names = {INPUT_NAME}, []
    for node in model.graph.node:  # in topological order
        if node.op_type not in CONTRACTIONS and reached.intersection(node.input):
            names.append(node.name)
            reached.update(node.output)
    return names


def attention_products(model: Any) -> list[str]:
    """MatMuls of two activations. ONNX Runtime 1.31 also gets them wrong with uint8 activations: quantised, DeiT-Tiny
    with random weights kept its class on 9 % of images, with them in float on 94 %."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "MatMul" and not constants.intersection(n.input)]


def compare_classes(run: Any, reference: Any, images: np.ndarray) -> float:
    same = sum(
        int((run(batch).argmax(1) == reference(batch).argmax(1)).sum())
        for batch in np.array_split(images, -(-len(images) // 64))
    )
    return 100 * same / len(images)


def get_parser() -> Parser:
    parser = make_parser(__doc__, "quantize")
    add_quiet(parser)
    parser.add_argument("student", type=Path, help="a run's student/ folder, or the run directory")
    parser.add_argument("--target", choices=["cpu", "tensorrt"], required=True, help="what will run the file")
    parser.add_argument("--onnx", help="the fp32 file to start from (default: student.onnx in the folder)")
    parser.add_argument("--images", type=int, help="training images for calibration, evenly spaced (default: all)")
    add_reference(parser)
    parser.add_argument("--method", choices=sorted(METHODS), default="minmax", help="of calibration (default: minmax)")
    parser.add_argument("--op-types", nargs="+", help="ONNX operators to quantise (default: see above)")
    parser.add_argument("--reduce-range", action=argparse.BooleanOptionalAction,
                        help="7-bit weights, for x86 CPUs without VNNI, whose 8-bit products saturate (default: with "
                        "--target cpu, if this is one)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder of the file (default: that of the ONNX file)")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.images is not None and args.images < 1:
        raise UserError(f"--images must be at least 1, got {args.images}")
    student = student_folder(args.student)
    onnx_file = Path(args.onnx) if args.onnx else student / "student.onnx"
    if not onnx_file.is_file():
        raise UserError(f"no {onnx_file} yet: python -m deploy.export {student} --format onnx")
    otherwise = "resume the finished run to write it: python train.py --output RUN --resume"
    images = read_reference(student, args.reference, otherwise).train_images
    if not len(images):
        raise UserError(f"the reference of {student} has no training images: train.py --reference N writes them")
    if args.images is not None and args.images > len(images):
        raise UserError(f"--images {args.images}, but the reference has {len(images)}: train.py --reference N keeps N")
    images = images[evenly(len(images), args.images or len(images))]
    if products_saturate():
        what = "7-bit weights" if args.target == "cpu" else "the agreement below would be higher on a GPU"
        if args.reduce_range is None:
            note(f"this CPU has no VNNI, and its 8-bit products saturate: {what}")
    file, agreement = quantize_student(
        onnx_file, images, args.target, args.op_types, args.method, args.reduce_range, args.output
    )
    print(
        f"{file}  {file.stat().st_size / 1e6:.1f} MB, the class of the fp32 file on {agreement:.1f} % of "
        f"{len(images)} calibration images; python -m deploy.check {student} compares on the validation set"
    )


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

"""Quantise student.onnx to INT8, calibrated on the training images of the run's reference.npz.

    python -m deploy.quantize runs/001-mobilenet_v2-uskd/student --target cpu
    python -m deploy.quantize runs/001-mobilenet_v2-uskd/student --target tensorrt

The two targets need different files. cpu: uint8 activations, which ONNX Runtime's CPU kernels need and TensorRT's
parser rejects. tensorrt: symmetric int8 activations and per-channel weights as Q/DQ pairs, and a float bias.
In a network with a LayerNormalization (ViT, Swin, ConvNeXt) only Conv, Gemm and MatMul by a weight are quantised:
softmax, norms and attention scores lose too much in 8 bits.

The file gets a temperature and a threshold of its own, fitted on the validation images of the reference. A device that
runs it may have neither images nor labels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy import cli, onnx_tools
from deploy.cli import Parser, ProgressBar, UserError, command, first_line, log, make_parser, need, number, show
from deploy.confidence import fit_file
from deploy.config import FLOAT, Metadata
from deploy.reference import evenly, read_reference
from deploy.runtimes import INPUT_NAME, RunOn, as_input, load, products_saturate

CONTRACTIONS = ["Conv", "Gemm", "MatMul"]
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
BATCH = 16  # calibration images whose activations are in memory at a time


@dataclass(frozen=True)
class Recipe:
    """How a file is quantised; deploy.quantize has a flag for each."""

    target: str  # "cpu" or "tensorrt"
    op_types: list[str] | None = None  # ONNX operators; None: all that can be, or CONTRACTIONS in a transformer
    method: str = "minmax"  # of calibration: a key of METHODS
    # 7 bits for weights, for x86 CPUs without VNNI; None: for the target "cpu", if this CPU is one of them
    reduce_range: bool | None = None


class CalibrationImages:
    """The reader of onnxruntime's calibration. It works in strides of one batch, so that the activations of one batch
    are kept at a time: all of them would take 70 MB an image at 224 px."""

    def __init__(self, images: np.ndarray, metadata: Metadata) -> None:
        self.metadata = metadata
        parts = np.array_split(images, -(-len(images) // BATCH))
        self.count, self.left = len(parts), 0
        self.batches = iter(ProgressBar(parts, "calibrate", each=BATCH, total=len(images), unit="images"))

    def __len__(self) -> int:
        return self.count

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        if not self.left:
            return None
        self.left -= 1
        return {INPUT_NAME: as_input(next(self.batches), self.metadata)}


def quantize_student(
    onnx_file: Path, images: np.ndarray, recipe: Recipe, output: Path | None = None
) -> tuple[Path, float]:
    """Quantise an fp32 ONNX file of deploy.export; return the file, and the percentage of images of the same class.

    images: for calibration, uint8 (N, H, W, 3), prepared as for evaluation
    output: folder of the file; default: the ONNX file's own
    """
    need("onnx", "pip install onnx")
    need("onnxruntime", "pip install onnxruntime").set_default_logger_severity(3)
    runtime = load(onnx_file, RunOn("cpu"))
    metadata = runtime.metadata
    if metadata.precision != "fp32" or metadata.tensors:
        raise UserError(f"{onnx_file} is {metadata.precision}: quantise the fp32 file of deploy.export")
    if recipe.reduce_range is None:
        recipe = dataclasses.replace(recipe, reduce_range=recipe.target == "cpu" and products_saturate())
    output = output or onnx_file.parent
    cli.make_folder(output)
    file = output / f"student{'-nchw' if metadata.input == FLOAT else ''}-int8-{recipe.target}.onnx"
    with cli.replacing(file) as partial:
        quantize_file(onnx_file, partial, images, metadata, recipe)
        classes = [one.run_in_parts(images, 64).argmax(1) for one in (runtime, load(partial, RunOn("cpu")))]
        agreement = 100 * float(np.mean(classes[0] == classes[1]))
        if agreement < 50:
            found = f"it gives the fp32 file's class on {agreement:.1f} % of the calibration images"
            advice = "try --method percentile, --op-types Conv Gemm or a reference of more images"
            raise UserError(f"{file.name} was not kept: {found}; {advice}")
    return file, agreement


def quantize_file(source: Path, file: Path, images: np.ndarray, metadata: Metadata, recipe: Recipe) -> None:
    """Write the quantised `source` to `file`, with our metadata; UserError if onnxruntime cannot quantise it."""
    onnx = need("onnx", "pip install onnx")
    quantization = need("onnxruntime.quantization", "pip install onnxruntime onnx")
    try:
        with quiet_library(), tempfile.TemporaryDirectory(prefix="quantize-") as folder:
            prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
            quantization.shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            model = onnx.load(prepared)
            op_types = recipe.op_types
            if op_types is None and any(node.op_type == "LayerNormalization" for node in model.graph.node):
                op_types = CONTRACTIONS
            extra: dict[str, Any] = {"CalibStridedMinMax": 1}  # in spite of its name for every method
            if recipe.target == "tensorrt":
                extra |= dict(ActivationSymmetric=True, WeightSymmetric=True, QuantizeBias=False)
                extra |= dict(AddQDQPairToWeight=True, DedicatedQDQPair=True)
            types = quantization.QuantType
            quantization.quantize_static(
                prepared,
                quantised,
                CalibrationImages(images, metadata),
                op_types_to_quantize=op_types,
                nodes_to_exclude=preprocessing_nodes(model) + attention_products(model),
                per_channel=True,
                reduce_range=recipe.reduce_range,
                activation_type=types.QUInt8 if recipe.target == "cpu" else types.QInt8,
                weight_type=types.QInt8,
                calibrate_method=quantization.CalibrationMethod[METHODS[recipe.method]],
                extra_options=extra,
            )
            model = onnx.load(quantised)
    except (UserError, OSError):
        raise
    except Exception as error:  # onnx and onnxruntime have dozens
        raise UserError(f"{source} cannot be quantised: {first_line(error)}") from error
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise UserError(f"{source} has no {' or '.join(op_types or [])} to quantise: see --op-types")
    calibration = dataclasses.asdict(recipe) | {"images": len(images), "op_types": op_types}
    described = dataclasses.replace(metadata, precision=f"int8-{recipe.target}", calibration=calibration)
    onnx_tools.write(model, described, file)


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Hide the remarks that onnxruntime's quantiser prints and logs for people who call it by hand."""
    logger = logging.getLogger()
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def preprocessing_nodes(model: Any) -> list[str]:
    """Return the nodes between the input and the first convolution or product: the normalisation, which stays float."""
    reached, names = {INPUT_NAME}, []
    for node in model.graph.node:  # in topological order
        if node.op_type not in CONTRACTIONS and reached.intersection(node.input):
            names.append(node.name)
            reached.update(node.output)
    return names


def attention_products(model: Any) -> list[str]:
    """Return the MatMuls of two activations, which stay float.

    ONNX Runtime 1.31 computes them wrongly with uint8 activations: quantised, DeiT-Tiny with random weights kept its
    class on 9 % of images, with them in float on 94 %.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "MatMul" and not constants.intersection(n.input)]


def get_parser() -> Parser:
    parser = make_parser(__doc__, "quantize", "student", "--quiet", "--reference")
    add = parser.add_argument
    add("--target", choices=["cpu", "tensorrt"], required=True, help="the runtime of the file")
    add("--onnx", type=Path, help="the fp32 file to start from (default: student.onnx in the folder)")
    add("--count", type=number(int, 1), metavar="N", help="training images, evenly spaced (default: all)")
    add("--method", choices=sorted(METHODS), default="minmax", help="of calibration (default: minmax)")
    add("--op-types", nargs="+", help="ONNX operators to quantise (default: see above)")
    saturating = "x86 CPUs without VNNI, whose 8-bit products saturate"
    default = "(default: with --target cpu, if this CPU is one of them)"
    add("--reduce-range", action=argparse.BooleanOptionalAction, help=f"7-bit weights, for {saturating} {default}")
    add("--output", type=Path, help="folder of the file (default: that of the ONNX file)")
    return parser


def run(args: argparse.Namespace) -> None:
    student = cli.student_folder(args.student)
    onnx_file = args.onnx or student / "student.onnx"
    if not onnx_file.is_file():
        raise UserError(f"{onnx_file} is missing: python -m deploy.export {student} --format onnx")
    otherwise = "resume the finished run to write it: python train.py --output RUN --resume"
    reference = read_reference(student, args.reference, otherwise)
    images = reference.train_images
    if not len(images):
        raise UserError(f"the reference of {student} has no training images: train.py --reference N writes them")
    if args.count is not None and args.count > len(images):
        raise UserError(f"--count {args.count}, but the reference has {len(images)}: train.py --reference N keeps N")
    images = images[evenly(len(images), args.count or len(images))]
    if args.reduce_range is None and products_saturate():
        what = "7-bit weights" if args.target == "cpu" else "the agreement below would be higher on a GPU"
        log(f"this CPU has no VNNI, and its 8-bit products saturate: {what}")
    recipe = Recipe(args.target, args.op_types, args.method, args.reduce_range)
    file, agreement = quantize_student(onnx_file, images, recipe, args.output)
    log(fit_file(file, reference.images, reference.labels))
    same = f"the class of the fp32 file on {agreement:.1f} % of {len(images)} calibration images"
    compares = f"python -m deploy.check {student} compares on validation images"
    show(f"{file}  {file.stat().st_size / 1e6:.1f} MB, {same}; {compares}")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

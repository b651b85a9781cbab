"""Quantise student.onnx to INT8, calibrated on the training images of the run's reference.npz.

    python -m deploy.quantize runs/001-mobilenet_v2-uskd/student --target cpu
    python -m deploy.quantize runs/001-mobilenet_v2-uskd/student --target cpu --max-drop 0.5
    python -m deploy.quantize runs/001-mobilenet_v2-uskd/student --target tensorrt

The two targets need different files. cpu: uint8 activations, which ONNX Runtime's CPU kernels need and TensorRT's
parser rejects. tensorrt: symmetric int8 activations and per-channel weights as Q/DQ pairs, and a float bias.
In a network with a LayerNormalization (ViT, Swin, ConvNeXt) only Conv, Gemm and MatMul by a weight are quantised:
softmax and norms lose too much in 8 bits, and ONNX Runtime computes attention products wrongly in 8 bits.

The command fits the file's own temperature and threshold on the validation images of the reference, because the device
that runs the file may have neither images nor labels.

--max-drop POINTS bounds the loss of top-1 on the validation images of the reference, which calibration does not read.
If the file with all layers in INT8 breaks the bound, the command measures how much each layer alone changes the logits.
It looks for a small number of the worst layers that must stay in float, and prints these layers, the accuracy and the
time. If the bound cannot be kept, it writes no file and ends with status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import logging
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy import cli, onnx_tools
from deploy.benchmark import Plan, benchmark
from deploy.check import table
from deploy.cli import Parser, ProgressBar, UserError, command, first_line, log, make_parser, need, number, show
from deploy.confidence import fit_file
from deploy.config import FLOAT, Metadata
from deploy.reference import evenly, read_reference
from deploy.runtimes import INPUT_NAME, RunOn, as_input, load, products_saturate, refuse_stale

CONTRACTIONS = ["Conv", "Gemm", "MatMul"]
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
BINS = {"entropy": 512, "percentile": 2048}  # bins of a histogram; the time of entropy grows with their square
BATCH, BATCH_PIXELS = 16, 1 << 18  # most images and most pixels of a calibration batch (at 224 px: five images)
RANKING = 32  # calibration images for the trial of one layer in INT8
TIMED_S = 1.5  # measured time of each file in the table of --max-drop
MOST_SHOWN = 10  # layers in a printed list; a table may have twice as many


@dataclass(frozen=True)
class Recipe:
    """Set how a file is quantised; deploy.quantize has a flag for each field."""

    target: str  # "cpu" or "tensorrt"
    # ONNX operators to quantise; None: every operator that onnxruntime can quantise, or CONTRACTIONS in a network with
    # a LayerNormalization
    op_types: list[str] | None = None
    method: str = "minmax"  # method of calibration: a key of METHODS
    # True: 7-bit weights, for x86 CPUs without VNNI. None: True if the target is "cpu" and this CPU is such a CPU
    reduce_range: bool | None = None


@dataclass(frozen=True)
class Accuracy:
    """Hold the top-1 of a float file and of an INT8 file on the same images, which calibration does not use."""

    top1: float  # percent, of the float file
    quantised_top1: float
    error: float  # standard error of their difference, in points
    images: int

    @classmethod
    def of(cls, right: np.ndarray, quantised_right: np.ndarray) -> Accuracy:
        """Return the accuracy. right, quantised_right: whether the float and INT8 files classify each image right."""
        # Count at least one image as changed, because a standard error of 0 would be too small.
        changed = max(1, int((right != quantised_right).sum()))
        error = 100 * math.sqrt(changed) / len(right)
        return cls(100 * float(right.mean()), 100 * float(quantised_right.mean()), error, len(right))

    @property
    def drop(self) -> float:
        return round(self.top1 - self.quantised_top1, 6) + 0.0  # no -0.0


@dataclass(frozen=True)
class Bound:
    """Set how many points of top-1 a file may lose, and the images that measure this loss."""

    max_drop: float
    images: np.ndarray  # calibration uses other images
    labels: np.ndarray
    methods: Sequence[str] = ("minmax",)  # of calibration, tried in order until all layers in INT8 keep the bound

    def accuracy(self, file: Path, right: np.ndarray) -> Accuracy:
        """Return the accuracy of a file. right: whether the fp32 file classifies each image right."""
        return Accuracy.of(right, run_all(file, self.images).argmax(1) == self.labels)


@dataclass(frozen=True)
class Bounded:
    """Hold the results of --max-drop."""

    everything: Accuracy  # of a file with every layer in INT8
    kept: Accuracy  # of the written file, with the layers `left_float` in float
    left_float: list[str]
    layers: int
    costs: dict[str, float]  # layer -> change of the logits in percent if this layer alone is INT8, worst first
    times: list[dict[str, Any]]  # rows of deploy.benchmark: the fp32 file, every layer in INT8, the written file
    method: str  # method of calibration


class OneBatch:
    """Give onnxruntime's calibration one batch of images, so that only the activations of one batch are in memory."""

    def __init__(self, images: np.ndarray, metadata: Metadata) -> None:
        self.rest = [{INPUT_NAME: as_input(images, metadata)}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.rest.pop() if self.rest else None


class Quantizer:
    """Calibrate an fp32 ONNX file once, and write it in INT8 any number of times."""

    def __init__(self, source: Path, images: np.ndarray, metadata: Metadata, recipe: Recipe) -> None:
        """Prepare and calibrate the file; raise UserError if onnxruntime fails.

        images: for calibration, uint8 (N, H, W, 3), prepared as for evaluation
        """
        onnx = need("onnx", "pip install onnx")
        library = need("onnxruntime.quantization", "pip install onnxruntime onnx")
        self.source, self.metadata, self.recipe, self.images = source, metadata, recipe, len(images)
        with explained(source), tempfile.TemporaryDirectory(prefix="quantize-") as folder:
            prepared = Path(folder) / "prepared.onnx"
            with quiet_library():
                library.shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            self.model = onnx.load(prepared)
            name_nodes(self.model)
            onnx.save(self.model, prepared)
            self.op_types = recipe.op_types
            if self.op_types is None and any(node.op_type == "LayerNormalization" for node in self.model.graph.node):
                self.op_types = CONTRACTIONS
            self.ranges = calibrate(prepared, images, metadata, recipe.method, self.op_types)
        self.excluded = preprocessing_nodes(self.model) + attention_products(self.model)
        self.layers = layers_of(self.model, self.excluded, self.op_types)

    def write(self, file: Path, left_float: Sequence[str] = (), only: Sequence[str] = (), about: Any = None) -> None:
        """Write the file in INT8.

        left_float: names of layers that stay in float; only: names of the layers to quantise, default all
        about: more values for the metadata's `calibration`
        """
        library = need("onnxruntime.quantization", "pip install onnxruntime onnx")
        registry = need("onnxruntime.quantization.registry", "")
        qdq = need("onnxruntime.quantization.qdq_quantizer", "")
        extra: dict[str, Any] = {}
        if self.recipe.target == "tensorrt":
            extra = dict(ActivationSymmetric=True, WeightSymmetric=True, QuantizeBias=False)
            extra |= dict(AddQDQPairToWeight=True, DedicatedQDQPair=True)
        types, method = library.QuantType, library.CalibrationMethod.MinMax
        every_type = sorted({*registry.QLinearOpsRegistry, *registry.QDQRegistry})
        with explained(self.source), quiet_library():
            quantizer = qdq.QDQQuantizer(
                copy.deepcopy(self.model),
                True,  # per_channel
                bool(self.recipe.reduce_range),
                types.QInt8,
                types.QUInt8 if self.recipe.target == "cpu" else types.QInt8,
                library.calibrate.TensorsData(method, dict(self.ranges)),
                [node for layer in only for node in self.layers[layer]],
                self.excluded + [node for layer in left_float for node in self.layers[layer]],
                self.op_types or every_type,
                extra,
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            model = quantizer.model.model
        if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            wanted = " or ".join(self.op_types or ["Conv", "Gemm", "another one that onnxruntime can quantise"])
            raise UserError(f"{self.source} has no operator to quantise: expected {wanted}; see --op-types")
        calibration = dataclasses.asdict(self.recipe) | {"images": self.images, "op_types": self.op_types}
        calibration |= about or {}
        precision = f"int8-{self.recipe.target}"
        onnx_tools.write(model, dataclasses.replace(self.metadata, precision=precision, calibration=calibration), file)


def calibrate(
    prepared: Path, images: np.ndarray, metadata: Metadata, method: str, op_types: list[str] | None
) -> dict[str, tuple[Any, Any]]:
    """Return, for each activation, the range of values that INT8 has to represent on the calibration images.

    Only the activations of one batch are in memory. onnxruntime adds bins to a histogram, without a limit, if a later
    batch exceeds the range of the first batch. So a first pass finds the range of all images.
    """
    library = need("onnxruntime.quantization.calibrate", "")
    size = max(1, min(BATCH, BATCH_PIXELS // math.prod(images.shape[1:3])))
    count = -(-len(images) // size)
    batches = [images[i::count] for i in range(count)]  # each has images from the whole list
    augmented = prepared.with_name("augmented.onnx")

    def ranges_by(calibrator: Any, label: str) -> dict[str, tuple[Any, Any]]:
        for batch in ProgressBar(batches, label, each=size, total=len(images), unit="images"):
            with quiet_library():
                calibrator.collect_data(OneBatch(batch, metadata))
        with quiet_library():
            return {name: one.range_value for name, one in calibrator.compute_data().items()}

    calibrator = library.create_calibrator(prepared, op_types, augmented)
    ranges = ranges_by(calibrator, "calibrate")
    if method == "minmax":
        return ranges
    chosen, bins = library.CalibrationMethod[METHODS[method]], {"num_bins": BINS[method]}
    calibrator = library.create_calibrator(prepared, op_types, augmented, chosen, extra_options=bins)
    names = "method symmetric num_bins num_quantized_bins percentile scenario"
    settings = {name: getattr(calibrator, name) for name in names.split()}
    calibrator.collector = library.HistogramCollector(**settings)
    ends = {name: [np.array([np.min(low), np.max(high), 0], np.float32)] for name, (low, high) in ranges.items()}
    with quiet_library():
        calibrator.collector.collect(ends)
    return ranges_by(calibrator, f"{method}: histograms")


@contextlib.contextmanager
def explained(source: Path) -> Iterator[None]:
    """Turn an error of onnx or onnxruntime, which have dozens of exception classes, into UserError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{source} cannot be quantised: {first_line(error)}") from error


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Hide the remarks that onnxruntime's quantiser prints and logs."""
    logger = logging.getLogger()
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


# ---- the nodes of a network ----------------------------------------------------------------------------------------


def name_nodes(model: Any) -> None:
    """Give each node its own name: onnxruntime's quantiser picks nodes by name, and exporters leave some unnamed."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}#{index}"
        taken.add(node.name)


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

    ONNX Runtime 1.31 computes them wrongly with uint8 activations. An INT8 DeiT-Tiny with random weights gives the fp32
    class on 9 % of the images if these MatMuls are quantised, and on 94 % if they stay float.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "MatMul" and not constants.intersection(n.input)]


def layers_of(model: Any, excluded: Sequence[str], op_types: list[str] | None) -> dict[str, list[str]]:
    """Return the nodes of each layer: a convolution or a product by a weight, and all nodes after it up to the next.

    A node after several layers belongs to the last of them. A layer has the name of its weights, or of its node if the
    weights have no name. A layer without a node of the op_types is skipped, because it is not quantised.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    layers: list[tuple[str, list[str]]] = []
    last: dict[str, int] = {}  # tensor -> index of its layer
    for node in model.graph.node:  # in topological order
        if node.name in excluded and node.op_type not in CONTRACTIONS:
            continue
        if node.op_type in CONTRACTIONS and node.name not in excluded:
            near = [node, *readers.get(node.output[0], [])]
            tensors = [tensor for one in near for tensor in one.input if tensor in constants and "." in tensor]
            name = tensors[0].rpartition(".")[0].removeprefix("model.") if tensors else node.name
            layers.append((name if name not in dict(layers) else node.name, []))
            index = len(layers) - 1
        else:
            index = max((last[tensor] for tensor in node.input if tensor in last), default=-1)
        last |= dict.fromkeys(node.output, index)
        if index >= 0:
            layers[index][1].append(node.name)
    types = {node.name: node.op_type for node in model.graph.node}
    return {name: nodes for name, nodes in layers if op_types is None or any(types[node] in op_types for node in nodes)}


# ---- the bound -----------------------------------------------------------------------------------------------------


def find_bounded(
    source: Path, images: np.ndarray, metadata: Metadata, recipe: Recipe, bound: Bound, file: Path
) -> Bounded:
    """Write `file` with few of the worst layers in float, so that the bound holds.

    The search doubles the number of float layers until the bound holds, and then reduces it by bisection. A network of
    80 layers needs 80 trials of one layer on 32 images, and at most 15 trials of whole files.

    source: the fp32 file; images: for calibration and for the ranking of the layers; file: the path of the result
    """
    right = run_all(source, bound.images).argmax(1) == bound.labels
    every_layer, trial = file.with_name(f"every-layer-{file.name}"), file.with_name("trial.onnx")
    quantizer, everything = None, None
    for method in bound.methods:
        tried = Quantizer(source, images, metadata, dataclasses.replace(recipe, method=method))
        tried.write(trial)
        accuracy = bound.accuracy(trial, right)
        if everything is None or accuracy.drop < everything.drop:
            quantizer, everything = tried, accuracy
            os.replace(trial, every_layer)
        if everything.drop <= bound.max_drop:
            break
    assert quantizer is not None
    assert everything is not None
    kept, left_float, costs = everything, list[str](), dict[str, float]()
    if everything.drop > bound.max_drop:
        costs = rank_layers(quantizer, images[evenly(len(images), RANKING)], trial)
        kept, left_float = leave_float(quantizer, list(costs), bound, right, trial, everything)
    promise = {"max_drop": bound.max_drop, "drop": kept.drop, "held_out_images": kept.images}
    quantizer.write(file, left_float, about=promise | {"float_layers": left_float})
    plan = Plan([images[:1]], [], TIMED_S)
    times = benchmark(file.parent, [source, every_layer, file], plan, RunOn("cpu", threads=1), eager=False)
    return Bounded(everything, kept, left_float, len(quantizer.layers), costs, times, quantizer.recipe.method)


def leave_float(
    quantizer: Quantizer, worst_first: list[str], bound: Bound, right: np.ndarray, trial: Path, every_layer: Accuracy
) -> tuple[Accuracy, list[str]]:
    """Find a small number of layers in float that keeps the bound; return the accuracy of this file, and these layers.

    right: whether the fp32 file classifies each image of the bound right; trial: a path for temporary files;
    every_layer: the accuracy with all layers in INT8
    """
    total, least = len(worst_first), every_layer.drop
    low, high, kept = 0, 0, None  # `low` layers in float are too few; once `kept` is set, `high` are enough
    while kept is None or high - low > 1:
        count = min(max(1, 2 * low), total - 1) if kept is None else (low + high) // 2
        if count == low:
            found = f"with up to {count} of {total} layers in float every file loses at least {least:.2f} points"
            advice = "try another --method, or calibrate on more images (train.py --reference N)"
            raise UserError(f"--max-drop {bound.max_drop:g} cannot be kept: {found}; {advice}; no file was written")
        quantizer.write(trial, worst_first[:count])
        accuracy = bound.accuracy(trial, right)
        least = min(least, accuracy.drop)
        if accuracy.drop <= bound.max_drop:
            high, kept = count, accuracy
        else:
            low = count
    return kept, worst_first[:high]


def run_all(file: Path, images: np.ndarray) -> np.ndarray:
    """Return the logits of a file on the CPU."""
    return load(file, RunOn("cpu")).run_in_parts(images, 64)


def rank_layers(quantizer: Quantizer, images: np.ndarray, trial: Path) -> dict[str, float]:
    """Return, for each layer, the change of the logits in percent if it alone is in INT8, the worst layer first.

    trial: a path for temporary files
    """
    expected = run_all(quantizer.source, images)
    size = max(float(np.square(expected - expected.mean(0)).mean()), float(np.finfo(np.float32).tiny))
    costs = {}
    for layer in ProgressBar(list(quantizer.layers), "one layer in INT8", unit="layers"):
        quantizer.write(trial, only=[layer])
        costs[layer] = 100 * math.sqrt(float(np.square(run_all(trial, images) - expected).mean()) / size)
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def describe(bounded: Bounded, max_drop: float) -> list[str]:
    """Return the report of --max-drop: two tables and a summary."""
    everything, kept, left_float, lines = bounded.everything, bounded.kept, bounded.left_float, []
    if bounded.costs:
        shown = list(bounded.costs.items())[: max(MOST_SHOWN, min(len(left_float) + 3, 2 * MOST_SHOWN))]
        rows = [
            {"layer": name, "logits_change_%": cost, "stays": "float" if name in left_float else "INT8"}
            for name, cost in shown
        ]
        lines = ["the layers that change the logits most, each alone in INT8:"]
        lines += [table(rows, "layer: logits_change_%:.2f stays:"), ""]
    names = "fp32", "every layer in INT8", f"{len(left_float)} of {bounded.layers} layers in float"
    rows = [{"file": name} | row for name, row in zip(names, bounded.times)]
    for row, accuracy in zip(rows[1:], (everything, kept)):
        row |= {"top1": accuracy.quantised_top1, "top1_difference": -accuracy.drop}
    rows[0] |= {"top1": kept.top1}
    lines += [table(rows, "file: top1:.2f top1_difference:+.2f p50_ms:.2f mb:.1f cpu/wall:.2f"), ""]
    seen = f"{kept.images} validation images that calibration did not read; standard error {kept.error:.2f}"
    lines += [
        f"top-1 changes by {-kept.drop:+.2f} points (bound {-max_drop:g}) on {seen}; calibrated by {bounded.method}"
    ]
    if kept.error > max_drop:
        more = "train.py --output RUN --resume --reference N stores more images"
        lines += [f"{kept.images} images cannot show a loss of {max_drop:g} points reliably: {more}"]
    fp32, _, ours = (row.get("p50_ms", math.nan) for row in bounded.times)
    if ours >= fp32:
        lines += ["on this CPU the INT8 file is not faster than the fp32 file"]
    return lines


def quantize_student(
    onnx_file: Path,
    images: np.ndarray,
    recipe: Recipe,
    output: Path | None = None,
    bound: Bound | None = None,
    fitted: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Path, float, Bounded | None]:
    """Quantise an fp32 ONNX file of deploy.export.

    images: for calibration, uint8 (N, H, W, 3), prepared as for evaluation
    output: folder of the file; default: the ONNX file's own
    bound: the largest loss of top-1; default: no limit, and the loss is not measured
    fitted: validation images and labels to fit the file's temperature and threshold on; default: no fit

    Returns:
        The new file, the percentage of images to which both files give the same class, and the results of the bound or
        None.
    """
    need("onnx", "pip install onnx")
    need("onnxruntime", "pip install onnxruntime").set_default_logger_severity(3)
    runtime = load(onnx_file, RunOn("cpu"))
    metadata = runtime.metadata
    if metadata.precision != "fp32" or metadata.tensors:
        kind = "not a file of deploy.export" if metadata.tensors else metadata.precision
        raise UserError(f"{onnx_file} is {kind}: quantise an fp32 file of deploy.export")
    refuse_stale(onnx_file, metadata)
    if recipe.reduce_range is None:
        recipe = dataclasses.replace(recipe, reduce_range=recipe.target == "cpu" and products_saturate())
    output, bounded = output or onnx_file.parent, None
    cli.make_folder(output)
    file = output / f"student{'-nchw' if metadata.input == FLOAT else ''}-int8-{recipe.target}.onnx"
    with cli.replacing(file) as partial:
        if bound is not None:
            bounded = find_bounded(onnx_file, images, metadata, recipe, bound, partial)
        else:
            Quantizer(onnx_file, images, metadata, recipe).write(partial)
        classes = [logits.argmax(1) for logits in (runtime.run_in_parts(images, 64), run_all(partial, images))]
        agreement = 100 * float(np.mean(classes[0] == classes[1]))
        if agreement < 50:
            found = f"it gives the fp32 file's class on {agreement:.1f} % of the calibration images"
            advice = "try --max-drop, --method percentile, --op-types Conv Gemm or a reference of more images"
            raise UserError(f"{file.name} is not stored: {found}, expected at least 50 %; {advice}")
        if fitted is not None:
            log(fit_file(partial, *fitted))
    return file, agreement, bounded


# ---- the command ---------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    parser = make_parser(__doc__, "quantize", "student", "--quiet", "--reference")
    add = parser.add_argument
    add("--target", choices=["cpu", "tensorrt"], required=True, help="the runtime that will run the file")
    add("--max-drop", type=number(float, 0, 100), metavar="POINTS", help="top-1 that the file may lose (default: any)")
    add("--onnx", type=Path, help="the fp32 file to start from (default: student.onnx in the folder)")
    add("--count", type=number(int, 1), metavar="N", help="training images, evenly spaced (default: all)")
    methods = (
        "method of calibration (default: minmax; --max-drop tries minmax, then percentile, then entropy, until every "
        "layer can be INT8, and otherwise takes the best of them)"
    )
    add("--method", choices=sorted(METHODS), help=methods)
    add(
        "--op-types",
        nargs="+",
        help="ONNX operators to quantise (default: all; Conv, Gemm and MatMul if there is a LayerNormalization)",
    )
    saturating = "x86 CPUs without VNNI, whose 8-bit products saturate"
    default = "(default: if --target is cpu and this CPU is such a CPU)"
    add("--reduce-range", action=argparse.BooleanOptionalAction, help=f"7-bit weights, for {saturating} {default}")
    add("--output", type=Path, help="folder of the file (default: that of the ONNX file)")
    return parser


def run(args: argparse.Namespace) -> None:
    student = cli.student_folder(args.student)
    onnx_file = args.onnx or student / "student.onnx"
    if not onnx_file.is_file():
        raise UserError(f"{onnx_file} is missing: python -m deploy.export {shlex.quote(str(student))} --format onnx")
    otherwise = "resume the finished run to write it: python train.py --output RUN --resume"
    reference = read_reference(student, args.reference, otherwise)
    images = reference.train_images
    if not len(images):
        raise UserError(f"the reference of {student} has no training images: train.py --reference N writes them")
    if args.count is not None and args.count > len(images):
        raise UserError(f"--count {args.count}, but the reference has {len(images)}: train.py --reference N keeps N")
    images = images[evenly(len(images), args.count or len(images))]
    if args.reduce_range is None and products_saturate():
        consequence = (
            "the weights get 7 bits"
            if args.target == "cpu"
            else "on a GPU the file agrees more often with the fp32 file than on this CPU"
        )
        log(f"the 8-bit products of this CPU saturate (x86 without VNNI): {consequence}")
    recipe = Recipe(args.target, args.op_types, args.method or "minmax", args.reduce_range)
    bound = None
    if args.max_drop is not None:
        methods = [args.method] if args.method else list(METHODS)
        bound = Bound(args.max_drop, reference.images, reference.labels, methods)
    fitted = reference.images, reference.labels
    file, agreement, bounded = quantize_student(onnx_file, images, recipe, args.output, bound, fitted)
    size = f"{file}  {file.stat().st_size / 1e6:.1f} MB"
    if bound is None or bounded is None:
        same = f"same class as the fp32 file on {agreement:.1f} % of {len(images)} calibration images"
        show(f"{size}, {same}; python -m deploy.check {shlex.quote(str(student))} compares them on validation images")
        return
    layers, more = list(bounded.left_float[:MOST_SHOWN]), len(bounded.left_float) - MOST_SHOWN
    layers += [f"and {more} more"] if more > 0 else []
    show(*describe(bounded, bound.max_drop), f"{size}; in float: {', '.join(layers) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

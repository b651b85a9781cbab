"""Test deploy.quantize: the file of each target, its memory, and the bound on lost accuracy."""

import itertools
import re

import numpy as np
import onnx
import pytest
from commands import deploy, refused
from onnxruntime.quantization.calibrate import HistogramCollector
from students import load

from deploy import quantize
from deploy.quantize import OneBatch
from deploy.reference import NAME, read_reference
from deploy.runtimes import products_saturate


def zero_points(file):
    """Return the types of the activations' zero points, and whether all of them are zero."""
    graph = onnx.load(file).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    points = [tensors[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    return {str(point.dtype) for point in points}, all((point == 0).all() for point in points)


def test_each_target_gets_the_file_it_needs(deployed):
    student = deployed / "student"
    assert zero_points(student / "student-int8-cpu.onnx")[0] == {"uint8"}
    assert zero_points(student / "student-int8-tensorrt.onnx") == ({"int8"}, True)
    for node in onnx.load(student / "student-int8-tensorrt.onnx").graph.node:
        assert "bias_quantized" not in " ".join(node.input)  # TensorRT takes no quantised bias
    assert (student / "student-int8-cpu.onnx").stat().st_size < 0.6 * (student / "student.onnx").stat().st_size
    calibration = load(student / "student-int8-cpu.onnx").metadata.calibration
    assert (calibration["images"], calibration["method"], calibration["target"]) == (64, "minmax", "cpu")


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_calibration_keeps_the_activations_of_one_batch_at_a_time(run, method, monkeypatch, capsys):
    """Expect a call of collect with the ranges, then one for each batch: 37 images are three batches of at most 16."""
    batches = []
    collect = HistogramCollector.collect

    def count(collector, arrays):
        batches.append({len(kept) for kept in arrays.values()})
        return collect(collector, arrays)

    monkeypatch.setattr(HistogramCollector, "collect", count)
    deploy(quantize, run, "--target", "cpu", "--count", "37", "--method", method)
    assert batches == [{1}] * 4
    assert "Collecting" not in capsys.readouterr().out  # the library prints a line for each batch


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_histograms_do_not_grow_with_the_range_of_later_images(run, method, monkeypatch):
    """Test two batches, because the histograms of onnxruntime grow with the range of the widest batch."""
    sizes = set()
    compute = HistogramCollector.compute_collection_result

    def count(collector):
        sizes.update(len(histogram[0]) for histogram in collector.histogram_dict.values())
        return compute(collector)

    monkeypatch.setattr(HistogramCollector, "compute_collection_result", count)
    reference = read_reference(run / "student", None, "")
    images = np.repeat(reference.train_images[:1], 32, axis=0)
    images[::2] = 128  # the first of two batches is plain grey
    quantize.quantize_student(run / "student/student.onnx", images, quantize.Recipe("cpu", method=method))
    assert sizes == {quantize.BINS[method]}


def test_large_images_are_calibrated_a_few_at_a_time(run, monkeypatch):
    monkeypatch.setattr(quantize, "BATCH_PIXELS", 3 * 32 * 32)
    sizes = []
    monkeypatch.setattr(
        quantize, "OneBatch", lambda images, metadata: sizes.append(len(images)) or OneBatch(images, metadata)
    )
    deploy(quantize, run, "--target", "cpu", "--count", "10")
    assert sizes == [3, 3, 2, 2]


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_each_method_cuts_off_the_largest_values(deployed, method):
    """Check that the method narrows some of the ranges of minmax and widens none."""
    student, images = deployed / "student", read_reference(deployed / "student", None, "").train_images
    metadata = load(student / "student.onnx", device="cpu").metadata
    widths = {}
    for one in ("minmax", method):
        quantizer = quantize.Quantizer(student / "student.onnx", images, metadata, quantize.Recipe("cpu", method=one))
        widths[one] = {name: float(np.max(high) - np.min(low)) for name, (low, high) in quantizer.ranges.items()}
    shares = [widths[method][name] / width for name, width in widths["minmax"].items() if width]
    assert min(shares) < 0.99
    assert max(shares) < 1.01


# ---- the bound on lost accuracy ------------------------------------------------------------------------------------


def spoil(run):
    """Scale four channels between two convolutions by 1,000, and return the names of the two layers.

    The second convolution divides them again: the float logits stay the same, but INT8 loses the other channels.
    """
    file = run / "student/student.onnx"
    model = onnx.load(file)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for first, relu, second in itertools.product(model.graph.node, repeat=3):
        types = [node.op_type for node in (first, relu, second)]
        if types == ["Conv", "Relu", "Conv"] and first.output[0] == relu.input[0] and relu.output[0] == second.input[0]:
            readers = [node for node in model.graph.node if relu.output[0] in node.input]
            if len(readers) == 1:
                break
    for name, channel, factor in (
        (first.input[1], np.s_[:4], 1000),
        (first.input[2], np.s_[:4], 1000),
        (second.input[1], np.s_[:, :4], 0.001),
    ):
        values = onnx.numpy_helper.to_array(tensors[name]).copy()
        values[channel] *= factor
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, file)
    return {node.input[1].rpartition(".")[0].removeprefix("model.") for node in (first, second)}


def top1(file, reference):
    return 100 * float((load(file, device="cpu").run(reference.images).argmax(1) == reference.labels).mean())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", pytest.param("tensorrt", marks=pytest.mark.trial)])
def test_the_layers_that_lose_too_much_stay_in_float(run, target, capsys, monkeypatch):
    monkeypatch.setattr(quantize, "TIMED_S", 0.1)
    spoilt = spoil(run)
    student, reference = run / "student", read_reference(run / "student", None, "")
    file, flags = student / f"student-int8-{target}.onnx", ["--target", target, "--reduce-range", "--method", "minmax"]
    assert top1(student / "student.onnx", reference) == 100
    assert quantize_or_refuse(run, *flags) < 95
    capsys.readouterr()
    deploy(quantize, run, *flags, "--max-drop", "2.5")
    out = capsys.readouterr().out
    calibration = load(file).metadata.calibration
    assert set(calibration["float_layers"]) == spoilt
    assert calibration["drop"] == pytest.approx(100 - top1(file, reference))
    assert calibration["drop"] <= 2.5
    assert re.search(r"^2 of \d+ layers in float +\S+ +\S+ +[\d.]+ ", out, re.M)  # with its accuracy and its time


def quantize_or_refuse(run, *flags):
    """Return the top-1 without a bound, or 0 if quantize refuses the file because over half of the answers change."""
    parser = quantize.get_parser()
    if quantize.command(parser, quantize.run, [str(run), *flags]):
        return 0
    target = flags[flags.index("--target") + 1]
    return top1(run / f"student/student-int8-{target}.onnx", read_reference(run / "student", None, ""))


def test_a_file_that_keeps_the_bound_in_int8_has_no_layer_in_float(run, capsys, monkeypatch):
    monkeypatch.setattr(quantize, "TIMED_S", 0.1)
    deploy(quantize, run, "--target", "cpu", "--max-drop", "3", *["--reduce-range"] * products_saturate())
    assert load(run / "student/student-int8-cpu.onnx").metadata.calibration["float_layers"] == []
    out = capsys.readouterr().out
    assert "in float: nothing" in out
    assert "80 validation images that calibration did not read; standard error" in out


def test_a_bound_that_cannot_be_kept_gives_one_line_and_changes_no_file(run, monkeypatch, capfd):
    before = {path: path.read_bytes() for path in (run / "student").iterdir()}
    worse = quantize.Accuracy(90.0, 80.0, 1.0, 80)
    monkeypatch.setattr(quantize.Bound, "accuracy", lambda *_: worse)
    line = refused(capfd, quantize, run, "--target", "cpu", "--max-drop", "0.5", "--method", "minmax")
    assert "--max-drop 0.5 cannot be kept" in line
    assert "every file loses at least 10.00 points" in line
    assert {path: path.read_bytes() for path in (run / "student").iterdir()} == before


def test_the_bound_and_the_calibration_use_different_images(run, monkeypatch):
    reference, seen = read_reference(run / "student", None, ""), []
    monkeypatch.setattr(quantize, "quantize_student", lambda *args: seen.append(args) or (run / NAME, 100.0, None))
    deploy(quantize, run, "--target", "cpu", "--max-drop", "1")
    ((_, images, _, _, bound, _),) = seen
    assert (images == reference.train_images).all()
    assert (bound.images == reference.images).all()
    assert (bound.labels == reference.labels).all()


def test_each_node_is_in_one_layer_with_the_name_of_its_weights():
    """Check too that unnamed nodes get names, because onnxruntime picks nodes by name."""
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["images"], ["x"], to=1),
        node("Conv", ["x", "model.stem.conv.weight"], ["a"], "conv"),
        node("HardSigmoid", ["a"], ["b"]),
        node("Mul", ["a", "b"], ["c"]),
        node("MatMul", ["c", "val_3"], ["d"], "product"),
        node("Add", ["d", "model.head.bias"], ["e"]),
        node("MatMul", ["e", "c"], ["f"], "attention"),
    ]
    weights = [onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), n) for n in ("val_3", "model.head.bias")]
    weights.append(onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "model.stem.conv.weight"))
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], weights))
    quantize.name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    excluded = quantize.preprocessing_nodes(model) + quantize.attention_products(model)
    layers = quantize.layers_of(model, excluded, None)
    assert layers == {"stem.conv": names[1:4], "head": [*names[4:6], "attention"]}
    assert list(quantize.layers_of(model, excluded, ["Conv"])) == ["stem.conv"]


def test_too_few_images_for_the_bound_are_reported():
    right = np.ones(50, bool)
    accuracy = quantize.Accuracy.of(right, right)
    assert (accuracy.drop, accuracy.error) == (0, 2)  # the error is one image of 50, although no image changed
    changed = right.copy()
    changed[:4] = False
    accuracy = quantize.Accuracy.of(right, changed)
    assert (accuracy.drop, accuracy.error) == (8, 4)
    times = [{"p50_ms": 1.0}] * 3
    lines = quantize.describe(quantize.Bounded(accuracy, accuracy, [], 3, {}, times, "minmax"), 0.5)
    assert "50 images cannot show a loss of 0.5 points reliably" in "\n".join(lines)


@pytest.mark.parametrize("saturates", [True, False])
def test_weights_have_7_bits_by_default_if_8_bit_products_saturate(run, monkeypatch, capsys, saturates):
    monkeypatch.setattr(quantize, "products_saturate", lambda: saturates)
    deploy(quantize, run, "--target", "cpu", "--count", "16")
    assert ("products of this CPU saturate" in capsys.readouterr().out) == saturates
    graph = onnx.load(run / "student/student-int8-cpu.onnx").graph
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    largest = max(np.abs(tensor.astype(int)).max() for tensor in tensors if tensor.dtype == np.int8)
    assert (largest <= 64) == saturates

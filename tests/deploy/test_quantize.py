"""deploy.quantize: each target gets the file it needs, within bounded memory."""

import numpy as np
import onnx
import pytest
from commands import deploy
from students import load

from deploy import quantize


def zero_points(file):
    """The types of the activations' zero points, and whether they are all zero."""
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
def test_calibration_keeps_the_activations_of_one_batch(run, method, monkeypatch, capsys):
    """Any number of images, in batches of 16 at most: of 37 images the collector sees three batches."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    batches = []
    collect = HistogramCollector.collect

    def count(collector, arrays):
        batches.append({len(kept) for kept in arrays.values()})
        return collect(collector, arrays)

    monkeypatch.setattr(HistogramCollector, "collect", count)
    deploy(quantize, run, "--target", "cpu", "--count", "37", "--method", method)
    assert batches == [{1}] * 3
    assert "Collecting" not in capsys.readouterr().out  # the library prints a line a batch


@pytest.mark.parametrize("saturates", [True, False])
def test_weights_have_7_bits_where_products_of_8_saturate(run, monkeypatch, capsys, saturates):
    """By default for this CPU."""
    monkeypatch.setattr(quantize, "products_saturate", lambda: saturates)
    deploy(quantize, run, "--target", "cpu", "--count", "16")
    assert ("this CPU has no VNNI" in capsys.readouterr().out) == saturates
    graph = onnx.load(run / "student/student-int8-cpu.onnx").graph
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    largest = max(np.abs(tensor.astype(int)).max() for tensor in tensors if tensor.dtype == np.int8)
    assert (largest <= 64) == saturates

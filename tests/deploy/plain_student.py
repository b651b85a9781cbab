"""Write, without torch, a student whose labels contain HTML and other hostile text."""

import numpy as np
import pytest

from deploy import onnx_tools
from deploy.config import UINT8, Metadata

LABELS = ["a cat", "</script><script>document.title = 'hit'</script>", "<b>café</b> & \u2028", "d" * 60, "e", "f"]


def metadata_of(**changes):
    values = dict(label_names=LABELS, input_size=[3, 64, 64], mean=[0.5] * 3, std=[0.25] * 3, interpolation="bicubic",
                  crop=0.875, precision="fp32", input=UINT8, architecture="file.py:tiny_net")  # fmt: skip
    values |= changes
    channels = values["input_size"][0]
    return Metadata(**values | {"mean": values["mean"][:channels], "std": values["std"][:channels]})


def write_onnx(folder, metadata):
    """Write a student that multiplies the mean of each channel by random weights."""
    onnx = pytest.importorskip("onnx")
    channels, height, width = metadata.input_size
    uint8 = metadata.input == UINT8
    shape = ["N", height, width, channels] if uint8 else ["N", channels, height, width]
    make, kind = onnx.helper, onnx.TensorProto.UINT8 if uint8 else onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).normal(0, 0.05, (channels, len(metadata.label_names))).astype(np.float32)
    nodes = [
        make.make_node("Cast", ["images"], ["x"], to=onnx.TensorProto.FLOAT),
        make.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2] if uint8 else [2, 3], keepdims=0),
        make.make_node("MatMul", ["mean", "weights"], ["logits"]),
    ]
    inputs = [make.make_tensor_value_info("images", kind, shape)]
    outputs = [make.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", len(metadata.label_names)])]
    graph = make.make_graph(nodes, "student", inputs, outputs, [onnx.numpy_helper.from_array(weights, "weights")])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    onnx_tools.write(model, metadata, folder / "student.onnx")
    return folder / "student.onnx"

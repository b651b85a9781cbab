"""Run an exported file in OpenVINO (an .onnx file) or in ncnn (the files that pnnx makes from an .onnx file).

If openvino is installed, deploy.check also runs each .onnx file in OpenVINO. If ncnn is installed, it also runs each
.ncnn.param file (pip install openvino, or ncnn and pnnx). Both run on the CPU here.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import UserError, first_line, need, read_file
from deploy.config import FLOAT, Metadata
from deploy.runtimes import RunOn, Runtime, as_input, load_onnx, tensor_names, usable_cpus


def load_openvino(path: Path, on: RunOn) -> Runtime:
    """Load an ONNX file in OpenVINO, with float32 arithmetic. A file that deploy.export did not write needs its .json.

    On CPUs with AVX512-BF16 OpenVINO's default is bfloat16, which changes logits by up to 17 % of the largest logit.
    """
    openvino = need("openvino", "pip install openvino")
    runtime = load_onnx(path, RunOn("cpu", threads=1))  # checks the file, and reads its metadata
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": on.threads or usable_cpus()}
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(read_file(path)), "CPU", settings)
    except Exception as error:  # RuntimeError, and OpenVINO's own exceptions
        raise UserError(f"{path} cannot be loaded by OpenVINO: {first_line(error)}") from error
    call = functools.partial(run_openvino, compiled, runtime.metadata)
    return dataclasses.replace(runtime, name="openvino", provider="OpenVINO CPU", call=call)


def run_openvino(compiled: Any, metadata: Metadata, images: np.ndarray) -> np.ndarray:
    inputs, outputs = tensor_names(metadata)
    logits: np.ndarray = compiled({inputs: as_input(images, metadata)})[outputs]
    return logits


def load_ncnn(path: Path, on: RunOn) -> Runtime:
    """Load NAME.ncnn.param and .bin, which pnnx makes from NAME.onnx.

    NAME.onnx must be in the same folder, because the files of pnnx lack the labels and the preprocessing.
    """
    ncnn = need("ncnn", "pip install ncnn")
    if on.device not in ("auto", "cpu") and not on.allow_fallback:
        raise UserError(f"--device {on.device}, but {path.name} runs on the CPU; --allow-fallback accepts that")
    stem = path.name.removesuffix(".ncnn.param")
    source = next((file for file in path.parent.glob("*.onnx") if file.stem.replace("-", "_") == stem), None)
    weights = path.with_suffix(".bin")
    if source is None:
        raise UserError(f"{path} needs its ONNX file in the same folder (pnnx replaced each - in the name by _)")
    if not weights.is_file():
        made = f"pnnx {source.name} inputshape=[1,3,224,224]f32"
        raise UserError(f"{path} needs {weights.name} in the same folder; {made} writes both")
    metadata = load_onnx(source, RunOn("cpu", threads=1)).metadata
    if metadata.input != FLOAT:
        raise UserError(f"{source} takes {metadata.input}: give pnnx the file of deploy.export --input float")
    net = ncnn.Net()
    net.opt.num_threads = on.threads or usable_cpus()
    if net.load_param(str(path)) or net.load_model(str(weights)):
        raise UserError(f"{path} cannot be loaded by ncnn {ncnn.__version__}")
    metadata = dataclasses.replace(metadata, precision="fp16")  # pnnx stores weights in 16 bits by default
    return Runtime("ncnn", "ncnn CPU", metadata, functools.partial(run_ncnn, ncnn, net, metadata), max_batch=1)


def run_ncnn(ncnn: Any, net: Any, metadata: Metadata, images: np.ndarray) -> np.ndarray:
    (tensor,) = as_input(images, metadata)
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(tensor))
    status, logits = extractor.extract("out0")
    if status:
        raise UserError(f"ncnn stopped with status {status}")
    return np.array(logits, np.float32).reshape(1, -1)

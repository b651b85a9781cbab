"""One small interface to whatever runs a student: ONNX Runtime, TensorRT, torch, TorchScript, torch.export.

    runtime = load(Path("runs/001-mobilenet_v2-uskd/student/student.onnx"))
    runtime.provider                # what really runs it, such as CPUExecutionProvider
    logits = runtime.run(images)    # uint8 (N, H, W, 3) -> float32 (N, C)

Images are what deploy.preprocess.prepare makes of a photograph; each runtime does the normalisation, in its graph where
the artefact has it there. A runtime's library is imported when a file asks for it: an .onnx file needs no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.cli import UserError, first_line, need
from deploy.config import PREPROCESSING, check_fields, read_json

# What every artefact says of itself, beside the metrics and the architecture of config.json.
METADATA = (
    "label_names", "mean", "std", "input_size", "interpolation", "crop",  # of config.json
    "precision",  # fp32, fp16, int8-cpu, int8-tensorrt
    "input",  # uint8 NHWC or float32 NCHW
    "source",  # sha256 of the weights it was made from
)  # fmt: skip
UINT8, FLOAT = "uint8 NHWC", "float32 NCHW"
ARTEFACT = {
    "precision": (lambda v: isinstance(v, str), "fp32, fp16, int8-cpu or int8-tensorrt"),
    "input": (lambda v: v in (UINT8, FLOAT), f"{UINT8} or {FLOAT}"),
    "source": (lambda v: isinstance(v, dict), "the digest of the weights"),
}
INPUT_NAME, OUTPUT_NAME = "images", "logits"
SIDECAR = (  # what may stand beside an ONNX file from elsewhere
    "an ONNX file from elsewhere takes a {}.json beside it, with mean, std, label_names, input_size [3, height, "
    f'width], interpolation, crop and input, which is "{UINT8}", or "{FLOAT}" for images normalised by mean and std'
)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
LOADERS = {
    ".onnx": "deploy.runtimes:load_onnx",
    ".engine": "deploy.tensorrt:load_engine",
    "": "deploy.torch_runtimes:load",  # a student/ folder
    ".ts": "deploy.torch_runtimes:load",
    ".pt2": "deploy.torch_runtimes:load",
}
TORCH_KINDS = tuple(kind for kind, loader in LOADERS.items() if "torch" in loader)


class Loaded(NamedTuple):
    """What a loader returns."""

    name: str
    provider: str
    metadata: dict[str, Any]
    run: Callable[[np.ndarray], np.ndarray]
    max_batch: int | None = None


@dataclass(frozen=True)
class Runtime:
    """A student that is loaded and ready to run."""

    name: str  # torch, torch.compile, torchscript, torch.export, onnxruntime, tensorrt
    provider: str  # what really runs it
    metadata: dict[str, Any]
    run: Callable[[np.ndarray], np.ndarray]  # uint8 (N, H, W, 3) -> float32 (N, C)
    load_s: float
    max_batch: int | None = None  # of an engine's profile; None: any

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of an image."""
        channels, height, width = self.metadata["input_size"]
        return height, width, channels


def load(
    path: Path,
    device: str = "auto",
    threads: int = 0,
    allow_fallback: bool = False,
    compile: bool = False,
    model_files: Sequence[str] = (),
) -> Runtime:
    """Load a student/ folder or one of its artefacts.

    Args:
        path: a student/ folder, or a .ts, .pt2, .onnx or .engine file
        device: "auto" (a CUDA device where the runtime has one), "cpu", "cuda" or, for .onnx, "tensorrt"
        threads: CPU threads; 0 leaves it to the runtime
        allow_fallback: run on the CPU if the device asked for is unavailable
        compile: a student/ folder through torch.compile
        model_files: path/to/file.py:function of models of the user's own, for a student/ folder that asks for one

    Raises:
        UserError: no such device, a runtime that is not installed, or a file that is missing, damaged, foreign or for
            another machine
    """
    kind = "" if path.is_dir() else path.suffix or "without a suffix"
    if kind not in LOADERS or not path.exists():
        what = "unknown kind of artefact" if path.exists() else "no such file or folder"
        raise UserError(f"{path}: {what}; expected a student/ folder, or a .ts, .pt2, .onnx or .engine file")
    if device == "tensorrt" and kind != ".onnx":
        raise UserError(f"--device tensorrt is ONNX Runtime's TensorRT provider, for .onnx; {path.name} is none")
    if kind in TORCH_KINDS:
        needs = "an .onnx or .engine file runs without it" if kind else "on this machine give its .onnx or .engine file"
        need("torch", f"{path.name or path} needs torch, torchvision and timm; {needs}")
    started = time.perf_counter()
    module, _, loader = LOADERS[kind].partition(":")
    # auto: an onnxruntime without CUDA on a machine with it
    try:
        load_kind = getattr(importlib.import_module(module), loader)
    except ImportError as error:  # torchvision or timm is missing, or this is the one file of deploy.pack
        raise UserError(f"{path} cannot be loaded here: {first_line(error)}") from error
    loaded = load_kind(
        path, device, threads=threads, allow_fallback=allow_fallback or device == "auto", compile=compile,
        model_files=model_files,
    )  # fmt: skip
    missing = [key for key in METADATA if key not in loaded.metadata]
    if missing:
        foreign = f"; {SIDECAR.format(path.name)}" if kind == ".onnx" else ""
        raise UserError(f"{path} was not made by deploy/: its metadata has no {', '.join(missing)}{foreign}")
    check_fields(loaded.metadata, PREPROCESSING | ARTEFACT, f"the metadata of {path}")
    seconds = time.perf_counter() - started
    return Runtime(loaded.name, loaded.provider, loaded.metadata, loaded.run, seconds, loaded.max_batch)


def pick_device(device: str, has_cuda: bool, allow_fallback: bool) -> str:
    """ "cpu", "cuda" or "tensorrt": never another than was asked for, unless that is allowed."""
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    if device == "cpu" or has_cuda:
        return device
    if not allow_fallback:
        raise UserError(f"--device {device}, but there is no CUDA device here; --allow-fallback runs on the CPU")
    return "cpu"


def as_input(images: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """uint8 (N, H, W, 3) -> what the artefact takes: the same, or normalised float32 (N, 3, H, W)."""
    if metadata["input"] == UINT8:
        return images
    mean, std = (np.array(metadata[name], dtype=np.float32) for name in ("mean", "std"))
    normalised = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def load_onnx(path: Path, device: str, threads: int, allow_fallback: bool, **_: Any) -> Loaded:
    ort = need("onnxruntime", "pip install onnxruntime, or onnxruntime-gpu where there is a CUDA device")
    device = pick_device(device, cuda_device_count() > 0, allow_fallback)
    wanted = PROVIDERS[device]
    if device != "cpu" and wanted not in ort.get_available_providers():
        if not allow_fallback:
            raise UserError(
                f"--device {device}, but this onnxruntime has no {wanted} (it has "
                f"{', '.join(ort.get_available_providers())}); --allow-fallback runs on the CPU"
            )
        wanted = PROVIDERS["cpu"]
    if device != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN in torch's wheels
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong comes as an exception or shows in get_providers()
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:  # onnxruntime has its own dozen
        raise UserError(f"{path} cannot be loaded by ONNX Runtime: {first_line(error)}") from error
    provider = session.get_providers()[0]
    if provider != wanted and not allow_fallback:
        raise UserError(
            f"--device {device}: ONNX Runtime could not start {wanted} and fell back to {provider} (CUDA, cuDNN or "
            "TensorRT libraries of another version?); --allow-fallback accepts that"
        )
    metadata = onnx_metadata(session.get_modelmeta().custom_metadata_map)
    sidecar = path.with_name(path.name + ".json")
    if "mean" not in metadata and sidecar.is_file():
        metadata = foreign_metadata(session, read_json(sidecar.read_bytes(), sidecar), sidecar)
    inputs, outputs = tensor_names(metadata)

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([outputs], {inputs: as_input(images, metadata)})[0]

    return Loaded("onnxruntime", provider, metadata, run)


def onnx_metadata(properties: dict[str, str]) -> dict[str, Any]:
    """What export wrote; a foreign file's properties need not be JSON, and are left out."""
    metadata = {}
    for key, value in properties.items():
        with contextlib.suppress(ValueError, RecursionError):
            metadata[key] = json.loads(value)
    return metadata


def foreign_metadata(session: Any, said: dict[str, Any], sidecar: Path) -> dict[str, Any]:
    """Of an ONNX file that another exporter made: what the file beside it says, which must fit the graph."""
    metadata = {"precision": "foreign", "source": {}} | said
    check_fields(metadata, PREPROCESSING | ARTEFACT, str(sidecar))
    images, logits = session.get_inputs(), session.get_outputs()[0]
    (channels, height, width), uint8 = metadata["input_size"], metadata["input"] == UINT8
    shape = [height, width, channels] if uint8 else [channels, height, width]
    wanted = f"tensor({'uint8' if uint8 else 'float'})"
    has = [(one.type, list(one.shape)) for one in images]
    fits = len(images) == 1 and images[0].type == wanted and len(images[0].shape) == 4
    if not fits or any(isinstance(side, int) and side != s for side, s in zip(images[0].shape[1:], shape)):
        raise UserError(f"{sidecar} says one input, {wanted} of [N, {', '.join(map(str, shape))}]; the graph has {has}")
    classes = len(metadata["label_names"])
    if len(logits.shape) != 2 or (isinstance(logits.shape[1], int) and logits.shape[1] != classes):
        raise UserError(f"{sidecar} has {classes} label_names; the graph answers {list(logits.shape)}")
    return metadata | {"tensors": [images[0].name, logits.name]}


def tensor_names(metadata: dict[str, Any]) -> tuple[str, str]:
    """What an ONNX file's input and output are called: ours, but for a file from elsewhere."""
    inputs, outputs = metadata.get("tensors", (INPUT_NAME, OUTPUT_NAME))
    return inputs, outputs


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def source_of(student: Path) -> dict[str, str]:
    """Which weights an artefact was made from."""
    folder = student / "student" if (student / "student").is_dir() else student
    return {"weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}


@functools.cache
def cuda_device_count() -> int:
    """How many CUDA devices the driver has; 0 without a driver. Asks nothing of torch or TensorRT."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_device_name() -> str | None:
    """The name of the first CUDA device, as the driver says it."""
    if not cuda_device_count():
        return None
    cuda, device, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0 or cuda.cuDeviceGetName(name, len(name), device) != 0:
        return None
    return name.value.decode(errors="replace")


def products_saturate() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which overflow: x86 without VNNI."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return False
    return flags is not None and "vnni" not in flags[1]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last dimension, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def top_labels(logits: np.ndarray, labels: list[str], count: int = 5) -> list[tuple[str, float, int]]:
    """(label, probability, class index) of the most probable classes of one image, the best first; logits: (C,)."""
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [(labels[i], float(probabilities[i]), int(i)) for i in best]

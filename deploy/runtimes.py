"""One small interface to whatever runs a student: torch, TorchScript, torch.export, ONNX Runtime, TensorRT.

    runtime = load(Path("runs/001-mobilenet_v2-uskd/student/student.onnx"))
    runtime.provider                # what really runs it, such as CPUExecutionProvider
    logits = runtime.run(images)    # uint8 (N, H, W, 3) -> float32 (N, C)

Images are what train.py's eval_transform makes of a photograph, as uint8 (N, H, W, 3): each runtime does the
normalisation, in its graph where the artefact has it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train import UserError, load_student

# What every artefact says of itself, beside the metrics and the architecture of config.json.
METADATA = (
    "label_names", "mean", "std", "input_size", "interpolation", "crop",  # of config.json
    "precision",  # fp32, fp16, int8-cpu, int8-tensorrt
    "input",  # uint8 NHWC or float32 NCHW
    "source",  # sha256 of the weights it was made from
)  # fmt: skip
UINT8, FLOAT = "uint8 NHWC", "float32 NCHW"
INPUT_NAME, OUTPUT_NAME = "images", "logits"
EPS = 1e-5  # of the batch norm that normalises; ONNX and cuDNN want one
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


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


class ImageClassifier(nn.Module):
    """A student with its normalisation in front: images -> float32 logits, whatever precision lies between."""

    def __init__(
        self,
        model: nn.Module,
        mean: Any,
        std: Any,
        layout: str = UINT8,
        half: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = (model.half() if half else model.float()).eval().requires_grad_(False)
        self.model.to(memory_format=self.memory_format)
        self.layout = layout
        self.dtype = torch.float16 if half else torch.float32
        self.register_buffer("mean", 255 * torch.tensor(mean))
        self.register_buffer("variance", (255 * torch.tensor(std)) ** 2 - EPS)

    def forward(self, images: Tensor) -> Tensor:
        if self.layout == UINT8:
            # The cast comes first: TensorRT's parser refuses to permute uint8. And a batch norm, not a product and a
            # sum: those ONNX Runtime moves in front of the permute, where they cost a quarter of an INT8 MobileNetV2.
            images = images.float().permute(0, 3, 1, 2)
            # In contiguous format: pooling exports an as_strided, in ONNX a Gather, for a permuted tensor.
            images = images.contiguous(memory_format=self.memory_format)
            images = F.batch_norm(images, self.mean, self.variance, eps=EPS)
        return self.model(images.to(self.dtype)).float()


def as_input(images: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """uint8 (N, H, W, 3) -> what the artefact takes: the same, or normalised float32 (N, 3, H, W)."""
    if metadata["input"] == UINT8:
        return images
    mean, std = (np.array(metadata[name], dtype=np.float32) for name in ("mean", "std"))
    normalised = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def load(
    path: Path, device: str = "auto", threads: int = 0, allow_fallback: bool = False, compile: bool = False
) -> Runtime:
    """Load a student/ folder or one of its artefacts.

    Args:
        path: a student/ folder, or a .ts, .pt2, .onnx or .engine file
        device: "auto" (a CUDA device where the runtime has one), "cpu", "cuda" or, for .onnx, "tensorrt"
        threads: CPU threads; 0 leaves it to the runtime
        allow_fallback: run on the CPU where the device asked for is not to be had
        compile: a student/ folder through torch.compile

    Raises:
        UserError: no such device, or a file that is missing, damaged, foreign or for another machine
    """
    loaders = {
        "": load_torch,
        ".ts": load_torchscript,
        ".pt2": load_exported,
        ".onnx": load_onnx,
        ".engine": load_engine,
    }
    kind = "" if path.is_dir() else path.suffix
    if kind not in loaders or not path.exists():
        what = "unknown kind of artefact" if path.exists() else "no such file or folder"
        raise UserError(f"{path}: {what}; expected a student/ folder, or a .ts, .pt2, .onnx or .engine file")
    if device == "tensorrt" and kind != ".onnx":
        raise UserError(f"--device tensorrt is ONNX Runtime's TensorRT provider, for .onnx; {path.name} is none")
    has_cuda = torch.cuda.is_available() if kind in ("", ".ts", ".pt2") else cuda_device_count() > 0
    allow_fallback |= device == "auto"  # an onnxruntime without CUDA on a machine with it
    device = pick_device(device, has_cuda, allow_fallback)
    if threads:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    options: dict[str, Any] = {"compile": compile} if kind == "" else {}
    if kind == ".onnx":
        options = {"threads": threads, "allow_fallback": allow_fallback}
    name, provider, metadata, run, max_batch = loaders[kind](path, device, **options)
    missing = [key for key in METADATA if key not in metadata]
    if missing:
        raise UserError(f"{path} was not made by deploy/: its metadata has no {', '.join(missing)}")
    return Runtime(name, provider, metadata, run, time.perf_counter() - started, max_batch)


def pick_device(device: str, has_cuda: bool, allow_fallback: bool) -> str:
    """ "cpu", "cuda" or "tensorrt": never another than was asked for, unless that is allowed."""
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    if device == "cpu" or has_cuda:
        return device
    if not allow_fallback:
        raise UserError(f"--device {device}, but there is no CUDA device here; --allow-fallback runs on the CPU")
    return "cpu"


def load_torch(path: Path, device: str, compile: bool) -> tuple[Any, ...]:
    model, config = load_student(path)
    metadata = config | {"precision": "fp32", "input": UINT8, "source": source_of(path)}
    classifier: Any = ImageClassifier(model, config["mean"], config["std"], channels_last=True).to(device)
    if compile:
        classifier = torch.compile(classifier)
    return "torch.compile" if compile else "torch", f"torch {device}", metadata, torch_run(classifier, device), None


def load_torchscript(path: Path, device: str) -> tuple[Any, ...]:
    extra = {"metadata.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, and works
            classifier = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    except Exception as error:  # a dozen kinds
        raise UserError(f"{path} cannot be read as TorchScript: {first_line(error)}") from error
    metadata = read_json(extra["metadata.json"], path)
    return "torchscript", f"torch {device}", metadata, torch_run(classifier, device, metadata), None


def load_exported(path: Path, device: str) -> tuple[Any, ...]:
    extra = {"metadata.json": ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        classifier = program.module()
    except Exception as error:  # a dozen kinds
        raise UserError(f"{path} cannot be read as a torch.export program: {first_line(error)}") from error
    metadata = read_json(extra["metadata.json"], path)
    return "torch.export", f"torch {device}", metadata, torch_run(classifier, device, metadata), None


def torch_run(classifier: Any, device: str, metadata: dict[str, Any] | None = None) -> Callable[..., np.ndarray]:
    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        batch = np.require(
            as_input(images, metadata) if metadata else images, requirements="W"
        )  # torch wants to own it
        return classifier(torch.from_numpy(batch).to(device)).cpu().numpy()

    return run


def load_onnx(path: Path, device: str, threads: int, allow_fallback: bool) -> tuple[Any, ...]:
    ort = need("onnxruntime", "pip install '.[deploy]'")
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

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([OUTPUT_NAME], {INPUT_NAME: as_input(images, metadata)})[0]

    return "onnxruntime", provider, metadata, run, None


def load_engine(path: Path, device: str) -> tuple[Any, ...]:
    """An engine of deploy.build. Not run yet: it needs a GPU."""
    metadata = read_engine_metadata(path)
    library, version, gpu, max_batch = (metadata["built"][key] for key in ("library", "version", "gpu", "max_batch"))
    trt = import_tensorrt(library)
    again = f"build it here: python -m deploy.build {path.parent / metadata['onnx']}"
    if trt.__version__ != version:
        raise UserError(f"{path} was built by {library} {version}, here is {trt.__version__}: {again}")
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(f"{path}: a TensorRT engine needs a CUDA device (one that torch sees), which is not here")
    here = torch.cuda.get_device_name()
    if gpu and gpu != here:
        raise UserError(f"{path} was built for {gpu}, here is {here}: {again}")
    logger = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise UserError(f"{path} cannot be read by {library} {version} on {here}: {again}")
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()

    def run(images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(as_input(images, metadata)).cuda()
        logits = torch.empty(len(batch), len(metadata["label_names"]), device="cuda")
        stream.wait_stream(torch.cuda.current_stream())
        context.set_input_shape(INPUT_NAME, tuple(batch.shape))
        context.set_tensor_address(INPUT_NAME, batch.data_ptr())
        context.set_tensor_address(OUTPUT_NAME, logits.data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"{library} did not run a batch of {len(batch)}")
        stream.synchronize()
        return logits.cpu().numpy()

    return "tensorrt", f"{library} {version}", metadata, run, max_batch


def read_engine_metadata(path: Path) -> dict[str, Any]:
    """What the .json beside an engine says."""
    sidecar = path.with_name(path.name + ".json")
    if not sidecar.is_file():
        raise UserError(f"{path} has no {sidecar.name} beside it: copy both, or build it again with deploy.build")
    metadata = read_json(sidecar.read_bytes(), path)
    missing = [key for key in (*METADATA, "onnx", "built") if key not in metadata]
    built = metadata.get("built")
    missing += [key for key in ("library", "version", "gpu", "max_batch") if key not in (built or {})]
    if missing:
        raise UserError(f"{sidecar} was not made by deploy.build: it has no {', '.join(missing)}")
    return metadata


def import_tensorrt(library: str | None = None) -> ModuleType:
    """tensorrt, else TensorRT-RTX, whose libraries come with its ONNX Runtime provider; or the one that is named."""
    names = [library] if library else ["tensorrt", "tensorrt_rtx"]
    for name in names:
        try:
            if name == "tensorrt":
                return importlib.import_module(name)
            importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")  # loads libtensorrt_rtx.so
            return importlib.import_module("tensorrt_rtx_bindings")
        except ImportError:
            continue
    raise UserError(
        f"{' and '.join(names)}: not installed. On a Jetson, JetPack has tensorrt: make the environment with "
        "--system-site-packages. Elsewhere: pip install tensorrt, or pip install '.[rtx]' for TensorRT-RTX"
    )


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


def need(module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: {install} ({error})") from error


def source_of(student: Path) -> dict[str, str]:
    """Which weights an artefact was made from."""
    folder = student / "student" if (student / "student").is_dir() else student
    return {"weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}


def onnx_metadata(properties: dict[str, str]) -> dict[str, Any]:
    """What export wrote; a foreign file's properties need not be JSON, and are left out."""
    metadata = {}
    for key, value in properties.items():
        with contextlib.suppress(ValueError):
            metadata[key] = json.loads(value)
    return metadata


def read_json(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} was not made by deploy/: it has no metadata that can be read")
    return metadata


def first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]

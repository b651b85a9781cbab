"""Run a student through one interface, with ONNX Runtime, TensorRT, OpenVINO, ncnn, torch, TorchScript, torch.export.

    runtime = load(Path("runs/001-mobilenet_v2-uskd/student/student.onnx"))
    runtime.provider                # the backend that runs it, such as CPUExecutionProvider
    logits = runtime.run(images)    # uint8 (N, H, W, 3) -> float32 (N, C)

The images come from deploy.preprocess.prepare. The graph of an artefact normalises them if its input is uint8; for a
float32 input, the runtime does. A runtime's library is imported when a file needs it: an .onnx file needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import MAX_JSON, UserError, explain, first_line, need, read_file, student_folder
from deploy.config import ARTEFACT, FLOAT, UINT8, Metadata, read_json
from deploy.onnx_tools import read_properties, refuse_external_data

INPUT_NAME, OUTPUT_NAME = "images", "logits"
FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")  # types of logits that ONNX Runtime may return
SIDECAR = (
    "an ONNX file from elsewhere needs a {}.json next to it; its fields are mean, std, label_names, "
    f'input_size [3, height, width], interpolation, crop and input. The value of input is "{UINT8}", or "{FLOAT}" if '
    "the images are normalised by mean and std of pixels from 0 to 1. The output must be logits, without a softmax"
)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
TORCH_KINDS = ("", ".ts", ".pt2")  # "": a student/ folder
LOADERS = {".onnx": "deploy.runtimes:load_onnx", ".engine": "deploy.tensorrt:load_engine"}
LOADERS |= dict.fromkeys(TORCH_KINDS, "deploy.torch_runtimes:load")
LOADERS |= {".param": "deploy.other_runtimes:load_ncnn"}
OPENVINO = "openvino"  # the device of RunOn that runs an .onnx file in OpenVINO instead of ONNX Runtime


@dataclass(frozen=True)
class RunOn:
    """Set where and how a student runs."""

    # "cpu" or "cuda"; for an .onnx file also "tensorrt" or OPENVINO; "auto": a CUDA device if the runtime has one
    device: str = "auto"
    threads: int = 0  # CPU threads; 0: one for each CPU that this process may use
    allow_fallback: bool = False  # run on the CPU if the device is unavailable
    model_files: tuple[str, ...] = ()  # path/to/file.py:function of the user's own models
    compile: bool = False  # run a student/ folder through torch.compile

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> RunOn:
        """Return the RunOn of the flags that deploy.cli.add_device adds."""
        files = (args.model_file,) if args.model_file else ()
        return cls(args.device, args.threads, args.allow_fallback, files)


@dataclass(frozen=True)
class Runtime:
    """Hold a student that is loaded and ready to run."""

    name: str  # torch, torch.compile, torchscript, torch.export, onnxruntime, tensorrt, openvino, ncnn
    provider: str  # the backend that runs it
    metadata: Metadata
    call: Callable[[np.ndarray], np.ndarray]  # see run()
    max_batch: int | None = None  # the largest batch of an engine's profile; None: no limit
    file: str = ""
    load_s: float = 0.0

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the logits, float32 (N, C), of images, uint8 (N, H, W, 3).

        Raise UserError if the runtime fails, or unless there is one logit for each label.
        """
        try:
            logits = np.asarray(self.call(images), np.float32)
        except Exception as error:  # each runtime has exceptions of its own
            if explain(error):
                raise
            raise UserError(f"{self.file} fails on a batch of {len(images)}: {first_line(error)}") from error
        labels = len(self.metadata.label_names)
        if logits.shape != (len(images), labels):
            found = f"logits of shape {list(logits.shape)} for {len(images)} images"
            expected = f"expected [{len(images)}, {labels}]: fix label_names"
            raise UserError(f"{self.file} has {labels} label_names and returns {found}; {expected}")
        return logits

    def run_in_parts(self, images: np.ndarray, size: int) -> np.ndarray:
        """Run all images in batches of at most `size` images, and of at most max_batch images."""
        size = min(size, self.max_batch or size)
        return np.concatenate([self.run(images[i : i + size]) for i in range(0, len(images), size)])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape of an image, (H, W, channels)."""
        return self.metadata.image_shape


def load(path: Path, on: RunOn = RunOn()) -> Runtime:
    """Load a student/ folder, or a .ts, .pt2, .onnx, .engine or .ncnn.param file made from it.

    Raise UserError if the device is missing, if the runtime is not installed, or if the file is damaged, has no
    metadata, or was made for another machine.
    """
    kind = "" if path.is_dir() else path.suffix or "without a suffix"
    exists = path.is_dir() or path.is_file()
    if kind not in LOADERS or not exists:
        fault = "unknown kind of artefact" if exists else "no such file or folder"
        kinds = "a run directory, its student/ folder, or a .ts, .pt2, .onnx, .engine or .param file"
        advice = " (python -m deploy.export writes it)" if path.name == "student.onnx" and not exists else ""
        raise UserError(f"{path}: {fault}{advice}; expected {kinds}")
    if on.device == "tensorrt" and kind != ".onnx":
        fault = f"is ONNX Runtime's TensorRT provider and needs an .onnx file, but {path.name} is not one"
        raise UserError(f"--device tensorrt {fault}: use --device cuda")
    if kind in TORCH_KINDS:
        needs = "an .onnx or .engine file runs without them" if kind else "here give its .onnx or .engine file"
        need("torch", f"{path.name or path} needs torch, torchvision and timm; {needs}")
    started = time.perf_counter()
    named = "deploy.other_runtimes:load_openvino" if on.device == OPENVINO else LOADERS[kind]
    module, _, loader = named.partition(":")
    try:
        load_kind = getattr(importlib.import_module(module), loader)
    except ImportError as error:  # torchvision or timm is missing, or the .pyz of deploy.pack has no such module
        raise UserError(f"{path} cannot be loaded here: {first_line(error)}") from error
    # auto falls back to the CPU if the machine has CUDA but its onnxruntime lacks it
    on = dataclasses.replace(on, allow_fallback=on.allow_fallback or on.device == "auto")
    return dataclasses.replace(load_kind(path, on), file=path.name, load_s=time.perf_counter() - started)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use: its affinity, and the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, cgroup_quota())))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPU quota of the container's cgroup as a number of CPUs, or infinity without a quota."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return math.inf
    quota = math.inf
    for _, controllers, group in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for folder in (root / group.lstrip("/"), root / "cpu" / group.lstrip("/"), root, root / "cpu"):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if (folder / "cpu.max").is_file():  # cgroup v2: "150000 100000", or "max 100000"
                    limit, period = (folder / "cpu.max").read_text().split()
                else:
                    limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                if limit != "max" and int(limit) > 0:
                    quota = min(quota, int(limit) / int(period))
    return quota


def pick_device(device: str, has_cuda: bool, allow_fallback: bool) -> str:
    """Return "cpu", "cuda" or "tensorrt": the device, or the CPU if the device is missing and fallback is allowed."""
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    if device == "cpu" or has_cuda:
        return device
    if not allow_fallback:
        raise UserError(f"--device {device}, but there is no CUDA device here; --allow-fallback runs on the CPU")
    return "cpu"


def as_input(images: np.ndarray, metadata: Metadata) -> np.ndarray:
    """Return the artefact's input for images, uint8 (N, H, W, 3): the array, or normalised float32 (N, 3, H, W)."""
    if metadata.input == UINT8:
        return images
    mean, std = np.array(metadata.mean, np.float32), np.array(metadata.std, np.float32)
    normalised = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def run_onnx(session: Any, metadata: Metadata, images: np.ndarray) -> np.ndarray:
    inputs, outputs = tensor_names(metadata)
    logits: np.ndarray = session.run([outputs], {inputs: as_input(images, metadata)})[0]
    return logits


def load_onnx(path: Path, on: RunOn) -> Runtime:
    """Load an exported ONNX file, or one from elsewhere with a .json next to it."""
    ort = need("onnxruntime", "pip install onnxruntime, or onnxruntime-gpu where there is a CUDA device")
    device = pick_device(on.device, cuda_device_name() is not None, on.allow_fallback)
    wanted = PROVIDERS[device]
    if device != "cpu" and wanted not in ort.get_available_providers():
        if not on.allow_fallback:
            has = f"has no {wanted} (it has {', '.join(ort.get_available_providers())})"
            raise UserError(f"--device {device}, but this onnxruntime {has}; --allow-fallback runs on the CPU")
        wanted = PROVIDERS["cpu"]
    if device != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN in torch's wheels
    options = ort.SessionOptions()
    options.intra_op_num_threads = on.threads or usable_cpus()
    # By default idle threads spin, and take CPU time from other programs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # log nothing: onnxruntime raises its errors, or get_providers() shows them
    content = read_file(path)
    refuse_external_data(content, path)
    try:
        fallback = int(on.allow_fallback and device != "cpu")  # onnxruntime's fallback prints messages
        session = ort.InferenceSession(content, options, providers=[wanted], enable_fallback=fallback)
    except Exception as error:  # onnxruntime has about a dozen exception classes of its own
        raise UserError(f"{path} cannot be loaded by ONNX Runtime: {first_line(error)}") from error
    provider = session.get_providers()[0]
    if provider != wanted and not on.allow_fallback:
        why = f"could not start {wanted} and fell back to {provider} (CUDA, cuDNN or TensorRT of another version?)"
        raise UserError(f"--device {device}: ONNX Runtime {why}; --allow-fallback accepts that")
    try:
        metadata = onnx_metadata(session, path)
    except UnicodeError as error:
        raise UserError(f"{path} has a text that is not UTF-8: {error}") from error
    call, batch = functools.partial(run_onnx, session, metadata), session.get_inputs()[0].shape[0]
    if isinstance(batch, int) and batch != 1:
        raise UserError(f"{path} takes only batches of {batch} images: export it with a dynamic batch")
    if metadata.tensors:
        refuse_probabilities(call(np.zeros((1, *metadata.image_shape), np.uint8)), path)
    return Runtime("onnxruntime", provider, metadata, call, 1 if batch == 1 else None)


def onnx_metadata(session: Any, path: Path) -> Metadata:
    """Return the metadata in an ONNX file, or in the .json next to a file from elsewhere, after check_graph."""
    values = read_properties(session.get_modelmeta().custom_metadata_map)
    where, sidecar = f"the metadata of {path}", path.with_name(path.name + ".json")
    if "mean" not in values and sidecar.is_file():
        where = str(sidecar)
        values = {"precision": "foreign", "source": {}} | read_json(read_file(sidecar, MAX_JSON), sidecar)
        if "tensors" not in values:
            values["tensors"] = pick_tensors(session, values.get("label_names"), sidecar)
    elif "mean" not in values:
        raise UserError(f"{path} was not made by deploy/: it has no metadata; {SIDECAR.format(path.name)}")
    metadata = Metadata.from_json(values, where, ARTEFACT)
    check_graph(session, metadata, where)
    return metadata


def pick_tensors(session: Any, label_names: Any, sidecar: Path) -> list[str]:
    """Return the names of the first input and of the only output that may hold logits, for a file from elsewhere."""
    images, outputs = session.get_inputs(), session.get_outputs()
    classes = len(label_names) if isinstance(label_names, list) else 0
    rows = [one for one in outputs if one.type in FLOATS and len(one.shape) == 2]
    fit = [one.name for one in rows if not isinstance(one.shape[1], int) or one.shape[1] == classes]
    if len(fit) > 1:
        choice = json.dumps([images[0].name, fit[0]])
        raise UserError(
            f'the outputs {" and ".join(fit)} may be the logits: choose one, as "tensors": {choice} in {sidecar}'
        )
    return [images[0].name, fit[0] if fit else outputs[0].name]


def check_graph(session: Any, metadata: Metadata, where: str) -> None:
    """Raise UserError unless the graph's input and output fit the metadata."""
    images, logits = session.get_inputs(), session.get_outputs()
    shape, (inputs, outputs) = metadata.tensor_shape, tensor_names(metadata)
    wanted = f"tensor({'uint8' if metadata.input == UINT8 else 'float'})"
    fits = len(images) == 1 and (images[0].name, images[0].type, len(images[0].shape)) == (inputs, wanted, 4)
    if not fits or any(isinstance(side, int) and side != s for side, s in zip(images[0].shape[1:], shape)):
        has = [(one.name, one.type, list(one.shape)) for one in images]
        port = f"{inputs}: {wanted} of [N, {', '.join(map(str, shape))}]"
        raise UserError(f"{where} describes one input, {port}; the graph has {has}")
    classes = len(metadata.label_names)
    found = next((one for one in logits if one.name == outputs), None)
    sides = [] if found is None else list(found.shape)
    if len(sides) != 2 or (isinstance(sides[1], int) and sides[1] != classes):
        fault = "the graph has no such output" if found is None else f"its shape is {sides}"
        raise UserError(f"{where} has {classes} label_names; expected an output {outputs!r}, [N, {classes}]; {fault}")
    if found is not None and found.type not in FLOATS:
        raise UserError(f"{where}: the output {outputs!r} is a {found.type}; expected logits in tensor(float)")


def refuse_probabilities(row: np.ndarray, path: Path) -> None:
    """Raise UserError if the output for a black image is probabilities, because the softmax would be taken again."""
    if row.size > 1 and (row >= 0).all() and abs(float(row.sum()) - 1) < 1e-3:
        raise UserError(f"{path} returns probabilities, whose sum is 1; expected logits: remove its last Softmax")


def tensor_names(metadata: Metadata) -> tuple[str, str]:
    """Return the names of an ONNX file's input and output; a file from elsewhere has other names than ours."""
    inputs, outputs = metadata.tensors or (INPUT_NAME, OUTPUT_NAME)
    return inputs, outputs


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def source_of(student: Path) -> dict[str, str]:
    """Return the digest of the weights in a student/ folder, which every artefact carries."""
    weights = read_file(student_folder(student) / "model.safetensors")
    return {"weights_sha256": hashlib.sha256(weights).hexdigest()}


def refuse_stale(artefact: Path, metadata: Metadata) -> None:
    """Raise UserError if the weights next to an artefact were trained further after its export."""
    student = artefact.parent
    if not all((student / name).is_file() for name in ("config.json", "model.safetensors")):
        return
    if metadata.source and metadata.source.get("weights_sha256") != source_of(student)["weights_sha256"]:
        raise UserError(f"{artefact} was made from other weights than those in {student}: export it again")


@functools.cache
def cuda_device_name() -> str | None:
    """Return the driver's name of the first CUDA device, or None without a device; needs neither torch nor TensorRT."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode(errors="replace")


def products_saturate() -> bool:
    """Return True on x86 without VNNI, where the CPU adds pairs of 8-bit products in 16 bits and the sums saturate."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return False
    return flags is not None and "vnni" not in flags[1]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last dimension, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def probabilities(logits: np.ndarray, metadata: Metadata) -> np.ndarray:
    """Return probabilities over the last dimension, at the student's temperature."""
    return softmax(logits / (metadata.temperature or 1.0))


def is_answered(probability: Any, metadata: Metadata) -> Any:
    """Return whether the largest probability of an image reaches the threshold; if not, the answer is "none of these".

    probability: a number, or an array with one for each image
    """
    return probability >= (metadata.threshold or 0.0)  # False for a NaN


def top_labels(logits: np.ndarray, metadata: Metadata, count: int = 5) -> list[tuple[str, float, int]]:
    """Return (label, probability, class index) of one image's most probable classes, best first; logits: (C,)."""
    p = probabilities(logits, metadata)
    best = np.argsort(-p, kind="stable")[:count]
    return [(metadata.label_names[i], float(p[i]), int(i)) for i in best]

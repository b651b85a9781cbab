"""Build TensorRT engines from ONNX files and run them, without torch.

This module calls CUDA through ctypes (see Cuda and Engine), so that a Jetson needs only the packages of JetPack. It is
imported when a file or a command needs TensorRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import dataclasses
import gc
import hashlib
import importlib
import importlib.util
import json
import math
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from deploy.cli import MAX_JSON, UserError, first_line, make_folder, read_file, write_whole
from deploy.config import ARTEFACT, ENGINE, UINT8, Metadata, read_json
from deploy.runtimes import RunOn, Runtime, as_input, cuda_device_name, load, refuse_stale, tensor_names

# ---- CUDA ---------------------------------------------------------------------------------------------------------

_pointer, _int, _size, _flags = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint
# Types of the arguments of libcudart's functions. Without them ctypes would cut each pointer to 32 bits.
SIGNATURES: dict[str, list[Any]] = {
    "cudaDeviceGetAttribute": [ctypes.POINTER(_int), _int, _int],
    "cudaMalloc": [ctypes.POINTER(_pointer), _size],
    "cudaFree": [_pointer],
    "cudaHostAlloc": [ctypes.POINTER(_pointer), _size, _flags],
    "cudaHostGetDevicePointer": [ctypes.POINTER(_pointer), _pointer, _flags],
    "cudaFreeHost": [_pointer],
    "cudaStreamCreate": [ctypes.POINTER(_pointer)],
    "cudaStreamSynchronize": [_pointer],
    "cudaStreamDestroy": [_pointer],
    "cudaMemcpyAsync": [_pointer, _pointer, _size, _int, _pointer],
}
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost
PINNED, MAPPED = 0, 2  # cudaHostAllocDefault, cudaHostAllocMapped
INTEGRATED, CAN_MAP = 18, 19  # cudaDevAttrIntegrated, cudaDevAttrCanMapHostMemory


class Cuda:
    """Call the functions of CUDA's runtime library that an engine needs; raise RuntimeError if a call fails."""

    def __init__(self, library: Any) -> None:
        self.library = library
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [_int], ctypes.c_char_p
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _int

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            reason = self.library.cudaGetErrorString(code).decode(errors="replace")
            raise RuntimeError(f"{name}: {reason} (CUDA error {code})")

    def new(self, name: str, *arguments: Any) -> int:
        """Call a function that returns a pointer through its first argument, and return the pointer."""
        pointer = _pointer()
        self.call(name, ctypes.byref(pointer), *arguments)
        return pointer.value or 0

    def attribute(self, number: int) -> int:
        value = _int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value


def load_cuda() -> Cuda:
    """Load the libcudart of the system (on a Jetson, of JetPack) or, if it is missing, that of NVIDIA's wheels."""
    names = [ctypes.util.find_library("cudart"), *(f"libcudart.so{end}" for end in ("", ".13", ".12", ".11.0"))]
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("nvidia")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            names += sorted(map(str, Path(folder).glob("*/lib/libcudart.so.*")), reverse=True)
    for name in filter(None, names):
        with contextlib.suppress(OSError, AttributeError):
            return Cuda(ctypes.CDLL(name))
    install = "on a Jetson apt-get install cuda-cudart-12-6 (the number of its CUDA), elsewhere pip install"
    raise UserError(f"CUDA's runtime library libcudart.so is not found: {install} nvidia-cuda-runtime")


class Buffer:
    """Hold the memory of one tensor: an array on the host and a pointer on the device.

    The buffer has pinned host memory and a block of device memory. A GPU that shares the host's memory uses one mapped
    block instead, without copies.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: Any, release: contextlib.ExitStack) -> None:
        self.cuda, self.mapped = cuda, bool(cuda.attribute(INTEGRATED) and cuda.attribute(CAN_MAP))
        count = math.prod(shape) * np.dtype(dtype).itemsize
        address = cuda.new("cudaHostAlloc", count, MAPPED if self.mapped else PINNED)
        release.callback(cuda.call, "cudaFreeHost", address)
        self.array = np.frombuffer((ctypes.c_ubyte * count).from_address(address), dtype).reshape(shape)
        if self.mapped:
            self.device = cuda.new("cudaHostGetDevicePointer", address, 0)
        else:
            self.device = cuda.new("cudaMalloc", count)
            release.callback(cuda.call, "cudaFree", self.device)

    def copy(self, direction: int, rows: int, stream: int) -> None:
        """Queue a copy of the first rows between host and device."""
        if self.mapped:
            return
        host = self.array.ctypes.data
        target, source = (self.device, host) if direction == TO_DEVICE else (host, self.device)
        self.cuda.call("cudaMemcpyAsync", target, source, self.array[:rows].nbytes, direction, stream)


class Engine:
    """Run a deserialised engine, with its context, stream and buffers; close() frees them in the reverse order."""

    def __init__(self, engine: Any, cuda: Cuda, metadata: Metadata, max_batch: int, runtime: Any = None) -> None:
        self.owners = runtime, engine  # TensorRT requires that both outlive the context
        self.metadata, self.max_batch, self.cuda = metadata, max_batch, cuda
        with contextlib.ExitStack() as taken:  # frees everything if a later step fails
            self.context = engine.create_execution_context()
            if self.context is None:
                raise RuntimeError("TensorRT cannot make an execution context; perhaps GPU memory is short")
            self.stream = cuda.new("cudaStreamCreate")
            taken.callback(cuda.call, "cudaStreamDestroy", self.stream)
            dtype = np.uint8 if metadata.input == UINT8 else np.float32
            self.images = Buffer(cuda, (max_batch, *metadata.tensor_shape), dtype, taken)
            self.logits = Buffer(cuda, (max_batch, len(metadata.label_names)), np.float32, taken)
            taken.callback(cuda.call, "cudaStreamSynchronize", self.stream)  # runs first, because it is pushed last
            self.input_name, output_name = tensor_names(metadata)
            self.context.set_tensor_address(self.input_name, self.images.device)
            self.context.set_tensor_address(output_name, self.logits.device)
            self.close = weakref.finalize(self, taken.pop_all().close)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the logits, float32 (N, C), of images, uint8 (N, H, W, 3) with N at most max_batch."""
        count = len(images)
        if not self.close.alive:
            raise RuntimeError("the engine is closed")
        if not 1 <= count <= self.max_batch:
            raise ValueError(f"a batch of {count}, but the engine takes 1 to {self.max_batch} images")
        self.images.array[:count] = as_input(images, self.metadata)
        if not self.context.set_input_shape(self.input_name, (count, *self.images.array.shape[1:])):
            raise RuntimeError(f"the engine does not take a batch of {count}")
        self.images.copy(TO_DEVICE, count, self.stream)
        if not self.context.execute_async_v3(self.stream):
            raise RuntimeError(f"TensorRT did not run a batch of {count}")
        self.logits.copy(TO_HOST, count, self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)
        return self.logits.array[:count].copy()


# ---- engines ------------------------------------------------------------------------------------------------------


def load_engine(path: Path, on: RunOn) -> Runtime:
    """Load an engine of deploy.build. This code has not run on a GPU yet; the tests run it with a fake libcudart."""
    metadata = read_engine_metadata(path)
    library, version, gpu, max_batch = (metadata.built[key] for key in ("library", "version", "gpu", "max_batch"))
    trt = import_tensorrt(library)
    again = f"build it again here, from {metadata.onnx}, with the command build"
    if trt.__version__ != version:
        raise UserError(f"{path} was built by {library} {version}, but this machine has {trt.__version__}: {again}")
    here = cuda_device_name()
    if on.device == "cpu" or here is None:
        raise UserError(f"{path}: a TensorRT engine needs a CUDA device; this machine has none")
    if gpu and gpu != here:
        raise UserError(f"{path} was built for {gpu}, but this machine has {here}: {again}")
    cuda = load_cuda()
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    content = read_file(path)
    if metadata.built.get("sha256") not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(f"{path} and {path.name}.json are from two builds: copy both files, or {again}")
    deserialised = runtime.deserialize_cuda_engine(content)
    if deserialised is None:
        raise UserError(f"{path} cannot be read by {library} {version} on {here}: {again}")
    try:
        engine = Engine(deserialised, cuda, metadata, max_batch, runtime)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be loaded: {first_line(error)}; build it with a smaller --max-batch") from error
    return Runtime("tensorrt", f"{library} {version}", metadata, engine.run, max_batch)


def read_engine_metadata(path: Path) -> Metadata:
    """Return the metadata in the .json next to an engine."""
    sidecar = path.with_name(path.name + ".json")
    if not sidecar.is_file():
        raise UserError(f"{path} has no {sidecar.name} next to it: copy both, or build it again with deploy.build")
    return Metadata.from_json(read_json(read_file(sidecar, MAX_JSON), sidecar), str(sidecar), ARTEFACT | ENGINE)


RTX = "install TensorRT-RTX, which builds without a GPU: pip install '.[rtx]'"


def import_tensorrt(library: str | None = None) -> ModuleType:
    """Import the named library; without a name, import tensorrt or, if it is missing, TensorRT-RTX."""
    names, reasons = [library] if library else ["tensorrt", "tensorrt_rtx"], []
    for name in names:
        try:
            if name == "tensorrt":
                return importlib.import_module(name)
            importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")  # loads libtensorrt_rtx.so
            return importlib.import_module("tensorrt_rtx_bindings")
        except ImportError as error:
            reasons.append(first_line(error))
    jetson = "On a Jetson, JetPack has tensorrt: make the environment with --system-site-packages"
    missing = f"{' and '.join(names)}: not installed, or not for this Python ({'; '.join(reasons)})"
    raise UserError(f"{missing}. {jetson}. Elsewhere: pip install tensorrt, or {RTX}")


def build_engine(
    onnx_file: Path,
    batches: tuple[int, int, int] = (1, 8, 64),
    workspace_mib: int = 1024,
    library: str | None = None,
    output: Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Build an engine from an ONNX file of deploy.export or deploy.quantize; return its path and the field `built`.

    batches: smallest, usual and largest batch of the profile; workspace_mib: largest scratch memory of a layer
    library: "tensorrt" or "tensorrt_rtx"; default: the first that is installed
    output: folder of the engine; default: the ONNX file's own
    """
    metadata, output = read_onnx(onnx_file, batches[2]), output or onnx_file.parent
    refuse_stale(onnx_file, metadata)
    make_folder(output)
    with parse_onnx(onnx_file, library) as network:
        if not network.parsed:
            first, *others = network.unsupported()
            more = f" (and {len(others)} more: --report)" if others else ""
            raise UserError(f"{network} cannot parse {onnx_file.name}: {first}{more}")
        started = time.perf_counter()
        engine = network.build(metadata, batches, workspace_mib)
        built = {"library": network.library, "version": network.trt.__version__, "gpu": cuda_device_name()}
    built |= dict(zip(("min_batch", "opt_batch", "max_batch"), batches))
    built["build_s"] = round(time.perf_counter() - started, 2)
    built["sha256"] = hashlib.sha256(engine).hexdigest()
    file = output / onnx_file.with_suffix(".engine").name
    described = dataclasses.replace(metadata, onnx=onnx_file.name, built=built)
    write_whole(file, engine)
    write_whole(file.with_name(file.name + ".json"), json.dumps(described.to_json(), indent=2) + "\n")
    return file, built


def read_onnx(onnx_file: Path, max_batch: int = 1) -> Metadata:
    """Return the metadata of an ONNX file; raise UserError for a file for CPUs, or one that takes smaller batches."""
    runtime = load(onnx_file, RunOn("cpu"))
    metadata = runtime.metadata
    if max_batch > (runtime.max_batch or max_batch):
        raise UserError(f"{onnx_file} takes batches of {runtime.max_batch} image: give --max-batch {runtime.max_batch}")
    if metadata.precision == "int8-cpu":
        raise UserError(
            f"{onnx_file} was quantised for CPUs: python -m deploy.quantize --target tensorrt makes another"
        )
    return metadata


class Network:
    """Hold an ONNX file as a strongly typed network, parsed by TensorRT."""

    def __init__(self, trt: ModuleType, onnx_file: Path) -> None:
        self.trt, self.onnx_file = trt, onnx_file
        self.library = "tensorrt" if trt.__name__ == "tensorrt" else "tensorrt_rtx"
        if self.library == "tensorrt" and cuda_device_name() is None:
            device = "run this on the device that will run the engine"
            raise UserError(f"tensorrt parses and builds only on a machine with a CUDA device: {device}, or {RTX}")
        self.errors: list[str] = []
        self.log = make_log(trt, self.errors)
        self.builder = trt.Builder(self.log)
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.definition = self.builder.create_network(0 if flags is None else 1 << int(flags))
        self.parser = trt.OnnxParser(self.definition, self.log)
        self.parsed = self.parser.parse(read_file(onnx_file))

    def __str__(self) -> str:
        return f"{self.library} {self.trt.__version__}"

    def unsupported(self) -> list[str]:
        """Return a line for each node that cannot be parsed, with the library's reason."""
        errors = [self.parser.get_error(i) for i in range(self.parser.num_errors)]
        lines = [f"{e.node_operator()} {e.node_name()}: {' '.join(e.desc().splitlines()[:2])}" for e in errors]
        return lines or [self.reason()]

    def reason(self) -> str:
        return first_line(Exception(self.errors[0] if self.errors else "no reason given"))

    def build(self, metadata: Metadata, batches: tuple[int, int, int], workspace_mib: int) -> bytes:
        """Return the serialised engine."""
        if self.definition.num_outputs != 1:  # Engine gives an address only to the logits
            raise UserError(f"{self.onnx_file} has {self.definition.num_outputs} outputs: expected only the logits")
        if self.definition.get_output(0).dtype != self.trt.DataType.FLOAT:  # Logits.array is float32
            raise UserError(f"{self.onnx_file} returns other logits than float32: add a Cast to float at its end")
        input_name, image = tensor_names(metadata)[0], metadata.tensor_shape
        config = self.builder.create_builder_config()
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
        profile = self.builder.create_optimization_profile()
        profile.set_shape(input_name, *((size, *image) for size in batches))
        config.add_optimization_profile(profile)
        plan = self.builder.build_serialized_network(self.definition, config)
        if plan is None:
            raise UserError(f"{self} cannot build {self.onnx_file.name}: {self.reason()}")
        return bytes(plan)


@contextlib.contextmanager
def parse_onnx(onnx_file: Path, library: str | None) -> Iterator[Network]:
    """Parse an ONNX file; free the network at the end in the only order that does not crash."""
    network = Network(import_tensorrt(library), onnx_file)
    try:
        yield network
    finally:
        for name in ("parser", "definition", "builder"):
            delattr(network, name)
            gc.collect()


def make_log(trt: ModuleType, errors: list[str]) -> Any:
    """Return a TensorRT logger that appends to `errors`. Its class is made here, after the import of its base class."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)

    return Log()


def report(onnx_file: Path, library: str | None = None) -> tuple[str, bool]:
    """Return a report on a file, and whether the library supports the whole file."""
    metadata = read_onnx(onnx_file)
    with parse_onnx(onnx_file, library) as network:
        title = f"{network}: {onnx_file.name}, {metadata.precision}"
        if not network.parsed:
            return "\n  ".join([f"{title}\ncannot be parsed:", *network.unsupported()]), False
        count = network.definition.num_layers  # store no layer in a variable: it must not outlive the network
        kinds = Counter(str(network.definition.get_layer(i).type).rpartition(".")[2] for i in range(count))
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        return f"{title}\nparsed whole: {count} layers ({counts})", True

"""Build a TensorRT engine from an ONNX file of deploy.export or deploy.quantize, on the device that will run it.

    python -m deploy.build runs/001-mobilenet_v2-uskd/student/student-fp16.onnx --max-batch 16
    python -m deploy.build runs/001-mobilenet_v2-uskd/student/student-int8-tensorrt.onnx --report

Uses the installed tensorrt (10 or 11), else TensorRT-RTX, and says which. The network is strongly typed: the precision
is the file's own, so build fp16 from student-fp16.onnx and INT8 from student-int8-tensorrt.onnx. --report parses, says
which nodes the library does not support, and stops; with TensorRT-RTX both work on a machine without a GPU, where the
engine can be built and not run. The engine comes with a .json of labels, preprocessing, profile, version and GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from deploy.cli import command, make_parser
from deploy.export import make_folder
from deploy.runtimes import INPUT_NAME, cuda_device_count, first_line, import_tensorrt, load
from train import Parser, UserError, write_whole


def build_engine(
    onnx_file: Path,
    batches: tuple[int, int, int] = (1, 8, 64),
    workspace_mib: int = 1024,
    timing_cache: Path | None = None,
    library: str | None = None,
    output: Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Build an engine; returns its file and what its .json says of the build.

    Args:
        onnx_file: of deploy.export or deploy.quantize
        batches: smallest, usual and largest batch of the optimisation profile
        workspace_mib: most scratch memory a layer may take, in MiB
        timing_cache: kept here, so that the next build is faster; tensorrt only
        library: "tensorrt" or "tensorrt_rtx"; default: the first that is installed
        output: folder of the engine; default: the ONNX file's own

    Raises:
        UserError: no such library, no GPU where it needs one, or a file it cannot parse or build
    """
    metadata = read_onnx(onnx_file)
    trt = import_tensorrt(library)
    name = library_name(trt)
    network = Network(trt, onnx_file)
    try:
        network.refuse_unsupported()
        config = network.builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
        profile = network.builder.create_optimization_profile()
        image = tuple(network.definition.get_input(0).shape)[1:]
        profile.set_shape(INPUT_NAME, *((size, *image) for size in batches))
        config.add_optimization_profile(profile)
        cache = None
        if timing_cache and name == "tensorrt":
            cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        started = time.perf_counter()
        plan = network.builder.build_serialized_network(network.definition, config)
        if plan is None:
            raise UserError(f"{name} {trt.__version__} cannot build {onnx_file.name}: {network.log.text()}")
        built = {
            "library": name,
            "version": trt.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "min_batch": batches[0],
            "opt_batch": batches[1],
            "max_batch": batches[2],
            "build_s": round(time.perf_counter() - started, 2),
        }
        engine = bytes(plan)
        saved_cache = bytes(cache.serialize()) if cache else None
        del plan, cache, profile, config
    finally:
        network.close()

    output = output or onnx_file.parent
    make_folder(output)
    file = output / onnx_file.with_suffix(".engine").name
    write_whole(file, engine)
    write_whole(
        file.with_name(file.name + ".json"),
        json.dumps(metadata | {"onnx": onnx_file.name, "built": built}, indent=2) + "\n",
    )
    if timing_cache and saved_cache:
        write_whole(timing_cache, saved_cache)
    return file, built


def read_onnx(onnx_file: Path) -> dict[str, Any]:
    """The metadata of a whole ONNX file of ours that is meant for TensorRT."""
    metadata = load(onnx_file, device="cpu").metadata
    if metadata["precision"] == "int8-cpu":
        raise UserError(
            f"{onnx_file} was quantised for CPUs: python -m deploy.quantize --target tensorrt makes another"
        )
    return metadata


class Network:
    """An ONNX file parsed by TensorRT, strongly typed; close() lets go in the order that does not crash."""

    def __init__(self, trt: ModuleType, onnx_file: Path) -> None:
        self.trt, self.onnx_file = trt, onnx_file
        if library_name(trt) == "tensorrt" and not cuda_device_count():
            raise UserError(
                "tensorrt parses and builds only where there is a CUDA device, which is not here: run this on the "
                "device that will run the engine, or install TensorRT-RTX, which needs none: pip install '.[rtx]'"
            )
        self.log = make_log(trt)
        self.builder = trt.Builder(self.log)
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.definition = self.builder.create_network(0 if flags is None else 1 << int(flags))
        self.parser = trt.OnnxParser(self.definition, self.log)
        self.parsed = self.parser.parse(onnx_file.read_bytes())
        self.errors = [self.parser.get_error(i) for i in range(self.parser.num_errors)]

    def unsupported(self) -> list[str]:
        """Each node that cannot be parsed, with the library's reason."""
        return [
            f"{error.node_operator()} {error.node_name()}: {' '.join(error.desc().splitlines()[:2])}"
            for error in self.errors
        ]

    def refuse_unsupported(self) -> None:
        if not self.parsed:
            reasons = self.unsupported() or [self.log.text()]
            raise UserError(
                f"{library_name(self.trt)} {self.trt.__version__} cannot parse {self.onnx_file.name}: "
                f"{reasons[0]}" + (f" (and {len(reasons) - 1} more: --report)" if len(reasons) > 1 else "")
            )

    def close(self) -> None:
        for name in ("errors", "parser", "definition", "builder"):
            self.__dict__.pop(name, None)
            gc.collect()


def make_log(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps errors instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def text(self) -> str:
            return first_line(Exception(self.errors[0] if self.errors else "no reason given"))

    return Log()


def library_name(trt: ModuleType) -> str:
    return "tensorrt" if trt.__name__ == "tensorrt" else "tensorrt_rtx"


def report(onnx_file: Path, library: str | None = None) -> tuple[str, bool]:
    """What the library says of the file, in lines, and whether it supports all of it."""
    metadata = read_onnx(onnx_file)
    trt = import_tensorrt(library)
    network = Network(trt, onnx_file)
    try:
        lines = [f"{library_name(trt)} {trt.__version__}: {onnx_file.name}, {metadata['precision']}"]
        if network.parsed:
            types: dict[str, int] = {}
            for i in range(network.definition.num_layers):
                kind = str(network.definition.get_layer(i).type).rpartition(".")[2]
                types[kind] = types.get(kind, 0) + 1
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items(), key=lambda x: -x[1]))
            lines.append(f"parsed whole: {network.definition.num_layers} layers ({counts})")
        else:
            lines += ["cannot be parsed:", *(f"  {reason}" for reason in network.unsupported() or [network.log.text()])]
        return "\n".join(lines), network.parsed
    finally:
        network.close()


def get_parser() -> Parser:
    parser = make_parser(__doc__, "build")
    parser.add_argument("onnx", type=Path, help="an ONNX file of deploy.export or deploy.quantize")
    parser.add_argument("--report", action="store_true", help="parse, say what is supported, build nothing")
    parser.add_argument(
        "--library", choices=["tensorrt", "tensorrt_rtx"], help="(default: the first that is installed)"
    )
    parser.add_argument("--min-batch", type=int, default=1, help="of the optimisation profile (default: 1)")
    parser.add_argument("--opt-batch", type=int, default=8, help="the batch to be fastest at (default: 8)")
    parser.add_argument("--max-batch", type=int, default=64, help="the largest the engine will take (default: 64)")
    parser.add_argument("--workspace", type=int, default=1024, help="most scratch memory, in MiB (default: 1024)")
    parser.add_argument("--timing-cache", type=Path, help="a file that makes the next build faster; tensorrt only")
    parser.add_argument("--output", type=Path, help="folder of the engine (default: that of the ONNX file)")
    return parser


def run(args: argparse.Namespace) -> int:
    batches = (args.min_batch, min(max(args.opt_batch, args.min_batch), args.max_batch), args.max_batch)
    if not 1 <= batches[0] <= batches[2]:
        raise UserError(f"--min-batch {batches[0]} and --max-batch {batches[2]} must be 1 <= min <= max")
    if args.workspace < 1:
        raise UserError(f"--workspace must be at least 1 MiB, got {args.workspace}")
    if args.onnx.suffix != ".onnx":
        raise UserError(f"{args.onnx} is no .onnx file: python -m deploy.export makes one from a student/ folder")
    if args.report:
        text, supported = report(args.onnx, args.library)
        print(text)
        return 0 if supported else 1
    file, built = build_engine(args.onnx, batches, args.workspace, args.timing_cache, args.library, args.output)
    print(
        f"{file}  {file.stat().st_size / 1e6:.1f} MB, built by {built['library']} {built['version']} in "
        f"{built['build_s']:.1f} s for batches of {' '.join(map(str, batches))} (smallest, usual, largest)"
    )
    if args.timing_cache and built["library"] != "tensorrt":
        print("no timing cache was written: TensorRT-RTX has none")
    if not built["gpu"]:
        print("built without a GPU: not run and not compared here; deploy.check does both on a machine that has one")
    return 0


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

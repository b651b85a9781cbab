"""Build a TensorRT engine from an ONNX file of deploy.export or deploy.quantize, on the device that will run it.

    python -m deploy.build runs/001-mobilenet_v2-uskd/student/student-fp16.onnx --max-batch 16
    python -m deploy.build runs/001-mobilenet_v2-uskd/student/student-int8-tensorrt.onnx --report

The command uses the installed tensorrt (10 or 11), else TensorRT-RTX, and prints its name. The network is strongly
typed: the ONNX file sets the precision, so build fp16 from student-fp16.onnx and INT8 from student-int8-tensorrt.onnx.
--report parses the file and prints the nodes that the library does not support, without a build. With TensorRT-RTX, the
report and the build also work on a machine without a GPU; only the engine needs one. A .json next to the engine holds
labels, preprocessing, profile, version and GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.cli import Parser, UserError, command, log, make_parser, number, show
from deploy.tensorrt import build_engine, report


def get_parser() -> Parser:
    parser = make_parser(__doc__, "build", "--quiet")
    add = parser.add_argument
    add("onnx", type=Path, help="an ONNX file of deploy.export or deploy.quantize")
    add("--report", action="store_true", help="parse the file and print the unsupported nodes, without a build")
    add("--library", choices=["tensorrt", "tensorrt_rtx"], help="library (default: the first that is installed)")
    add("--opt-batch", type=int, help="the batch that the engine is optimised for (default: 8, or --max-batch)")
    add("--max-batch", type=int, default=64, help="the largest batch of the engine (default: 64)")
    add("--workspace", type=number(int, 1), default=1024, help="largest scratch memory, in MiB (default: 1024)")
    add("--output", type=Path, help="folder of the engine (default: that of the ONNX file)")
    return parser


def run(args: argparse.Namespace) -> int:
    batches = 1, min(8, args.max_batch) if args.opt_batch is None else args.opt_batch, args.max_batch
    if not 1 <= batches[1] <= batches[2]:
        raise UserError(f"--opt-batch {batches[1]} must be at least 1 and at most --max-batch {batches[2]}")
    if args.onnx.suffix != ".onnx":
        raise UserError(f"{args.onnx} is not an .onnx file: python -m deploy.export makes one from a student/ folder")
    if args.report:
        text, supported = report(args.onnx, args.library)
        show(text)
        return int(not supported)
    log(f"building an engine of {args.onnx}: seconds to minutes")
    file, built = build_engine(args.onnx, batches, args.workspace, args.library, args.output)
    took = f"{file.stat().st_size / 1e6:.1f} MB, built by {built['library']} {built['version']} in {built['build_s']} s"
    show(f"{file}  {took} for batches of {' '.join(map(str, batches))} (smallest, usual, largest)")
    if not built["gpu"]:
        log("built without a GPU, so the engine was not run here; check it on a machine with the GPU")
    return 0


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

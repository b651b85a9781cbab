"""Choose a network before you train it: write one file that times candidates on the device, with random weights.

    python -m deploy.candidates --models mobilenet_v2 tf_efficientnet_lite0 resnet18 --img-size 224 -o candidates.pyz

On the device, with Python 3.10 or later:

    python3 candidates.pyz --requirements > requirements.txt      # the wheels that the file needs, with markers
    python3 -m pip install -r requirements.txt
    python3 candidates.pyz --budget-ms 20 --threads 1

Names are those of torchvision or timm. The command exports each network in fp32 and in INT8 for CPUs (calibrated on
noise). On the device the file prints a table: milliseconds, memory and file size in fp32 and INT8, and the published
top-1 on ImageNet, for torchvision's models only. It marks the networks that fit the budget, and prints the best one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deploy import cli
from deploy.benchmark import Plan, benchmark, busy_warning
from deploy.check import table
from deploy.cli import Parser, ProgressBar, UserError, log, number, show
from deploy.runtimes import RunOn, load

LIST = "candidates.json"  # in the archive, next to the ONNX files
CALIBRATION = 16  # number of noise images
TOLERANCE = 1e-2  # for the export: random weights give larger errors than trained ones (EfficientNet-B0: 1.3e-4)
COLUMNS = (
    "network: top1:.1f top1_px:d fp32_ms:.2f int8_ms:.2f fp32_memory_mb:.0f int8_memory_mb:.0f fp32_file_mb:.1f "
    "int8_file_mb:.1f fits: failed:"
)

# ---- on the workstation --------------------------------------------------------------------------------------------


def write_candidates(names: list[str], input_size: list[int], num_classes: int, output: Path) -> None:
    """Write the archive of these networks; raise UserError if one of them is unknown or cannot be exported."""
    need = "candidates are built and exported on a workstation: pip install '.[deploy]'"
    student, export = cli.need("deploy.student", need), cli.need("deploy.export", need)
    quantize, pack = cli.need("deploy.quantize", need), cli.need("deploy.pack", need)
    images = np.random.default_rng(0).integers(0, 256, (CALIBRATION, *input_size[1:], input_size[0]), dtype=np.uint8)
    names = list(dict.fromkeys(names))
    architectures = [student.find_architecture(name, input_size=input_size) for name in names]  # mistakes fail here
    listed: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="candidates-") as name:
        folder, files = Path(name), dict[str, Path]()
        for own, architecture in ProgressBar(list(zip(names, architectures)), "export and quantise", unit="networks"):
            stem = f"{len(listed):02}-{re.sub(r'[^a-zA-Z0-9_.-]', '_', architecture['architecture'])}"
            student.write_random(folder / stem, architecture, input_size, num_classes, own)
            model_file = own if cli.is_code(own) else None
            flags: dict[str, Any] = dict(model_file=model_file, tolerance=TOLERANCE)
            (onnx,) = export.export_student(folder / stem, ["onnx"], **flags)
            recipe = quantize.Recipe("cpu", reduce_range=quantize.products_saturate())
            int8 = onnx.with_name("int8.onnx")
            quantize.Quantizer(onnx, images, load(onnx, RunOn("cpu")).metadata, recipe).write(int8)
            paths = {f"{stem}.onnx": onnx, f"{stem}-int8.onnx": int8}
            files |= {f"student/{file}": path for file, path in paths.items()}
            top1, side = student.published_top1(architecture) or (None, None)
            listed.append({"network": architecture["architecture"], "top1": top1, "top1_px": side, "files": [*paths]})
        about = {"input_size": input_size, "num_classes": num_classes, "candidates": listed}
        pack.write_archive(output, {f"student/{LIST}": json.dumps(about, indent=2)} | files)


def get_parser() -> Parser:
    parser = cli.make_parser(__doc__, "candidates", "--quiet")
    add, above_0 = parser.add_argument, number(int, 1)
    add("--models", nargs="+", required=True, metavar="NAME", help="models of torchvision or timm, or file.py:build")
    size = "pixels a side, or height and width (default: 224)"
    add("--img-size", type=above_0, nargs="+", default=[224], metavar="PX", help=size)
    add("--classes", type=above_0, default=1000, metavar="N", help="outputs of each network (default: 1000)")
    add("-o", "--output", type=Path, default=Path("candidates.pyz"), help="the file to write (default: candidates.pyz)")
    return parser


def run(args: argparse.Namespace) -> None:
    if len(args.img_size) > 2:
        raise UserError(f"--img-size takes one side, or height and width; got {len(args.img_size)} numbers")
    if args.output.suffix != ".pyz":  # it could replace another file
        raise UserError(f"--output {args.output}: expected a name that ends with .pyz")
    input_size = [3, args.img_size[0], args.img_size[-1]]
    write_candidates(args.models, input_size, args.classes, args.output)
    size, name = args.output.stat().st_size / 1e6, args.output.name
    show(f"{args.output}  {size:.1f} MB; next, on the device: python3 {shlex.quote(name)} --budget-ms 20")


# ---- on the device -------------------------------------------------------------------------------------------------


def get_device_parser() -> Parser:
    doc = "Time the candidates of this file. Latency is the median at batch 1; memory is the peak of the process."
    parser = cli.make_parser(doc, "candidates.pyz", "--quiet", "--json", "--threads")
    add, above_0 = parser.add_argument, number(float, 0, above=True)
    add("--budget-ms", type=above_0, metavar="MS", help="mark the networks whose median is within MS milliseconds")
    add("--seconds", type=above_0, default=2.0, help="measured time of each file (default: 2)")
    add("--requirements", action="store_true", help="print the lines of requirements.txt and measure nothing")
    return parser


def measure(folder: Path, args: argparse.Namespace) -> int:
    """Time the candidates in the folder of an archive and print the table; return 1 if one of them failed, else 0."""
    about = json.loads((folder / LIST).read_bytes())
    channels, height, width = about["input_size"]
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, channels), dtype=np.uint8)
    plan, on, load_before = Plan([image], [], args.seconds, rounds=4), RunOn("cpu", args.threads), os.getloadavg()[0]
    rows, timed = [], []
    for candidate in ProgressBar(about["candidates"], "measure", unit="networks"):  # one network in memory at a time
        files = [folder / name for name in candidate["files"]]
        pair = benchmark(folder, files, plan, on, eager=False)
        timed += pair
        rows.append(row_of(candidate, pair, args.budget_ms))
    rows.sort(key=lambda row: (row["top1"] is None, -(row["top1"] or 0)))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        threads = timed[0].get("threads", "?")
        log(f"{height}x{width} px, batch 1, {threads} threads, median over {args.seconds:g} s for each file")
        log("top1: published for ImageNet at top1_px; other weights or another image size give another top-1\n")
        columns = [one for one in COLUMNS.split() if any(row.get(one.partition(":")[0]) is not None for row in rows)]
        show(table(rows, " ".join(columns)))
        if args.budget_ms is not None:
            show("", verdict(rows, args.budget_ms))
    if warning := busy_warning(timed, load_before):
        print(f"warning: {warning}: the times are not reliable", file=sys.stderr)
    return int(any("failed" in row for row in rows))


def row_of(candidate: dict[str, Any], pair: list[dict[str, Any]], budget_ms: float | None) -> dict[str, Any]:
    """Return a network's row of the table. pair: the rows of deploy.benchmark for its fp32 and its INT8 file."""
    row = {name: candidate[name] for name in ("network", "top1", "top1_px")}
    for precision, one in zip(("fp32", "int8"), pair):
        row[f"{precision}_file_mb"] = one["mb"]
        row |= {f"{precision}_ms": one.get("p50_ms"), f"{precision}_memory_mb": one.get("peak_mb")}
        if "failed" in one:
            row["failed"] = one["failed"]
    if budget_ms is not None:
        row["fits"] = " ".join(p for p in ("fp32", "int8") if (row[f"{p}_ms"] or np.inf) <= budget_ms) or "no"
    return row


def verdict(rows: list[dict[str, Any]], budget_ms: float) -> str:
    """Return the line that names the best network within the budget: the one with the highest published top-1."""
    fitting = [row for row in rows if row["fits"] != "no"]
    known = [row for row in fitting if row["top1"] is not None]
    unknown = [row["network"] for row in fitting if row["top1"] is None]
    also = f"; not compared, because this table has no top-1 for them: {', '.join(unknown)}" if unknown else ""
    if not any(row[f"{precision}_ms"] for row in rows for precision in ("fp32", "int8")):
        return "no network ran: the column failed has the reasons"
    if not fitting:
        fastest = min((row[f"{p}_ms"], row["network"], p) for row in rows for p in ("fp32", "int8") if row[f"{p}_ms"])
        return f"no network fits in {budget_ms:g} ms; the fastest is {fastest[1]} in {fastest[2]}: {fastest[0]:.2f} ms"
    if not known:
        return f"within {budget_ms:g} ms: {', '.join(unknown)}; none has a published top-1 in this table"
    best = max(known, key=lambda row: row["top1"])
    precision = "fp32" if "fp32" in best["fits"] else "int8"
    note = "" if precision == "fp32" else "; only its INT8 file fits: limit its drop in top-1 with quantize --max-drop"
    return (
        f"best within {budget_ms:g} ms: {best['network']}, {best[f'{precision}_ms']:.2f} ms in {precision}, "
        f"published top-1 {best['top1']:.1f} %{note}{also}"
    )


if __name__ == "__main__":
    sys.exit(cli.command(get_parser(), run))

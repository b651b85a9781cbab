"""Run all checks that need a GPU, and print a table: speed of the losses and of a step, AMP, engines, energy.

    python examples/gpu.py                    # under 10 minutes; one minute on a CPU, where the sizes are small
    python examples/gpu.py --only losses      # the checks with this word in their names

Each check prints a line: passed, failed with the reason, or skipped. Then the next check runs. At the end the script
prints a table in Markdown with the machine and the count of each result. The folder --output has table.md, the runs and
a log of each command. Install first: pip install -c constraints.txt -e ".[dev]". Exit status: 1 if a check failed.
"""

import argparse
import contextlib
import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.benchmark import query
from deploy.cli import UserError, first_line, make_folder, number, run_command, version
from examples.benchmark_losses import (
    SHAPES,
    Loss,
    call,
    copy_bandwidth,
    machine,
    make_inputs,
    median_seconds,
    nkd_by_masks,
    peak_bytes,
    uskd_by_masks,
    waits_for_the_device,
)
from kdlite import WithWeakHead, nkd_loss, uskd_loss

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """Hold a line of the table."""

    label: str
    result: str  # passed, failed or skipped
    figures: str  # with their units, or the reason of a failure


class Check(NamedTuple):
    """Hold a function that yields one or several rows."""

    name: str  # name of the row if the check fails or is skipped
    run: Callable[[], Iterable[Row]]
    needs_gpu: bool = False


class Sizes(NamedTuple):
    """Hold the amount of work for a kind of device."""

    shapes: list[tuple[int, int]]  # of the logits
    loss_seconds: float  # for each row
    step_models: list[str]
    step: str  # flags of benchmark_step.py
    teacher: str  # flags of train.py
    student: str
    benchmark: str  # flags of deploy.benchmark


SIZES = {
    "cuda": Sizes(
        shapes=SHAPES,
        loss_seconds=0.3,
        step_models=["resnet18", "mobilenet_v2", "deit_tiny_patch16_224"],
        step="--img-size 224 --batch-size 256 --rounds 15 --seconds 3",
        teacher="--model resnet18 --img-size 224 --epochs 2",
        student="--model mobilenet_v2 --img-size 224 --epochs 2",
        benchmark="--seconds 1",
    ),
    "cpu": Sizes(
        shapes=[(64, 1000)],
        loss_seconds=0.05,
        step_models=["resnet18"],
        step="--img-size 32 --batch-size 2 --rounds 2 --seconds 0.1 --workers 0",
        teacher="--model test_resnet --img-size 32 --epochs 1 --workers 0",
        student="--model test_efficientnet --img-size 32 --epochs 1 --workers 0",
        benchmark="--seconds 0.1 --rounds 1 --batches 1 --threads 1",
    ),
}
NEEDS_GPU = "needs a CUDA GPU"


class Place(NamedTuple):
    """Hold the device, the output folder and the deadline of the checks, and run commands."""

    device: str  # cuda or cpu
    output: Path
    ends: float  # in the seconds of time.monotonic

    def run(self, log: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments until it ends or the time is over; write its output into a log."""
        command = [sys.executable, *argv]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen(command, env=environment, cwd=self.output, start_new_session=True, **pipes)
        printed = errors = ""
        try:
            printed, errors = process.communicate(timeout=max(0.0, self.ends - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise UserError("the time was over: give more --minutes") from error
        finally:
            if process.poll() is None:  # also kill the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
                printed, errors = process.communicate()
            (self.output / f"{log}.log").write_text(f"$ {' '.join(command)}\n{printed}{errors}")
        return subprocess.CompletedProcess(command, process.returncode, printed, errors)

    def output_of(self, log: str, *argv: str) -> str:
        """Run Python and return its stdout; raise a UserError with its last line if it fails."""
        done = self.run(log, *argv)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise UserError(f"{lines[-1]} (exit status {done.returncode}, see {log}.log)")
        return done.stdout


# ---- the losses ---------------------------------------------------------------------------------------------------


def losses(shape: tuple[int, int], dtype: torch.dtype, device: str, seconds: float, compiled: bool) -> Iterator[Row]:
    """Yield a row for each loss: time, memory, bandwidth in percent of a plain copy's, whether the host waits."""
    inputs, u = make_inputs(*shape, dtype, device), shape[0] * shape[1] * dtype.itemsize
    ours: dict[str, Loss] = {"nkd_loss": nkd_loss, "uskd_loss": uskd_loss}
    if compiled:
        torch.compiler.reset()
        ours = {name: torch.compile(loss, fullgraph=True, dynamic=False) for name, loss in ours.items()}
    masks: dict[str, Loss] = {"masks, nkd_loss": nkd_by_masks, "masks, uskd_loss": uskd_by_masks}
    for loss in (*ours.values(), *masks.values()):
        call(loss, inputs)  # the first call compiles
    times = median_seconds(ours | masks, inputs, seconds)
    for name, loss in ours.items():
        ratio, peak = times[f"masks, {name}"] / times[name], peak_bytes(loss, inputs) / u
        figures, waits = f"{1e3 * times[name]:.3f} ms, {ratio:.1f}x boolean masks, peak {peak:.1f} u", False
        if device == "cuda":
            if name == "nkd_loss":  # NKD reads and writes at least 5 u
                figures += f", {100 * 5 * u / copy_bandwidth() / times[name]:.0f} % of a copy's bandwidth"
            waits = waits_for_the_device(loss, inputs)
            figures += ", the host waits for the GPU" if waits else ", the host does not wait for the GPU"
        label = f"{name}{', compiled' * compiled}, {title(shape, dtype)}"
        yield Row(label, "failed" if waits else "passed", figures)


def title(shape: tuple[int, int], dtype: torch.dtype) -> str:
    return f"{shape[0]:,} x {shape[1]:,}, {str(dtype).removeprefix('torch.')}"


def copying() -> Iterator[Row]:
    yield Row("copy", "passed", f"{copy_bandwidth() / 1e12:.2f} TB/s (reads plus writes) for a copy of 1 GiB")


# ---- training -----------------------------------------------------------------------------------------------------


def step(name: str, place: Place, model: str, *flags: str) -> Iterator[Row]:
    """Yield the ratios of benchmark_step.py, and the images a second of its data pipeline."""
    command = [str(ROOT / "examples/benchmark_step.py"), "--models", model, "--device", place.device]
    text = place.output_of(file_name(name), *command, *SIZES[place.device].step.split(), *flags)
    plain, memory = find(r"train.py, cross-entropy +[\d.]+ +([\d.]+)", text), find(r"memory +USKD +([\d.]+)", text)
    ratios = {word: find(rf"ratio {word} +([\d.]+)", text) for word in ("minimal", "USKD", "stored", "NKD")}
    figures = f"minimal loop / train.py {ratios['minimal']}, USKD / cross-entropy {ratios['USKD']} (memory {memory}), "
    figures += f"stored labels / cross-entropy {ratios['stored']}, NKD / (cross-entropy + teacher) {ratios['NKD']}; "
    loaders, cache = find(r"workers +(\d+) images", text), find(r"--cache device.* (\d+) images", text)
    figures += f"cross-entropy {plain} images/s; the loaders deliver {loaders}, --cache device {cache} images/s"
    yield Row(name, "passed", figures)


def find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise UserError(f"the output has no {pattern!r}")
    return found[1]


def training(name: str, place: Place, run: str, flags: list[str]) -> Iterator[Row]:
    """Yield the row of a run of train.py, with the figures of its last epoch."""
    place.output_of(run, str(ROOT / "train.py"), "--device", place.device, *flags, "--output", run)
    with open(place.output / run / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    figures = f"{float(last['images_per_s']):.0f} images/s, top-1 {float(last['val_top1']):.1f} %, peak "
    figures += f"{last['memory_mib']} MiB, {last['skipped_steps']} steps skipped, last of {last['epoch']} epochs"
    yield Row(name, "passed", figures)


def one_rank(backend: str, device: str) -> Iterator[Row]:
    """Compute USKD's gradients under DistributedDataParallel with a process group, and without both; compare them."""
    torch.manual_seed(0)
    images, target = torch.randn(32, 64, device=device), torch.arange(32, device=device) % 10
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    student, gradients = WithWeakHead(net, "1", example_input=images), []
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for parallel, group in ((student, None), (DistributedDataParallel(student), dist.group.WORLD)):
            student.zero_grad()
            logits, weak_logits = parallel(images)
            (F.cross_entropy(logits, target) + uskd_loss(logits, weak_logits, target, group=group)).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    finally:
        dist.destroy_process_group()
    plain, parallel_ones = gradients
    difference = float((plain - parallel_ones).abs().max() / plain.abs().max())
    result = "passed" if difference < 1e-5 else "failed"
    yield Row(f"one rank of {backend}", result, f"with and without DDP: relative difference {difference:.1e}")


# ---- on a device --------------------------------------------------------------------------------------------------


def checked(name: str, place: Place, student: Path, file: str, *flags: str) -> Iterator[Row]:
    """Yield the verdict of deploy.check on a file of the student."""
    folder = place.output / file_name(name)  # a folder for each check, because each writes a check.json
    command = ["-m", "deploy.check", str(student), file, "--json", "--quiet", "--output", str(folder), *flags]
    done = place.run(file_name(name), *command)
    if not done.stdout.startswith("["):
        raise UserError((done.stderr.strip().splitlines() or ["no output"])[-1])
    row = json.loads(done.stdout)[-1]
    if row["verdict"] != "pass":
        raise UserError(row["verdict"])
    figures = f"{row['provider']}, {row['precision']}: agrees on {row['agreement']:.2f} % of {row['images']} images, "
    yield Row(name, "passed", f"{figures}largest error {row['max_abs_error']:.1e}")


def built(name: str, place: Place, student: Path, file: str) -> Iterator[Row]:
    """Yield the build of an engine, and its check."""
    text = place.output_of(file_name(name), "-m", "deploy.build", str(student / file), "--max-batch", "64", "--quiet")
    yield Row(name, "passed", text.strip().splitlines()[-1].partition("  ")[2])
    yield from checked(f"{name}, run and compared", place, student, Path(file).with_suffix(".engine").name)


def written(name: str, place: Place, *command: str) -> Iterator[Row]:
    """Yield a row for each file that a command of deploy/ writes."""
    for line in place.output_of(file_name(name), "-m", *command, "--quiet").strip().splitlines():
        file, _, figures = line.partition("  ")
        yield Row(f"{name}, {Path(file).name}", "passed", figures.partition(";")[0])


def timed(name: str, place: Place, student: Path) -> Iterator[Row]:
    """Yield the rows of deploy.benchmark: speed, and energy if the GPU measures it."""
    flags = ["--device", place.device, "--json", "--quiet", *SIZES[place.device].benchmark.split()]
    done = place.run(file_name(name), "-m", "deploy.benchmark", str(student), *flags)
    if not done.stdout.startswith("{"):
        raise UserError((done.stderr.strip().splitlines() or ["no output"])[-1])
    energy = []
    for row in json.loads(done.stdout)["rows"]:
        label = f"{name}, {row['artefact']}"
        if "failed" in row:
            yield Row(label, "failed", row["failed"])
            continue
        label += f", {row['runtime']}, batch {row['batch']}"
        figures = f"{row['provider']}: {row['p50_ms']:.2f} ms (p50), {row['images_per_s']:.0f} images/s"
        yield Row(label, "passed", f"{figures}, {row.get('times_eager') or 1:.2f}x torch eager")
        if row["mj_per_image"] is not None:
            energy.append(
                Row(f"energy, {label.partition(', ')[2]}", "passed", f"{row['mj_per_image']:.1f} mJ an image")
            )
    yield from energy
    if not energy:
        missing = "the GPU has no counter, or pynvml is missing" if place.device == "cuda" else NEEDS_GPU
        yield Row("energy", "skipped", missing)


def tests(name: str, place: Place) -> Iterator[Row]:
    """Yield the count of the tests that need a GPU, such as the capture of a CUDA graph."""
    text = place.output_of(file_name(name), "-m", "pytest", str(ROOT / "tests"), "-m", "gpu", "-q")
    yield Row(name, "passed", text.strip().splitlines()[-1].strip("= "))


# ---- the list -----------------------------------------------------------------------------------------------------


def list_checks(place: Place) -> list[Check]:
    """Return the checks in their order; the later ones of deploy/ need the files of the earlier ones."""
    device, sizes = place.device, SIZES[place.device]
    found = [Check("copy", copying, True)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in sizes.shapes:
            for compiled in (False, True):
                run = functools.partial(losses, shape, dtype, device, sizes.loss_seconds, compiled)
                found.append(Check(f"losses{', compiled' * compiled}, {title(shape, dtype)}", run, compiled))

    both = [*sizes.student.split(), "--kd", "nkd", "--teacher", "teacher/student", "--self-kd", "uskd"]
    for run, title_of_run, flags, needs_gpu in (
        ("teacher", "cross-entropy, float32", [*sizes.teacher.split(), "--amp", "off"], False),
        ("bf16", "NKD and USKD, --amp bf16", [*both, "--amp", "bf16"], False),
        ("fp16", "NKD and USKD, --amp fp16", [*both, "--amp", "fp16"], True),
        ("cache", "NKD and USKD, --cache device", [*both, "--cache", "device", "--crop", "pad"], True),
        ("compile", "NKD and USKD, --compile", [*both, "--compile"], True),
    ):
        name = f"train.py, {title_of_run}"
        found.append(Check(name, functools.partial(training, name, place, run, flags), needs_gpu))
    backend = {"cuda": "nccl", "cpu": "gloo"}[device]
    found.append(Check(f"one rank of {backend}", functools.partial(one_rank, backend, device)))

    student, export = place.output / "bf16/student", ["deploy.export", "bf16", "--format", "onnx"]
    for label, *command in (
        ("export", *export),
        ("export", *export, "--precision", "fp16"),
        ("quantize", "deploy.quantize", "bf16", "--target", "tensorrt"),
    ):
        name = f"{label}{' fp16' * ('fp16' in command)}"
        found.append(Check(name, functools.partial(written, name, place, *command)))
    files = {"fp32": "student.onnx", "fp16": "student-fp16.onnx", "int8": "student-int8-tensorrt.onnx"}
    for provider in ("cpu", "cuda", "tensorrt"):
        for precision, file in files.items():
            name = f"ONNX Runtime, {provider}, {precision}"
            run = functools.partial(checked, name, place, student, file, "--device", provider)
            found.append(Check(name, run, provider != "cpu"))
    for precision, file in files.items():
        name = f"TensorRT engine, {precision}"
        found.append(Check(name, functools.partial(built, name, place, student, file), True))
    found.append(Check("benchmark", functools.partial(timed, "benchmark", place, student)))

    for model in sizes.step_models:
        found.append(Check(f"step, {model}", functools.partial(step, f"step, {model}", place, model)))
    name = "step, resnet18, compiled"
    found.append(Check(name, functools.partial(step, name, place, "resnet18", "--compile"), True))
    found.append(Check("tests of the GPU", functools.partial(tests, "tests of the GPU", place), True))
    return found


def run_check(check: Check, place: Place) -> Iterator[Row]:
    """Yield the rows of a check, or one row with the reason if it is skipped or fails."""
    if check.needs_gpu and place.device == "cpu":
        yield Row(check.name, "skipped", NEEDS_GPU)
    elif time.monotonic() > place.ends:
        yield Row(check.name, "skipped", "no time was left: give more --minutes")
    else:
        try:
            yield from check.run()
        except Exception as error:  # each library has its own exceptions
            yield Row(check.name, "failed", first_line(error))


# ---- the table ----------------------------------------------------------------------------------------------------


def describe(device: str) -> str:
    """Return the machine in a line of Markdown."""
    driver = query("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none"
    commit = query("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown"
    packages = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-bindings")
    versions = [f"{name} {version(name)}" for name in packages if version(name) != "not installed"]
    parts = [machine(device), f"CUDA {torch.version.cuda}, driver {driver}", *versions, f"commit {commit}"]
    return f"{datetime.now():%Y-%m-%d}: {'; '.join(parts)}"


def markdown(rows: list[Row], device: str) -> str:
    counts = ", ".join(f"{sum(row.result == name for row in rows)} {name}" for name in ("passed", "failed", "skipped"))
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    table = "\n".join(("| check | result | figures |", "|---|---|---|", *lines))
    return f"{describe(device)}\n\n{counts}\n\n{table}\n"


def file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=default, help="default: the GPU if there is one")
    add("--minutes", type=number(float, 0, above=True), default=10.0, help="skip the checks after these minutes")
    add("--only", nargs="+", metavar="WORDS", help="only checks with these words in their names")
    add("--output", type=Path, help="an empty folder, or a new one; default: runs/gpu-DATE-TIME")
    return parser


def main() -> int:
    args = get_parser().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA GPU")
    output = (args.output or Path(f"runs/gpu-{datetime.now():%Y%m%d-%H%M%S}")).resolve()
    make_folder(output)
    if any(output.iterdir()):
        raise UserError(f"--output {output} is not empty: give another folder")
    place = Place(args.device, output, time.monotonic() + 60 * args.minutes)
    checks = list_checks(place)
    if args.only:
        checks = [check for check in checks if any(words in check.name for words in args.only)]
        if not checks:
            raise UserError(f"--only: no check has {' or '.join(args.only)} in its name")
    print(describe(args.device), flush=True)
    rows = []
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C still prints the table of the checks that ran
        for check in checks:
            for row in run_check(check, place):
                rows.append(row)
                print(f"{row.result:8} {row.label}: {row.figures}", flush=True)
    text = markdown(rows, args.device)
    (output / "table.md").write_text(text)
    print(f"\n{text}\n{output}/table.md", flush=True)
    return int(any(row.result == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(run_command("gpu.py", main))

"""Measure how fast every artefact is on this machine, and print a table with torch eager in its first rows.

    python -m deploy.benchmark runs/001-mobilenet_v2-uskd --threads 1
    python -m deploy.benchmark runs/001-mobilenet_v2-uskd student.onnx student-int8-cpu.onnx --batches 1 16

The images come from the run's reference.npz. Without torch the table has no rows for torch eager.

Each runtime has its own process. The runtimes take turns in short rounds, so that a busy moment of the machine slows
all of them. Latency is the time of the whole call, from uint8 images to logits, both in host memory. The header
describes the machine and its load. cpu/wall is the CPU time of a row divided by its wall time. A row that fails stays
in the table, with the reason. The command writes benchmark.json and benchmark.png (latency against accuracy).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy import cli
from deploy.check import find_artefacts, table
from deploy.cli import Parser, ProgressBar, UserError, first_line, log, number, show
from deploy.config import read_config
from deploy.per_class import save
from deploy.reference import NAME, find_reference, read_reference
from deploy.runtimes import RunOn, Runtime, cuda_device_name, has_torch, load, pick_device, usable_cpus

COLUMNS = (
    "artefact: runtime: provider: precision: batch:d threads:d p50_ms:.2f p90_ms:.2f p99_ms:.2f images_per_s:.0f "
    "times_eager:.2f load_s:.2f build_s:.1f mb:.1f peak_mb:.0f top1:.2f cpu/wall:.2f mj_per_image:.1f failed:"
)
GPU_FIELDS = "name,clocks.sm,clocks.mem,power.limit,temperature.gpu"
BUSY = 0.95  # a smaller cpu/wall of a row on the CPU shows that other programs ran
Labelled = tuple[np.ndarray, np.ndarray]  # images and class indices
PAUSE_S = 0.05  # pause between two turns, so that spinning threads go to sleep


class Slice(NamedTuple):
    """Hold the measurements of a worker in one turn."""

    latencies: list[float]  # seconds
    wall_s: float
    cpu_s: float
    joules: float | None
    peak_mb: float | None  # peak memory of the process, with its libraries; None except on Linux


def work(pipe: Connection, path: Path, on: RunOn) -> None:
    """Load a runtime, then answer requests until None arrives. This function runs in the process of a Worker."""
    meter = EnergyMeter()
    try:
        runtime = load(path, on)
        pipe.send((runtime.name, runtime.provider, runtime.metadata, runtime.load_s, runtime.max_batch))
        while (task := pipe.recv()) is not None:
            images, seconds = task
            pipe.send(runtime.run(images) if seconds is None else time_calls(runtime, images, seconds, meter))
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(OSError):  # the parent process has ended
            pipe.send(UserError(first_line(error) if isinstance(error, Exception) else "interrupted"))
    finally:
        meter.close()


def time_calls(runtime: Runtime, images: np.ndarray, seconds: float, meter: EnergyMeter) -> Slice:
    """Warm the runtime up, then time calls for a number of seconds."""
    warm_until = time.perf_counter() + 0.2 * seconds
    runtime.run(images)
    while time.perf_counter() < warm_until:
        runtime.run(images)
    latencies: list[float] = []
    meter.start()
    cpu, started = time.process_time(), time.perf_counter()
    while (before := time.perf_counter()) < started + seconds or not latencies:
        runtime.run(images)
        latencies.append(time.perf_counter() - before)
    wall = time.perf_counter() - started
    return Slice(latencies, wall, time.process_time() - cpu, meter.stop(), peak_memory_mb())


def peak_memory_mb() -> float | None:
    """Return the peak memory of this process. The peak in getrusage would include the memory of the parent process."""
    peak = re.search(r"^VmHWM:\s*(\d+) kB", read("/proc/self/status"), re.M)
    return int(peak[1]) * 1024 / 1e6 if peak else None


class Worker:
    """Run one runtime in its own process."""

    def __init__(self, path: Path, on: RunOn) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, path, on), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.name, self.provider, self.metadata, self.load_s, self.max_batch = self.ask()
        except UserError:
            self.process.join()
            raise

    def ask(self, images: np.ndarray | None = None, seconds: float | None = None) -> Any:
        """Send images, unless they are None, and return the next answer of the process."""
        try:
            if images is not None:
                self.pipe.send((images, seconds))
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise UserError(f"its process ended with status {self.process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
            self.process.join(5)
        self.process.kill()


@dataclass(frozen=True)
class Plan:
    """Set the images and the time of the measurement."""

    batches: list[np.ndarray]  # batches to time, each uint8 (N, H, W, 3)
    validation: list[Labelled]  # images for top-1; may be empty
    seconds: float = 3.0  # measured time of each row
    rounds: int = 6  # turns of each row; each takes an equal part of the seconds


@dataclass
class Timed:
    """Hold a row of the table, its worker and its measurements."""

    row: dict[str, Any]
    worker: Worker | None  # None: the artefact cannot run here
    images: np.ndarray
    slices: list[Slice] = field(default_factory=list)


def benchmark(
    student: Path, artefacts: list[Path], plan: Plan, on: RunOn, eager: bool = True, compile: bool = False
) -> list[dict[str, Any]]:
    """Return a row for each artefact and batch. The rows of torch eager are first, and ratios are relative to them.

    eager: add rows for the student/ folder in torch; compile: add rows for torch.compile
    """
    torch_on = dataclasses.replace(on, device=on.device.replace("tensorrt", "cuda"))
    entries = [(student, torch_on)] if eager else []
    entries += [(student, dataclasses.replace(torch_on, compile=True))] if compile else []
    entries += [(path, on) for path in artefacts]
    timed: list[Timed] = []
    try:
        for path, path_on in ProgressBar(entries, "load", unit="files"):
            timed += open_rows(path, path_on, plan)
        measure(timed, plan)
    finally:
        for one in timed:
            if one.worker:
                one.worker.close()
    rows = [one.row for one in timed]
    median_of_eager = {row.get("batch"): row.get("p50_ms") for row in rows if row.get("runtime") == "torch"}
    for row in rows:
        if "p50_ms" in row and median_of_eager.get(row["batch"]):
            row["times_eager"] = median_of_eager[row["batch"]] / row["p50_ms"]
    return rows


def open_rows(path: Path, on: RunOn, plan: Plan) -> list[Timed]:
    """Start a worker and return a row for each batch; if the artefact cannot run, return one row with the reason."""
    name, weights = ("student/", path / "model.safetensors") if path.is_dir() else (path.name, path)
    row, worker = {"artefact": name, "mb": weights.stat().st_size / 1e6}, None
    try:
        worker = Worker(path, on)
        row |= {"runtime": worker.name, "provider": worker.provider, "precision": worker.metadata.precision}
        row |= {"threads": on.threads or usable_cpus(), "load_s": worker.load_s}
        row["build_s"] = worker.metadata.built.get("build_s")
        if plan.validation:
            hits = sum(int((worker.ask(images).argmax(1) == labels).sum()) for images, labels in plan.validation)
            row["top1"] = 100 * hits / sum(len(labels) for _, labels in plan.validation)
    except UserError as error:
        if worker:
            worker.close()
        return [Timed(row | {"failed": str(error)}, None, np.empty(0))]
    timed = [Timed(row | {"batch": len(images)}, worker, images) for images in plan.batches]
    for one in timed:
        if len(one.images) > (worker.max_batch or len(one.images)):
            one.row["failed"] = f"the file takes batches of at most {worker.max_batch} images"
    return timed


def measure(timed: list[Timed], plan: Plan) -> None:
    """Let the workers take turns, and write the measurements into their rows; a row that fails gets the reason."""
    for one in ProgressBar([one for _ in range(plan.rounds) for one in timed], "measure", unit="turns"):
        if one.worker is None or "failed" in one.row:
            continue
        try:
            one.slices.append(one.worker.ask(one.images, plan.seconds / plan.rounds))
        except UserError as error:
            one.row["failed"] = str(error)
        time.sleep(PAUSE_S)
    for one in timed:
        if "failed" not in one.row:
            one.row |= summarise(one.slices, len(one.images))


def busy_warning(rows: list[dict[str, Any]], load: float) -> str:
    """Return a warning if other programs used the CPU, else "". load: the load average before the measurement."""
    shares = [row["cpu/wall"] for row in rows if "cpu/wall" in row and "cpu" in row["provider"].lower()]
    if shares and min(shares) < BUSY:
        return f"other programs used the CPU: the smallest cpu/wall is {min(shares):.2f}, expected {BUSY} or more"
    if load > 0.75 * (os.cpu_count() or 1):
        return f"other programs were running: the load was {load:.1f} on {os.cpu_count()} cores"
    return ""


def summarise(slices: list[Slice], batch: int) -> dict[str, Any]:
    """Return the columns of a row's measurements."""
    latencies = np.concatenate([part.latencies for part in slices])
    p50, p90, p99 = np.percentile(1e3 * latencies, (50, 90, 99))
    joules = [part.joules for part in slices if part.joules is not None]
    images = batch * len(latencies)
    times = {"calls": len(latencies), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}
    return times | {
        "images_per_s": images / latencies.sum(),
        "cpu/wall": sum(part.cpu_s for part in slices) / sum(part.wall_s for part in slices),
        "peak_mb": slices[-1].peak_mb,
        "mj_per_image": 1e3 * sum(joules) / images if len(joules) == len(slices) else None,
    }


class EnergyMeter:
    """Measure the energy between start() and stop(): NVML measures a GPU, tegrastats the board of a Jetson."""

    def __init__(self) -> None:
        self.gpu: Any = None
        self.process: subprocess.Popen[str] | None = None
        self.tegrastats = shutil.which("tegrastats")
        try:
            import pynvml

            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
            self.gpu = functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu)  # returns mJ
        except Exception:  # pynvml, the driver or the GPU's counter is missing
            pass

    def start(self) -> None:
        self.started = time.perf_counter()
        if self.gpu:
            self.before = self.gpu()
        elif self.tegrastats:
            self.watts: list[float] = []
            self.process = subprocess.Popen([self.tegrastats, "--interval", "50"], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self.listen, args=[self.process.stdout], daemon=True).start()

    def listen(self, lines: Iterable[str]) -> None:
        self.watts.extend(filter(None, map(board_watts, lines)))

    def stop(self) -> float | None:
        """Return the joules, or None without a meter."""
        if self.gpu:
            return (self.gpu() - self.before) / 1e3
        self.close()
        if not self.tegrastats or not self.watts:
            return None
        return float(np.mean(self.watts)) * (time.perf_counter() - self.started)

    def close(self) -> None:
        """End tegrastats if it runs."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None


def board_watts(line: str) -> float | None:
    """Return the board's power from a line of tegrastats: VDD_IN, or on AGX modules the sum of the rails."""
    rails = {name: int(now) for name, now in re.findall(r"(V\w+) (\d+)mW/\d+mW", line)}
    return rails.get("VDD_IN", sum(rails.values())) / 1e3 if rails else None


def describe_machine() -> dict[str, Any]:
    """Return the context of the measurements: versions, device, clocks, power mode and load."""
    packages = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-bindings", "numpy")
    versions = {"python": platform.python_version()} | {package: cli.version(package) for package in packages}
    cpu = re.search(r"^model name\s*: (.*)$", read("/proc/cpuinfo"), re.M)
    name = cpu[1] if cpu else read("/proc/device-tree/model") or platform.machine()
    clocks = "/sys/devices/system/cpu/cpu0/cpufreq"
    gpu = query("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader")
    return {
        "versions": {package: number for package, number in versions.items() if number != "not installed"},
        "cpu": f"{name}, {os.cpu_count()} cores",
        "cpu_clock": read(f"{clocks}/scaling_cur_freq") or "unknown",
        "cpu_governor": read(f"{clocks}/scaling_governor") or "unknown",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "gpu": gpu or cuda_device_name() or "none",
        "power_mode": query("nvpmodel", "-q") or "unknown",
    }


def read(file: str) -> str:
    try:
        return Path(file).read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def query(*program: str) -> str:
    try:
        return " ".join(subprocess.run(program, capture_output=True, text=True, timeout=10, check=True).stdout.split())
    except (OSError, subprocess.SubprocessError):
        return ""


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw latency against accuracy at the smallest batch."""
    from matplotlib.figure import Figure

    batch = min(row["batch"] for row in rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for row in (row for row in rows if row["batch"] == batch):
        (point,) = axis.plot(row["p50_ms"], row["top1"], "o", label=f"{row['artefact']} ({row['runtime']})")
        axis.hlines(row["top1"], row["p50_ms"], row["p90_ms"], colors=point.get_color())
    axis.set(xlabel=f"latency at batch {batch}, ms: p50, line to p90", ylabel="top-1 (%)", xlim=(0, None))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    save(file, figure)


def get_parser() -> Parser:
    parser = cli.make_parser(__doc__, "benchmark", "student", "--quiet", "--json", "--reference", *cli.DEVICE)
    add, at_least_1, above_0 = parser.add_argument, number(int, 1), number(float, 0, above=True)
    add("artefacts", nargs="*", help="files to time (default: all in the folder)")
    add("--batches", type=at_least_1, nargs="+", default=[1, 16], help="images per call (default: 1 16)")
    add("--seconds", type=above_0, default=3.0, help="measured time of each row (default: 3)")
    add("--rounds", type=at_least_1, default=6, help="turns of each row, which share its --seconds (default: 6)")
    add("--compile", action="store_true", help="time torch.compile too (takes a minute to warm up)")
    accuracy = "measure the accuracy on N images, evenly spaced; 0: no accuracy (default: 1000)"
    add("--count", type=number(int, 0), default=1000, metavar="N", help=accuracy)
    add("--output", type=Path, help="folder of benchmark.json and .png (default: the student's)")
    return parser


def read_images(student: Path, args: argparse.Namespace) -> tuple[np.ndarray, list[Labelled]]:
    """Return the reference's images to time, and batches of (images, labels) for the accuracy.

    Without a reference, return noise and an empty list.
    """
    if not find_reference(student, args.reference):
        log(f"no {NAME} next to {student}: timed on noise, no accuracy")
        shape = 64, *read_config(student, ()).image_shape
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), []
    reference = read_reference(student, args.reference, "").some(args.count or None)
    images, labels = reference.images, reference.labels
    log(f"{len(images)} validation images of the reference")
    return images, [(images[i : i + 64], labels[i : i + 64]) for i in range(0, len(images) if args.count else 0, 64)]


def run(args: argparse.Namespace) -> int:
    pick_device(args.device, cuda_device_name() is not None, args.allow_fallback)  # one error here, not one in each row
    student = cli.student_folder(args.student)
    artefacts = find_artefacts(student, args.artefacts)
    output = args.output or student
    cli.make_folder(output)
    images, validation = read_images(student, args)
    eager = has_torch() and (student / "model.safetensors").is_file()
    if args.compile and not eager:
        raise UserError("--compile needs torch and the weights of the student")
    if not eager:
        log("torch or the weights are missing: the table has no row for eager torch")
    batches = [images[np.arange(size) % len(images)] for size in sorted(set(args.batches))]
    machine, machine_load = describe_machine(), os.getloadavg()[0]
    plan = Plan(batches, validation, args.seconds, args.rounds)
    rows = benchmark(student, artefacts, plan, RunOn.from_args(args), eager, args.compile)
    machine["load_after"] = " ".join(f"{load:.1f}" for load in os.getloadavg())

    config = read_config(student, ())
    result = {"machine": machine, "model": config.architecture, "input_size": config.input_size, "rows": rows}
    text = json.dumps(result, indent=2)
    cli.write_whole(output / "benchmark.json", text + "\n")
    if args.json:
        print(text)
    else:
        log("{} at {}x{}".format(config.architecture, *config.input_size[1:]))
        for key, value in machine.items():
            log(f"{key}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}")
        log("")
        filled = {name for row in rows for name, value in row.items() if value is not None}
        show(table(rows, " ".join(column for column in COLUMNS.split() if column.partition(":")[0] in filled)))
    if warning := busy_warning(rows, machine_load):
        print(f"warning: {warning}: the times and ratios are not reliable", file=sys.stderr)
    drawn = [row for row in rows if "failed" not in row and "top1" in row]
    if drawn and importlib.util.find_spec("matplotlib"):
        plot(drawn, output / "benchmark.png")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(cli.command(get_parser(), run))

"""How fast is every artefact here? One table, on the run's own validation images, torch eager beside it.

    python -m deploy.benchmark runs/001-mobilenet_v2-uskd --threads 1
    python -m deploy.benchmark runs/001-mobilenet_v2-uskd student.onnx student-int8-cpu.onnx --batches 1 16

The images are those of the run's reference.npz. A machine without torch has no row of torch eager, and says so.

Each runtime has a process of its own; they take turns in short rounds, so that a busy moment of the machine hits them
all. Latency is the whole call, from uint8 images in host memory to logits there. The header names the machine and its
load; cpu/wall is the processor time per second of each row (with one thread: under 0.95, something else was running).
A row that failed stays, with its reason. Written to benchmark.json and benchmark.png (latency against accuracy).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.check import find_artefacts, table
from deploy.cli import (
    Parser,
    ProgressBar,
    UserError,
    add_device,
    add_json,
    add_quiet,
    command,
    first_line,
    make_folder,
    make_parser,
    note,
    student_folder,
    version,
    write_whole,
)
from deploy.config import read_config
from deploy.reference import NAME, add_reference, find_reference, read_reference
from deploy.runtimes import RunOn, cuda_device_count, has_torch, load, pick_device

COLUMNS = {
    "artefact": "", "runtime": "", "provider": "", "precision": "", "batch": "d", "threads": "d", "p50_ms": ".2f",
    "p90_ms": ".2f", "p99_ms": ".2f", "images_per_s": ".0f", "times_eager": ".2f", "load_s": ".2f", "build_s": ".1f",
    "mb": ".1f", "top1": ".2f", "cpu/wall": ".2f", "mj_per_image": ".1f", "failed": "",
}  # fmt: skip
PAUSE_S = 0.05  # between two turns: threads that spin for more work go to sleep


class Slice(NamedTuple):
    """What a worker measured in one turn."""

    latencies: list[float]  # seconds
    wall_s: float
    cpu_s: float
    joules: float | None


def work(pipe: Connection, path: Path, on: RunOn) -> None:
    """A worker's life: load, then answer what it is asked, until None comes."""
    meter = EnergyMeter()
    try:
        runtime = load(path, on)
        pipe.send((runtime.name, runtime.provider, runtime.metadata, runtime.load_s, runtime.max_batch))
        while (task := pipe.recv()) is not None:
            images, seconds = task
            if seconds is None:
                pipe.send(runtime.run(images))
                continue
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
            pipe.send(Slice(latencies, wall, time.process_time() - cpu, meter.stop()))
    except (Exception, KeyboardInterrupt) as error:
        pipe.send(UserError(first_line(error) if isinstance(error, Exception) else "interrupted"))
    finally:
        meter.close()


class Worker:
    """A process that holds one runtime."""

    def __init__(self, path: Path, on: RunOn) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, path, on), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.name, self.provider, self.metadata, self.load_s, self.max_batch = self.answer()
        except UserError:
            self.process.join()
            raise

    def ask(self, images: np.ndarray, seconds: float | None = None) -> Any:
        try:
            self.pipe.send((images, seconds))
        except OSError as error:
            raise UserError(f"its process ended ({error})") from error
        return self.answer()

    def answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise UserError(f"its process ended with status {self.process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        try:
            self.pipe.send(None)
            self.process.join(5)
        except OSError:
            pass
        self.process.kill()


def benchmark(
    student: Path,
    artefacts: list[Path],
    batches: list[np.ndarray],
    validation: list[tuple[np.ndarray, np.ndarray]],
    seconds: float = 3.0,
    rounds: int = 6,
    eager: bool = True,
    compile: bool = False,
    on: RunOn = RunOn(),  # noqa: B008 - frozen
) -> list[dict[str, Any]]:
    """A row per runtime and batch; torch eager's come first where it is wanted, and every ratio is to them.

    Args:
        student: the student/ folder
        artefacts: files that deploy/ made of it
        batches: what to time, each uint8 (N, H, W, 3)
        validation: (images, labels) for top-1; may be empty
        seconds: measured of each row, in `rounds` turns
        eager: a row of the student/ folder itself, by torch
        compile: and one by torch.compile
        on: where the runtimes run
    """
    torch_on = dataclasses.replace(on, device=on.device.replace("tensorrt", "cuda"))
    entries = [(student, torch_on)] if eager else []
    entries += [(student, dataclasses.replace(torch_on, compile=True))] if compile else []
    entries += [(path, on) for path in artefacts]
    workers: list[Worker] = []
    rows: list[dict[str, Any]] = []
    timed: list[tuple[Worker, np.ndarray, dict[str, Any], list[Slice]]] = []
    try:
        for path, path_on in ProgressBar(entries, "load", unit="files"):
            weights = path / "model.safetensors" if path.is_dir() else path
            size = weights.stat().st_size / 1e6
            row: dict[str, Any] = {"artefact": "student/" if path.is_dir() else path.name, "mb": size}
            try:
                worker = Worker(path, path_on)
                workers.append(worker)
                row |= {
                    "runtime": worker.name,
                    "provider": worker.provider,
                    "precision": worker.metadata.precision,
                    "threads": on.threads or os.cpu_count(),
                    "load_s": worker.load_s,
                    "build_s": worker.metadata.built.get("build_s"),
                }
                if validation:
                    hits = sum(int((worker.ask(x).argmax(1) == y).sum()) for x, y in validation)
                    row["top1"] = 100 * hits / sum(len(y) for _, y in validation)
            except UserError as error:
                rows.append(row | {"failed": str(error)})
                continue
            for images in batches:
                if len(images) > (worker.max_batch or len(images)):
                    rows.append(row | {"batch": len(images), "failed": f"the engine takes {worker.max_batch} at most"})
                else:
                    rows.append(row | {"batch": len(images)})
                    timed.append((worker, images, rows[-1], []))

        turns = [entry for _ in range(rounds) for entry in timed]
        for worker, images, row, slices in ProgressBar(turns, "measure", unit="turns"):
            if "failed" not in row:
                try:
                    slices.append(worker.ask(images, seconds / rounds))
                except UserError as error:
                    row["failed"] = str(error)
                time.sleep(PAUSE_S)
    finally:
        for worker in workers:
            worker.close()

    for _, _, row, slices in timed:
        if "failed" not in row:
            row |= summarise(slices, row["batch"])
    for row in rows:
        torchs = next((r for r in rows if r.get("batch") == row.get("batch") and r.get("runtime") == "torch"), None)
        if torchs and "p50_ms" in torchs and "p50_ms" in row:
            row["times_eager"] = torchs["p50_ms"] / row["p50_ms"]
    return rows


def summarise(slices: list[Slice], batch: int) -> dict[str, Any]:
    latencies = np.concatenate([part.latencies for part in slices])
    p50, p90, p99 = np.percentile(1e3 * latencies, (50, 90, 99))
    joules = [part.joules for part in slices]
    images = batch * len(latencies)
    return {
        "calls": len(latencies),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "images_per_s": images / latencies.sum(),
        "cpu/wall": sum(part.cpu_s for part in slices) / sum(part.wall_s for part in slices),
        "mj_per_image": None if None in joules else 1e3 * sum(joules) / images,  # type: ignore[arg-type]
    }


class EnergyMeter:
    """Joules of the GPU between start and stop by NVML, or of a Jetson's board by tegrastats; None without either."""

    def __init__(self) -> None:
        self.gpu: Any = None
        self.process: subprocess.Popen[str] | None = None
        self.tegrastats = shutil.which("tegrastats")
        try:
            import pynvml

            pynvml.nvmlInit()
            self.gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.counter = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self.gpu) / 1e3
            self.counter()
        except Exception:  # no pynvml, no driver, or a GPU that does not count
            self.gpu = None

    def start(self) -> None:
        self.started = time.perf_counter()
        if self.gpu:
            self.before = self.counter()
        elif self.tegrastats:
            self.watts: list[float] = []
            self.process = subprocess.Popen([self.tegrastats, "--interval", "50"], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        assert self.process
        assert self.process.stdout
        self.watts.extend(filter(None, map(board_watts, self.process.stdout)))

    def stop(self) -> float | None:
        if self.gpu:
            return self.counter() - self.before
        if self.tegrastats:
            self.close()
            return float(np.mean(self.watts)) * (time.perf_counter() - self.started) if self.watts else None
        return None

    def close(self) -> None:
        """End tegrastats, where it runs."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None


def board_watts(line: str) -> float | None:
    """The whole board's power in a line of tegrastats: VDD_IN, on AGX modules the sum of the rails."""
    rails = {name: int(now) for name, now in re.findall(r"(V\w+) (\d+)mW/\d+mW", line)}
    if not rails:
        return None
    return rails.get("VDD_IN", sum(rails.values())) / 1e3


def describe_machine() -> dict[str, Any]:
    """Versions, device, clocks, power mode and load: what a figure means nothing without."""
    packages = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-bindings", "numpy")
    installed = {package: version(package) for package in packages}
    versions = {"python": platform.python_version()}
    versions |= {package: number for package, number in installed.items() if number != "not installed"}
    cpu = re.search(r"^model name\s*: (.*)$", read("/proc/cpuinfo"), re.M)
    machine: dict[str, Any] = {
        "versions": versions,
        "cpu": f"{cpu[1] if cpu else read('/proc/device-tree/model') or platform.machine()}, {os.cpu_count()} cores",
        "cpu_clock": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq") or "unknown",
        "cpu_governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
        "gpu": query(["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem,power.limit,temperature.gpu",
                      "--format=csv,noheader"]) or ("yes" if cuda_device_count() else "none"),
        "power_mode": query(["nvpmodel", "-q"]) or "unknown",
    }  # fmt: skip
    return machine


def read(file: str) -> str:
    try:
        return Path(file).read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def query(program: list[str]) -> str:
    try:
        return " ".join(subprocess.run(program, capture_output=True, text=True, timeout=10, check=True).stdout.split())
    except (OSError, subprocess.SubprocessError):
        return ""


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Latency against accuracy at the smallest batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batch = min(row["batch"] for row in rows)
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in (row for row in rows if row["batch"] == batch):
        (point,) = axis.plot(row["p50_ms"], row["top1"], "o", label=f"{row['artefact']} ({row['runtime']})")
        axis.hlines(row["top1"], row["p50_ms"], row["p90_ms"], colors=point.get_color())
    axis.set(xlabel=f"latency at batch {batch}, ms: p50, line to p90", ylabel="top-1 (%)", xlim=(0, None))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    write_whole(file, image.getvalue())


def get_parser() -> Parser:
    parser = make_parser(__doc__, "benchmark")
    add_quiet(parser)
    parser.add_argument("student", type=Path, help="a run's student/ folder, or the run directory")
    parser.add_argument("artefacts", nargs="*", help="files to time (default: all in the folder)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images a call (default: 1 16)")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured of each row (default: 3)")
    parser.add_argument("--rounds", type=int, default=6, help="turns that the seconds are split into (default: 6)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (takes a minute to warm up)")
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="images for the accuracy, evenly spaced; 0: none (default: 1000, or as many as there are)",
    )
    add_reference(parser)
    parser.add_argument("--output", type=Path, help="folder of benchmark.json and .png (default: the student's)")
    add_json(parser, "benchmark.json")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if min(args.batches) < 1 or args.rounds < 1 or not args.seconds > 0 or args.images < 0:
        raise UserError("--batches and --rounds must be at least 1, --seconds more than 0, --images at least 0")
    pick_device(args.device, cuda_device_count() > 0, args.allow_fallback)  # one line, not one for each row
    student = student_folder(args.student)
    artefacts = find_artefacts(student, args.artefacts)
    output = args.output or student
    make_folder(output)
    config = read_config(student)
    channels, height, width = config.input_size
    validation: list[tuple[np.ndarray, np.ndarray]] = []
    if find_reference(student, args.reference):
        reference = read_reference(student, args.reference, "").some(args.images or None)
        pool = reference.images
        if args.images:
            validation = [(pool[i : i + 64], reference.labels[i : i + 64]) for i in range(0, len(pool), 64)]
        note(f"{len(pool)} validation images of the reference")
    else:
        pool = np.random.default_rng(0).integers(0, 256, (64, height, width, channels), dtype=np.uint8)
        note(f"no {NAME} beside {student}: timed on noise, and no accuracy")
    eager = has_torch() and (student / "model.safetensors").is_file()
    if args.compile and not eager:
        raise UserError("--compile needs torch and the weights of the student")
    if not eager:
        note("torch is not installed here, or the weights are not: no row of torch eager")
    batches = [pool[np.arange(size) % len(pool)] for size in sorted(set(args.batches))]
    machine = describe_machine()
    rows = benchmark(
        student, artefacts, batches, validation, args.seconds, args.rounds, eager, args.compile,
        RunOn.from_args(args),
    )  # fmt: skip
    machine["load_after"] = "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())

    result = {"machine": machine, "model": config.architecture, "input_size": config.input_size, "rows": rows}
    text = json.dumps(result, indent=2)
    write_whole(output / "benchmark.json", text + "\n")
    if args.json:
        print(text)
    else:
        note(f"{config.architecture} at {height}x{width}")
        for key, value in machine.items():
            note(f"{key}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}")
        empty = {name for name in COLUMNS if all(row.get(name) is None for row in rows)}
        note("")
        print(table(rows, {name: form for name, form in COLUMNS.items() if name not in empty}))
    shown = [row for row in rows if "failed" not in row and "top1" in row]
    if shown and importlib.util.find_spec("matplotlib"):
        plot(shown, output / "benchmark.png")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

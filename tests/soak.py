"""Run the server for half an hour at 80 % of its peak rate, with some hostile requests.

    python tests/soak.py STUDENT.onnx --minutes 30

The script first measures the peak rate with clients that wait for each answer. Then it sends requests at a steady rate,
without waiting for answers. One in twenty is a hostile request from tests/server/test_serve_bounds.py. The script
compares each answer with the runtime's, and prints a line per minute. The exit status is 1 after a wrong answer or a
refused good request, if memory grows by more than 2 %, or if p99 in the last third of the time is more than twice that
in the first third. Client and server share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.cli import UserError, command, make_parser, number
from deploy.runtimes import RunOn, load

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 32  # number of different images
WARM_UP = 2  # minutes at the start, which do not count for memory and p99
KEPT_S = 30  # seconds that an idle connection stays open: half of the server's limit
OUTSTANDING = 400  # unanswered requests; with more of them the script sends no request


class Client:
    """Keep connections open, as a proxy does, but close them before the server does."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Return (status, body) of a request; status 0 if the server closes the connection without an answer."""
        while self.idle and self.idle[0][0] < time.monotonic() - KEPT_S:
            self.idle.pop(0)[2].close()
        if self.idle:
            _, reader, writer = self.idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"\ncontent-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return 0, b""
        if b"connection: close" in head:
            writer.close()
        else:
            self.idle.append((time.monotonic(), reader, writer))
        return int(head.split()[1]), body


def http(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body


def good_requests(artefact: Path) -> list[tuple[bytes, np.ndarray]]:
    """Return requests with one raw image each, and the logits of each image."""
    runtime = load(artefact, RunOn("cpu", threads=1))
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *runtime.image_shape), dtype=np.uint8)
    raw = {"Inference-Header-Content-Length": "0"}
    return [(http("/v2/models/student/infer", image.tobytes(), raw), runtime.run(image[None])[0]) for image in images]


def is_right(answer: bytes, logits: np.ndarray) -> bool:
    found = np.frombuffer(answer[-4 * len(logits) :], "<f4")
    return len(found) == len(logits) and np.allclose(found, logits, rtol=1e-3, atol=1e-4)


async def measure_peak(client: Client, good: list[tuple[bytes, np.ndarray]], seconds: float) -> float:
    """Return the number of requests per second of 16 clients that wait for each answer."""
    until, answered = time.monotonic() + seconds, 0

    async def one(first: int) -> None:
        nonlocal answered
        while time.monotonic() < until:
            request, logits = good[first % IMAGES]
            status, body = await client.ask(request)
            if status != 200 or not is_right(body, logits):
                raise UserError(f"the peak cannot be measured: {status} {body[:200]!r}")
            first, answered = first + 1, answered + 1

    await asyncio.gather(*(one(first) for first in range(16)))
    return answered / seconds


class Minute:
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: list[float] = []  # MiB
        self.statuses: Counter[str] = Counter()


async def soak(client: Client, pid: int, good: Any, hostile: dict[str, Any], rate: float, args: Any) -> list[Minute]:
    random = np.random.default_rng(1)
    kinds = {name: http(path, body, headers) for name, (path, body, headers, _) in hostile.items()}
    minutes = [Minute()]
    under_way: set[asyncio.Task[None]] = set()

    async def ask_good(minute: Minute, request: bytes, logits: np.ndarray) -> None:
        started = time.perf_counter()
        status, body = await client.ask(request)
        minute.seconds.append(time.perf_counter() - started)
        minute.statuses["right" if status == 200 and is_right(body, logits) else f"good: {status}"] += 1

    async def ask_hostile(minute: Minute, name: str) -> None:
        status, _ = await client.ask(kinds[name])
        # 503: the budget of pixels is in use
        minute.statuses["hostile" if status in (hostile[name][3], 503) else f"hostile: {name}: {status}"] += 1

    began = time.monotonic()
    seconds = sent = 0
    while (now := time.monotonic() - began) < 60 * args.minutes:
        if now >= 60 * len(minutes):
            show(len(minutes), minutes[-1], pid)
            minutes.append(Minute())
        if now > seconds:
            seconds += 1
            minutes[-1].memory.append(resident_mib(pid))
        while sent < now * rate:
            sent += 1
            if len(under_way) > OUTSTANDING:
                minutes[-1].statuses["not sent"] += 1
                continue
            if random.random() < args.hostile:
                task = asyncio.create_task(ask_hostile(minutes[-1], str(random.choice(list(kinds)))))
            else:
                task = asyncio.create_task(ask_good(minutes[-1], *good[sent % IMAGES]))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.sleep(0.002)
    await asyncio.gather(*under_way)
    show(len(minutes), minutes[-1], pid)
    return minutes


def show(number: int, minute: Minute, pid: int) -> None:
    p50, p99 = 1e3 * np.percentile(minute.seconds, (50, 99))
    print(f"minute {number:2}: {len(minute.seconds)} good requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms, memory "
          f"{memory_of(minute):.1f} MiB, {cpu_s(pid):.0f} s of CPU so far, {dict(minute.statuses)}, load "
          f"{os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip


def memory_of(minute: Minute) -> float:
    """Return the 10th percentile of the memory in MiB, because a large image may be in memory at some moments."""
    return float(np.percentile(minute.memory, 10))


def resident_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(ROOT / "tests" / "server"))
    from test_serve_bounds import HOSTILE

    good = good_requests(args.artefact)
    flags = ["--port", "0", "--threads", "1", "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "deploy.serve", str(args.artefact.resolve()), *flags],
                              cwd=ROOT, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert server.stdout is not None
    try:
        client = Client(int(server.stdout.readline().rpartition(":")[2]))

        async def whole() -> tuple[float, list[Minute]]:
            await measure_peak(client, good, 2)
            peak = await measure_peak(client, good, args.peak_seconds)
            print(f"peak: {peak:.1f} images/s; {args.share:.0%} of it for {args.minutes:g} minutes, {args.hostile:.0%} "
                  "hostile", flush=True)  # fmt: skip
            return peak, await soak(client, server.pid, good, HOSTILE, args.share * peak, args)

        peak, minutes = asyncio.run(whole())
    finally:
        server.terminate()
        ended = server.wait()
    counted = minutes[WARM_UP:] or minutes
    third = max(1, len(counted) // 3)
    memory = [memory_of(minute) for minute in counted]
    p99 = [1e3 * float(np.percentile(minute.seconds, 99)) for minute in counted]
    total = sum((minute.statuses for minute in minutes), Counter())
    grown = np.median(memory[-third:]) / np.median(memory[:third]) - 1
    slower = np.median(p99[-third:]) / np.median(p99[:third])
    wrong = {name: count for name, count in total.items() if name not in ("right", "hostile", "not sent")}
    print(json.dumps({
        "peak images/s": round(peak, 1), "right": total["right"], "hostile, answered correctly": total["hostile"],
        "wrong": wrong, "not sent: too many unanswered": total["not sent"], "memory grew by %": round(100 * grown, 2),
        "p99 ms, first and last third": [round(float(np.median(part)), 1) for part in (p99[:third], p99[-third:])],
        "exit status of the server": ended,
    }, indent=2))  # fmt: skip
    return 1 if wrong or ended or grown > 0.02 or slower > 2 else 0


parser = make_parser(__doc__, "soak.py")
parser.add_argument("artefact", type=Path, help="an .onnx file of deploy.export")
parser.add_argument("--minutes", type=number(float, 0, above=True), default=30.0)
parser.add_argument(
    "--share", type=number(float, 0, 1, above=True), default=0.8, help="share of the peak (default: 0.8)"
)
parser.add_argument("--hostile", type=number(float, 0, 1), default=0.05, help="share of the requests (default: 0.05)")
parser.add_argument("--peak-seconds", type=number(float, 1), default=20.0)

if __name__ == "__main__":
    sys.exit(command(parser, run))

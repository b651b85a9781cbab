"""The server's throughput beside the runtime's own, in turns: python examples/benchmark_serve.py STUDENT.onnx

The runtime alone: a process that calls it in a loop at the server's largest batch, and at 1; the better of the two
counts. The server: deploy.serve in a process of its own, and here as many clients as --concurrency says, each sending
its next image (binary tensor) when the last is answered. Client and server share this machine's cores, so leave one to
them: --threads should be the cores less one.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.benchmark import Entry, Worker
from deploy.cli import add_device, command, make_parser
from deploy.runtimes import INPUT_NAME

ROOT = Path(__file__).resolve().parents[1]


def request_of(image: np.ndarray) -> bytes:
    tensor = {"name": INPUT_NAME, "datatype": "UINT8", "shape": [1, *image.shape]}
    tensor["parameters"] = {"binary_data_size": image.size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return (
        f"POST /v2/models/student/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(head) + image.size}\r\n\r\n"
    ).encode() + head + image.tobytes()  # fmt: skip


async def client(port: int, request: bytes, until: float, seconds: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (started := time.perf_counter()) < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        seconds.append(time.perf_counter() - started)
    writer.close()


async def load_server(port: int, request: bytes, concurrency: int, duration: float) -> list[float]:
    seconds: list[float] = []
    until = time.perf_counter() + duration
    await asyncio.gather(*(client(port, request, until, seconds) for _ in range(concurrency)))
    return seconds


def run(args: argparse.Namespace) -> None:
    options = dict(device=args.device, threads=args.threads, allow_fallback=args.allow_fallback)
    worker = Worker(Entry(args.artefact, False, options))
    channels, height, width = worker.metadata["input_size"]
    images = np.random.default_rng(0).integers(0, 256, (args.max_batch, height, width, channels), dtype=np.uint8)
    flags = ["--port", "0", "--threads", str(args.threads), "--device", args.device, "--max-batch", str(args.max_batch)]
    flags += ["--max-delay", str(args.max_delay)] + ["--allow-fallback"] * args.allow_fallback
    server = subprocess.Popen([sys.executable, "-m", "deploy.serve", str(args.artefact), *flags],
                              cwd=ROOT, stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        port = int(said.rpartition(":")[2])
        rounds = []
        for _ in range(args.rounds):
            own = {}
            for batch in (1, args.max_batch):
                part = worker.ask(images[:batch], args.seconds)
                own[batch] = batch * len(part.latencies) / part.wall_s
            seconds = asyncio.run(load_server(port, request_of(images[0]), args.concurrency, args.seconds))
            rounds.append((own, len(seconds) / args.seconds, 1e3 * np.percentile(seconds, (50, 99))))
    finally:
        server.terminate()
        server.wait()
        worker.close()
    print(f"{args.artefact.name}, {worker.name}, {worker.provider}, {args.threads or 'all'} threads, "
          f"{os.cpu_count()} cores; {args.rounds} rounds of {args.seconds:g} s each")  # fmt: skip
    for batch in sorted({1, args.max_batch}):
        print(f"the runtime alone, batch {batch}: {statistics.median(own[batch] for own, _, _ in rounds):.1f} images/s")
    p50, p99 = np.median([latency for _, _, latency in rounds], axis=0)
    print(f"deploy.serve, {args.concurrency} clients: {statistics.median(rate for _, rate, _ in rounds):.1f} images/s, "
          f"p50 {p50:.1f} ms, p99 {p99:.1f} ms")  # fmt: skip
    best = max((1, args.max_batch), key=lambda batch: statistics.median(own[batch] for own, _, _ in rounds))
    ratios = [rate / own[best] for own, rate, _ in rounds]
    print(f"server / runtime: {statistics.median(ratios):.3f} (median; {min(ratios):.3f} to {max(ratios):.3f})")


parser = make_parser(__doc__, "benchmark_serve.py")
parser.add_argument("artefact", type=Path, help="as of deploy.serve, best an absolute path")
parser.add_argument("--concurrency", type=int, default=16)
parser.add_argument("--max-batch", type=int, default=8)
parser.add_argument("--max-delay", type=float, default=1.0, help="milliseconds")
parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
parser.add_argument("--rounds", type=int, default=10)
add_device(parser)

if __name__ == "__main__":
    sys.exit(command(parser, run))

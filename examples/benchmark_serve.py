"""Compare the throughput of the server and of the runtime alone: python examples/benchmark_serve.py STUDENT.onnx

To measure the runtime alone, a process calls it in a loop, with batch 1 and with the server's largest batch. The higher
rate counts. The server is deploy.serve in another process. The --concurrency clients are in this process. Each client
sends its next image (a binary tensor) after the answer to the previous image. Clients and server share this machine's
cores, so leave one core for the clients: set --threads to the number of cores minus one.

--litserve PYTHON also measures LitServe. The servers take turns. PYTHON is an interpreter with litserve and the same
version of onnxruntime. Each server gets the image in its shortest form: deploy.serve as a binary tensor, LitServe as
base64 in JSON. CPU seconds include all processes of a server.
"""

import argparse
import asyncio
import base64
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.benchmark import Worker
from deploy.cli import UserError, add_device, command, make_parser
from deploy.runtimes import INPUT_NAME, RunOn

ROOT = Path(__file__).resolve().parents[1]


def request_of(image: np.ndarray) -> bytes:
    tensor = {"name": INPUT_NAME, "datatype": "UINT8", "shape": [1, *image.shape]}
    tensor["parameters"] = {"binary_data_size": image.size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return (
        f"POST /v2/models/student/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(head) + image.size}\r\n\r\n"
    ).encode() + head + image.tobytes()  # fmt: skip


LITSERVE = """
import base64, sys
import litserve, numpy, onnxruntime
path, port, max_batch, delay, threads, *shape = sys.argv[1:]
shape = tuple(map(int, shape))
class Classifier(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    def decode_request(self, request):
        return numpy.frombuffer(base64.b64decode(request["image"]), numpy.uint8).reshape(shape)
    def batch(self, images):
        return numpy.stack(images)
    def predict(self, images):
        return self.session.run(["logits"], {"images": images})[0]
    def unbatch(self, logits):
        return list(logits)
    def encode_response(self, logits):
        return {"logits": logits.tolist()}
if __name__ == "__main__":
    api = Classifier(max_batch_size=int(max_batch), batch_timeout=float(delay) / 1000)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(port=int(port), host="127.0.0.1", log_level="error", generate_client_file=False)
"""


def litserve_request(image: np.ndarray) -> bytes:
    body = json.dumps({"image": base64.b64encode(image.tobytes()).decode()}).encode()
    return (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        b"%d\r\n\r\n" % len(body) + body
    )


def start_litserve(args: argparse.Namespace, shape: tuple[int, ...]) -> tuple[subprocess.Popen, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as script:  # each process of LitServe imports it
        script.write(LITSERVE)
    given = [args.artefact.resolve(), port, args.max_batch, args.max_delay, args.threads, *shape]
    server = subprocess.Popen([args.litserve, script.name, *map(str, given)], stdout=subprocess.DEVNULL,
                              start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(2)  # LitServe's worker loads the file
                return server, port
        time.sleep(0.2)
    os.killpg(server.pid, signal.SIGKILL)
    raise UserError(f"LitServe did not start with {args.litserve}: install litserve and onnxruntime there")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of all processes that it started."""
    total, left = 0.0, [pid]
    children: dict[int, list[int]] = {}
    fields = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
    for child, values in fields.items():
        children.setdefault(int(values[1]), []).append(child)
    while left:
        one = left.pop()
        total += (int(fields[one][11]) + int(fields[one][12])) / os.sysconf("SC_CLK_TCK")
        left += children.get(one, [])
    return total


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
    worker = Worker(args.artefact, RunOn.from_args(args))
    channels, height, width = worker.metadata.input_size
    images = np.random.default_rng(0).integers(0, 256, (args.max_batch, height, width, channels), dtype=np.uint8)
    flags = ["--port", "0", "--threads", str(args.threads), "--device", args.device, "--max-batch", str(args.max_batch)]
    flags += ["--max-delay", str(args.max_delay)] + ["--allow-fallback"] * args.allow_fallback
    server = subprocess.Popen([sys.executable, "-m", "deploy.serve", str(args.artefact), *flags],
                              cwd=ROOT, stdout=subprocess.PIPE, text=True)  # fmt: skip
    others = {}
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        servers = {"deploy.serve": (server, int(line.rpartition(":")[2]), request_of(images[0]))}
        if args.litserve:
            others["LitServe"] = start_litserve(args, images[0].shape)
            servers["LitServe"] = (*others["LitServe"], litserve_request(images[0]))
        for _, port, request in servers.values():
            asyncio.run(load_server(port, request, args.concurrency, 1.0))  # warm-up
        own: dict[int, list[float]] = {1: [], args.max_batch: []}
        rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in servers}
        for _ in range(args.rounds):
            for batch in own:
                part = worker.ask(images[:batch], args.seconds)
                own[batch].append(batch * len(part.latencies) / part.wall_s)
            for name, (process, port, request) in servers.items():
                before = cpu_s(process.pid)
                seconds = asyncio.run(load_server(port, request, args.concurrency, args.seconds))
                spent = 1000 * (cpu_s(process.pid) - before) / len(seconds)
                rows[name].append((len(seconds) / args.seconds, *(1e3 * np.percentile(seconds, (50, 99))), spent))
    finally:
        server.terminate()
        server.wait()
        for process, _ in others.values():
            os.killpg(process.pid, signal.SIGKILL)  # the group, because the child processes would continue
        worker.close()
    print(f"{args.artefact.name}, {worker.name}, {worker.provider}, {args.threads or 'all'} threads, "
          f"{os.cpu_count()} cores; {args.rounds} rounds of {args.seconds:g} s each, medians")  # fmt: skip
    for batch, rates in own.items():
        print(f"the runtime alone, batch {batch}: {statistics.median(rates):.1f} images/s")
    best = max(own, key=lambda batch: statistics.median(own[batch]))
    for name, row in rows.items():
        rate, p50, p99, spent = np.median(row, axis=0)
        ratios = [values[0] / alone for values, alone in zip(row, own[best])]
        print(f"{name}, {args.concurrency} clients: {rate:.1f} images/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
              f"{spent:.2f} s of CPU for 1,000 images; rate / runtime's rate: {statistics.median(ratios):.3f} "
              f"({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    if args.litserve:
        spent = [[values[3] for values in row] for row in rows.values()]
        print(f"CPU for an image / LitServe's CPU: {statistics.median(a / b for a, b in zip(*spent)):.2f}")


parser = make_parser(__doc__, "benchmark_serve.py")
parser.add_argument("artefact", type=Path, help="absolute path of an exported file")
parser.add_argument("--concurrency", type=int, default=16, help="number of clients (default: 16)")
parser.add_argument("--max-batch", type=int, default=8, help="largest batch of the server (default: 8)")
parser.add_argument("--max-delay", type=float, default=1.0, help="milliseconds that a request waits for others")
parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each measurement")
parser.add_argument("--rounds", type=int, default=10)
parser.add_argument("--litserve", metavar="PYTHON", help="also measure LitServe, run by this Python")
add_device(parser)

if __name__ == "__main__":
    sys.exit(command(parser, run))

"""Serve one ONNX file with deploy.serve and with NVIDIA's Triton, and compare their answers to the same requests.

    /usr/bin/python3 -m venv /tmp/triton && /tmp/triton/bin/pip install nvidia-pytriton onnxruntime
    python tests/compare_triton.py STUDENT.onnx --triton /tmp/triton/bin/python

nvidia-pytriton contains a real Triton. In this script Triton's Python backend runs the file with ONNX Runtime.
nvidia-pytriton requires the system's Python. It disables statistics, the model repository and the status of shared
memory, so the script does not compare these. The script prints each request whose status or outputs differ. The exit
status is 1 if a difference is not in KNOWN or if a difference in KNOWN has disappeared. deploy/serving.md explains the
known differences.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.cli import UserError, command, make_parser
from deploy.runtimes import RunOn, load

ROOT = Path(__file__).resolve().parents[1]

TRITON = """
import sys, numpy as np, onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
path, port, *shape = sys.argv[1:]
shape, classes = tuple(map(int, shape[:3])), int(shape[3])
session = onnxruntime.InferenceSession(path)
@batch
def infer(images):
    return {"logits": session.run(["logits"], {"images": images})[0]}
ports = {"http_port": int(port), "grpc_port": int(port) + 1, "metrics_port": int(port) + 2}
with Triton(config=TritonConfig(**ports)) as triton:
    triton.bind("student", infer, [Tensor(name="images", dtype=np.uint8, shape=shape)],
                [Tensor(name="logits", dtype=np.float32, shape=(classes,))], config=ModelConfig(max_batch_size=8))
    triton.serve()
"""

MISTAKE = "a mistake of the client: 400 from deploy.serve, 500 from Triton"
LABELS = "deploy.serve returns the labels; pytriton has no label file (deploy.triton writes one)"
LABELLED = ("classification", "classification, binary", "classification of too many classes")
KNOWN = {
    "another model ready": "a missing model or version: 404 from deploy.serve, 400 from Triton",
    "another version ready": "a missing model or version: 404 from deploy.serve, 400 from Triton",
    "an unknown encoding": "415 from deploy.serve, as in RFC 9110; 501 from Triton",
    "gzip of two members": "RFC 1952 allows two members; Triton reads only the first",
    "nested differently": "deploy.serve accepts a tensor nested as its shape, or flat; Triton accepts any nesting",
    "256": "not a UINT8: deploy.serve refuses it, Triton takes it modulo 256",
    "1.0": "a whole number: deploy.serve accepts it, Triton refuses it",
    "output in shared memory": "400 from deploy.serve: not supported; 404 from Triton: the region is not registered",
} | dict.fromkeys(LABELLED, LABELS) | dict.fromkeys((
    "id that is a number", "binary size as text", "classification as text", "classification below 0",
    "binary_data as text", "binary_data as a number", "binary_data_output as text", "one number too few",
    "one number too many", "-1", "0.5", "text instead of numbers", "not JSON",
), MISTAKE)  # fmt: skip


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(port: int, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            status, given, content = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        status, given, content = error.code, error.headers, error.read()
    lowered = {name.lower(): value for name, value in given.items()}
    if lowered.get("content-encoding") == "gzip":
        content = gzip.decompress(content)
    return Answer(status, lowered, content)


def requests(shape: tuple[int, int, int]) -> dict[str, tuple[str, bytes | None, dict[str, str]]]:
    """Return the requests: {name: (path, body, headers)}."""
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    size = images[0].size
    infer = "/v2/models/student/infer"

    def tensor(**changes: Any) -> dict[str, Any]:
        return {
            "name": "images",
            "datatype": "UINT8",
            "shape": [1, *shape],
            "data": images[0].ravel().tolist(),
        } | changes

    def of(outputs: Any = None, headers: dict[str, str] | None = None, given: Any = None, **request: Any) -> Any:
        content = {"inputs": [tensor() if given is None else given]} | request
        if outputs is not None:
            content["outputs"] = outputs
        return infer, json.dumps(content).encode(), headers or {}

    def binary(raw: bytes, size: Any, images: int = 1, **request: Any) -> Any:
        given = tensor(shape=[images, *shape], parameters={"binary_data_size": size})
        del given["data"]
        head = json.dumps({"inputs": [given]} | request).encode()
        return infer, head + raw, {"Inference-Header-Content-Length": str(len(head))}

    def output(**parameters: Any) -> list[dict[str, Any]]:
        return [{"name": "logits", "parameters": parameters}]

    good = of()[1]
    one, two = images[0].tobytes(), images.tobytes()
    region = {"shared_memory_region": "r", "shared_memory_byte_size": size}
    raw = {"Inference-Header-Content-Length": "0"}
    packed = {"Content-Encoding": "gzip"}
    return {
        "live": ("/v2/health/live", None, {}),
        "ready": ("/v2/health/ready", None, {}),
        "model ready": ("/v2/models/student/ready", None, {}),
        "version ready": ("/v2/models/student/versions/1/ready", None, {}),
        "another model ready": ("/v2/models/another/ready", None, {}),
        "another version ready": ("/v2/models/student/versions/2/ready", None, {}),
        "metadata": ("/v2/models/student", None, {}),
        "metadata of a version": ("/v2/models/student/versions/1", None, {}),
        "metadata of another": ("/v2/models/another", None, {}),
        "config": ("/v2/models/student/config", None, {}),
        "config of a version": ("/v2/models/student/versions/1/config", None, {}),
        "an unknown path": ("/v2/nothing", None, {}),
        "infer by GET": (infer, None, {}),
        "flat": of(),
        "nested": of(given=tensor(data=images[0][None].tolist())),
        "nested differently": of(given=tensor(data=images[0].reshape(2, -1).tolist())),
        "infer with a version": ("/v2/models/student/versions/1/infer", good, {}),
        "infer with another version": ("/v2/models/student/versions/2/infer", good, {}),
        "infer with another model": ("/v2/models/another/infer", good, {}),
        "id": of(id="7"),
        "id that is a number": of(id=7),
        "binary": binary(one, size),
        "binary answer": binary(one, size, parameters={"binary_data_output": True}),
        "binary of another size": binary(one, size - 1),
        "binary with one byte too many": binary(one + b"x", size),
        "binary with one byte too few": binary(one[:-1], size),
        "binary size as text": binary(one, str(size)),
        "raw": (infer, one, raw),
        "raw of two images": (infer, two, raw),
        "raw without bytes": (infer, b"", raw),
        "raw, packed": (infer, gzip.compress(one), raw | packed),
        "header length beyond the body": (infer, good, {"Inference-Header-Content-Length": "99999"}),
        "header length that is text": (infer, good, {"Inference-Header-Content-Length": "x"}),
        "gzip": (infer, gzip.compress(good), packed),
        "gzip of two members": (infer, gzip.compress(good[:99]) + gzip.compress(good[99:]), packed),
        "JSON as gzip": (infer, good, packed),
        "an unknown encoding": (infer, good, {"Content-Encoding": "br"}),
        "classification": of(output(classification=2)),
        "classification, binary": of(output(classification=2, binary_data=True)),
        "classification of too many classes": of(output(classification=10_000)),
        "classification as text": of(output(classification="2")),
        "classification below 0": of(output(classification=-1)),
        "binary_data as text": of(output(binary_data="false")),
        "binary_data as a number": of(output(binary_data=1)),
        "binary_data_output as text": of(parameters={"binary_data_output": "false"}),
        "the output twice": of(output() + output(binary_data=True)),
        "an empty list of outputs": of([]),
        "another output": of([{"name": "scores"}]),
        "another input": of(given=tensor(name="image")),
        "the input twice": of(inputs=[tensor(), tensor()]),
        "no input": of(inputs=[]),
        "another datatype": of(given=tensor(datatype="FP32")),
        "another shape": of(given=tensor(shape=[1, 3, *shape[:2]])),
        "no image": of(given=tensor(shape=[0, *shape], data=[])),
        "too many images": binary(bytes(9 * size), 9 * size, images=9),
        "one number too few": of(given=tensor(data=[0] * (size - 1))),
        "one number too many": of(given=tensor(data=[0] * (size + 1))),
        "256": of(given=tensor(data=[256] * size)),
        "-1": of(given=tensor(data=[-1] * size)),
        "0.5": of(given=tensor(data=[0.5] * size)),
        "1.0": of(given=tensor(data=[1.0] * size)),
        "text instead of numbers": of(given=tensor(data=["1"] * size)),
        "no data": of(given={key: value for key, value in tensor().items() if key != "data"}),
        "not JSON": (infer, b"{", {}),
        "an empty body": (infer, b"", {}),
        "other parameters": of(parameters={"a": "x", "b": 1, "c": True, "d": 1.5}),
        "a parameter that is a list": of(parameters={"a": [1]}),
        "a parameter that is null": of(parameters={"a": None}),
        "priority and timeout": of(parameters={"priority": 1, "timeout": 10_000_000}),
        "a sequence": of(parameters={"sequence_id": 7, "sequence_start": True, "sequence_end": True}),
        "input in shared memory": of(given=tensor(parameters=region)),
        "output in shared memory": of(output(**region)),
    }  # fmt: skip


def outputs(answer: Answer) -> Any:
    """Return the id, the encoding and the outputs of an inference response; None if it has no outputs."""
    if b'"outputs"' not in answer.body or answer.status != 200:
        return None
    split = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    content, raw = json.loads(answer.body[:split]), answer.body[split:]
    found = []
    for output in content["outputs"]:
        values = output.get("data")
        if values is None and output["datatype"] == "FP32":
            values = struct.unpack(f"<{len(raw) // 4}f", raw)
        numbers = output["datatype"] == "FP32"
        values = [round(float(value), 3) for value in values] if numbers else values or raw
        found.append((output["name"], output["datatype"], output["shape"], list(values)))
    return content.get("id"), "binary" if raw else "JSON", found


def wait_for(port: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if ask(port, "/v2/models/student/ready").status == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise UserError(f"{process.args[0]} did not start")  # type: ignore[index]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run(args: Any) -> int:
    metadata = load(args.artefact, RunOn("cpu")).metadata
    channels, height, width = metadata.input_size
    shape, classes = (height, width, channels), len(metadata.label_names)
    ports = free_port(), free_port()
    path = str(args.artefact.resolve())
    ours = [sys.executable, "-m", "deploy.serve", path, "--port", str(ports[0]), "--device", "cpu"]
    triton = [args.triton, "-c", TRITON, path, str(ports[1]), *map(str, shape), str(classes)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    servers = [subprocess.Popen(ours, cwd=ROOT, **quiet), subprocess.Popen(triton, **quiet)]
    try:
        for port, server in zip(ports, servers):
            wait_for(port, server)
        cases = requests(shape)
        differ = {}
        for name, case in cases.items():
            mine, its = (ask(port, *case) for port in ports)
            if (mine.status, outputs(mine)) != (its.status, outputs(its)):
                differ[name] = mine, its
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    for name, (mine, its) in differ.items():
        print(f"{name}: {KNOWN.get(name, 'NOT KNOWN')}")
        for who, answer in (("kdlite", mine), ("triton", its)):
            print(f"    {who} {answer.status} {answer.body[: args.show]!r}")
    gone = [name for name in KNOWN if name not in differ]
    print(f"{len(cases)} requests, {len(differ)} answers differ, {len(set(differ) - set(KNOWN))} of them not known; "
          f"known differences that disappeared: {gone or 'none'}")  # fmt: skip
    return 1 if gone or set(differ) - set(KNOWN) else 0


parser = make_parser(__doc__, "compare_triton.py")
parser.add_argument("artefact", type=Path, help="an .onnx file of deploy.export")
parser.add_argument("--triton", required=True, help="the Python that has nvidia-pytriton and onnxruntime")
parser.add_argument("--show", type=int, default=160, help="number of bytes to print of each answer (default: 160)")

if __name__ == "__main__":
    sys.exit(command(parser, run))

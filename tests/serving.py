"""A server process, and a client that is in no hurry: what the tests of deploy.serve share."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from students import model_files, write_student

from deploy.export import export_student

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(__file__).with_name("own_models.py")
SHAPE = (16, 16, 3)
ONE = 16 * 16 * 3  # bytes of an image
NAMES = ["a cat", "a dog", "<b>café</b>", "d", "e", "f", "g"]
INFER = "/v2/models/student/infer"


def write_artefact(folder, names=NAMES):
    """A small student that tells photographs apart, exported."""
    write_student(folder / "student", f"{MODELS}:tiny", 16, names)
    return export_student(folder / "student", formats=("onnx",), model_file=model_files(folder / "student")[0])[0]


@contextlib.contextmanager
def server(artefact, *flags, limits=None, prefix=(), environment=()):
    """python -m deploy.serve; gives its process and port. limits: of Limits, those without a flag."""
    run = ["-m", "deploy.serve"]
    if limits:
        run = ["-c", "import functools, sys, deploy.serve as serve\n"
               f"serve.Limits = functools.partial(serve.Limits, **{limits})\n"
               "sys.exit(serve.command(serve.get_parser(), serve.run))"]  # fmt: skip
    process = subprocess.Popen(
        [*prefix, sys.executable, *run, artefact, "--port", "0", "--device", "cpu", "--drain", "0", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert "CPUExecutionProvider" in line, process.stderr.read()
        found = re.search(r"http://.*:(\d+)", line)  # a line of text, or of JSON with --log json
        yield process, int(found[1]) if found else None
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=30)


def ask(port, path, body=None, headers=(), method=None):
    """(status, headers, body) of a request."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def wait_until(true, seconds=30):
    """Ask until it is so; fails when it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def tensor(shape=(1, *SHAPE), **changes):
    return {"name": "images", "datatype": "UINT8", "shape": list(shape)} | changes


def binary(request, raw):
    head = json.dumps(request).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def of(shape=(1, *SHAPE), size=ONE, **changes):
    return {"inputs": [tensor(shape, parameters={"binary_data_size": size}) | changes]}


def metric(port, line):
    """The value of a line of /metrics."""
    text = ask(port, "/metrics")[2].decode()
    return next((float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line + " ")), 0.0)


def keep_alive(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    return connection

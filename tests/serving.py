"""Start servers in this process, in a thread or in another process, and send requests, for tests of deploy.serve."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from starlette.testclient import TestClient
from students import model_files, write_student

from deploy.export import export_student
from deploy.runtimes import RunOn, load
from deploy.server.app import Limits, StudentServer, make_app
from deploy.server.connections import listen, make_process

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(__file__).with_name("own_models.py")
SHAPE = (16, 16, 3)
ONE = 16 * 16 * 3  # number of bytes of an image
NAMES = ["a cat", "a dog", "<b>café</b>", "d", "e", "f", "g"]
INFER = "/v2/models/student/infer"
DEFAULT = Limits()
RAW = {"Inference-Header-Content-Length": "0"}


def write_artefact(folder, names=NAMES):
    """Write a small student whose logits differ between photographs, and export it."""
    write_student(folder / "student", f"{MODELS}:tiny", 16, names)
    return export_student(folder / "student", formats=("onnx",), model_file=model_files(folder / "student")[0])[0]


# ---- servers ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_process(artefact, limits=DEFAULT, token=None, run=None):
    """Yield starlette's TestClient, which has no socket. `run` replaces the runtime's method."""
    with TestClient(make_app(make_server(artefact, limits, run), token), raise_server_exceptions=False) as client:
        yield client


@contextlib.contextmanager
def in_thread(artefact, limits=DEFAULT, token=None, run=None):
    """Serve in a thread of this process, with real connections, and yield the port."""
    server = make_server(artefact, limits, run)
    listener, began = listen("127.0.0.1", 0), threading.Event()
    process = make_process(make_app(server, token), server, began.set)
    thread = threading.Thread(target=lambda: asyncio.run(process.serve([listener])))
    thread.start()
    assert began.wait(30)
    try:
        yield listener.getsockname()[1]
    finally:
        process.drain_s, process.should_exit = 0, True
        thread.join(30)


def make_server(artefact, limits=DEFAULT, run=None):
    runtime = load(artefact, RunOn("cpu"))
    if run:
        object.__setattr__(runtime, "run", run)
    return StudentServer(runtime, "student", limits)


@contextlib.contextmanager
def server(artefact, *flags, prefix=(), environment=(), slow_load=0.0):
    """Start python -m deploy.serve for tests of signals, output and limits; yield its process and its port."""
    run = ["-m", "deploy.serve"]
    if slow_load:
        run = ["-c", "import sys, time, deploy.serve as serve\nload = serve.load_and_try\n"
               f"serve.load_and_try = lambda *a: (print('loading', flush=True), time.sleep({slow_load}), load(*a))[2]\n"
               "sys.exit(serve.command(serve.get_parser(), serve.run))"]  # fmt: skip
    process = subprocess.Popen(
        [*prefix, sys.executable, *run, artefact, "--port", "0", "--device", "cpu", "--drain", "0", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert slow_load or "CPUExecutionProvider" in line, process.stderr.read()
        found = re.search(r"http://.*:(\d+)", line)  # with --log json the line is JSON
        yield process, int(found[1]) if found else None
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=30)


# ---- clients ------------------------------------------------------------------------------------------------------


def ask(site, path, body=None, headers=(), method=None):
    """Return (status, headers, body) of a request to a port or to a TestClient."""
    if isinstance(site, TestClient):
        method = method or ("GET" if body is None else "POST")
        response = site.request(method, path, content=body, headers=dict(headers))
        return response.status_code, response.headers, response.content
    request = urllib.request.Request(f"http://127.0.0.1:{site}{path}", body, dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def error_of(site, *request, **given):
    """Return the status and the error message of a response."""
    status, _, body = ask(site, *request, **given)
    return status, json.loads(body)["error"]


def wait_until(condition, seconds=30):
    """Wait until the function returns True; fail after these seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def metric(site, line, headers=()):
    """Return the value of a line of /metrics, 0 if the line is missing."""
    text = ask(site, "/metrics", headers=headers)[2].decode()
    return next((float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line + " ")), 0.0)


def keep_alive(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    return connection


# ---- requests -----------------------------------------------------------------------------------------------------


def tensor(shape=(1, *SHAPE), **changes):
    return {"name": "images", "datatype": "UINT8", "shape": list(shape)} | changes


def numbers(**changes):
    """Return the body of a request with one image as JSON numbers."""
    return json.dumps({"inputs": [tensor(**{"data": [0] * ONE} | changes)]}).encode()


def binary(request, raw):
    """Return the body and the headers of a request with a binary tensor."""
    head = json.dumps(request).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def of(shape=(1, *SHAPE), size=ONE, **changes):
    return {"inputs": [tensor(shape, parameters={"binary_data_size": size}) | changes]}


def picture(kind="PNG", size=(20, 20), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, (200, 30, 30) if mode == "RGB" else 0).save(file, kind, **options)
    return file.getvalue()

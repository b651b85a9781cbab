"""Serve a student over HTTP: the Open Inference Protocol (V2) with dynamic batching, and a photograph's labels.

    python -m deploy.serve runs/001-mobilenet_v2-uskd/student/student.onnx
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
    curl http://127.0.0.1:8000/v2/models/student

GET / is a page to drop an image on. POST /v2/models/NAME/infer takes images as uint8 (N, H, W, 3), resized and cropped,
as JSON or binary tensors, gzip or not; POST /predict takes a JPEG or PNG and prepares it as in training. /metrics is
for Prometheus. Too long a queue answers 503, too large a body 413, any other mistake of the request 4xx with
{"error": ...}. SIGTERM drains: requests under way are answered first. One model, one process: beyond one machine,
deploy.triton writes a repository for Triton and KServe.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.resources
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.cli import (
    Parser,
    UserError,
    add_device,
    command,
    first_line,
    make_parser,
    runtime_options,
    stop_without,
    version,
)
from deploy.preprocess import ImageTooLarge, UnreadableImage, open_image, prepare
from deploy.protocol import VERSION, RequestError, bad, pack, parse_infer, too_large, unpack, write_infer
from deploy.runtimes import INPUT_NAME, OUTPUT_NAME, Runtime, load, top_labels

try:
    import uvicorn
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as missing:
    stop_without(missing, "serve", "pip install starlette uvicorn prometheus-client")

MAX_PIXELS = 64_000_000  # of an image for /predict: 256 MB once decoded


class Limits(NamedTuple):
    """What a server takes on."""

    max_batch: int = 8  # images in one call of the runtime, and in one request
    max_delay_ms: float = 1.0  # a request waits this long for others
    queue: int = 256  # images waiting; more are refused
    body_mib: float = 16.0  # of a request, unpacked


class Waiting(NamedTuple):
    images: np.ndarray
    answer: asyncio.Future
    since_ns: int


class Batcher:
    """Gathers requests until they fill a batch or the oldest has waited long enough, and runs them together.

    A thread of its own takes the next batch as soon as the last is done: the event loop, which parses and answers
    meanwhile, is not asked in between.
    """

    def __init__(self, runtime: Runtime, limits: Limits, metrics: Metrics) -> None:
        self.runtime, self.limits, self.metrics = runtime, limits, metrics
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Waiting] = deque()
        self.queued = 0  # images
        self.changed = threading.Condition()
        self.closed = False
        threading.Thread(target=self.run_forever, name="runtime", daemon=True).start()

    async def infer(self, images: np.ndarray) -> np.ndarray:
        """The logits of (N, H, W, 3) images, N at most max_batch."""
        answer = self.loop.create_future()
        with self.changed:
            if self.queued + len(images) > self.limits.queue:
                raise RequestError(503, f"the queue is full: {self.queued} images wait, {self.limits.queue} may")
            self.waiting.append(Waiting(images, answer, time.perf_counter_ns()))
            self.count(len(images))
            self.changed.notify()
        return await answer

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def count(self, images: int) -> None:
        self.queued += images
        self.metrics.queue.set(self.queued)

    def run_forever(self) -> None:
        while batch := self.gather():
            images = batch[0].images if len(batch) == 1 else np.concatenate([request.images for request in batch])
            started = time.perf_counter_ns()
            try:
                logits: Any = self.runtime.run(images)
            except Exception as error:
                logits = RequestError(500, f"the runtime failed: {first_line(error)}")
            self.loop.call_soon_threadsafe(self.answer, batch, logits, started, time.perf_counter_ns())

    def gather(self) -> list[Waiting]:
        """The next batch; empty once closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if self.closed:
                return []
            due = self.waiting[0].since_ns + self.limits.max_delay_ms * 1e6
            while self.queued < self.limits.max_batch and (left := due - time.perf_counter_ns()) > 0:
                self.changed.wait(left / 1e9)
            batch = [self.waiting.popleft()]
            size = len(batch[0].images)
            while self.waiting and size + len(self.waiting[0].images) <= self.limits.max_batch:
                batch.append(self.waiting.popleft())
                size += len(batch[-1].images)
            self.count(-size)
            return batch

    def answer(self, batch: list[Waiting], logits: Any, started: int, ended: int) -> None:
        """In the event loop: each request its part."""
        failed = isinstance(logits, Exception)
        (self.metrics.failed if failed else self.metrics.executed)(batch, started, ended)
        first = 0
        for request in batch:
            part = slice(first, first + len(request.images))
            first = part.stop
            if request.answer.done():  # its client has gone
                continue
            if failed:
                request.answer.set_exception(logits)
            else:
                request.answer.set_result(logits[part])


class Metrics:
    """What /metrics and the protocol's statistics tell."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("kdlite_requests", "Requests answered", ["endpoint", "status"], **kept)
        self.seconds = Histogram(
            "kdlite_request_seconds", "From a request's arrival to its answer", ["endpoint"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5), **kept
        )  # fmt: skip
        self.batch_images = Histogram(
            "kdlite_batch_images", "Images in a call of the runtime", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **kept
        )
        self.queue = Gauge("kdlite_queue_images", "Images waiting", **kept)
        self.last_ms = 0
        self.by_batch: dict[int, list[int]] = {}  # batch size: calls, ns
        self.durations = {name: [0, 0] for name in ("success", "fail", "queue", "compute_infer")}  # requests, ns

    def executed(self, batch: list[Waiting], started: int, ended: int) -> None:
        size = sum(len(request.images) for request in batch)
        self.batch_images.observe(size)
        self.last_ms = time.time_ns() // 1_000_000
        self.by_batch.setdefault(size, [0, 0])
        add(self.by_batch[size], 1, ended - started)
        add(self.durations["compute_infer"], len(batch), len(batch) * (ended - started))
        for request in batch:
            add(self.durations["queue"], 1, started - request.since_ns)
            add(self.durations["success"], 1, ended - request.since_ns)

    def failed(self, batch: list[Waiting], started: int, ended: int) -> None:
        for request in batch:
            add(self.durations["fail"], 1, ended - request.since_ns)

    def statistics(self, name: str) -> dict[str, Any]:
        """The statistics extension of the protocol."""
        durations = {key: {"count": count, "ns": ns} for key, (count, ns) in self.durations.items()}
        nothing = {"count": 0, "ns": 0}
        batches = [
            {"batch_size": size, "compute_input": nothing, "compute_infer": {"count": calls, "ns": ns},
             "compute_output": nothing}
            for size, (calls, ns) in sorted(self.by_batch.items())
        ]  # fmt: skip
        statistics = {
            "name": name,
            "version": VERSION,
            "last_inference": self.last_ms,
            "inference_count": sum(size * calls for size, (calls, _) in self.by_batch.items()),
            "execution_count": sum(calls for calls, _ in self.by_batch.values()),
            "inference_stats": durations | {"compute_input": nothing, "compute_output": nothing,
                                            "cache_hit": nothing, "cache_miss": nothing},
            "batch_stats": batches,
        }  # fmt: skip
        return {"model_stats": [statistics]}


def add(total: list[int], count: int, ns: int) -> None:
    total[0] += count
    total[1] += ns


# ---- the application ----------------------------------------------------------------------------------------------


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body, unpacked; 413 as soon as it is too large."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large(limit)
        parts.append(part)
    return unpack(b"".join(parts), request.headers.get("content-encoding", "identity").lower(), limit)


def make_app(runtime: Runtime, name: str, limits: Limits) -> Starlette:
    """The ASGI application that serves one runtime under a name."""
    metadata = runtime.metadata
    labels: list[str] = metadata["label_names"]
    shape = runtime.image_shape
    max_batch = min(limits.max_batch, runtime.max_batch or limits.max_batch)
    limits = limits._replace(max_batch=max_batch)
    body_limit = int(limits.body_mib * 2**20)
    metrics = Metrics()
    page = importlib.resources.files("deploy").joinpath("page.html").read_text(encoding="utf-8")
    batcher: list[Batcher] = []  # made inside the running loop

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.append(Batcher(runtime, limits, metrics))
        yield
        batcher[0].close()

    def check_model(request: Request) -> None:
        asked, version = request.path_params["name"], request.path_params.get("version", VERSION)
        if asked != name or version != VERSION:
            raise RequestError(404, f"no model {asked!r} of version {version}; this server has {name!r}, {VERSION}")

    def answer(content: Any) -> Any:
        """An endpoint that tells something of the model."""

        async def endpoint(request: Request) -> Response:
            if "name" in request.path_params:
                check_model(request)
            return JSONResponse(content() if callable(content) else content)

        return endpoint

    async def infer(request: Request) -> Response:
        check_model(request)
        body = await read_body(request, body_limit)
        asked = parse_infer(body, request.headers.get("inference-header-content-length"), shape, max_batch)
        logits = await batcher[0].infer(asked.images)
        packed, headers = pack(*write_infer(asked, logits, name, labels), request.headers.get("accept-encoding", ""))
        return Response(packed, headers=headers)

    def read_photo(body: bytes) -> np.ndarray:
        try:
            image = open_image(body, accepted=("JPEG", "PNG", "WEBP", "BMP", "GIF"))
            if image.width * image.height > MAX_PIXELS:
                raise ImageTooLarge(f"{image.width}x{image.height} pixels")
            return prepare(image, metadata)[None]
        except ImageTooLarge as error:
            raise RequestError(413, f"the image is too large: {error}; {MAX_PIXELS} pixels are the limit") from error
        except UnreadableImage as error:
            raise bad(
                f"not an image that can be read ({error}); send the file as it is: curl --data-binary @photo.jpg"
            ) from error

    async def predict(request: Request) -> Response:
        top = request.query_params.get("top", "5")
        if not (top.isascii() and top.isdigit() and int(top) >= 1):
            raise bad(f"top is {top!r}; expected how many labels")
        images = await run_in_threadpool(read_photo, await read_body(request, body_limit))
        logits = await batcher[0].infer(images)
        best = top_labels(logits[0], labels, int(top))
        predictions = [{"label": label, "probability": p, "index": index} for label, p, index in best]
        return JSONResponse({"model": name, "predictions": predictions})

    async def show_metrics(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    tensors = {
        "inputs": [{"name": INPUT_NAME, "datatype": "UINT8", "shape": [-1, *shape]}],
        "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, len(labels)]}],
    }
    about = {"name": name, "versions": [VERSION], "platform": f"kdlite_{runtime.name}"} | tensors
    config = {
        "name": name,
        "platform": f"kdlite_{runtime.name}",
        "max_batch_size": max_batch,
        "input": [{"name": INPUT_NAME, "data_type": "TYPE_UINT8", "dims": list(shape)}],
        "output": [{"name": OUTPUT_NAME, "data_type": "TYPE_FP32", "dims": [len(labels)]}],
        "dynamic_batching": {"max_queue_delay_microseconds": int(1000 * limits.max_delay_ms)},
        "parameters": {"provider": {"string_value": runtime.provider}},
    }
    extensions = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]
    server = {"name": "kdlite", "version": version("kdlite"), "extensions": extensions}
    index = [{"name": name, "version": VERSION, "state": "READY"}]
    statistics = answer(lambda: metrics.statistics(name))
    model = "/v2/models/{name}"
    routes = [
        Route("/", show_page),
        Route("/predict", predict, methods=["POST"]),
        Route("/metrics", show_metrics),
        Route("/v2", answer(server)),
        Route("/v2/health/live", answer({"live": True})),
        Route("/v2/health/ready", answer({"ready": True})),
        Route("/v2/repository/index", answer(index), methods=["POST"]),
        Route("/v2/models/stats", statistics),
        Route(model + "/config", answer(config)),
    ]
    for path in (model, model + "/versions/{version}"):
        routes += [
            Route(path, answer(about)),
            Route(path + "/ready", answer({"name": name, "ready": True})),
            Route(path + "/stats", statistics),
            Route(path + "/infer", infer, methods=["POST"]),
        ]

    async def on_request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse({"error": error.message}, error.status)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def on_error(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"the server failed: {type(error).__name__}"}, 500)

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={RequestError: on_request_error, HTTPException: on_http_error, Exception: on_error},
    )
    app.add_middleware(Observe, metrics=metrics)
    return app


class Observe:
    """Counts and times each request, by endpoint and status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = [500]

        async def observed(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            # of known paths only: a label for each path someone tries would grow without end
            last = scope["path"].rstrip("/").rpartition("/")[2]
            endpoint = last if last in ("infer", "predict", "metrics", "ready", "live", "stats", "config") else "other"
            self.metrics.requests.labels(endpoint, status[0]).inc()
            self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)


def listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; --port names another") from error


def serve(app: Starlette, listener: socket.socket) -> None:
    """Until SIGTERM or Ctrl-C; what was begun is answered first."""
    sys.setswitchinterval(5e-4)  # the runtime's thread gets the interpreter back sooner when its batch is done
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains, then hands the signal on: to this
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30))
    server.run([listener])


def get_parser() -> Parser:
    default = Limits()
    parser = make_parser(__doc__, "serve")
    parser.add_argument("artefact", type=Path, help="a student/ folder, or a .ts, .pt2, .onnx or .engine file of it")
    parser.add_argument("--name", default="student", help="the model's name in the protocol's paths (default: student)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for every interface (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--max-batch", type=int, default=default.max_batch,
                        help=f"images in one call of the runtime (default: {default.max_batch})")  # fmt: skip
    parser.add_argument("--max-delay", type=float, default=default.max_delay_ms,
                        help=f"milliseconds to wait for other requests (default: {default.max_delay_ms})")  # fmt: skip
    parser.add_argument("--queue", type=int, default=default.queue,
                        help=f"images that may wait; more get 503 (default: {default.queue})")  # fmt: skip
    parser.add_argument("--body-limit", type=float, default=default.body_mib,
                        help=f"MiB of a request's body; more gets 413 (default: {default.body_mib:.0f})")  # fmt: skip
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    limits = Limits(args.max_batch, args.max_delay, args.queue, args.body_limit)
    if limits.max_batch < 1 or limits.max_delay_ms < 0 or limits.queue < limits.max_batch or not limits.body_mib > 0:
        raise UserError("--max-batch must be at least 1, --queue at least that, --max-delay 0, --body-limit above 0")
    if not args.name or "/" in args.name:
        raise UserError(f"--name {args.name!r} must be a part of a path")
    runtime = load(args.artefact, **runtime_options(args))
    app = make_app(runtime, args.name, limits)
    for size in (1, min(limits.max_batch, runtime.max_batch or limits.max_batch)):  # the first calls are slow
        runtime.run(np.zeros((size, *runtime.image_shape), np.uint8))
    listener = listen(args.host, args.port)
    host, port = listener.getsockname()[:2]
    print(f"{args.name}: {args.artefact} by {runtime.name}, {runtime.provider}, on http://{host}:{port}", flush=True)
    serve(app, listener)


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

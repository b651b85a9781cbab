"""The ASGI application of deploy.serve, and the process that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import hmac
import importlib.resources
import multiprocessing
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import numpy as np
import uvicorn
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from deploy.cli import UserError, explain, first_line, version
from deploy.preprocess import MAX_PIXELS
from deploy.runtimes import INPUT_NAME, OUTPUT_NAME, Runtime, load, top_labels
from deploy.server.batching import Batcher, largest_batch
from deploy.server.connections import ACCEPTED_AT_ONCE, LARGE_READ, Connection, Server
from deploy.server.images import decode, decode_apart, file_in, open_photograph, prepare_process
from deploy.server.limits import Budget, Limits
from deploy.server.metrics import AccessLog, Metrics
from deploy.server.protocol import (
    JSON_LIMIT,
    VERSION,
    RequestError,
    bad,
    pack,
    parse_infer,
    show,
    too_large,
    unpack,
    whole_number,
    write_infer,
)

LARGE_IMAGE = MAX_PIXELS // 16  # larger ones are decoded one at a time, in a process of their own
LARGE_ANSWER = 20_000  # logits that are not written in the event loop
OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # without the token: probes have none
REQUEST_ID = re.compile(r"[!-~]{1,128}")
M_MMAP_THRESHOLD = -3  # malloc.h


class Model(NamedTuple):
    """A runtime, and what the protocol says of it."""

    runtime: Runtime
    labels: list[str]
    max_batch: int
    about: dict[str, Any]
    config: dict[str, Any]


def describe(runtime: Runtime, name: str, limits: Limits) -> Model:
    labels: list[str] = runtime.metadata["label_names"]
    shape, max_batch = list(runtime.image_shape), largest_batch(runtime, limits)
    platform = f"kdlite_{runtime.name}"
    about = {
        "name": name,
        "versions": [VERSION],
        "platform": platform,
        "inputs": [{"name": INPUT_NAME, "datatype": "UINT8", "shape": [-1, *shape]}],
        "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, len(labels)]}],
    }
    config = {
        "name": name,
        "platform": platform,
        "max_batch_size": max_batch,
        "input": [{"name": INPUT_NAME, "data_type": "TYPE_UINT8", "dims": shape}],
        "output": [{"name": OUTPUT_NAME, "data_type": "TYPE_FP32", "dims": [len(labels)]}],
        "dynamic_batching": {"max_queue_delay_microseconds": int(1000 * limits.max_delay_ms)},
        "parameters": {"provider": {"string_value": runtime.provider}},
    }
    return Model(runtime, labels, max_batch, about, config)


def load_and_try(path: Path, limits: Limits, **options: Any) -> Runtime:
    """A runtime that has answered a batch of one and a largest one, which is slow the first time; UserError."""
    runtime = load(path, **options)
    labels = runtime.metadata["label_names"]
    for size in sorted({1, largest_batch(runtime, limits)}):
        try:
            logits = runtime.run(np.zeros((size, *runtime.image_shape), np.uint8))
        except Exception as error:  # each runtime has its own
            raise UserError(f"{path} fails on a batch of {size}: {first_line(error)}") from error
        if logits.shape != (size, len(labels)) or not np.isfinite(logits).all():
            raise UserError(
                f"{path} answers a batch of {size} with logits of shape {list(logits.shape)}, finite or not; expected "
                f"[{size}, {len(labels)}] finite ones, one a label"
            )
    return runtime


# ---- the application ----------------------------------------------------------------------------------------------


async def read_body(request: Request, limit: int, take: Callable[[int], None]) -> bytes:
    """The request's body as it came; 413 as soon as it is too large."""
    declared = request.headers.get("content-length", "0")
    if (declared.isdigit() and len(declared) > 18) or (whole_number(declared) or 0) > limit:
        raise too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large(limit)
        take(len(part))
        parts.append(part)
    return b"".join(parts)


def make_app(
    runtime: Runtime, name: str, limits: Limits, token: str | None = None, log: AccessLog | None = None
) -> Starlette:
    """The ASGI application that serves one runtime under a name.

    Its state has `metrics`; `use(runtime)`, which changes over; `drain()`, which announces the end.
    """
    body_limit = int(limits.body_mib * 2**20)
    metrics = Metrics(name)
    page = importlib.resources.files("deploy").joinpath("server/page.html").read_text(encoding="utf-8")
    bodies, pixels = Budget("bytes of requests", limits.bodies * body_limit), Budget("pixels", limits.pixels)
    # What holds the interpreter does so in one thread; what mostly lets it go, in some.
    threads = {"parse": 1, "decode": min(4, os.cpu_count() or 1)}
    pools: dict[str, ThreadPoolExecutor] = {}
    decoder: ProcessPoolExecutor | None = None  # from the first large image on
    batcher: Batcher
    model = describe(runtime, name, limits)
    draining = False
    reading: set[anyio.CancelScope] = set()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(limits, metrics)
        pools.update({pool: ThreadPoolExecutor(count, pool) for pool, count in threads.items()})
        yield
        batcher.close()
        for pool in (*pools.values(), *([decoder] if decoder else [])):
            pool.shutdown(wait=False, cancel_futures=True)

    async def in_pool(pool: str, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pools[pool], work, *given)

    async def decode_large(body: bytes, config: dict[str, Any]) -> np.ndarray:
        nonlocal decoder
        if decoder is None:
            decoder = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
        mine = decoder
        config = {name: config[name] for name in ("input_size", "crop", "interpolation")}
        try:
            return await asyncio.get_running_loop().run_in_executor(mine, decode_apart, body, config)
        except BrokenProcessPool as error:
            if decoder is mine:
                decoder = None
            raise RequestError(503, "the process that decodes large images has ended; another is started") from error

    def use(runtime: Runtime) -> None:
        nonlocal model
        model = describe(runtime, name, limits)

    def drain() -> None:
        nonlocal draining
        draining = True
        for scope in reading:  # a stalled upload does not delay the end
            scope.deadline = min(scope.deadline, anyio.current_time() + limits.body_s / 6)

    def check_model(request: Request) -> None:
        asked, version = request.path_params["name"], request.path_params.get("version", VERSION)
        if asked != name or version != VERSION:
            raise RequestError(
                404, f"no model {show(asked)} of version {show(version)}; this server has {name!r}, {VERSION!r}"
            )

    def answer(content: Callable[[], Any]) -> Any:
        """An endpoint that tells something of the model."""

        async def endpoint(request: Request) -> Response:
            if "name" in request.path_params:
                check_model(request)
            return JSONResponse(content())

        return endpoint

    async def read(request: Request, take: Callable[[int], None]) -> bytes:
        """The body, unpacked, in time."""
        with anyio.move_on_after(limits.body_s) as scope:
            reading.add(scope)
            try:
                body = await read_body(request, body_limit, take)
            finally:
                reading.discard(scope)
        if scope.cancelled_caught:
            raise RequestError(408, "the body took too long")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding == "identity":
            return body
        body = await in_pool("parse", unpack, body, encoding, body_limit)
        take(len(body))
        return body

    async def infer(request: Request) -> Response:
        check_model(request)
        now = model
        with bodies.lent() as take:
            body, header_length = await read(request, take), request.headers.get("inference-header-content-length")
            text = len(body) if header_length is None else whole_number(header_length) or 0
            given = body, header_length, now.runtime.image_shape, now.max_batch
            asked = parse_infer(*given) if text <= JSON_LIMIT else await in_pool("parse", parse_infer, *given)
            del body, given
            request.scope["images"] = len(asked.images)
            logits = await batcher.infer(now.runtime, asked.images)

        def write() -> tuple[bytes, dict[str, str]]:
            return pack(*write_infer(asked, logits, name, now.labels), request.headers.get("accept-encoding", ""))

        packed, headers = write() if logits.size <= LARGE_ANSWER else await in_pool("parse", write)
        return Response(packed, headers=headers)

    async def predict(request: Request) -> Response:
        asked = request.query_params.get("top", "5")
        top = whole_number(asked)
        if not top:
            raise bad(f"top is {show(asked)}; expected how many labels")
        now = model
        with bodies.lent() as take, pixels.lent() as take_pixels:
            body, content_type = await read(request, take), request.headers.get("content-type", "").lstrip()
            if content_type[:10].lower() == "multipart/":
                body = await in_pool("parse", file_in, body, content_type)
            image, cost = await in_pool("decode", open_photograph, body, now.runtime.metadata)
            take_pixels(cost)
            if cost > LARGE_IMAGE:
                images = await decode_large(body, now.runtime.metadata)
            else:
                images = await in_pool("decode", decode, image, now.runtime.metadata)
            del body, image
        request.scope["images"] = 1
        logits = await batcher.infer(now.runtime, images)
        if not np.isfinite(logits).all():
            raise RequestError(500, "the model's logits are not finite")
        best = top_labels(logits[0], now.labels, top)
        predictions = [{"label": label, "probability": p, "index": index} for label, p, index in best]
        return JSONResponse({"model": name, "predictions": predictions})

    async def show_ready(request: Request) -> Response:
        if "name" in request.path_params:
            check_model(request)
        ready = batcher.alive and not draining
        said = {"name": name} if "name" in request.path_params else {}
        return JSONResponse(said | {"ready": ready}, 200 if ready else 503, None if ready else {"Retry-After": "1"})

    async def show_metrics(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    extensions = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]
    server = {"name": "kdlite", "version": version("kdlite"), "extensions": extensions}
    index = [{"name": name, "version": VERSION, "state": "READY"}]
    statistics = answer(metrics.statistics)
    routes = [
        Route("/", show_page),
        Route("/predict", predict, methods=["POST"]),
        Route("/metrics", show_metrics),
        Route("/v2", answer(lambda: server)),
        Route("/v2/health/live", answer(lambda: {"live": True})),
        Route("/v2/health/ready", show_ready),
        Route("/v2/repository/index", answer(lambda: index), methods=["POST"]),
        Route("/v2/models/stats", statistics),
    ]
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            Route(path, answer(lambda: model.about)),
            Route(path + "/config", answer(lambda: model.config)),
            Route(path + "/ready", show_ready),
            Route(path + "/stats", statistics),
            Route(path + "/infer", infer, methods=["POST"]),
        ]

    async def on_request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return refusal(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # as proxies count it; nobody reads it

    async def on_error(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"the server failed: {type(error).__name__}"}, 500)

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={RequestError: on_request_error, HTTPException: on_http_error,
                            ClientDisconnect: on_disconnect, Exception: on_error},
    )  # fmt: skip
    app.add_middleware(Observe, metrics=metrics, token=token, log=log, draining=lambda: draining)
    app.state.metrics, app.state.use, app.state.drain = metrics, use, drain
    return app


def refusal(error: RequestError) -> Response:
    return JSONResponse({"error": error.message}, error.status, {"Retry-After": "1"} if error.status == 503 else None)


class Observe:
    """Around each request: who may ask, its id, its line in the log, its count and time by endpoint and status."""

    def __init__(
        self, app: Any, metrics: Metrics, token: str | None, log: AccessLog | None, draining: Callable[[], bool]
    ) -> None:
        self.app, self.metrics, self.log, self.draining = app, metrics, log, draining
        self.token = token.encode() if token else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        begun = False

        async def observed(message: Any) -> None:
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if self.draining():
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            if scope["path"] in OPEN or self.may_ask(headers.get(b"authorization", b"")):
                await self.app(scope, receive, observed)
            else:
                unknown = JSONResponse({"error": "this server needs a token: Authorization: Bearer TOKEN"}, 401,
                                       {"WWW-Authenticate": "Bearer"})  # fmt: skip
                await unknown(scope, receive, observed)
        except asyncio.CancelledError:  # the drain's time is up
            if not begun:
                await refusal(RequestError(503, "the server ends"))(scope, receive, observed)
        finally:
            # of known paths only: a label for each path someone tries would grow without end
            last = scope["path"].rstrip("/").rpartition("/")[2]
            endpoint = last if last in ("infer", "predict", "metrics", "ready", "live", "stats", "config") else "other"
            seconds = time.perf_counter() - started
            self.metrics.answered(endpoint, status, seconds)
            if self.log:
                self.log.write(
                    method=scope["method"][:20], path=scope["path"][:200], status=status, ms=round(1e3 * seconds, 2),
                    images=scope.get("images", 0), request_id=request_id,
                )  # fmt: skip

    def may_ask(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        return self.token is None or (scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token))


# ---- the process --------------------------------------------------------------------------------------------------


def reload_in_background(app: Starlette, load_again: Callable[[], Runtime], said: str) -> None:
    """Change over to what the file holds now, if it runs; from the event loop."""
    loop = asyncio.get_running_loop()

    def work() -> None:
        try:
            runtime = load_again()
        except Exception as error:  # whatever is wrong with the file, the old one serves on
            app.state.metrics.reloads.labels("refused").inc()
            reason = explain(error) or f"{type(error).__name__}: {first_line(error)}"
            print(f"{said}: not loaded again, the old one serves on: {reason}", file=sys.stderr, flush=True)
            return
        loop.call_soon_threadsafe(app.state.use, runtime)
        app.state.metrics.reloads.labels("done").inc()
        print(f"{said}: loaded again", flush=True)

    threading.Thread(target=work, name="reload", daemon=True).start()


def map_large_memory() -> None:
    """Have glibc map large blocks, always: Pillow asks for zeros, which takes 100 ms for a large image and holds the
    interpreter where they must be written; and what is freed goes back to the system.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**22)


def serve(
    app: Starlette, listener: socket.socket, limits: Limits, began: Callable[[], None], reload: Callable[[], None]
) -> None:
    """Until SIGTERM or Ctrl-C; what was begun is answered first.

    began: is called once requests and signals are taken; reload: at each SIGHUP
    """
    sys.setswitchinterval(5e-4)  # the runtime's thread gets the interpreter back sooner when its batch is done
    map_large_memory()
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains, then hands the signal on: to this
    protocol: Any = functools.partial(Connection, limits, app.state.metrics, memoryview(bytearray(LARGE_READ)))
    config = uvicorn.Config(
        app, loop="asyncio", http=protocol, ws="none", log_level="error", access_log=False, backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=int(limits.idle_s), timeout_graceful_shutdown=3,
    )  # fmt: skip
    server = Server(config, limits.drain_s, began, app.state.drain)

    async def run() -> None:
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
        await server.serve([listener])

    asyncio.run(run())

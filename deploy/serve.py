"""Serve a student over HTTP: the Open Inference Protocol (V2) with dynamic batching, and a photograph's labels.

    python -m deploy.serve runs/001-mobilenet_v2-uskd/student/student.onnx
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
    curl http://127.0.0.1:8000/v2/models/student

GET / is a page to drop an image on. POST /v2/models/NAME/infer takes images as uint8 (N, H, W, 3), resized and cropped,
as JSON or binary tensors, gzip or not; POST /predict takes an image file, or a form with one, and prepares it as in
training. /metrics is for Prometheus. What is too much at once answers 503 with Retry-After, too large a body 413, any
other mistake of the request 4xx with {"error": ...}.

SIGTERM drains: readiness is 503, requests under way are answered, and it is gone within 20 seconds. SIGHUP loads the
file again, and changes over if it runs. Whoever may reach another address than the loopback needs the token of
--token-file or KDLITE_TOKEN. One model, one process: beyond one machine, deploy.triton writes a repository for Triton
and KServe.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import functools
import hmac
import importlib.resources
import ipaddress
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

import numpy as np

from deploy.cli import (
    Parser,
    UserError,
    add_device,
    command,
    explain,
    first_line,
    make_parser,
    needs,
    number,
    version,
)
from deploy.config import Metadata
from deploy.preprocess import MAX_PIXELS, formats
from deploy.runtimes import INPUT_NAME, OUTPUT_NAME, RunOn, Runtime, load, top_labels
from deploy.server.limits import Budget, Limits
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

with needs("pip install starlette uvicorn prometheus-client python-multipart", __name__):
    import anyio
    import uvicorn
    from prometheus_client import generate_latest
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    from deploy.server.batching import Batcher, largest_batch
    from deploy.server.connections import (
        ACCEPTED_AT_ONCE,
        LARGE_READ,
        Connection,
        Server,
        bounded_by_files,
        listen,
        listen_unix,
    )
    from deploy.server.images import decode, decode_apart, file_in, open_photograph, prepare_process, silence_readers
    from deploy.server.metrics import AccessLog, Metrics

LARGE_IMAGE = MAX_PIXELS // 16  # larger ones are decoded one at a time, in a process of their own
LARGE_ANSWER = 20_000  # logits that are not written in the event loop
OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # without the token: probes have none
REQUEST_ID = re.compile(r"[!-~]{1,128}")
TOKEN = "KDLITE_TOKEN"
M_MMAP_THRESHOLD = -3  # malloc.h


class Model(NamedTuple):
    """A runtime, and what the protocol says of it."""

    runtime: Runtime
    labels: list[str]
    max_batch: int
    about: dict[str, Any]
    config: dict[str, Any]


def describe(runtime: Runtime, name: str, limits: Limits) -> Model:
    labels: list[str] = runtime.metadata.label_names
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


def load_and_try(path: Path, limits: Limits, on: RunOn) -> Runtime:
    """A runtime that has answered a batch of one and a largest one, which is slow the first time; UserError."""
    runtime = load(path, on)
    labels = runtime.metadata.label_names
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

    async def decode_large(body: bytes, config: Metadata) -> np.ndarray:
        nonlocal decoder
        if decoder is None:
            decoder = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
        mine = decoder
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


def read_token(args: argparse.Namespace) -> str | None:
    """The token that clients must send; demanded where others than this machine's users may reach the server."""
    text = os.environ.get(TOKEN)
    if args.token_file:
        try:
            text = args.token_file.read_text(encoding="ascii")
        except (OSError, UnicodeError) as error:
            raise UserError(f"--token-file {args.token_file} cannot be read: {first_line(error)}") from error
    if text is None:
        if not args.no_token and not args.unix_socket and not is_loopback(args.host):
            raise UserError(
                f"--host {args.host} can be reached from outside: --token-file FILE or {TOKEN} says what clients must "
                "send as Authorization: Bearer TOKEN; --no-token serves whoever asks"
            )
        return None
    if args.no_token:
        raise UserError(f"--no-token, but there is one: leave out --token-file and {TOKEN}")
    if not REQUEST_ID.fullmatch(text.strip()):
        raise UserError(f"the token of {args.token_file or TOKEN} must be 1 to 128 visible ASCII characters")
    return text.strip()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def get_parser() -> Parser:
    default = Limits()
    parser = make_parser(__doc__, "serve")
    parser.add_argument("artefact", type=Path, help="a student/ folder, or a .ts, .pt2, .onnx or .engine file of it")
    parser.add_argument("--name", default="student", help="the model's name in the protocol's paths (default: student)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for every interface (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--unix-socket", type=Path, metavar="PATH", help="listen there, and on no port")
    parser.add_argument("--token-file", type=Path, metavar="FILE",
                        help=f"the token that clients must send; the variable {TOKEN} may hold it instead")  # fmt: skip
    parser.add_argument("--no-token", action="store_true", help="serve whoever reaches --host without a token")
    parser.add_argument("--max-batch", type=number(int, 1, 2**16), default=default.max_batch,
                        help=f"images in one call of the runtime (default: {default.max_batch})")  # fmt: skip
    parser.add_argument("--max-delay", type=number(float, 0, 60_000), default=default.max_delay_ms,
                        help=f"milliseconds to wait for other requests (default: {default.max_delay_ms})")  # fmt: skip
    parser.add_argument("--queue", type=number(int, 1, 2**20), default=default.queue,
                        help=f"images that may wait; more get 503 (default: {default.queue})")  # fmt: skip
    parser.add_argument("--body-limit", type=number(float, 0, 2**12, above=True), default=default.body_mib,
                        help=f"MiB of a request's body; more gets 413 (default: {default.body_mib:.0f})")  # fmt: skip
    parser.add_argument("--connections", type=number(int, 1, 2**16), default=default.connections,
                        help=f"that may be open (default: {default.connections})")  # fmt: skip
    parser.add_argument("--drain", type=number(float, 0, 10), default=default.drain_s, metavar="SECONDS",
                        help="after SIGTERM, to go on answering with readiness at 503 before the listener closes "
                        f"(default: {default.drain_s:.0f})")  # fmt: skip
    parser.add_argument("--log", choices=["json"], help="a line for each request on stdout")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.queue < args.max_batch:
        raise UserError(f"--queue {args.queue} must be at least --max-batch, {args.max_batch}")
    if not args.name or "/" in args.name:
        raise UserError(f"--name {args.name!r} must be a part of a path")
    token = read_token(args)
    limits = Limits(
        args.max_batch, args.max_delay, args.queue, args.body_limit, connections=bounded_by_files(args.connections),
        drain_s=args.drain,
    )  # fmt: skip
    silence_readers()
    formats()  # imports Pillow's readers, which the first request would wait for
    load_again = functools.partial(load_and_try, args.artefact, limits, RunOn.from_args(args))
    runtime = load_again()
    listener = listen_unix(args.unix_socket) if args.unix_socket else listen(args.host, args.port)
    host, port = (args.unix_socket, 0) if args.unix_socket else listener.getsockname()[:2]
    address = f"unix:{host}" if args.unix_socket else f"http://{host}:{port}"
    said = f"{args.name}: {args.artefact}"
    log = AccessLog(sys.stdout) if args.log else None
    app = make_app(runtime, args.name, limits, token, log)
    try:
        serve(
            app, listener, limits,
            began=lambda: print(f"{said} by {runtime.name}, {runtime.provider}, on {address}", flush=True),
            reload=lambda: reload_in_background(app, load_again, said),
        )  # fmt: skip
    finally:
        if log:
            log.close()
        if args.unix_socket:
            args.unix_socket.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))

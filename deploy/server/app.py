"""Serve one student, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import numpy as np
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from deploy.cli import version
from deploy.page import describe_model, read_page
from deploy.preprocess import MAX_PIXELS
from deploy.runtimes import INPUT_NAME, OUTPUT_NAME, Runtime, is_answered, top_labels
from deploy.server.batching import Batcher
from deploy.server.images import LARGE_IMAGE, Decoders
from deploy.server.log import log
from deploy.server.metrics import Metrics
from deploy.server.protocol import (
    VERSION,
    InferRequest,
    RequestError,
    bad,
    parse_infer,
    show,
    too_large,
    unpack,
    whole_number,
    write_infer,
)

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]
HEADER_LENGTH = "inference-header-content-length"
LARGE_JSON = 2**14  # bytes; a thread parses a larger text, outside the event loop
LARGE_ANSWER = 20_000  # logits; a thread writes a larger answer, outside the event loop
OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # paths without a token: a browser or a probe cannot send one
ENDPOINTS = ("infer", "predict", "metrics", "ready", "live", "stats", "config", "about")  # labels of /metrics
Result = TypeVar("Result")
REQUEST_ID = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True)
class Limits:
    """Set the limits of a server."""

    max_batch: int = 8  # images in one call of the runtime, and in one request
    max_delay_ms: float = 1.0  # longest time that a request waits for its batch to fill
    queue: int = 256  # images that wait or run; a request for more gets 503
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")  # formats of photographs, Pillow's names
    body_mib: float = 16.0  # size of a request's body, unpacked
    bodies: int = 16  # all bodies in memory have at most bodies * body_mib; a request beyond that gets 503
    pixels: int = 4 * MAX_PIXELS  # limit on the pixels of all large photographs that wait to be decoded
    connections: int = 1024  # limit on open connections
    headers_s: float = 10.0  # longest time from the first byte of a request to the end of its headers
    body_s: float = 30.0  # longest time from the end of the headers to the end of the body
    idle_s: float = 60.0  # time without a request before the server closes the connection
    drain_s: float = 2.0  # least time from SIGTERM until the server stops listening


class Budget:
    """Share an amount between requests, such as bytes in memory."""

    def __init__(self, unit: str, total: int) -> None:
        self.unit, self.total, self.taken = unit, total, 0

    def take(self, amount: int, until: contextlib.ExitStack) -> None:
        """Take an amount until the stack closes. Raise RequestError 503 if less is left."""
        if self.taken + amount > self.total:
            taken = f"{self.taken} of {self.total} {self.unit} are taken"
            raise RequestError(503, f"overloaded: {taken}; send the request again later")
        self.taken += amount
        until.callback(self.give_back, amount)

    def give_back(self, amount: int) -> None:
        self.taken -= amount


class StudentServer:
    """Hold the endpoints of a server and their state.

    Args:
        runtime: runs the student; use() replaces it
        name: name of the model in the protocol's paths
        limits: limits of the requests and connections
    """

    def __init__(self, runtime: Runtime, name: str, limits: Limits) -> None:
        self.runtime, self.name, self.limits = runtime, name, limits
        self.metrics = Metrics(name)
        self.body_limit = int(limits.body_mib * 2**20)
        self.bodies = Budget("bytes of requests", limits.bodies * self.body_limit)
        self.queue = Budget("images in the queue", limits.queue)
        self.pixels = Budget("pixels of large photographs", limits.pixels)
        self.draining = False
        self.uploads: set[anyio.CancelScope] = set()
        self.page = read_page()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Start the threads that the endpoints use, and stop them."""
        self.batcher = Batcher(self.limits.max_batch, self.limits.max_delay_ms, self.metrics)
        self.parser = ThreadPoolExecutor(1, "parse")  # one thread, because its work holds the interpreter lock
        self.decoders = Decoders(min(4, os.cpu_count() or 1), self.limits.formats, LARGE_IMAGE)
        self.large_decoder = Decoders(1, self.limits.formats, MAX_PIXELS)
        yield
        self.batcher.close()
        self.parser.shutdown(wait=False, cancel_futures=True)
        self.decoders.close()
        self.large_decoder.close()

    def use(self, runtime: Runtime) -> None:
        """Run the next requests in another runtime."""
        self.runtime = runtime

    def drain(self) -> None:
        """Prepare the shutdown: /ready returns 503, connections close, and uploads get a shorter time limit."""
        self.draining = True
        for upload in self.uploads:
            upload.deadline = min(upload.deadline, anyio.current_time() + self.limits.body_s / 6)

    # ---- the endpoints ----

    async def infer(self, request: Request) -> Response:
        self.check_model(request)
        runtime = self.runtime
        with contextlib.ExitStack() as taken:
            body = await self.read_body(request, taken)
            self.queue.take(1, taken)
            asked, logits = await while_connected(request, self.run_tensor(request, runtime, body, taken))
        written = asked, logits, self.name, runtime.metadata.label_names
        small = logits.size <= LARGE_ANSWER
        content, headers = write_infer(*written) if small else await self.in_thread(write_infer, *written)
        return Response(content, headers=headers)

    async def predict(self, request: Request) -> Response:
        top = request.query_params.get("top", "5")
        if unknown := set(request.query_params) - {"top"}:
            raise bad(f"unknown query parameter {show(min(unknown))}; expected top, a number of labels")
        if not whole_number(top):
            raise bad(f"top is {show(top)}; expected a number of labels")
        runtime = self.runtime
        with contextlib.ExitStack() as taken:
            body = await self.read_body(request, taken)
            self.queue.take(1, taken)
            logits = await while_connected(request, self.run_photograph(request, runtime, body, taken))
        if not np.isfinite(logits).all():
            raise RequestError(500, "the model's logits are not finite")
        best = top_labels(logits[0], runtime.metadata, int(top))
        predictions = [{"label": label, "probability": p, "index": index} for label, p, index in best]
        content: dict[str, Any] = {"model": self.name, "predictions": predictions}
        content |= {"none_of_these": not is_answered(best[0][1], runtime.metadata)}
        return JSONResponse(content | {"threshold": runtime.metadata.threshold})

    async def ready(self, request: Request) -> Response:
        self.check_model(request)
        ready = self.batcher.alive and self.decoders.alive and self.large_decoder.alive and not self.draining
        model = {"name": self.name} if "name" in request.path_params else {}
        return JSONResponse(model | {"ready": ready}, 200 if ready else 503, None if ready else {"Retry-After": "1"})

    async def describe(self, content: Callable[[], Any], request: Request) -> Response:
        self.check_model(request)
        return JSONResponse(content())

    async def show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    # ---- parts of the endpoints ----

    def check_model(self, request: Request) -> None:
        name, number = request.path_params.get("name", self.name), request.path_params.get("version", VERSION)
        if name != self.name or number != VERSION:
            raise RequestError(
                404, f"no model {show(name)} of version {show(number)}; this server has {self.name!r}, {VERSION!r}"
            )

    async def read_body(self, request: Request, taken: contextlib.ExitStack) -> bytes:
        """Return the body. Raise RequestError if it is too large or too slow."""
        declared = request.headers.get("content-length", "0")
        if len(declared) > 18 or (whole_number(declared) or 0) > self.body_limit:
            raise too_large(self.body_limit)
        body = bytearray()
        with anyio.move_on_after(self.limits.body_s) as upload:
            self.uploads.add(upload)
            try:
                async for part in request.stream():
                    self.bodies.take(len(part), taken)
                    body += part
                    if len(body) > self.body_limit:
                        raise too_large(self.body_limit)
            finally:
                self.uploads.discard(upload)
        if upload.cancelled_caught:
            limit = f"the body is not complete after {self.limits.body_s:g} s"
            raise RequestError(408, f"{limit}: send it faster, or in smaller requests")
        return bytes(body)

    async def unpack(self, request: Request, body: bytes, taken: contextlib.ExitStack) -> bytes:
        encoding = request.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            body = await self.in_thread(unpack, body, encoding, self.body_limit)
            self.bodies.take(len(body), taken)
        return body

    async def run_tensor(
        self, request: Request, runtime: Runtime, body: bytes, taken: contextlib.ExitStack
    ) -> tuple[InferRequest, np.ndarray]:
        """Return an inference request and its logits (N, C)."""
        body, header_length = await self.unpack(request, body, taken), request.headers.get(HEADER_LENGTH)
        given = body, header_length, runtime.image_shape, self.batcher.largest_batch(runtime)
        text = len(body) if header_length is None else whole_number(header_length) or 0
        asked = parse_infer(*given) if text <= LARGE_JSON else await self.in_thread(parse_infer, *given)
        self.queue.take(len(asked.images) - 1, taken)
        request.scope["images"] = len(asked.images)
        return asked, await self.batcher.infer(runtime, asked.images)

    async def run_photograph(
        self, request: Request, runtime: Runtime, body: bytes, taken: contextlib.ExitStack
    ) -> np.ndarray:
        """Return the logits (1, C) of a photograph."""
        body, content_type = await self.unpack(request, body, taken), request.headers.get("content-type", "")
        metadata = dataclasses.replace(runtime.metadata, label_names=[], training={}, metrics={}, others={})
        images = await self.decoders.decode(body, content_type, metadata)
        if isinstance(images, int):
            self.pixels.take(images, taken)
            images = await self.large_decoder.decode(body, content_type, metadata)
        assert isinstance(images, np.ndarray)
        request.scope["images"] = 1
        return await self.batcher.infer(runtime, images)

    async def in_thread(self, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.parser, work, *given)

    # ---- content of describe() ----

    def about(self) -> dict[str, Any]:
        return describe_model(self.runtime.metadata, self.runtime.file)

    def about_server(self) -> dict[str, Any]:
        return {"name": "kdlite", "version": version("kdlite"), "extensions": EXTENSIONS}

    def about_model(self) -> dict[str, Any]:
        shape, classes = [-1, *self.runtime.image_shape], [-1, len(self.runtime.metadata.label_names)]
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": f"kdlite_{self.runtime.name}",
            "inputs": [{"name": INPUT_NAME, "datatype": "UINT8", "shape": shape}],
            "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": classes}],
        }

    def config(self) -> dict[str, Any]:
        shape, classes = list(self.runtime.image_shape), [len(self.runtime.metadata.label_names)]
        return {
            "name": self.name,
            "platform": f"kdlite_{self.runtime.name}",
            "max_batch_size": self.batcher.largest_batch(self.runtime),
            "input": [{"name": INPUT_NAME, "data_type": "TYPE_UINT8", "dims": shape}],
            "output": [{"name": OUTPUT_NAME, "data_type": "TYPE_FP32", "dims": classes}],
            "dynamic_batching": {"max_queue_delay_microseconds": int(1000 * self.limits.max_delay_ms)},
            "parameters": {"provider": {"string_value": self.runtime.provider}},
        }

    def live(self) -> dict[str, Any]:
        return {"live": True}

    def repository(self) -> list[dict[str, Any]]:
        return [{"name": self.name, "version": VERSION, "state": "READY"}]


def make_app(server: StudentServer, token: str | None = None) -> Starlette:
    """Return the ASGI application of a server.

    token: requests must have it, except requests for the paths of OPEN; None: the server needs no token
    """
    routes = [
        Route("/", server.show_page),
        Route("/about", functools.partial(server.describe, server.about)),
        Route("/predict", server.predict, methods=["POST"]),
        Route("/metrics", server.show_metrics),
        Route("/v2", functools.partial(server.describe, server.about_server)),
        Route("/v2/health/live", functools.partial(server.describe, server.live)),
        Route("/v2/health/ready", server.ready),
        Route("/v2/repository/index", functools.partial(server.describe, server.repository), methods=["POST"]),
        Route("/v2/models/stats", functools.partial(server.describe, server.metrics.statistics)),
    ]
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            Route(path, functools.partial(server.describe, server.about_model)),
            Route(path + "/config", functools.partial(server.describe, server.config)),
            Route(path + "/ready", server.ready),
            Route(path + "/stats", functools.partial(server.describe, server.metrics.statistics)),
            Route(path + "/infer", server.infer, methods=["POST"]),
        ]
    handlers: Any = {
        RequestError: on_request_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
        Exception: on_error,
    }
    middleware = [Middleware(Observe, server=server), Middleware(RequireToken, token=token), Middleware(Compress)]
    app = Starlette(routes=routes, lifespan=server.lifespan, exception_handlers=handlers, middleware=middleware)
    app.state.server = server
    app.router.redirect_slashes = False  # it would redirect to the Host that the client sent
    return app


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of the work; cancel the work when the client closes its connection.

    The caller must read the body of the request before this call.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal(error: RequestError) -> Response:
    return JSONResponse({"error": error.message}, error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def on_request_error(request: Request, error: RequestError) -> Response:
    return refusal(error)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    detail = error.detail
    if error.status_code == 405 and error.headers:
        detail = f"{request.method} is not allowed here: use {error.headers['Allow']}"
    return JSONResponse({"error": detail}, error.status_code, error.headers)


async def on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the status that proxies log for a client that has left


async def on_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the server failed: {type(error).__name__}"}, 500)


# ---- middleware ---------------------------------------------------------------------------------------------------


class Observe:
    """Give each request an id, count it, and log it."""

    def __init__(self, app: Any, server: StudentServer) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers = time.perf_counter(), dict(scope["headers"])
        # proxies may send a target with scheme and host (RFC 9112, 3.2.2)
        scope["path"] = re.sub(r"^https?://[^/]*(?=/|$)", "", scope["path"], flags=re.I) or "/"
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        scope["status"] = 0  # 0 until the response begins
        send = functools.partial(self.send, scope, send, (b"x-request-id", request_id.encode()))
        # with both headers, bytes after the body may be a hidden second request (RFC 9112, 6.1): close the connection
        scope["ambiguous"] = b"content-length" in headers and b"transfer-encoding" in headers
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:  # uvicorn cancels the requests that remain after the drain
            if not scope["status"]:
                await refusal(RequestError(503, "the server shuts down"))(scope, receive, send)
        finally:
            last = scope["path"].rstrip("/").rpartition("/")[2]
            seconds, status = time.perf_counter() - started, scope["status"] or 500
            self.server.metrics.answered(last if last in ENDPOINTS else "other", status, seconds)
            log.debug(
                "request",
                {
                    "method": scope["method"][:20],
                    "path": scope["path"][:200],
                    "status": status,
                    "ms": round(1e3 * seconds, 2),
                    "images": scope.get("images", 0),
                    "request_id": request_id,
                },
            )

    async def send(self, scope: Any, send: Any, header: tuple[bytes, bytes], message: Any) -> None:
        if message["type"] == "http.response.start":
            scope["status"] = message["status"]
            message["headers"] = [*message["headers"], header]
            if self.server.draining or scope["ambiguous"]:
                message["headers"].append((b"connection", b"close"))
        await send(message)


class RequireToken:
    """Respond 401 to a request without the token, unless it is for one of the paths of OPEN."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token.encode() if token else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.token and scope["type"] == "http" and scope["path"] not in OPEN:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                message = "wrong token" if given else "this server needs a token: Authorization: Bearer TOKEN"
                response = JSONResponse({"error": message}, 401, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Compress(GZipMiddleware):
    """Compress responses for clients that accept gzip.

    The base class ignores the weights of encodings, so it would compress for "gzip;q=0" too.
    """

    def __init__(self, app: Any) -> None:
        super().__init__(app, minimum_size=1024, compresslevel=1)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        accepted = dict(scope.get("headers", ())).get(b"accept-encoding", b"").decode("latin-1").lower()
        app = super().__call__ if accepts_gzip(accepted) else self.app
        await app(scope, receive, send)


def accepts_gzip(header: str) -> bool:
    """Return whether an Accept-Encoding header has gzip with a weight above 0 (RFC 9110, 12.5.3)."""
    parts = [part.replace(" ", "") for part in header.split(",")]
    return any(re.fullmatch(r"gzip(;q=(1(\.0*)?|0?\.[0-9]*[1-9][0-9]*))?", part) for part in parts)

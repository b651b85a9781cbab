"""Listen, and protect uvicorn's connections against slow clients.

uvicorn has no time limit for headers and bodies, cancels the time limit of an idle connection at the first byte, and
keeps connections beyond its limit open. deploy/serving.md compares it with hypercorn and granian.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import math
import multiprocessing
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.cli import UserError
from deploy.server.app import StudentServer
from deploy.server.log import log

SMALL_READ, LARGE_READ = 2**12, 2**18  # bytes
RESERVED_FILES = 64  # file descriptors for everything except connections
ACCEPTED_AT_ONCE = 16
BACKLOG = 2048
DRAIN_S = 12.0  # longest drain; then uvicorn waits for 3 s, and cancels the remaining requests


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """Handle a client's connection; check() closes it if it stays in one state for too long.

    received: a buffer of LARGE_READ bytes for all connections; each empties it before the next one reads
    """

    def __init__(self, server: StudentServer, received: memoryview, **given: Any) -> None:
        super().__init__(**given)
        limits, self.closed, self.received = server.limits, server.metrics.closed, received
        self.limit = limits.connections
        # read_body() responds 408 to a slow body a second earlier
        self.seconds = {
            "headers": limits.headers_s,
            "body": limits.body_s + 1,
            "idle": limits.idle_s,
            "unread answer": limits.idle_s,
            "answer": math.inf,
        }
        self.state, self.since = ("idle", self.cycle), self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) <= self.limit:
            return
        self.closed.labels("limit").inc()
        others: set[Any] = self.connections - {self}
        idle = [other for other in others if other.conn.our_state is h11.IDLE]
        if idle:  # close the connection that has been idle longest
            oldest = min(idle, key=lambda other: other.since)
            self.connections.discard(oldest)
            oldest.transport.abort()
        else:
            self.refuse(503, f"all {self.limit} connections of this server are in use; try again later")

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return a small buffer for headers and chunks, because many chunks of one byte in one read take too long."""
        cheap = self.conn.their_state is h11.SEND_BODY and all(name != b"transfer-encoding" for name, _ in self.headers)
        return self.received[: LARGE_READ if cheap else SMALL_READ]

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.received[:nbytes]))

    def check(self, now: float) -> None:
        """Close the connection if its state lasts too long. A new request, with a new cycle, is a new state."""
        name = {h11.IDLE: "idle", h11.SEND_BODY: "body"}.get(self.conn.their_state, "answer")
        if self.transport.get_write_buffer_size():
            name = "unread answer"
        elif name == "idle" and self.conn.trailing_data[0]:
            name = "headers"
        if self.state != (name, self.cycle):
            self.state, self.since = (name, self.cycle), now
        elif now - self.since > self.seconds[name]:
            self.closed.labels(name).inc()
            if name in ("headers", "body"):
                self.refuse(408, f"the {name} took longer than {self.seconds[name]:g} s: send it faster")
            self.transport.abort() if name == "unread answer" else self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Send a response, unless one has begun, and close the connection."""
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": message})
            head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "Connection: close", *["Retry-After: 1"] * (status == 503), "", ""]
            self.transport.write(("\r\n".join(head) + body).encode())
        self.transport.close()


class Process(uvicorn.Server):
    """Run uvicorn's server with a drain before the shutdown.

    began: a function to call once the server handles requests and signals
    """

    def __init__(self, config: uvicorn.Config, server: StudentServer, began: Callable[[], None]) -> None:
        super().__init__(config)
        self.server, self.drain_s, self.began = server, server.limits.drain_s, began
        self.logged = -60.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self.on_loop_error)
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio accepts as many at once as its backlog, so that one is small
        self.began()

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - self.logged >= 60:  # asyncio reports each attempt to accept a connection
            self.logged = loop.time()
            log.error("out of file descriptors: connections wait; raise ulimit -n or lower --connections")

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit  # the second signal
        if sig == signal.SIGINT:  # Ctrl-C: end at once
            self.drain_s = 0
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if counter % 3 == 0:  # uvicorn ticks every 0.1 s
            for connection in list(self.server_state.connections):
                connection.check(asyncio.get_running_loop().time())  # type: ignore[union-attr]
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server.drain()
        signalled = time.monotonic()
        while not self.force_exit and (waited := time.monotonic() - signalled) < DRAIN_S:
            if waited >= self.drain_s and not self.server_state.tasks:
                break
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def make_process(app: Starlette, server: StudentServer, began: Callable[[], None]) -> Process:
    protocol: Any = functools.partial(Connection, server, memoryview(bytearray(LARGE_READ)))
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol,
        ws="none",
        log_level="error",
        access_log=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=int(server.limits.idle_s),
        timeout_graceful_shutdown=3,
    )
    return Process(config, server, began)


def serve(process: Process, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, and answer the requests that have begun."""
    sys.setswitchinterval(5e-4)  # so that the runtime's thread gets the interpreter lock soon after its batch
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again after the drain: ignore it
    try:
        asyncio.run(process.serve([listener]))
    finally:
        for child in multiprocessing.active_children():  # decoding processes; their clients have left
            child.kill()
        # wait for the threads of the pools: at the end of the interpreter their closed pipes may print a traceback
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(2)


def bounded_by_files(connections: int) -> int:
    """Return `connections`, or the smaller number that RLIMIT_NOFILE allows. Increase its soft limit if needed."""
    try:
        import resource
    except ImportError:  # Windows
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + RESERVED_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allowed = max(soft - RESERVED_FILES, 1)
    if allowed < connections:
        log.warning("%d connections, not %d: ulimit -n is %d", allowed, connections, soft)
    return min(allowed, connections)


def listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        wrong_host = isinstance(error, socket.gaierror) or getattr(error, "errno", 0) == errno.EADDRNOTAVAIL
        advice = "--host must be an address of this machine" if wrong_host else "choose another --port"
        raise UserError(f"cannot listen on {host}:{port}: {error}; {advice}") from error
    # asyncio sets this only for sockets that name their protocol; without it a delayed ACK delays a response by 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def listen_unix(path: Path) -> socket.socket:
    """Listen on a unix socket. Replace a socket without a server, but no other file."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(str(path)) == 0:
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            path.unlink()
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {path}: {error}; choose another --unix-socket") from error
    return listener

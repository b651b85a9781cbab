"""What uvicorn lacks: a limit of connections, time limits for headers and bodies, a drain that others can see.

uvicorn stops the clock of an idle connection at each byte and has none for headers and bodies; its limit_concurrency
answers 503 but keeps the connection. deploy/serving.md tells how hypercorn and granian compare.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.cli import UserError
from deploy.server.limits import Limits
from deploy.server.metrics import Metrics

SMALL_READ, LARGE_READ = 2**12, 2**18  # bytes
RESERVED_FILES = 64  # of the process's descriptors, for what is no connection
ACCEPTED_AT_ONCE = 16
BACKLOG = 2048
DRAIN_S = 12.0  # at most, and 3 more for what will not end by itself
log = logging.getLogger(__name__)


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """A client's connection, which costs a descriptor and may not be held for nothing.

    received: LARGE_READ bytes that the connections of a server share, as each empties it before the next one reads
    """

    def __init__(self, limits: Limits, metrics: Metrics, received: memoryview, **given: Any) -> None:
        super().__init__(**given)
        self.limits, self.metrics, self.received = limits, metrics, received
        self.owes = ""  # headers, or a body
        self.clock: asyncio.TimerHandle | None = None
        self.idle_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and not self.make_room():
            self.metrics.closed.labels("limit").inc()
            self.refuse(503, f"{self.limits.connections} connections are open, the limit of this server")
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def make_room(self) -> bool:
        """Close the connection that has waited longest without a whole request, if there is one."""
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        idle = [other for other in others if other.conn.our_state is h11.IDLE]
        if not idle:
            return False
        oldest = min(idle, key=lambda other: other.idle_since)
        self.connections.discard(oldest)
        oldest.metrics.closed.labels("limit").inc()
        oldest.transport.abort()
        return True

    def get_buffer(self, sizehint: int) -> memoryview:
        """Little at a time where each byte may be work: headers, and chunks that may be of one byte."""
        whole = self.conn.their_state is h11.SEND_BODY and all(name != b"transfer-encoding" for name, _ in self.headers)
        return self.received[: LARGE_READ if whole else SMALL_READ]

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.received[:nbytes]))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        owes = {h11.IDLE: "headers", h11.SEND_BODY: "body"}.get(self.conn.their_state, "")
        if owes == self.owes:
            return
        self.owes = owes
        self.stop_clock()
        if owes:
            # a body that the application reads is late there first, with a proper answer
            seconds = self.limits.headers_s if owes == "headers" else self.limits.body_s + 1
            self.clock = self.loop.call_later(seconds, self.expire)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_clock()
        super().connection_lost(exc)

    def stop_clock(self) -> None:
        if self.clock:
            self.clock.cancel()

    def expire(self) -> None:
        self.metrics.closed.labels(self.owes).inc()
        if self.owes == "headers" and not self.conn.trailing_data[0]:  # an answer to nothing would confuse
            self.transport.close()
        self.refuse(408, f"the {self.owes} took too long")

    def pause_writing(self) -> None:
        """The client does not read its answers."""
        super().pause_writing()
        self.stop_clock()
        self.clock = self.loop.call_later(self.limits.idle_s, self.transport.abort)

    def resume_writing(self) -> None:
        self.stop_clock()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # it has not even read the last answer
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Close, after an answer where none has begun, without asking the application."""
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": message})
            head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "Connection: close", *["Retry-After: 1"] * (status == 503), "", ""]
            self.transport.write(("\r\n".join(head) + body).encode())
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, which drains before it shuts down.

    began: is called once requests and signals are taken
    drain: tells the application, whose readiness is 503 from then on and whose answers close their connections
    """

    def __init__(
        self, config: uvicorn.Config, drain_s: float, began: Callable[[], None], drain: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.drain_s, self.began, self.drain = drain_s, began, drain
        self.told_of_files = -60.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self.on_loop_error)
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio takes the backlog for the number that it accepts at once
        self.began()

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - self.told_of_files >= 60:  # asyncio would say it for each attempt
            self.told_of_files = loop.time()
            log.error("out of file descriptors: connections wait; raise ulimit -n or lower --connections")

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit  # the second signal
        if sig == signal.SIGINT:  # someone waits at a terminal
            self.drain_s = 0
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.drain()
        signalled = time.monotonic()
        while not self.force_exit and (waited := time.monotonic() - signalled) < DRAIN_S:
            if waited >= self.drain_s and not self.server_state.tasks:
                break
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def bounded_by_files(connections: int) -> int:
    """So many connections, or what this process may have open; raises its soft limit, and says where that is less."""
    try:
        import resource
    except ImportError:  # Windows
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED_FILES
    if soft < wanted and soft != resource.RLIM_INFINITY:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            allowed = max(soft - RESERVED_FILES, 1)
            log.warning("%d connections, not %d: ulimit -n is %d", allowed, connections, soft)
            return allowed
    return connections


def listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # asyncio sets it where a socket names its protocol; without it the client's delayed ACK costs an answer 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; --port names another") from error


def listen_unix(path: Path) -> socket.socket:
    """A unix socket; one that a dead server left behind is replaced."""
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
        raise UserError(f"cannot listen on {path}: {error}; --unix-socket names another") from error
    return listener

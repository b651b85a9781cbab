"""Join simultaneous requests into one call of the runtime."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.cli import first_line
from deploy.runtimes import Runtime
from deploy.server.metrics import Metrics
from deploy.server.protocol import RequestError


@dataclass(eq=False)
class Waiting:
    """Hold a request in the queue."""

    runtime: Runtime
    images: np.ndarray
    logits: asyncio.Future[np.ndarray]
    since_ns: int


class Batcher:
    """Queue requests, and run them in a thread.

    The thread runs the next batch when the queue has enough images for a full batch, or when the oldest request has
    waited for max_delay_ms.
    Between two batches the thread does not wait for the event loop.

    Args:
        max_batch: largest number of images in a call; a runtime may have a smaller limit
        max_delay_ms: longest time that a request waits for others
        metrics: counts each batch
    """

    def __init__(self, max_batch: int, max_delay_ms: float, metrics: Metrics) -> None:
        self.max_batch, self.max_delay_ms, self.metrics = max_batch, max_delay_ms, metrics
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Waiting] = deque()
        self.queued = 0  # images in `waiting`
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run_forever, name="runtime", daemon=True)
        self.thread.start()

    async def infer(self, runtime: Runtime, images: np.ndarray) -> np.ndarray:
        """Return the logits of images (N, H, W, C), N at most largest_batch. A cancelled request leaves the queue."""
        request = Waiting(runtime, images, self.loop.create_future(), time.perf_counter_ns())
        with self.changed:
            if not self.alive:
                raise RequestError(503, "the thread that runs the model has ended; restart the server")
            self.waiting.append(request)
            self.count(len(images))
            self.changed.notify()
        try:
            return await request.logits
        finally:
            if request.logits.cancelled():
                with self.changed, contextlib.suppress(ValueError):  # ValueError: it has left the queue
                    self.waiting.remove(request)
                    self.count(-len(images))

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.closed

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def largest_batch(self, runtime: Runtime) -> int:
        return min(self.max_batch, runtime.max_batch or self.max_batch)

    def count(self, images: int) -> None:
        self.queued += images
        self.metrics.queue.set(self.queued)

    # ---- in the thread ----

    def run_forever(self) -> None:
        try:
            while not self.closed:
                if batch := self.gather():
                    self.run(batch)
        finally:  # so that no request waits for a thread that has ended
            with self.changed:
                self.closed = True
                left, self.waiting = list(self.waiting), deque()
                self.count(-self.queued)
            self.deliver(left, RequestError(503, "the server shuts down"), *[time.perf_counter_ns()] * 2)

    def gather(self) -> list[Waiting]:
        """Wait for requests, and return a batch for one runtime. Return [] after close(), or if all were cancelled."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            while self.waiting and not self.closed:
                runtime, due = self.waiting[0].runtime, self.waiting[0].since_ns + self.max_delay_ms * 1e6
                left = due - time.perf_counter_ns()
                if left <= 0 or self.queued >= self.largest_batch(runtime):
                    break
                self.changed.wait(left / 1e9)
            batch: list[Waiting] = []
            size = 0
            while self.waiting and not self.closed:
                following = self.waiting[0]
                if batch and following.runtime is not batch[0].runtime:
                    break
                if batch and size + len(following.images) > self.largest_batch(following.runtime):
                    break
                batch.append(self.waiting.popleft())
                size += len(following.images)
            self.count(-size)
            return batch

    def run(self, batch: list[Waiting]) -> None:
        started = time.perf_counter_ns()
        logits: Any = RequestError(500, "the runtime was ended")
        try:
            images = batch[0].images if len(batch) == 1 else np.concatenate([request.images for request in batch])
            logits = np.asarray(batch[0].runtime.run(images))
            if logits.ndim != 2 or len(logits) != len(images):
                raise ValueError(f"logits of shape {logits.shape} for {len(images)} images")
        except Exception as error:
            logits = RequestError(500, f"the runtime failed: {first_line(error)}")
        finally:
            self.deliver(batch, logits, started, time.perf_counter_ns())

    def deliver(self, batch: list[Waiting], logits: Any, started: int, ended: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no request waits
            self.loop.call_soon_threadsafe(self.set_results, batch, logits, started, ended)

    # ---- in the event loop ----

    def set_results(self, batch: list[Waiting], logits: Any, started: int, ended: int) -> None:
        failed = isinstance(logits, Exception)
        (self.metrics.failed if failed else self.metrics.executed)(batch, started, ended)
        first = 0
        for request in batch:
            rows = slice(first, first + len(request.images))
            first = rows.stop
            if request.logits.done():  # its client has left
                continue
            if failed:
                request.logits.set_exception(logits)
            else:
                request.logits.set_result(logits[rows])

"""Requests that come at the same time share a call of the runtime."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from deploy.cli import first_line
from deploy.runtimes import Runtime
from deploy.server.limits import Limits
from deploy.server.metrics import Metrics
from deploy.server.protocol import RequestError


class Waiting(NamedTuple):
    runtime: Runtime
    images: np.ndarray
    answer: asyncio.Future
    since_ns: int


def largest_batch(runtime: Runtime, limits: Limits) -> int:
    return min(limits.max_batch, runtime.max_batch or limits.max_batch)


class Batcher:
    """Gathers requests until they fill a batch or the oldest has waited long enough, and runs them together.

    A thread of its own takes the next batch as soon as the last is done: the event loop, which parses and answers
    meanwhile, is not asked in between.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Waiting] = deque()
        self.queued = 0  # images
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run_forever, name="runtime", daemon=True)
        self.thread.start()

    async def infer(self, runtime: Runtime, images: np.ndarray) -> np.ndarray:
        """The logits of (N, H, W, 3) images, N at most largest_batch."""
        answer = self.loop.create_future()
        with self.changed:
            if not self.alive:
                raise RequestError(503, "the thread that runs the model has ended; restart the server")
            if self.queued + len(images) > self.limits.queue:
                raise RequestError(503, f"the queue is full: {self.queued} images wait, {self.limits.queue} may")
            self.waiting.append(Waiting(runtime, images, answer, time.perf_counter_ns()))
            self.count(len(images))
            self.changed.notify()
        return await answer

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.closed

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def count(self, images: int) -> None:
        self.queued += images
        self.metrics.queue.set(self.queued)

    def run_forever(self) -> None:
        try:
            while batch := self.gather():
                self.run(batch)
        finally:  # whatever ended it, nobody waits for ever
            with self.changed:
                self.closed = True
                left, self.waiting = list(self.waiting), deque()
                self.count(-self.queued)
            self.tell(left, RequestError(503, "the server ends"), *[time.perf_counter_ns()] * 2)

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
            self.tell(batch, logits, started, time.perf_counter_ns())

    def gather(self) -> list[Waiting]:
        """The next batch, all for one runtime; empty once closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if self.closed:
                return []
            runtime, due = self.waiting[0].runtime, self.waiting[0].since_ns + self.limits.max_delay_ms * 1e6
            largest = largest_batch(runtime, self.limits)
            while self.queued < largest and (left := due - time.perf_counter_ns()) > 0:
                self.changed.wait(left / 1e9)
            batch = [self.waiting.popleft()]
            size = len(batch[0].images)
            while self.waiting and (following := self.waiting[0]).runtime is runtime:
                if size + len(following.images) > largest:
                    break
                batch.append(self.waiting.popleft())
                size += len(following.images)
            self.count(-size)
            return batch

    def tell(self, batch: list[Waiting], logits: Any, started: int, ended: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self.loop.call_soon_threadsafe(self.answer, batch, logits, started, ended)

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

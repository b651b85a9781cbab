"""What the server tells its operators: /metrics, the protocol's statistics, and a line for each request."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from datetime import datetime, timezone
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from deploy.server.protocol import VERSION

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """What /metrics and the protocol's statistics tell of the model `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**kept)
        self.requests = Counter("kdlite_requests", "Requests answered", ["endpoint", "status"], **kept)
        self.seconds = Histogram(
            "kdlite_request_seconds", "From a request's arrival to its answer", ["endpoint"], buckets=SECONDS, **kept
        )
        self.queue_seconds, self.compute_seconds = (
            Histogram(f"kdlite_{what}_seconds", text, ["model"], buckets=SECONDS, **kept).labels(name)
            for what, text in (
                ("queue", "A request's wait for the runtime"),
                ("compute", "The runtime's call for a batch"),
            )
        )
        self.batch_images = Histogram(
            "kdlite_batch_images", "Images in a call of the runtime", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **kept
        )
        self.queue = Gauge("kdlite_queue_images", "Images waiting", **kept)
        self.closed = Counter(
            "kdlite_connections_closed", "By the server: over the limit, or slower than it waits", ["why"], **kept
        )
        self.reloads = Counter("kdlite_reloads", "SIGHUP: the model's file loaded again", ["result"], **kept)
        self.last_ms = 0
        self.by_batch: dict[int, list[int]] = {}  # batch size: calls, ns
        self.durations = {name: [0, 0] for name in ("success", "fail", "queue", "compute_infer")}  # requests, ns

    def executed(self, batch: list[Any], started: int, ended: int) -> None:
        """A call of the runtime for a batch of deploy.server.batching.Waiting; times in ns."""
        size = sum(len(request.images) for request in batch)
        self.batch_images.observe(size)
        self.compute_seconds.observe((ended - started) / 1e9)
        self.last_ms = time.time_ns() // 1_000_000
        self.by_batch.setdefault(size, [0, 0])
        add(self.by_batch[size], 1, ended - started)
        add(self.durations["compute_infer"], len(batch), len(batch) * (ended - started))
        for request in batch:
            self.queue_seconds.observe((started - request.since_ns) / 1e9)
            add(self.durations["queue"], 1, started - request.since_ns)
            add(self.durations["success"], 1, ended - request.since_ns)

    def failed(self, batch: list[Any], started: int, ended: int) -> None:
        for request in batch:
            add(self.durations["fail"], 1, ended - request.since_ns)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        self.requests.labels(endpoint, status).inc()
        self.seconds.labels(endpoint).observe(seconds)

    def statistics(self) -> dict[str, Any]:
        """The statistics extension of the protocol."""
        durations = {key: {"count": count, "ns": ns} for key, (count, ns) in self.durations.items()}
        nothing = {"count": 0, "ns": 0}
        batches = [
            {"batch_size": size, "compute_input": nothing, "compute_infer": {"count": calls, "ns": ns},
             "compute_output": nothing}
            for size, (calls, ns) in sorted(self.by_batch.items())
        ]  # fmt: skip
        statistics = {
            "name": self.name,
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


class AccessLog:
    """Lines of JSON, written by a thread: a terminal or a pipe that stands still does not stop the server.

    What comes faster than it can be written is left out, and counted in the next line that is.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.left_out = stream, 0
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue(10_000)
        self.thread = threading.Thread(target=self.write_forever, name="log", daemon=True)
        self.thread.start()

    def write(self, **said: Any) -> None:
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")} | said
        if self.left_out:
            line["lines_left_out"] = self.left_out
        try:
            self.lines.put_nowait(line)
            self.left_out = 0
        except queue.Full:
            self.left_out += 1

    def write_forever(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            while line := self.lines.get():
                print(json.dumps(line), file=self.stream, flush=self.lines.empty())
            self.stream.flush()

    def close(self) -> None:
        """Wait a second for what is left."""
        with contextlib.suppress(queue.Full):
            self.lines.put_nowait(None)
        self.thread.join(1)

"""Count requests and batches for /metrics and for the protocol's statistics."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from deploy.server.protocol import VERSION

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Hold the counters of a server. name: the model's name"""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("kdlite_requests", "Responses", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "kdlite_request_seconds", "Time from request to response", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.queue_seconds = Histogram(
            "kdlite_queue_seconds", "Time in the queue", ["model"], buckets=SECONDS, registry=registry
        ).labels(name)
        self.compute_seconds = Histogram(
            "kdlite_compute_seconds", "Time of a batch in the runtime", ["model"], buckets=SECONDS, registry=registry
        ).labels(name)
        self.batch_images = Histogram("kdlite_batch_images", "Images in a batch", buckets=IMAGES, registry=registry)
        self.queue = Gauge("kdlite_queue_images", "Images in the queue", registry=registry)
        self.closed = Counter(
            "kdlite_connections_closed", "Connections over the limit or too slow", ["why"], registry=registry
        )
        self.reloads = Counter("kdlite_reloads", "Loads of the file after SIGHUP", ["result"], registry=registry)
        self.last_ms = 0
        self.by_batch: dict[int, list[int]] = {}  # batch size -> [calls, ns]
        self.durations = {name: [0, 0] for name in ("success", "fail", "queue", "compute_infer")}  # [requests, ns]

    def executed(self, batch: list[Any], started: int, ended: int) -> None:
        """Count a batch: a list of deploy.server.batching.Waiting. started, ended: times in ns"""
        size = sum(len(request.images) for request in batch)
        self.batch_images.observe(size)
        self.compute_seconds.observe((ended - started) / 1e9)
        self.last_ms = time.time_ns() // 1_000_000
        add(self.by_batch.setdefault(size, [0, 0]), 1, ended - started)
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
        """Return the response of the protocol's statistics extension."""
        nothing = {"count": 0, "ns": 0}
        durations = dict.fromkeys(("compute_input", "compute_output", "cache_hit", "cache_miss"), nothing)
        durations |= {key: {"count": count, "ns": ns} for key, (count, ns) in self.durations.items()}
        batches = sorted(self.by_batch.items())
        return {
            "model_stats": [
                {
                    "name": self.name,
                    "version": VERSION,
                    "last_inference": self.last_ms,
                    "inference_count": sum(size * calls for size, (calls, _) in batches),
                    "execution_count": sum(calls for _, (calls, _) in batches),
                    "inference_stats": durations,
                    "batch_stats": [
                        {
                            "batch_size": size,
                            "compute_infer": {"count": calls, "ns": ns},
                            "compute_input": nothing,
                            "compute_output": nothing,
                        }
                        for size, (calls, ns) in batches
                    ],
                }
            ]
        }


def add(total: list[int], count: int, ns: int) -> None:
    total[0] += count
    total[1] += ns

"""Load the model's file at the start, and again at each SIGHUP."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cli import UserError, explain, first_line
from deploy.runtimes import RunOn, Runtime, load
from deploy.server.app import StudentServer
from deploy.server.log import log


def load_and_try(path: Path, max_batch: int, on: RunOn) -> Runtime:
    """Return a runtime that has run a batch of one image and the largest batch, because the first run is slow."""
    runtime = load(path, on)
    for size in sorted({1, min(max_batch, runtime.max_batch or max_batch)}):
        logits = runtime.run(np.zeros((size, *runtime.image_shape), np.uint8))
        if not np.isfinite(logits).all():
            raise UserError(f"{path} returns logits that are not finite for a black image")
    return runtime


class Reloader:
    """Load the file again at each SIGHUP, in a thread, one load after the other.

    A signal before start() counts too, because the file may have changed during the first load.
    """

    def __init__(self, load_again: Callable[[], Runtime], name: str) -> None:
        self.load_again, self.name = load_again, name
        self.signals: queue.SimpleQueue[int] = queue.SimpleQueue()  # put() may be called in a signal handler
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        self.signals.put(number)

    def start(self, server: StudentServer) -> None:
        threading.Thread(target=self.run_forever, args=(server,), name="reload", daemon=True).start()

    def run_forever(self, server: StudentServer) -> None:
        while self.signals.get():
            try:
                server.use(self.load_again())
            except Exception as error:  # for any error in the file the server keeps the old model
                server.metrics.reloads.labels("refused").inc()
                reason = explain(error) or f"{type(error).__name__}: {first_line(error)}"
                log.error("%s: not loaded again, the server keeps the old one: %s", self.name, reason)
            else:
                server.metrics.reloads.labels("done").inc()
                log.info("%s: loaded again", self.name)

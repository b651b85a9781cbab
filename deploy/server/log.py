"""Write the log to stdout: messages as text, or messages and requests as JSON. Write warnings to stderr as text."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from datetime import datetime, timezone
from logging.handlers import QueueHandler, QueueListener

from deploy.cli import printable

LINES = 10_000  # largest number of lines that wait for the thread
log = logging.getLogger("deploy.serve")


class JsonFormatter(logging.Formatter):
    """Format a record as a line of JSON: the time, and the message or the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields = record.args if isinstance(record.args, dict) else {"message": record.getMessage()}
        return json.dumps({"time": when} | fields)


class TextFormatter(logging.Formatter):
    """Format a record as text, and escape its control characters, because a message may repeat text of a file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class LossyHandler(QueueHandler):
    """Queue records for the thread that writes them; if the queue is full, skip them and log their number later."""

    skipped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the base class would format it here, but the thread does that

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.skipped and isinstance(record.args, dict):
            record.args = record.args | {"lines_left_out": self.skipped}
        try:
            self.queue.put_nowait(record)
            self.skipped = 0
        except queue.Full:
            self.skipped += 1


def start_log(as_json: bool) -> QueueListener:
    """Start the thread that writes to stdout, because a terminal or pipe that blocks must not stop the server."""
    logging.raiseExceptions = False  # a closed stdout is not an error of the server
    out, errors = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.WARNING)
    errors.setFormatter(TextFormatter())
    out.setFormatter(JsonFormatter() if as_json else TextFormatter())
    if not as_json:
        out.addFilter(lambda record: record.levelno < logging.WARNING)
    thread = QueueListener(queue.Queue(LINES), out)
    thread.start()
    log.handlers, log.propagate = [LossyHandler(thread.queue), errors], False
    log.setLevel(logging.DEBUG if as_json else logging.INFO)  # requests are DEBUG
    return thread


def stop_log(thread: QueueListener) -> None:
    """Wait at most a second until all lines are written."""
    stop = threading.Thread(target=thread.stop, daemon=True)
    stop.start()
    stop.join(1)

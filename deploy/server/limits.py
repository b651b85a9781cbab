"""What a server takes on at once, and what its requests share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deploy.preprocess import MAX_PIXELS
from deploy.server.protocol import RequestError


class Limits(NamedTuple):
    """What a server takes on."""

    max_batch: int = 8  # images in one call of the runtime, and in one request
    max_delay_ms: float = 1.0  # a request waits this long for others
    queue: int = 256  # images waiting; more are refused
    body_mib: float = 16.0  # of a request, unpacked
    bodies: int = 16  # of the largest that are held at once
    pixels: int = 4 * MAX_PIXELS  # of photographs that wait to be decoded or are
    connections: int = 1024
    headers_s: float = 10.0  # from a request's first byte to the end of its headers
    body_s: float = 30.0  # from there to the end of its body
    idle_s: float = 60.0  # of a connection without a request
    drain_s: float = 2.0  # after SIGTERM, before the listener closes


class Budget:
    """Of something that requests share: bytes of bodies, pixels. Each gives back what it took."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.taken = what, total, 0

    @contextlib.contextmanager
    def lent(self) -> Iterator[Callable[[int], None]]:
        """A function that takes so much more for as long as the context lasts; RequestError 503 where all is lent."""
        mine = 0

        def take(amount: int) -> None:
            nonlocal mine
            if self.taken + amount > self.total:
                raise RequestError(
                    503, f"too much at once: {self.taken} {self.what} are under way, {self.total} may be"
                )
            self.taken += amount
            mine += amount

        try:
            yield take
        finally:
            self.taken -= mine

"""Decode posted photographs in separate processes, within limits of pixels, time and memory.

A file of a few bytes can make an image reader work for minutes and hold the interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import multiprocessing
import os
import re
import signal
import threading
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deploy.config import Metadata
from deploy.preprocess import (
    MAX_PIXELS,
    ImageTooLarge,
    UnreadableImage,
    formats,
    jpeg_scale,
    open_image,
    prepare,
    resized_size,
)
from deploy.server.protocol import RequestError, bad, show

DECODE_S = 10.0  # CPU time of one photograph
MEMORY = 3 * 2**29  # bytes that a process may allocate; 64 million transparent pixels need 2**30
LARGE_IMAGE = MAX_PIXELS // 16  # pixels: larger photographs are decoded one at a time, because of their memory
FORM_OF_CURL = "application/x-www-form-urlencoded"  # the content type of curl -d, which removes line ends
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # the start of a segment of a JPEG, or its end
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
SCANS = 20  # largest number of scans of a JPEG of MAX_PIXELS; each scan decodes the whole image. Cameras write 10


class Decoders:
    """Decode photographs in processes. The first photograph starts the first process.

    Args:
        count: the largest number of processes
        accepted: Pillow's names of the formats
        most_pixels: if a photograph costs more pixels, decode() returns their number instead of the image
    """

    def __init__(self, count: int, accepted: tuple[str, ...], most_pixels: int) -> None:
        self.count, self.accepted, self.most_pixels = count, accepted, most_pixels
        self.probe: Future[Any] | None = None  # a task that shows whether processes start again after one has died
        self.start()

    @property
    def alive(self) -> bool:
        return self.probe is None or not self.probe.done() or not self.probe.exception()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = ProcessPoolExecutor(self.count, context, prepare_process)
        # limits the photographs in memory: the pool keeps the photograph of a cancelled request until its turn
        self.free = asyncio.Semaphore(self.count + 1)

    async def decode(self, body: bytes, content_type: str, metadata: Metadata) -> np.ndarray | int:
        processes, free = self.processes, self.free
        await free.acquire()
        try:
            try:
                future = processes.submit(decode_in_time, body, content_type, metadata, self.accepted, self.most_pixels)
            except BaseException:
                free.release()
                raise
            future.add_done_callback(functools.partial(release, free, asyncio.get_running_loop()))
            return await asyncio.wrap_future(future)
        except BrokenProcessPool as error:
            if processes is self.processes:  # only the first request that gets this error
                self.start()
                self.probe = self.processes.submit(formats)
            raise RequestError(
                503, "a process that decodes photographs has ended: send the photograph again"
            ) from error

    def close(self) -> None:
        self.processes.shutdown(wait=False, cancel_futures=True)


def release(free: asyncio.Semaphore, loop: asyncio.AbstractEventLoop, _: Any) -> None:
    """Release a place of the pool from the pool's own thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: no request waits
        loop.call_soon_threadsafe(free.release)


# ---- in a decoding process ----------------------------------------------------------------------------------------


def prepare_process() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a signal to the process group is for the server
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, stop_decoding)
    threading.Thread(target=end_with_server, daemon=True).start()
    # no warnings: the response to the request has the error
    warnings.simplefilter("ignore")
    for name in ("PIL", "python_multipart"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    formats()  # imports Pillow's readers
    try:
        import resource

        os.nice(10)  # lower priority than the server: hostile photographs must not slow other requests
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):  # not Linux
        pass


def end_with_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def stop_decoding(number: int, frame: Any) -> None:
    raise TimeoutError(f"decoding takes more than {DECODE_S:.0f} s of CPU: send a smaller image")


def decode_in_time(*photograph: Any) -> np.ndarray | int:
    if not hasattr(signal, "setitimer"):  # Windows
        return decode(*photograph)
    signal.setitimer(signal.ITIMER_PROF, DECODE_S)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * DECODE_S)  # ends the process if a reader does not return to Python
    try:
        return decode(*photograph)
    except TimeoutError as error:  # raised outside Pillow's reader; inside, it becomes UnreadableImage
        raise bad(str(error)) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def decode(
    body: bytes, content_type: str, metadata: Metadata, accepted: tuple[str, ...], most_pixels: int
) -> np.ndarray | int:
    """Return the prepared image, uint8 (1, H, W, C), or the pixels that it costs if they are more than most_pixels.

    An image costs the pixels that are decoded, or those after the resize if they are more.

    Raises:
        RequestError: 400 or 413; 415 for a form if python-multipart is not installed
    """
    if content_type.lstrip()[:10].lower() == "multipart/":
        body = file_in(body, content_type)
    try:
        with open_image(body, tuple(set(accepted).intersection(formats()))) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise ImageTooLarge(f"{image.width}x{image.height} pixels")
            scans = scans_of(body) if image.format in ("JPEG", "MPO") else 1
            if pixels * scans > SCANS * MAX_PIXELS:
                raise ImageTooLarge(f"{image.width}x{image.height} pixels in {scans} scans")
            size = resized_size(image.size, metadata)  # before the rotation by EXIF: reading EXIF may decode the image
            if math.prod(size) > MAX_PIXELS:
                raise ImageTooLarge(f"{image.width}x{image.height} pixels would become {size[0]}x{size[1]}")
            if image.format in ("JPEG", "MPO"):
                pixels //= jpeg_scale(image.size, size) ** 2
            if (cost := max(pixels, math.prod(size))) > most_pixels:
                return cost
            return prepare(image, metadata)[None]
    except ImageTooLarge as error:
        raise RequestError(413, f"the image is too large: {error}; the limit is {MAX_PIXELS} pixels") from error
    except UnreadableImage as error:
        for name in formats():
            accepts = Image.OPEN[name][1]
            if name not in accepted and accepts and accepts(body[:16]):
                raise bad(f"the file is {name}: this server reads it only with --formats") from error
        curl = "; send a file with curl --data-binary, not with -d" if content_type.startswith(FORM_OF_CURL) else ""
        raise bad(f"the image cannot be read: {error}; expected {', '.join(accepted)}{curl}") from error


def scans_of(jpeg: bytes) -> int:
    """Return the number of scans of a JPEG's first image. A video may follow it in the file (motion photos)."""
    scans, at = 0, 2
    while marker := MARKER.search(jpeg, at):
        kind, at = marker[0][1], marker.end()
        if kind == END_OF_IMAGE:
            break
        scans += kind == START_OF_SCAN
        at += int.from_bytes(jpeg[at : at + 2], "big")
    return scans


def file_in(body: bytes, content_type: str) -> bytes:
    """Return the content of the one file in a form."""
    try:
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import create_form_parser
    except ImportError as error:
        message = "this server does not read forms (pip install python-multipart): send the file as the body"
        raise RequestError(415, message) from error
    files: list[Any] = []
    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = create_form_parser({"Content-Type": content_type.encode()}, None, files.append, in_memory)
        parser.write(body)
        parser.finalize()
    except (FormParserError, UnicodeError) as error:
        reason = show(str(error))
        raise bad(f"the form cannot be read: {reason}; expected multipart/form-data with a boundary") from error
    if len(files) != 1:
        raise bad(f"the form has {len(files)} files; send one image")
    return files[0].file_object.getvalue()

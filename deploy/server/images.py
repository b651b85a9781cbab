"""What is posted to /predict: an image file as it is, or as the one file of a form; its cost before its pixels."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
import warnings
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
from deploy.server.protocol import PIECE, RequestError, bad, show

ACCEPTED = {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"}
FIELDS = 100  # of a form, beside its file
SCANS = 20  # of a progressive JPEG of MAX_PIXELS: each is a pass over the whole image; cameras and editors make 10


def silence_readers() -> None:
    """What Pillow and python-multipart warn of is a client's, once a request; the answer says what matters."""
    warnings.simplefilter("ignore")  # each new text would be kept, too
    for name in ("PIL", "python_multipart"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def file_in(body: bytes, content_type: str) -> bytes:
    """The one file of a form. Raises RequestError 400 for what is none, 415 where python-multipart is not installed."""
    try:
        from python_multipart import FormParser
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import parse_options_header
    except ImportError as error:
        raise RequestError(
            415, "forms are not read here (pip install python-multipart); send the file as it is"
        ) from error
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise bad(f"Content-Type is {show(content_type)}; expected multipart/form-data with a boundary")
    files: list[Any] = []
    fields: list[Any] = []

    def add(kept: list[Any], most: int, part: Any) -> None:
        kept.append(part)
        if len(kept) > most:
            raise bad("the form has more than one file; send one image at a time")

    try:
        parser = FormParser(
            "multipart/form-data", lambda field: add(fields, FIELDS, field), lambda file: add(files, 1, file),
            boundary=boundary, config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},
        )  # fmt: skip
        for start in range(0, len(body), PIECE):
            parser.write(body[start : start + PIECE])
        parser.finalize()
    except (FormParserError, UnicodeError) as error:
        raise bad(f"not a form that can be read: {show(str(error))}") from error
    if not files:
        raise bad("the form has no file: curl -F image=@photo.jpg")
    return files[0].file_object.getvalue()


def open_photograph(body: bytes, config: Metadata) -> tuple[Image.Image, int]:
    """An image that is not decoded yet, and how many pixels it asks for; RequestError 400 or 413."""
    try:
        image = open_image(body, accepted=tuple(ACCEPTED.intersection(formats())))
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ImageTooLarge(f"{image.width}x{image.height} pixels")
        scans = body.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
        if pixels * scans > SCANS * MAX_PIXELS:
            raise ImageTooLarge(f"{image.width}x{image.height} pixels in {scans} scans")
        size = resized_size(image.size, config)  # upright or not; to read EXIF may be to decode
        if math.prod(size) > MAX_PIXELS:
            raise ImageTooLarge(f"{image.width}x{image.height} pixels would become {size[0]}x{size[1]}")
        if image.format in ("JPEG", "MPO"):
            pixels //= jpeg_scale(image.size, size) ** 2
        return image, max(pixels, math.prod(size))
    except UnreadableImage as error:
        raise unreadable(error) from error


def decode(image: Image.Image, config: Metadata) -> np.ndarray:
    """uint8 (1, H, W, 3), prepared as in training; RequestError 400 or 413."""
    try:
        return prepare(image, config)[None]
    except UnreadableImage as error:
        raise unreadable(error) from error
    finally:
        image.close()  # its pixels, before the next one's


def decode_apart(body: bytes, config: Metadata) -> np.ndarray:
    """The same, for a process of its own: of 64 million pixels of WebP Pillow holds the interpreter half a second."""
    return decode(open_photograph(body, config)[0], config)


def prepare_process() -> None:
    """What such a process does first: it ends with the server, whatever ends that, and not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    silence_readers()
    server = multiprocessing.parent_process()
    assert server is not None

    def end_with_it() -> None:
        server.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def unreadable(error: Exception) -> RequestError:
    if isinstance(error, ImageTooLarge):
        return RequestError(413, f"the image is too large: {error}; {MAX_PIXELS} pixels are the limit")
    return bad(f"not an image that can be read ({error}); send the file as it is: curl --data-binary @photo.jpg")

"""A photograph -> the uint8 array that a student takes, with numpy and Pillow alone.

    prepare(open_image("photo.jpg"), config)    # uint8 (H, W, 3); open_image takes the bytes of a file as well

The one function for training's evaluation, check, quantize, serve and predict. It gives bit for bit what torchvision's
Resize and CenterCrop make of the same PIL image. A JPEG at least eight times as large as the resize asks for is decoded
at a reduced scale, still at least four times what is asked (Image.draft): half the time, and a value moves by a few
tenths of 255 on average. examples/benchmark_preprocess.py measures both, and how often the class changes.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MAX_PIXELS = 64_000_000  # of an image brought to the student's size: a strip of 94 bytes may ask for gigabytes
DRAFT_MARGIN = 4  # a reduced JPEG keeps at least this many times the pixels a side that the resize asks for


class UnreadableImage(ValueError):
    """An image file that Pillow cannot read, with its reason."""


class ImageTooLarge(UnreadableImage):
    """One of so many pixels that Pillow takes it for an attack."""


def open_image(file: str | Path | bytes | BinaryIO, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The image in a file or in the bytes of one, not decoded yet; formats: of Pillow's names, those accepted.

    Raises:
        UnreadableImage: no image; ImageTooLarge: one of too many pixels
    """
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)
    except Exception as error:  # each of Pillow's readers has errors of its own
        raise unreadable(error) from error


def to_rgb(image: Image.Image, needed: tuple[float, float] | None = None) -> Image.Image:
    """Decode to RGB of 8 bits. needed: (width, height) in pixels that the whole image will be resized to.

    Raises:
        UnreadableImage: the file is damaged
    """
    try:
        if needed and image.format == "JPEG":
            width, height = (math.ceil(DRAFT_MARGIN * side) for side in needed)
            image.draft(None, (width, height))  # type: ignore[arg-type]  # None keeps the mode
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # as above
        raise unreadable(error) from error


def prepare(image: Image.Image, config: dict[str, Any]) -> np.ndarray:
    """Decode, resize and centre-crop an opened image as a student's config.json says -> uint8 (H, W, 3).

    Raises:
        UnreadableImage: the file is damaged; ImageTooLarge: a strip so long that the resize would not fit in memory
    """
    height, width = config["input_size"][1:]
    size = resized_size(image.size, config)
    if math.prod(size) > max(MAX_PIXELS, 4 * height * width):
        raise ImageTooLarge(f"{image.width}x{image.height} pixels would become {size[0]}x{size[1]}")
    image = to_rgb(image, size).resize(size, RESAMPLING[config["interpolation"]])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)  # half to even, as torchvision rounds
    return np.asarray(image.crop((left, top, left + width, top + height)))


def resized_size(size: tuple[int, int], config: dict[str, Any]) -> tuple[int, int]:
    """(width, height) before the centre crop: a square input keeps the photograph's shape, an oblong one does not."""
    height, width = config["input_size"][1:]
    if height != width:
        return math.floor(width / config["crop"]), math.floor(height / config["crop"])
    short = math.floor(height / config["crop"])
    if size[0] <= size[1]:
        return short, int(short * size[1] / size[0])
    return int(short * size[0] / size[1]), short


def unreadable(error: Exception) -> UnreadableImage:
    kind = ImageTooLarge if isinstance(error, Image.DecompressionBombError) else UnreadableImage
    return kind(" ".join(f"{type(error).__name__}: {error}".split())[:300])

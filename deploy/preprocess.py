"""A photograph -> the uint8 array that a student takes, with numpy and Pillow alone.

    prepare(open_image("photo.jpg"), metadata)    # uint8 (H, W, 3); open_image takes the bytes of a file as well

The one function for training's evaluation, check, quantize, serve and predict. It gives bit for bit what torchvision's
Resize and CenterCrop make of the same PIL image. A JPEG at least eight times as large as the resize asks for is decoded
at a reduced scale, still at least four times what is asked (Image.draft): half the time, and a value moves by a few
tenths of 255 on average. examples/benchmark_preprocess.py measures both, and how often the class changes.

What a camera turned is turned upright (EXIF), before anything else. Deep greys come down to 8 bits by the range of
their type; where no range is known, the image is refused rather than read as black or white.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from deploy.config import INTERPOLATIONS, Metadata

RESAMPLING = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}
MAX_PIXELS = 64_000_000  # of an image brought to the student's size: a strip of 94 bytes may ask for gigabytes
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "QOI",
    "TGA",
    "PCX",
    "PSD",
    "SGI",
    "ICO",
    "DDS",
)  # Pillow's names, of pictures that it decodes itself: EPS and WMF would run other programs
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF's orientation -> what undoes it
DRAFT_MARGIN = 4  # a reduced JPEG keeps at least this many times the pixels a side that the resize asks for


class UnreadableImage(ValueError):
    """An image file that Pillow cannot read, with its reason."""


class ImageTooLarge(UnreadableImage):
    """One of so many pixels that Pillow takes it for an attack."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def endings() -> frozenset[str]:
    """Of files that may be images: .jpg, .jfif, .png and so on."""
    known = {*formats(), "MPO"}  # what phones write as .jpg, or as .mpo
    return frozenset(end for end, name in Image.registered_extensions().items() if name in known)


def open_image(file: str | Path | bytes | BinaryIO, accepted: tuple[str, ...] | None = None) -> Image.Image:
    """The image in a file or in the bytes of one, not decoded yet; accepted: of FORMATS.

    Raises:
        UnreadableImage: no image; ImageTooLarge: one of too many pixels
    """
    try:
        if isinstance(file, (str, Path)) and not stat.S_ISREG(Path(file).stat().st_mode):
            raise OSError("not a regular file")  # a pipe would be waited for
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=accepted or formats())
    except Exception as error:  # each of Pillow's readers has errors of its own
        raise unreadable(error) from error


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none. Pillow itself turns a TIFF."""
    value = 1
    if image.format != "TIFF":
        with contextlib.suppress(Exception):  # damaged EXIF of a good image
            value = image.getexif().get(0x0112, 1)
    return value if value in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image once it stands upright."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def to_rgb(image: Image.Image, needed: tuple[float, float] | None = None) -> Image.Image:
    """Decode to upright RGB of 8 bits. needed: (width, height) in pixels that the whole image will be resized to.

    Raises:
        UnreadableImage: the file is damaged, or its values have no known range
    """
    try:
        turn = orientation(image)
        if needed and image.format in ("JPEG", "MPO"):
            width, height = (math.ceil(DRAFT_MARGIN * side) for side in (needed[::-1] if turn >= 5 else needed))
            image.draft(None, (width, height))  # type: ignore[arg-type]  # None keeps the mode
        image = to_8_bits(image).convert("RGB")
        return image.transpose(TURNS[turn]) if turn in TURNS else image
    except Exception as error:  # as above
        raise unreadable(error) from error


def jpeg_scale(size: tuple[int, int], needed: tuple[float, float]) -> int:
    """By which a JPEG's sides are divided while it is decoded, as Image.draft picks it."""
    asked = [math.ceil(DRAFT_MARGIN * side) for side in needed]
    scale = min(side // most for side, most in zip(size, asked))
    return max((step for step in (8, 4, 2) if step <= scale), default=1)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, which Pillow would clip to white, scaled by the range of their type."""
    image.load()
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))  # 16 bits in 32
    if image.mode in ("I", "F") and not deep:
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"pixels are {kind} of no known range: save it with 8 or 16 bits a channel")
    if not deep:
        return image
    bits = 16
    if image.format == "TIFF":
        said = image.tag_v2.get(258, 16)  # type: ignore[attr-defined]  # BitsPerSample
        bits = said[0] if isinstance(said, tuple) else said
    values = np.asarray(image)
    if bits == 16 and 0 < values.max() < 2**12:
        raise ValueError(
            f"16-bit pixels of at most {values.max()}, 12 bits or fewer: scale them to 65535, or save 8 bits"
        )
    return Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))


def prepare(image: Image.Image, metadata: Metadata) -> np.ndarray:
    """Decode, resize and centre-crop an opened image as a student's config.json says -> uint8 (H, W, channels).

    Raises:
        UnreadableImage: the file is damaged; ImageTooLarge: a strip so long that the resize would not fit in memory
    """
    channels, height, width = metadata.input_size
    width_now, height_now = upright_size(image)
    size = resized_size((width_now, height_now), metadata)
    if math.prod(size) > max(MAX_PIXELS, 4 * height * width):
        raise ImageTooLarge(f"{width_now}x{height_now} pixels would become {size[0]}x{size[1]}")
    image = to_rgb(image, size).resize(size, RESAMPLING[metadata.interpolation])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)  # half to even, as torchvision rounds
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def resized_size(size: tuple[int, int], metadata: Metadata) -> tuple[int, int]:
    """(width, height) before the centre crop: a square input keeps the photograph's shape, an oblong one does not."""
    height, width = metadata.input_size[1:]
    if height != width:
        return math.floor(width / metadata.crop), math.floor(height / metadata.crop)
    short = math.floor(height / metadata.crop)
    if size[0] <= size[1]:
        return short, int(short * size[1] / size[0])
    return int(short * size[0] / size[1]), short


def unreadable(error: Exception) -> UnreadableImage:
    kind = ImageTooLarge if isinstance(error, Image.DecompressionBombError) else UnreadableImage
    return kind(" ".join(f"{type(error).__name__}: {error}".split())[:300])

"""Turn a photograph into the uint8 array that a student takes, with numpy and Pillow only.

    prepare(open_image("photo.jpg"), metadata)    # uint8 (H, W, 3); open_image takes the bytes of a file as well

Training's evaluation, check, quantize, serve and predict all use prepare(). It resizes the width first and then the
height, in two passes, so that Pillow 10 to 13 give the same bytes. Torchvision's Resize and CenterCrop with Pillow 10
to 12 give these bytes too; Pillow 13 picks the order of the passes by the shape of the image.

If the sides of a JPEG are at least eight times as long as the resize needs, it is decoded at a smaller size
(Image.draft). Its sides are then still at least four times as long as the resize needs. This takes half the time, and
changes a value (0 to 255) by a few tenths on average. examples/benchmark_preprocess.py measures both, and how often the
class changes.

An image is turned upright, as its EXIF describes. A transparent image is composited on white, so that the colour under
its transparency does not matter. Greys of 16 bits are scaled to 8 by the range of their type. An image whose range is
unknown raises an error, because it would become black or white.
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
from PIL import Image, UnidentifiedImageError

from deploy.config import INTERPOLATIONS, Metadata

RESAMPLING = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}
MAX_PIXELS = 64_000_000  # limit after the resize: a long strip, in a file of 94 bytes, could need gigabytes
# Pillow's names of formats that it decodes itself; EPS and WMF would run other programs.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI"),
    *("TGA", "PCX", "PSD", "SGI", "ICO", "DDS"),
)
BACKGROUND = (255, 255, 255)  # under transparent pixels
# First bytes of common files that Pillow does not read -> the format, and the way to convert it.
UNREAD = {
    b"ftyphe": "HEIC, as iPhones make it: set the camera to Most Compatible, or convert it to JPEG",
    b"ftypmi": "HEIF: convert it to JPEG",
    b"\xff\x0a": "JPEG XL: convert it to JPEG or PNG",
    b"JXL ": "JPEG XL: convert it to JPEG or PNG",
    b"<svg": "SVG, a drawing: export it as PNG",
    b"<?xml": "XML, perhaps an SVG drawing: export it as PNG",
    b"%PDF": "PDF: export the page as PNG",
    b"data:image": "text, an image in base64: send the bytes of the file",
    b"/9j/4": "text, a JPEG in base64: send the bytes of the file",
    b"iVBORw0K": "text, a PNG in base64: send the bytes of the file",
}
# EXIF's orientation -> the operation that undoes it
TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
DRAFT_MARGIN = 4  # the side of a reduced JPEG is at least this many times the side that the resize needs


class UnreadableImage(ValueError):
    """Report an image file that Pillow cannot read, with the reason."""


class ImageTooLarge(UnreadableImage):
    """Report an image with more pixels than Pillow or this module accepts."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats of FORMATS that the installed Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def endings() -> frozenset[str]:
    """Return the endings of image files: .jpg, .jfif, .png and so on."""
    known = {*formats(), "MPO"}  # phones write MPO as .jpg, or as .mpo
    return frozenset(end for end, name in Image.registered_extensions().items() if name in known)


def open_image(file: str | Path | bytes | BinaryIO, accepted: tuple[str, ...] | None = None) -> Image.Image:
    """Open an image file, or its bytes, without decoding it; raise UnreadableImage if it is not an image.

    accepted: some of FORMATS; default: all
    """
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        if isinstance(source, (str, Path)) and not stat.S_ISREG(Path(source).stat().st_mode):
            raise OSError("not a regular file")  # opening a pipe would wait
        image = Image.open(source, formats=accepted or formats())
        image.deep_colour = is_deep_colour(image)  # type: ignore[attr-defined]  # unknown after decoding
        return image
    except UnidentifiedImageError:
        raise UnreadableImage(f"not an image of a known format: {describe_start(source)}") from None
    except Exception as error:  # each of Pillow's readers has its own errors
        raise unreadable(error) from error


def describe_start(file: str | Path | BinaryIO) -> str:
    """Describe a file that Pillow does not read, by its first bytes."""
    try:
        with open(file, "rb") if isinstance(file, (str, Path)) else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            start = opened.read(64)
    except (OSError, ValueError):
        start = b""
    if not start:
        return "it is empty"
    known = [text for mark, text in UNREAD.items() if mark in start[:16].lstrip().replace(b"\xef\xbb\xbf", b"")]
    accept = {name: Image.OPEN[name][1] for name in formats()}
    known += [f"it starts like {name}, but its bytes are damaged" for name, f in accept.items() if f and f(start[:16])]
    return known[0] if known else f"it starts with {start[:8]!r}"


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8. Return 1 if it is missing, and for a TIFF, which Pillow itself turns.

    Decode a PNG first: its EXIF may follow the pixels, and getexif would hide that the pixels are damaged.
    """
    value = 1
    if image.format == "PNG":
        image.load()
    if image.format != "TIFF":
        with contextlib.suppress(Exception):  # damaged EXIF of a good image
            value = image.getexif().get(0x0112, 1)
    return value if value in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an opened image after it is turned upright; raise UnreadableImage if it is damaged."""
    width, height = image.size
    try:
        return (height, width) if orientation(image) >= 5 else (width, height)
    except Exception as error:  # each of Pillow's readers has its own errors
        raise unreadable(error) from error


def to_rgb(image: Image.Image, needed: tuple[float, float] | None = None) -> Image.Image:
    """Decode an opened image to upright RGB of 8 bits, composited on white; raise UnreadableImage if it is damaged.

    needed: (width, height) in pixels to which the whole image will be resized
    """
    try:
        turn = orientation(image)
        if needed and image.format in ("JPEG", "MPO"):
            width, height = (math.ceil(DRAFT_MARGIN * side) for side in (needed[::-1] if turn >= 5 else needed))
            image.draft(None, (width, height))  # type: ignore[arg-type]  # None keeps the mode
        image = composite(to_8_bits(image))
        return image.transpose(TURNS[turn]) if turn in TURNS else image
    except Exception as error:  # each of Pillow's readers has its own errors
        raise unreadable(error) from error


def jpeg_scale(size: tuple[int, int], needed: tuple[float, float]) -> int:
    """Return the divisor of a JPEG's sides that Image.draft picks."""
    asked = [math.ceil(DRAFT_MARGIN * side) for side in needed]
    scale = min(side // most for side, most in zip(size, asked))
    return max((step for step in (8, 4, 2) if step <= scale), default=1)


def composite(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; composite a transparent image on the BACKGROUND."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Decode an image. Scale greys of more than 8 bits by the range of their type, because Pillow would clip them."""
    image.load()
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))  # 16 bits in 32
    if image.mode in ("I", "F") and not deep:
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"the range of its pixels, {kind}, is unknown: save it with 8 or 16 bits a channel")
    if getattr(image, "deep_colour", False):
        channels = [image.getchannel(band) for band in image.getbands() if band not in "Aa"]
        refuse_12_bits(max(int(channel.getextrema()[1]) for channel in channels) << 8)  # type: ignore[arg-type]
    if not deep:
        return image
    bits, values = 16, np.asarray(image)
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        samples = tags.get(258, 16)  # BitsPerSample
        bits = samples[0] if isinstance(samples, tuple) else samples
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow inverts only in 8 bits
            values = 2**bits - 1 - values
    if isinstance(key := image.info.get("transparency"), int):  # a grey that is transparent
        values = np.where(values == key, 2**bits - 1, values)
    if bits == 16:
        refuse_12_bits(int(values.max()))
    return Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))


def is_deep_colour(image: Image.Image) -> bool:
    """Return whether Pillow will reduce the colours of an opened file from 16 bits to 8 when it decodes the file."""
    if image.mode.startswith(("I", "F")):
        return False
    if image.format == "JPEG2000":  # Pillow does not report the depth
        return True
    tiles = getattr(image, "tile", [])
    arguments = [x for tile in tiles for x in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    most = [x for x in arguments if isinstance(x, int)] if image.format == "PPM" else []
    return any(";16" in x for x in arguments if isinstance(x, str)) or max(most, default=0) >= 2**15


def refuse_12_bits(brightest: int) -> None:
    """Raise ValueError if 16-bit pixels use only 12 bits, because they would become black."""
    if 0 < brightest <= 2**12:
        raise ValueError("its 16-bit pixels use 12 bits or fewer: scale them to 65535, or save 8 bits")


def prepare(image: Image.Image, metadata: Metadata) -> np.ndarray:
    """Decode, resize and centre-crop an opened image as the metadata describes; return uint8 (H, W, channels).

    Raise UnreadableImage for a damaged file, and ImageTooLarge for a strip so long that its resize needs too much
    memory.
    """
    channels, height, width = metadata.input_size
    width_now, height_now = upright_size(image)
    size = resized_size((width_now, height_now), metadata)
    if math.prod(size) > max(MAX_PIXELS, 4 * height * width):
        raise ImageTooLarge(f"{width_now}x{height_now} pixels would become {size[0]}x{size[1]}")
    image = to_rgb(image, size)
    image = resize(image, size, metadata.interpolation)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)  # half to even, as torchvision rounds
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def resize(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """Resize to (width, height), first the width and then the height, so that every Pillow gives the same bytes."""
    for step in ((size[0], image.height), size):
        image = image.resize(step, RESAMPLING[interpolation])
    return image


def resized_size(size: tuple[int, int], metadata: Metadata) -> tuple[int, int]:
    """Return (width, height) before the centre crop.

    The resize keeps the proportions of the image only if the model's input is square.
    """
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

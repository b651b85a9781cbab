"""Test that deploy.preprocess gives torchvision's bytes, or values close to them for a large JPEG."""

import functools
import hashlib
import io
import os
import struct
import subprocess
import sys
import venv
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as TF
from torchvision.transforms._presets import ImageClassification

from deploy.config import Metadata
from deploy.preprocess import ImageTooLarge, UnreadableImage, endings, open_image, prepare, to_rgb, upright_size
from kdlite.training import loading

PHOTOS = load_sample_images().images
PILLOW = int(PIL.__version__.partition(".")[0])
NORMALISATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def config(height, width, crop=1.0, interpolation="bilinear"):
    return Metadata(["a"], [3, height, width], [0.5] * 3, [0.2] * 3, interpolation, crop)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def by_torchvision(image, config):
    """Resize and crop an image as the evaluation transforms of torchvision and timm do."""
    height, width = config.input_size[1:]
    sides = [int(side / config.crop) for side in (height, width)]
    how = InterpolationMode(config.interpolation)
    resizes = [v2.Resize(sides[0] if height == width else sides, how)]
    if PILLOW >= 13:  # Pillow 13 may resize the height first; 10 to 12 resize the width first
        wide, high = resizes[0](image).size
        resizes = [v2.Resize((image.height, wide), how), v2.Resize((high, wide), how)]
    return np.asarray(v2.Compose([v2.RGB(), *resizes, v2.CenterCrop((height, width))])(image))


@pytest.mark.slow
def test_images_of_a_thousand_sizes_get_the_bytes_of_torchvision():
    """Test both interpolations, square and other sizes, and odd and even margins of the centre crop."""
    random = np.random.default_rng(0)
    odd = 0
    for i in range(1000):
        height, width = random.integers(8, 300, 2)
        top, left = random.integers(0, 427 - height), random.integers(0, 640 - width)
        image = Image.fromarray(PHOTOS[i % 2][top : top + height, left : left + width])
        sides = random.integers(1, 97, 2)
        target = (sides[0], sides[i % 3 and 1]) if i % 2 else (sides[0], sides[0])
        wanted = config(*map(int, target), random.choice([1.0, 0.875, 0.9]), ["bilinear", "bicubic"][i // 2 % 2])
        expected = by_torchvision(image, wanted)
        assert np.array_equal(prepare(image, wanted), expected), (image.size, wanted)
        odd += (int(target[0] / wanted.crop) - target[0]) % 2
    assert odd > 100


@pytest.mark.parametrize("photo", [0, 1])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(
    ("size", "crop", "interpolation"), [(224, 0.875, "bilinear"), (224, 0.9, "bicubic"), (64, 1.0, "bilinear")]
)
def test_training_evaluates_images_as_the_presets_of_torchvision_and_timm_do(photo, upright, size, crop, interpolation):
    image = Image.fromarray(PHOTOS[photo])
    if upright:
        image = image.transpose(Image.Transpose.ROTATE_90)
    ours = TF.normalize(loading.eval_view(image, config(size, size, crop, interpolation)).float() / 255, *NORMALISATION)
    mean, std = NORMALISATION
    preset = ImageClassification(
        crop_size=size, resize_size=int(size / crop), interpolation=InterpolationMode(interpolation)
    )
    timms = timm.data.create_transform((3, size, size), crop_pct=crop, interpolation=interpolation, mean=mean, std=std)
    assert torch.equal(ours, preset(image))
    assert torch.equal(ours, timms(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                                  "LAB", "HSV"])  # fmt: skip
def test_every_mode_gets_the_bytes_of_torchvision(mode):
    photo = Image.fromarray(PHOTOS[0])
    for step in {"RGBa": ["RGBA"], "PA": ["P"]}.get(mode, []):
        photo = photo.convert(step)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        photo = ImageCms.profileToProfile(photo, *profiles, outputMode="LAB")
    image = photo.convert(mode)
    assert image.mode == mode
    wanted = config(64, 64, 0.875)
    assert np.array_equal(prepare(image, wanted), by_torchvision(image, wanted))


def test_paths_bytes_and_open_files_give_the_same_image(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(Image.fromarray(PHOTOS[1])))
    wanted = config(96, 96, 0.9, "bicubic")
    arrays = [prepare(open_image(file), wanted) for file in (path, str(path), path.read_bytes(), path.open("rb"))]
    assert all(np.array_equal(array, arrays[0]) for array in arrays)
    assert arrays[0].dtype == np.uint8


# ---- large photographs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    """Return a photograph of 4000 x 3000 pixels as a JPEG."""
    return jpeg(Image.fromarray(PHOTOS[1]).resize((4000, 3000), Image.Resampling.BICUBIC), quality=90)


@pytest.mark.parametrize("side", [96, 3000 // 8, 376])
def test_a_large_jpeg_is_decoded_at_four_times_the_needed_size_or_more(large, side, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def spy(image, *args, **options):
        sizes.append(image.size)
        return resize(image, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    ours = prepare(open_image(large), config(side, side))
    monkeypatch.undo()
    (width, height), _ = sizes  # the inputs of the two passes
    assert min(width, height) >= 4 * side or (width, height) == (4000, 3000)
    assert (width < 4000) == (side <= 3000 // 8)
    expected = by_torchvision(Image.open(io.BytesIO(large)), config(side, side))
    difference = np.abs(ours.astype(int) - expected)
    assert difference.mean() < 1
    assert (difference.max() == 0) == (width == 4000)


def test_a_training_crop_of_a_jpeg_is_close_to_that_of_torchvision(large):
    """Draw both crops from the same random state. Only a large JPEG differs: it is decoded at a reduced scale."""
    crop = loading.RandomResizedCrop(64, interpolation=InterpolationMode.BILINEAR)
    theirs = v2.Compose([v2.RGB(), v2.RandomResizedCrop(64, interpolation=InterpolationMode.BILINEAR)])
    for seed in range(5):
        torch.manual_seed(seed)
        ours = np.asarray(crop(open_image(large)), dtype=int)
        torch.manual_seed(seed)
        expected = np.asarray(theirs(open_image(large)))
        assert np.abs(ours - expected).mean() < 1.5
    small = Image.fromarray(PHOTOS[0][:100, :120])
    for seed in range(20):
        torch.manual_seed(seed)
        ours = np.asarray(crop(open_image(jpeg(small))))
        torch.manual_seed(seed)
        assert np.array_equal(ours, np.asarray(theirs(open_image(jpeg(small)))))


# ---- EXIF orientation ---------------------------------------------------------------------------------------------


def turned(photo, orientation, kind, **options):
    """Return a file with the photo turned and the EXIF orientation that turns it back."""
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # orientation: values of Image.Transpose
    for method in undo[orientation]:
        photo = photo.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    photo.save(file, kind, exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_an_image_is_turned_upright(kind, options, orientation):
    photo = Image.fromarray(PHOTOS[0][:80, :120])
    file = turned(photo, orientation, kind, **options)
    assert upright_size(open_image(file)) == (120, 80)
    assert np.array_equal(np.asarray(to_rgb(open_image(file))), np.asarray(photo))
    wanted = config(32, 32, 0.875)
    assert np.array_equal(prepare(open_image(file), wanted), prepare(photo, wanted))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_large_turned_jpeg_is_reduced_and_turned_upright(orientation):
    photo = Image.fromarray(PHOTOS[1]).resize((1280, 854), Image.Resampling.BICUBIC)
    image = open_image(turned(photo, orientation, "JPEG", quality=95))
    wanted = config(24, 24)
    difference = np.abs(prepare(image, wanted).astype(int) - prepare(photo, wanted))
    assert difference.mean() < 2
    assert image.size[0] < 800  # decoded at a reduced scale
    torch.manual_seed(0)
    crop = loading.RandomResizedCrop(24, scale=(0.9, 1), interpolation=InterpolationMode.BILINEAR)
    ours = np.asarray(crop(open_image(turned(photo, orientation, "JPEG", quality=95))), dtype=int)
    torch.manual_seed(0)
    assert np.abs(ours - np.asarray(crop(photo))).mean() < 4


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_an_image_with_damaged_exif_is_read(exif):
    photo = Image.fromarray(PHOTOS[0][:40, :60])
    assert to_rgb(open_image(jpeg(photo, exif=exif))).size == (60, 40)


# ---- more than eight bits -----------------------------------------------------------------------------------------


def grey_file(values, kind, **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


GREY = PHOTOS[0][:64, :64, 0]


@pytest.mark.parametrize(
    "file",
    [
        grey_file(GREY.astype(np.uint16) << 8, "PNG"),
        grey_file(GREY.astype(np.uint16) << 8, "TIFF"),
        b"P5 64 64 65535\n" + (GREY.astype(np.uint16) << 8).astype(">u2").tobytes(),  # Pillow opens it with 32 bits
        b"P5 64 64 4095\n" + (GREY.astype(np.uint16) << 4).astype(">u2").tobytes(),  # the file states its 12 bits
        b"P5 64 64 255\n" + GREY.tobytes(),
    ],
    ids=["png", "tiff", "pgm16", "pgm12", "pgm8"],
)
def test_greys_of_8_to_16_bits_are_scaled_by_their_range(file):
    values = np.asarray(to_rgb(open_image(file)))[..., 0].astype(int)
    assert np.abs(values - GREY).max() <= 1


def white_is_zero(tiff):
    """Return a TIFF whose tag 262, PhotometricInterpretation, is 0 instead of 1."""
    entry = bytes.fromhex("0601 0300 01000000")
    assert tiff.count(entry + b"\1") == 1
    return tiff.replace(entry + b"\1", entry + b"\0")


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_zero_is_white_is_inverted(bits):
    values = GREY if bits == 8 else GREY.astype(np.uint16) << 8 | GREY
    read = np.asarray(to_rgb(open_image(white_is_zero(grey_file(values, "TIFF")))))[..., 0]
    assert (read == 255 - GREY).all()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            grey_file((GREY / 255).astype(np.float32), "TIFF"),
            "the range of its pixels, floating-point numbers, is unknown",
        ),
        (grey_file(GREY.astype(np.float32) * 4, "TIFF"), "the range of its pixels, floating-point numbers, is unknown"),
        (grey_file(GREY.astype(np.int32) * 1000, "TIFF"), "the range of its pixels, 32-bit integers, is unknown"),
        (grey_file(GREY.astype(np.uint16) << 4, "PNG"), "12 bits or fewer: scale them to 65535, or save 8 bits"),
        (b"PF 8 8 -1.0\n" + np.zeros((8, 8, 3), np.float32).tobytes(), "floating|identify|PF"),
    ],
    ids=["float01", "float1000", "int32", "12in16", "pfm"],
)
def test_greys_of_unknown_range_are_refused(file, message):
    with pytest.raises(UnreadableImage, match=message):
        to_rgb(open_image(file))


def png(values, colour):
    """Return a 16-bit PNG of values (H, W, C) with this colour type, because Pillow cannot write one."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


COLOUR = PHOTOS[0][:64, :64].astype(np.uint16)
OPAQUE = np.full((64, 64, 1), 65535, np.uint16)


def deep_colour(shift):
    """Return files of 16-bit colours: the values of the photograph, shifted by some bits."""
    values = COLOUR << shift
    return {
        "png": png(values, 2),
        "png with alpha": png(np.concatenate([values, OPAQUE], 2), 6),
        "grey png with alpha": png(np.concatenate([values[..., :1], OPAQUE], 2), 4),
        "ppm": b"P6 64 64 65535\n" + values.astype(">u2").tobytes(),
    }


@pytest.mark.parametrize("kind", deep_colour(8))
def test_16_bit_colours_are_read_unless_they_use_only_12_bits(kind):
    """Test values of 16 and of 12 bits: the high byte of a 12-bit value is almost 0."""
    values = np.asarray(to_rgb(open_image(deep_colour(8)[kind]))).astype(int)
    expected = COLOUR[..., :1] if kind.startswith("grey") else COLOUR
    assert np.abs(values - expected).max() <= 1
    with pytest.raises(UnreadableImage, match="12 bits or fewer: scale them to 65535, or save 8 bits"):
        prepare(open_image(deep_colour(4)[kind]), config(32, 32))


def test_12_bit_colours_are_read_if_the_file_states_their_range():
    file = b"P6 64 64 4095\n" + (COLOUR << 4).astype(">u2").tobytes()
    assert np.abs(np.asarray(to_rgb(open_image(file))).astype(int) - COLOUR).max() <= 1


@pytest.mark.parametrize("colour", [2, 6])
def test_a_black_image_of_16_bit_colours_is_black(colour):
    values = np.zeros((8, 8, 4 if colour == 6 else 3), np.uint16)
    values[..., 3:] = 65535
    assert not np.asarray(to_rgb(open_image(png(values, colour)))).any()


# ---- transparency -------------------------------------------------------------------------------------------------


def logo(hidden):
    """Return a red square on a transparent background that hides a colour."""
    values = np.zeros((40, 60, 4), np.uint8)
    values[..., :3] = hidden
    values[10:30, 10:30] = 200, 30, 30, 255
    return Image.fromarray(values)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_the_colour_under_transparency_does_not_matter(kind, options):
    """Check that two hidden colours give the same image on white."""
    images = [to_rgb(open_image(saved(logo(hidden), kind, **options))) for hidden in ((0, 0, 0), (255, 0, 255))]
    assert np.array_equal(*map(np.asarray, images))
    assert images[0].getpixel((0, 0)) == (255, 255, 255)
    assert images[0].getpixel((20, 20)) == (200, 30, 30)


@pytest.mark.parametrize(
    "mode", ["LA", "PA", "RGBa", "P", "P with alphas", "L with a key", "RGB with a key", "1", "GIF"]
)
def test_transparency_of_every_kind_becomes_white(mode):
    image = logo((0, 0, 0))
    if mode in ("LA", "RGBa"):
        ours = image.convert(mode)
    elif mode == "PA":
        ours = image.convert("P").convert("PA")
        ours.putalpha(image.getchannel("A"))
    elif mode.startswith("P"):
        ours = Image.new("P", image.size, 0)
        ours.putpalette([0, 0, 0, 200, 30, 30])
        ours.paste(1, (10, 10, 30, 30))
        key = bytes([0, 255]) if "alphas" in mode else 0
        ours = open_image(saved(ours, "PNG", transparency=key))
    elif mode == "GIF":
        ours = open_image(saved(image, "GIF"))
    else:
        shape = (40, 60, 3) if mode.startswith("RGB") else (40, 60)
        values = np.zeros(shape, np.uint8)
        values[10:30, 10:30] = 90
        one = Image.fromarray(values > 0 if mode == "1" else values)
        ours = open_image(saved(one, "PNG", transparency=(0, 0, 0) if mode.startswith("RGB") else 0))
    rgb = to_rgb(ours)
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((20, 20)) != (255, 255, 255) or mode == "1"


def test_a_transparent_grey_of_16_bits_is_white():
    values = np.full((40, 60), 7, np.uint16)
    values[10:30, 10:30] = 90 << 8
    file = saved(Image.fromarray(values), "PNG", transparency=7)
    rgb = to_rgb(open_image(file))
    if open_image(file).info.get("transparency") is not None:
        assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((20, 20)) == (90, 90, 90)


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (8, 8), (0, 100, 200, 128))
    assert np.abs(np.array(to_rgb(image).getpixel((0, 0))) - (127, 177, 227)).max() <= 1


def test_training_crops_ignore_the_colour_under_transparency():
    crop = loading.RandomResizedCrop(16, scale=(1, 1), interpolation=InterpolationMode.BILINEAR)
    crops = [np.asarray(crop(open_image(saved(logo(hidden), "PNG")))) for hidden in ((0, 0, 0), (255, 0, 255))]
    assert np.array_equal(*crops)


def test_a_black_image_of_16_bit_greys_is_black():
    assert not np.asarray(to_rgb(open_image(grey_file(np.zeros((8, 8), np.uint16), "PNG")))).any()


# ---- Pillow 10 to 13 ----------------------------------------------------------------------------------------------

SHAPES = """
import hashlib, sys
import numpy as np
from PIL import Image
from deploy.config import Metadata
from deploy.preprocess import prepare
random, digest = np.random.default_rng(0), hashlib.sha256()
for i in range(600):
    height, width = random.integers(4, 250, 2)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    sides = [int(side) for side in random.integers(8, 200, 2)] if i % 2 else [int(random.integers(8, 200))] * 2
    how, crop = ("bilinear", "bicubic")[i // 2 % 2], (1.0, 0.875)[i // 4 % 2]
    digest.update(prepare(image, Metadata(["a"], [3, *sides], [0.5] * 3, [0.2] * 3, how, crop)).tobytes())
print(digest.hexdigest())
"""


def test_a_shape_that_pillow_13_resizes_in_another_order_has_the_bytes_of_pillow_12():
    """Resize a tall image three times. Pillow 10.4, 11.3, 12.2 and 13.0 gave these digests."""
    random = np.random.default_rng(1)
    tall = Image.fromarray(random.integers(0, 256, (200, 40, 3), dtype=np.uint8))
    digests = [
        hashlib.sha256(prepare(tall, wanted).tobytes()).hexdigest()[:16]
        for wanted in (config(96, 192), config(64, 64, 0.875), config(96, 192, 1.0, "bicubic"))
    ]
    assert digests == ["0e0bb3c47adb7087", "93356a31a26349b4", "7242be4ce9383a08"]


@pytest.mark.trial
@pytest.mark.parametrize("version", ["10.4.0", "11.3.0", "12.2.0", "13.0.0"])
def test_any_shape_has_the_same_bytes_with_every_pillow(version, tmp_path):
    """Install each version in an environment without torch, and compare its bytes with this Pillow's."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin/python"
    fetched = subprocess.run([python, "-m", "pip", "install", "-q", f"pillow=={version}", "numpy"], capture_output=True)
    if fetched.returncode:
        pytest.skip("pip cannot fetch Pillow here")
    root = str(Path(__file__).resolve().parents[2])
    digests = [
        subprocess.run(
            [one, "-c", SHAPES], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, check=True
        ).stdout
        for one in (python, sys.executable)
    ]
    assert digests[0] == digests[1]


# ---- unreadable files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"no image", b"", "truncated"])
def test_every_damaged_file_raises_unreadable_image(damage):
    whole = jpeg(Image.fromarray(PHOTOS[0]))
    with pytest.raises(UnreadableImage, match=r"OSError: |not an image of a known format: "):
        to_rgb(open_image(whole[: len(whole) // 2] if damage == "truncated" else damage))


@pytest.mark.parametrize("place", [60, 300, 0.5, 0.9])
def test_a_png_with_a_wrong_byte_in_its_pixels_is_unreadable(place):
    """Read the size, and prepare the image, as all programs do: EXIF may stand behind the pixels of a PNG."""
    file = io.BytesIO()
    Image.fromarray(PHOTOS[0][:64, :96]).save(file, "PNG")
    damaged = bytearray(file.getvalue())
    damaged[int(len(damaged) * place) if isinstance(place, float) else place] ^= 255
    for read in (upright_size, to_rgb, functools.partial(prepare, metadata=config(32, 32))):
        with pytest.raises(UnreadableImage, match="Error: "):
            read(open_image(bytes(damaged)))


NOT_READ = {
    b"": "it is empty",
    b"\0\0\0\x18ftypheic\0\0": "HEIC, as iPhones make it",
    b"\0\0\0 ftypmif1": "HEIF: convert",
    b"\xff\x0a\x7f": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n": "JPEG XL",
    b"\xef\xbb\xbf<?xml version": "SVG drawing: export",
    b"\n<svg xmlns=": "SVG, a drawing",
    b"%PDF-1.7": "PDF: export the page",
    b"data:image/png;base64,": "base64",
    b"hello there": "it starts with b'hello th'",
    b"\xff\xd8\xff\xe0\0\x04ab hello": "it starts like JPEG, but its bytes are damaged",
    b"\x89PNG\r\n\x1a\n\0\0": "it starts like PNG, but its bytes are damaged",
}


@pytest.mark.parametrize(("content", "message"), NOT_READ.items())
def test_a_format_that_is_not_read_is_named(content, message, tmp_path):
    """Open bytes, paths and a stream. No error may contain the address of a Python object."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for file in (content, path, str(path), io.BytesIO(content)):
        with pytest.raises(UnreadableImage, match="not an image of a known format: ") as error:
            open_image(file)
        assert message in str(error.value)
        assert " at 0x" not in str(error.value)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        open_image(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        open_image(str(tmp_path))


def test_formats_that_would_run_another_program_are_not_read():
    assert {".jpg", ".jfif", ".png", ".webp", ".avif", ".gif", ".tif", ".bmp"} <= endings()
    assert not {".eps", ".ps", ".wmf", ".pdf", ".mpg"} & endings()
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_a_missing_file_and_a_decompression_bomb_are_errors():
    with pytest.raises(UnreadableImage, match="No such file"):
        open_image("nowhere.jpg")
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    with pytest.raises(ImageTooLarge):
        open_image(file.getvalue())


@pytest.mark.parametrize("size", [(65535, 1), (1, 65535)])
def test_a_strip_is_refused_before_it_is_resized(size):
    """Open strips that would take 13 GB after the resize."""
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    with pytest.raises(ImageTooLarge, match="would become"):
        prepare(open_image(file.getvalue()), config(224, 224))

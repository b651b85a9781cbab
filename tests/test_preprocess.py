"""deploy.preprocess: a photograph becomes torchvision's bits, and nearly so where a large JPEG is read small."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as TF
from torchvision.transforms._presets import ImageClassification

import train
from deploy.preprocess import ImageTooLarge, UnreadableImage, open_image, prepare, to_rgb

PHOTOS = load_sample_images().images
NORMALISATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def config(height, width, crop=1.0, interpolation="bilinear"):
    return {"input_size": [3, height, width], "crop": crop, "interpolation": interpolation}


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def torchvisions(image, config):
    """Resize and CenterCrop of an RGB image, as torchvision's and timm's evaluation transforms put them together."""
    height, width = config["input_size"][1:]
    sides = [int(side / config["crop"]) for side in (height, width)]
    resize = v2.Resize(sides[0] if height == width else sides, InterpolationMode(config["interpolation"]))
    return np.asarray(v2.Compose([v2.RGB(), resize, v2.CenterCrop((height, width))])(image))


def test_a_thousand_sizes_are_torchvisions_to_the_bit():
    """Cut from real photographs, both interpolations, square and oblong; odd and even margins of the centre crop."""
    random = np.random.default_rng(0)
    odd = 0
    for i in range(1000):
        height, width = random.integers(8, 300, 2)
        top, left = random.integers(0, 427 - height), random.integers(0, 640 - width)
        image = Image.fromarray(PHOTOS[i % 2][top : top + height, left : left + width])
        sides = random.integers(1, 97, 2)
        target = (sides[0], sides[i % 3 and 1]) if i % 2 else (sides[0], sides[0])
        wanted = config(*map(int, target), random.choice([1.0, 0.875, 0.9]), ["bilinear", "bicubic"][i // 2 % 2])
        expected = torchvisions(image, wanted)
        assert np.array_equal(prepare(image, wanted), expected), (image.size, wanted)
        odd += (int(target[0] / wanted["crop"]) - target[0]) % 2
    assert odd > 100


@pytest.mark.parametrize("photo", [0, 1])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(
    ("size", "crop", "interpolation"), [(224, 0.875, "bilinear"), (224, 0.9, "bicubic"), (64, 1.0, "bilinear")]
)
def test_training_evaluates_on_torchvisions_and_timms_own_presets(photo, upright, size, crop, interpolation):
    image = Image.fromarray(PHOTOS[photo])
    if upright:
        image = image.transpose(Image.Transpose.ROTATE_90)
    ours = TF.normalize(train.eval_view(image, config(size, size, crop, interpolation)).float() / 255, *NORMALISATION)
    mean, std = NORMALISATION
    preset = ImageClassification(
        crop_size=size, resize_size=int(size / crop), interpolation=InterpolationMode(interpolation)
    )
    timms = timm.data.create_transform((3, size, size), crop_pct=crop, interpolation=interpolation, mean=mean, std=std)
    assert torch.equal(ours, preset(image))
    assert torch.equal(ours, timms(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                                  "LAB", "HSV"])  # fmt: skip
def test_every_mode_is_torchvisions_rgb_to_the_bit(mode):
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
    assert np.array_equal(prepare(image, wanted), torchvisions(image, wanted))


def test_a_file_its_path_and_its_bytes_are_the_same(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(Image.fromarray(PHOTOS[1])))
    wanted = config(96, 96, 0.9, "bicubic")
    arrays = [prepare(open_image(file), wanted) for file in (path, str(path), path.read_bytes(), path.open("rb"))]
    assert all(np.array_equal(array, arrays[0]) for array in arrays)
    assert arrays[0].dtype == np.uint8


# ---- large photographs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    """A JPEG of 12 megapixels: a real photograph, four thousand pixels wide."""
    return jpeg(Image.fromarray(PHOTOS[1]).resize((4000, 3000), Image.Resampling.BICUBIC), quality=90)


@pytest.mark.parametrize("side", [96, 3000 // 8, 376])
def test_a_large_jpeg_is_decoded_at_no_less_than_four_times_what_is_asked(large, side, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def spy(image, *args, **options):
        sizes.append(image.size)
        return resize(image, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    ours = prepare(open_image(large), config(side, side))
    monkeypatch.undo()
    ((width, height),) = sizes
    assert min(width, height) >= 4 * side or (width, height) == (4000, 3000)
    assert (width < 4000) == (side <= 3000 // 8)
    expected = torchvisions(Image.open(io.BytesIO(large)), config(side, side))
    difference = np.abs(ours.astype(int) - expected)
    assert difference.mean() < 1
    assert (difference.max() == 0) == (width == 4000)


def test_a_training_crop_of_a_large_jpeg_reads_no_more_than_it_needs(large):
    """The same box as torchvision's, drawn from the same state; all of the image where the box is small."""
    crop = train.RandomResizedCrop(64, interpolation=InterpolationMode.BILINEAR)
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


# ---- what cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"no image", b"", "truncated"])
def test_a_damaged_file_is_one_kind_of_error(damage):
    whole = jpeg(Image.fromarray(PHOTOS[0]))
    with pytest.raises(UnreadableImage, match=r"\w+Error: "):
        to_rgb(open_image(whole[: len(whole) // 2] if damage == "truncated" else damage))


def test_a_missing_file_and_a_bomb_are_told():
    with pytest.raises(UnreadableImage, match="No such file"):
        open_image("nowhere.jpg")
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    with pytest.raises(ImageTooLarge):
        open_image(file.getvalue())


@pytest.mark.parametrize("size", [(65535, 1), (1, 65535)])
def test_a_strip_is_refused_before_it_is_resized(size):
    """At 224 px it would take 17 GB."""
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    with pytest.raises(ImageTooLarge, match="would become"):
        prepare(open_image(file.getvalue()), config(224, 224))

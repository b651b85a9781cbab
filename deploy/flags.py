"""How a run is trained unless it is told: by name, by data set, and by what a folder holds. For train.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Groups of defaults; any flag overrides. cifar, imagenet-cnn and imagenet-vit: the schedules and hyperparameters
# behind the paper's tables (arXiv 2303.13005 and its official configs).
RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(
        epochs=10, batch_size=32, opt="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=1,
        step_epochs=[5, 8], step_factor=0.1, img_size=32, crop="pad", hflip=0.0,
    ),
    "cifar": dict(
        epochs=200, batch_size=128, opt="momentum", lr=0.1, weight_decay=5e-4, schedule="step",
        step_epochs=[60, 120, 160], step_factor=0.2, img_size=32, crop="pad", hflip=0.5, small_stem=True,
        gamma=3.5, temperature=3.0, alpha=0.1, mu=0.1,
    ),
    "imagenet-cnn": dict(
        epochs=100, batch_size=256, opt="momentum", lr=0.1, weight_decay=1e-4, schedule="step",
        step_epochs=[30, 60, 90], step_factor=0.1, img_size=224, crop="resized", hflip=0.5, eval_crop=0.875,
    ),
    "imagenet-vit": dict(
        epochs=300, batch_size=1024, opt="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=5,
        step_epochs=[150, 225], step_factor=0.1, img_size=224, crop="resized", hflip=0.5, eval_crop=0.9,
        interpolation="bicubic", mixup=0.8, cutmix=1.0, label_smoothing=0.1, randaugment=[2, 9], random_erasing=0.25,
        gamma=1.0,
    ),
}  # fmt: skip
BY_DATA = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar"}  # a folder: pick_recipe
LARGE = 100_000  # training images
STEPS = 12_000  # optimizer steps of a run on a smaller folder, from random weights
FINE_TUNING_STEPS = 1500  # and from pretrained ones


def pick_recipe(
    images: int, classes: int, size: tuple[int, int], pretrained: bool, img_size: Sequence[int] | None = None
) -> tuple[dict[str, Any], str]:
    """Defaults that fit a folder of photographs, as one of RECIPES, and a line that says what was picked and why.

    From random weights, 100,000 images and more of at least 100 px get imagenet-cnn. Any other folder gets AdamW with
    a cosine, batches of 16 to 64 (32 for some thousand images) and as many epochs as make a number of steps.

    Args:
        images: training images
        classes: of them
        size: (height, width) of a typical one, in pixels
        pretrained: whether the student starts from weights of other images; their own mean, std, interpolation and
            crop are not picked here
        img_size: a side, or height and width, that the student is to see; None: what fits

    Returns:
        The recipe, with the keys of RECIPES, and the line.
    """
    short = min(size)
    seen = f"defaults for {images} images of {classes} classes, {size[1]}x{size[0]} pixels"
    if images >= LARGE and short >= 100 and not pretrained:
        return RECIPES["imagenet-cnn"], f"{seen}: as imagenet-cnn"
    # pretrained weights know objects of 100 pixels and more: small photographs are enlarged for them
    wanted = max(128.0, 2.5 * short) if pretrained else short
    side = min(img_size) if img_size else min(max(32, 32 * round(wanted / 32)), 224)
    batch_size = 2 ** min(max(round(math.log2(3.2 * images**0.25)), 4), 6, int(math.log2(images)))
    steps, fewest, most = (FINE_TUNING_STEPS, 10, 50) if pretrained else (STEPS, 30, 200)
    epochs = min(max(round(steps / (images // batch_size)), fewest), most)
    lr = 5e-4 if pretrained else 2e-3
    small_stem = side <= 64 and not pretrained
    large_view = side > 64
    recipe: dict[str, Any] = dict(
        epochs=epochs, batch_size=batch_size, opt="adamw", lr=lr, weight_decay=0.05, schedule="cosine",
        warmup_epochs=epochs / 20, step_epochs=[epochs / 2, epochs * 3 / 4], step_factor=0.1, img_size=side,
        crop="resized" if large_view else "pad", hflip=0.5, eval_crop=0.875 if large_view else 1.0,
        small_stem=small_stem, label_smoothing=0.1,
    )  # fmt: skip
    start = "pretrained weights" if pretrained else "a 3x3 stem" if small_stem else "random weights"
    return recipe, (f"{seen}: {start} at {side} px, AdamW {lr:g}, cosine, {epochs} epochs of "
                    f"{images // batch_size} steps of {batch_size} images")  # fmt: skip

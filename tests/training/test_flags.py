"""deploy/flags.py: defaults that fit a folder."""

import functools

import pytest
import torch

import train
from deploy.flags import RECIPES, pick_recipe, settle_flags

IMAGES = [(2, 2), (5, 2), (37, 3), (200, 5), (3000, 10), (10_000, 20), (99_999, 200), (10**7, 1000)]


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (64, 64), (375, 500), (4000, 50)])
@pytest.mark.parametrize(("images", "classes"), IMAGES)
def test_a_picked_recipe_makes_a_run(images, classes, size, pretrained):
    """It has a whole batch, every key of a recipe, and an optimizer and a schedule can be made of it."""
    recipe, line = pick_recipe(images, classes, size, pretrained)
    assert RECIPES["imagenet-cnn"].keys() <= recipe.keys()
    assert 2 <= recipe["batch_size"] <= images
    assert recipe["epochs"] >= 10
    assert recipe["img_size"] % 32 == 0
    assert "\n" not in line
    assert f"{images} images of {classes} classes" in line
    args, given = settle_flags(train.FLAGS, {"data": "photos"}, fitted=recipe)
    assert (args.recipe, given["fitted"]) == ("fitted", recipe)
    _, scheduler = train.build_optimizer(torch.nn.Linear(2, 2), args, 10)
    assert scheduler.optimizer.param_groups[0]["lr"] <= recipe["lr"]


def test_large_photographs_in_large_numbers_keep_the_papers_schedule():
    assert pick_recipe(1_281_167, 1000, (375, 500), False)[0] == RECIPES["imagenet-cnn"]
    assert pick_recipe(1_281_167, 1000, (64, 64), False)[0] != RECIPES["imagenet-cnn"]


def test_a_small_folder_gets_steps_and_a_small_image_its_pixels():
    photographs, small = (pick_recipe(3000, 10, size, False)[0] for size in ((480, 640), (32, 32)))
    assert (photographs["img_size"], photographs["small_stem"], photographs["crop"]) == (224, False, "resized")
    assert (small["img_size"], small["small_stem"], small["crop"]) == (32, True, "pad")
    for recipe in (photographs, small):
        assert 6000 < recipe["epochs"] * (3000 // recipe["batch_size"]) < 20_000


def test_pretrained_weights_keep_their_stem_and_are_tuned_gently():
    pick = functools.partial(pick_recipe, 3000, 10, (64, 64))
    tuned, new = pick(True)[0], pick(False)[0]
    assert not tuned["small_stem"]
    assert tuned["lr"] < new["lr"] / 2
    assert tuned["epochs"] < new["epochs"] / 2
    assert tuned["img_size"] > new["img_size"]

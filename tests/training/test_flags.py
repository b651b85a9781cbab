"""Test deploy/flags.py: recipes, the defaults for a folder, and the flags that a run stores."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import args_of, opened

import train
from deploy.cli import UserError
from deploy.flags import RECIPES, pick_recipe, settle_flags
from deploy.run_directory import read_given
from kdlite.training import teacher_labels

ROOT = Path(__file__).resolve().parents[2]
IMAGES = [(2, 2), (5, 2), (37, 3), (200, 5), (3000, 10), (10_000, 20), (99_999, 200), (10**7, 1000)]


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (64, 64), (375, 500), (4000, 50)])
@pytest.mark.parametrize(("images", "classes"), IMAGES)
def test_a_picked_recipe_is_complete_and_builds_an_optimizer(images, classes, size, pretrained):
    """Check the keys and the batch size of a recipe, and build its optimizer and its schedule."""
    recipe, line = pick_recipe(images, classes, size, pretrained)
    assert RECIPES["imagenet-cnn"].keys() <= recipe.keys()
    assert 2 <= recipe["batch_size"] <= images
    assert recipe["epochs"] >= 5
    assert recipe["img_size"] % 32 == 0
    assert "\n" not in line
    assert f"{images} images of {classes} classes" in line
    args, given = settle_flags(train.FLAGS, {"data": "photos"}, fitted=recipe)
    assert (args.recipe, given["fitted"]) == ("fitted", recipe)
    net = torch.nn.Linear(2, 2)
    scheduler = train.build_schedule(net, train.build_optimizer(net, args), args, 10)
    assert scheduler.optimizer.param_groups[0]["lr"] <= recipe["lr"]


def test_a_large_set_of_large_photographs_keeps_the_schedule_of_the_paper():
    assert pick_recipe(1_281_167, 1000, (375, 500), False)[0] == RECIPES["imagenet-cnn"]
    assert pick_recipe(1_281_167, 1000, (64, 64), False)[0] != RECIPES["imagenet-cnn"]


def test_a_small_folder_gets_enough_steps_and_a_small_image_keeps_its_size():
    photographs, small = (pick_recipe(3000, 10, size, False)[0] for size in ((480, 640), (32, 32)))
    assert (photographs["img_size"], photographs["small_stem"], photographs["crop"]) == (224, False, "resized")
    assert (small["img_size"], small["small_stem"], small["crop"]) == (32, True, "pad")
    for recipe in (photographs, small):
        assert 6000 < recipe["epochs"] * (3000 // recipe["batch_size"]) < 20_000


def test_pretrained_weights_keep_their_stem_and_get_a_lower_rate_and_fewer_epochs():
    pick = functools.partial(pick_recipe, 3000, 10, (64, 64))
    tuned, new = pick(True)[0], pick(False)[0]
    assert not tuned["small_stem"]
    assert tuned["lr"] < new["lr"] / 2
    assert tuned["epochs"] < new["epochs"] / 2
    assert tuned["img_size"] > new["img_size"]


# ---- the table ----


def test_flags_are_read_without_torch():
    program = "import sys; from deploy import flags; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    for flags, status in ((["--help"], 0), (["--kd", "nkd"], 2), (["--epochs", "0"], 2)):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "train.py", *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status
        assert not re.search(r"\| +torch\b", done.stderr)


def test_each_flag_of_the_labels_command_has_the_same_meaning_in_train():
    ours = {name: flag for group in train.FLAGS.values() for name, flag in group.items()}
    theirs = {name: flag for group in teacher_labels.FLAGS.values() for name, flag in group.items()}
    for name in theirs.keys() - {"output", "views", "top_k"}:
        assert theirs[name].default == ours[name].default
        assert theirs[name].path == ours[name].path
        same = ("choices", "nargs", "const", "action", "metavar")
        assert [theirs[name].options.get(key) for key in same] == [ours[name].options.get(key) for key in same]


@pytest.mark.parametrize(("stored", "message"), [
    ({"momentum": 0.8}, "started with --momentum 0.8, which this train.py does not have"),
    ({"sync_bn": True}, "started with --sync-bn True"),
])  # fmt: skip
def test_a_resume_is_refused_if_train_py_lacks_a_stored_flag(stored, message):
    with pytest.raises(UserError, match=message):
        settle_flags(train.FLAGS, {"resume": True, "output": "out"}, stored)


def test_a_resume_keeps_the_stored_values_of_renamed_flags():
    stored = {"kd": "kd", "teacher": "t/student", "kd_temperature": 2.0, "channels_last": True, "step_epochs": [3.0],
              "momentum": 0.9}  # fmt: skip
    args, _ = settle_flags(train.FLAGS, {"resume": True, "output": "out"}, stored)
    assert (args.temperature, args.step_epochs) == (2.0, [3.0])


@pytest.mark.parametrize(("flags", "temperature"), [
    (["--kd", "kd"], 4.0), (["--kd", "nkd"], 1.0), (["--kd", "nkd", "--recipe", "cifar"], 3.0),
    (["--kd", "kd", "--recipe", "cifar"], 4.0), (["--kd", "kd", "--temperature", "2"], 2.0),
])  # fmt: skip
def test_the_default_temperature_depends_on_the_method_and_the_recipe(flags, temperature):
    assert args_of(*flags, "--teacher", "resnet18").temperature == temperature


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_sets_the_flags_of_imagenet_cnn(recipe):
    assert RECIPES["imagenet-cnn"].keys() <= RECIPES[recipe].keys() | {"eval_crop"}


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", "x"), ("epochs", 0), ("batch_size", -4), ("recipe", "nope"), ("kd", 7), ("crop", "zigzag"), ("hflip", 7),
    ("lr", 1e400), ("randaugment", [1]), ("seed", 2**70), ("in_chans", 2), ("step_epochs", "abc"), ("step_factor", []),
    ("fitted", 3), ("fitted", {"epochs": 3}), ("fitted", RECIPES["digits"] | {"eval_crop": 1.0, "epochs": "x"}),
    ("epochs", None), ("epochs", 10**400), ("img_size", None), ("img_size", []),
    ("model", []), ("data", []), ("data", False),
])  # fmt: skip
def test_a_damaged_value_in_args_json_is_an_error_of_one_line(name, value):
    with pytest.raises(UserError, match=r"^args.json of the run is damaged: ") as raised:
        settle_flags(train.FLAGS, {"resume": True, "output": "out"}, {name: value})
    assert "\n" not in str(raised.value)


def test_stored_flags_keep_their_values():
    stored = opened("--lr", 0.003, "--mixup", 0.2, "--small-stem", "--model-args", "a=1", "--randaugment", 1, 9)[1]
    args, given = settle_flags(train.FLAGS, {"resume": True, "output": "out"}, stored)
    assert given == stored
    assert (args.lr, args.mixup, args.small_stem, args.model_args) == (0.003, 0.2, True, ["a=1"])


@pytest.mark.parametrize("typed", [{"small_stem": False}, {"pretrained": False}, {"model_args": []}])
def test_a_resume_accepts_a_flag_that_repeats_its_default(typed):
    settle_flags(train.FLAGS, {"resume": True, "output": "out", **typed}, {"epochs": 2})


def test_random_erasing_is_off_with_stored_labels():
    typed = {"recipe": "imagenet-vit", "kd": "nkd", "teacher_labels": "L", "mixup": 0.0, "cutmix": 0.0}
    assert settle_flags(train.FLAGS, typed)[0].random_erasing == 0


@pytest.mark.parametrize(
    "content", ["", "[]", "1", "{}", '{"given": null}', '{"given": []}', '{"given": [[3, 1]]}', '{"given": "x"}']
)
def test_args_json_without_the_flags_as_an_object_is_an_error(tmp_path, content):
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*args.json, which a resume needs: "):
        read_given(tmp_path)

"""Test python -m kdlite.training.tune: the choice of a loss and its weights on the training images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import refused, run

import train
from deploy.cli import UserError
from kdlite.training import launch, teacher_labels, tune
from kdlite.training.launch import gain, of_labels

MODELS = Path(__file__).parents[1].joinpath("own_models.py")
TINY = ["--device", "cpu", "--model", f"{MODELS}:tiny", "--img-size", "16", "--workers", "0"]
RECIPE = ["--recipe", "digits", "--batch-size", "8", "--crop", "none"]
TEACHER = ["--teacher", "t/student", "--model-file", f"{MODELS}:tiny"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Write photos/ with two classes, and a teacher of them in t/."""
    monkeypatch.chdir(tmp_path)
    for name, low in (("dark", 0), ("bright", 130)):
        for part, count in (("train", 20), ("val", 4)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([i, low]).integers(low, low + 120, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}{i:02}.png")


def call(*flags, check=0):
    assert tune.main([str(flag) for flag in flags]) == check


def run_here(command, output):
    """Run the command of a child process in the process of the tests."""
    main = train.main if command[1].endswith("train.py") else teacher_labels.main
    assert main(command[2:] if main is train.main else command[3:]) == 0


def test_a_fifth_of_the_training_images_validates_and_no_validation_image_is_used(photos):
    tune.link_images("photos", None, Path("images"))
    links = list(Path("images").rglob("*.png"))
    assert {link.resolve().parents[1].name for link in links} == {"train"}
    assert len(links) == len({link.resolve() for link in links}) == 40
    assert len(list(Path("images/val").rglob("*.png"))) == 8


def test_the_command_for_labels_gets_only_its_own_flags():
    flags = ["--data", "d", "--lr", "0.1", "--img-size", "32", "64", "--ema-decay=0.9", "--hflip=0", "--model", "m"]
    assert of_labels(flags) == ["--data", "d", "--img-size", "32", "64", "--hflip=0", "--model", "m"]


def test_a_gain_has_the_paired_error_of_its_images():
    right, base = np.array([1.0, 1, 0, 1]), np.array([1.0, 0, 0, 0])
    assert gain(right, base) == (50.0, pytest.approx(100 * np.std([0, 1, 0, 1]) / 2))


def test_an_arm_within_two_errors_of_the_best_is_not_told_apart(capsys):
    rng = np.random.default_rng(0)
    best = (rng.random(1000) < 0.7).astype(float)
    near = best.copy()
    near[:10] = 1 - near[:10]
    found = {"best": best, "near": near, "far": np.zeros(1000), "dropped": best}
    assert tune.report(found, (4, 3)) == "best"
    printed = capsys.readouterr().out
    assert re.search(r"not told apart from best .*: near$", printed, re.M)
    assert re.search(r"^\| far \| 2 \| 0\.0 \| \d+\.\d \+- \d\.\d \|$", printed, re.M)
    assert "| dropped | 1 |" in printed


@pytest.mark.slow
def test_tune_runs_its_rounds_and_prints_a_command_that_train_py_accepts(photos, monkeypatch, capsys):
    run(*TINY, *RECIPE, "--data", "photos", "--epochs", 3, "--reference", 0, "--output", "t")
    commands = []
    monkeypatch.setattr(launch, "run", lambda command, output: (commands.append(command), run_here(command, output)))
    monkeypatch.setattr(tune, "make_plan", lambda *_: 1)
    flags = ["--data", "photos", *TEACHER, *TINY, *RECIPE, "--views", 1, "--output", "out"]
    call(*flags)
    printed = capsys.readouterr().out
    assert "plan: 9 arms of 1 epochs, 4 arms of 2 epochs, 2 arms of 4 epochs" in printed
    (line,) = re.findall(r"^next: torchrun train\.py (.*)$", printed, re.M)
    train.parse_flags(line.split())
    assert "--data photos" in line
    assert len(commands) == 1 + sum(tune.RUNGS)  # the labels, and each arm of each round

    assert json.loads(Path("out/plan.json").read_text())["epochs"] == 1
    monkeypatch.delattr(tune, "make_plan")  # a second call takes the plan of the first
    monkeypatch.setattr(tune, "tune", lambda *_: dict.fromkeys(tune.ARMS, np.ones(4)))
    call(*flags)


def test_a_time_that_is_too_short_is_refused(photos, monkeypatch):
    monkeypatch.setattr(tune, "run_arm", lambda *_: (np.ones(8), 60.0))
    with pytest.raises(UserError, match="the shortest plan takes 25 minutes"):
        tune.make_plan([], Path("labels"), Path("out"), tune.time.monotonic() + 60)


@pytest.mark.parametrize("flag", ["--kd", "--gamma=1", "--epochs", "--teacher-labels"])
def test_a_flag_that_is_chosen_here_is_refused(photos, capsys, flag):
    line = refused(capsys, "--data", "photos", "--teacher", "t", flag, "1", command=call, program="tune")
    assert "is chosen here" in line


def test_a_data_set_that_is_not_a_folder_is_refused(photos, capsys):
    line = refused(capsys, "--data", "digits", "--teacher", "t", command=call, program="tune")
    assert "expected a folder of photographs" in line

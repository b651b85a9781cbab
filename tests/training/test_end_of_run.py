"""Test the messages at the start and at the end of a run, and the temperature and threshold of its student."""

import json
import re
import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from running import run
from students import write_student
from test_train import MODELS, RESUME, TINY, TORCHRUN, in_an_empty_folder, photos, script  # noqa: F401

from deploy.confidence import fit_confidence
from deploy.config import read_config
from deploy.preprocess import UnreadableImage
from deploy.runtimes import Runtime
from kdlite.training import outputs

CPU = torch.device("cpu")


def numbers_of(folder):
    config = read_config(Path(folder) / "student")
    return config.temperature, config.threshold


@pytest.fixture
def student_of(tmp_path, monkeypatch):
    """Return a function that writes a student/ folder whose runtime returns given logits."""

    def make(logits):
        student = write_student(tmp_path / "student", f"{MODELS}:tiny", 16, logits.shape[1])
        rows, metadata = iter(logits.astype(np.float32)), read_config(student)
        runtime = Runtime("torch", "cpu", metadata, lambda images: np.stack([next(rows) for _ in images]))
        monkeypatch.setattr(outputs, "load", lambda *_: runtime)
        return student

    return make


@pytest.mark.slow
def test_a_finished_run_stores_a_threshold_that_a_resume_computes_again(capsys):
    run(*TINY, "--epochs", 2, "--output", "out")
    text = capsys.readouterr().out
    stored = numbers_of("out")
    assert 0.1 < stored[1] < 1
    assert '"none of these" below a probability of ' in text
    assert "of 60 validation images are answered" in text
    card = Path("out/student/README.md").read_text()
    assert f"- none of these: the answer if the largest probability is below {stored[1]:g}; 95 % " in card
    assert (stored[0] is None) == ("which divides the logits" not in card)
    config = json.loads(Path("out/student/config.json").read_text())
    run(*RESUME)
    assert numbers_of("out") == stored
    assert json.loads(Path("out/student/config.json").read_text()) == config
    run(*RESUME, "--epochs", 3)
    assert numbers_of("out")[1]


@pytest.mark.slow
def test_temperature_and_threshold_are_fitted_to_the_saved_student_on_all_validation_images(capsys):
    run(*TINY, "--output", "out", "--reference", 60)
    arrays = np.load("out/reference.npz")
    bare = replace(read_config(Path("out/student")), temperature=None)
    expected = fit_confidence(arrays["logits"], arrays["labels"], bare)
    assert numbers_of("out") == pytest.approx(expected[:2])
    assert expected.description in capsys.readouterr().out


@pytest.mark.slow
def test_with_few_validation_images_temperature_and_threshold_are_not_fitted(photos, capsys):  # noqa: F811
    run(*TINY, "--data", photos, "--batch-size", 8, "--workers", 0, "--output", "out")
    assert numbers_of("out") == (None, None)
    out = capsys.readouterr().out
    assert "temperature and threshold are not fitted: 17 validation images are fewer than 40" in out
    assert "17 validation images: one image is 5.9 points of top-1" in out
    assert "training images of each class: china 24, flower 24" in out


@pytest.mark.trial
def test_two_ranks_fit_temperature_and_threshold_once_on_all_images():
    flags = ["--device", "cpu", "--model", f"{MODELS}:tiny", "--epochs", "1", "--img-size", "16", "--output", "two"]
    two = script(*flags, command=[*TORCHRUN, "--standalone", "--nproc-per-node", "2"], env={"GLOO_SOCKET_IFNAME": "lo"})
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("of 360 validation images are answered") == 1
    assert numbers_of("two")[1]


@pytest.mark.slow
def test_the_command_in_the_last_line_can_be_pasted_into_a_shell(tmp_path, capsys):
    run(*TINY, "--output", "my runs/a'b")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: python -m deploy.export ")
    assert shlex.split(last.removeprefix("next: "))[3:] == ["my runs/a'b", "--model-file", f"{MODELS}:tiny"]


@pytest.mark.parametrize("logits", [np.full((60, 2), np.nan), np.tile([[np.inf, 0]], (60, 1))])
def test_logits_that_are_not_finite_give_a_message_of_one_line(logits, student_of):
    student = student_of(logits)
    line = outputs.keep_confidence(student, Images(60), CPU, 0, [], 1)
    assert "60 of 60 images are not finite" in line
    assert "\n" not in line
    assert numbers_of(student.parent) == (None, None)


class Images:
    """Store the index of each image that is read. Every `broken`-th image is unreadable."""

    samples: ClassVar = []

    def __init__(self, count, broken=10**9):
        self.count, self.broken, self.read = count, broken, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        if index % self.broken == self.broken - 1:
            raise UnreadableImage("broken")
        return Image.new("RGB", (16, 16)), index % 2


def test_at_most_ten_thousand_images_are_read_and_unreadable_images_are_skipped(student_of):
    student = student_of(np.random.default_rng(0).normal(size=(10_000, 2)))
    images = Images(25_000, broken=10)
    line = outputs.keep_confidence(student, images, CPU, 0, [], 1)
    assert len(images.read) == 10_000
    assert (images.read[0], images.read[-1]) == (0, 24_999)
    assert f"of {sum(index % 10 != 9 for index in images.read)} validation images are answered" in line


def test_with_many_classes_fewer_images_are_read(student_of, monkeypatch):
    monkeypatch.setattr(outputs, "MOST_LOGITS", 500)
    images = Images(200)
    outputs.keep_confidence(student_of(np.random.default_rng(0).normal(size=(200, 5))), images, CPU, 0, [], 1)
    assert len(images.read) == 100


# ---- the start -----------------------------------------------------------------------------------------------------


def data_of(*counts, val=1000, names=None):
    labels = np.repeat(np.arange(len(counts)), counts)
    names = names or [f"c{i}" for i in range(len(counts))]
    return Namespace(train=Namespace(targets=labels, classes=names), val=range(val), label_names=names)


def test_the_sizes_of_the_classes_and_the_part_of_one_image_in_top1_are_printed():
    lines = outputs.describe_balance(data_of(30, 20, val=59), False).splitlines()
    assert lines == [
        "training images of each class: c0 30, c1 20",
        "59 validation images: one image is 1.7 points of top-1",
    ]
    many = outputs.describe_balance(data_of(*range(5, 105)), False)
    assert "training images of each class: from 5 (c0) to 104 (c99)" in many


@pytest.mark.parametrize(("counts", "weighted", "advised"), [
    ((500, 10), False, True), ((500, 10), True, False), ((90, 10), False, False), ((100, 10), False, True),
    ((5, 0), False, False), ((10, 0), False, True),
])  # fmt: skip
def test_advice_is_printed_for_a_strong_imbalance(counts, weighted, advised):
    assert ("--class-weights balanced" in outputs.describe_balance(data_of(*counts), weighted)) == advised


def test_a_class_name_is_printed_without_control_characters():
    text = outputs.describe_balance(data_of(500, 1, names=["a\x1b[2J", "b\n"]), False)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(("seconds", "text"), [
    (59, ""), (61, "about 1 min"), (7140, "about 119 min"), (7200, "about 2.0 h"), (200_000, "about 55.6 h"),
])  # fmt: skip
def test_the_time_left_is_that_of_the_whole_run(seconds, text):
    assert outputs.describe_left(seconds) == (f"{text} left for the whole run" if text else "")


@pytest.mark.slow
def test_the_progress_line_has_the_time_left_for_the_whole_run(monkeypatch, capsys):
    import train

    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr("deploy.cli.ProgressBar.GAP_S", (0.0, 0.0))
    monkeypatch.setattr(outputs, "describe_left", lambda seconds, before="": f"{before}{seconds:.1f} s left")
    run(*TINY, "--epochs", 2, "--batch-size", 50, "--output", "out")
    lines = re.findall(r"^epoch (\d): .*, loss [\d.]+, ([\d.]+) s left$", capsys.readouterr().err, re.M)
    assert {epoch for epoch, _ in lines} == {"1", "2"}
    assert float(lines[-1][1]) < float(lines[0][1])


@pytest.mark.slow
def test_label_smoothing_of_the_defaults_is_printed_and_stored(photos, capsys):  # noqa: F811
    run(*TINY, "--data", photos, "--epochs", 1, "--output", "out")
    printed, config = capsys.readouterr().out, json.loads(Path("out/student/config.json").read_text())
    smoothing = json.loads(Path("out/args.json").read_text())["flags"]["label_smoothing"]
    assert smoothing > 0  # a default for this folder: no flag sets it
    assert f"cross-entropy with label smoothing {smoothing:g}; " in printed
    assert config["training"]["method"] == f"cross-entropy with label smoothing {smoothing:g}"
    assert f"label smoothing {smoothing:g}" in Path("out/student/README.md").read_text()

"""Test --unlabelled, which adds photographs without a label: on these the student learns from the teacher alone."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import opened, refused, rows, run, write_labels
from torch.nn import functional as F

from kdlite import nkd_loss, top_k_logprobs
from kdlite.training.data import NO_LABEL, class_counts
from train import Method, all_logprobs, loss_terms

MODELS = Path(__file__).parents[1].joinpath("own_models.py")
TINY = ["--device", "cpu", "--model", f"{MODELS}:tiny", "--img-size", 16, "--workers", 0]
DATA = ["--data", "photos", "--recipe", "digits", "--batch-size", 8, "--crop", "none"]
RUN = [*TINY, *DATA, "--epochs", 2, "--reference", 0]
TEACHER = ["--teacher", "t/student", "--model-file", f"{MODELS}:tiny"]


def draw(folder, low, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng([i, low]).integers(low, low + 120, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write photos/ with three classes, more/ without classes, and a teacher of photos/ in t/."""
    root = tmp_path_factory.mktemp("unlabelled")
    for name, low in (("dark", 0), ("middle", 65), ("bright", 130)):
        draw(root / "photos/train" / name, low, 12)
        draw(root / "photos/val" / name, low, 4, first=12)
        draw(root / "more/deep" / name, low, 10, first=20)
    (root / "more/notes.txt").write_text("not an image")
    before = Path.cwd()
    os.chdir(root)
    run(*RUN, "--epochs", 3, "--output", "t")
    os.chdir(before)
    return root


@pytest.fixture
def photos(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd", ["nkd", "kd"])
def test_an_image_without_a_label_has_no_cross_entropy_and_its_nkd_is_an_expectation(kd, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    target = torch.tensor([3, NO_LABEL, 0, NO_LABEL])
    method = Method(kd=kd, temperature=temperature, unlabelled=True)
    terms = loss_terms(method, student, None, teacher, target)
    ce = sum(F.cross_entropy(student[i], target[i]) for i in (0, 2)) / 4
    torch.testing.assert_close(terms["ce"], ce)
    if kd == "nkd":
        expected = 0.0
        for row in range(4):
            shares = teacher[row].softmax(0) if target[row] == NO_LABEL else F.one_hot(target[row], 5)
            for label, share in enumerate(shares):
                one = nkd_loss(student[row], teacher[row], torch.tensor(label), temperature=temperature)
                expected += share * one / 4
    else:
        expected = loss_terms(Method(kd="kd", temperature=temperature), student, None, teacher, target.clamp(min=0))[kd]
    torch.testing.assert_close(terms[kd], expected)


def test_the_stored_label_of_an_unlabelled_image_contains_the_whole_answer():
    torch.manual_seed(1)
    teacher, target = torch.randn(6, 7), torch.tensor([NO_LABEL, 2, NO_LABEL, 6, 0, NO_LABEL])
    stored = top_k_logprobs(teacher, target.where(target != NO_LABEL, teacher.argmax(1)), 6)
    torch.testing.assert_close(all_logprobs(stored, target, 7), teacher.log_softmax(1), atol=2e-3, rtol=0)


def test_unlabelled_images_are_found_at_any_depth_and_counted_separately(photos, capsys):
    _, _, data = opened(*RUN, "--unlabelled", "more", "--kd", "kd", *TEACHER)
    assert "more: 30 images without a label, skipped: 1 .txt" in capsys.readouterr().out
    assert (len(data.train), len(data.labelled), data.unlabelled) == (66, 36, 30)
    assert class_counts(data.train) == class_counts(data.labelled) == [12] * 3
    assert data.train.targets[36:] == [NO_LABEL] * 30


def test_linked_folders_are_read_too(photos, capsys):
    Path("elsewhere").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(f"elsewhere/{i}.png")
    Path("more/linked").symlink_to(Path("elsewhere").resolve())
    _, _, data = opened(*RUN, "--unlabelled", "more", "--kd", "kd", *TEACHER)
    assert data.unlabelled == 34


def test_images_of_data_are_left_out_of_the_unlabelled_images(photos, capsys):
    Path("more/of_val.png").symlink_to(next(Path("photos/val").resolve().rglob("*.png")))
    _, _, data = opened(*RUN, "--unlabelled", "more", "--kd", "kd", *TEACHER)
    assert "30 images without a label, skipped: 1 .txt, skipped: 1 images of --data" in capsys.readouterr().out
    assert data.unlabelled == 30


@pytest.mark.slow
def test_stored_answers_give_the_losses_of_the_teacher(photos, capsys):
    more = ["--unlabelled", "more"]
    write_labels(*TINY, *DATA[:4], "--crop", "none", *TEACHER, *more, "--views", 1, "--output", "L")
    assert "labels of 66 views" in capsys.readouterr().out
    run(*RUN, *more, "--kd", "nkd", "--teacher-labels", "L", "--output", "stored")
    run(*RUN, *more, "--kd", "nkd", *TEACHER, "--output", "online")
    for ours, theirs in zip(rows("stored"), rows("online")):
        for term in ("loss_ce", "loss_nkd"):
            assert float(ours[term]) == pytest.approx(float(theirs[term]), rel=2e-3)
    assert "66 training (30 of them without a label) and 12 validation images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--unlabelled", "more"], "--unlabelled needs --kd"),
        (["--unlabelled", "more", "--kd", "kd", *TEACHER, "--mixup", 0.2], "cannot be mixed"),
        (["--unlabelled", "more", "--kd", "kd", *TEACHER, "--self-kd", "uskd"], "USKD needs a label for each image"),
        (["--unlabelled", "none", "--kd", "kd", *TEACHER], "no such folder"),
        (["--unlabelled", "empty", "--kd", "kd", *TEACHER], "no image in it"),
        (["--unlabelled", "more", "--kd", "kd", *TEACHER, "--data", "digits"], "needs a folder of photographs"),
    ],
)
def test_a_folder_or_a_flag_that_does_not_fit_is_refused(photos, capsys, flags, fault):
    Path("empty").mkdir()
    assert fault in refused(capsys, *RUN, *flags)


def test_labels_that_lack_classes_are_refused(photos, capsys):
    flags = [*TINY, *DATA[:4], "--crop", "none", *TEACHER, "--unlabelled", "more", "--top-k", 1, "--output", "L"]
    assert "--top-k 2" in refused(capsys, *flags, command=write_labels, program="teacher_labels")

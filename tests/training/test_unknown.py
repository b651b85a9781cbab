"""Test the split and the scores of examples/unknown.py, without its training, which takes minutes."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import unknown

from deploy.cli import UserError


def make_folder(data, classes, images):
    for label in range(classes):
        for index in range(images):
            file = data / f"class {label}" / "images" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return data


def test_a_draw_splits_the_known_images_and_leaves_a_fifth_of_the_classes_out(tmp_path):
    data = make_folder(tmp_path, 10, 100)
    (data / "class 3" / "notes.txt").touch()
    parts = unknown.split(data, 3, 0, 0)
    assert {file for rows in parts.values() for file, _ in rows} == set(data.rglob("*.png"))
    assert [len(parts[name]) for name in ("train", "val", "test", "unknown")] == [480, 160, 160, 200]
    label_of = {name: {(file.parents[1], label) for file, label in rows} for name, rows in parts.items()}
    assert label_of["train"] == label_of["val"] == label_of["test"]
    assert sorted(label for _, label in label_of["train"]) == list(range(8))
    assert label_of["unknown"] == {(file.parents[1], unknown.NO_LABEL) for file in data.rglob("*.png")} - {
        (folder, unknown.NO_LABEL) for folder, _ in label_of["train"]
    }
    left_out = [frozenset(file.parents[1] for file, _ in unknown.split(data, d, 0, 0)["unknown"]) for d in range(5)]
    assert len(set(left_out)) > 1


def test_a_draw_takes_some_of_the_classes_and_images(tmp_path):
    parts = unknown.split(make_folder(tmp_path, 10, 100), 0, 5, 20)
    assert [len(parts[name]) for name in ("train", "val", "test", "unknown")] == [48, 16, 16, 20]


def test_a_folder_with_too_few_classes_or_images_is_an_error(tmp_path):
    data = make_folder(tmp_path, 3, 2)
    with pytest.raises(UserError, match="has 3 class folders: expected at least 10"):
        unknown.split(data, 0, 10, 0)
    with pytest.raises(UserError, match="has 2 images: expected at least 3"):
        unknown.split(data, 0, 0, 0)


def test_without_flags_the_student_is_trained_with_the_flags_for_digits(tmp_path, monkeypatch, capsys):
    asked = []

    def train_student(parts, flags, *_):
        asked.append(flags)
        logits = np.eye(8)[[max(label, 0) for _, label in parts["test"]]]
        return dict.fromkeys(("val", "test", "unknown"), logits), 1.0

    monkeypatch.setattr(unknown, "train_student", train_student)
    unknown.run(unknown.parser.parse_args(["--draws", "2", "--output", str(tmp_path / "new")]))
    assert asked == 2 * [unknown.DIGITS.split()]
    assert capsys.readouterr().out.count("\n| ") == 5  # a header and four scores


@pytest.mark.parametrize(("size", "auroc"), [(0.1, 100), (10, 50), (100, 0)])
def test_every_score_separates_unknown_images_by_the_size_of_their_logits(size, auroc):
    g = np.random.default_rng(0)
    labels = np.arange(400) % 8
    logits = np.eye(8)[labels] * 10 + g.normal(0, 0.1, (400, 8))
    others = np.eye(8)[labels] * size + g.normal(0, 0.1, (400, 8))
    right = logits[200:].argmax(1) == labels[200:]
    rows = unknown.measure({"val": logits[:200], "test": logits[200:], "unknown": others}, right, 2.0)
    assert len(rows) == 4
    for found, refused, answered, right in rows.values():
        assert found == pytest.approx(auroc, abs=12)
        assert refused == pytest.approx({100: 100, 50: 5, 0: 0}[auroc], abs=8)
        assert answered == pytest.approx(95, abs=6)
        assert right == 100

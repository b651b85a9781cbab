"""Test per_class.csv, confusion.png, the worst confusions and the picture of a batch."""

import csv
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import precision_recall_fscore_support

from deploy.cli import UserError
from deploy.per_class import confusion_matrix, confusion_picture, per_class_table, worst_confusions, write_per_class
from kdlite.training.outputs import batch_picture, caption


def answers(classes, images=4000, right=0.7, seed=0):
    """Return labels, and predictions that are mostly right."""
    rng = np.random.default_rng(seed)
    labels, others = rng.integers(0, classes, (2, images))
    return labels, np.where(rng.random(images) < right, labels, others)


def table(*args):
    return list(csv.DictReader(io.StringIO(per_class_table(*args))))


def pixels(file):
    """Return the pixels as (H, W, 3), from 0 to 255."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_precision_recall_and_f1_equal_those_of_scikit_learn():
    labels, predictions = answers(7)
    rows = table(labels, predictions, list("abcdefg"))
    expected = precision_recall_fscore_support(labels, predictions, labels=range(7))
    for name, values in zip(("precision", "recall", "f1", "n"), expected):
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), abs=5e-5)
    assert [row["label"] for row in rows] == list("abcdefg")
    assert (confusion_matrix(labels, predictions, 7) == sklearn_confusion_matrix(labels, predictions)).all()


def test_a_ratio_without_images_is_an_empty_field():
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 3])
    rows = table(labels, predictions, ["seen", "also", "never", "only answered", "missed"])
    assert rows[2] == {"label": "never", "n": "0", "precision": "", "recall": "", "f1": ""}
    assert rows[3] == {"label": "only answered", "n": "0", "precision": "0.0000", "recall": "", "f1": "0.0000"}
    missed = table(np.array([0, 1]), np.array([0, 0]), ["a", "b"])[1]
    assert missed == {"label": "b", "n": "1", "precision": "", "recall": "0.0000", "f1": "0.0000"}


def test_the_worst_confusions_are_counted_and_sorted():
    cases = [(0, 1, 12), (0, 0, 28), (1, 0, 3), (1, 1, 97), (2, 0, 3), (2, 2, 1)]
    labels, predictions = (np.concatenate([np.full(case[2], case[i]) for case in cases]) for i in (0, 1))
    order = np.random.default_rng(0).permutation(len(labels))
    assert worst_confusions(labels[order], predictions[order], ["cat", "dog", "eel"]) == [
        "cat taken for dog: 12 of 40",
        "eel taken for cat: 3 of 4",
        "dog taken for cat: 3 of 100",
    ]
    assert len(worst_confusions(*answers(9), list("abcdefghi"))) == 10


@pytest.mark.slow
def test_the_files_are_written_and_the_confusions_are_returned(tmp_path):
    lines = write_per_class(tmp_path, np.array([0, 0, 1]), np.array([1, 0, 1]), ["chat, café", "dog"])
    assert lines == ["worst confusions:", "  chat, café taken for dog: 1 of 2"]
    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["label"] for row in rows] == ["chat, café", "dog"]
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert write_per_class(tmp_path, np.array([1]), np.array([1]), ["cat", "dog"]) == ["all 1 are right"]


def test_more_classes_than_can_be_drawn_are_reported(tmp_path):
    lines = write_per_class(tmp_path, *answers(21841), [f"class {i}" for i in range(21841)])
    assert "no confusion.png: 21841 classes are more than 2000" in lines
    assert not (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize(("labels", "predictions"), [([0, 2], [0, 1]), ([0, 1], [0, -1]), ([0, 1], [0])])
def test_answers_that_do_not_fit_the_classes_are_an_error(tmp_path, labels, predictions):
    with pytest.raises(UserError, match="do not fit the 2 classes"):
        write_per_class(tmp_path, np.array(labels), np.array(predictions), ["cat", "dog"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, pytest.param(60, marks=pytest.mark.trial), 1000])
def test_a_confusion_can_be_seen_among_any_number_of_classes(tmp_path, monkeypatch, classes):
    """Add one confusion, and check that the picture changes only near its place."""
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda *_, **__: None)  # because the title changes too
    matrix = np.eye(classes, dtype=int) * 10
    names = [f"a class of quite some length, number {i}" for i in range(classes)]
    confusion_picture(tmp_path / "a.png", matrix, names)
    matrix[classes - 1, 0] = 1  # at the lower left
    confusion_picture(tmp_path / "b.png", matrix, names)
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.shape == b.shape
    assert max(a.shape) < 2500
    rows, columns, _ = np.nonzero(abs(a - b) > 30)
    assert len(rows)
    assert rows.min() > a.shape[0] * 0.3
    assert columns.max() < a.shape[1] * 0.7


@pytest.mark.filterwarnings("error")
def test_labels_with_formulas_and_line_breaks_are_drawn_without_a_warning(tmp_path):
    confusion_picture(tmp_path / "a.png", np.eye(3), ["$\\frac{$", "猫\n猫", "_^$"])


def test_a_class_without_images_is_grey(tmp_path):
    confusion_picture(tmp_path / "a.png", np.array([[4, 0], [0, 0]]), ["cat", "dog"])
    image = pixels(tmp_path / "a.png")
    assert (image == 211).all(2).mean() > 0.1  # light grey


@pytest.mark.slow
@pytest.mark.parametrize(("count", "channels"), [(1, 3), (5, 1), (40, 3)])
def test_the_picture_of_a_batch_has_up_to_32_images(tmp_path, count, channels):
    values = np.linspace(10, 200, count).astype(np.uint8)
    images = np.full((count, 24, 48, channels), values.reshape(-1, 1, 1, 1))
    batch_picture(tmp_path / "batch.png", images, np.zeros(count, int), ["cat"])
    drawn = pixels(tmp_path / "batch.png")
    for i, value in enumerate(values):
        assert ((drawn == value).all(2).sum() > 1000) == (i < 32), i


@pytest.mark.parametrize(("label", "text"), [
    (1, "dog"), ([0, 0, 1.0], "eel"),
    ([0.1, 0.6, 0.3], "dog 60 %\neel 30 %"), ([0.5, 0.25, 0.25], "cat 50 %\ndog 25 %"),
])  # fmt: skip
def test_a_caption_has_the_label_or_the_two_main_labels_of_a_mixed_image(label, text):
    assert caption(np.array(label), ["cat", "dog", "eel"]) == text


def test_a_label_that_a_spreadsheet_would_compute_gets_an_apostrophe():
    zeros = np.zeros(2, np.int64)
    table = per_class_table(zeros, zeros, ["=HYPERLINK(1)", "cat"])
    assert table.splitlines()[1].startswith("'=HYPERLINK(1),2,")

"""Test deploy.predict: folders, CSV files, contact sheets and the answer "none of these"."""

import csv
import dataclasses
import io
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import deploy
from PIL import Image
from sklearn.datasets import load_sample_images
from students import load

from deploy import predict
from deploy.onnx_tools import write
from deploy.preprocess import open_image, prepare
from deploy.runtimes import softmax

PHOTO = Image.fromarray(load_sample_images().images[0])


@pytest.fixture
def student(artefact, tmp_path):
    """Return a function that writes a student with changed metadata and returns its path."""

    def make(**changes):
        file = tmp_path / "student.onnx"
        write(onnx.load(artefact), dataclasses.replace(load(artefact, device="cpu").metadata, **changes), file)
        return file

    return make


@pytest.fixture
def photos(tmp_path):
    """Return nested folders with five photographs, an unreadable one, a text and a hidden file."""
    folder = tmp_path / "photos"
    (folder / "more/deeper").mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "b.png", "more/c.jpg", "more/deeper/d.PNG", "=1+1.jpg")):
        PHOTO.crop((40 * i, 30 * i, 40 * i + 90, 30 * i + 80)).save(folder / name, "PNG")
    (folder / "more/broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(b"no image")
    return folder


def read_answers(file):
    with open(file, encoding="utf-8", newline="") as text:
        return {Path(row["file"]).name: row for row in csv.DictReader(text)}


def test_a_folder_gives_a_row_for_each_image_and_a_count(student, photos, tmp_path, capfd):
    file = tmp_path / "answers.csv"
    made = student()
    deploy(predict, made, photos, "--csv", file)
    rows = read_answers(file)
    assert rows.keys() == {"a.jpg", "b.png", "c.jpg", "d.PNG", "=1+1.jpg", "broken.jpg"}
    runtime = load(made, device="cpu")
    for name in ("a.jpg", "more/deeper/d.PNG"):
        row = rows[Path(name).name]
        p = softmax(runtime.run(prepare(open_image(photos / name), runtime.metadata)[None]))[0]
        first, second = np.argsort(-p)[:2]
        assert row["file"] == str(photos / name)
        assert (row["index"], row["label"], row["answered"]) == (str(first), runtime.metadata.label_names[first], "yes")
        assert float(row["probability"]) == pytest.approx(p[first], abs=1e-4)
        assert row["second_label"] == runtime.metadata.label_names[second]
        assert float(row["second_probability"]) == pytest.approx(p[second], abs=1e-4)
        assert row["error"] == ""
    assert rows["broken.jpg"]["error"]
    assert rows["broken.jpg"]["label"] == rows["broken.jpg"]["answered"] == ""
    out, err = capfd.readouterr()
    assert "5 images, 0 below the threshold; 1 could not be read" in out
    assert "skipped 1 files without the extension of an image" in out
    assert re.search(r"^skipped an unreadable image: .*broken.jpg: ", err, re.M)


def test_without_a_csv_file_the_answers_of_a_folder_are_printed(student, photos, capfd):
    deploy(predict, student(), photos)
    lines = capfd.readouterr().out.splitlines()
    assert sum(".jpg: " in line or "PNG: " in line or ".png: " in line for line in lines) == 5
    assert "5 images, 0 below the threshold; 1 could not be read" in lines


def test_an_unreadable_file_on_the_command_line_is_an_error(student, photos, capfd):
    deploy(predict, student(), photos / "a.jpg", photos / "more/broken.jpg", check=2)
    out, err = capfd.readouterr()
    assert "a.jpg: " in out
    assert err.startswith(f"python -m deploy.predict: error: cannot read {photos}/more/broken.jpg: ")


@pytest.mark.parametrize(("threshold", "answered"), [(0.9999, "no"), (None, "yes")])
def test_an_uncertain_answer_is_printed_as_none_of_these(student, photos, tmp_path, capfd, threshold, answered):
    made = student(threshold=threshold, temperature=5.0)
    deploy(predict, made, photos / "a.jpg")
    assert ("none of these; nearest: " in capfd.readouterr().out) == (answered == "no")
    deploy(predict, made, photos, "--csv", tmp_path / "answers.csv")
    assert read_answers(tmp_path / "answers.csv")["a.jpg"]["answered"] == answered


def test_no_cell_is_a_formula_and_every_path_can_be_opened(student, photos, tmp_path, monkeypatch):
    names = ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\tx", 'a,"b"\nc', "plain"]
    made = student(label_names=names)
    monkeypatch.chdir(photos)
    deploy(predict, made, "=1+1.jpg", "a.jpg", "b.png", "--csv", tmp_path / "answers.csv")
    with open(tmp_path / "answers.csv", encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    assert len(rows) == 3
    for row in rows:
        assert not [cell for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t"))]
        assert Path(row["file"]).is_file()
        assert row["label"].removeprefix("'") == names[int(row["index"])]


@pytest.mark.parametrize("label", ['=cmd|"/C calc"!A0', "\x1b[2J", "cat, dog", "two\nlines", "'"])
def test_a_label_is_quoted_and_keeps_its_text(label):
    answer = predict.Answer(Path("x.jpg"), [(label, 0.5, 0), ("b", 0.3, 1)], True, predict.NO_IMAGE)
    rows = list(csv.reader(io.StringIO(predict.answers_table([answer]).decode(), newline="")))
    assert rows[1][1] in (label, f"'{label}")


def test_a_file_name_that_is_not_utf8_is_written_with_backslashes(student, photos, tmp_path):
    os.rename(photos / "b.png", os.fsencode(photos) + b"/\xff.png")
    deploy(predict, student(), photos, "--csv", tmp_path / "answers.csv")
    assert "\\udcff.png" in read_answers(tmp_path / "answers.csv")


def test_the_sheet_shows_the_least_certain_images_first(student, photos, tmp_path, capfd):
    sheet, answers = tmp_path / "sheet.png", tmp_path / "answers.csv"
    deploy(predict, student(), photos, "--least-certain", 3, "-o", sheet, "--csv", answers)
    certainty = {row["file"]: float(row["probability"]) for row in read_answers(answers).values() if row["label"]}
    found = re.findall(r"^\d  (.*?): ", capfd.readouterr().out, re.M)
    assert [certainty[file] for file in found] == sorted(certainty.values())[:3]
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width == 2 * (predict.TILE + 8)
        tile = np.asarray(image.crop((4, 4, 4 + predict.TILE, 4 + predict.TILE)).resize((16, 16)))
    own = Image.fromarray(prepare(open_image(found[0]), load(tmp_path / "student.onnx", device="cpu").metadata))
    assert np.abs(tile.astype(int) - np.asarray(own).astype(int)).mean() < 12


@pytest.mark.parametrize("shape", [(8, 8, 1), (10, 300, 3), (300, 10, 3)])
def test_a_sheet_can_have_grey_and_long_images_and_any_label(shape):
    image = np.zeros(shape, np.uint8)
    answers = [predict.Answer(Path("x"), [(label, 0.1, 0)], False, image) for label in ("猫", "\x1b[2J", "x" * 500)]
    with Image.open(io.BytesIO(predict.contact_sheet(answers))) as sheet:
        sheet.load()


@pytest.mark.parametrize(("flags", "words"), [
    (["PHOTOS", "-o", "sheet.png"], "give --least-certain N too"),
    (["PHOTOS", "--least-certain", 3, "-o", "sheet.gif"], "expected a .png file"),
    (["PHOTOS", "--csv", "photo.jpg"], "has the name of a photograph"),
    (["PHOTOS", "--csv", "EMPTY"], "is a folder; name another file"),
    (["PHOTOS", "--csv", "/dev/null/answers.csv"], "cannot write /dev/null/answers.csv: "),
    (["EMPTY"], "no image in this folder"),
    (["BROKEN"], "none of the 1 images can be read"),
])  # fmt: skip
def test_a_mistake_gives_one_line(student, photos, tmp_path, capfd, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.jpg").write_bytes(b"no image")
    places = {"PHOTOS": photos / "a.jpg", "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    deploy(predict, student(), *(places.get(flag, flag) for flag in flags), check=2)
    assert words in capfd.readouterr().err.splitlines()[-1]


def test_predict_takes_a_run_directory_too(deployed, photos, capfd):
    deploy(predict, deployed, photos / "a.jpg", "--device", "cpu")
    assert "a.jpg: class " in capfd.readouterr().out

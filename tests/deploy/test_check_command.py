"""Test the table and verdicts of deploy.check, and reference.npz."""

import csv
import json
import shutil
import unicodedata

import numpy as np
import onnx
import pytest
import torch
from commands import deploy, refused
from PIL import Image
from sklearn.datasets import load_sample_images
from students import load, model_files, write_run

from deploy import check, export, quantize
from deploy.config import read_config
from deploy.preprocess import open_image, prepare
from deploy.reference import keep_reference, read_reference
from deploy.runtimes import softmax
from deploy.student import load_student
from kdlite.training.outputs import save_student

PHOTO = Image.fromarray(load_sample_images().images[0])


def write_photographs(folder, label_names, images=64):
    """Write pieces of a photograph as folder/CLASS/NNN.png, one for each class in turn."""
    for i in range(images):
        path = folder / label_names[i % len(label_names)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PHOTO.crop((7 * i, 3 * i, 7 * i + 90, 3 * i + 80)).save(path)
    return folder


def rows_of(run):
    return {row["artefact"]: row for row in json.loads((run / "student/check.json").read_text())}


@pytest.mark.parametrize("source", ["reference", "photographs"])
def test_the_table_equals_a_plain_computation(deployed, source, capsys, tmp_path):
    config = read_config(deployed / "student")
    if source == "photographs":
        folder = write_photographs(tmp_path / "val", config.label_names)
        deploy(check, deployed, "--device", "cpu", "--images", folder, check=None)
        files = sorted(folder.rglob("*.png"))
        images = np.stack([prepare(open_image(file), config) for file in files])
        labels = np.array([config.label_names.index(file.parent.name) for file in files])
    else:
        deploy(check, deployed, "--device", "cpu")
        reference = read_reference(deployed / "student", None, "")
        images, labels = reference.images, reference.labels
    rows = rows_of(deployed)
    exact = {"student.onnx", "student.pt2", "student.ts"}
    assert rows.keys() == {
        "student/",
        *exact,
        "student-fp16.onnx",
        "student-int8-cpu.onnx",
        "student-int8-tensorrt.onnx",
    }
    passed = {name for name, row in rows.items() if row.get("verdict") == "pass"}
    assert exact <= passed  # on photographs, fp16 and INT8 may change some answers
    assert source == "photographs" or passed == rows.keys() - {"student/"}
    expected = load(deployed / "student", device="cpu").run(images)
    for name, row in rows.items():
        logits = load(deployed / "student" / name.replace("student/", ""), device="cpu").run(images)
        assert row["images"] == len(labels)
        assert row["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
        assert row["agreement"] == pytest.approx(100 * (logits.argmax(1) == expected.argmax(1)).mean())
        assert row["max_abs_error"] == pytest.approx(np.abs(logits - expected).max(), abs=1e-5, rel=0.1)
        assert row["ece_raw"] == pytest.approx(plain_calibration_error(logits, labels, 1), abs=0.05)
        assert "ece" not in row
    with open(deployed / "student/per_class.csv", encoding="utf-8") as file:
        hits = sum(float(row["recall"] or 0) * int(row["n"]) for row in csv.DictReader(file))
    assert hits == pytest.approx((expected.argmax(1) == labels).sum(), abs=0.1)  # recalls have four digits
    assert (deployed / "student/confusion.png").stat().st_size > 1000
    assert "1 2 5 64" in capsys.readouterr().out


def plain_calibration_error(logits, labels, temperature):
    gaps = [0.0] * 15
    for row, label in zip(logits.astype(float) / temperature, labels):
        powers = np.exp(row - row.max())
        confidence = powers.max() / powers.sum()
        gaps[min(int(confidence * 15), 14)] += confidence - (row.argmax() == label)
    return 100 * sum(map(abs, gaps)) / len(labels)


def test_each_row_uses_the_temperature_and_threshold_of_its_file(run, capsys):
    config = json.loads((run / "student/config.json").read_text())
    deploy(quantize, run, "--target", "cpu", "--count", "64")
    reference = read_reference(run / "student", None, "")
    p = softmax(reference.logits / 2.5)
    threshold = float(np.median(p.max(1)))
    (run / "student/config.json").write_text(json.dumps(config | {"temperature": 2.5, "threshold": threshold}))
    deploy(export, run, "--format", "onnx")
    np.savez(run / "reference.npz", **reference._asdict() | {"labels": np.roll(reference.labels, 1)})
    labels = read_reference(run / "student", None, "").labels
    deploy(check, run, "student.onnx", "student-int8-cpu.onnx", "--device", "cpu")
    rows = rows_of(run)
    row, answered, right = rows["student/"], p.max(1) >= threshold, p.argmax(1) == labels
    assert (row["temperature"], row["threshold"]) == (2.5, threshold)
    assert row["ece_raw"] == pytest.approx(plain_calibration_error(reference.logits, labels, 1), abs=0.01)
    assert row["ece"] == pytest.approx(plain_calibration_error(reference.logits, labels, 2.5), abs=0.01)
    assert 0 < answered.sum() < len(labels)
    assert row["answered"] == pytest.approx(100 * answered.mean())
    assert row["top1_answered"] == pytest.approx(100 * right[answered].mean())
    for column in ("temperature", "threshold", "ece", "ece_raw"):
        assert rows["student.onnx"][column] == pytest.approx(row[column], abs=0.01)
    assert rows["student-int8-cpu.onnx"]["temperature"] != 2.5
    assert "ece_raw" in capsys.readouterr().out


def test_the_json_output_equals_the_file(deployed, tmp_path, capsys):
    deploy(check, deployed, "student.onnx", "--count", "8", "--device", "cpu", "--json", "--output", tmp_path)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "check.json").read_text())


# ---- photographs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accented(tmp_path_factory):
    """Return a run without artefacts, whose class names have accents."""
    from students import OWN

    name = f"{OWN['own_models.py']}:tiny"
    return write_run(tmp_path_factory.mktemp("accented") / "run", name, 16, ["chêne", "érable", "pin"])


def from_folder(run, folder, count=None):
    from deploy.runtimes import RunOn

    on = RunOn("cpu", model_files=tuple(model_files(run)))
    return check.from_photographs(run / "student", folder, count, on)


def test_folders_match_the_labels_in_either_form_of_unicode(accented, tmp_path):
    names = [unicodedata.normalize("NFD", name) for name in read_config(accented / "student").label_names]
    write_photographs(tmp_path / "val", names, 9)
    _, labels, _ = next(iter(from_folder(accented, tmp_path / "val").batches))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_folder_with_both_unicode_forms_of_a_name_is_refused(accented, tmp_path):
    folder = write_photographs(tmp_path / "val", ["chêne", unicodedata.normalize("NFD", "chêne"), "pin"], 6)
    with pytest.raises(check.UserError, match="two folders have the same name in two Unicode forms"):
        from_folder(accented, folder)


def test_linked_folders_are_read(accented, tmp_path):
    folder = write_photographs(tmp_path / "val", ["chêne", "érable", "pin"], 6)
    write_photographs(tmp_path / "elsewhere", ["pin"], 4)
    (folder / "pin/more").symlink_to(tmp_path / "elsewhere/pin")
    _, labels, _ = next(iter(from_folder(accented, folder).batches))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]


def test_hidden_files_and_files_that_macos_adds_are_skipped(accented, tmp_path, capsys):
    folder = write_photographs(tmp_path / "val", ["chêne", "érable", "pin"], 6)
    (folder / "__MACOSX/chêne").mkdir(parents=True)
    (folder / "__MACOSX/chêne/000.png").write_bytes(b"resource fork")
    (folder / ".git").mkdir()
    (folder / "pin/.DS_Store").write_bytes(b"")
    (folder / "pin/._000.png").write_bytes(b"resource fork")
    (folder / "pin/notes.txt").write_text("")
    images, _, _ = next(iter(from_folder(accented, folder).batches))
    assert len(images) == 6
    assert "skipped 1 files without the extension of an image" in capsys.readouterr().out


def test_a_folder_of_an_unknown_class_is_an_error_and_a_class_without_a_folder_is_logged(accented, tmp_path, capsys):
    folder = write_photographs(tmp_path / "val", ["chêne", "érable"], 6)
    from_folder(accented, folder)
    assert "no folder for 1 of 3 classes: pin" in capsys.readouterr().out
    write_photographs(folder, ["sapin"], 1)
    with pytest.raises(check.UserError, match="the student has no class sapin; expected folders named like its 3"):
        from_folder(accented, folder)


@pytest.mark.parametrize(("how", "message"), [
    ("missing", "cannot be read: No such file"), ("a file", "cannot be read: Not a directory"),
    ("empty", "no image in a folder named like a class"), ("the parent", "has no class val; expected folders named"),
])  # fmt: skip
def test_a_wrong_folder_of_photographs_gives_one_line(accented, tmp_path, how, message):
    folder = tmp_path / "val"
    if how == "a file":
        folder.write_text("")
    elif how == "empty":
        (folder / "pin").mkdir(parents=True)
    elif how == "the parent":
        write_photographs(folder, ["pin"], 2)
        folder = tmp_path
    with pytest.raises(check.UserError, match=message):
        from_folder(accented, folder)


def test_one_unreadable_image_is_skipped_and_more_than_1_percent_are_an_error(accented, tmp_path, capsys):
    folder = write_photographs(tmp_path / "val", ["chêne", "érable", "pin"], 9)
    (folder / "pin/002.png").write_bytes(b"not an image")
    assert sum(len(images) for images, _, _ in from_folder(accented, folder).batches) == 8
    assert "skipped an unreadable image" in capsys.readouterr().err
    (folder / "pin/005.png").write_bytes(b"")
    with pytest.raises(check.UserError, match="2 of 9 images cannot be read, more than 1 %"):
        list(from_folder(accented, folder).batches)


def test_a_count_picks_photographs_of_all_classes(accented, tmp_path):
    folder = write_photographs(tmp_path / "val", ["chêne", "érable", "pin"], 30)
    _, labels, _ = next(iter(from_folder(accented, folder, 6).batches))
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    assert len(labels) == 6


# ---- files that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "word"), [(1.3, "error"), (np.nan, "error"), (-1.0, "agreement")])
def test_a_file_whose_weights_differ_fails(run, capsys, scale, word):
    file = run / "student/student.onnx"
    model = onnx.load(file)
    (bias,) = (t for t in model.graph.initializer if t.name in ("model.classifier.bias", "model.fc.bias"))
    (weight,) = (t for t in model.graph.initializer if t.name == bias.name.replace("bias", "weight"))
    values = (onnx.numpy_helper.to_array(weight) * scale).astype("f4")
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, file)
    deploy(check, run, "student.onnx", "--device", "cpu", check=1)
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert word in out
    rows = json.loads((run / "student/check.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert (rows[1]["max_abs_error"] is None) == bool(np.isnan(scale))


def test_a_file_made_from_other_weights_fails(run, capsys):
    deploy(check, run, "student.onnx", "--device", "cpu")
    model, config = load_student(run, model_files(run))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    save_student(run / "student", model, config)
    folder = write_photographs(run / "val", config.label_names, 8)
    deploy(check, run, "student.onnx", "--device", "cpu", "--images", folder, check=1)
    assert "made from other weights" in capsys.readouterr().out


def test_the_verdict_of_a_failed_int8_file_has_advice():
    tally = check.Tally()
    tally.images, tally.scale = 100, 1.0
    row = {"provider": "CUDAExecutionProvider", "precision": "int8-tensorrt", "agreement": 70.0, "top1_difference": 0.0}
    verdict = check.judge(row, tally)
    assert verdict.startswith("FAIL: agreement 70.00 < 90.0 %; ")
    assert "quantize --max-drop" in verdict
    assert check.judge(row | {"agreement": 95.0}, tally) == "pass"


# ---- reference.npz -------------------------------------------------------------------------------------------------


def test_the_reference_contains_prepared_images_and_the_logits_of_the_student(run):
    student = run / "student"
    config = read_config(student)
    pieces = [PHOTO.crop((i, i, i + 60, i + 50)) for i in range(30)]
    val, train = [(piece, i % 10) for i, piece in enumerate(pieces[:20])], [(piece, 0) for piece in pieces[20:]]
    line = keep_reference(run, val, train, 5, model_files(run))
    assert line.startswith("5 validation and 5 training images in ")
    reference = read_reference(student, None, "")
    picked = [0, 4, 9, 14, 19]
    np.testing.assert_array_equal(reference.images, [prepare(pieces[i], config) for i in picked])
    assert reference.labels.tolist() == [i % 10 for i in picked]
    np.testing.assert_array_equal(reference.train_images[[0, -1]], [prepare(pieces[i], config) for i in (20, 29)])
    expected = load(student, device="cpu").run(reference.images)
    np.testing.assert_allclose(reference.logits, expected, atol=1e-5 * np.abs(expected).max())


def change_reference(run, **arrays):
    file = run / "reference.npz"
    np.savez(file, **dict(np.load(file)) | arrays)


@pytest.mark.parametrize("command", [check, quantize])
@pytest.mark.parametrize(("how", "message"), [
    ("missing", "no reference.npz in "), ("truncated", "reference.npz cannot be read"),
    ("of other weights", "belongs to other weights than"), ("of other classes", "belongs to another student than"),
])  # fmt: skip
def test_a_reference_that_does_not_match_the_student_gives_one_line(run, how, message, command, capfd):
    file = run / "reference.npz"
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "of other weights":
        change_reference(run, weights_sha256=np.array("0" * 64))
    else:
        change_reference(run, logits=np.load(file)["logits"][:, :7])
    flags = ["--target", "cpu"] if command is quantize else []
    assert message in refused(capfd, command, run, *flags)


def test_with_the_flag_reference_check_reads_another_file(run, tmp_path, capsys):
    student = shutil.copytree(run / "student", tmp_path / "alone")
    deploy(check, student, "student.onnx", "--reference", run / "reference.npz", "--count", "50", "--device", "cpu")
    assert "50 images of the reference.npz" in capsys.readouterr().out


FLOATS = np.zeros((80, 10), np.float32)
DAMAGED = {
    "logits of nan": {"logits": FLOATS * np.nan},
    "logits of infinity": {"logits": FLOATS + np.inf},
    "logits of zeros": {"logits": FLOATS},
    "logits of text": {"logits": FLOATS.astype(str)},
    "logits of integers": {"logits": FLOATS.astype(int)},
    "logits of dates": {"logits": FLOATS.astype("M8[s]")},
    "complex logits": {"logits": FLOATS.astype(complex)},
    "labels of floats": {"labels": np.zeros(80)},
    "labels of text": {"labels": np.full(80, "cat")},
    "negative labels": {"labels": np.full(80, -1)},
    "labels of other classes": {"labels": np.full(80, 10)},
    "boolean labels": {"labels": np.ones(80, bool)},
    "images of floats": {"images": np.zeros((80, 32, 32, 3))},
    "training images of floats": {"train_images": np.zeros((80, 32, 32, 3))},
    "no images": {"images": np.zeros((0, 32, 32, 3), np.uint8)},
    "one number": {"images": np.uint8(3)},
    "a digest of numbers": {"weights_sha256": np.array(3)},
    "several digests": {"weights_sha256": np.array(["a", "b"])},
    "objects": {"labels": np.array([None] * 80)},
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_reference_gives_one_line(deployed, tmp_path, how):
    """Test arrays of a wrong type, shape or value."""
    file = tmp_path / "reference.npz"
    np.savez(file, **dict(np.load(deployed / "reference.npz")) | DAMAGED[how])
    with pytest.raises(check.UserError, match=r"reference\.npz (is|cannot|belongs)") as error:
        read_reference(deployed / "student", file, "")
    assert "\n" not in str(error.value)

"""Test kdlite/training/data.py with image folders of many layouts."""

import collections
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from students import write_student

from deploy import check
from deploy.cli import UserError, command
from deploy.export import export_student
from deploy.run_directory import read_split, write_split
from kdlite.training.data import Digits, class_counts, class_weights, median_size, open_data

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def jpeg(width=40, height=30):
    """Return the bytes of a real photograph of this size."""
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTO = jpeg()


def make(folder, classes, content=PHOTO):
    """Write the files 0.jpg, 1.jpg, ... of each class, {class: number of files}, into folder/CLASS."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.jpg").write_bytes(content)
    return folder


def refusal(folder, **options):
    with pytest.raises(UserError) as error:
        open_data(str(folder), **options)
    line = str(error.value)
    assert "\n" not in line
    return line.replace(str(folder), "photos")


def files(part):
    return [os.path.relpath(path, part.root) for path, _ in part.samples]


# ---- folders ----


def test_a_subfolder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    make(tmp_path, {"train/cat/more": 2, "train/dog": 2, "val/cat": 2, "val/dog": 2})
    scan = os.scandir

    def scan_as_another_user(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_as_another_user)
    assert refusal(tmp_path) == (
        "photos/train/cat/more cannot be read: Permission denied; change its permissions or move it"
    )


def test_a_link_to_a_folder_that_contains_it_is_refused(tmp_path):
    make(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 2, "val/dog": 2})
    (tmp_path / "train/cat/again").symlink_to("..")
    assert "photos/train/cat/again is a link to a folder that contains it" in refusal(tmp_path)


def test_a_written_split_is_read_without_a_change_if_a_name_has_a_line_break(tmp_path):
    rows = [("cat\r/1\n.jpg", "train"), ("cat\r/2.jpg", "val")]
    write_split(tmp_path / "split.csv", rows)
    assert list(read_split(tmp_path / "split.csv").items()) == rows


# ---- classes ----


def test_a_class_missing_in_train_or_val_is_refused_with_at_most_five_names(tmp_path):
    make(tmp_path / "train", dict.fromkeys(["cat", *"abcdefg"], 1))
    make(tmp_path / "val", dict.fromkeys(["cat", "dog"], 1))
    assert refusal(tmp_path) == (
        "--data photos: train/ has a, b, c, d, e and 2 more, but val/ has not; val/ has dog, but train/ has not"
    )


def test_names_in_two_unicode_forms_are_one_class_with_its_nfc_name(tmp_path, capsys):
    make(tmp_path / "train", {NFD: 2, "cafz": 3, "tea": 4})
    make(tmp_path / "val", {NFC: 1, "cafz": 1, "tea": 1})
    data = open_data(str(tmp_path))
    assert data.label_names == ["cafz", NFC, "tea"]  # é comes after z
    for part in (data.train, data.val):
        assert all(data.label_names[label] == unicodedata.normalize("NFC", Path(path).parent.name)
                   for path, label in part.samples)  # fmt: skip
    assert capsys.readouterr().out.count(f"{NFC}: two Unicode forms of the name") == 1


def test_two_folders_with_the_same_nfc_name_are_refused(tmp_path):
    make(tmp_path / "train", {NFC: 1, NFD: 1})
    make(tmp_path / "val", {NFC: 1, "tea": 1})
    assert f"photos/train has two folders {NFC}" in refusal(tmp_path)


def test_hidden_folders_do_not_count_as_classes(tmp_path):
    make(tmp_path / "train", {".cache": 1})
    make(tmp_path / "val", {".cache": 1})
    assert "photos/train: expected a folder for each class, found none" in refusal(tmp_path)


# ---- --val-split ----


@pytest.mark.parametrize("layout", ["train", "."])
def test_val_split_takes_a_share_of_each_class(tmp_path, layout, capsys):
    make(tmp_path / layout, {"cat": 40, "dog": 10, "eel": 2})
    (tmp_path / layout / "cat/old").mkdir()
    (tmp_path / layout / "cat/0.jpg").rename(tmp_path / layout / "cat/old/0.jpg")
    data = open_data(str(tmp_path), val_split=0.2)
    assert class_counts(data.train) == [32, 8, 1]
    assert class_counts(data.val) == [8, 2, 1]
    train, val = set(files(data.train)), set(files(data.val))
    assert not train & val
    assert len(train | val) == 52
    assert dict(data.split) == {**dict.fromkeys(train, "train"), **dict.fromkeys(val, "val")}
    assert "old/0.jpg" in " ".join(train | val)
    assert data.train[0][0].size == (40, 30)
    message = capsys.readouterr().out
    assert message.count("\n") == 1
    assert "classes cat, dog, eel; 41 images to train, 11 to validate, 0.2 of each class" in message


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_each_class_has_training_and_validation_images_for_any_share(tmp_path, share):
    data = open_data(str(make(tmp_path, {"cat": 20, "dog": 2})), val_split=share)
    assert min(class_counts(data.train) + class_counts(data.val)) == 1


def test_the_split_depends_only_on_names_and_seed(tmp_path):
    """Change the order of the files, the folder and the Unicode form, which must not change the split."""
    split = open_data(str(make(tmp_path / "a", {NFC: 30, "dog": 20})), val_split=0.3).split
    other = make(tmp_path / "b/train", {"dog": 20, NFD: 30})
    assert open_data(str(other.parent), val_split=0.3).split == split
    assert open_data(str(tmp_path / "a"), val_split=0.3, seed=1).split != split


@pytest.mark.slow
def test_the_split_is_the_same_in_another_process_and_locale(tmp_path):
    split = open_data(str(make(tmp_path, {NFC: 30, "dog": 20})), val_split=0.3).split
    program = f"""import json; from deploy import cli
from kdlite.training.data import open_data
cli.prepare_streams()
print(json.dumps(open_data({str(tmp_path)!r}, val_split=0.3).split))"""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | locale, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert list(map(tuple, json.loads(result.stdout.splitlines()[-1]))) == split


def test_the_split_draws_every_image_of_a_class_equally_often(tmp_path):
    """Split with 40 seeds. Each image must be a validation image 20 times, within 4.5 standard deviations."""
    folder = make(tmp_path, {"cat": 50, "dog": 50}, b"")
    drawn = collections.Counter(
        file for seed in range(40) for file, side in open_data(str(folder), val_split=0.5, seed=seed).split
        if side == "val"
    )  # fmt: skip
    deviation = (40 * 0.5 * 0.5) ** 0.5
    assert all(abs(drawn[file] - 20) < 4.5 * deviation for file in files(open_data(str(folder), val_split=0.5).train))


def test_a_resumed_run_keeps_its_split(tmp_path, capsys):
    folder = make(tmp_path / "photos", {"cat": 20, "a,\n" + NFC: 20})
    rows = open_data(str(folder), val_split=0.25).split
    write_split(tmp_path / "split.csv", rows)
    sides = read_split(tmp_path / "split.csv")
    assert sorted(sides.items()) == rows
    gone = next(file for file, side in rows if side == "val" and file.startswith("cat"))
    (folder / gone).unlink()
    for i in range(20, 60):
        (folder / f"cat/{i}.jpg").write_bytes(PHOTO)
    capsys.readouterr()
    data = open_data(str(folder), val_split=0.25, seed=5, sides=sides)
    assert class_counts(data.val) == [5, 4]
    assert class_counts(data.train) == [15, 55]
    assert set(files(data.val)) < {file for file, side in rows if side == "val"}
    assert dict(rows).items() < dict(data.split).items()  # split.csv keeps a deleted file, in case it returns
    message = capsys.readouterr().out
    assert "new since this run was split, added to the training images: cat/20.jpg, cat/21.jpg" in message
    assert "and 35 more" in message
    assert f"missing since this run was split: {gone}\n" in message


def test_a_resume_is_refused_if_a_class_lacks_validation_images(tmp_path):
    folder = make(tmp_path, {"cat": 4, "dog": 4})
    sides = dict(open_data(str(folder), val_split=0.25).split)
    make(folder, {"eel": 3})
    assert "no image of eel for validation" in refusal(folder, sides=sides)


@pytest.mark.slow
def test_check_reads_only_the_validation_images_that_a_run_split_off(tmp_path, capsys):
    folder = make(tmp_path / "photos", {"cat": 12, "dog": 8})
    write_student(tmp_path / "run/student", f"{MODELS}:tiny", 16, ["cat", "dog"])
    write_split(tmp_path / "run/split.csv", open_data(str(folder), val_split=0.5, seed=3).split)
    export_student(tmp_path / "run/student", ("onnx",), model_file=f"{MODELS}:tiny")
    flags = [tmp_path / "run", "--images", folder, "--model-file", f"{MODELS}:tiny", "--device", "cpu"]
    assert command(check.get_parser(), check.run, list(map(str, flags))) == 0
    assert "10 of 20 photographs were training images and are skipped" in capsys.readouterr().out
    row, *_ = json.loads((tmp_path / "run/student/check.json").read_text())
    assert row["images"] == 10


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is not a run's split"), (b"file,side\n", "is not a run's split"),
    (b"file,side\ncat/0.jpg,test\n", "cat/0.jpg"), (b"file,side\ncat/0.jpg\n", "cat/0.jpg"),
    (b"\xff\xfe\x00", "cannot be read as a run's split"),
])  # fmt: skip
def test_a_damaged_split_is_refused(tmp_path, content, message):
    (tmp_path / "split.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_split(tmp_path / "split.csv")


def test_read_split_returns_none_for_a_missing_file(tmp_path):
    assert read_split(tmp_path / "split.csv") is None


@pytest.mark.parametrize(("tree", "options", "message"), [
    (["train/cat", "train/dog"], {}, "no folder photos/val: --val-split 0.1 of train.py keeps a tenth of each class"),
    (["train/cat", "train/dog", "valid/cat"], {}, "for validation; or rename valid/ to val/"),
    (["cat", "dog"], {}, "if its folders are the classes (cat, dog), --val-split 0.1 of train.py keeps a tenth"),
    (["train/cat", "val/cat"], dict(val_split=0.1), "--val-split 0.1: --data photos has its own val/"),
    (["training/cat", "Validation/cat"], dict(val_split=0.1), "no folder photos/train and no folder photos/val; expec"),
    (["training/cat", "Validation/cat"], dict(val_split=0.1), "it holds Validation, training"),
    (["val/cat", "val/dog"], dict(val_split=0.1), "no folder photos/train; expected"),
    ([], dict(val_split=0.1), "no folder photos/train and no folder photos/val; expected"),
    (["cat", "dog"], dict(val_split=1.0), "must be above 0 and below 1, got 1"),
    (["cat", "dog"], dict(val_split=float("nan")), "must be above 0 and below 1, got nan"),
    (["cat"], dict(val_split=0.5), "has only the class cat: at least 2 are needed"),
])  # fmt: skip
def test_a_folder_that_cannot_be_split_is_refused_with_one_line(tmp_path, tree, options, message):
    for folder in tree:
        make(tmp_path, {folder: 2})
    assert message in refusal(tmp_path, **options)


def test_a_class_with_a_single_image_is_refused_by_name(tmp_path):
    make(tmp_path, {"cat": 9, "dog": 1, "eel": 1})
    assert "no image of dog, eel for validation: a class needs 2" in refusal(tmp_path, val_split=0.1)


def test_a_data_set_with_validation_images_is_not_split():
    for name in ("digits", "cifar10"):
        with pytest.raises(UserError, match=f"{name} has its own validation images"):
            open_data(name, val_split=0.1)


def test_a_folder_of_earlier_runs_is_not_a_class(tmp_path):
    make(tmp_path, {"cat": 2, "dog": 2, "runs/001-resnet18-ce": 2})
    (tmp_path / "runs/001-resnet18-ce/args.json").touch()
    assert "runs holds runs of train.py and is not a class" in refusal(tmp_path, val_split=0.5)


def test_a_new_val_folder_replaces_the_split_and_a_message_is_printed(tmp_path, capsys):
    make(tmp_path / "train", {"cat": 4, "dog": 4})
    sides = dict(open_data(str(tmp_path), val_split=0.25).split)
    make(tmp_path / "val", {"cat": 3, "dog": 3})
    assert len(open_data(str(tmp_path), sides=sides).val) == 6
    assert "val exists now and replaces the validation images that the run had split off" in capsys.readouterr().out


def test_a_class_may_have_the_name_train(tmp_path):
    data = open_data(str(make(tmp_path, {"car": 4, "plane": 4, "train": 4})), val_split=0.25)
    assert data.label_names == ["car", "plane", "train"]


# ---- counts, weights, sizes ----


def test_images_of_a_class_are_counted_without_opening_them(tmp_path):
    make(tmp_path / "train", {"cat": 5, "dog": 3}, b"no image")
    make(tmp_path / "val", {"cat": 1, "dog": 2}, b"no image")
    data = open_data(str(tmp_path))
    assert (class_counts(data.train), class_counts(data.val)) == ([5, 3], [1, 2])


def test_digits_are_counted():
    digits = Digits(train=False)
    assert class_counts(digits) == [sum(label == i for _, label in digits) for i in range(10)]


def test_cifar_is_counted(tmp_path, monkeypatch):
    import pickle

    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._load_meta",
                        lambda self: setattr(self, "classes", list("abcdefghij")))  # fmt: skip
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 0, 3, 8]}
        (folder / name).write_bytes(pickle.dumps(batch))
    data = open_data("cifar10")
    assert class_counts(data.train) == [10, 0, 0, 5, 0, 0, 0, 0, 5, 0]


def test_balanced_weights_give_each_class_the_same_share_and_have_a_mean_of_one_over_the_images():
    counts = [100, 10, 40]
    weights = class_weights("balanced", ["a", "b", "c"], counts)
    assert np.multiply(weights, counts) == pytest.approx([50, 50, 50])


@pytest.mark.parametrize("header", ["", "Name,Weight\n", "\ufeffname,weight\n"])
def test_class_weights_are_read_from_a_csv_file(tmp_path, header):
    (tmp_path / "w.csv").write_text(f'{header}dog,0\n"{NFD}, au lait", 2.5\n\n', encoding="utf-8")
    assert class_weights(str(tmp_path / "w.csv"), [f"{NFC}, au lait", "dog"], [1, 1]) == [2, 0]
    small = "\n".join(["cat,0.01", "dog,0.1"])  # 1 / count; the result has a mean of 1 over the images
    (tmp_path / "w.csv").write_text(small)
    assert class_weights(str(tmp_path / "w.csv"), ["cat", "dog"], [100, 10]) == pytest.approx([0.55, 5.5])


@pytest.mark.parametrize(("text", "message"), [
    ("a,1\n", "lacks b"), ("a,1\nb,1\nc,1\nd,2\n", "names classes that --data does not have: c, d"),
    ("a,1\nb,-1\n", "weight of at least 0, got b,-1"), ("a,1\nb,inf\n", "at least 0, got b,inf"),
    ("a,nan\nb,1\n", "got a,nan"), ("a,1\nb,one\n", "got b,one"), ("a\nb\n", "got a"), ("a,1,2\nb,1\n", "got a,1,2"),
    ("a,1\na,2\nb,1\n", "names a twice"), ("a,0\nb,0\n", "sum to 0: expected a finite sum"),
    ("", "lacks a, b"),
    (None, "expected balanced, or a CSV file"),
])  # fmt: skip
def test_invalid_class_weights_are_refused_with_one_line(tmp_path, text, message):
    file = tmp_path / "w.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        class_weights(str(file), ["a", "b"], [1, 1])
    assert "\n" not in str(error.value)


def test_a_class_without_images_has_no_balanced_weight():
    with pytest.raises(UserError, match="no training image of b"):
        class_weights("balanced", ["a", "b"], [3, 0])


def test_the_median_size_is_read_from_headers_and_follows_the_exif_orientation(tmp_path):
    folder = make(tmp_path, {"cat": 3, "dog": 2})
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    rotated = io.BytesIO()
    Image.new("RGB", (300, 100)).save(rotated, "JPEG", exif=exif)
    for i in range(3):
        (folder / f"cat/{i}.jpg").write_bytes(rotated.getvalue()[:-100])  # truncated after the header
    (folder / "dog/0.jpg").write_bytes(b"")
    data = open_data(str(folder), val_split=0.01)
    photos = data.train.part(range(len(data.train)))
    photos.samples += data.val.samples
    assert median_size(photos) == (300, 100)


def test_the_median_size_of_unreadable_images_is_refused(tmp_path):
    data = open_data(str(make(tmp_path, {"cat": 2, "dog": 2}, b"")), val_split=0.5)
    with pytest.raises(UserError, match=r"none of the 2 images can be read; the last is .*dog"):
        median_size(data.train)


def test_images_outside_the_folders_of_the_classes_are_counted(tmp_path, capsys):
    make(tmp_path / "train", {"a": 2, "b": 2})
    make(tmp_path / "val", {"a": 1, "b": 1})
    for name in ("train/loose.png", "train/notes.txt", "train/loose.jpg"):
        (tmp_path / name).touch()
    data = open_data(str(tmp_path))
    assert len(data.train) == 4
    assert f"{tmp_path}/train: skipped 2 images outside the folders of the classes" in capsys.readouterr().out

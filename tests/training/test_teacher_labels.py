"""Test the command that stores a teacher's labels, training from these labels, and user losses."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import refused, rows, run, write_labels
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

import train
from deploy import export
from deploy.cli import UserError
from deploy.preprocess import UnreadableImage
from deploy.run_directory import locked
from deploy.student import load_student
from examples import teacher_labels as example
from kdlite import nkd_topk_loss
from kdlite.training import loading, teacher_labels
from kdlite.training.data import open_data
from kdlite.training.teacher_labels import StoredLabels, describe_images

pytestmark = pytest.mark.slow  # they train
ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
TINY = [
    "--device",
    "cpu",
    "--model",
    f"{MODELS}:tiny",
    "--epochs",
    1,
    "--img-size",
    16,
    "--reference",
    0,
    "--workers",
    0,
]
OWN = ["--model", f"{MODELS}:tiny"]  # a resume requires the model file again
STUDENT = ["--device", "cpu", *OWN, "--img-size", 16, "--workers", 0]  # flags of the command that stores labels
VIEWS = ["--data", "photos", "--recipe", "digits", "--crop", "resized", "--hflip", 0.5, "--randaugment", 2, 9]
TEACHER = ["--teacher", "t/student", "--model-file", f"{MODELS}:tiny"]
PHOTOS = ["--data", "photos", "--recipe", "digits", "--batch-size", 8, "--crop", "resized", "--hflip", 0.5,
          "--randaugment", 2, 9]  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Train a teacher of the digits in t/ and a teacher of two classes of photographs in p/t/."""
    root = tmp_path_factory.mktemp("teachers")
    before = Path.cwd()
    os.chdir(root)
    try:
        run(*TINY, "--epochs", 2, "--lr", 0.02, "--output", "t")
        for name, photo in zip(("china", "flower"), load_sample_images().images):
            for part, count in (("train", 12), ("val", 3)):
                folder = root / "p/photos" / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(photo[15 * i : 15 * i + 64, 20 * i : 20 * i + 80]).save(folder / f"{i}.png")
        os.chdir(root / "p")
        run(*TINY, *PHOTOS, "--output", "t")
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def digits(teachers, tmp_path, monkeypatch):
    shutil.copytree(teachers / "t", tmp_path / "t")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(teachers, tmp_path, monkeypatch):
    shutil.copytree(teachers / "p", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def view_of(size):
    return loading.View((3, size, size), "resized", 0.5, "bilinear", [2, 9])


def stored(data, folder="L"):
    return StoredLabels(Path(folder), describe_images(data, view_of(16)))


def refused_labels(capsys, *flags):
    return refused(capsys, *flags, command=write_labels, program="teacher_labels")


# ---- training from stored labels equals training from the teacher ----


def test_answers_about_all_classes_give_the_losses_of_the_teacher(digits):
    write_labels(*STUDENT, *TEACHER, "--output", "L", "--views", 2, "--top-k", 9)
    run(*TINY, "--epochs", 2, "--kd", "nkd", "--teacher-labels", "L", "--output", "stored")
    run(*TINY, "--epochs", 2, "--kd", "nkd", *TEACHER, "--output", "online")
    for ours, theirs in zip(rows("stored"), rows("online")):
        assert float(ours["loss_ce"]) == pytest.approx(float(theirs["loss_ce"]), rel=1e-3)
        assert float(ours["loss_nkd"]) == pytest.approx(float(theirs["loss_nkd"]), rel=1e-3)  # log T_i is float16
    config = json.loads(Path("stored/student/config.json").read_text())
    assert config["training"]["teacher"].startswith("student (")
    assert config["training"]["teacher"].endswith("), top-9 of 2 views drawn from seed 0")


def test_a_stored_label_is_the_output_of_the_teacher_for_the_same_view(photos, capsys):
    write_labels(*STUDENT, *VIEWS, *TEACHER, "--output", "L", "--views", 2, "--seed", 3)
    assert re.search(r"the teacher is right on \d+\.\d\d % of the first 48 views", capsys.readouterr().out)
    data = open_data("photos")
    teacher, config = load_student(Path("t"), [f"{MODELS}:tiny"])
    teacher.eval()
    labels = stored(data)
    assert (labels.views, labels.header["k"]) == (2, 1)
    samples = loading.Samples(data.train, view_of(16).transform(), 7, labels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    seen = []
    for epoch, index in ((0, 0), (0, 23), (1, 0), (2, 0), (3, 23)):
        image, label, _, (log_t, top, classes) = samples[epoch, index]
        with torch.no_grad():
            expected = teacher((image[None] / 255 - mean) / std).log_softmax(1)[0]
        assert log_t.item() == pytest.approx(expected[label].item(), abs=1e-5)
        assert top.item() == pytest.approx(expected[1 - label].item(), abs=1e-3)
        assert classes.tolist() == [1 - label]
        seen.append(image)
    assert torch.equal(seen[0], seen[3])  # with two views, epoch 2 repeats epoch 0
    assert not torch.equal(seen[0], seen[2])


def test_labels_of_large_crops_train_a_student_of_small_crops(photos):
    """Store labels at 32 pixels and train at 16: a crop shows the same part of the photograph at both sizes."""
    write_labels(*STUDENT, *VIEWS, *TEACHER, "--img-size", 32, "--output", "L", "--views", 1)
    run(*TINY, *PHOTOS, "--kd", "nkd", "--teacher-labels", "L", "--output", "out")
    assert math.isfinite(float(rows("out")[0]["loss_nkd"]))


@pytest.mark.trial
def test_workers_and_ranks_write_the_same_labels(photos, monkeypatch):
    flags = [*STUDENT, *VIEWS, *TEACHER, "--views", 3, "--output"]
    write_labels(*flags, "L")
    write_labels(*flags, "M", "--workers", 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "-m", "kdlite.training.teacher_labels", *map(str, flags), "N"], check=True, timeout=200,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    for name in ("labels.json", "000-00000000.npy", "001-00000000.npy", "002-00000000.npy"):
        for other in "MN":
            assert Path("L", name).read_bytes() == Path(other, name).read_bytes()


def test_a_stopped_run_from_labels_resumes_to_the_same_weights(digits, monkeypatch):
    write_labels(*STUDENT, *TEACHER, "--output", "L", "--views", 1)
    flags = [*TINY, "--epochs", 2, "--kd", "nkd", "--self-kd", "uskd", "--teacher-labels", "L"]
    run(*flags, "--output", "whole")
    with monkeypatch.context() as m:
        evaluate = train.evaluate
        m.setattr(train, "evaluate", lambda *args: os.kill(os.getpid(), 15) or evaluate(*args))
        run(*flags, "--output", "parts")
    assert not Path("parts/metrics.csv").exists()
    run("--output", "parts", "--resume", *OWN)
    whole, parts = (torch.load(f"{name}/last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.trial
def test_a_teacher_in_an_onnx_file_writes_the_same_labels_and_bad_arguments_are_refused(digits):
    write_labels(*STUDENT, *TEACHER, "--output", "L", "--views", 1)
    export.export_student(Path("t/student"), ("onnx",), model_file=f"{MODELS}:tiny")
    example.write(Path("t/student/student.onnx"), Path("M"), 1, 10, list(map(str, TINY)))
    ours, theirs = (np.load(f"{name}/000-00000000.npy") for name in "ML")
    np.testing.assert_allclose(ours["target"], theirs["target"], atol=1e-4)
    assert (ours["indices"] == theirs["indices"]).mean() > 0.99  # because the order of ties may differ
    run(*TINY, "--kd", "nkd", "--teacher-labels", "M", "--output", "out")
    line = subprocess.run([sys.executable, ROOT / "examples/teacher_labels.py", "none.onnx", "N"], capture_output=True)
    assert (line.returncode, line.stderr.count(b"\n")) == (2, 1)
    for views, flags, message in ((0, [], "views is 0"), (1, ["--img-size", "32"], "the student's have [3, 32, 32]")):
        with pytest.raises(UserError, match=re.escape(message)):
            example.write(Path("t/student/student.onnx"), Path("N"), views, 10, [*map(str, TINY), *flags])
        assert not Path("N").exists()


def test_answers_of_a_server_convert_to_the_inputs_of_the_top_k_loss():
    """Convert answers like vLLM's prompt_logprobs: a dict per token with the k largest classes and the token itself."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 30, generator=g, dtype=torch.float64)
    labels = torch.randint(30, (6,), generator=g)
    log_t = teacher.log_softmax(1)
    answers = [
        {int(i): float(row[i]) for i in {*row.topk(5).indices.tolist(), int(t)}} for row, t in zip(log_t, labels)
    ]
    found = nkd_topk_loss(student, *example.from_answers(answers, labels.tolist(), 5), labels)
    masked = log_t.masked_fill(F.one_hot(labels, 30).bool(), -torch.inf).topk(5)
    masked_values = masked.values.where(masked.values >= log_t.topk(5).values[:, -1:], -torch.inf)
    expected = nkd_topk_loss(student, log_t.gather(1, labels[:, None])[:, 0], masked_values, masked.indices, labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # a position without an answer, which the loss ignores
    log_t, top, index = example.from_answers([{}, answers[0]], [-100, int(labels[0])], 5)
    ignored = nkd_topk_loss(student[[1, 0]], log_t, top, index, torch.tensor([-100, int(labels[0])]))
    torch.testing.assert_close(ignored, nkd_topk_loss(student[:1], log_t[1:], top[1:], index[1:], labels[:1]))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        example.from_answers(answers, [1], 5)


# ---- writing ----


def test_complete_files_stay_and_damaged_files_are_written_again(digits, monkeypatch, capsys):
    monkeypatch.setattr(teacher_labels, "ROWS", 70)
    flags = [*STUDENT, *TEACHER, "--views", 2, "--output"]
    write_labels(*flags, "L")
    write_labels(*flags, "M")
    assert sorted(path.name for path in Path("L").glob("*.npy")) == [
        f"{view:03}-{start:08}.npy" for view in (0, 1) for start in (0, 70, 140)
    ]
    Path("L/001-00000070.npy").write_bytes(Path("L/001-00000070.npy").read_bytes()[:-1])
    kept = {path: path.stat().st_mtime_ns for path in Path("L").glob("*.npy") if path.name != "001-00000070.npy"}
    line = refused(capsys, *TINY, "--kd", "nkd", "--teacher-labels", "L", "--output", "out")
    assert "1 files of labels in" in line
    assert "001-00000070.npy" in line
    write_labels(*flags, "L")
    assert "400 views (200 images x 2), 330 written already: 0.0 MB" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    for path in Path("M").iterdir():
        assert (Path("L") / path.name).read_bytes() == path.read_bytes()


def zeros(content):
    return content[:5000] + bytes(len(content) - 5000)


def flipped(content):  # flips one bit of the rows
    return content[:700] + bytes([content[700] ^ 1]) + content[701:]


@pytest.mark.parametrize("damage", [zeros, flipped, lambda content: b"", lambda content: content[:-4], "folder"])
def test_a_damaged_file_is_refused_in_training_and_then_written_again(digits, capsys, damage):
    write = [*STUDENT, *TEACHER, "--views", 1, "--output", "L"]
    write_labels(*write)
    file = Path("L/000-00000000.npy")
    whole = file.read_bytes()
    assert int.from_bytes(whole[-4:], "little") == zlib.crc32(whole[:-4])
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(damage(whole))
    line = refused(capsys, *TINY, "--kd", "nkd", "--teacher-labels", "L", "--output", "out")
    assert "the first is 000-00000000.npy: " in line
    if damage == "folder":
        file.rmdir()
    write_labels(*write)
    assert file.read_bytes() == whole


def test_an_epoch_keeps_the_files_of_one_view_open(photos, monkeypatch):
    monkeypatch.setattr(teacher_labels, "ROWS", 10)
    write_labels(*STUDENT, *VIEWS, *TEACHER, "--output", "L", "--views", 3)
    labels = stored(open_data("photos"))
    for view in (0, 1, 2, 0):
        for index in (0, 23, 10):
            labels(view, index)
        assert sorted(labels.files) == [(view, 0), (view, 10), (view, 20)]


def test_a_teacher_that_returns_nan_is_refused(digits, capsys):
    Path("nan.py").write_text("""
import torch

class NaN(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.classifier = torch.nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, x):
        y = self.classifier(x.flatten(1))
        return torch.cat([y[:-1], y[-1:] * torch.nan])

def build(num_classes=10):
    return NaN(num_classes)
""")
    write_labels(*STUDENT, "--teacher", "nan.py:build", "--output", "L", "--views", 1, check=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert "the teacher's answers are invalid: the probabilities of an image sum to nan" in line
    assert "--amp off" in line
    assert not list(Path("L").glob("*.npy"))


def test_a_folder_in_use_and_the_path_of_a_file_are_refused(digits, capsys):
    write_labels(*STUDENT, *TEACHER, "--output", "L", "--views", 1)
    with locked(Path("L")):
        assert f"is in use by process {os.getpid()} on" in refused_labels(capsys, *STUDENT, *TEACHER, "--output", "L")
    Path("file").touch()
    assert "cannot make" in refused_labels(capsys, *STUDENT, *TEACHER, "--output", "file")


def test_a_tilde_that_the_shell_does_not_expand_becomes_the_home_folder(digits, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    write_labels(*STUDENT, *TEACHER, "--output=~/L", "--views", 1)
    run(*TINY, "--kd", "nkd", "--teacher-labels", "~/L", "--output", "~/out")
    assert Path("home/out/student").is_dir()
    assert not Path("~").exists()


def test_complete_files_stay_after_a_signal(digits, monkeypatch, capsys):
    monkeypatch.setattr(teacher_labels, "ROWS", 70)
    flags = [*STUDENT, *TEACHER, "--views", 1, "--output", "L"]
    with monkeypatch.context() as m:
        write = teacher_labels.write_whole

        def write_and_stop(path, content):
            write(path, content)
            if path.suffix == ".npy":
                os.kill(os.getpid(), 15)

        m.setattr(teacher_labels, "write_whole", write_and_stop)
        write_labels(*flags)
    assert "stopped by SIGTERM: the complete files in" in capsys.readouterr().out
    assert [path.name for path in Path("L").glob("*.npy")] == ["000-00000000.npy"]
    write_labels(*flags)
    assert len(list(Path("L").glob("*.npy"))) == 3


RANKS = """
import sys, time, torch
from pathlib import Path
from kdlite.training import distributed as ranks
from kdlite.training import teacher_labels
from kdlite.training.data import open_data
from kdlite.training.loading import View

teacher_labels.ROWS = 500  # three files for two processes, so that one process waits
stop = ranks.StopRequest()

def ask(images, labels):
    time.sleep(0.5)
    stop.name = "SIGTERM" if sys.argv[1] == "stopped" and ranks.RANK == 1 else None
    return torch.full((len(labels),), -1.0), torch.full((len(labels), 3), -2.0), torch.arange(3).expand(len(labels), 3)

with ranks.process_group():
    data, view = open_data("digits"), View((3, 16, 16), "none", 0.0, "bilinear")
    header = teacher_labels.describe_images(data, view)
    header |= {"teacher": {"name": "t", "digest": "0"}, "seed": 0, "views": 1, "k": 3}
    with teacher_labels.lock_labels(Path("L"), header):
        whole = teacher_labels.write_labels(Path("L"), header, data.train, view.transform(), ask, 0, stop)
    Path(f"{ranks.RANK}.txt").write_text(str(whole))
"""


@pytest.mark.trial
@pytest.mark.parametrize(("how", "whole"), [("waits", "True"), ("stopped", "False")])
def test_all_ranks_return_whether_all_files_are_written(tmp_path, monkeypatch, how, whole):
    monkeypatch.chdir(tmp_path)
    Path("ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "ranks.py", how], check=True, timeout=200,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert [Path(f"{rank}.txt").read_text() for rank in (0, 1)] == [whole, whole]


def test_an_unreadable_image_gets_no_label_and_is_skipped(photos, capsys):
    Path("photos/train/china/3.png").write_bytes(b"no image")
    write_labels(*STUDENT, *VIEWS, *TEACHER, "--output", "L", "--views", 1)
    assert (
        f"skipped a corrupt image (1 so far in training): {Path('photos').absolute()}/train/china/3.png"
        in capsys.readouterr().err
    )
    data = open_data("photos")
    index = data.train.files().index("china/3.png")
    assert torch.isfinite(stored(data)(0, index + 1)[0])
    with pytest.raises(UnreadableImage):
        stored(data)(0, index)
    run(*TINY, *PHOTOS, "--kd", "kd", "--teacher-labels", "L", "--output", "out")
    assert "china/3.png: " in capsys.readouterr().err
    assert math.isfinite(float(rows("out")[0]["loss_kd"]))


def test_labels_of_files_that_were_replaced_are_refused(photos, capsys):
    write_labels(*STUDENT, *VIEWS, *TEACHER, "--output", "L", "--views", 1)
    for i in range(12):  # swap the contents of two classes
        china, flower = (Path(f"photos/train/{name}/{i}.png") for name in ("china", "flower"))
        before = china.read_bytes()
        china.write_bytes(flower.read_bytes())
        flower.write_bytes(before)
    line = refused(capsys, *TINY, *PHOTOS, "--kd", "nkd", "--teacher-labels", "L", "--output", "out")
    assert "L differ from this run in the digest of the files' contents" in line


@pytest.mark.parametrize("fault", ["index", "twice", "sum", "nan"])
def test_labels_with_impossible_values_and_a_correct_checksum_are_refused(digits, capsys, fault):
    write_labels(*STUDENT, *TEACHER, "--output", "L", "--views", 1)
    file = Path("L/000-00000000.npy")
    array = np.load(file)
    if fault == "index":
        array["indices"][5, 0] = 10
    elif fault == "twice":
        array["indices"][5, 1] = array["indices"][5, 0]
    elif fault == "sum":
        array["logprobs"][5, 0] = 5
    else:
        array["target"][5] = np.nan
    content = io.BytesIO()
    np.save(content, array)
    file.write_bytes(content.getvalue() + zlib.crc32(content.getvalue()).to_bytes(4, "little"))
    line = refused(capsys, *TINY, "--kd", "nkd", "--teacher-labels", "L", "--output", "out")
    assert {"index": "out of range: expected 0 to 9", "twice": "a class twice", "sum": "sum to", "nan": "sum to"}[
        fault
    ] in line


@pytest.mark.parametrize(
    "flags",
    [
        ["--kd", "kd"],
        pytest.param(["--kd", "nkd", "--temperature", 2], marks=pytest.mark.trial),
        pytest.param(["--kd", "own.py:rows"], marks=pytest.mark.trial),
    ],
)
def test_other_losses_require_labels_of_every_class(user_losses, capsys, flags):
    learn = [*TINY, *flags, "--output", "stored", "--teacher-labels"]
    write_labels(*STUDENT, *TEACHER, "--output", "top8", "--views", 1, "--top-k", 8)
    assert "needs the teacher's answer about every class, but top8 has only its top-8: write labels with --top-k 9" in (
        refused(capsys, *learn, "top8").replace(f"{Path.cwd()}/", "")
    )
    write_labels(*STUDENT, *TEACHER, "--output", "all", "--views", 1, "--top-k", 9)
    run(*learn, "all")
    run(*TINY, *flags, *TEACHER, "--output", "online")
    (name,) = [name for name in rows("online")[0] if name.startswith("loss_") and name != "loss_ce"]
    if flags[1] != "own.py:rows":  # this loss depends on the offset of the logits, which labels lack
        assert float(rows("stored")[0][name]) == pytest.approx(float(rows("online")[0][name]), rel=1e-3)


@pytest.mark.parametrize("flags", [dict(kd="kd", temperature=2.0), dict(kd="nkd", temperature=2.0)])
def test_a_padding_entry_of_the_labels_does_not_change_the_loss(flags):
    """Replace the third of four classes by a padding entry: -inf, with an arbitrary index."""
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    teacher[:, 2] = -1e30
    target = torch.tensor([0, 1, 3, 0, 1, 3])
    log_t, index = teacher.log_softmax(1), torch.tensor([[1, 3, 0], [0, 3, 0], [0, 1, 0]] * 2)
    top = log_t.gather(1, index)
    top[:, 2] = -torch.inf
    labels = log_t.gather(1, target[:, None])[:, 0], top, index
    method = train.Method(**flags)
    from_labels, online = (
        train.loss_terms(method, student, None, answers, target)[method.kd] for answers in (labels, teacher)
    )
    assert from_labels.isfinite()
    torch.testing.assert_close(from_labels, online)


# ---- refused labels and flags ----


def test_labels_that_do_not_match_the_run_are_refused_with_the_field_that_differs(photos, capsys):
    write = [*STUDENT, *VIEWS, *TEACHER, "--views", 2, "--output", "L"]
    write_labels(*write)
    learn = [*TINY, *PHOTOS, "--kd", "nkd", "--teacher-labels", "L", "--output", "out"]

    def difference(*flags):
        command = refused_labels if flags[0] == STUDENT[0] and "--views" in flags else refused
        return command(capsys, *flags).partition("differ from this run in the ")[2].partition("; use the flags")[0]

    assert difference(*learn, "--crop", "none") == "transform, crop: {'crop': 'resized'} there, {'crop': 'none'} here"
    assert difference(*learn, "--randaugment", 1, 9) == (
        "transform, randaugment: {'randaugment': [2, 9]} there, {'randaugment': [1, 9]} here"
    )
    assert difference(*write, "--views", 3) == "number of views: 2 there, 3 here"
    assert difference(*write, "--seed", 1) == "seed of the views: 0 there, 1 here"
    line = refused_labels(capsys, *write[:-1], "M", "--views", 200_000)
    assert "views is 200000; expected a number from 1 to 100,000" in line
    assert not Path("M").exists()
    run(*TINY, *PHOTOS, "--seed", 1, "--output", "other")
    assert difference(*write, "--teacher", "other/student").startswith("teacher, digest: ")
    Path("photos/train/china/0.png").rename("photos/train/flower/99.png")
    assert difference(*learn).startswith("digest of file names and classes: ")
    Path("photos/train/flower/99.png").unlink()
    assert difference(*learn) == "number of training images: 24 there, 23 here"
    assert not Path("out").exists()


def test_a_resumed_run_requires_the_same_labels(digits, capsys):
    write_labels(*STUDENT, *TEACHER, "--output", "L", "--views", 1)
    run(*TINY, "--kd", "nkd", "--teacher-labels", "L", "--output", "out")
    shutil.rmtree("L")
    write_labels(*STUDENT, *TEACHER, "--output", "L", "--views", 1, "--top-k", 3)
    line = refused(capsys, *OWN, "--output", "out", "--resume", "--epochs", 2)
    assert "this run began with labels of student (" in line
    assert "top-9 of 1 views" in line
    assert "top-3 of 1 views" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kd", "nkd", "--teacher-labels", "L", "--mixup", 0.2], "give --mixup 0"),
        (["--kd", "nkd", "--teacher-labels", "L", "--cache", "device"], "give --cache none"),
        (["--teacher-labels", "L"], "--teacher-labels needs --kd"),
        (["--teacher-labels", "L", "--kd", "nkd", *TEACHER], "without --teacher"),
        (["--teacher-labels", "L", "--kd", "nkd"], "L/labels.json cannot be read: No such file or"),
        (["--kd", "dkd"], "'dkd': expected nkd, kd or path/to/file.py:function"),
    ],
)
def test_flags_that_conflict_are_refused(digits, capsys, flags, message):
    assert message in refused(capsys, *TINY, *flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "labels.json"), ("[]", "labels.json"), ('{"images": 3}', "labels.json"), ('{"images": "3"}', "images")],
)
def test_a_damaged_header_is_refused(digits, capsys, content, message):
    Path("L").mkdir()
    Path("L/labels.json").write_text(content)
    assert message in refused(capsys, *TINY, "--kd", "nkd", "--teacher-labels", "L")


# ---- user losses ----


@pytest.fixture
def user_losses(digits):
    Path("own.py").write_text("""
import torch
from torch.nn import functional as F

def rows(student_logits, teacher_logits, target):
    return F.mse_loss(student_logits, teacher_logits, reduction="none").mean(1)

def one(student_logits, teacher_logits, target):
    return rows(student_logits, teacher_logits, target).mean()

def alone(student_logits, teacher_logits, target):
    assert teacher_logits is None
    return student_logits.square().mean(1)

def wrong(student_logits, teacher_logits, target):
    return student_logits

def nothing(student_logits, teacher_logits, target):
    pass

def raises(student_logits, teacher_logits, target):
    return student_logits.nothing
""")


def test_a_folder_with_the_name_of_a_method_does_not_replace_the_method(digits):
    Path("kd").mkdir()
    run(*TINY, "--kd", "kd", *TEACHER, "--output", "out")
    assert "loss_kd" in rows("out")[0]


def test_a_user_loss_returns_rows_or_one_value_and_needs_no_teacher(user_losses):
    run(*TINY, "--kd", "own.py:rows", *TEACHER, "--output", "rows")
    run(*TINY, "--kd", "own.py:one", *TEACHER, "--output", "one")
    assert float(rows("rows")[0]["loss_own"]) == pytest.approx(float(rows("one")[0]["loss_own"]), rel=1e-5)
    run(*TINY, "--kd", "own.py:alone")  # without a teacher
    assert Path("runs/001-own_models-alone").is_dir()
    config = json.loads(Path("rows/student/config.json").read_text())
    assert config["training"]["method"] == "cross-entropy + rows"


@pytest.mark.parametrize("name", ["dkd", "dist"])  # dkd returns a value per row, dist one value
def test_the_losses_of_the_examples_train_a_student(digits, name):
    run(*TINY, "--kd", f"{ROOT}/examples/losses.py:{name}", *TEACHER, "--output", "out")
    assert np.isfinite(float(rows("out")[0]["loss_own"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["own.py:wrong"],
            "--kd must return (N,), a loss for each row, or (without --class-weights) one value: got (32, 10)",
        ),
        (["own.py:one", "--class-weights", "balanced"], ": got ()"),
        (["own.py:nothing"], ": got NoneType"),
        (["own.py:raises"], "own.py:raises failed: AttributeError: 'Tensor' object has no attribute 'nothing' ("),
        (["own.py:missing"], "has no function 'missing'"),
        (["nowhere.py:loss"], "no file nowhere.py"),
    ],
)
def test_an_invalid_user_loss_is_refused(user_losses, capsys, flags, message):
    assert message in refused(capsys, *TINY, *TEACHER, "--kd", *flags)

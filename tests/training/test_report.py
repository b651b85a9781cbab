"""Test examples/report.py: the page about some runs, opened in a real browser."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import rows, run

from deploy.reference import Reference
from deploy.runtimes import softmax
from kdlite import nkd_loss

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import report  # noqa: E402

SMALL = ["--device", "cpu", "--epochs", "1", "--img-size", "16", "--workers", "0", "--reference", "40"]
TINY = [*SMALL, "--model", f"{ROOT}/tests/own_models.py:tiny", "--model-file", f"{ROOT}/tests/own_models.py:tiny"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(*TINY, "--output", folder / "teacher")
    run(*TINY, "--output", folder / "with-teacher", "--kd", "nkd", "--teacher", folder / "teacher/student")
    run(*TINY, "--output", folder / "alone <b>", "--self-kd", "uskd", "--tap", "layer1")
    return sorted(folder.iterdir())


def test_the_calibration_error_equals_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(5, 0.3), 500)
    labels = random.integers(5, size=500)
    expected = 0.0
    for low in range(15):
        held = [i for i in range(500) if low / 15 <= max(p[i]) < (low + 1) / 15 or (low == 14 and max(p[i]) == 1)]
        if held:
            right = sum(int(np.argmax(p[i]) == labels[i]) for i in held) / len(held)
            expected += len(held) / 500 * abs(right - sum(max(p[i]) for i in held) / len(held))
    known = report.calibration(p.max(1), p.argmax(1) == labels)
    assert math.isclose(known.error, expected)
    assert len(known.confidence) == len(known.accuracy) == len(known.share)
    assert math.isclose(known.share.sum(), 1)
    assert report.calibration(np.ones(3), np.ones(3)).error == 0
    assert report.calibration(np.ones(3), np.zeros(3)).error == 1


@pytest.mark.slow
def test_the_page_shows_every_run_and_loads_no_other_file(runs, browser, tmp_path):
    command = [sys.executable, ROOT / "examples/report.py", *runs, tmp_path, "-o", tmp_path / "page.html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/page.html\n"
    assert done.stderr == f"skipped: {tmp_path} is not a run of train.py, or has no finished epoch\n"

    page = browser.new_page(viewport={"width": 400, "height": 800})
    problems, requested = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"file://{tmp_path}/page.html")
    assert problems == []
    assert [url for url in requested if not url.startswith("data:")] == [f"file://{tmp_path}/page.html"]
    for folder in runs:
        cells = page.locator("table").first.locator("tr", has_text=folder.name).locator("td").all_inner_texts()
        assert cells[4] == f"{float(rows(folder)[-1]['val_top1']):.2f}"
    assert page.get_by_role("img", name="top-1 by epoch").count() == 1
    assert page.get_by_role("img", name="accuracy against confidence").count() == 1
    pictures = page.locator("img")
    known = [report.read_run(folder) for folder in runs]
    wrong = [int((one.reference.logits.argmax(1) != one.reference.labels).sum()) for one in known]
    shown = sum(min(count, report.MISTAKES) for count in wrong)
    assert shown > 0
    assert pictures.count() == 2 * report.SAMPLES + len(runs) + shown  # samples of two students; confusion, mistakes
    assert all(pictures.nth(i).evaluate("image => image.naturalWidth") > 0 for i in range(pictures.count()))
    assert "T_t" in page.locator("body").inner_text()
    assert "P_t" in page.locator("body").inner_text()
    page.close()


@pytest.fixture
def known(tmp_path):
    """Write a run of three classes whose reference has 40 images, 30 of them mistakes."""
    g = np.random.default_rng(0)
    labels = np.arange(40) % 3
    logits = g.normal(0, 1, (40, 3)).astype(np.float32)
    logits[np.arange(40), np.where(np.arange(40) < 30, (labels + 1) % 3, labels)] += 5
    images = g.integers(0, 256, (40, 200, 300, 3), dtype=np.uint8)
    reference = Reference(images, labels, logits, images[:1], np.array("0"))
    return report.Run("a <run>", tmp_path, {"model": "tiny"}, [1], [25.0], ["cat", "<b>dog", "eel"], 2.0, reference, "")


def test_mistakes_are_small_jpegs_the_most_certain_first(known):
    page = report.mistakes(known)
    shares = [int(x) for x in re.findall(r"<figcaption>.*?, (\d+) %</figcaption>", page)]
    assert len(shares) == report.MISTAKES == 24
    assert shares == sorted(shares, reverse=True)
    confidence = softmax(known.reference.logits / 2)[:30].max(1)
    assert shares[0] == round(100 * confidence.max())
    assert "30 of the 40 validation images" in page
    assert "cat, taken for &lt;b&gt;dog" in page
    assert "<b>dog" not in page
    for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.format, max(image.size)) == ("JPEG", 160)


def test_mistakes_of_grey_images_and_a_run_without_mistakes(known):
    grey = known.reference._replace(images=known.reference.images[..., :1])
    assert "data:image/jpeg" in report.mistakes(known._replace(reference=grey))
    right = known.reference._replace(labels=known.reference.logits.argmax(1))
    page = report.mistakes(known._replace(reference=right))
    assert "0 of the 40 validation images" in page
    assert "<figure>" not in page
    assert "no file" in report.mistakes(known._replace(reference=None, missing="no file"))


def test_the_table_has_the_calibration_error_with_the_temperature(known):
    calibrations = {known.name: report.calibration_of(known, None)}
    numbers = re.findall(r"<td class=n>(.*?)</td>", report.table([known], calibrations))
    errors = [f"{100 * report.calibration_of(known, t).error:.1f}" for t in (None, 2.0)]
    assert numbers[-2:] == errors
    assert errors[0] != errors[1]
    bare = known._replace(temperature=None)
    assert re.findall(r"<td class=n>(.*?)</td>", report.table([bare], calibrations))[-1] == "-"


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_labels_on_the_page_equal_those_of_the_losses(runs, temperature):
    """Compare the gradient of the loss, by the student's logits, with one computed from the labels on the page."""
    known = report.read_run(next(folder for folder in runs if folder.name == "with-teacher"))
    known = known._replace(flags=known.flags | {"temperature": temperature})
    teacher, remarks = report.teachers_logits(known)
    assert remarks == ""
    for index in range(5):
        target = int(known.reference.labels[index])
        words, others = report.soft_label(known, teacher, index)
        weight = float(words.rpartition(" ")[2])
        logits = torch.tensor(known.reference.logits[index], dtype=torch.float64, requires_grad=True)
        loss = nkd_loss(logits[None], torch.tensor(teacher[index])[None].double(), torch.tensor([target]), gamma=1.5,
                        temperature=temperature)  # fmt: skip
        loss.backward()
        s, t = softmax(logits.detach().numpy()), softmax(teacher[index].astype(float))
        student = report.without_target(softmax(logits.detach().numpy() / temperature), target)
        by_hand = weight / temperature * (student - others) + t[target] * (s - np.eye(len(s))[target])
        np.testing.assert_allclose(logits.grad.numpy(), by_hand, atol=1e-6)
        assert f"T_t {t[target]:.2f};" in words


@pytest.mark.slow
def test_damaged_and_missing_files_are_reported_and_the_rest_is_shown(runs, tmp_path, capsys):
    teacher, other = tmp_path / "teacher", tmp_path / "more/teacher"
    shutil.copytree(next(folder for folder in runs if folder.name == "teacher"), teacher)
    shutil.copytree(next(folder for folder in runs if folder.name == "with-teacher"), other)
    (other / "reference.npz").write_bytes(b"no zip")
    odd = tmp_path / "odd"
    shutil.copytree(teacher, odd)
    (odd / "metrics.csv").write_text("epoch,val_top1\n1,\n")
    row = {"batch": 1, "p50_ms": 1.0, "artefact": "student.onnx", "precision": "fp32", "provider": "CPU"}
    (other / "student/benchmark.json").write_text(json.dumps({"rows": [row]}))  # without an accuracy
    folders = [str(teacher), str(other), str(odd)]
    assert report.command(report.parser, report.run, [*folders, "-o", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().err == f"skipped: {odd} is not a run of train.py, or has no finished epoch\n"
    text = (tmp_path / "p.html").read_text()
    assert "reference.npz cannot be read" in text
    assert "Not measured" in text
    assert f"<td>{teacher}</td>" in text  # two runs have the same name
    assert f"<td>{other}</td>" in text


@pytest.mark.trial
def test_grey_images_are_shown(tmp_path):
    flags = ["--in-chans", "1", "--model", "test_resnet.r160_in1k", "--self-kd", "uskd"]
    run(*SMALL, *flags, "--output", tmp_path / "grey")
    assert "data:image/png" in report.page([report.read_run(tmp_path / "grey")])


def test_folders_without_a_run_print_one_line(tmp_path, capsys):
    assert report.command(report.parser, report.run, [str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"report.py: error: no run of train.py among {tmp_path}: ")
    assert report.command(report.parser, report.run, [str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"report.py: error: no folder {tmp_path}/nowhere\n"

"""Test examples/report.py, which writes a page about some runs. One test opens the page in a real browser."""

import base64
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import own_models
import pytest
import torch
from PIL import Image
from running import rows, run

from deploy import per_class
from deploy.reference import Reference
from deploy.runtimes import softmax
from kdlite import nkd_loss
from kdlite.training import outputs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import report  # noqa: E402

SMALL = ["--device", "cpu", "--epochs", "2", "--img-size", "16", "--workers", "0", "--reference", "40"]
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
def test_the_page_shows_every_run_and_loads_no_other_file(runs, browser, tmp_path, capsys):
    report.run(report.parser.parse_args([*map(str, runs), str(tmp_path), "-o", f"{tmp_path}/page.html"]))
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/page.html\n"
    assert printed.err == f"skipped: {tmp_path} is not a run of train.py, or has no finished epoch\n"

    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems, requested = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"file://{tmp_path}/page.html")
    assert problems == []
    assert [url for url in requested if not url.startswith("data:")] == [f"file://{tmp_path}/page.html"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    heads = page.locator("table").first.locator("th").all_inner_texts()
    assert {"ms", "MB", "parameters, M", "training, s"} < set(heads)
    for folder in runs:
        row = page.locator("table").first.locator("tr", has=page.get_by_role("cell", name=folder.name, exact=True))
        cells = dict(zip(heads, row.locator("td").all_inner_texts(), strict=True))
        assert cells["top-1 %, last"] == f"{float(rows(folder)[-1]['val_top1']):.2f}"
        assert cells["training, s"] == f"{sum(float(line['seconds']) for line in rows(folder)):.0f}"
        parameters = sum(p.numel() for p in own_models.tiny(10).parameters())
        assert float(cells["parameters, M"]) == pytest.approx(parameters / 1e6, rel=5e-3)
    assert page.locator("h1").inner_text() == " against ".join(folder.name for folder in runs) + " on digits"
    assert re.search(r" points(, which is at most two standard errors)?\.$", page.locator(".conclusion").inner_text())
    assert page.get_by_role("img", name="top-1 by epoch").count() == 1
    assert page.get_by_role("img", name="accuracy against confidence").count() == len(runs)
    pictures = page.locator("img")
    known = [report.read_run(folder) for folder in runs]
    wrong = [int((one.reference.logits.argmax(1) != one.reference.labels).sum()) for one in known]
    shown = sum(min(count, report.MISTAKES) for count in wrong)
    assert shown > 0
    # samples of two students, confusion matrices, mistakes
    assert pictures.count() == 2 * report.SAMPLES + len(runs) + shown
    assert all(pictures.nth(i).evaluate("image => image.naturalWidth") > 0 for i in range(pictures.count()))
    assert "T_t" in page.locator("body").inner_text()
    assert "P_t" in page.locator("body").inner_text()
    page.close()


@pytest.fixture
def known(tmp_path):
    """Return a run of three classes with 40 reference images, 30 of which are mistakes."""
    g = np.random.default_rng(0)
    labels = np.arange(40) % 3
    logits = g.normal(0, 1, (40, 3)).astype(np.float32)
    logits[np.arange(40), np.where(np.arange(40) < 30, (labels + 1) % 3, labels)] += 5
    images = g.integers(0, 256, (40, 200, 300, 3), dtype=np.uint8)
    reference = Reference(images, labels, logits, images[:1], np.array("0"))
    return report.Run("a <run>", tmp_path, {"model": "tiny"}, [1], [25.0], ["cat", "<b>dog", "eel"], 2.0, reference, "")


def test_mistakes_are_small_jpegs_in_the_order_of_their_confidence(known):
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


def test_a_run_may_have_mistakes_of_grey_images_or_no_mistakes(known):
    grey = known.reference._replace(images=known.reference.images[..., :1])
    assert "data:image/jpeg" in report.mistakes(known._replace(reference=grey))
    right = known.reference._replace(labels=known.reference.logits.argmax(1))
    page = report.mistakes(known._replace(reference=right))
    assert "0 of the 40 validation images" in page
    assert "<figure>" not in page
    assert "no file" in report.mistakes(known._replace(reference=None, missing="no file"))


def test_the_reliability_diagram_has_the_error_with_and_without_the_temperature(known):
    before, after = (f"{100 * report.calibration_of(known, t).error:.1f} %" for t in (None, 2.0))
    assert before != after
    page = "".join(report.reliability([known, known._replace(temperature=None, name="bare")]))
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert captions[0] == f"a &lt;run&gt;: error as trained (grey) {before}, with the temperature 2 (blue) {after}"
    assert captions[1] == f"bare: error as trained (grey) {before}; no temperature was fitted"
    assert page.count("<svg") == 2
    assert report.reliability([known._replace(reference=None)]) == []


def with_answers(known, name, right, **changes):
    """Return a run whose student is right only on the images where `right` is True."""
    labels = np.arange(len(right)) % 3
    answers = np.stack([labels, np.where(right, labels, (labels + 1) % 3)])
    flags = known.flags | {"data": "/data/birds"}
    return known._replace(
        **{"name": name, "answers": answers, "flags": flags, "top1": [100 * np.mean(right)]} | changes
    )


@pytest.mark.parametrize(("only_first", "only_second", "told_apart"), [(30, 8, True), (20, 15, False), (0, 0, False)])
def test_the_conclusion_has_the_difference_and_its_paired_standard_error(known, only_first, only_second, told_apart):
    """Compute the error from the numbers of images on which only the first, or only the second, run is right."""
    n = 200
    first, second = np.ones(n, bool), np.ones(n, bool)
    second[:only_first] = first[only_first : only_first + only_second] = False
    runs = [with_answers(known, "B", second), with_answers(known, "A", first)]
    text, about = report.conclusion(runs)
    difference = only_first - only_second
    error = math.sqrt(only_first + only_second - difference**2 / n) / n
    assert f"{100 * difference / n:.1f} ± {100 * error:.1f} points" in text
    assert text.startswith("A is ahead of B by ") == told_apart
    assert ("not differ significantly" in text) != told_apart
    assert "the same 200 validation images" in about
    assert f"<td class=n>{100 * difference / n:.1f} ± {100 * error:.1f}</td>" in report.table(runs)


def test_runs_with_other_images_or_without_answers_are_not_compared(known):
    right = np.arange(60) < 40
    first = with_answers(known, "A", right)
    others = {
        "data": with_answers(known, "B", right, flags=known.flags | {"data": "/data/cats"}),
        "count": with_answers(known, "B", right[:50]),
        "split": with_answers(known, "B", right, split="file,side\na/1.jpg,val\n"),
        "classes": with_answers(known, "B", right, labels=["x", "y", "z"]),
    }
    for other in others.values():
        assert report.conclusion([first, other])[0] == "No paired comparison: A, B: other validation images"
        assert "±" not in report.page([first, other])
    unknown = first._replace(name="C", answers=None)
    text = report.conclusion([first, unknown])[0]
    assert text == "No paired comparison: last.pt of C has no answers"
    text, about = report.conclusion([first, with_answers(known, "D", ~right), others["data"], unknown])
    assert text.startswith("A is ahead of D by 33.3 ± ")
    assert about.endswith("Not compared: last.pt of C has no answers; B: other validation images.")


def test_one_run_is_shown_alone(known):
    alone = with_answers(known, "A", np.arange(60) < 40)
    text = report.conclusion([alone])[0]
    assert text.startswith("A (cross-entropy) reaches a top-1 of 66.7 ± 6.1 % on 60 validation images")
    page = report.page([alone])
    assert "<title>A on birds</title>" in page
    assert "top-1 by epoch" not in page  # because the run has one epoch
    assert "behind" not in page
    assert "top-1 by epoch" in report.page([alone._replace(epochs=[1, 2], top1=[50.0, 66.7])])


def write_times(folder, times, cpu="a CPU"):
    same = {"precision": "fp32", "provider": "CPU", "threads": 1, "batch": 1, "top1": 50}
    rows = [{"artefact": file, "p50_ms": ms, **same} for file, ms in times.items()]
    (folder / "student").mkdir(parents=True)
    (folder / "student/benchmark.json").write_text(json.dumps({"machine": {"cpu": cpu, "gpu": "none"}, "rows": rows}))


def test_the_conclusion_compares_the_times_of_the_same_file_on_the_same_machine(known, tmp_path):
    write_times(tmp_path / "a", {"student.onnx": 6.2, "student.pt2": 9.0})
    write_times(tmp_path / "b", {"student.onnx": 2.0, "other.onnx": 0.1})
    write_times(tmp_path / "c", {"student.onnx": 2.0}, cpu="another CPU")
    a, b, c = (with_answers(known, x, np.arange(60) < 40, folder=tmp_path / x) for x in "abc")
    assert report.speed(a, b) == report.speed(b, a) == "; b is 3.1 times as fast as a (student.onnx)"
    assert report.speed(a, c) == ""
    assert report.speed(a, a._replace(name="d")) == "; both are equally fast"
    assert "<td class=n>6.2</td>" in report.table([a, b])
    assert "student.onnx, fp32, CPU, 1 thread, a CPU" in report.table([a, b])
    assert "6.2" not in report.table([a, c])


@pytest.mark.slow
def test_the_report_reads_the_answers_in_last_pt(runs, tmp_path):
    known = report.read_run(runs[0])
    assert 100 * known.right.mean() == pytest.approx(max(known.top1), abs=1e-3)
    assert report.read_answers(tmp_path) is None
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    assert report.read_answers(tmp_path) is None
    torch.save({"progress": {"answers": None}}, tmp_path / "last.pt")
    assert report.read_answers(tmp_path) is None


@pytest.mark.whole_runs
@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_curves_have_titles_ticks_at_whole_epochs_and_the_chance_level(tmp_path, monkeypatch, epochs):
    figures = []
    monkeypatch.setattr(outputs, "save", lambda _, figure: figures.append(figure))
    rows = [
        {"epoch": i + 1, "train_loss": 1.0, "val_loss": 2.0, "val_top1": 40.0, "val_top5": 80.0} for i in range(epochs)
    ]
    outputs.plot_curves(tmp_path / "curves.png", rows, 8)
    figures[0].draw_without_rendering()
    for axis in figures[0].axes:
        low, high = axis.get_xlim()
        ticks = [x for x in axis.get_xticks() if low <= x <= high]
        assert ticks
        assert all(x == round(x) for x in ticks)
        assert axis.get_title()
    assert [12.5, 12.5] in [list(line.get_ydata()) for line in figures[0].axes[1].lines]


@pytest.mark.whole_runs
def test_the_confusion_matrix_has_a_title_with_the_chance_level(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(per_class, "save", lambda _, figure: figures.append(figure))
    per_class.confusion_picture(tmp_path / "confusion.png", np.array([[3, 1], [0, 4]]), ["cat", "dog"])
    assert figures[0].axes[0].get_title() == "8 validation images\n87.5 % right (chance: 50 %)"


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_labels_on_the_page_equal_those_of_the_losses(runs, temperature):
    """Compare the gradient of the loss with a gradient that is computed from the labels on the page."""
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
    assert f"<td>{teacher}</td>" in text  # the whole path, because two runs have the same name
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

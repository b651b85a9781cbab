"""Test the temperature and the threshold: their fit, the cases without a fit, and the files that store them."""

import json

import numpy as np
import pytest
from commands import deploy
from scipy.optimize import minimize_scalar
from students import load, write_student

from deploy import export
from deploy.confidence import Calibration, calibration, fit_confidence, fit_file, fit_temperature
from deploy.config import Metadata, read_config
from deploy.reference import read_reference
from deploy.runtimes import is_answered, probabilities, softmax
from deploy.tensorrt import read_engine_metadata

BARE = Metadata(["a", "b"], [3, 8, 8], [0, 0, 0], [1, 1, 1], "bilinear", 1.0)


def drawn(temperature, count=2000, classes=5, seed=0):
    """Return random logits, and labels drawn from their softmax at a temperature."""
    g = np.random.default_rng(seed)
    logits = g.normal(0, 3, (count, classes)).astype(np.float32)
    labels = (softmax(logits / temperature).cumsum(1) < g.random((count, 1))).sum(1)
    return logits, labels


def cross_entropy(temperature, logits, labels):
    return -np.log(softmax(logits / temperature)[np.arange(len(labels)), labels]).mean()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_fit_finds_the_true_temperature_and_the_smallest_loss(temperature, classes):
    logits, labels = drawn(temperature, 4000, classes)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.1)
    best = minimize_scalar(cross_entropy, bounds=(0.05, 20), args=(logits, labels), method="bounded").x
    assert fitted == pytest.approx(best, rel=1e-3)


def test_a_constant_added_to_the_logits_of_an_image_changes_nothing():
    logits, labels = drawn(2)
    shifted = logits + np.linspace(-50, 50, len(labels), dtype=np.float32)[:, None]
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-3)


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    confidence, right = np.array([0.91, 0.93, 0.55, 0.55]), np.array([1, 0, 1, 1])
    found = calibration(confidence, right, bins=10)
    assert isinstance(found, Calibration)
    assert found.error == pytest.approx(0.5 * abs(0.92 - 0.5) + 0.5 * abs(0.55 - 1))
    assert calibration(np.array([1.0]), np.array([True])).error == 0


def test_an_overconfident_student_gets_a_temperature_that_lowers_the_calibration_error():
    logits, labels = drawn(3)
    found = fit_confidence(logits, labels, BARE)
    assert found.temperature == pytest.approx(3, rel=0.15)
    p = softmax(logits / found.temperature)
    right = logits.argmax(1) == labels
    assert calibration(p.max(1), right).error < calibration(softmax(logits).max(1), right).error / 2
    assert "on 1000 validation images that the fit did not use" in found.description


def test_a_temperature_that_does_not_help_on_images_outside_the_fit_is_not_kept():
    """Give every second image of each class the logits of an overconfident student."""
    logits, labels = drawn(1, 2000, 2)
    order = np.argsort(labels, kind="stable")
    worse, worse_labels = drawn(4, 2000, 2, seed=1)
    for label in (0, 1):
        places = order[::2][labels[order[::2]] == label]
        donors = np.flatnonzero(worse_labels == label)
        logits[places] = worse[np.resize(donors, len(places))]
    found = fit_confidence(logits, labels, BARE)
    assert found.temperature is None
    assert "is rejected, 1 stays: calibration error" in found.description
    assert found.threshold > 0.5


def test_95_percent_of_the_images_reach_the_threshold():
    for count in (40, 99, 1000):
        logits, labels = drawn(1.5, count)
        found = fit_confidence(logits, labels, BARE)
        metadata = Metadata(*list(vars(BARE).values())[:6], temperature=found.temperature, threshold=found.threshold)
        answered = is_answered(probabilities(logits, metadata).max(1), metadata)
        assert 0.95 <= answered.mean() <= 0.95 + 2 / count


@pytest.mark.parametrize(("change", "words"), [
    (lambda logits, labels: (logits[:39], labels[:39]), "39 validation images are fewer than 40"),
    (lambda logits, labels: (logits[:0], labels[:0]), "0 validation images are fewer than 40"),
    (lambda logits, labels: (np.where(labels[:, None] == 1, np.nan, logits), labels), "images are not finite"),
    (lambda logits, labels: (np.where(labels[:, None] == 1, np.inf, logits), labels), "images are not finite"),
])  # fmt: skip
def test_a_fit_needs_40_images_and_finite_logits(change, words):
    found = fit_confidence(*change(*drawn(2)), BARE)
    assert found[:2] == (None, None)
    assert words in found.description
    assert "\n" not in found.description


@pytest.mark.parametrize("scale", [1, 1e3])
def test_a_student_without_wrong_answers_gets_a_threshold_and_no_temperature(scale):
    logits, _ = drawn(1, 100)
    found = fit_confidence(logits * scale, logits.argmax(1), BARE)
    assert found.temperature is None
    assert 0 < found.threshold <= 0.9999
    assert "if every answer is right, it is 0" in found.description


@pytest.mark.parametrize("logits", [np.zeros((100, 3)), np.random.default_rng(0).normal(0, 1, (100, 3))])
def test_a_student_that_guesses_gets_no_temperature_beyond_the_bounds(logits):
    found = fit_confidence(logits.astype(np.float32), np.arange(100) % 3, BARE)
    assert found.temperature is None or 0.05 <= found.temperature <= 20


# ---- files that store them -----------------------------------------------------------------------------------------


def set_confidence(student, **numbers):
    file = student / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | numbers))


def test_every_exported_file_stores_temperature_and_threshold(run):
    set_confidence(run / "student", temperature=2.5, threshold=0.4)
    deploy(export, run)
    for end in (".onnx", ".ts", ".pt2"):
        metadata = load(run / f"student/student{end}", device="cpu").metadata
        assert (metadata.temperature, metadata.threshold) == (2.5, 0.4)
    engine = run / "student/student.engine"
    built = {"library": "tensorrt", "version": "1", "gpu": None, "max_batch": 8}
    onnx = load(run / "student/student.onnx", device="cpu").metadata.to_json()
    engine.with_name("student.engine.json").write_text(json.dumps(onnx | {"onnx": "student.onnx", "built": built}))
    assert read_engine_metadata(engine).temperature == 2.5


def test_a_quantised_file_gets_its_own_temperature_and_threshold_and_keeps_its_logits(run):
    file = run / "student/student-int8-cpu.onnx"
    reference = read_reference(run / "student", None, "")
    labels = np.where(np.arange(80) % 5, reference.labels, (reference.labels + 1) % 10)  # a fifth of them are wrong
    before = load(file, device="cpu")
    expected = before.run(reference.images)
    line = fit_file(file, reference.images, labels)
    after = load(file, device="cpu")
    assert (after.run(reference.images) == expected).all()
    found = fit_confidence(expected, labels, before.metadata)
    assert found.threshold
    assert line == found.description
    assert (after.metadata.temperature, after.metadata.threshold) == found[:2]
    assert after.metadata.precision == "int8-cpu"


def test_a_file_without_a_fit_keeps_the_temperature_and_threshold_of_the_student(run):
    file = run / "student/student.onnx"
    set_confidence(run / "student", temperature=2.5, threshold=0.4)
    reference = read_reference(run / "student", None, "")
    deploy(export, run, "--format", "onnx")
    line = fit_file(file, reference.images[:30], reference.labels[:30])
    assert "30 validation images are fewer than 40" in line
    metadata = load(file, device="cpu").metadata
    assert (metadata.temperature, metadata.threshold) == (2.5, 0.4)


def test_further_training_starts_without_temperature_and_threshold(tmp_path):
    from kdlite.training.weights import start_from_folder

    student = write_student(tmp_path / "student", "mobilenet_v3_small", 32, ["a", "b", "c"])
    set_confidence(student, temperature=2.5, threshold=0.4)
    assert read_config(student).temperature == 2.5
    _, config = start_from_folder(str(student), ["a", "b", "c"], [3, 32, 32], [])
    assert (config.temperature, config.threshold) == (None, None)

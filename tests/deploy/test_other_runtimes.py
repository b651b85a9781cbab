"""Test that OpenVINO and ncnn give the student's logits, and that deploy.check has rows for them."""

import importlib.util
import json
import shutil
import subprocess

import numpy as np
import pytest
from commands import deploy
from students import load

from deploy import check, export
from deploy.reference import read_reference

HAS_NCNN = importlib.util.find_spec("ncnn") is not None


@pytest.fixture
def needs_openvino():
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")


def rows_of(run):
    return {row["artefact"]: row for row in json.loads((run / "student/check.json").read_text())}


def test_check_has_a_row_for_each_onnx_file_in_openvino(run, needs_openvino):
    deploy(check, run, "--device", "cpu")
    rows = {name: row for name, row in rows_of(run).items() if "OpenVINO" in name}
    assert rows.keys() == {f"{file.name} in OpenVINO" for file in (run / "student").glob("*.onnx")}
    for row in rows.values():
        assert row["verdict"] == "pass"
        assert row["provider"] == "OpenVINO CPU"
        assert row["batches"] == "1 2 5 64"
    assert rows["student.onnx in OpenVINO"]["max_abs_error"] > 0  # 0 would show that OpenVINO did not run


def test_openvino_computes_in_float32(deployed, needs_openvino):
    """Check the error: on some CPUs OpenVINO's default is bfloat16, with an error a hundred times as large."""
    file, images = deployed / "student/student.onnx", read_reference(deployed / "student", None, "").images
    expected = load(file, device="cpu").run(images)
    error = np.abs(load(file, device="openvino").run(images) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def test_a_damaged_file_has_a_row_for_openvino(run, needs_openvino):
    (run / "student/student.onnx").write_bytes((run / "student/student.onnx").read_bytes()[:1000])
    deploy(check, run, "student.onnx", "--device", "cpu", check=1)
    rows = rows_of(run)
    assert "not a valid ONNX file" in rows["student.onnx in OpenVINO"]["verdict"]


@pytest.fixture
def converted(run):
    """Return the run with the files that pnnx writes."""
    if not HAS_NCNN or shutil.which("pnnx") is None:
        pytest.skip("ncnn or pnnx is not installed: pip install ncnn pnnx")
    deploy(export, run, "--format", "onnx", "--input", "float")
    command = ["pnnx", "student-nchw.onnx", "inputshape=[1,3,32,32]f32"]
    subprocess.run(command, cwd=run / "student", check=True, capture_output=True)
    return run


def test_check_has_one_row_for_the_files_of_pnnx(converted):
    deploy(check, converted, "--device", "cpu")
    rows = rows_of(converted)
    row = rows["student_nchw.ncnn.param"]
    assert (row["verdict"], row["provider"], row["batches"]) == ("pass", "ncnn CPU", "1")
    assert not [name for name in rows if ".pnnx" in name]


def test_ncnn_needs_its_weights_and_the_onnx_file(converted, capfd):
    student = converted / "student"
    (student / "student-nchw.onnx").rename(student / "other.onnx")
    deploy(check, converted, "student_nchw.ncnn.param", "--device", "cpu", check=1)
    assert "needs the ONNX file that pnnx read" in rows_of(converted)["student_nchw.ncnn.param"]["verdict"]
    (student / "other.onnx").rename(student / "student-nchw.onnx")
    (student / "student_nchw.ncnn.bin").unlink()
    deploy(check, converted, "student_nchw.ncnn.param", "--device", "cpu", check=1)
    assert "needs student_nchw.ncnn.bin in the same folder" in rows_of(converted)["student_nchw.ncnn.param"]["verdict"]


@pytest.mark.skipif(HAS_NCNN, reason="ncnn is installed")
def test_files_of_ncnn_are_skipped_if_ncnn_is_not_installed(run, capsys):
    for name in ("student_nchw.ncnn.param", "student_nchw.pnnx.param", "student_nchw.pnnx.onnx"):
        (run / "student" / name).write_bytes(b"7767517\n")
    deploy(check, run, "--device", "cpu")
    assert "skipped because ncnn is not installed: student_nchw.ncnn.param\n" in capsys.readouterr().out
    assert not [name for name in rows_of(run) if "nchw" in name]
    deploy(check, run, "student_nchw.ncnn.param", check=1)
    assert "pip install ncnn" in rows_of(run)["student_nchw.ncnn.param"]["verdict"]

"""Test deploy.candidates: its archive measures networks on a device without torch and prints the best one."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from commands import deploy, refused
from environments import installed, make_environment

from deploy import candidates
from deploy.candidates import row_of, verdict
from deploy.student import find_architecture, published_top1

TINY = ["squeezenet1_1", "lcnet_035"]  # one of torchvision, one of timm


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("env"), installed("onnxruntime(-gpu)?"), "numpy", "pillow")


@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "candidates.pyz"
    deploy(candidates, "--models", *TINY, TINY[0], "--img-size", "32", "40", "--classes", "7", "-o", file)
    return file


def on(python, *command, status=0):
    result = subprocess.run([python, *map(str, command)], capture_output=True, text=True, cwd="/", env={})
    assert result.returncode == status, result.stderr
    return result


@pytest.mark.slow
def test_the_device_prints_each_network_and_the_best_that_fits(device, pyz):
    flags = ["--seconds", "0.1", "--threads", "1"]
    rows = json.loads(on(device, pyz, "--json", "--budget-ms", "10000", *flags).stdout)
    assert [(row["network"], row["top1"], row["top1_px"]) for row in rows] == [
        ("squeezenet1_1", 58.178, 224),
        ("lcnet_035", None, None),
    ]
    for row in rows:
        assert row["fits"] == "fp32 int8"
        for precision in ("fp32", "int8"):
            assert 0 < row[f"{precision}_ms"] < 10_000
            assert 20 < row[f"{precision}_memory_mb"] < 2000  # including Python and onnxruntime
        assert row["int8_file_mb"] < 0.6 * row["fp32_file_mb"]
    out = on(device, pyz, "--budget-ms", "10000", *flags).stdout
    assert "32x40 px, batch 1, 1 threads" in out
    assert "best within 10000 ms: squeezenet1_1" in out
    assert "this table has no top-1 for them: lcnet_035" in out


@pytest.mark.trial
def test_the_archive_runs_alone_and_prints_one_line_for_a_mistake(device, pyz, tmp_path):
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
    assert len([name for name in names if name.endswith(".onnx")]) == 4  # 2 networks, fp32 and INT8
    assert not {"deploy/student.py", "deploy/export.py", "deploy/quantize.py"} & {*names}
    bare = (sys.executable, "-S")  # without site-packages
    assert "onnxruntime" in on(*bare, pyz, "--requirements").stdout
    err = on(*bare, pyz, "--budget-ms", "5", status=2).stderr
    assert "candidates.pyz --requirements > requirements.txt" in err
    assert err.count("\n") == 1
    for flags, message in ((["--budget-ms", "0"], "must be greater than 0"), (["photo.jpg"], "unrecognized arguments")):
        err = on(device, pyz, *flags, status=2).stderr
        assert message in err
        assert err.count("\n") == 1
    assert "usage: candidates.pyz" in on(device, pyz, "--help").stdout


@pytest.mark.trial
def test_a_network_that_does_not_run_has_a_row_with_the_reason(device, pyz, tmp_path):
    copy = shutil.copy(pyz, tmp_path / "candidates.pyz")
    with zipfile.ZipFile(pyz) as whole, zipfile.ZipFile(copy, "w") as damaged:
        for name in whole.namelist():
            cut = len(whole.read(name)) // 2 if name.endswith("lcnet_035.onnx") else None
            damaged.writestr(name, whole.read(name)[:cut])
    rows = json.loads(on(device, copy, "--json", "--budget-ms", "10000", "--seconds", "0.1", status=1).stdout)
    assert "failed" not in rows[0]
    assert "not a valid ONNX file" in rows[1]["failed"]
    assert rows[1]["fits"] == "int8"


@pytest.mark.parametrize(("flags", "message"), [
    (["--models", "lcnet_035", "resnet19"], "unknown model 'resnet19'"),
    (["--models", "lcnet_035", "--img-size", "32", "32", "32"], "--img-size takes one side, or height and width"),
    (["--models", "vit_b_16", "--img-size", "30"], "cannot build vit_b_16"),
])  # fmt: skip
def test_a_mistake_gives_one_line_and_no_file(capfd, tmp_path, flags, message):
    assert message in refused(capfd, candidates, *flags, "-o", tmp_path / "c.pyz")
    assert not list(tmp_path.iterdir())


def row(network, top1, fp32_ms, int8_ms, budget_ms=20):
    pair = [{"mb": 1.0, "p50_ms": fp32_ms, "peak_mb": 50}, {"mb": 0.3, "p50_ms": int8_ms, "peak_mb": 40}]
    return row_of({"network": network, "top1": top1, "top1_px": 224}, pair, budget_ms)


def test_the_best_network_that_fits_has_the_highest_published_accuracy():
    rows = [
        row("large", 80.0, 50, 30),
        row("middle", 75.0, 30, 20),
        row("small", 70.0, 10, 5),
        row("unpublished", None, 9, 4),
    ]
    assert [one["fits"] for one in rows] == ["no", "int8", "fp32 int8", "fp32 int8"]
    line = verdict(rows, 20)
    assert line.startswith("best within 20 ms: middle, 20.00 ms in int8, published top-1 75.0 %; only its INT8")
    assert line.endswith("not compared, because this table has no top-1 for them: unpublished")
    assert verdict(rows[3:], 20) == "within 20 ms: unpublished; none has a published top-1 in this table"
    rows = [row("large", 80.0, 50, 30, 2), row("small", 70.0, 10, 5, 2)]
    assert verdict(rows, 2) == "no network fits in 2 ms; the fastest is small in int8: 5.00 ms"
    failed = [row | {"fp32_ms": None, "int8_ms": None, "fits": "no"} for row in rows]
    assert verdict(failed, 20) == "no network ran: the column failed has the reasons"


def test_only_networks_of_torchvision_have_a_published_accuracy():
    assert published_top1(find_architecture("resnet18")) == (69.758, 224)
    assert published_top1(find_architecture("efficientnet_b1")) == (79.838, 240)
    assert published_top1(find_architecture("lcnet_035")) is None

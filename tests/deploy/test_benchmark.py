"""Test deploy.benchmark: its rows, its JSON, the warning on a busy machine, and energy."""

import json
import os
import time

import pytest
import torch
from commands import deploy

from deploy import benchmark


def test_each_file_has_a_row_for_each_batch_and_a_failed_file_has_one_row(run, capsys):
    (run / "student/student.engine").write_bytes(b"ftrt" * 100)
    flags = ["--device", "cpu", "--threads", "1", "--seconds", "0.2", "--rounds", "2", "--batches", "1", "4"]
    deploy(benchmark, run, "student.onnx", "student.engine", *flags, "--count", "40", check=1)
    result = json.loads((run / "student/benchmark.json").read_text())
    rows = result["rows"]
    assert [(row["artefact"], row.get("batch")) for row in rows] == [
        ("student/", 1), ("student/", 4), ("student.onnx", 1), ("student.onnx", 4), ("student.engine", None),
    ]  # fmt: skip
    assert "has no student.engine.json" in rows[-1]["failed"]
    for row in rows[:-1]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        eager = next(r for r in rows if r["runtime"] == "torch" and r["batch"] == row["batch"])
        assert row["times_eager"] == pytest.approx(eager["p50_ms"] / row["p50_ms"])
        assert row["provider"] == ("CPUExecutionProvider" if row["artefact"] == "student.onnx" else "torch cpu")
        assert row["top1"] == 100
    assert result["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (run / "student/benchmark.png").stat().st_size > 5000
    assert "times_eager" in capsys.readouterr().out


def test_the_json_output_equals_the_file(run, capsys):
    """Remove the weights, so that the table has no row for torch."""
    (run / "student/model.safetensors").unlink()
    flags = ["--seconds", "0.1", "--rounds", "1", "--batches", "1", "--count", "8", "--device", "cpu", "--json"]
    deploy(benchmark, run, "student.onnx", *flags)
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / "student/benchmark.json").read_text())
    assert [row["artefact"] for row in result["rows"]] == ["student.onnx"]


@pytest.mark.parametrize(("share", "load", "warns"), [(0.99, 0.1, False), (0.13, 0.1, True), (1.9, 90.0, True)])
def test_a_busy_machine_gives_a_warning(share, load, warns, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows = [{"provider": "CPUExecutionProvider", "cpu/wall": share}, {"provider": "tensorrt", "cpu/wall": 0.1}, {}]
    assert bool(benchmark.busy_warning(rows, load)) == warns


def test_the_board_power_of_a_jetson_is_read_from_tegrastats():
    # two lines in the format that NVIDIA documents for Orin
    nano = "RAM 2448/7620MB CPU [3%@729] GPU@45C VDD_IN 4543mW/4600mW VDD_CPU_GPU_CV 735mW/740mW VDD_SOC 1346mW/1350mW"
    agx = "RAM 6356/30536MB VDD_GPU_SOC 2402mW/2402mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 3320mW/3320mW"
    assert benchmark.board_watts(nano) == pytest.approx(4.543)
    assert benchmark.board_watts(agx) == pytest.approx(6.122)
    assert benchmark.board_watts("RAM 1/2MB") is None


def test_tegrastats_ends_with_the_measurement(tmp_path, monkeypatch):
    """Check that stop() ends the process, and so does close(), which runs after a failure."""
    (tmp_path / "tegrastats").write_text("#!/bin/sh\nwhile true; do echo VDD_IN 4543mW/4600mW; sleep 0.01; done\n")
    (tmp_path / "tegrastats").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    meter = benchmark.EnergyMeter()
    meter.gpu = None  # ignore this machine's GPU
    meter.start()
    running = meter.process
    time.sleep(0.2)
    assert meter.stop() > 0
    assert running.returncode is not None
    meter.start()
    running = meter.process
    meter.close()
    assert running.returncode is not None

"""Test examples/gpu.py: its checks on the CPU, and the rows of failed and skipped checks."""

import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import torch

from deploy.cli import UserError
from examples import gpu

ROOT = Path(__file__).resolve().parents[2]
CPU = gpu.SIZES["cpu"]


def place(folder, device="cpu", seconds=60.0):
    return gpu.Place(device, folder, time.monotonic() + seconds)


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, flags)])
    return gpu.run_command("gpu.py", gpu.main)


def table_of(text):
    return [tuple(line.strip("| ").split(" | ")) for line in text.splitlines() if line.startswith("| ")][1:]


@pytest.mark.trial
def test_without_a_gpu_every_check_runs_on_the_cpu_or_is_skipped(tmp_path):
    command = [sys.executable, ROOT / "examples/gpu.py", "--device", "cpu", "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "out/table.md").read_text()
    assert text in done.stdout
    assert text.startswith(f"{date.today()}: ")
    assert f"torch {torch.__version__}" in text
    rows = table_of(text)
    results = [result for _, result, _ in rows]
    passed, skipped = results.count("passed"), results.count("skipped")
    assert f"\n{passed} passed, 0 failed, {skipped} skipped\n" in text
    for label, result, figures in rows:
        if result == "skipped":
            assert figures == "needs a CUDA GPU"
        else:
            assert re.search(r"\d", figures), label
    names = " ".join(label for label, result, _ in rows if result == "passed")
    for part in ("nkd_loss", "uskd_loss", "--amp bf16", "gloo", "export fp16", "cpu, int8", "benchmark", "step"):
        assert part in names
    names = " ".join(label for label, result, _ in rows if result == "skipped")
    for part in ("copy", "compiled", "fp16", "--cache", "--compile", "cuda, fp32", "tensorrt", "engine", "energy"):
        assert part in names


def test_the_row_of_a_failed_check_has_its_reason_and_the_next_check_runs(monkeypatch, tmp_path, capsys):
    def breaks():
        yield gpu.Row("first", "passed", "1 ms")
        raise RuntimeError("a kernel | is missing")

    checks = [gpu.Check("second", breaks), gpu.Check("third", lambda: [gpu.Row("third", "passed", "2 ms")])]
    monkeypatch.setattr(gpu, "list_checks", lambda place: checks)
    assert main(monkeypatch, "--device", "cpu", "--output", tmp_path / "out") == 1
    assert "failed   second: a kernel | is missing" in capsys.readouterr().out
    text = (tmp_path / "out/table.md").read_text()
    assert "\n2 passed, 1 failed, 0 skipped\n" in text
    assert "| second | failed | a kernel \\| is missing |\n| third | passed | 2 ms |" in text


def test_a_check_is_skipped_without_a_gpu_or_without_time(tmp_path):
    def run():
        raise AssertionError("the check ran")

    (row,) = gpu.run_check(gpu.Check("an engine", run, needs_gpu=True), place(tmp_path))
    assert row == ("an engine", "skipped", "needs a CUDA GPU")
    (row,) = gpu.run_check(gpu.Check("late", run), place(tmp_path, "cuda", seconds=-1))
    assert (row.result, row.figures) == ("skipped", "no time was left: give more --minutes")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_ended_with_its_processes(tmp_path):
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    with pytest.raises(UserError, match="the time was over"):
        place(tmp_path, seconds=1).run("waits", "-c", code)
    child = int((tmp_path / "waits.log").read_text().splitlines()[1])
    ends = time.monotonic() + 5
    while is_running(child) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not is_running(child)


def test_the_error_of_a_failed_command_contains_its_last_line(tmp_path):
    with pytest.raises(UserError, match=r"no such operator \(exit status 1, see build.log\)"):
        place(tmp_path).output_of("build", "-c", "import sys; print('loading'); sys.exit('no such operator')")
    assert "loading\nno such operator" in (tmp_path / "build.log").read_text()


@pytest.mark.parametrize("waits", [True, False])
def test_a_loss_that_waits_for_the_gpu_fails(monkeypatch, waits):
    inputs = gpu.make_inputs(8, 50, torch.float32, "cpu")  # on the CPU; the pretended GPU copies 1 GB/s
    monkeypatch.setattr(gpu, "make_inputs", lambda *_: inputs)
    monkeypatch.setattr(gpu, "median_seconds", lambda losses, *_: dict.fromkeys(losses, 1e-5))
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(gpu, "waits_for_the_device", lambda *_: waits)
    nkd, uskd = gpu.losses((8, 50), torch.float32, "cuda", 0.0, compiled=False)
    assert {nkd.result, uskd.result} == {"failed" if waits else "passed"}
    assert ("the host waits for the GPU" if waits else "the host does not wait for the GPU") in nkd.figures
    # 5 x 8 x 50 values of 4 bytes in 10 microseconds are 0.8 GB/s
    assert "80 % of a copy's bandwidth" in nkd.figures
    assert "bandwidth" not in uskd.figures


class Fake(gpu.Place):
    """Run no command: the field `device` holds the text that each command would print."""

    def run(self, log, *argv):
        return subprocess.CompletedProcess(argv, 1, self.device, "deploy: error: no library\n")


CHECKED = '[{"artefact": "student"}, {"verdict": "%s", "provider": "CUDAExecutionProvider", "precision": "fp16", '
CHECKED += '"agreement": 99.5, "images": 256, "max_abs_error": 0.01}]'


def test_a_row_has_the_verdict_of_deploy_check(tmp_path):
    (row,) = gpu.checked("fp16", Fake(CHECKED % "pass", tmp_path, 0), tmp_path, "student.onnx")
    figures = "CUDAExecutionProvider, fp16: agrees on 99.50 % of 256 images, largest error 1.0e-02"
    assert row == ("fp16", "passed", figures)
    for printed, reason in ((CHECKED % "FAIL: logits", "FAIL: logits"), ("", "deploy: error: no library")):
        with pytest.raises(UserError, match=reason):
            list(gpu.checked("fp16", Fake(printed, tmp_path, 0), tmp_path, "student.onnx"))


def test_energy_and_failed_runtimes_have_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SIZES", dict.fromkeys((TIMED, TIMED.replace("2.5", "null")), CPU))
    rows = list(gpu.timed("benchmark", Fake(TIMED, tmp_path, 0), tmp_path))
    assert [row.result for row in rows] == ["passed", "failed", "passed"]
    assert rows[0].figures == "CUDAExecutionProvider: 0.50 ms (p50), 2000 images/s, 3.00x torch eager"
    assert rows[1].figures == "no TensorRT"
    assert rows[2] == ("energy, student.onnx, onnxruntime, batch 1", "passed", "2.5 mJ an image")
    without = list(gpu.timed("benchmark", Fake(TIMED.replace("2.5", "null"), tmp_path, 0), tmp_path))
    assert without[-1][:2] == ("energy", "skipped")


TIMED = '{"rows": [{"artefact": "student.onnx", "runtime": "onnxruntime", "provider": "CUDAExecutionProvider", '
TIMED += '"batch": 1, "p50_ms": 0.5, "images_per_s": 2000.0, "times_eager": 3.0, "mj_per_image": 2.5}, '
TIMED += '{"artefact": "student.engine", "failed": "no TensorRT"}]}'


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused_with_one_line(monkeypatch, tmp_path, capsys):
    assert main(monkeypatch, "--device", "cuda", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err == "gpu.py: error: --device cuda, but torch finds no CUDA GPU\n"


def test_an_unknown_check_is_refused_and_so_is_a_folder_with_files(monkeypatch, tmp_path, capsys):
    assert main(monkeypatch, "--device", "cpu", "--output", tmp_path / "out", "--only", "tpu") == 2
    assert capsys.readouterr().err == "gpu.py: error: --only: no check has tpu in its name\n"
    (tmp_path / "mine").touch()
    assert main(monkeypatch, "--device", "cpu", "--output", tmp_path) == 2
    assert "is not empty: give another folder" in capsys.readouterr().err
    assert list(tmp_path.glob("*.md")) == []


def test_the_list_of_checks_on_a_gpu_has_the_expected_cases(tmp_path):
    names = [check.name for check in gpu.list_checks(place(tmp_path, "cuda"))]
    assert len(names) == len(set(names))
    joined = "\n".join(names)
    for part in (
        "compiled, 1,024 x 1,000, bfloat16", "--amp fp16", "--amp bf16", "--compile", "--cache device", "nccl",
        "ONNX Runtime, cuda, int8", "ONNX Runtime, tensorrt, fp16", "TensorRT engine, int8", "benchmark",
        "step, deit_tiny_patch16_224",
    ):  # fmt: skip
        assert part in joined

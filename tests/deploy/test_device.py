"""A device without torch: an environment of numpy, Pillow, a runtime and the server's packages, nothing else."""

import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from environments import installed, make_environment
from PIL import Image
from sklearn.datasets import load_sample_images
from students import load, model_files, write_student

from deploy.export import export_student
from deploy.preprocess import open_image, prepare
from deploy.quantize import quantize_student
from deploy.reference import NAME, Reference, write_reference
from deploy.runtimes import source_of, top_labels

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
SERVER = ("starlette", "uvicorn", "prometheus-client", "python-multipart")
FOREIGN = ("torch", "torchvision", "timm", "scipy", "sklearn", "matplotlib", "safetensors", "onnx", "kdlite", "train")


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The Python of such an environment, which sees deploy/ as a folder that was copied there."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    runtime = installed("onnxruntime(-gpu)?")
    return make_environment(folder / "env", runtime, "numpy", "pillow", *SERVER)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with ONNX files and a reference, made where there is torch."""
    run = tmp_path_factory.mktemp("made") / "run"
    student = write_student(run / "student", f"{MODELS}:tiny", 16, ["cat", "dog", "café", "d", "e", "f"])
    images = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
    logits = load(student, device="cpu").run(images)
    digest = np.array(source_of(student)["weights_sha256"])
    write_reference(run / NAME, Reference(images[:40], logits[:40].argmax(1), logits[:40], images[40:], digest))
    export_student(student, model_file=model_files(student)[0])
    quantize_student(student / "student.onnx", images, "cpu")
    Image.fromarray(load_sample_images().images[0]).save(run / "photo.jpg")
    return run


def on(device, *command, cwd=None, status=0, output="stdout"):
    """What a command on the device prints."""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    cwd = cwd or device.parents[2]
    result = subprocess.run([device, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    return getattr(result, output)


def modules_after(device, program):
    return set(on(device, "-c", f"{program}\nimport sys\nprint(*sys.modules)").split())


@pytest.mark.slow
@pytest.mark.parametrize("python", ["the device's", "this one"])
def test_the_light_modules_load_nothing_foreign(device, python):
    """Here, where torch could be imported, as well as there."""
    light = "serve, check, benchmark, build, triton, predict, pack, quantize, tensorrt"
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from deploy import {light}"
    loaded = modules_after(device if python == "the device's" else Path(sys.executable), program)
    assert not loaded & set(FOREIGN)
    assert not any(name.startswith("deploy.") and name.split(".")[1] in ("student", "export") for name in loaded)


def test_few_modules_import_torch_and_none_train():
    sources = {path.name: path.read_text() for path in (ROOT / "deploy").glob("*.py")}
    importers = {name for name, text in sources.items() if re.search(r"^ *(import|from) torch\b", text, re.M)}
    assert importers == {"student.py", "torch_runtimes.py", "export.py"}
    assert not [name for name, text in sources.items() if re.search(r"^ *(?:import|from) train\b", text, re.M)]


def test_check_and_benchmark_give_their_tables(device, made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    out = on(device, "-m", "deploy.check", run, "--device", "cpu")
    assert "left out, since torch is not installed: student.pt2, student.ts" in out
    rows = {row["artefact"]: row for row in json.loads((run / "student/check.json").read_text())}
    assert rows.keys() == {"student/", "student.onnx", "student-int8-cpu.onnx"}
    assert rows["student/"]["top1"] == 100
    assert rows["student.onnx"]["verdict"] == "pass"
    assert rows["student.onnx"]["images"] == 40
    assert "no confusion.png: matplotlib is not installed" in out
    classes = list(csv.DictReader((run / "student/per_class.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["label"] for row in classes] == ["cat", "dog", "café", "d", "e", "f"]
    assert sum(int(row["n"]) for row in classes) == 40
    flags = ["--seconds", "0.1", "--rounds", "1", "--batches", "1", "3", "--device", "cpu"]
    assert "no row of torch eager" in on(device, "-m", "deploy.benchmark", run, *flags)
    rows = json.loads((run / "student/benchmark.json").read_text())["rows"]
    assert [(row["artefact"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("student-int8-cpu.onnx", "student.onnx") for batch in (1, 3)
    ]
    assert all(row["p50_ms"] > 0 for row in rows)
    assert rows[-1]["top1"] == 100


def test_what_needs_torch_says_so_in_one_line(device, made):
    for command, said in (
        (["-m", "deploy.export", made], "No module named 'torch'"),
        (["-m", "deploy.predict", made, made / "photo.jpg"], "needs torch, torchvision and timm"),
        (["-m", "deploy.quantize", made, "--target", "cpu"], "No module named 'onnx': pip install onnx"),
        (["-m", "deploy.build", made / "student/student.onnx"], "On a Jetson, JetPack has tensorrt"),
    ):
        err = on(device, *command, status=2, output="stderr")
        assert said in err
        assert err.count("\n") == 1, err


def test_triton_repository(device, made, tmp_path):
    on(device, "-m", "deploy.triton", made / "student/student.onnx", "--output", tmp_path / "models")
    assert "[16, 16, 3]" in (tmp_path / "models/student/config.pbtxt").read_text()


@contextlib.contextmanager
def server(*command):
    process = subprocess.Popen(
        [*map(str, command), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(command[0].parents[2])},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert "http://" in line, process.stderr.read()
        yield line.split()[-1]
    finally:
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err


def answer_of_server(address, photo):
    with urllib.request.urlopen(f"{address}/predict", photo.read_bytes(), timeout=30) as response:
        return [(p["label"], round(100 * p["probability"], 1)) for p in json.load(response)["predictions"]]


def answer_of_command(text):
    return [(label, float(percent)) for label, percent in re.findall(r"(\w+) ([\d.]+)%", text)]


@pytest.fixture(scope="module")
def expected(made):
    """The five best labels, computed here with torch."""
    runtime = load(made / "student", device="cpu")
    logits = runtime.run(prepare(open_image(made / "photo.jpg"), runtime.metadata)[None])[0]
    return [(label, round(100 * p, 1)) for label, p, _ in top_labels(logits, runtime.metadata.label_names)]


def test_predict_and_serve_answer_as_torch_does(device, made, expected):
    student, photo = made / "student/student.onnx", made / "photo.jpg"
    assert answer_of_command(on(device, "-m", "deploy.predict", student, photo)) == expected
    with server(device, "-m", "deploy.serve", student) as address:
        assert answer_of_server(address, photo) == expected


# ---- one file -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyz(device, made, tmp_path_factory):
    """student.pyz alone in a folder, written by the light environment itself."""
    file = tmp_path_factory.mktemp("packed") / "student.pyz"
    assert f"{file}" in on(device, "-m", "deploy.pack", made, "-o", file)
    return file


def test_the_archive_holds_what_runs_and_nothing_of_the_machine(pyz, made):
    with zipfile.ZipFile(pyz) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert {"__main__.py", "student/student.onnx", "student/config.json", "deploy/server/page.html"} <= contents.keys()
    assert not {name for name in contents if re.search("torch|train|student\\.py|export|npz|safetensors", name)}
    assert not [
        name for name, content in contents.items() if str(made).encode() in content or str(ROOT).encode() in content
    ]
    assert pyz.stat().st_size < 200_000


def test_its_commands_run_alone(device, pyz, made, expected, tmp_path):
    for file in ("photo.jpg", NAME):
        shutil.copy(made / file, tmp_path)
    assert answer_of_command(on(device, pyz, "photo.jpg", cwd=tmp_path)) == expected
    with server(device, pyz, "serve") as address:
        assert answer_of_server(address, tmp_path / "photo.jpg") == expected
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"Drop an image" in page.read()
    flags = ["--seconds", "0.1", "--rounds", "1", "--batches", "2"]
    assert "timed on noise" in on(device, pyz, "benchmark", *flags, cwd=tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"][0]["p50_ms"] > 0
    on(device, pyz, "check", "--reference", NAME, cwd=tmp_path)
    assert json.loads((tmp_path / "check.json").read_text())[1]["verdict"] == "pass"
    assert "usage: student.pyz" in on(device, pyz, cwd=tmp_path)


def test_its_mistakes_are_one_line(device, pyz, tmp_path):
    for command, said in (
        (["nothing.jpg"], "student.pyz: error: cannot read nothing.jpg"),
        (["check"], "student.pyz check: error: no reference.npz"),
        (["serve", "--port", "-1"], "student.pyz serve: error: cannot listen"),
        (["benchmark", "--nonsense"], "student.pyz benchmark: error: unrecognized arguments"),
        (["--file", "nothing.engine", "photo.jpg"], "nothing.engine: no such file"),
        (["--file=nothing.engine", "photo.jpg"], "nothing.engine: no such file"),
        (["build"], "student.pyz build: error: tensorrt"),
    ):
        err = on(device, pyz, *command, cwd=tmp_path, status=2, output="stderr")
        assert said in err
        assert err.count("\n") == 1, err
    assert "onnxruntime" in on(Path(sys.executable), "-S", pyz, "--requirements", cwd=tmp_path)  # nothing is installed
    bare = on(Path(sys.executable), "-S", pyz, "photo.jpg", cwd=tmp_path, status=2, output="stderr")
    assert "student.pyz --requirements > requirements.txt" in bare
    assert bare.count("\n") == 1


def test_another_file_and_an_engine_can_be_packed(device, made, pyz, tmp_path):
    on(device, "-m", "deploy.pack", made, "--file", "student-int8-cpu.onnx", "-o", tmp_path / "int8.pyz")
    assert "student-int8-cpu.onnx" in on(device, tmp_path / "int8.pyz")
    metadata = load(made / "student/student.onnx", device="cpu").metadata
    built = {"library": "tensorrt", "version": "10.3.0", "gpu": "Orin", "max_batch": 8}
    (tmp_path / "student.engine").write_bytes(b"ftrt")
    (tmp_path / "student.engine.json").write_text(
        json.dumps(metadata.to_json() | {"onnx": "student.onnx", "built": built})
    )
    on(device, "-m", "deploy.pack", made, "--file", tmp_path / "student.engine", "-o", tmp_path / "engine.pyz")
    assert "JetPack's own" in on(device, tmp_path / "engine.pyz", "--requirements")
    for command in (
        [tmp_path / "engine.pyz"],
        [pyz, "--file", tmp_path / "student.engine"],
    ):  # found, and TensorRT is not
        assert "tensorrt: not installed" in on(device, *command, made / "photo.jpg", status=2, output="stderr")


def test_its_requirements_resolve_for_the_pythons_of_jetpack(device, pyz):
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in on(device, pyz, "--requirements").splitlines() if not line.startswith("#")]

    def wanted(version, machine):
        environment = {"python_version": version, "platform_machine": machine}
        names = {}
        for line in lines:
            if line.marker is None or line.marker.evaluate(environment):
                assert line.name not in names
                names[line.name] = line.specifier
        return names

    jetpack6 = wanted("3.10", "aarch64")
    assert jetpack6.keys() == {"numpy", "pillow", "onnxruntime", *SERVER}
    assert "1.23.2" in jetpack6["onnxruntime"]
    assert "1.24.0" not in jetpack6["onnxruntime"]  # the last for that Python on aarch64 is 1.23.2
    assert "2.0" not in jetpack6["numpy"]
    assert "2.2" in wanted("3.12", "aarch64")["numpy"]
    assert os.access(pyz, os.X_OK)


def test_an_engine_is_built_without_torch(made, tmp_path):
    for package in ("tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("TensorRT-RTX is not installed")
    names = "tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13"
    python = make_environment(tmp_path / "env", installed("onnxruntime(-gpu)?"), "numpy", "pillow", *names)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    out = on(python, "-m", "deploy.build", made / "student/student.onnx", "--output", tmp_path, "--max-batch", "4")
    assert "built by tensorrt_rtx" in out
    assert json.loads((tmp_path / "student.engine.json").read_text())["built"]["max_batch"] == 4


@pytest.mark.parametrize("changes", [{"input_size": None}, {"input_size": [3, 0, 16]}, {"label_names": "cat"}])
@pytest.mark.parametrize("command", ["check", "benchmark"])
def test_a_config_that_lacks_what_is_read_is_one_line(device, made, tmp_path, command, changes):
    run = shutil.copytree(made, tmp_path / "run")
    config = json.loads((run / "student/config.json").read_text()) | changes
    (run / "student/config.json").write_text(json.dumps(config))
    err = on(device, "-m", f"deploy.{command}", run, status=2, output="stderr")
    assert f"config.json: {next(iter(changes))} is " in err
    assert err.count("\n") == 1

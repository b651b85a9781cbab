"""Test which modules each file imports, and deploy/ in an environment without torch."""

import ast
import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from commands import deploy
from environments import installed, make_environment
from PIL import Image
from sklearn.datasets import load_sample_images
from students import load, model_files, write_run

from deploy import quantize
from deploy.export import export_student
from deploy.preprocess import open_image, prepare
from deploy.reference import NAME
from deploy.runtimes import top_labels

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
SERVER = ("starlette", "uvicorn", "prometheus-client", "python-multipart")

# ---- the imports ---------------------------------------------------------------------------------------------------

SHARED = ("cli", "config", "preprocess", "run_directory", "reference", "per_class", "student", "runtimes", "confidence")
SHARED = tuple(f"deploy.{name}" for name in SHARED)
# A file may import the standard library and the modules in its row: the first row whose pattern matches the file.
# "deploy.*" excludes folders in deploy/. A package in brackets may be missing, so only functions import it.
ALLOWED = {
    "kdlite/*.py": ("torch", "kdlite", "kdlite.*"),
    "kdlite/training/*.py": (
        *("torch", "torchvision", "timm", "safetensors", "numpy", "PIL", "scipy"),
        *("kdlite", "kdlite.training.*", *SHARED, "deploy.flags"),
        *("[sklearn]", "[matplotlib]", "[torch.utils.tensorboard]"),
    ),
    "train.py": ("torch", "timm", "kdlite", "kdlite.training.*", *SHARED, "deploy.flags"),
    "deploy/server/*.py": (
        *("deploy.*", "deploy.server.*", "numpy", "PIL"),
        *("anyio", "starlette", "uvicorn", "h11", "prometheus_client", "python_multipart"),
    ),
    "deploy/serve.py": ("deploy.*", "deploy.server.*"),
    "deploy/student.py": ("deploy.*", "torch", "torchvision", "timm", "safetensors"),
    "deploy/export.py": ("deploy.*", "torch", "timm", "numpy", "[onnx]", "[onnxscript]"),
    "deploy/torch_runtimes.py": ("deploy.*", "torch", "numpy"),
    "deploy/flags.py": ("deploy.*",),
    "deploy/*.py": (
        *("deploy.*", "numpy", "PIL"),
        *("[matplotlib]", "[onnx]", "[onnxruntime]", "[pynvml]", "[tqdm]", "[torch]"),
        *("[tensorrt]", "[tensorrt_rtx_bindings]", "[onnxruntime_ep_nv_tensorrt_rtx]", "[openvino]", "[ncnn]"),
    ),
}


def source_files():
    files = [ROOT / "train.py", *(ROOT / "kdlite").rglob("*.py"), *(ROOT / "deploy").rglob("*.py")]
    return sorted(str(file.relative_to(ROOT)) for file in files)


def imports_of(name):
    """Yield the absolute name of each imported module, and whether the import is outside of functions."""
    tree = ast.parse((ROOT / name).read_text(), name)
    package = name.removesuffix(".py").split("/")[:-1]
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from deploy import cli` imports deploy.cli; `from kdlite import nkd_loss` imports kdlite
            submodules = [alias.name for alias in node.names if is_module(module, alias.name)]
            found = [f"{module}.{alias}" for alias in submodules] if submodules else [module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "need",
        ):
            found = [node.args[0].value] if node.args and isinstance(node.args[0], ast.Constant) else []
        for module in found:
            if module.partition(".")[0] not in sys.stdlib_module_names:
                yield module, id(node) not in inside


def is_module(package, name):
    folder = ROOT / package.replace(".", "/")
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()


def may_import(allowed, module, at_top):
    folder = module.rpartition(".")[0]
    is_folder = (ROOT / module.replace(".", "/")).is_dir()
    entries = {entry.strip("[]") for entry in allowed if not (at_top and entry.startswith("["))}
    if module.partition(".")[0] in ("kdlite", "deploy", "train"):
        return module in entries or (f"{folder}.*" in entries and not is_folder)
    return any(module == entry or module.startswith(f"{entry}.") for entry in entries)


@pytest.mark.parametrize("name", source_files())
def test_a_file_imports_only_modules_in_its_row(name):
    folder = str(Path(name).parent)
    rows = (
        row for pattern, row in ALLOWED.items() if Path(name).match(pattern) and str(Path(pattern).parent) == folder
    )
    allowed = next(rows)
    assert not [module for module, at_top in imports_of(name) if not may_import(allowed, module, at_top)]


@pytest.mark.parametrize(("pattern", "module", "at_top"), [
    ("kdlite/*.py", "numpy", True), ("kdlite/*.py", "kdlite.training", True), ("kdlite/*.py", "deploy.cli", False),
    ("kdlite/training/*.py", "deploy.export", True), ("kdlite/*.py", "kdlite.training.data", True),
    ("kdlite/training/*.py", "train", True),
    ("train.py", "deploy.server.app", True), ("deploy/*.py", "kdlite", False), ("deploy/*.py", "torch", True),
    ("deploy/*.py", "train", False), ("deploy/*.py", "timm", False), ("deploy/*.py", "matplotlib", True),
    ("deploy/server/*.py", "torch", False), ("deploy/student.py", "kdlite.training.data", False),
])  # fmt: skip
def test_the_table_forbids_other_imports(pattern, module, at_top):
    assert not may_import(ALLOWED[pattern], module, at_top)


# ---- an environment without torch ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Return the Python of an environment without torch, with a copy of deploy/ next to it."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    runtime = installed("onnxruntime(-gpu)?")
    return make_environment(folder / "env", runtime, "numpy", "pillow", *SERVER)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a run directory with ONNX files and a reference, written with torch."""
    names = ["cat", "dog", "café", "d", "e", "f"]
    run = write_run(tmp_path_factory.mktemp("made") / "run", f"{MODELS}:tiny", 16, names)
    export_student(run / "student", model_file=model_files(run)[0])
    deploy(quantize, run, "--target", "cpu")
    Image.fromarray(load_sample_images().images[0]).save(run / "photo.jpg")
    return run


def on(device, *command, cwd=None, status=0, output="stdout", **environment):
    """Run the environment's Python with arguments, check the status, and return the output."""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | environment
    cwd = cwd or device.parents[2]
    result = subprocess.run([device, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    return getattr(result, output)


@pytest.mark.slow
def test_light_modules_do_not_load_torch_where_it_is_installed():
    """Test direct and indirect imports."""
    light = "serve, check, benchmark, build, triton, predict, pack, quantize, candidates, tensorrt, on_device, "
    light += "selftest, page"
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from deploy import {light}; print(*sys.modules)"
    loaded = set(on(Path(sys.executable), "-c", program).split())
    foreign = (
        "torch",
        "torchvision",
        "timm",
        "scipy",
        "sklearn",
        "matplotlib",
        "safetensors",
        "onnx",
        "kdlite",
        "train",
    )
    assert not loaded & {*foreign, "deploy.student", "deploy.export", "deploy.torch_runtimes"}


def test_check_and_benchmark_print_their_tables(device, made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    out = on(device, "-m", "deploy.check", run, "--device", "cpu")
    assert "skipped because torch is not installed: student.pt2, student.ts" in out
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
    assert "the table has no row for eager torch" in on(device, "-m", "deploy.benchmark", run, *flags)
    rows = json.loads((run / "student/benchmark.json").read_text())["rows"]
    assert [(row["artefact"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("student-int8-cpu.onnx", "student.onnx") for batch in (1, 3)
    ]
    assert all(row["p50_ms"] > 0 for row in rows)
    assert rows[-1]["top1"] == 100


def test_check_reads_photographs_without_torch(device, made, tmp_path):
    """Check that without torch a file is compared with student.onnx, and that the output reports it."""
    run = shutil.copytree(made, tmp_path / "run")
    for i, label in enumerate(("cat", "dog", "café", "cat")):
        (run / "val" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(load_sample_images().images[0][10 * i :, :300]).save(run / "val" / label / f"{i}.jpg")
    out = on(device, "-m", "deploy.check", run, "student.onnx", "--images", run / "val", "--device", "cpu")
    assert "torch or the weights are missing: compared with student.onnx" in out
    rows = json.loads((run / "student/check.json").read_text())
    assert [(row["images"], row.get("verdict")) for row in rows] == [(4, None), (4, "pass")]


@pytest.mark.parametrize(("command", "message"), [
    (["export", "RUN"], "No module named 'torch': export rebuilds the network, on a workstation"),
    (["predict", "RUN", "RUN/photo.jpg"], "needs torch, torchvision and timm"),
    (["quantize", "RUN", "--target", "cpu"], "No module named 'onnx': pip install onnx"),
    (["build", "RUN/student/student.onnx"], "On a Jetson, JetPack has tensorrt"),
])  # fmt: skip
def test_a_command_without_a_package_that_it_needs_gives_one_line(device, made, command, message):
    name, *flags = [word.replace("RUN", str(made)) for word in command]
    err = on(device, "-m", f"deploy.{name}", *flags, status=2, output="stderr")
    assert message in err
    assert err.count("\n") == 1, err


def test_a_triton_repository_is_written_without_torch(device, made, tmp_path):
    on(device, "-m", "deploy.triton", made / "student/student.onnx", "--output", tmp_path / "models")
    assert "[16, 16, 3]" in (tmp_path / "models/student/config.pbtxt").read_text()


@contextlib.contextmanager
def server(*command, **environment):
    """Start a server, and yield its process and its address."""
    process = subprocess.Popen(
        [*map(str, command), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(command[0].parents[2])} | environment,
    )
    try:
        line = process.stdout.readline()
        assert "http://" in line, process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err


def labels_of_server(address, photo):
    with urllib.request.urlopen(f"{address}/predict", photo.read_bytes(), timeout=30) as response:
        return [(p["label"], round(100 * p["probability"], 1)) for p in json.load(response)["predictions"]]


def labels_of_command(text):
    return [(label, float(percent)) for label, percent in re.findall(r"(\w+) ([\d.]+)%", text)]


@pytest.fixture(scope="module")
def expected(made):
    """Return the five best labels, computed with torch."""
    runtime = load(made / "student", device="cpu")
    logits = runtime.run(prepare(open_image(made / "photo.jpg"), runtime.metadata)[None])[0]
    return [(label, round(100 * p, 1)) for label, p, _ in top_labels(logits, runtime.metadata)]


def test_predict_and_serve_print_the_labels_of_torch(device, made, expected):
    student, photo = made / "student/student.onnx", made / "photo.jpg"
    assert labels_of_command(on(device, "-m", "deploy.predict", student, photo)) == expected
    with server(device, "-m", "deploy.serve", student) as (_, address):
        assert labels_of_server(address, photo) == expected


# ---- student.pyz ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyz(device, made, tmp_path_factory):
    """Return student.pyz, packed in the environment without torch."""
    file = tmp_path_factory.mktemp("packed") / "student.pyz"
    assert f"{file}" in on(device, "-m", "deploy.pack", made, "-o", file)
    return file


def test_the_archive_contains_the_programs_and_no_path_of_the_machine(pyz, made):
    with zipfile.ZipFile(pyz) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert {"__main__.py", "student/student.onnx", "student/config.json", "deploy/page.html"} <= contents.keys()
    assert not {name for name in contents if re.search("torch|train|student\\.py|export|npz|safetensors|flags", name)}
    assert not [
        name for name, content in contents.items() if str(made).encode() in content or str(ROOT).encode() in content
    ]
    assert pyz.stat().st_size < 300_000
    assert os.access(pyz, os.X_OK)


def test_the_archive_runs_alone_and_writes_only_its_results(device, pyz, made, expected, tmp_path):
    """Run most commands with a TMPDIR that is not writable."""
    nowhere = {"TMPDIR": "/proc"}
    for file in ("photo.jpg", NAME):
        shutil.copy(made / file, tmp_path)
    assert labels_of_command(on(device, pyz, "photo.jpg", cwd=tmp_path, **nowhere)) == expected
    flags = ["--seconds", "0.1", "--rounds", "1", "--batches", "2"]
    assert "timed on noise" in on(device, pyz, "benchmark", *flags, cwd=tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"][0]["p50_ms"] > 0
    on(device, pyz, "check", "--reference", NAME, cwd=tmp_path)
    assert json.loads((tmp_path / "check.json").read_text())[1]["verdict"] == "pass"
    out = on(device, pyz, "selftest", cwd=tmp_path, **nowhere)
    assert out.count("bytes equal") == 10
    assert "passed: 10 pictures, student.onnx" in out
    assert "usage: student.pyz" in on(device, pyz, cwd=tmp_path, **nowhere)
    written = {"photo.jpg", NAME, "benchmark.json", "check.json", "per_class.csv"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_the_archive_checks_itself_on_reference_npz_next_to_it(device, pyz, made, tmp_path):
    for file in (pyz, made / NAME):
        shutil.copy(file, tmp_path)
    on(device, tmp_path / pyz.name, "check", cwd=tmp_path)
    assert json.loads((tmp_path / "check.json").read_text())[1]["verdict"] == "pass"


def test_the_help_of_the_archive_names_student_pyz(device, pyz, tmp_path):
    for command in (["check"], ["benchmark"], ["build"], ["serve"], []):
        text = on(device, pyz, *(command or ["photo.jpg"]), "--help", cwd=tmp_path)
        assert text.startswith(f"usage: student.pyz {' '.join(command)}".strip())
        assert "python -m deploy" not in text.partition("options:")[0]
        assert "The student is student.onnx." in text
        assert "--model-file" not in text
        assert ("(default: the current folder)" in text) == (command[:1] in (["check"], ["benchmark"], ["build"]))


def large_photo():
    """Return a JPEG that the server decodes in its separate process for large photographs."""
    file = io.BytesIO()
    Image.new("RGB", (2500, 2000), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


def wait_for_reload(address, result):
    for _ in range(300):
        with urllib.request.urlopen(f"{address}/metrics", timeout=30) as page:
            if re.search(rf'^kdlite_reloads_total{{.*"{result}".*}} 1', page.read().decode(), re.M):
                return
        time.sleep(0.1)
    raise AssertionError(f"no reload was {result} in 30 s")


def test_a_server_keeps_running_when_its_archive_is_replaced_and_leaves_no_files(device, pyz, made, expected, tmp_path):
    """Damage the archive, start the server's process for large photographs, then replace the archive."""
    copy, temporary = shutil.copy(pyz, tmp_path / "student.pyz"), tmp_path / "tmp"
    temporary.mkdir()
    with server(device, copy, "serve", TMPDIR=str(temporary)) as (process, address):
        assert labels_of_server(address, made / "photo.jpg") == expected
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"Drop an image" in page.read()
        Path(copy).write_bytes(b"not an archive")
        with urllib.request.urlopen(f"{address}/predict", large_photo(), timeout=60) as response:
            assert response.status == 200
        assert labels_of_server(address, made / "photo.jpg") == expected
        process.send_signal(signal.SIGHUP)
        wait_for_reload(address, "refused")  # the old student stays
        assert labels_of_server(address, made / "photo.jpg") == expected
        shutil.copy(pyz, tmp_path / "new.pyz")
        os.replace(tmp_path / "new.pyz", copy)
        process.send_signal(signal.SIGHUP)
        wait_for_reload(address, "done")
        assert labels_of_server(address, made / "photo.jpg") == expected
    assert not [path.name for path in temporary.iterdir() if path.name != ".ses"]  # a file of onnxruntime


@pytest.mark.parametrize(("command", "message"), [
    (["nothing.jpg"], "student.pyz: error: cannot read nothing.jpg"),
    (["check"], "student.pyz check: error: no reference.npz"),
    (["serve", "--port", "-1"], "student.pyz serve: error: cannot listen"),
    (["benchmark", "--nonsense"], "student.pyz benchmark: error: unrecognized arguments"),
    (["--file", "nothing.engine", "photo.jpg"], "nothing.engine: no such file"),
    (["--file=nothing.engine", "photo.jpg"], "nothing.engine: no such file"),
    (["build"], "student.pyz build: error: tensorrt"),
])  # fmt: skip
def test_a_mistake_with_the_archive_gives_one_line(device, pyz, tmp_path, command, message):
    err = on(device, pyz, *command, cwd=tmp_path, status=2, output="stderr")
    assert message in err
    assert err.count("\n") == 1, err


def test_an_archive_without_its_packages_prints_how_to_install_them(pyz, tmp_path):
    bare = Path(sys.executable)  # -S: without site-packages
    assert "onnxruntime" in on(bare, "-S", pyz, "--requirements", cwd=tmp_path)
    for command in ("photo.jpg", "serve"):
        err = on(bare, "-S", pyz, command, cwd=tmp_path, status=2, output="stderr")
        assert "student.pyz --requirements > requirements.txt" in err
        assert "python -m" not in err
        assert err.count("\n") == 1


def test_a_path_in_an_archive_works_like_a_path_on_the_disk(pyz, tmp_path):
    import pickle

    from deploy.on_device import PackedPath

    student = PackedPath(pyz / "student")
    file = pickle.loads(pickle.dumps(student / "student.onnx"))
    assert {path.name for path in student.iterdir()} == {"config.json", "student.onnx"}
    assert (student.is_dir(), student.is_file(), file.is_dir(), file.is_file()) == (True, False, False, True)
    assert len(file.read_bytes()) == file.stat().st_size > 1000
    assert file.with_name("student.onnx.json").exists() is False
    for missing in (student / "no", PackedPath(tmp_path / "no.pyz/student")):
        assert missing.exists() is False
        for read in (missing.read_bytes, missing.stat):
            with pytest.raises(FileNotFoundError):
                read()
    (tmp_path / "bad.pyz").write_bytes(b"not an archive")
    bad = PackedPath(tmp_path / "bad.pyz/student")
    assert bad.exists() is False
    with pytest.raises(OSError, match="not a whole archive"):
        bad.read_bytes()


def test_another_file_and_an_engine_can_be_packed(device, made, pyz, tmp_path):
    on(device, "-m", "deploy.pack", made, "--file", "student-int8-cpu.onnx", "-o", tmp_path / "int8.pyz")
    assert "student-int8-cpu.onnx" in on(device, tmp_path / "int8.pyz")
    metadata = load(made / "student/student.onnx", device="cpu").metadata
    built = {"library": "tensorrt", "version": "10.3.0", "gpu": "Orin", "max_batch": 8}
    (tmp_path / "student.engine").write_bytes(b"ftrt")
    values = metadata.to_json() | {"onnx": "student.onnx", "built": built}
    (tmp_path / "student.engine.json").write_text(json.dumps(values))
    on(device, "-m", "deploy.pack", made, "--file", tmp_path / "student.engine", "-o", tmp_path / "engine.pyz")
    assert "JetPack's own" in on(device, tmp_path / "engine.pyz", "--requirements")
    for command in ([tmp_path / "engine.pyz"], [pyz, "--file", tmp_path / "student.engine"]):
        # the engine is found, but TensorRT is not
        assert "tensorrt: not installed" in on(device, *command, made / "photo.jpg", status=2, output="stderr")


def test_a_file_from_elsewhere_is_packed_with_its_json_file(device, made, tmp_path, expected):
    import onnx

    model = onnx.load(made / "student/student.onnx")
    properties = {p.key: json.loads(p.value) for p in model.metadata_props}
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "theirs.onnx")
    keys = ("mean", "std", "label_names", "input_size", "interpolation", "crop", "input")
    (tmp_path / "theirs.onnx.json").write_text(json.dumps({key: properties[key] for key in keys}))
    on(device, "-m", "deploy.pack", made, "--file", tmp_path / "theirs.onnx", "-o", tmp_path / "theirs.pyz")
    assert labels_of_command(on(device, tmp_path / "theirs.pyz", made / "photo.jpg")) == expected


def wanted(lines, version, machine):
    """Return the version specifier of each package that pip would install for a Python and a machine."""
    from packaging.requirements import Requirement

    environment = {"python_version": version, "platform_machine": machine}
    needs = [Requirement(line) for line in lines if not line.startswith("#")]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate(environment)]
    names = {need.name: need.specifier for need in needs}
    assert len(names) == len(needs)
    return names


def test_the_requirements_of_the_archive_suit_both_python_versions_of_jetpack(device, pyz):
    lines = on(device, pyz, "--requirements").splitlines()
    jetpack6 = wanted(lines, "3.10", "aarch64")
    assert jetpack6.keys() == {"numpy", "pillow", "onnxruntime", *SERVER}
    assert "1.23.2" in jetpack6["onnxruntime"]
    assert "1.24.0" not in jetpack6["onnxruntime"]  # 1.23.2 is the last version for Python 3.10 on aarch64
    assert "2.0" not in jetpack6["numpy"]
    assert "2.2" in wanted(lines, "3.12", "aarch64")["numpy"]


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
def test_a_config_with_an_invalid_field_gives_one_line(device, made, tmp_path, command, changes):
    run = shutil.copytree(made, tmp_path / "run")
    config = json.loads((run / "student/config.json").read_text()) | changes
    (run / "student/config.json").write_text(json.dumps(config))
    err = on(device, "-m", f"deploy.{command}", run, status=2, output="stderr")
    assert f"config.json: {next(iter(changes))} is " in err
    assert err.count("\n") == 1

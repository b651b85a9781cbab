"""Test deploy.runtimes, build and triton with foreign and damaged files, missing devices and mistakes."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from commands import deploy, files_of, refused
from students import load, write_student

from deploy import build, check, export, triton
from deploy.cli import UserError
from deploy.config import FLOAT
from deploy.runtimes import check_graph
from deploy.student import load_student

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")

try:
    import onnxruntime_ep_nv_tensorrt_rtx  # noqa: F401
    import tensorrt_rtx_bindings  # noqa: F401

    HAS_RTX = True
except ImportError:
    HAS_RTX = False
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# ---- files from elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """Return an ONNX file like another exporter's (float NCHW, no metadata), its weight and its JSON file's values."""
    make, arrays = onnx.helper, onnx.numpy_helper
    weight = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    nodes = [
        make.make_node("GlobalAveragePool", ["pixel_values"], ["pooled"]),
        make.make_node("Flatten", ["pooled"], ["flat"]),
        make.make_node("MatMul", ["flat", "weight"], ["scores"]),
    ]
    tensors = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("pixel_values", ["N", 3, 32, 32]), ("scores", ["N", 10]))
    ]
    graph = make.make_graph(nodes, "elsewhere", tensors[:1], tensors[1:], [arrays.from_array(weight, "weight")])
    file = tmp_path / "theirs.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), file)
    sidecar = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "input": FLOAT,
        "label_names": list("abcdefghij"),
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "crop": 1.0,
    }
    (tmp_path / "theirs.onnx.json").write_text(json.dumps(sidecar))
    return file, weight, sidecar


def test_a_json_file_makes_an_onnx_file_from_elsewhere_usable(foreign, tmp_path):
    """Check that the runtime uses the file's mean and std, and that Triton gets the graph's own names."""
    file, weight, sidecar = foreign
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = ((images / 255).mean((1, 2)) - sidecar["mean"]) / sidecar["std"] @ weight
    runtime = load(file)
    np.testing.assert_allclose(runtime.run(images), expected, rtol=1e-4, atol=1e-5)
    assert runtime.metadata.precision == "foreign"
    deploy(triton, file, "--output", tmp_path / "models")
    config = (tmp_path / "models/student/config.pbtxt").read_text()
    assert 'name: "pixel_values", data_type: TYPE_FP32, dims: [3, 32, 32]' in config
    assert 'name: "scores"' in config


@pytest.mark.trial
@needs_rtx
@needs_no_gpu
def test_tensorrt_takes_an_onnx_file_from_elsewhere(foreign, capsys):
    deploy(build, foreign[0], "--report")
    deploy(build, foreign[0])
    assert "parsed whole" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [
    ({"input": "uint8 NHWC"}, "tensor(uint8) of [N, 32, 32, 3]; the graph has [('pixel_values', 'tensor(float)', ["),
    ({"input_size": [3, 64, 64]}, "of [N, 3, 64, 64]; the graph has"),
    ({"label_names": ["a", "b"]}, "has 2 label_names; expected an output 'scores', [N, 2]; its shape is ['N', 10]"),
    ({"std": [0, 1, 1]}, "std is [0, 1, 1]; expected a number above 0 per channel"),
    ({"mean": [124, 116, 104]}, "mean is [124, 116, 104]; expected a number per channel, from 0 to 1 (pix"),
    ({"std": [58.4, 57.1, 57.4]}, "std is [58.4, 57.1, 57.4]; expected a number above 0 per channel, from 0 to 1"),
    (None, "a theirs.onnx.json next to it; its fields are mean, std, label_names"),
])  # fmt: skip
def test_the_json_file_must_fit_the_graph(foreign, change, message):
    file, _, values = foreign
    sidecar = file.with_name("theirs.onnx.json")
    sidecar.write_text(json.dumps(values | change)) if change else sidecar.unlink()
    with pytest.raises(UserError, match=re.escape(message)):
        load(file)


def test_a_file_from_elsewhere_that_ends_with_a_softmax_is_refused(foreign):
    file, _, _ = foreign
    model = onnx.load(file)
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["scores"]))
    onnx.save(model, file)
    with pytest.raises(UserError, match="returns probabilities, whose sum is 1; expected logits"):
        load(file)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_file_with_a_fixed_batch_runs_image_by_image_or_is_refused(foreign, batch, tmp_path, capfd):
    file, _, _ = foreign
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = load(file).run(images)
    model = onnx.load(file)
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, file)
    if batch == 1:
        np.testing.assert_allclose(load(file).run_in_parts(images, 64), expected, rtol=1e-4, atol=1e-5)
        assert "takes only batches of 1 image: export it" in refused(capfd, triton, file, "--output", tmp_path)
        assert "takes batches of 1 image: give --max-batch 1" in refused(capfd, build, file)
        with pytest.raises(UserError, match=r"theirs\.onnx fails on a batch of 3: "):
            load(file).run(images)
    else:
        with pytest.raises(UserError, match="takes only batches of 4 images: export it with a dynamic batch"):
            load(file)


def with_output(file, change):
    """Add a Cast of the logits to `change`, as the first output of a file."""
    model = onnx.load(file)
    model.graph.node.append(onnx.helper.make_node("Cast", ["scores"], ["more"], to=change))
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info("more", change, ["N", 10]))
    onnx.save(model, file)


def test_of_two_outputs_that_may_be_logits_the_user_chooses_one(foreign, capfd):
    file, _, values = foreign
    expected = load(file).run(np.zeros((1, 32, 32, 3), np.uint8))
    with_output(file, onnx.TensorProto.DOUBLE)
    with pytest.raises(UserError, match='the outputs more and scores may be the logits: choose one, as "tensors"'):
        load(file)
    sidecar = file.with_name("theirs.onnx.json")
    sidecar.write_text(json.dumps(values | {"tensors": ["pixel_values", "scores"]}))
    np.testing.assert_array_equal(load(file).run(np.zeros((1, 32, 32, 3), np.uint8)), expected)
    sidecar.write_text(json.dumps(values | {"tensors": ["pixel_values", "more"]}))
    np.testing.assert_allclose(load(file).run(np.zeros((1, 32, 32, 3), np.uint8)), expected, rtol=1e-6)
    assert "returns other logits than float32" in refused(capfd, triton, file, "--output", file.parent / "models")


def test_the_output_with_the_shape_of_the_logits_is_taken(foreign):
    file, _, _ = foreign
    expected = load(file).run(np.zeros((1, 32, 32, 3), np.uint8))
    model = onnx.load(file)
    model.graph.node.append(onnx.helper.make_node("Transpose", ["scores"], ["turned"], perm=[1, 0]))
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info("turned", onnx.TensorProto.FLOAT, [10, 1]))
    onnx.save(model, file)
    np.testing.assert_array_equal(load(file).run(np.zeros((1, 32, 32, 3), np.uint8)), expected)


def test_a_missing_output_of_the_graph_is_named(foreign):
    session = ort.InferenceSession(foreign[0])
    metadata = replace(load(foreign[0]).metadata, tensors=["pixel_values", "logits"])
    with pytest.raises(UserError, match=r"expected an output 'logits', \[N, 10\]; the graph has no such output"):
        check_graph(session, metadata, "theirs")


# ---- build ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_rtx
@needs_no_gpu
def test_an_engine_is_built_without_a_gpu_and_refused_where_it_cannot_run(run, capsys):
    deploy(build, run / "student/student.onnx", "--library", "tensorrt_rtx", "--max-batch", "16")
    assert "built without a GPU" in capsys.readouterr().out
    sidecar = run / "student/student.engine.json"
    values = json.loads(sidecar.read_text())
    assert values["built"]["max_batch"] == 16
    assert values["label_names"] == [f"class {i}" for i in range(10)]
    deploy(check, run, "student.engine", "--count", "8", check=1)
    assert "needs a CUDA device" in capsys.readouterr().out
    sidecar.write_text(json.dumps(values | {"built": values["built"] | {"version": "1.0"}}))
    with pytest.raises(
        UserError, match=r"built by tensorrt_rtx 1\.0, but this machine has .* build it again here, from student"
    ):
        load(run / "student/student.engine")
    deploy(triton, run / "student/student.engine", "--output", run / "models", check=2)
    assert "TensorRT-RTX" in capsys.readouterr().err


@needs_rtx
def test_build_names_an_operator_that_is_not_supported(run, capsys):
    file = run / "student/student.onnx"
    model = onnx.load(file)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), "square"))
    model.graph.node.append(onnx.helper.make_node("Det", ["square"], ["zero"], name="the_determinant"))
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "zero"], ["logits"]))
    onnx.save(model, file)
    deploy(build, file, "--library", "tensorrt_rtx", "--report", check=1)
    assert "Det" in capsys.readouterr().out
    deploy(build, file, "--library", "tensorrt_rtx", check=2)
    assert "cannot parse student.onnx: Det" in capsys.readouterr().err
    assert not (run / "student/student.engine").exists()


@needs_no_gpu
def test_build_with_tensorrt_needs_a_gpu(deployed, capfd):
    pytest.importorskip("tensorrt", reason="tensorrt is not installed")
    assert "CUDA device" in refused(capfd, build, deployed / "student/student.onnx", "--library", "tensorrt")


# ---- missing devices, damaged files, mistakes ----------------------------------------------------------------------


@needs_no_gpu
@pytest.mark.parametrize("name", ["", "student.onnx", "student.ts", "student.pt2"])
def test_a_missing_device_is_an_error(deployed, name):
    artefact = deployed / "student" / name
    with pytest.raises(UserError, match=r"--device cuda, but there is no CUDA device here; --allow-fallback"):
        load(artefact, device="cuda")
    runtime = load(artefact, device="cuda", allow_fallback=True)
    assert runtime.provider in ("torch cpu", "CPUExecutionProvider")
    if name == "student.onnx":
        with pytest.raises(UserError, match="--device tensorrt, but there is no CUDA device"):
            load(artefact, device="tensorrt")


@needs_gpu
@pytest.mark.parametrize("name", ["", "student.onnx", "student.ts", "student.pt2"])
def test_a_gpu_gives_the_same_logits(deployed, name):
    if name == "student.onnx" and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    expected = load(deployed / "student", device="cpu").run(images)
    runtime = load(deployed / "student" / name, device="cuda")
    assert "cuda" in runtime.provider.lower()
    for size in (1, 2, 5, 64):
        error = np.abs(runtime.run(images[:size]) - expected[:size]).max() / np.abs(expected).max()
        assert error < check.TOLERANCES["fp16"]["error"]  # because a GPU may compute in TF32


def damage(run, how):
    """Damage a student or one of its artefacts, and return its path."""
    student = run / "student"
    if how == "config":
        (student / "config.json").write_text('{"architecture": ')
        return student
    if how == "weights":
        (student / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes()[:1000])
        return student
    if how == "foreign onnx":
        model = onnx.load(student / "student.onnx")
        del model.metadata_props[:]
        model.metadata_props.add(key="author", value="{someone")
        onnx.save(model, student / "student.onnx")
        return student / "student.onnx"
    if how.endswith("engine"):
        (student / "student.engine").write_bytes(b"ftrt" * 100)
        if how == "foreign engine":
            (student / "student.engine.json").write_text("[1, 2]")
        return student / "student.engine"
    kind, how = how.split()
    file = student / f"student.{kind}"
    file.write_bytes(file.read_bytes()[:1000] if how == "truncated" else b"not a model" * 50)
    return file


@pytest.mark.parametrize("how", [
    "config", "weights", "onnx truncated", "onnx garbage", "foreign onnx", "ts truncated", "ts garbage",
    "pt2 truncated", "pt2 garbage", "engine", "foreign engine",
])  # fmt: skip
def test_a_damaged_or_foreign_file_gives_one_line(run, how, capfd):
    path = damage(run, how)
    with pytest.raises(UserError) as error:
        load(path, device="cpu")
    assert str(path.name if path.is_file() else path) in str(error.value)
    assert "\n" not in str(error.value)
    if path.is_dir():
        before = files_of(path)
        refused(capfd, export, path)
        assert files_of(path) == before


def test_weights_of_another_architecture_are_an_error_with_the_missing_names(run):
    config = json.loads((run / "student/config.json").read_text())
    config |= {"library": "timm", "architecture": "test_efficientnet", "model_args": {}}
    (run / "student/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the weights of another architecture than EfficientNet: .* is missing; "):
        load_student(run / "student")


@pytest.mark.parametrize(("module", "flags", "message"), [
    ("export", ["nowhere"], "neither a student/ folder nor a run directory"),
    ("export", ["run", "--format", "coreml"], "invalid choice"),
    ("export", ["run", "--format", "onnx", "--output", "file/below"], "give another folder with --output"),
    ("check", ["run", "nothing.onnx"], "no artefact nothing.onnx"),
    ("check", ["run", "--count", "0"], "--count: must be at least 1, got 0"),
    ("check", ["run", "--images", "nowhere"], "--images nowhere cannot be read"),
    ("check", ["run", "--images", "run", "--reference", "run/reference.npz"], "leave out --reference"),
    ("check", ["--device", "cpu", "run", "--count", "8", "nothing.onnx"], "no artefact nothing.onnx"),
    ("quantize", ["run"], "--target"),
    ("quantize", ["run", "--target", "cpu", "--count", "0"], "--count: must be at least 1, got 0"),
    ("quantize", ["run", "--target", "cpu", "--count", "999"], "but the reference has 80"),
    ("quantize", ["run", "--target", "cpu", "--count", "8", "--op-types", "Einsum"], "quantise: expected Einsum; see"),
    ("quantize", ["run", "--target", "cpu", "--onnx", "run/student/student-fp16.onnx"], "is fp16: quantise an fp32"),
    *([] if torch.cuda.is_available() else [("benchmark", ["run", "--device", "cuda"], "no CUDA device here")]),
    ("benchmark", ["run", "--batches", "0"], "at least 1"),
    ("benchmark", ["run", "--threads", "-1"], "--threads: must be at least 0, got -1"),
    ("build", ["run/student/config.json"], "is not an .onnx file"),
    ("build", ["run/student/student.onnx", "--opt-batch", "9", "--max-batch", "4"], "--opt-batch 9"),
    ("build", ["run/student/student-int8-cpu.onnx"], "was quantised for CPUs"),
    ("triton", ["run/student/student.ts"], "neither .onnx nor .engine"),
    ("serve", ["run/student/config.json"], "unknown kind of artefact"),
    ("serve", ["run/student/student.onnx", "--max-batch", "9", "--queue", "8"], "--queue"),
    ("predict", ["run/student/student.onnx", "nothing.jpg"], "cannot read nothing.jpg"),
    ("predict", ["nowhere", "nothing.jpg"], "nowhere: no such file or folder"),
    ("pack", ["run", "--file", "student.ts"], "does not run without torch"),
    ("pack", ["run", "--file", "student-int8.onnx"], "no student-int8.onnx in run/student"),
])  # fmt: skip
def test_a_mistake_gives_one_line_and_status_2(deployed, module, flags, message, monkeypatch, capfd, tmp_path):
    (tmp_path / "run").symlink_to(deployed)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, importlib.import_module(f"deploy.{module}"), *flags)


def test_kdlite_traceback_adds_the_traceback_to_a_mistake(deployed):
    command = [sys.executable, "-m", "deploy.check", "run", "nothing.onnx"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "KDLITE_TRACEBACK": "1"}
    result = subprocess.run(command, cwd=deployed.parent, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("Traceback")
    assert last.startswith("python -m deploy.check: error: no artefact nothing.onnx")


@pytest.mark.slow
def test_labels_with_accents_are_printed_in_any_locale(tmp_path):
    """Test an ASCII locale: files are in UTF-8, and the terminal gets escapes."""
    labels = ["chêne", "\u6a58"]
    student = write_student(tmp_path / "student", f"{MODELS}:tiny", 16, labels)
    deploy(export, student, "--format", "onnx")
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    program = f"""
from deploy import predict, triton
from deploy.cli import command
for module, flags in ((predict, ["photo.png"]), (triton, ["--output", "models"])):
    assert command(module.get_parser(), module.run, ["{student}/student.onnx", *flags]) == 0
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0",
                   "PYTHONCOERCECLOCALE": "0"}  # fmt: skip
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ch\\xeane" in result.stdout
    assert (tmp_path / "models/student/labels.txt").read_text(encoding="utf-8").split() == labels


# ---- triton --------------------------------------------------------------------------------------------------------


def test_triton_reads_our_repository(deployed, tmp_path):
    """Parse the configuration with Triton's own protobuf definition."""
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    flags = ["--output", tmp_path / "models", "--name", "digits", "--max-batch", "16"]
    deploy(triton, deployed / "student/student.onnx", *flags)
    folder = tmp_path / "models/digits"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    session = ort.InferenceSession(folder / "1/model.onnx", providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (config.name, config.max_batch_size, config.backend) == ("digits", 16, "onnxruntime")
    assert (config.input[0].name, list(config.input[0].dims)) == (image.name, image.shape[1:])
    assert config.input[0].data_type == pb.TYPE_UINT8
    assert (config.output[0].name, list(config.output[0].dims)) == (logits.name, logits.shape[1:])
    labels = (folder / config.output[0].label_filename).read_text().splitlines()
    assert labels == [f"class {i}" for i in range(10)]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000


def test_a_model_in_the_repository_is_not_overwritten(deployed, tmp_path, capfd):
    shutil.copytree(deployed / "student", tmp_path / "models/student")
    flags = ["--output", tmp_path / "models"]
    assert "exists already" in refused(capfd, triton, deployed / "student/student.onnx", *flags)
    assert files_of(tmp_path / "models") == ["student"]


def test_the_kserve_manifest_names_our_protocol():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((ROOT / "examples/triton/kserve.yaml").read_text())
    assert manifest["kind"] == "InferenceService"
    assert manifest["spec"]["predictor"]["model"]["protocolVersion"] == "v2"

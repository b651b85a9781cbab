"""deploy/: every artefact is the same classifier, on the architectures we name, and mistakes are one line."""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from students import load, model_files, write_student

import train
from deploy import benchmark, build, check, export, predict, quantize, triton
from deploy.cli import UserError
from deploy.config import FLOAT, read_config
from deploy.preprocess import open_image, prepare
from deploy.reference import read_reference
from deploy.runtimes import products_saturate
from deploy.student import load_student
from kdlite.training.data import Digits
from kdlite.training.outputs import save_student

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
RESNET = ROOT / "examples/paper/cifar_models.py"
# Architectures with what makes them short: a third block proves no more than a second.
INVERTED_RESIDUALS = "inverted_residual_setting=[[1,16,1,1],[6,24,2,2],[6,32,1,2],[6,64,1,2]]"
NINE = {
    "mobilenet_v2": [INVERTED_RESIDUALS], "resnet18": [], f"{MODELS}:small_shufflenet": [],
    f"{MODELS}:small_regnet": [], f"{MODELS}:small_swin": [], "mobilenetv1_100": [], "test_efficientnet": [],
    "deit_tiny_patch16_224": ["depth=3"], "convnext_atto": ["depths=(1,1,2,1)"],
}  # fmt: skip
OF_EACH_KIND = {"mobilenet_v2"}  # the others: make test-all
SATURATES = products_saturate()  # then INT8 files are compared with 7-bit weights
IN_FP16 = ["resnet18", "deit_tiny_patch16_224"]

with contextlib.suppress(ImportError):
    import onnxruntime_ep_nv_tensorrt_rtx  # noqa: F401
    import tensorrt_rtx_bindings  # noqa: F401
needs_rtx = pytest.mark.skipif("tensorrt_rtx_bindings" not in globals(), reason="TensorRT-RTX is not installed")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


def deploy(command, *flags, check=0):
    """python -m deploy.COMMAND, in this process."""
    assert command.__name__.startswith("deploy.")
    from deploy.cli import command as run

    parser = command.get_parser()
    if "--model-file" in parser.format_help():
        flags += tuple(x for flag in flags[:1] for file in model_files(Path(flag)) for x in ("--model-file", file))
    assert run(parser, command.run, [str(flag) for flag in flags]) == check


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory: a small ResNet trained on digits with USKD."""
    run = tmp_path_factory.mktemp("deploy") / "run"
    flags = ["--model", f"{RESNET}:resnet8", "--self-kd", "uskd", "--epochs", "3", "--tap", "layer2"]
    assert train.main([*flags, "--output", str(run), "--device", "cpu"]) == 0
    deploy(export, run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to spoil."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- the runtimes --------------------------------------------------------------------------------------------------


def test_every_runtime_sees_the_image_that_training_evaluated(trained):
    """The logits of train.py's own model and preprocessing, for each kind of artefact."""
    model, config = load_student(trained, model_files(trained))
    photo = Image.fromarray(load_sample_images().images[0])
    to_device = train.ToDevice(config.mean, config.std, torch.device("cpu"), torch.contiguous_format)
    with torch.no_grad():
        expected = model.eval()(to_device(train.eval_view(photo, config)[None])).numpy()
    student = trained / "student"
    for artefact in (student, *(student / f"student{end}" for end in (".onnx", ".ts", ".pt2"))):
        logits = load(artefact, device="cpu").run(prepare(photo, config)[None])
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


# ---- the architectures we name ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OF_EACH_KIND else pytest.mark.trial) for name in NINE]
)
def test_architecture_goes_the_whole_way(name, tmp_path):
    """fp32 and INT8, two of them in fp16 too: exported, checked, and with TensorRT-RTX parsed and built."""
    student = write_student(tmp_path / "student", name, 64, arguments=NINE[name])
    deploy(export, student, "--format", "onnx", "torchscript", *["torch.export"] * (name in IN_FP16))
    if name in IN_FP16:
        deploy(export, student, "--precision", "fp16", "--format", "onnx")
    side = load(student, device="cpu").image_shape[0] // 8
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8).repeat(side, 1).repeat(side, 2)
    expected = load(student, device="cpu").run(images)
    scale = np.abs(expected).max()
    tolerances = {"student.onnx": 2e-5, "student.ts": 2e-5, "student.pt2": 2e-5, "student-fp16.onnx": 6e-3}
    for end, tolerance in ((name, tolerances[name]) for name in files_of(student) if name in tolerances):
        runtime = load(student / end, device="cpu")
        for size in (1, 2, 5, 64):
            error = np.abs(runtime.run(images[:size]) - expected[:size]).max() / scale
            assert error < tolerance, (end, size)
    for target in ("cpu", "tensorrt"):
        _, agreement = quantize.quantize_student(student / "student.onnx", images, target, reduce_range=SATURATES)
        assert agreement >= 85
    if "tensorrt_rtx_bindings" in globals():
        for end in ("-fp16", "-int8-tensorrt") if name in IN_FP16 else ("-int8-tensorrt",):
            file, built = build.build_engine(student / f"student{end}.onnx", library="tensorrt_rtx")
            assert file.stat().st_size > 1e5
            assert built["library"] == "tensorrt_rtx"
        text, parsed = build.report(student / "student.onnx", library="tensorrt_rtx")
        assert parsed, text


# ---- export -------------------------------------------------------------------------------------------------------


def test_export_writes_the_student_alone_in_one_file_each(trained):
    student = trained / "student"
    assert files_of(student) == [
        "README.md", "config.json", "model.safetensors", "student.onnx", "student.pt2", "student.ts",
    ]  # fmt: skip
    model, config = load_student(trained, model_files(trained))
    graph = onnx.load(student / "student.onnx")
    weights = sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer if tensor.name.startswith("model."))
    assert weights <= sum(
        p.numel() for p in model.parameters()
    )  # the weak head would add to it; batch norms are folded
    said = {p.key: json.loads(p.value) for p in graph.metadata_props}
    for key in ("label_names", "mean", "std", "input_size", "metrics"):
        assert said[key] == getattr(config, key)
    assert said["architecture"] == config.architecture == "cifar_models.py:resnet8"
    assert said["input"] == "uint8 NHWC"
    (image,) = graph.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert image.type.tensor_type.shape.dim[0].dim_param
    assert [d.dim_value for d in image.type.tensor_type.shape.dim[1:]] == [32, 32, 3]
    assert graph.opset_import[0].version == 18


@pytest.mark.trial
def test_the_same_weights_give_the_same_bytes_and_no_path_of_the_machine(trained, tmp_path):
    """Exported from two folders in two processes, the network from two copies of its file."""
    program = "import sys; from deploy.export import *; export_student(Path(sys.argv[1]), model_file=sys.argv[2])"
    exported = []
    for place in ("one", "two"):
        student = tmp_path / place / "student"
        shutil.copytree(trained / "student", student, ignore=shutil.ignore_patterns("student.*"))
        shutil.copy(RESNET, tmp_path / place)
        own = f"{tmp_path / place / RESNET.name}:resnet8"
        subprocess.run([sys.executable, "-c", program, student, own], cwd=ROOT, check=True)
        exported.append({file.name: file.read_bytes() for file in student.glob("student*.*")})
    assert len(exported[0]) == 3
    assert exported[0] == exported[1]
    here = [str(path).encode() for path in (tmp_path, ROOT, Path(torch.__file__).parents[1], Path.home())]
    for name, content in exported[0].items():
        records = [content]
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                records += [archive.read(entry) for entry in archive.namelist()]
        assert not [path for path in here for record in records if path in record], name


def test_files_are_of_the_oldest_format_that_old_runtimes_read(deployed):
    """onnxruntime 1.17, of the first JetPack 6, reads IR 9 and refuses opset imports it does not know."""
    for file in (deployed / "student").glob("*.onnx"):
        model = onnx.load(file)
        assert model.ir_version == 8, file.name
        assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}, file.name
        onnx.checker.check_model(model)


def test_export_fp16_halves_the_file_and_keeps_float32_logits(run):
    deploy(export, run, "--precision", "fp16")
    student = run / "student"
    for end in (".onnx", ".ts", ".pt2"):
        assert (student / f"student-fp16{end}").stat().st_size < 0.75 * (student / f"student{end}").stat().st_size
        runtime = load(student / f"student-fp16{end}", device="cpu")
        assert runtime.run(np.zeros((1, 32, 32, 3), np.uint8)).dtype == np.float32


def test_export_float_nchw_takes_normalised_images(run):
    deploy(export, run, "--input", "float", "--format", "onnx", "--opset", "20")
    file = run / "student/student-nchw.onnx"
    assert onnx.load(file).opset_import[0].version == 20
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    config = json.loads((run / "student/config.json").read_text())
    batch = (images / 255 - np.array(config["mean"])) / np.array(config["std"])
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": batch.transpose(0, 3, 1, 2).astype(np.float32)})
    expected = load(run / "student", device="cpu").run(images)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(load(file).run(images), expected, atol=1e-4 * np.abs(expected).max())
    assert load(file).metadata.input == FLOAT


@pytest.mark.slow
def test_a_file_that_is_not_the_same_classifier_gets_no_name(tmp_path, capsys):
    """A branch on the input's values: tracing freezes one side of it."""
    student = write_student(tmp_path / "student", f"{MODELS}:branching", 16)
    before = files_of(student)
    deploy(export, student, "--format", "torchscript", check=2)
    assert "student.ts was not kept" in capsys.readouterr().err
    deploy(export, student, "--format", "onnx", check=2)
    assert "cannot be exported to onnx" in capsys.readouterr().err
    assert files_of(student) == before


# ---- check --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployed(trained, tmp_path_factory):
    """A copy of it with every kind of ONNX file."""
    run = tmp_path_factory.mktemp("deployed") / "run"
    shutil.copytree(trained, run)
    deploy(export, run, "--precision", "fp16", "--format", "onnx")
    deploy(quantize, run, "--target", "cpu", "--count", "64")
    deploy(quantize, run, "--target", "tensorrt", "--count", "64", *["--reduce-range"] * SATURATES)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["branched", "weight_normed", "parametrized"])
def test_what_only_training_needs_is_folded_into_the_weights(name, tmp_path):
    """A RepVGG's branches and a norm of the weights, old or new: plain convolutions, and the same answers."""
    student = write_student(tmp_path / "student", f"{MODELS}:{name}", 32)
    deploy(export, student, "--format", "onnx")
    graph = onnx.load(student / "student.onnx").graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 2
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = load(student, device="cpu").run(images)
    np.testing.assert_allclose(load(student / "student.onnx").run(images), expected, atol=1e-5 * np.abs(expected).max())


# ---- files from elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """An ONNX file as another exporter writes it: float NCHW, names of its own, no metadata."""
    make, numpy = onnx.helper, onnx.numpy_helper
    weight = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    nodes = [
        make.make_node("GlobalAveragePool", ["pixel_values"], ["pooled"]),
        make.make_node("Flatten", ["pooled"], ["flat"]),
        make.make_node("MatMul", ["flat", "weight"], ["scores"]),
    ]
    ports = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
             for name, shape in (("pixel_values", ["N", 3, 32, 32]), ("scores", ["N", 10]))]  # fmt: skip
    graph = make.make_graph(nodes, "elsewhere", ports[:1], ports[1:], [numpy.from_array(weight, "weight")])
    file = tmp_path / "theirs.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), file)
    said = {
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input": FLOAT, "label_names": list("abcdefghij"),
        "input_size": [3, 32, 32], "interpolation": "bilinear", "crop": 1.0,
    }  # fmt: skip
    (tmp_path / "theirs.onnx.json").write_text(json.dumps(said))
    return file, weight, said


def test_a_file_beside_it_makes_an_onnx_file_from_elsewhere_usable(foreign, run, capsys):
    """Normalised by its mean and std, read by its own names; benchmark and Triton take it as ours."""
    file, weight, said = foreign
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = ((images / 255).mean((1, 2)) - said["mean"]) / said["std"] @ weight
    np.testing.assert_allclose(load(file).run(images), expected, rtol=1e-4, atol=1e-5)
    flags = ["--seconds", "0.1", "--rounds", "1", "--batches", "1", "--count", "20", "--threads", "1"]
    deploy(benchmark, run, file, *flags)
    assert re.search(r"theirs.onnx +onnxruntime +CPUExecutionProvider +foreign", capsys.readouterr().out)
    deploy(triton, file, "--output", run / "models")
    config = (run / "models/student/config.pbtxt").read_text()
    assert 'name: "pixel_values", data_type: TYPE_FP32, dims: [3, 32, 32]' in config
    assert 'name: "scores"' in config


@pytest.mark.slow
@needs_rtx
@needs_no_gpu
def test_tensorrt_takes_an_onnx_file_from_elsewhere(foreign, capsys):
    deploy(build, foreign[0], "--report")
    deploy(build, foreign[0])
    assert "parsed whole" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "said"), [
    ({"input": "uint8 NHWC"}, "tensor(uint8) of [N, 32, 32, 3]; the graph has [('pixel_values', 'tensor(float)', ["),
    ({"input_size": [3, 64, 64]}, "of [N, 3, 64, 64]; the graph has"),
    ({"label_names": ["a", "b"]}, "has 2 label_names; the graph answers scores: ['N', 10]"),
    ({"std": [0, 1, 1]}, "std is [0, 1, 1]; expected a number above 0 per channel"),
    (None, "a theirs.onnx.json next to it, with mean, std, label_names"),
])  # fmt: skip
def test_what_is_said_of_a_file_from_elsewhere_must_fit(foreign, change, said):
    file, _, told = foreign
    sidecar = file.with_name("theirs.onnx.json")
    sidecar.write_text(json.dumps(told | change)) if change else sidecar.unlink()
    with pytest.raises(UserError, match=re.escape(said)):
        load(file)


@pytest.mark.slow
def test_labels_with_accents_whatever_the_locale(tmp_path):
    """Under an ASCII locale files are UTF-8 all the same, and the terminal gets escapes."""
    labels = ["chêne", "\u6a58"]
    student = write_student(tmp_path / "student", f"{MODELS}:tiny", 16, labels)
    deploy(export, student, "--format", "onnx")
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    commands = [
        ["predict", student / "student.onnx", tmp_path / "photo.png"],
        ["triton", student / "student.onnx", "--output", tmp_path / "models"],
    ]
    for command in commands:
        done = subprocess.run([sys.executable, "-m", f"deploy.{command[0]}", *map(str, command[1:])], cwd=ROOT,
                              env=env, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "predict" not in command or "ch\\xeane" in done.stdout
    assert (tmp_path / "models/student/labels.txt").read_text(encoding="utf-8").split() == labels


def digit_folders(folder, count):
    """Digits of the validation set as folder/CLASS/I.png; returns the folder."""
    digits = Digits(train=False)
    for i in range(count):
        (folder / str(digits.targets[i])).mkdir(parents=True, exist_ok=True)
        digits[i][0].save(folder / str(digits.targets[i]) / f"{i}.png")
    return folder


@pytest.mark.parametrize("source", ["reference", "photographs"])
def test_check_prints_what_a_plain_loop_counts(deployed, source, capsys, tmp_path):
    """On the 256 images of reference.npz, and on the whole validation set as files."""
    run, flags = deployed, []
    if source == "photographs":
        flags = ["--images", digit_folders(tmp_path / "val", 360)]
    deploy(check, run, "--device", "cpu", *flags)
    rows = {row["artefact"]: row for row in json.loads((run / "student/check.json").read_text())}
    assert {name: row.get("verdict") for name, row in rows.items()} == {
        "student/": None, "student.onnx": "pass", "student.pt2": "pass", "student.ts": "pass",
        "student-fp16.onnx": "pass", "student-int8-cpu.onnx": "pass", "student-int8-tensorrt.onnx": "pass",
    }  # fmt: skip

    digits = Digits(train=False)
    picked = range(len(digits)) if flags else np.linspace(0, len(digits) - 1, 256).astype(int)
    config = read_config(run / "student")
    images = np.stack([prepare(digits[i][0], config) for i in picked])
    labels = np.array(digits.targets)[picked]
    expected = load(run / "student", device="cpu").run(images)
    for name, row in rows.items():
        logits = load(run / "student" / name.replace("student/", ""), device="cpu").run(images)
        assert row["images"] == len(labels) == (360 if flags else 256)
        assert row["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
        assert row["agreement"] == pytest.approx(100 * (logits.argmax(1) == expected.argmax(1)).mean())
        assert row["max_abs_error"] == pytest.approx(np.abs(logits - expected).max(), abs=1e-5, rel=0.1)
    if flags:
        with open(run / "metrics.csv") as file:
            best = max(float(row["val_top1"]) for row in csv.DictReader(file))
        assert rows["student/"]["top1"] == pytest.approx(best)
    with open(run / "student/per_class.csv", encoding="utf-8") as file:
        hits = sum(float(row["recall"]) * int(row["n"]) for row in csv.DictReader(file))
    assert hits == pytest.approx((expected.argmax(1) == labels).sum(), abs=0.1)  # recalls have four digits
    assert (run / "student/confusion.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "1 2 5 64" in said
    assert "worst confusions" in said


def test_the_reference_holds_the_students_own_answers(trained):
    """Prepared validation and training images, labels, and fp32 logits of the saved weights."""
    reference = read_reference(trained / "student", None, "")
    config = read_config(trained / "student")
    digits = Digits(train=True), Digits(train=False)
    known = [{prepare(part[i][0], config).tobytes(): part[i][1] for i in range(len(part))} for part in digits]
    assert (trained / "reference.npz").stat().st_size < 2.5e6
    assert reference.train_images.shape == reference.images.shape == (256, 32, 32, 3)
    assert all(image.tobytes() in known[0] for image in reference.train_images)
    assert [known[1][image.tobytes()] for image in reference.images] == reference.labels.tolist()
    assert len(np.unique(reference.labels)) == 10
    expected = load(trained / "student", device="cpu").run(reference.images)
    np.testing.assert_allclose(reference.logits, expected, atol=1e-5 * np.abs(expected).max())


def damage_reference(run, how):
    file = run / "reference.npz"
    if how == "gone":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "of other weights":
        model, config = load_student(run, model_files(run))
        model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
        save_student(run / "student", model, config.to_json())
    else:
        arrays = dict(np.load(file))
        np.savez(file, **arrays | {"logits": arrays["logits"][:, :7]})


@pytest.mark.parametrize(("how", "said"), [
    ("gone", "no reference.npz next to"), ("truncated", "reference.npz cannot be read"),
    ("of other weights", "is of other weights than"), ("of other classes", "is of another student than"),
])  # fmt: skip
@pytest.mark.parametrize("command", [check, quantize])
def test_a_reference_that_does_not_fit_is_one_line(run, how, said, command, capsys):
    damage_reference(run, how)
    flags = ["--target", "cpu"] if command is quantize else []
    deploy(command, run, *flags, check=2)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("scale", "word"), [(1.3, "error"), (np.nan, "error"), (-1.0, "agreement")])
def test_check_fails_a_file_whose_weights_differ(run, capsys, scale, word):
    file = run / "student/student.onnx"
    model = onnx.load(file)
    (bias,) = (t for t in model.graph.initializer if t.name == "model.classifier.bias" or t.name == "model.fc.bias")
    (weight,) = (t for t in model.graph.initializer if t.name == bias.name.replace("bias", "weight"))
    weight.CopyFrom(
        onnx.numpy_helper.from_array((onnx.numpy_helper.to_array(weight) * scale).astype("f4"), weight.name)
    )
    onnx.save(model, file)
    deploy(check, run, "student.onnx", "--count", "100", "--device", "cpu", check=1)
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert word in out


def test_check_fails_a_file_of_other_weights(run, capsys):
    save_student(
        run / "student",
        load_student(run, model_files(run))[0].apply(lambda m: None),
        load_student(run, model_files(run))[1].to_json(),
    )
    deploy(check, run, "student.onnx", "--device", "cpu")  # saved again, the same
    model, config = load_student(run, model_files(run))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    save_student(run / "student", model, config.to_json())
    folder = digit_folders(run / "val", 20)
    deploy(check, run, "student.onnx", "--device", "cpu", "--images", folder, "--count", "8", check=1)
    assert "made from other weights" in capsys.readouterr().out


def test_check_says_where_the_images_should_be(run, tmp_path, capsys):
    student = tmp_path / "alone"
    shutil.copytree(run / "student", student)
    deploy(check, student, check=2)
    assert "no reference.npz next to" in capsys.readouterr().err
    deploy(check, student, "student.onnx", "--reference", run / "reference.npz", "--count", "50", "--device", "cpu")
    assert "50 validation images" in capsys.readouterr().out


# ---- quantize -----------------------------------------------------------------------------------------------------


def quantised_types(file):
    """The types of activations' zero points, and whether they are all zero."""
    graph = onnx.load(file).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    points = [tensors[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    return {str(point.dtype) for point in points}, all((point == 0).all() for point in points)


def test_quantize_writes_what_each_target_wants(deployed):
    student = deployed / "student"
    assert quantised_types(student / "student-int8-cpu.onnx")[0] == {"uint8"}
    assert quantised_types(student / "student-int8-tensorrt.onnx") == ({"int8"}, True)
    for node in onnx.load(student / "student-int8-tensorrt.onnx").graph.node:
        assert "bias_quantized" not in " ".join(node.input)  # TensorRT takes no quantised bias
    assert (student / "student-int8-cpu.onnx").stat().st_size < 0.6 * (student / "student.onnx").stat().st_size
    assert load(student / "student-int8-cpu.onnx").metadata.calibration["images"] == 64


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_any_number_of_images_calibrates(run, method):
    deploy(quantize, run, "--target", "cpu", "--count", "17", "--method", method)


def test_weights_have_7_bits_where_products_of_8_saturate(run, monkeypatch, capsys):
    """By default for this CPU; TensorRT's file keeps its 8 bits."""
    for saturates in (True, False):
        monkeypatch.setattr(quantize, "products_saturate", lambda saturates=saturates: saturates)
        deploy(quantize, run, "--target", "cpu", "--count", "16")
        assert ("this CPU has no VNNI" in capsys.readouterr().out) == saturates
        file = run / "student/student-int8-cpu.onnx"
        tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
        largest = max(np.abs(tensor.astype(int)).max() for tensor in tensors if tensor.dtype == np.int8)
        assert (largest <= 64) == saturates


@pytest.mark.slow
def test_a_transformer_keeps_its_softmax_and_norms_in_float(tmp_path):
    student = write_student(tmp_path / "student", "deit_tiny_patch16_224", 32, arguments=["depth=3"])
    deploy(export, student, "--format", "onnx")
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    with contextlib.suppress(UserError):  # agreement on noise may be low
        quantize.quantize_student(student / "student.onnx", images, "tensorrt")
    graph = onnx.load(student / "student-int8-tensorrt.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("Softmax", "LayerNormalization"):
            assert made_by[node.input[0]].op_type != "DequantizeLinear"
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) > 12  # four products a block


# ---- build --------------------------------------------------------------------------------------------------------


@needs_rtx
@needs_no_gpu
def test_an_engine_is_built_without_a_gpu_and_refused_by_those_that_would_run_it(run, capsys):
    deploy(build, run / "student/student.onnx", "--library", "tensorrt_rtx", "--max-batch", "16")
    assert "built without a GPU" in capsys.readouterr().out
    said = json.loads((run / "student/student.engine.json").read_text())
    assert said["built"]["max_batch"] == 16
    assert said["label_names"] == [str(i) for i in range(10)]
    deploy(check, run, "student.engine", "--count", "8", check=1)
    assert "needs a CUDA device" in capsys.readouterr().out
    sidecar = run / "student/student.engine.json"
    sidecar.write_text(json.dumps(said | {"built": said["built"] | {"version": "1.0"}}))
    with pytest.raises(
        UserError, match=r"built by tensorrt_rtx 1\.0, here is .* build it again here, from student\.onnx"
    ):
        load(run / "student/student.engine")
    deploy(triton, run / "student/student.engine", "--output", run / "models", check=2)
    assert "TensorRT-RTX" in capsys.readouterr().err


@needs_rtx
def test_build_names_the_operator_that_is_not_supported(run, capsys):
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
def test_build_with_tensorrt_says_that_it_needs_a_gpu(run, capsys, monkeypatch):
    pytest.importorskip("tensorrt", reason="tensorrt is not installed")
    deploy(build, run / "student/student.onnx", "--library", "tensorrt", check=2)
    assert "CUDA device" in capsys.readouterr().err


# ---- never a silent fallback, never a traceback -------------------------------------------------------------------


@needs_no_gpu
@pytest.mark.parametrize("name", ["", "student.onnx", "student.ts", "student.pt2"])
def test_a_device_that_is_not_there_is_an_error(trained, name):
    artefact = trained / "student" / name
    with pytest.raises(UserError, match=r"--device cuda, but there is no CUDA device here; --allow-fallback"):
        load(artefact, device="cuda")
    runtime = load(artefact, device="cuda", allow_fallback=True)
    assert runtime.provider in ("torch cpu", "CPUExecutionProvider")
    if name == "student.onnx":
        with pytest.raises(UserError, match="--device tensorrt, but there is no CUDA device"):
            load(artefact, device="tensorrt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["", "student.onnx", "student.ts", "student.pt2"])
def test_a_gpu_gives_the_same_answers(trained, name):
    if name == "student.onnx" and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    expected = load(trained / "student", device="cpu").run(images)
    runtime = load(trained / "student" / name, device="cuda")
    assert "cuda" in runtime.provider.lower()
    for size in (1, 2, 5, 64):
        error = np.abs(runtime.run(images[:size]) - expected[:size]).max() / np.abs(expected).max()
        assert error < check.TOLERANCES["fp16"]["error"]  # of TF32


def spoil(run, how):
    """Damage a student or one of its artefacts; returns the path that shows it."""
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
    "pt2 truncated", "pt2 garbage", "lonely engine", "foreign engine",
])  # fmt: skip
def test_a_damaged_or_foreign_file_is_one_line(run, how, tmp_path, capsys):
    path = spoil(run, how)
    with pytest.raises(UserError) as error:
        load(path, device="cpu")
    assert str(path.name if path.is_file() else path) in str(error.value)
    assert "\n" not in str(error.value)
    if path.is_dir():
        before = files_of(path)
        deploy(export, path, check=2)
        assert capsys.readouterr().err.count("\n") == 1
        assert files_of(path) == before


@pytest.mark.parametrize(("module", "flags", "said"), [
    ("export", ["nowhere"], "neither a student/ folder"),
    ("export", ["run", "--format", "coreml"], "invalid choice"),
    ("check", ["run", "nothing.onnx"], "no artefact nothing.onnx"),
    ("check", ["run", "--count", "0"], "--count must be at least 1"),
    ("check", ["run", "--images", "nowhere"], "--images nowhere cannot be read"),
    ("check", ["run", "--images", "run", "--reference", "run/reference.npz"], "leave out --reference"),
    ("quantize", ["run"], "--target"),
    ("quantize", ["run", "--target", "cpu", "--count", "0"], "--count must be at least 1"),
    ("quantize", ["run", "--target", "cpu", "--count", "999"], "but the reference has 256"),
    ("quantize", ["run", "--target", "cpu", "--count", "8", "--op-types", "Einsum"], "no Einsum to quantise"),
    ("check", ["--device", "cpu", "run", "--count", "8", "nothing.onnx"], "no artefact nothing.onnx"),
    *([] if torch.cuda.is_available() else [("benchmark", ["run", "--device", "cuda"], "no CUDA device here")]),
    ("build", ["run/student/config.json"], "is not an .onnx file"),
    ("build", ["run/student/student.onnx", "--opt-batch", "9", "--max-batch", "4"], "--opt-batch 9"),
    ("benchmark", ["run", "--batches", "0"], "at least 1"),
    ("triton", ["run/student/student.ts"], "neither .onnx nor .engine"),
    ("serve", ["run/student/config.json"], "unknown kind of artefact"),
    ("serve", ["run/student/student.onnx", "--max-batch", "9", "--queue", "8"], "--queue"),
    ("predict", ["run/student/student.onnx", "nothing.jpg"], "cannot read nothing.jpg"),
    ("predict", ["nowhere", "nothing.jpg"], "nowhere: no such file or folder"),
    ("pack", ["run", "--file", "student.ts"], "does not run without torch"),
    ("pack", ["run", "--file", "student-int8.onnx"], "no student-int8.onnx in run/student"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(trained, module, flags, said, monkeypatch, capfd):
    """From the run's parent folder."""
    monkeypatch.chdir(trained.parent)
    deploy(importlib.import_module(f"deploy.{module}"), *flags, check=2)
    err = capfd.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_mistake_on_the_command_line_and_its_traceback_on_demand(trained):
    command = [sys.executable, "-m", "deploy.check", "run", "nothing.onnx"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    for more, lines in (({}, 1), ({"KDLITE_TRACEBACK": "1"}, None)):
        answer = subprocess.run(
            command, cwd=trained.parent, env=environment | more, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 2
        *before, last = answer.stderr.splitlines()
        assert last.startswith("python -m deploy.check: error: no artefact nothing.onnx")
        assert (not before) if lines else before[0].startswith("Traceback")


def test_nothing_is_written_where_nothing_may_be(run, capsys):
    (run / "file").write_text("")
    deploy(export, run, "--format", "onnx", "--output", run / "file/below", check=2)
    assert "--output names another folder" in capsys.readouterr().err


# ---- benchmark ----------------------------------------------------------------------------------------------------


def test_benchmark_measures_each_runtime_in_a_process_and_keeps_failed_rows(run, capsys):
    (run / "student/student.engine").write_bytes(b"ftrt" * 100)
    flags = ["--device", "cpu", "--threads", "1", "--seconds", "0.2", "--rounds", "2", "--batches", "1", "4"]
    deploy(benchmark, run, "student.onnx", "student.ts", "student.engine", *flags, "--count", "100", check=1)
    result = json.loads((run / "student/benchmark.json").read_text())
    rows = result["rows"]
    assert [(row["artefact"], row.get("batch")) for row in rows] == [
        ("student/", 1), ("student/", 4), ("student.onnx", 1), ("student.onnx", 4), ("student.ts", 1),
        ("student.ts", 4), ("student.engine", None),
    ]  # fmt: skip
    assert "has no student.engine.json" in rows[-1]["failed"]
    for row in rows[:-1]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        eager = next(r for r in rows if r["runtime"] == "torch" and r["batch"] == row["batch"])
        assert row["times_eager"] == pytest.approx(eager["p50_ms"] / row["p50_ms"])
        assert row["provider"] == ("CPUExecutionProvider" if row["artefact"] == "student.onnx" else "torch cpu")
        assert row["top1"] == rows[0]["top1"] > 50
    assert result["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (run / "student/benchmark.png").stat().st_size > 5000
    assert "times_eager" in capsys.readouterr().out


def test_json_is_all_that_is_printed_and_what_the_file_holds(trained, tmp_path, capsys):
    flags = ["student.onnx", "--count", "8", "--device", "cpu", "--json", "--output", tmp_path]
    deploy(check, trained, *flags)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "check.json").read_text())
    deploy(benchmark, trained, *flags, "--seconds", "0.1", "--rounds", "1", "--batches", "1")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "benchmark.json").read_text())


def test_the_board_power_of_a_jetson_is_read_from_tegrastats():
    # two lines in the form that NVIDIA documents for Orin
    nano = "RAM 2448/7620MB CPU [3%@729] GPU@45C VDD_IN 4543mW/4600mW VDD_CPU_GPU_CV 735mW/740mW VDD_SOC 1346mW/1350mW"
    agx = "RAM 6356/30536MB VDD_GPU_SOC 2402mW/2402mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 3320mW/3320mW"
    assert benchmark.board_watts(nano) == pytest.approx(4.543)
    assert benchmark.board_watts(agx) == pytest.approx(6.122)
    assert benchmark.board_watts("RAM 1/2MB") is None


def test_tegrastats_ends_with_what_it_measured(tmp_path, monkeypatch):
    """Where what is measured fails, too."""
    (tmp_path / "tegrastats").write_text("#!/bin/sh\nwhile true; do echo VDD_IN 4543mW/4600mW; sleep 0.01; done\n")
    (tmp_path / "tegrastats").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    meter = benchmark.EnergyMeter()
    meter.gpu = None  # of this machine
    meter.start()
    running = meter.process
    time.sleep(0.2)
    assert meter.stop() > 0
    assert running.returncode is not None
    meter.start()
    running = meter.process
    meter.close()
    assert running.returncode is not None


# ---- triton -------------------------------------------------------------------------------------------------------


def test_triton_reads_our_repository(trained, tmp_path):
    """By Triton's own protobuf definition of the configuration."""
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    deploy(
        triton,
        trained / "student/student.onnx",
        "--output",
        tmp_path / "models",
        "--name",
        "digits",
        "--max-batch",
        "16",
    )
    folder = tmp_path / "models/digits"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    session = ort.InferenceSession(folder / "1/model.onnx", providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (config.name, config.max_batch_size, config.backend) == ("digits", 16, "onnxruntime")
    assert (config.input[0].name, list(config.input[0].dims)) == (image.name, image.shape[1:])
    assert config.input[0].data_type == pb.TYPE_UINT8
    assert (config.output[0].name, list(config.output[0].dims)) == (logits.name, logits.shape[1:])
    assert (folder / config.output[0].label_filename).read_text().split() == [str(i) for i in range(10)]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000


def test_the_kserve_manifest_names_the_protocol_we_serve():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((ROOT / "examples/triton/kserve.yaml").read_text())
    assert manifest["kind"] == "InferenceService"
    assert manifest["spec"]["predictor"]["model"]["protocolVersion"] == "v2"


def test_predict_answers_the_same_from_every_artefact(trained, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(load_sample_images().images[1]).save(photo)
    assert open_image(photo).size == (640, 427)
    answers = set()
    for artefact in (trained, *(trained / f"student/student{end}" for end in (".onnx", ".ts", ".pt2"))):
        deploy(predict, artefact, photo, "--device", "cpu")
        answers.add(capsys.readouterr().out)
    (answer,) = answers
    assert re.fullmatch(rf"{photo}: (\d [\d.]+%, ){{4}}\d [\d.]+%\n", answer)

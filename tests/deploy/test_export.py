"""Test that deploy.export writes the same classifier in every format."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from commands import deploy, files_of
from PIL import Image
from sklearn.datasets import load_sample_images
from students import load, model_files, write_student

from deploy import build, export, predict, quantize
from deploy.config import FLOAT, read_config
from deploy.preprocess import prepare
from deploy.runtimes import products_saturate
from deploy.student import load_student
from kdlite.training.loading import eval_view

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
RESNET = ROOT / "examples/paper/cifar_models.py"
# These arguments leave few blocks, to save time.
INVERTED_RESIDUALS = "inverted_residual_setting=[[1,16,1,1],[6,24,2,2],[6,32,1,2],[6,64,1,2]]"
NINE = {
    "mobilenet_v2": [INVERTED_RESIDUALS],
    "resnet18": [],
    f"{MODELS}:small_shufflenet": [],
    f"{MODELS}:small_regnet": [],
    f"{MODELS}:small_swin": [],
    "mobilenetv1_100": [],
    "test_efficientnet": [],
    "deit_tiny_patch16_224": ["depth=2"],
    "convnext_atto": ["depths=(1,1,1,1)"],
}
OF_EACH_KIND = {"test_efficientnet": [], "deit_tiny_patch16_224": ["depth=1"]}  # fixture deployed: a ResNet
IN_FP16 = {"resnet18", "deit_tiny_patch16_224"}
TOLERANCES = {".onnx": 2e-5, ".ts": 2e-5, ".pt2": 2e-5, "-fp16.onnx": 6e-3}  # relative to the largest logit

try:
    import onnxruntime_ep_nv_tensorrt_rtx  # noqa: F401
    import tensorrt_rtx_bindings  # noqa: F401

    HAS_RTX = True
except ImportError:
    HAS_RTX = False


def difference(runtime, images, expected):
    """Return the largest difference of a logit, relative to the largest logit."""
    return np.abs(runtime.run(images) - expected).max() / np.abs(expected).max()


def test_every_runtime_gives_the_logits_that_training_evaluates(deployed):
    model, config = load_student(deployed, model_files(deployed))
    photo = Image.fromarray(load_sample_images().images[0])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    with torch.no_grad():
        expected = model.eval()((eval_view(photo, config) / 255 - mean)[None] / std).numpy()
    student = deployed / "student"
    for artefact in (student, *(student / f"student{end}" for end in (".onnx", ".ts", ".pt2"))):
        assert difference(load(artefact, device="cpu"), prepare(photo, config)[None], expected) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_network_of_each_kind_is_exported_and_quantised(name, tmp_path):
    """Test a network with depthwise convolutions and one with attention, as ONNX in fp32 and INT8."""
    student = write_student(tmp_path / "student", name, 64, arguments=OF_EACH_KIND[name])
    export_and_quantise(student, ["onnx"], False)
    graph = onnx.load(student / "student-int8-tensorrt.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:  # only the transformer has these operators
        if node.op_type in ("Softmax", "LayerNormalization"):
            assert made_by[node.input[0]].op_type != "DequantizeLinear"


@pytest.mark.trial
@pytest.mark.parametrize("name", NINE)
def test_the_nine_architectures_are_exported_and_quantised(name, tmp_path):
    """Test each architecture in ONNX, TorchScript and INT8, and two of them in torch.export and fp16 too."""
    formats = ["onnx", "torchscript", *["torch.export"] * (name in IN_FP16)]
    export_and_quantise(write_student(tmp_path / "student", name, 64, arguments=NINE[name]), formats, name in IN_FP16)


def export_and_quantise(student, formats, fp16):
    """Export, compare and quantise a student, and build an engine if TensorRT-RTX is installed."""
    deploy(export, student, "--format", *formats)
    if fp16:
        deploy(export, student, "--precision", "fp16", "--format", "onnx")
    side = load(student, device="cpu").image_shape[0] // 8
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8).repeat(side, 1).repeat(side, 2)
    expected = load(student, device="cpu").run(images)
    for end, tolerance in TOLERANCES.items():
        if (student / f"student{end}").exists():
            runtime = load(student / f"student{end}", device="cpu")
            for size in (1, 2, 5, 64):
                assert difference(runtime, images[:size], expected[:size]) < tolerance, (end, size)
    for target in ("cpu", "tensorrt"):
        recipe = quantize.Recipe(target, reduce_range=products_saturate())
        _, agreement, _ = quantize.quantize_student(student / "student.onnx", images, recipe)
        assert agreement >= 85
    if HAS_RTX:
        for end in ("-fp16", "-int8-tensorrt") if fp16 else ("-int8-tensorrt",):
            file, built = build.build_engine(student / f"student{end}.onnx", library="tensorrt_rtx")
            assert file.stat().st_size > 1e5
            assert built["library"] == "tensorrt_rtx"
        text, parsed = build.report(student / "student.onnx", library="tensorrt_rtx")
        assert parsed, text


@pytest.mark.trial
def test_a_run_of_train_py_is_exported_and_passes_the_check(tmp_path, capsys):
    """Train with USKD, whose weak head is not exported."""
    import train
    from deploy import check

    output = tmp_path / "run"
    flags = ["--model", f"{RESNET}:resnet8", "--self-kd", "uskd", "--epochs", "1", "--tap", "layer2", "--device", "cpu"]
    assert train.main([*flags, "--output", str(output)]) == 0
    deploy(export, output)
    deploy(check, output, "--device", "cpu")
    assert capsys.readouterr().out.count("pass") == 3


def test_each_exported_file_contains_only_the_student(deployed):
    student = deployed / "student"
    assert {"README.md", "config.json", "model.safetensors", "student.onnx", "student.pt2", "student.ts"} <= {
        *files_of(student)
    }
    assert not [name for name in files_of(student) if name.startswith(".")]
    model, config = load_student(deployed, model_files(deployed))
    graph = onnx.load(student / "student.onnx")
    weights = sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer if tensor.name.startswith("model."))
    assert weights <= sum(p.numel() for p in model.parameters())  # batch norms are folded
    properties = {p.key: json.loads(p.value) for p in graph.metadata_props}
    for key in ("label_names", "mean", "std", "input_size"):
        assert properties[key] == getattr(config, key)
    assert properties["architecture"] == config.architecture == "cifar_models.py:resnet8"
    assert properties["input"] == "uint8 NHWC"
    (image,) = graph.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert image.type.tensor_type.shape.dim[0].dim_param
    assert [d.dim_value for d in image.type.tensor_type.shape.dim[1:]] == [32, 32, 3]
    assert graph.opset_import[0].version == 18


@pytest.mark.trial
def test_the_same_weights_give_the_same_bytes_and_no_path_of_the_machine(deployed, tmp_path):
    """Export in two processes from two folders, each with its own copy of the model file."""
    program = "import sys; from deploy.export import *; export_student(Path(sys.argv[1]), model_file=sys.argv[2])"
    exported = []
    for place in ("one", "two"):
        student = tmp_path / place / "student"
        shutil.copytree(deployed / "student", student, ignore=shutil.ignore_patterns("student*.*"))
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


def test_old_runtimes_can_read_the_files(deployed):
    """Check the limits of onnxruntime 1.17 (the first JetPack 6): an IR version of at most 9, and known opsets."""
    for file in (deployed / "student").glob("*.onnx"):
        model = onnx.load(file)
        assert model.ir_version == 8, file.name
        assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}, file.name
        onnx.checker.check_model(model)


def test_fp16_shrinks_the_file_and_keeps_float32_logits(deployed):
    student = deployed / "student"
    assert (student / "student-fp16.onnx").stat().st_size < 0.75 * (student / "student.onnx").stat().st_size
    runtime = load(student / "student-fp16.onnx", device="cpu")
    assert runtime.run(np.zeros((1, 32, 32, 3), np.uint8)).dtype == np.float32


@pytest.mark.trial
@pytest.mark.parametrize(("kind", "end"), [("torchscript", ".ts"), ("torch.export", ".pt2")])
def test_fp16_shrinks_the_files_of_torch(run, kind, end):
    deploy(export, run, "--precision", "fp16", "--format", kind)
    half, whole = (run / f"student/student{name}{end}" for name in ("-fp16", ""))
    assert half.stat().st_size < 0.75 * whole.stat().st_size
    assert load(half, device="cpu").run(np.zeros((1, 32, 32, 3), np.uint8)).dtype == np.float32


def test_float_input_takes_normalised_images(run):
    deploy(export, run, "--input", "float", "--format", "onnx", "--opset", "20")
    file = run / "student/student-nchw.onnx"
    assert onnx.load(file).opset_import[0].version == 20
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    config = read_config(run / "student")
    batch = (images / 255 - np.array(config.mean)) / np.array(config.std)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": batch.transpose(0, 3, 1, 2).astype(np.float32)})
    expected = load(run / "student", device="cpu").run(images)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(load(file).run(images), expected, atol=1e-4 * np.abs(expected).max())
    assert load(file).metadata.input == FLOAT


@pytest.mark.slow
def test_a_file_that_is_not_the_same_classifier_is_not_kept(tmp_path, capsys):
    """Export a model that branches on its input values: tracing keeps only one branch."""
    student = write_student(tmp_path / "student", f"{MODELS}:branching", 16)
    before = files_of(student)
    deploy(export, student, "--format", "torchscript", check=2)
    assert "student.ts was not kept" in capsys.readouterr().err
    deploy(export, student, "--format", "onnx", check=2)
    assert "cannot be exported to onnx" in capsys.readouterr().err
    assert files_of(student) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["branched", "weight_normed", "parametrized"])
def test_layers_that_only_training_needs_are_folded_into_the_weights(name, tmp_path):
    """Check that RepVGG's branches and both kinds of weight norm become plain convolutions with the same logits."""
    student = write_student(tmp_path / "student", f"{MODELS}:{name}", 32)
    deploy(export, student, "--format", "onnx")
    graph = onnx.load(student / "student.onnx").graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 2
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = load(student, device="cpu").run(images)
    assert difference(load(student / "student.onnx"), images, expected) < 1e-5


def test_predict_prints_the_same_line_for_every_artefact(deployed, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(load_sample_images().images[1]).save(photo)
    printed = set()
    for artefact in (deployed, *(deployed / f"student/student{end}" for end in (".onnx", ".ts", ".pt2"))):
        deploy(predict, artefact, photo, "--device", "cpu")
        printed.add(capsys.readouterr().out)
    (line,) = printed
    assert re.fullmatch(rf"{photo}: (class \d [\d.]+%, ){{4}}class \d [\d.]+%\n", line)


def test_the_metadata_of_an_artefact_is_read_back(deployed):
    config = read_config(deployed / "student")
    for end in (".onnx", ".ts", ".pt2"):
        metadata = load(deployed / f"student/student{end}", device="cpu").metadata
        assert dataclasses.replace(metadata, precision="", input="", source={}) == config
        assert len(metadata.source["weights_sha256"]) == 64

"""Check that files from other people cannot name other files, describe a huge model or print control characters."""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import deploy, refused
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from students import load, write_run, write_student

from deploy import benchmark, check, export, predict, runtimes
from deploy.cli import UserError
from deploy.config import MAX_ARGUMENT, Metadata, read_config
from deploy.onnx_tools import has_external_data, refuse_external_data
from deploy.reference import read_reference
from deploy.runtimes import RunOn, cgroup_quota, usable_cpus
from deploy.student import load_student

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
ESCAPE = "\x1b]0;owned\x07\x1b[2J\r\n\u202e\x9b"


# ---- ONNX files that name other files ------------------------------------------------------------------------------


def external(location="/etc/passwd", name="w"):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def model_with(nodes=(), initializers=(), sparse=(), functions=()):
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    graph = helper.make_graph(list(nodes), "g", [port], [port], list(initializers), sparse_initializer=list(sparse))
    return helper.make_model(graph, functions=list(functions))


def constant(tensor):
    return helper.make_node("Constant", [], ["y"], value=tensor)


def node_with(*graphs):
    """Return a node whose attribute is one graph, or a list of graphs."""
    return helper.make_node("If", ["c"], ["y"], **{"then": graphs[0]} if len(graphs) == 1 else {"branches": graphs})


def sparse(values, indices):
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[9])


PLAIN = numpy_helper.from_array(np.zeros(4, np.float32), "w")
INDICES = numpy_helper.from_array(np.arange(4), "i")
INNER = model_with([constant(external())]).graph
WITHOUT_PATH = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
EXTERNAL = {
    "an absolute path": model_with(initializers=[external()]),
    "a path upwards": model_with(initializers=[PLAIN, external("../../../etc/passwd")]),
    "a file next to it": model_with(initializers=[external("weights.bin")]),
    "external without a path": model_with(initializers=[WITHOUT_PATH]),
    "a constant": model_with([constant(external())]),
    "a list of tensors": model_with([helper.make_node("N", [], ["y"], values=[PLAIN, external()])]),
    "an inner graph": model_with([node_with(INNER)]),
    "inner graphs": model_with([node_with(model_with().graph, INNER)]),
    "twice inside": model_with([node_with(model_with([node_with(INNER)]).graph)]),
    "sparse values": model_with(sparse=[sparse(external(), INDICES)]),
    "sparse indices": model_with(sparse=[sparse(PLAIN, external())]),
    "a function": model_with(functions=[helper.make_function("d", "f", [], ["y"], [constant(external())], [])]),
}


@pytest.mark.parametrize("how", EXTERNAL)
def test_weights_in_another_file_are_refused(how, tmp_path):
    """Test each place that a tensor can have in a file. onnxruntime 1.23 would read weights from any path."""
    file = tmp_path / "student.onnx"
    file.write_bytes(EXTERNAL[how].SerializeToString())
    with pytest.raises(UserError, match=r"student\.onnx keeps weights in other files, which are not read"):
        runtimes.load(file, RunOn("cpu"))


def test_our_own_files_and_words_like_location_are_accepted(deployed):
    for file in (deployed / "student").glob("*.onnx"):
        refuse_external_data(file.read_bytes(), file)
    named = numpy_helper.from_array(np.zeros(4, np.float32), "location_external_data")
    model = model_with(initializers=[named])
    model.metadata_props.add(key="location", value="/etc/passwd")
    assert not has_external_data(memoryview(model.SerializeToString()))


def test_any_bytes_are_read_or_refused_in_little_time():
    """Read files that are cut off, changed or unknown. Only UserError may be raised."""
    whole = EXTERNAL["twice inside"].SerializeToString()
    random = np.random.default_rng(0)
    nested = b""
    for _ in range(300):  # a graph in an attribute of a node of a graph, and so on
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            nested = tag + varint(len(nested)) + nested
    nested = b"\x3a" + varint(len(nested)) + nested  # ModelProto.graph
    with pytest.raises(UserError, match="nested deeper than"):
        refuse_external_data(nested, Path("a.onnx"))
    changed = [whole[:i] for i in range(len(whole))] + [
        nested,
        b"\xff" * 100,
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    ]
    for _ in range(500):
        content = bytearray(whole)
        content[random.integers(len(content))] = random.integers(256)
        changed.append(bytes(content))
    started = time.process_time()
    for content in changed:
        with contextlib.suppress(UserError):
            refuse_external_data(content, Path("a.onnx"))
    assert time.process_time() - started < 5


def varint(value):
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


# ---- metadata that is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [predict, check, benchmark])
@pytest.mark.parametrize("change", [
    {"label_names": ["one"]}, {"label_names": [f"{i}" for i in range(11)]}, {"input_size": [3, 64, 64]},
    {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}, {"input": "float32 NCHW"}, {"tensors": ["x", "y"]},
    {"tensors": ["images"]}, {"num_classes": 7}, {"mean": "0.5"}, {"precision": None}, {"source": []}, {"metrics": 3},
    {"built": {"version": 1}}, {"model_args": {"pretrained": True}}, {"label_names": ["\ud800"] * 10},
])  # fmt: skip
def test_metadata_that_is_invalid_or_contradicts_the_graph_gives_one_line(deployed, tmp_path, change, command, capfd):
    student = tmp_path / "run/student"
    student.mkdir(parents=True)
    for name in ("config.json", "../reference.npz"):
        shutil.copy(deployed / "student" / name, student / name)
    model = onnx.load(deployed / "student/student.onnx")
    properties = {p.key: json.loads(p.value) for p in model.metadata_props} | change
    if "label_names" in change:
        del properties["num_classes"]
    del model.metadata_props[:]
    helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
    onnx.save(model, student / "student.onnx")
    with pytest.raises(UserError) as error:
        load(student / "student.onnx", device="cpu")
    assert "\n" not in str(error.value)
    if command is predict:
        Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
        refused(capfd, predict, student / "student.onnx", tmp_path / "photo.png")
    elif change == {"label_names": ["one"]}:  # only one case, because these commands are slow
        flags = ["--seconds", "0.1", "--rounds", "1"] if command is benchmark else []
        deploy(command, tmp_path / "run", *flags, check=1)
        assert "has 1 label_names" in capfd.readouterr().out


@pytest.mark.parametrize("text", [b'"bilinear"', b"images", b"logits"])
def test_a_text_that_is_not_utf_8_gives_one_line(deployed, tmp_path, text, capfd):
    """Test the metadata, and the names of input and output. onnxruntime must print nothing."""
    content = (deployed / "student/student.onnx").read_bytes()
    (tmp_path / "student.onnx").write_bytes(content.replace(text, text[:1] + b"\xff" + text[2:]))
    with pytest.raises(UserError, match=r"student\.onnx (has a text that is not UTF-8|cannot be loaded)") as error:
        load(tmp_path / "student.onnx", device="cpu")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("labels", [["one"], [f"{i}" for i in range(11)]])
def test_a_file_with_more_or_fewer_labels_than_logits_is_an_error(run, labels):
    """Test an ONNX graph without the number of classes, and TorchScript, which never has it."""
    file = run / "student/student.ts"
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            if name.endswith("metadata.json"):
                content = json.dumps(json.loads(content) | {"label_names": labels, "num_classes": len(labels)}).encode()
            archive.writestr(name, content)
    model = onnx.load(run / "student/student.onnx")
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    properties = {p.key: json.loads(p.value) for p in model.metadata_props}
    properties |= {"label_names": labels, "num_classes": len(labels)}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
    onnx.save(model, run / "student/student.onnx")
    with pytest.raises(UserError, match=f"has {len(labels)} label_names"):  # onnxruntime infers the number of logits
        load(run / "student/student.onnx", device="cpu")
    runtime = load(file, device="cpu")
    with pytest.raises(UserError, match=rf"has {len(labels)} label_names and returns logits of shape \[2, 10\]"):
        runtime.run(np.zeros((2, 32, 32, 3), np.uint8))


# ---- wrong or huge models in config.json ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side", "arguments"), [
    ("deit_tiny_patch16_224", 32, {"depth": 20_000}),
    ("deit_tiny_patch16_224", 32, {"depth": 10**9}),
    ("deit_tiny_patch16_224", 32, {"embed_dim": MAX_ARGUMENT}),
    ("deit_tiny_patch16_224", 32, {"patch_size": 1, "img_size": 8192}),
    ("deit_tiny_patch16_224", 32, {"depth": -1}),
    ("deit_tiny_patch16_224", 32, {"norm_layer": "nope"}),
    ("mobilenet_v2", 32, {"round_nearest": 0}),
    ("mobilenet_v2", 32, {"width_mult": 10_000}),
    ("mobilenet_v2", 32, {"inverted_residual_setting": [[1, 16, 100_000, 1]]}),
    ("test_efficientnet", 32, {"act_layer": "nope"}),
    ("test_efficientnet", 32, {"channel_multiplier": 100_000}),
    ("test_efficientnet", 32, {"no_such_argument": 1}),
])  # fmt: skip
def test_wrong_model_arguments_are_refused_in_little_time(name, side, arguments, tmp_path):
    start = ["depth=1"] if name.startswith("deit") else ["width_mult=0.25"] if name == "mobilenet_v2" else []
    student = write_student(tmp_path / "student", name, side, arguments=start)
    config = json.loads((student / "config.json").read_text())
    config["model_args"] |= arguments
    (student / "config.json").write_text(json.dumps(config))
    started = time.process_time()
    with pytest.raises(
        UserError, match=r"far larger model|cannot build|expected a number up to|is missing|is unknown"
    ) as error:
        load_student(student)
    assert "\n" not in str(error.value)
    assert time.process_time() - started < 10


def test_a_model_that_cannot_be_built_on_the_meta_device_is_loaded_unless_it_is_huge(tmp_path):
    """Test torchvision's RegNet, whose constructor reads values of tensors."""
    student = write_student(tmp_path / "student", "regnet_x_400mf", 32)
    load_student(student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"architecture": "regnet_y_128gf"}))
    with pytest.raises(UserError, match="describes a far larger model"):
        load_student(student)


@pytest.mark.parametrize("name", [
    "student/config.json", "student/model.safetensors", "student/student.onnx", "student/student.ts",
    "student/student.engine", "student/student.engine.json", "reference.npz",
])  # fmt: skip
def test_a_pipe_instead_of_a_file_gives_one_line(deployed, tmp_path, name):
    """Use a pipe that gets no data: a read from it would never end."""
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    for kept in ("reference.npz", "student/config.json", "student/model.safetensors", "student/student.onnx"):
        shutil.copy(deployed / kept, run / kept)
    (run / "student/student.engine").write_bytes(b"ftrt")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    on = RunOn("cpu", model_files=(str(ROOT / "examples/paper/cifar_models.py:resnet8"),))
    if name == "reference.npz":
        read = functools.partial(read_reference, run / "student", run / name, "")
    elif name.endswith(("config.json", "safetensors")):
        read = functools.partial(runtimes.load, run / "student", on)
    else:
        read = functools.partial(runtimes.load, run / name.removesuffix(".json"), on)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    try:
        with pytest.raises(UserError) as error:
            read()
    finally:
        signal.alarm(0)
    assert "\n" not in str(error.value)


# ---- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_labels_and_file_names_are_escaped_on_the_terminal(tmp_path, capfd):
    names = [f"{ESCAPE}{i}" for i in range(3)]
    run = write_run(tmp_path / "run", f"{MODELS}:tiny", 16, names, images=12)
    deploy(export, run, "--format", "onnx")
    photo = tmp_path / "a\x1b[31mb.png"
    Image.new("RGB", (20, 20), (200, 30, 30)).save(photo)
    deploy(predict, run / "student/student.onnx", photo)
    shutil.copy(run / "student/student.onnx", run / "student/x\x1b[1m.onnx")
    arrays = dict(np.load(run / "reference.npz"))
    np.savez(run / "reference.npz", **arrays | {"labels": (arrays["labels"] + 1) % 3})  # so that some answers are wrong
    deploy(check, run, check=None)
    folder = tmp_path / "val" / f"other{ESCAPE}".replace("\n", "")
    folder.mkdir(parents=True)
    deploy(check, run, "--images", folder.parent, check=2)
    deploy(predict, run / "student/student.onnx", tmp_path / "nothing\x1b[2J.jpg", check=2)
    (run / "student/config.json").write_text(json.dumps({"label_names": ["\x1b[2J"], "input_size": "\x1b[2J"}))
    deploy(check, run, check=2)
    out, err = capfd.readouterr()
    assert "\\x1b]0;owned\\x07" in out
    for text in (out, err):
        assert not [c for line in text.split("\n") for c in line if not c.isprintable()]


# ---- keys of a config ----------------------------------------------------------------------------------------------


def test_metadata_keeps_every_key_of_its_json(deployed):
    values = json.loads((deployed / "student/config.json").read_text())
    values |= {"format": 2, "my_own": {"note": [1, "a"]}, "metrics": {"val_top1": 50.0}}
    metadata = Metadata.from_json(values, "config.json")
    assert metadata.to_json() == values
    assert metadata.others == {"format": 2, "my_own": {"note": [1, "a"]}}
    assert read_config(deployed / "student").architecture == values["architecture"]


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "groups", "quota"), [
    ({"cpu.max": "150000 100000"}, "0::/", 1.5),
    ({"cpu.max": "max 100000"}, "0::/", math.inf),
    ({"cpu.max": "max 100000", "pod/a/cpu.max": "50000 100000"}, "0::/pod/a", 0.5),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/\n1:name=systemd:/", 2.0),
    ({"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/x", math.inf),
    ({"cpu.max": "garbage"}, "0::/", math.inf),
    ({}, "0::/", math.inf),
])  # fmt: skip
def test_the_cpu_quota_of_a_container_is_read(tmp_path, files, groups, quota):
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content + "\n")
    (tmp_path / "self").write_text(groups + "\n")
    assert cgroup_quota(tmp_path / "cgroup", tmp_path / "self") == quota


@pytest.mark.parametrize(("quota", "cpus"), [(0.2, 1), (1.5, 2), (math.inf, 8)])
def test_the_default_is_one_thread_for_each_usable_cpu_without_spinning(deployed, monkeypatch, quota, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(runtimes, "cgroup_quota", lambda: quota)
    assert usable_cpus() == cpus
    session = load(deployed / "student/student.onnx", device="cpu").call.args[0]
    options = session.get_session_options()
    assert options.intra_op_num_threads == cpus
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    session = load(deployed / "student/student.onnx", device="cpu", threads=3).call.args[0]
    assert session.get_session_options().intra_op_num_threads == 3

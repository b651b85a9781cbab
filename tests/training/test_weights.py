"""Test the weights that a run starts from, and the tools that open a finished student."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from huggingface_hub import ModelCard
from PIL import Image
from running import args_of, opened, refused, run
from safetensors.torch import load_file, save_file
from students import write_student
from torch.nn import functional as F

import train
from deploy import check, export, triton
from deploy.cli import UserError, command
from deploy.config import Metadata
from deploy.student import build_model, find_architecture, load_student
from kdlite import Teacher, WithWeakHead, nkd_loss
from kdlite.training.outputs import save_student
from kdlite.training.teacher_classes import match, pick_columns, warn_of_teacher
from kdlite.training.weights import (
    find_classifiers,
    find_new_classifiers,
    load_matching,
    load_teacher,
    open_student,
    read_weights,
    refuse_partial_patches,
)

MODELS = Path(__file__).parents[1].joinpath("own_models.py")
TEN = [f"class {i}" for i in range(10)]
SMALL = ["--device", "cpu", "--epochs", "1", "--batch-size", "8", "--workers", "0", "--crop", "none", "--lr", "0.01"]
PHOTOS = ["--data", "photos", "--val-split", "0.25"]  # flags for the photos fixture


@pytest.fixture(autouse=True)
def offline_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # block the network


@pytest.fixture
def photos(tmp_path):
    """Write folders of two classes, dark and bright, without a val/."""
    for name, low in (("dark", 0), ("bright", 120)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(16):
            pixels = np.random.default_rng(i).integers(low, low + 120, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return tmp_path / "photos"


def start(name, labels=2, size=(3, 32, 32), arguments=(), model_files=(), pretrained=False):
    labels = [f"label {i}" for i in range(labels)] if isinstance(labels, int) else labels
    images = {"mean": [0.5] * size[0], "std": [0.25] * size[0], "interpolation": "bilinear", "crop": 1.0}
    args = SimpleNamespace(model=str(name), model_args=arguments, small_stem=False, model_file=model_files)
    args.in_chans, *args.img_size = size
    return open_student(args, labels, images, pretrained)


def student_of(labels):
    return Metadata.from_json({
        "num_classes": len(labels), "label_names": labels, "mean": [0.5] * 3, "std": [0.5] * 3,
        "input_size": [3, 32, 32], "interpolation": "bilinear", "crop": 1.0,
    }, "the student")  # fmt: skip


# ---- ImageNet weights ----


@pytest.fixture
def imagenet_resnet(tmp_path):
    """Write a random ResNet-18 to the path of torchvision's download; return its weights."""
    state = torchvision.models.resnet18().state_dict()
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "resnet18-f37072fd.pth")
    return state


@pytest.mark.parametrize("name", ["pvt_v2_b0", "convnext_atto"])  # patches that overlap; no patches
def test_only_an_image_that_patches_would_cut_off_is_refused(name):
    refuse_partial_patches(timm.create_model(name), name, (3, 30, 30))
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 48))
    refuse_partial_patches(vit, "vit", (3, 32, 48))
    with pytest.raises(UserError, match="vit cuts an image into patches of 16 px: give --img-size 32 or 48, not 40"):
        refuse_partial_patches(vit, "vit", (3, 32, 40))


def test_weights_of_a_smaller_model_are_reported(imagenet_resnet):
    save_file({name: value.clone() for name, value in imagenet_resnet.items()}, "smaller.safetensors")
    _, _, report = start("resnet34", pretrained="smaller.safetensors")
    assert "new outside the classifier: 48 of 108. Are these the weights of another model?" in report


def test_pretrained_keeps_the_body_and_its_preprocessing_and_makes_a_new_head(imagenet_resnet):
    model, config, report = start("resnet18", pretrained=True)
    state = model.state_dict()
    for name, value in imagenet_resnet.items():
        assert name.startswith("fc.") or torch.equal(state[name], value)
    assert state["fc.weight"].shape == (2, 512)
    assert (config.mean, config.crop) == ([0.485, 0.456, 0.406], 0.875)
    assert "120 of 122 tensors loaded; new: fc.weight ([1000, 512] there), fc.bias" in report
    assert list(find_new_classifiers(model, 2)) == ["fc"]
    assert not state["fc.weight"].any()
    assert not state["fc.bias"].any()
    assert "mean [0.485, 0.456, 0.406]" in report


@pytest.mark.parametrize(("name", "report"), [
    ("resnet18", "put https://download.pytorch.org/models/resnet18-f37072fd.pth into {}/torch/hub/checkpoints"),
    ("fastvit_t8", "fetch its model.safetensors from https://huggingface.co/timm/fastvit_t8.apple_in1k"),
])  # fmt: skip
def test_weights_that_cannot_be_downloaded_are_refused_with_their_address(name, report, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=re.escape(report.format(tmp_path))) as raised:
        start(name, pretrained=True)
    assert "--pretrained FILE" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("flags", "report"), [
    (["--model", f"{MODELS}:tiny", "--pretrained"], "--pretrained without a value is for torchvision's"),
    (["--model", ".", "--pretrained"], "--pretrained is set: use one of them"),
    (["--pretrained", "x.pth"], "x.pth is neither a file of weights nor a student/ folder"),
    (["--model", "test_mambaout", "--pretrained", "--model-args", "pretrained=True"], "would load or fetch weights"),
    (["--teacher-classes", "x.csv"], "--teacher-classes needs --teacher"),
    (["--img-size", 1, 2, 3], "--img-size takes one number, or height and width"),
])  # fmt: skip
def test_a_mistake_prints_one_line(flags, report, capsys):
    run("--device", "cpu", *flags, check=2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert report in line
    assert not Path("runs").exists()


# ---- a file of weights ----


def test_a_file_with_two_sets_of_weights_loads_the_averaged_set_and_prints_its_name(capsys):
    model = torch.nn.Linear(2, 2)
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": averaged}, "both.pth")
    found, _ = read_weights("both.pth")
    torch.testing.assert_close(found, averaged)
    assert "both.pth holds state_dict_ema and state_dict: state_dict_ema is used" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["folder", "run", "safetensors", "pth", "wrapped", "half"])
def test_pretrained_loads_the_body_from_any_file_of_weights(how):
    donor = write_student(Path("donor/student"), f"{MODELS}:tiny", 32)
    weights = load_file(donor / "model.safetensors")
    torch.save(weights, "weights.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, "wrapped.pth")
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}, "half.pt"
    )
    file = {"folder": donor, "run": "donor", "safetensors": donor / "model.safetensors", "pth": "weights.pth",
            "wrapped": "wrapped.pth", "half": "half.pt"}[how]  # fmt: skip
    model, config, report = start(f"{MODELS}:tiny", pretrained=str(file))
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    for name, value in body.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)
    assert "new: fc.weight ([10, 16] there), fc.bias" in report
    assert config.mean == ([0.485, 0.456, 0.406] if how in ("folder", "run") else [0.5, 0.5, 0.5])


def test_a_file_of_library_weights_gets_the_preprocessing_of_the_library():
    """Use EfficientNet-Lite, whose mean and std are 0.5 instead of ImageNet's."""
    model = timm.create_model("tf_efficientnet_lite0")
    save_file(model.state_dict(), "lite0.safetensors")
    _, config, report = start("tf_efficientnet_lite0", pretrained="lite0.safetensors")
    assert (config.mean, config.std, config.crop) == ([0.5] * 3, [0.5] * 3, 0.875)
    assert config.interpolation == "bicubic"
    assert "preprocessing of these weights: mean [0.5, 0.5, 0.5]" in report


def test_a_file_for_a_model_without_library_weights_keeps_the_preprocessing_of_the_data():
    assert not timm.get_pretrained_cfg("mobilenetv2_035").has_weights
    donor = write_student(Path("donor"), "mobilenetv2_035", 32)
    _, config, report = start("mobilenetv2_035", pretrained=str(donor / "model.safetensors"))
    assert (config.mean, config.interpolation) == ([0.5] * 3, "bilinear")
    assert "new: classifier.weight" in report


def test_a_file_with_code_or_without_a_matching_tensor_is_refused():
    torch.save({"other.weight": torch.zeros(3)}, "other.pth")
    with pytest.raises(UserError, match=r"no tensor that fits .*: it has other.weight, ..., the model has lay"):
        start(f"{MODELS}:tiny", pretrained="other.pth")
    torch.save(torch.nn.Linear(2, 2), "module.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        start(f"{MODELS}:tiny", pretrained="module.pth")
    torch.save({"a.weight": torch.tensor([1.0, math.nan])}, "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: a\.weight has values that are not finite"):
        start(f"{MODELS}:tiny", pretrained="nan.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(UserError, match="holds no weights"):
        start(f"{MODELS}:tiny", pretrained="list.pth")


def vit(library, height, width):
    """Return a transformer of one block on patches of 16 pixels, and the name of its position embedding."""
    if library == "timm":
        model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(height, width), num_classes=2)
        return model, "pos_embed"
    return torchvision.models.VisionTransformer(height, 16, 1, 2, 32, 64, num_classes=2), "encoder.pos_embedding"


@pytest.mark.parametrize(("library", "height", "width"), [("timm", 32, 96), ("torchvision", 32, 32)])
def test_position_embeddings_are_resampled_to_another_size(library, height, width):
    donor, name = vit(library, 64, 64)
    model, _ = vit(library, height, width)
    donor.get_parameter(name).data.normal_()
    theirs = donor.state_dict()[name]
    report = load_matching(model, donor.state_dict(), "donor", 2, same_classes=True)
    grid = theirs[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    size = height // 16, width // 16
    expected = F.interpolate(grid, size, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.state_dict()[name], torch.cat([theirs[:, :1], expected], 1))
    assert report == f"donor: {len(donor.state_dict())} of {len(donor.state_dict())} tensors loaded"


@pytest.mark.parametrize(("name", "conv"), [("resnet18", "conv1.weight"), ("test_efficientnet", "conv_stem.weight")])
def test_a_model_of_grey_images_gets_the_sum_of_the_colour_filters(name, conv):
    write_student(Path("donor"), name, 32)
    model, config, _ = start(name, size=(1, 32, 32), pretrained="donor")
    expected = load_file("donor/model.safetensors")[conv].sum(1, keepdim=True)
    torch.testing.assert_close(model.state_dict()[conv], expected)
    assert config.input_size == [1, 32, 32]
    assert len(config.mean) == len(config.std) == 1


@pytest.mark.slow
def test_a_resume_does_not_read_the_pretrained_weights_again(photos, capsys):
    donor = write_student(Path("donor"), f"{MODELS}:tiny", 16)
    flags = [
        "--model",
        f"{MODELS}:tiny",
        "--img-size",
        16,
        "--data",
        photos,
        "--val-split",
        0.25,
        "--pretrained",
        donor,
    ]
    run(*SMALL, *flags, "--output", "out")
    first = Path("out/split.csv").read_text()
    shutil.rmtree(donor)
    resume = ["--resume", "--output", "out", "--model", f"{MODELS}:tiny"]
    run(*resume, "--val-split", 0.5, check=2)
    assert "--val-split was 0.25 when this run began" in capsys.readouterr().err
    run(*resume, "--epochs", 2)
    assert "resuming from out/last.pt" in capsys.readouterr().out
    assert json.loads(Path("out/student/config.json").read_text())["mean"] == [0.485, 0.456, 0.406]
    assert Path("out/split.csv").read_text() == first
    parts = [part for _, part in list(csv.reader(first.splitlines()))[1:]]
    assert (parts.count("train"), parts.count("val")) == (24, 8)


@pytest.mark.parametrize("labels", [["cat", "dog"], ["label 1", "label 0"]])
def test_a_classifier_of_other_classes_or_in_another_order_is_not_kept(labels):
    donor = write_student(Path("donor"), f"{MODELS}:tiny", 32, labels)
    model, _, report = start(f"{MODELS}:tiny", pretrained=str(donor))
    assert list(find_new_classifiers(model, 2)) == ["fc"]
    assert "fc.weight (of other classes there)" in report
    with pytest.raises(UserError, match=f"has other classes than --data, or another order: {labels[0]} there, label 0"):
        start(donor, model_files=[f"{MODELS}:tiny"])


def test_a_classifier_is_loaded_if_its_classes_are_equal_or_its_file_does_not_name_them(capsys):
    donor = write_student(Path("donor"), f"{MODELS}:tiny", 32, ["label 0", "label 1"])
    theirs = load_file(donor / "model.safetensors")
    for source, kept in ((donor, False), (donor / "model.safetensors", True)):
        model, _, report = start(f"{MODELS}:tiny", pretrained=str(source))
        torch.testing.assert_close(dict(model.state_dict()), theirs)
        assert ("the classifier is loaded too: check that it has the classes of --data" in report) == kept


def test_weights_of_a_model_with_another_stem_are_refused():
    donor = write_student(Path("donor"), "mobilenet_v2", 32)
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"small_stem": True}))
    with pytest.raises(UserError, match="--pretrained donor was trained with --small-stem: give --small-stem too"):
        start("mobilenet_v2", pretrained="donor")


class HeadFirst(torch.nn.Module):
    """Register the classifier before other layers with weights."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.gate = torch.nn.Linear(8, 3), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)


def test_the_classifier_is_the_linear_layer_with_an_output_for_each_class():
    assert list(find_classifiers(HeadFirst(), 3)) == ["fc"]
    assert find_classifiers(HeadFirst(), 5) == {}


@pytest.mark.parametrize("name", ["eval_tuple", "eval_softmax"])
def test_an_own_model_must_return_logits_in_eval_mode_too(name, capsys):
    line = refused(capsys, "--device", "cpu", "--model", f"{MODELS}:{name}", "--img-size", 16, "--output", "out")
    reason = "must return logits of shape (N, 10), got tuple" if name == "eval_tuple" else "returns probabilities"
    assert f"{name} in eval mode {reason}" in line
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_model_whose_layers_share_weights_is_trained_and_saved(photos):
    flags = ["--model", f"{MODELS}:tied", "--img-size", 16, "--reference", 0]
    run(*SMALL, *PHOTOS, *flags, "--output", "out")
    saved = load_file("out/student/model.safetensors")
    torch.testing.assert_close(saved["0.weight"], saved["2.weight"])


@pytest.mark.slow
def test_a_run_in_a_folder_with_the_name_of_its_model_is_resumed_by_the_same_command(photos, capsys):
    flags = [*SMALL, *PHOTOS, "--model", "test_efficientnet", "--img-size", 32, "--reference", 0, "--resume"]
    for epochs in (1, 2):
        run(*flags, "--epochs", epochs, "--output", "test_efficientnet")
    out = capsys.readouterr().out
    assert "resuming from test_efficientnet/last.pt" in out
    assert "test_efficientnet is the model of a library; ./test_efficientnet names the file or folder here" in out
    _, _, report = start("./test_efficientnet", ["bright", "dark"])
    assert report == "starts from the weights of the folder ./test_efficientnet"


# ---- a teacher with more classes ----


def test_the_attributes_of_an_own_teacher_are_printed_and_checked(capsys):
    teacher = load_teacher(f"{MODELS}:with_mean", student_of(["a", "b"]))
    assert (teacher.mean, teacher.std) == ([0.25] * 3, [0.5] * 3)
    assert "mean [0.25, 0.25, 0.25] (attributes of the model)" in capsys.readouterr().out
    with pytest.raises(UserError, match="the attributes of the model: input_size is 224; expected three whole numbers"):
        load_teacher(f"{MODELS}:with_input_size", student_of(["a", "b"]))


CLASSES = ["n01440764", "n02123045", "n07753592"]  # tench, tabby, banana


def logits_of(teacher, images):
    columns = teacher.columns
    with torch.no_grad():
        return Teacher(teacher.model, columns=columns)(images)


@pytest.mark.parametrize("labels", [
    CLASSES, ["tench", "tabby_cat", "Banana"], ["Tinca tinca", "tabby cat", "banana"],
])  # fmt: skip
def test_an_imagenet_teachers_columns_are_found_by_wordnet_id_or_by_name(imagenet_resnet, labels):
    teacher = load_teacher("resnet18", student_of(labels))
    assert teacher.columns == [0, 281, 954]
    report, _, guesses = teacher.report.partition("by name")
    assert report == "teacher resnet18: 3 of its 1000 classes match --data "
    if labels == CLASSES:
        assert guesses == ""
    else:
        assert f"{labels[0]} = n01440764 (tench, tinca tinca), " in guesses
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = teacher.model(images)
    torch.testing.assert_close(logits_of(teacher, images), whole[:, [0, 281, 954]])


def test_nkd_renormalises_over_the_columns():
    student, teacher, target = torch.randn(4, 3), torch.randn(4, 10), torch.tensor([0, 1, 2, 0])
    narrowed = Teacher(torch.nn.Identity(), columns=[7, 2, 5])(teacher)
    probs = teacher.softmax(1)[:, [7, 2, 5]]
    expected = nkd_loss(student, (probs / probs.sum(1, keepdim=True)).log(), target)
    torch.testing.assert_close(nkd_loss(student, narrowed, target), expected)


@pytest.mark.parametrize(("labels", "report"), [
    (["tench", "unicorn"], "lacks 1 of --data's 2 classes: unicorn; give the teacher's names"),
    (["tench", "crane"], r"several classes with the name crane: n02012849 \(134\), n03126707 \(517\)"),
    (["tench", "Tinca tinca"], "has one class for tench and Tinca tinca"),
    (["Tench", "tench"], "has one class for Tench and tench"),
])  # fmt: skip
def test_a_missing_or_ambiguous_class_is_refused_by_name(labels, report):
    with pytest.raises(UserError, match=report):
        match(labels, timm.data.ImageNetInfo().label_names(), "resnet18")


def test_a_teacher_may_have_the_classes_in_another_order(photos, capsys):
    write_student(Path("teacher"), f"{MODELS}:tiny", 16, ["owl", "dark", "bright"])
    run(*SMALL, "--data", photos, "--val-split", 0.25, "--model", f"{MODELS}:tiny", "--img-size", 16, "--kd", "nkd",
        "--teacher", "teacher", "--model-file", f"{MODELS}:tiny", "--output", "out")  # fmt: skip
    assert "2 of its 3 classes match --data by name" in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_reads_its_weights_and_its_classes_from_files(tmp_path):
    model = torchvision.models.resnet18(num_classes=12).half()
    torch.save(model.state_dict(), "resnet.pth")
    student = student_of(["a", "b"])
    with pytest.raises(UserError, match="has 12 classes without names, but --data has 2: give the teacher"):
        load_teacher("resnet18:resnet.pth", student)
    Path("classes.csv").write_text("b,3\na,11\n")
    teacher = load_teacher("resnet18:resnet.pth", student, classes_file="classes.csv")
    assert teacher.columns == [11, 3]
    torch.testing.assert_close(teacher.model.fc.weight, model.fc.weight.float())
    for text, report in (
        ("a,1\n", "lacks 1 classes of --data: b"),
        ("a,1\nb,12\n", "column 12"),
        ("a\nb,1\n", "'a'; exp"),
        ("a,1\nb,cat\n", "names of --teacher .* are unknown, so cat cannot be found; give columns, from 0 to 11"),
        ("a,1\nb,1\n", "gives a and b the same class"),
        ("a,1\nb,2\na,3\n", "has a twice"),
        ("a,1\nb,2\nc,3\n", "classes that --data does not have: c"),
    ):
        Path("classes.csv").write_text(text)
        with pytest.raises(UserError, match=report):
            load_teacher("resnet18:resnet.pth", student, classes_file="classes.csv")


def test_class_names_that_match_by_another_name_are_printed():
    _, report = pick_columns("t", ["n03793489", "n02123045"], 2, ["mouse", "n02123045"], None)
    assert report.endswith("match --data by name: mouse = n03793489 (mouse, computer mouse)")


def test_a_number_in_the_classes_file_is_a_name_if_the_teacher_has_that_name(tmp_path):
    """Sort the teacher's classes 0 to 10 as strings, so that its column 2 is the class 10."""
    names = sorted(map(str, range(11)))
    (tmp_path / "classes.csv").write_text("".join(f"{name},{name}\n" for name in names))
    columns, _ = pick_columns("t", names, 11, names, str(tmp_path / "classes.csv"))
    assert columns == list(range(11))
    columns, _ = pick_columns("t", None, 11, names, str(tmp_path / "classes.csv"))
    assert columns == [int(name) for name in names]


@pytest.mark.parametrize(("predictions", "classes", "warned"), [
    ([0, 1] * 50, 2, None), ([0, 1] * 49 + [1, 0], 2, None), ([1, 0] * 50, 2, "in another order"),
    ([int(str(i)[::-1]) if i > 9 else i for i in range(20)] * 5, 92, None), ([0] * 100, 2, "not better than chance"),
    ([(i + 3) % 10 for i in range(10)] * 10, 10, "in another order"), ([0] * 100, 10, "not better than chance"),
])  # fmt: skip
def test_a_warning_is_printed_for_a_poor_teacher_or_another_order_of_its_classes(predictions, classes, warned, capsys):
    labels = np.arange(100) % (classes if classes <= 10 else 20)
    warn_of_teacher(labels, np.array(predictions), classes)
    err = capsys.readouterr().err
    assert warned in err if warned else not err


# ---- grey and oblong images ----


@pytest.mark.slow
def test_grey_and_oblong_images_train_export_and_pass_the_check(photos):
    model = ["--model", "test_efficientnet", "--in-chans", 1, "--img-size", 32, 64]
    run(*SMALL, *PHOTOS, *model, "--output", "out")
    config = json.loads(Path("out/student/config.json").read_text())
    assert config["input_size"] == [1, 32, 64]
    of_data = ["out", "--images", "photos"]
    for module, flags in ((export, ["out", "--format", "onnx"]), (check, ["out"]), (check, of_data),
                          (triton, ["out/student/student.onnx"])):  # fmt: skip
        assert command(module.get_parser(), module.run, flags) == 0
    (image,) = onnx.load("out/student/student.onnx").graph.input
    assert [d.dim_value or d.dim_param for d in image.type.tensor_type.shape.dim][1:] == [32, 64, 1]
    assert "dims: [32, 64, 1]" in Path("models/student/config.pbtxt").read_text()


# ---- fine-tuning ----


@pytest.mark.parametrize("wrapped", [False, True])
def test_layer_decay_scales_the_layers_with_and_without_a_weak_head(wrapped):
    """Check that the first layer has the lowest rate, and both heads the full rate."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    net = WithWeakHead(model, "norm", 5, example_input=torch.zeros(2, 3, 32, 32)) if wrapped else model
    flags = ["--opt", "adamw", "--lr", 1e-3, "--weight-decay", 0.05, "--epochs", 1, "--layer-decay", 0.5]
    optimizer = train.build_optimizer(net, args_of(*flags))
    names = {parameter: name for name, parameter in net.named_parameters()}
    scales = {
        names[p].removeprefix("model."): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]
    }
    assert scales["patch_embed.proj.weight"] < scales["blocks.0.mlp.fc1.weight"] < scales["blocks.1.mlp.fc1.weight"]
    assert scales["blocks.1.mlp.fc1.weight"] == 2 * scales["blocks.0.mlp.fc1.weight"]
    assert scales["head.weight"] == 1
    assert all(scale == 1 for name, scale in scales.items() if "weak" in name)


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_multiply_the_losses_of_each_image(soft):
    logits, teacher = (torch.randn(6, 3, dtype=torch.float64) for _ in range(2))
    target, weights = torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    if soft:
        target = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    whole = train.loss_terms(train.Method("nkd", class_weights=weights), logits, None, teacher, target)
    rows = weights[target] if not soft else target @ weights
    for name, value in whole.items():
        rows_of = [[x[i : i + 1] for x in (logits, teacher, target)] for i in range(6)]
        each = [train.loss_terms(train.Method("nkd"), s, None, t, y)[name] for s, t, y in rows_of]
        torch.testing.assert_close(value, (rows * torch.stack(each)).mean())


def test_class_weights_are_printed_and_a_missing_file_is_refused(photos, capsys):
    for file in sorted((photos / "dark").iterdir())[:8]:
        file.unlink()
    flags = [*SMALL, *PHOTOS, "--model", f"{MODELS}:tiny", "--img-size", 16, "--reference", 0]
    run(*flags, "--class-weights", "balanced", "--output", "out")
    assert "class weights, balanced: 0.75 to 1.5" in capsys.readouterr().out
    run(*flags, "--class-weights", "nothing.csv", "--output", "other", check=2)
    assert "expected balanced, or a CSV file" in capsys.readouterr().err


# ---- a finished student ----


@pytest.mark.parametrize(("name", "arguments", "size"), [
    ("vit_tiny_patch16_224", ["depth=1"], (1, 32, 64)), ("test_efficientnet", [], (3, 32, 32)),
    ("mobilenet_v2", ["width_mult=0.25"], (3, 32, 32)),
])  # fmt: skip
def test_the_code_in_the_model_card_opens_the_student_without_kdlite(name, arguments, size):
    """Run the code of the card, which does not import kdlite, and compare the logits."""
    student = write_student(Path("student"), name, size, arguments=arguments)
    (code,) = re.findall(r"```python\n(.*?)```", (student / "README.md").read_text(), re.S)
    assert "kdlite" not in code
    theirs: dict = {}
    exec(code, theirs)
    ours, _ = load_student(student)
    images = torch.randn(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(theirs["model"](images), ours.eval()(images))


def test_a_model_card_omits_code_that_would_fail():
    """Use grey images, for which torchvision's models have no argument."""
    student = write_student(Path("student"), "mobilenet_v2", (1, 32, 32), arguments=["width_mult=0.25"])
    assert "```" not in (student / "README.md").read_text()


def test_the_hub_reads_the_model_card_and_a_user_may_replace_it():
    student = write_student(Path("student"), "test_efficientnet", 32, ["chêne", 'a "b": c', "-"])
    card = ModelCard.load(student / "README.md")
    assert card.data.to_dict()["library_name"] == "timm"
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"
    assert "test_efficientnet, 3 classes" in card.text
    (student / "README.md").write_text("mine")
    model, config = load_student(student)
    save_student(student, model, config)
    assert (student / "README.md").read_text() == "mine"


def test_a_folder_of_an_earlier_kdlite_is_still_read():
    student = write_student(Path("student"), "test_efficientnet", 32)
    config = json.loads((student / "config.json").read_text())
    new = {key: config.pop(key) for key in ("library", "architecture", "model_args", "small_stem")}
    config["architecture"] = {"library": new["library"], "name": new["architecture"], "args": {}, "small_stem": False}
    (student / "config.json").write_text(json.dumps(config))
    model, read = load_student(student)
    assert read.architecture == "test_efficientnet"
    assert isinstance(model, torch.nn.Module)


def test_half_precision_weights_of_a_user_model_are_cast_to_float32(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef build(num_classes):\n    return torch.nn.Linear(12, 3).half()\n"
    )
    model = build_model(find_architecture("mine.py:build"), 3, 2, ["mine.py:build"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_defaults_are_fitted_to_a_data_folder_and_a_resume_keeps_them(photos, capsys):
    flags = ["--device", "cpu", "--data", photos, "--val-split", 0.25, "--model", f"{MODELS}:tiny", "--reference", 0]
    run(*flags, "--epochs", 1, "--workers", 0, "--output", "out")
    first, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("defaults for")]
    assert "defaults for 24 images of 2 classes, 40x24 pixels" in first
    resume = ["--output", "out", "--resume", "--model", f"{MODELS}:tiny"]
    before = args_of(*resume)
    assert (before.recipe, before.img_size, before.opt) == ("fitted", [32, 32], "adamw")
    for i in range(100):
        shutil.copy(photos / "dark/00.png", photos / f"dark/new{i}.png")
    assert args_of(*resume).batch_size == before.batch_size
    assert args_of(*resume, "--batch-size", 4).batch_size == 4


def test_the_split_is_the_same_for_every_seed(photos):
    """Check that a teacher with another seed does not train on the student's validation images."""
    splits = [opened(*SMALL, *PHOTOS, "--model", f"{MODELS}:tiny", "--seed", seed)[2].split for seed in (0, 1)]
    assert splits[0] == splits[1]


def test_the_img_size_flag_sets_the_stem_and_the_crop(photos):
    flags = ["--device", "cpu", *PHOTOS, "--model", "resnet18"]
    assert args_of(*flags).small_stem
    large = args_of(*flags, "--img-size", 224)
    assert (large.small_stem, large.crop, large.eval_crop) == (False, "resized", 0.875)


def test_a_student_folder_sets_the_image_size(photos):
    write_student(Path("before"), "test_efficientnet", (1, 32, 64), ["dark", "bright"])
    args = args_of("--model", "before", "--data", photos, "--val-split", 0.25)
    assert (args.in_chans, args.img_size) == (1, [32, 64])


def test_data_without_a_val_folder_requires_val_split(photos, capsys):
    run("--device", "cpu", "--data", photos, check=2)
    assert "--val-split 0.1" in capsys.readouterr().err
    assert opened("--data", photos, "--val-split", 0.25)

"""Test train.py with small runs in this process and with runs of the script in new processes."""

import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_script
from PIL import Image
from running import args_of, opened, refused, rows, run
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import train
from deploy import cli, predict, run_directory
from deploy.cli import UserError, command
from deploy.preprocess import open_image, prepare, to_rgb
from deploy.reference import read_reference
from deploy.student import build_model, find_architecture, load_student
from kdlite import Teacher
from kdlite.training import checkpoint, loading
from kdlite.training.data import Digits, open_data
from kdlite.training.weights import settle_batch_norm

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TINY = ["--device", "cpu", "--model", f"{MODELS}:tiny", "--epochs", "1", "--img-size", "16"]
OWN = ["--model-file", f"{MODELS}:tiny"]  # for a student/ folder of that model
RESUME = ["--output", "out", "--resume", "--model", f"{MODELS}:tiny"]  # a resume requires the model file again


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path):
    """Write crops of scikit-learn's two photographs, one class each: 48 to train, 17 to validate."""
    for name, photo in zip(("china", "flower"), load_sample_images().images):
        for part, count in (("train", 24), ("val", 9 if name == "china" else 8)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                top, left = 15 * i, 20 * i
                crop = Image.fromarray(photo[top : top + 64, left : left + 80])
                crop.save(folder / f"{i}.jpg")
    return tmp_path / "photos"


def script(*flags, command=(sys.executable,), env=None, **options):
    """Run train.py in a new process, as a user does."""
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        timeout=500,
        **options,
    )


def same_weights(a, b):
    a, b = load_file(Path(a) / "student/model.safetensors"), load_file(Path(b) / "student/model.safetensors")
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- a run and its files ----


@pytest.mark.trial
def test_the_torchrun_command_trains_the_digits_in_an_empty_folder(tmp_path):
    whole = script("--self-kd", "uskd", "--model", "mobilenet_v2", command=TORCHRUN)
    assert whole.returncode == 0, whole.stderr
    assert len(re.findall(r"^epoch \d+/10 ", whole.stdout, re.M)) == 10
    assert float(rows(tmp_path / "runs/001-mobilenet_v2-uskd")[-1]["val_top1"]) >= 90


@pytest.mark.slow
@pytest.mark.whole_runs
def test_a_run_directory_holds_every_documented_file():
    run(*TINY, "--self-kd", "uskd", "--epochs", 2, "--output", "out")
    names = {p.name for p in Path("out").iterdir() if not p.name.startswith("events.out")}
    assert names == {
        "args.json", "metrics.csv", "curves.png", "log.txt", "last.pt", "previous.pt", "best.pt", "reference.npz",
        "batch.png", "per_class.csv", "confusion.png", "student", ".lock",
    }  # fmt: skip
    assert list(Path("out").glob("events.out.tfevents.*"))
    assert {p.name for p in Path("out/student").iterdir()} == {"model.safetensors", "config.json", "README.md"}

    assert [row["epoch"] for row in rows("out")] == ["1", "2"]
    assert list(rows("out")[0]) == [
        "epoch", "train_loss", "loss_ce", "loss_uskd", "val_loss", "val_top1", "val_top5", "lr", "skipped_steps",
        "images_per_s", "seconds", "memory_mib",
    ]  # fmt: skip
    about = json.loads(Path("out/args.json").read_text())
    assert about["flags"]["self_kd"] == "uskd"
    assert torch.backends.cpu.get_cpu_capability() in about["hardware"]["device"]
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert Image.open("out/curves.png").size[0] > 500

    state = torch.load("out/last.pt", weights_only=True)
    assert any(name.startswith("head.") for name in state["model"])  # a resume trains the head further
    config = json.loads(Path("out/student/config.json").read_text())
    assert config["label_names"] == [str(i) for i in range(10)]
    assert config["input_size"] == [3, 16, 16]
    student, _ = load_student(Path("out/student"), OWN[1:])
    assert not any("head" in name for name in student.state_dict())


def accuracy(output, photos):
    """Return a saved student's top-1, measured image by image on photos/val, and the top-1 in its config.json."""
    student, config = load_student(Path(output) / "student", OWN[1:])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    files = sorted((photos / "val").glob("*/*.jpg"))
    assert len(files) == 17
    hits = 0
    for file in files:
        image = torch.from_numpy(prepare(open_image(file), config).transpose(2, 0, 1) / np.float32(255))
        image = (image - mean) / std
        with torch.no_grad():
            hits += config.label_names[student.eval()(image[None]).argmax()] == file.parent.name
    return 100 * hits / 17, config.metrics["val_top1"]


@pytest.mark.slow
def test_a_loaded_student_has_the_accuracy_in_its_config(photos):
    run(*TINY, "--data", photos, "--batch-size", 8, "--epochs", 2, "--ema-decay", 0.5, "--output", "out")
    measured, saved = accuracy("out", photos)
    assert measured == pytest.approx(saved)


@pytest.mark.slow
def test_data_loading_processes_are_not_forks_of_the_training_process(photos):
    # A fork inherits the locks of other threads. Its garbage collector destroys the objects that it inherits.
    forked = Path("forked").absolute()
    os.register_at_fork(after_in_child=forked.touch)
    run(*TINY, "--data", photos, "--batch-size", 8, "--workers", 2, "--output", "out")
    assert not forked.exists()


@pytest.mark.slow
def test_predict_reaches_the_accuracy_of_the_saved_student(photos, capsys):
    run(*TINY, "--data", photos, "--batch-size", 8, "--epochs", 2, "--output", "out")
    capsys.readouterr()
    files = sorted(map(str, (photos / "val").glob("*/*.jpg")))
    assert command(predict.get_parser(), predict.run, ["out/student", *files, *OWN]) == 0
    answers = re.findall(r"/val/(\w+)/\d+.jpg: (\w+) [\d.]+%, \w+ [\d.]+%$", capsys.readouterr().out, re.M)
    assert 100 * sum(truth == first for truth, first in answers) / 17 == pytest.approx(accuracy("out", photos)[0])


@pytest.mark.slow
def test_a_run_finishes_without_a_reference_if_its_image_is_unreadable(photos, capfd):
    (photos / "val/china/0.jpg").write_bytes(b"no image")  # it is the only image in the reference
    run(*TINY, "--data", photos, "--batch-size", 8, "--workers", 0, "--reference", 1, "--output", "out")
    assert "no reference.npz: none of the validation images can be read" in capfd.readouterr().out


@pytest.mark.slow
def test_the_reference_flag_sets_the_number_of_reference_images():
    run(*TINY, "--reference", 5, "--output", "out")
    assert len(read_reference(Path("out/student"), None, "").train_images) == 5
    run(*RESUME, "--reference", 9)  # a finished run writes the file again
    assert len(read_reference(Path("out/student"), None, "").images) == 9
    run(*TINY, "--reference", 0, "--output", "none")
    assert not Path("none/reference.npz").exists()


# ---- distillation ----


@pytest.mark.slow
def test_the_losses_are_added_to_the_cross_entropy():
    run(*TINY, "--output", "teacher")
    args = ["--kd", "nkd", "--teacher", "teacher/student", *OWN, "--self-kd", "uskd"]
    run(*TINY, *args, "--output", "out")
    row = rows("out")[0]
    assert float(row["train_loss"]) == pytest.approx(
        sum(float(row[name]) for name in ("loss_ce", "loss_nkd", "loss_uskd")), rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("squeezenet1_1", "test_resnet.r160_in1k"),  # student of torchvision, teacher of timm
        pytest.param("test_vit.r160_in1k", "shufflenet_v2_x0_5", marks=pytest.mark.trial),  # timm, torchvision
        pytest.param(f"{MODELS}:tiny", "test_convnext.r160_in1k", marks=pytest.mark.trial),  # user, timm
        pytest.param("mnasnet0_5", f"{MODELS}:tiny", marks=pytest.mark.trial),  # torchvision, user
    ],
)
@pytest.mark.parametrize("method", ["nkd", pytest.param("kd", marks=pytest.mark.trial)])
def test_any_student_learns_from_any_teacher(student, teacher, method):
    short = ["--device", "cpu", "--epochs", 1, "--batch-size", 64, "--workers", 0]
    if teacher.endswith(":tiny"):
        source, size = teacher, 32
    else:  # the teacher has another image size
        run(*short, "--model", teacher, "--img-size", 48, "--output", "teacher")
        source, size = "teacher/student", 32
    run(*short, "--model", student, "--img-size", size, "--kd", method, "--teacher", source, "--output", "out")
    assert np.isfinite(float(rows("out")[0][f"loss_{method}"]))


def test_the_teacher_stays_frozen_in_eval_mode_and_gets_its_own_normalisation_and_size():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    model[1].running_mean.normal_()
    student = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    teacher = Teacher(model, mean, std, student["mean"], student["std"], (8, 8))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    pixels = torch.rand(2, 3, 8, 8)

    def normalise(x, mean, std):
        return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    before = model[1].running_mean.clone()
    logits = teacher(normalise(pixels, **student))
    assert not logits.requires_grad
    assert torch.equal(model[1].running_mean, before)
    torch.testing.assert_close(logits, model(normalise(pixels, mean, std)), rtol=1e-4, atol=1e-5)
    larger = torch.nn.functional.interpolate(pixels, (16, 16), mode="nearest")
    assert teacher(normalise(larger, **student)).shape == (2, 5)


def test_the_teachers_classes_are_compared_before_a_download(capsys):
    for name in ("resnet34", "deit3_small_patch16_224.fb_in1k"):
        line = refused(capsys, *TINY, "--kd", "nkd", "--teacher", name)
        assert f"--teacher {name} lacks 10 of --data's 10 classes: 0, 1, 2" in line


# ---- flags together and alone ----


@pytest.mark.slow
def test_augmentation_schedule_and_precision_flags_work_together(photos):
    everything = [
        "--data", photos, "--recipe", "imagenet-vit", "--img-size", 32, "--batch-size", 16, "--grad-accum", 2,
        "--warmup-epochs", 1, "--epochs", 3, "--clip-grad", 1, "--ema-decay", 0.9, "--workers", 1, "--amp", "bf16",
        "--self-kd", "uskd", "--model", "test_vit.r160_in1k", "--model-args", "drop_path_rate=0.1", "--device", "cpu",
        "--kd", "nkd", "--teacher", f"{MODELS}:tiny",
    ]  # fmt: skip
    run(*everything, "--output", "out")
    assert [row["skipped_steps"] for row in rows("out")] == ["0"] * 3
    assert json.loads(Path("out/student/config.json").read_text())["model_args"] == {
        "img_size": 32,
        "drop_path_rate": 0.1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.trial)])
def test_a_compiled_student_is_saved_with_the_plain_parameter_names(backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run(*TINY, "--compile", "--self-kd", "uskd", "--kd", "nkd", "--teacher", f"{MODELS}:tiny", "--output", "out")
    state = torch.load("out/last.pt", weights_only=True)
    assert not any("_orig_mod" in name for name in state["model"])


@pytest.mark.slow
@pytest.mark.whole_runs
def test_an_fp16_run_counts_the_steps_that_the_scaler_skips(monkeypatch, capsys):
    """Start with a scale of 2^40, which overflows fp16 gradients; each skipped step halves it."""
    monkeypatch.setattr(train, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    run(*TINY, "--device", "cpu", "--amp", "fp16", "--output", "out")
    skipped = int(rows("out")[0]["skipped_steps"])
    assert 10 <= skipped <= 40  # 44 steps in all
    state = torch.load("out/last.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0 ** (40 - skipped)
    assert f"{skipped} steps skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_the_step_and_cosine_schedules_set_the_learning_rate():
    fast = [*TINY, "--batch-size", 40, "--epochs", 4, "--warmup-epochs", 0, "--lr", 0.1]
    run(*fast, "--schedule", "step", "--recipe", "imagenet-cnn", *TINY[4:], "--epochs", 4, "--output", "step")
    assert [float(row["lr"]) for row in rows("step")] == pytest.approx(
        [0.1, 0.01, 0.01, 0.001]
    )  # the rate falls at steps 6, 12, 18 of 20
    run(*fast, "--schedule", "cosine", "--output", "cosine")
    cosine = [0.05 * (1 + np.cos(np.pi * t / 4)) for t in range(4)]
    assert [float(row["lr"]) for row in rows("cosine")] == pytest.approx(cosine, rel=1e-5)


def test_a_recipe_scales_its_milestones_to_the_number_of_epochs():
    args = args_of("--recipe", "cifar", "--epochs", "20")
    assert args.step_epochs == [6, 12, 16]
    assert args_of("--epochs", "3").warmup_epochs == pytest.approx(0.3)


@pytest.mark.slow
def test_a_resume_with_more_epochs_computes_the_values_of_the_recipe_again():
    run(*TINY, "--recipe", "cifar", "--epochs", 1, "--output", "out")
    args, given, _ = opened(*RESUME, "--epochs", 20)
    assert (args.step_epochs, args.lr, args.img_size) == ([6, 12, 16], 0.1, [16, 16])
    assert given == {"device": "cpu", "model": f"{MODELS}:tiny", "img_size": [16], "recipe": "cifar", "epochs": 20}


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "message"), [
    (["--weight-decay", 0], "other groups of parameters"),
    (["--opt", "momentum"], "saved with --opt adamw, not momentum"),
])  # fmt: skip
def test_a_resume_with_another_optimizer_is_refused(flags, message, capsys):
    run(*TINY, "--output", "out")
    capsys.readouterr()
    assert message in refused(capsys, *RESUME, "--epochs", 2, *flags)


@pytest.mark.slow
def test_a_resumed_run_logs_each_epoch_once():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(*TINY, "--epochs", 2, "--output", "out")
    run(*RESUME, "--epochs", 3)
    board = EventAccumulator("out")
    board.Reload()
    assert [event.step for event in board.Scalars("val_top1")] == [1, 2, 3]


def test_runs_started_at_the_same_time_get_different_numbers():
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda i: run_directory.claim(None, f"model{i % 4}", "ce"), range(40)))
    assert len({folder.name[:3] for folder in claimed}) == 40
    assert {folder.name for folder in claimed} == {folder.name for folder in Path("runs").iterdir()}


@pytest.mark.slow
def test_gradient_accumulation_takes_the_same_steps_as_a_whole_batch():
    same = [
        *TINY[:2],
        "--model",
        f"{MODELS}:linear",
        "--epochs",
        1,
        "--img-size",
        16,
        "--opt",
        "momentum",
        "--lr",
        0.01,
    ]
    run(*same, "--batch-size", 64, "--output", "whole")
    run(*same, "--batch-size", 64, "--grad-accum", 4, "--output", "parts")
    a, b = (load_file(f"{out}/student/model.safetensors")["1.weight"] for out in ("whole", "parts"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "times"), [("resnet18", 4), ("mobilenet_v2", 2), ("shufflenet_v2_x0_5", 4)])
def test_the_small_stem_keeps_a_higher_resolution(name, times):
    def last_size(*flags):
        model = build_model(find_architecture(name, small_stem="--small-stem" in flags), 10, 32)
        sizes = []
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda m, a, out: sizes.append(out.shape[-1]))
        model.eval()(torch.zeros(1, 3, 32, 32))
        return sizes[-1]

    assert last_size("--small-stem") == times * last_size()


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.whole_runs
def test_a_training_step_does_not_wait_for_the_device():
    """Compare a short and a long run, which must read a device value on the host equally often."""
    reads = []
    for batch_size in (256, 64):
        with HostReads() as mode:
            run(*TINY, "--batch-size", batch_size, "--workers", 1, "--self-kd", "uskd", "--kd", "nkd", "--teacher",
                f"{MODELS}:tiny", "--clip-grad", 5, "--opt", "momentum", "--output", f"out{batch_size}")  # fmt: skip
        reads.append(mode.count)
    assert reads[0] == reads[1]


# ---- data ----


def test_an_augmentation_depends_on_seed_epoch_and_sample_only(photos):
    source = open_data(str(photos)).train
    view = loading.View((3, 32, 32), "resized", 0.5, "bilinear").transform()
    samples = loading.Samples(source, view, seed=1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = samples[0, 5][0]
    assert torch.equal(torch.get_rng_state(), before)
    samples[0, 6]
    assert torch.equal(samples[0, 5][0], first)
    assert not torch.equal(samples[1, 5][0], first)
    assert not torch.equal(loading.Samples(source, view, seed=2)[0, 5][0], first)


def test_ranks_share_a_shuffle_that_changes_with_epoch_and_seed():
    def indices(rank, epoch, seed=0):
        sampler = loading.EpochSampler(range(10), 2, rank, seed=seed, drop_last=True)
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch}
        return [i for _, i in pairs]

    assert sorted(indices(0, 0) + indices(1, 0)) == list(range(10))
    assert indices(0, 0) != indices(0, 1)
    assert indices(0, 0) != indices(0, 0, seed=1)


def test_hidden_files_are_ignored_and_files_that_are_not_images_are_counted(photos, capsys):
    jpeg = (photos / "train/china/0.jpg").read_bytes()
    for part in ("train", "val"):
        for name in (
            ".ipynb_checkpoints/0.jpg",
            "china/.ipynb_checkpoints/0.jpg",
            "china/._0.jpg",
            "flower/.hidden.jpg",
        ):
            (photos / part / name).parent.mkdir(exist_ok=True)
            (photos / part / name).write_bytes(jpeg)
    for name in ("a.txt", "b.TXT", "c", "d.heic"):
        (photos / "train/flower" / name).write_bytes(b"")
    data = open_data(str(photos))
    assert data.label_names == ["china", "flower"]
    assert (len(data.train), len(data.val)) == (48, 17)
    printed = capsys.readouterr().out
    assert f"{photos}/train: skipped 4 files without the extension of an image: 2 .txt" in printed
    assert "1 without ending" in printed
    assert "1 .heic" in printed
    assert "/val" not in printed


@pytest.mark.parametrize(("ending", "kind"), [("jfif", "JPEG"), ("gif", "GIF"), ("avif", "AVIF"), ("JPG", "JPEG")])
def test_images_with_rare_extensions_are_read(photos, ending, kind):
    Image.open(photos / "train/china/0.jpg").save(photos / f"train/china/new.{ending}", kind)
    data = open_data(str(photos)).train
    assert len(data) == 49
    (index,) = (i for i, (path, _) in enumerate(data.samples) if "new" in path)
    assert to_rgb(data[index][0]).size == (80, 64)


@pytest.mark.slow
def test_a_pipe_among_the_images_is_skipped_and_its_name_printed(photos, capfd):
    os.mkfifo(photos / "train/china/pipe.jpg")
    run(*TINY, "--data", photos, "--batch-size", 8, "--workers", 0, "--output", "out")
    assert re.search(r"skipped a corrupt image .*china/pipe.jpg: .*not a regular file", capfd.readouterr().err)


def test_a_tilde_after_an_equals_sign_expands_to_the_home_folder(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    assert args_of("--data=~/photos").data == str(photos)
    (photos.parent / "mine.py").write_text("def build(num_classes): ...")
    assert args_of("--model=~/mine.py:build").model == f"{photos.parent}/mine.py:build"


@pytest.mark.trial
def test_a_class_name_with_an_accent_is_stored_as_utf8_in_any_locale(photos):
    for part in ("train", "val"):
        (photos / part / "china").rename(photos / part / "chiné")
    result = script(*TINY, "--data", photos, "--batch-size", 8, "--workers", 0, "--output", "out",
                    env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(Path("out/student/config.json").read_text())["label_names"] == ["chiné", "flower"]


# ---- user models ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weight_normed", "lazy"])
def test_a_model_with_lazy_layers_or_without_deepcopy_is_trained(name, capsys):
    run(*TINY, "--model", f"{MODELS}:{name}", "--output", "out")
    student, _ = load_student(Path("out/student"), [f"{MODELS}:{name}"])
    assert sum(p.numel() for p in student.parameters()) > 100
    run(*TINY, "--model", f"{MODELS}:{name}", "--ema-decay", 0.9, "--output", "ema")


@pytest.mark.slow
def test_a_model_in_several_files_with_a_dataclass_is_built(tmp_path):
    (tmp_path / "pieces_of_mine.py").write_text("width = 8\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "from pieces_of_mine import width\n\n@dataclass\nclass Config:\n    width: int = width\n\n"
        "def build(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, Config().width),"
        " nn.Linear(8, num_classes))\n"
    )
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    run(*TINY, "--model", tmp_path / "mine.py:build", "--output", "out")


@pytest.mark.slow
def test_a_student_never_runs_the_code_that_its_config_names(tmp_path, capsys):
    run(*TINY, "--output", "out")
    evil = tmp_path / "out/student/own_models.py"
    evil.write_text("from pathlib import Path\nPath('ran').touch()\ndef tiny(num_classes): ...\n")
    config = json.loads(Path("out/student/config.json").read_text())
    assert config["architecture"] == "own_models.py:tiny"  # without a path of this machine
    for name in ("own_models.py:tiny", str(evil) + ":tiny"):
        config["architecture"] = name
        Path("out/student/config.json").write_text(json.dumps(config))
        for flags in (["--model", "out/student"], ["--kd", "nkd", "--teacher", "out/student"]):
            line = refused(capsys, "--device", "cpu", "--img-size", 16, *flags)
            assert "which runs only if you name the file: --model-file path/to/" in line
    run("--device", "cpu", "--img-size", 16, "--epochs", 1, "--model", "out/student", *OWN, "--output", "again")
    assert not Path("ran").exists()


def test_a_short_run_raises_the_momentum_of_slow_batch_norms(capsys):
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=0.01), torch.nn.BatchNorm2d(3))
    assert "momentum 0.01 is too slow for 90 steps: raised to 0.097" in settle_batch_norm(net, 90)
    assert (1 - net[0].momentum) ** 90 == pytest.approx(1e-4)
    assert net[1].momentum == 0.1  # this momentum is high enough
    assert settle_batch_norm(net, 90) is None


# ---- the teacher's own accuracy ----


@pytest.mark.slow
def test_a_run_prints_the_teachers_accuracy_first_and_warns_of_a_poor_teacher(capsys):
    run(*TINY, "--epochs", 6, "--batch-size", 16, "--output", "teacher")
    best = json.loads(Path("teacher/student/config.json").read_text())["metrics"]["val_top1"]
    capsys.readouterr()
    run(*TINY, *OWN, "--kd", "nkd", "--teacher", "teacher/student", "--output", "out")
    captured = capsys.readouterr()
    assert re.search(rf"teacher .*: top-1 {best:.2f} % on 60 validation images, .*\n.*epoch 1/1", captured.out, re.S)
    assert float(rows("out")[0]["teacher_top1"]) == pytest.approx(best, abs=1e-3)
    assert "warning" not in captured.err
    run(*TINY, "--kd", "nkd", "--teacher", f"{MODELS}:plain", "--output", "untrained")
    assert re.search(r"warning: this teacher is not better than chance \(10 %\)", capsys.readouterr().err)


def test_a_model_that_ends_in_a_softmax_is_refused_before_training(capsys):
    flags = [*TINY, "--kd", "nkd", "--teacher", f"{MODELS}:softmax"]
    assert "returns probabilities, whose sum is 1; expected logits" in refused(capsys, *flags)
    assert "returns probabilities" in refused(capsys, *TINY, "--model", f"{MODELS}:softmax")


# ---- the cache on the device ----


def crops(images, seed=0, crop="none", hflip=0.0):
    """Call crop_and_flip, which the cache on the device uses, with a seed."""
    return loading.crop_and_flip(images, crop, hflip, torch.Generator().manual_seed(seed))


def test_the_padded_crop_and_flip_on_the_device_match_torchvision_and_vary_by_image():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    candidates = {}
    for top in range(5):
        for left in range(5):
            cut = v2.functional.crop(v2.functional.pad(image, [2] * 4), top, left, 16, 16)
            candidates |= {(top, left, 0): cut, (top, left, 1): v2.functional.horizontal_flip(cut)}
    out = crops(image.expand(3000, -1, -1, -1), crop="pad", hflip=0.5)
    assert (out.dtype, out.shape) == (torch.uint8, (3000, 3, 16, 16))
    counts = {place: int((out == cut).flatten(1).all(1).sum()) for place, cut in candidates.items()}
    assert sum(counts.values()) == 3000
    assert min(counts.values()) > 60 - 5 * 60**0.5  # 60 of each are expected; the bound is five standard deviations
    assert max(counts.values()) < 60 + 5 * 60**0.5
    assert torch.equal(crops(image.expand(9, -1, -1, -1), hflip=1.0)[4], image.flip(2))
    assert torch.equal(crops(image.expand(9, -1, -1, -1))[4], image)


def loaders(photos, *flags):
    flags = ["--data", photos, "--img-size", 16, "--workers", 0, "--device", "cpu", "--model", f"{MODELS}:tiny",
             "--batch-size", 8, "--crop", "none", "--hflip", 0, *flags]  # fmt: skip
    args, _, data = opened(*flags)
    _, _, config = train.build_student(args, data)
    return train.build_loaders(args, data, config, None, torch.device("cpu"))


def test_a_cached_evaluation_reads_the_same_images(photos):
    (_, plain), (_, cached) = loaders(photos), loaders(photos, "--cache", "device")
    assert len(cached) == len(plain)
    for a, b in zip(plain, cached):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_a_cached_epoch_holds_each_image_once_in_a_new_order(photos):
    cached, _ = loaders(photos, "--cache", "device")
    epochs = []
    for epoch in (0, 1, 0):
        cached.set_epoch(epoch)
        epochs.append(torch.cat([batch.images for batch in cached]))
        assert len(epochs[-1]) == len(cached) * 8 == 48
        assert len({image.numpy().tobytes() for image in epochs[-1]}) == 48
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])


def stop_and_call(function, *args):
    os.kill(os.getpid(), signal.SIGTERM)
    return function(*args)


@pytest.mark.slow
def test_a_cached_run_trains_resumes_exactly_and_names_corrupt_images(photos, capfd, monkeypatch):
    (photos / "train/china/3.jpg").write_bytes(b"no image")
    (photos / "val/flower/2.jpg").write_bytes(b"no image")
    flags = [*TINY, "--model", f"{MODELS}:dropout", "--data", photos, "--cache", "device", "--batch-size", 8,
             "--recipe", "cifar", "--epochs", 2]  # fmt: skip
    run(*flags, "--output", "whole")
    assert capfd.readouterr().err.count("skipped a corrupt image") == 2
    top1 = float(rows("whole")[-1]["val_top1"]) / 100
    assert top1 * 16 == pytest.approx(round(top1 * 16), abs=1e-4)  # 16 images count, not 17
    state = torch.load("whole/last.pt", weights_only=True)
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", functools.partial(stop_and_call, train.evaluate))
        run(*flags, "--output", "resumed")
    run("--output", "resumed", "--resume", "--model", f"{MODELS}:dropout")
    again = torch.load("resumed/last.pt", weights_only=True)
    assert all(torch.equal(state["model"][name], again["model"][name]) for name in state["model"])


@pytest.mark.slow
def test_two_ranks_share_the_cache(photos, forks):
    flags = ["--device", "cpu", "--data", photos, "--recipe", "cifar", "--model", f"{MODELS}:tiny", "--img-size", 16,
             "--epochs", 2, "--batch-size", 8, "--cache", "device", "--workers", 0, "--output", "two"]  # fmt: skip
    forks.run(run_script, ROOT / "train.py", *flags, processes=2)
    measured, saved = accuracy("two", photos)
    assert measured == pytest.approx(saved)


# ---- CIFAR-10 and corrupt images ----


@pytest.mark.trial
def test_cifar10_trains_with_its_own_recipe(tmp_path, monkeypatch):
    """Write the digits in the file format of CIFAR-10, and skip only the check of the MD5 sums."""
    import pickle

    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    digits = Digits(train=True)
    for part in range(6):
        pairs = [digits[20 * part + i] for i in range(20)]
        pixels = np.stack([np.asarray(image.convert("RGB").resize((32, 32))) for image, _ in pairs])
        batch = {"data": pixels.transpose(0, 3, 1, 2).reshape(20, -1), "labels": [label for _, label in pairs]}
        name = f"data_batch_{part + 1}" if part < 5 else "test_batch"
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)

    run("--device", "cpu", "--data", "cifar10", "--model", "resnet18", "--epochs", 1, "--batch-size", 20,
        "--workers", 0, "--self-kd", "uskd", "--output", "out")  # fmt: skip
    flags = json.loads(Path("out/args.json").read_text())["flags"]
    assert (flags["recipe"], flags["opt"], flags["small_stem"], flags["alpha"]) == ("cifar", "momentum", True, 0.1)
    config = json.loads(Path("out/student/config.json").read_text())
    assert config["label_names"] == list("abcdefghij")
    student, _ = load_student(Path("out/student"), OWN[1:])
    assert student.conv1.kernel_size == (3, 3)


@pytest.mark.slow
def test_a_run_prints_and_skips_a_corrupt_image(photos, capfd):
    (photos / "train/china/3.jpg").write_bytes(b"no image")
    whole = (photos / "val/flower/2.jpg").read_bytes()
    (photos / "val/flower/2.jpg").write_bytes(whole[: len(whole) // 2])
    run(*TINY, "--data", photos, "--batch-size", 8, "--epochs", 2, "--workers", 1, "--output", "out")
    err = capfd.readouterr().err
    assert re.findall(r"skipped a corrupt image .*?: .*/(\w+/\w+/\d.jpg): ", err) == [  # once, not in each epoch
        "train/china/3.jpg",
        "val/flower/2.jpg",
    ]
    top1 = float(rows("out")[-1]["val_top1"]) / 100
    assert top1 * 16 == pytest.approx(round(top1 * 16), abs=1e-4)  # 16 images count, not 17


@pytest.mark.slow
def test_a_part_of_a_batch_without_a_readable_image_is_refused(photos, capfd):
    (photos / "train/china/3.jpg").write_bytes(b"no image")
    run(*TINY, "--data", photos, "--batch-size", 8, "--grad-accum", 8, "--output", "out", check=2)
    assert "china/3.jpg cannot be read, nor any other image of its part of the batch" in capfd.readouterr().err


@pytest.mark.slow
def test_a_folder_whose_name_is_not_utf_8_trains(photos):
    folder = os.path.join(os.fsencode(photos.parent), b"donn\xe9es")
    os.rename(photos, folder)
    run(*TINY, "--data", os.fsdecode(folder), "--batch-size", 8, "--output", "out")
    assert "donn" in Path("out/student/README.md").read_text()


def test_a_training_batch_leaves_a_corrupt_image_out(photos):
    (photos / "train/china/3.jpg").write_bytes(b"no image")
    view = loading.View((3, 16, 16), "resized", 0.5, "bilinear").transform()
    batches = list(loading.train_loader(open_data(str(photos)).train, view, 8, 0, 0, False, None))
    assert sorted(len(batch.images) for batch in batches) == [7, 8, 8, 8, 8, 8]
    assert [len(batch.images) + len(batch.corrupt) for batch in batches] == [8] * 6
    assert all(len(batch.images) == len(batch.labels) for batch in batches)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(mode, tmp_path):
    photo = Image.fromarray(load_sample_images().images[0][:64, :64])
    if mode == "I;16":  # clipping would turn these pixels white
        grey = np.asarray(photo.convert("L"))
        photo = Image.fromarray(grey.astype(np.uint16) << 8)
        assert photo.mode == "I;16"
        expected = Image.fromarray(grey).convert("RGB")
    else:
        photo = photo.convert(mode)
        expected = photo.convert("RGB")
    file = tmp_path / ("image.tiff" if mode in ("CMYK", "I;16") else "image.png")
    photo.save(file)
    assert np.array_equal(np.asarray(to_rgb(open_image(file))), np.asarray(expected))


def test_more_than_one_percent_of_corrupt_images_stops_the_run(photos, capsys):
    for i in range(2):
        (photos / f"train/china/{i}.jpg").write_bytes(b"no image")
    run(*TINY, "--data", photos, "--batch-size", 8, "--workers", 0, check=2)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: 2 of 48 training images cannot be read, more than 1 %.*china/\d.jpg", last)


# ---- resume ----


@pytest.mark.trial
def test_a_killed_run_resumes_to_bitwise_equal_weights(photos):
    flags = [
        "--device", "cpu", "--data", photos, "--recipe", "imagenet-vit", "--model", f"{MODELS}:dropout",
        "--self-kd", "uskd", "--tap", "1", "--img-size", 16, "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1,
        "--lr", 1e-3, "--ema-decay", 0.9, "--workers", 1,
    ]  # fmt: skip
    whole = script(*flags, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), *map(str, flags), "--output", "killed"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in the other runs: it changes the order of sums
    )
    for line in killed.stdout:  # the pipe ends when the data loading processes have ended too
        if line.startswith("epoch 2/4"):
            killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert killed.returncode == -signal.SIGKILL
    done = len(rows("killed"))
    assert 1 <= done < 4
    resumed = script("--output", "killed", "--resume", "--model", f"{MODELS}:dropout")  # with the stored flags
    assert resumed.returncode == 0, resumed.stderr
    going_on = (
        rf"resuming from killed/last.pt, (after epoch {done}|at step \d+ of epoch {done + 1}|after epoch {done + 1})"
    )
    assert re.search(going_on, resumed.stdout)
    a, b = (torch.load(f"{out}/last.pt", weights_only=True) for out in ("whole", "killed"))
    for part in ("model", "ema"):
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name
    assert same_weights("whole", "killed")
    assert [row["train_loss"] for row in rows("whole")] == [row["train_loss"] for row in rows("killed")]


@pytest.mark.slow
def test_a_resume_without_a_checkpoint_starts_again_with_the_stored_flags(capsys):
    run(*TINY, "--output", "out", "--resume")  # as a launcher that always gives --resume does
    assert "no checkpoint in out yet: a new run starts" in capsys.readouterr().out
    for name in ("last.pt", "metrics.csv"):  # the state after an interrupt in the first epoch
        Path("out", name).unlink()
    run(*RESUME)
    assert "own_models.py:tiny" in capsys.readouterr().out


@pytest.mark.slow
def test_flags_given_with_resume_override_the_stored_flags():
    run(*TINY, "--output", "out")
    run(*RESUME, "--epochs", 2, "--weight-decay", 0.5, "--amp", "fp16")
    groups = torch.load("out/last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert max(group["weight_decay"] for group in groups) == 0.5


@pytest.mark.slow
def test_a_failed_save_of_the_best_checkpoint_leaves_the_last_one_unchanged(monkeypatch):
    """Fill the disk while best.pt is written. last.pt keeps the previous epoch, so a resume repeats this one."""
    run(*TINY, "--output", "out")
    kept = Path("out/last.pt").read_bytes()
    write = cli.write_whole

    def full(path, content, keep=None):
        if path.name == "best.pt":
            raise UserError("full")
        write(path, content, keep)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    run(*RESUME, "--epochs", 2, check=2)
    assert Path("out/last.pt").read_bytes() == kept


# ---- two processes ----


@pytest.mark.slow
def test_torchrun_trains_one_model_on_two_ranks_and_validates_each_image_once(photos):
    flags = ["--device", "cpu", "--data", photos, "--recipe", "digits", "--model", f"{MODELS}:tiny", "--img-size", 16,
             "--self-kd", "uskd", "--kd", "nkd", "--teacher", f"{MODELS}:tiny", "--epochs", 2, "--batch-size", 8,
             "--workers", 0, "--grad-accum", 2, "--output", "two"]  # fmt: skip
    two = script(*flags, command=[*TORCHRUN, "--standalone", "--nproc-per-node", "2"], env={"GLOO_SOCKET_IFNAME": "lo"})
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("epoch 1/2") == 1
    measured, saved = accuracy("two", photos)
    assert measured == pytest.approx(saved)


@pytest.mark.trial
def test_an_error_on_all_ranks_is_printed_once():
    two = script("--data", "nowhere", command=[*TORCHRUN, "--standalone", "--nproc-per-node", "2"],
                 env={"GLOO_SOCKET_IFNAME": "lo"})  # fmt: skip
    assert two.returncode != 0
    assert two.stderr.count("train.py: error: ") == 1
    assert "--data nowhere: no such folder" in two.stderr


# ---- a user's mistake: one line and status 2 ----


def test_a_mistake_makes_the_command_print_one_line_and_exit_with_2():
    result = script("--kd", "nkd")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("train.py: error: --kd nkd needs --teacher")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder; expected a folder with"),
        (["--reference", "-1"], "--reference: must be at least 0"),
        (["--model", "resnet81"], "unknown model 'resnet81'.*near matches: .*resnet18"),
        (["--model", "zzz"], "unknown model 'zzz'"),
        (["--model", "nowhere.py:build"], "no file nowhere.py"),
        (["--model", f"{MODELS}:raises"], r"failed: KeyError: 'nothing' \(.*/own_models.py:\d+\)"),
        (["--model", "resnet18.nonsense"], "unknown model 'resnet18.nonsense'"),
        (["--batch-size", "1"], "does not run on a 1x3x32x32 batch: Expected more than 1 value per channel"),
        (["--model", f"{MODELS}:nothing"], "has no function 'nothing'"),
        (["--model", f"{MODELS}:not_a_model"], "must return an nn.Module, got int"),
        (["--model", f"{MODELS}:wrong_classes"], r"logits of shape \(N, 10\), got \(2, 3\) for N = 2"),
        (["--model", "inception_v3"], "does not run on a 2x3x32x32 batch"),
        (["--model", "resnet18", "--model-args", "nonsense=1"], "cannot build resnet18.*nonsense"),
        (["--model-args", "nonsense"], "takes KEY=VALUE, got 'nonsense'"),
        (["--kd", "nkd"], "--kd nkd needs --teacher"),
        (["--teacher", "resnet34"], "--teacher needs --kd"),
        (["--kd", "nkd", "--teacher", "resnet43"], "unknown model 'resnet43'"),
        (["--kd", "nkd", "--teacher", "."], "is neither a student/ folder nor a run directory: it has no config.json"),
        (["--self-kd", "uskd", "--tap", "features.71"], "near matches: features.7.*--tap sets the layer"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--lr", "nan"], "--lr: must be a number and at least 0, got nan"),
        (["--kd", "nkd", "--teacher", "resnet18", "--temperature", "0"], "--temperature: must be greater than 0"),
        (["--alpha", "inf", "--self-kd", "uskd"], "--alpha: must be at least 0, got inf"),
        (["--seed", "18446744073709551616"], "--seed: must be between 0 and 4294967295"),
        (
            ["--kd", "nkd", "--teacher", "resnet18", "--kd-weight", "1.0"],
            "--kd-weight needs --kd kd",
        ),  # although 1.0 is the default
        (["--model", "runs", "--no-small-st"], "which has its own"),
        (["--opt", "adahessian"], "--opt adahessian cannot be used"),
        (["--val-split", "2"], "--val-split: must be greater than 0 and at most 1, got 2"),
        (["--hflip", "2"], "--hflip: must be between 0 and 1"),
        (["--grad-accum", "3"], "--batch-size 32 must be a multiple of"),
        (["--batch-size", "5000"], "larger than the 200 training images"),
        (["--resume"], "--resume needs --output"),
        (["--tap", "features.1"], "--tap needs --self-kd"),
        (["--gamma", "2"], "--gamma needs --kd nkd"),
        (["--kd", "nkd", "--teacher", "resnet18", "--kd-weight", "2"], "--kd-weight needs --kd kd"),
        (["--cache", "device", "--recipe", "imagenet-vit"], "give --crop pad or none, and --randaugment 0 0"),
        (["--randaugment", "2", "99"], "--randaugment: must be between 0 and 30, got 99"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--pretrained", ""], "--pretrained is empty: give a value, or leave the flag out"),
        (["--class-weights", ""], "--class-weights is empty"),
        (
            ["--epochs", "30 min"],
            "must be a number and at least 1, got 30 min; a time has a unit and no space: 90s, 30min, 8h",
        ),
        (["--mixup", "1e-300"], "--mixup: must be 0, or between 0.01 and 1000"),
        (["--model", "x" * 5000], "unknown model 'xxx"),
        (["--data", "x" * 5000], "no such folder; expected a folder with"),
        (["--kd", "nkd", "--teacher", "x" * 5000], "unknown model 'xxx"),
        (["--output", "x" * 5000], "cannot make the run directory.*File name too long"),
        (["--model", "resnet18", "--model-args", "pretrained=True"], "'pretrained' would load or fetch weights"),
        (["--model", "resnet18", "--model-args", "checkpoint_path=x.pth"], "'checkpoint_path' would load or fetch"),
        (
            ["--model", "resnet18.tv_in1k", "--model-args", "pretrained_cfg_overlay={'file': 'x'}"],
            "would load or fetch",
        ),
        (["--model", "hf-hub:timm/resnet18"], "unknown model"),
        (
            ["--epochs", "5", "--warmup-epochs", "5"],
            "--warmup-epochs 5 must be below --epochs, which is 5: give fewer warm-up epochs, or more epochs",
        ),
        (
            ["--model", "vit_tiny_patch16_224", "--model-args", "depth=1", "--img-size", 30],
            "cuts an image into patches of 16 px: give --img-size 16 or 32, not 30",
        ),
        (["--kd", "mse"], "'mse': expected nkd, kd or path/to/file.py:function"),
        (["--opt", "adamz"], "--opt adamz is not a timm optimizer; near matches: .*adamw"),
    ],
)
def test_bad_flags_are_refused(capsys, flags, message):
    if "runs" in flags:
        Path("runs").mkdir()
    assert re.search(message, refused(capsys, "--device", "cpu", *flags))
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_a_missing_cuda_device_is_refused(capsys):
    assert "torch finds no CUDA device" in refused(capsys, "--device", "cuda")


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / "empty" / part / "cat").mkdir(parents=True)
    assert "empty/train: no image in cat" in refused(capsys, *TINY, "--data", tmp_path / "empty")


def test_a_data_set_with_one_class_is_refused(photos, capsys):
    for part in ("train", "val"):
        for file in (photos / part / "flower").iterdir():
            file.unlink()
        (photos / part / "flower").rmdir()
    assert "has only the class china: at least 2 are needed" in refused(capsys, *TINY, "--data", photos)


def test_classes_that_differ_between_train_and_val_are_refused(photos, capsys):
    (photos / "val/flower").rename(photos / "val/flowers")
    line = refused(capsys, *TINY, "--data", photos)
    assert "train/ has flower, but val/ has not; val/ has flowers, but train/ has not" in line


@pytest.mark.slow
def test_a_directory_that_holds_a_run_is_refused_without_resume(capsys):
    run(*TINY, "--output", "out")
    kept = Path("out/last.pt").read_bytes()
    line = refused(capsys, *TINY, "--output", "out")
    assert "already holds a run: --resume continues it; remove the folder to start again" in line
    assert Path("out/last.pt").read_bytes() == kept


@pytest.mark.slow
def test_checkpoints_and_students_that_do_not_fit_are_refused(capsys):
    run(*TINY, "--output", "out")
    capsys.readouterr()
    line = refused(capsys, "--device", "cpu", "--output", "out", "--resume", "--model", "shufflenet_v2_x0_5")
    assert "out/last.pt holds the weights of another architecture than ShuffleNetV2" in line
    line = refused(capsys, *RESUME, "--opt", "momentum")
    assert "saved with --opt adamw, not momentum" in line
    # --teacher accepts a run directory instead of its student/
    run(*TINY, *OWN, "--kd", "nkd", "--teacher", "out", "--output", "kd")
    capsys.readouterr()
    config = json.loads(Path("out/student/config.json").read_text())
    eleven = {"num_classes": 11, "label_names": [*config["label_names"], "eleven"]}
    Path("out/student/config.json").write_text(json.dumps(config | eleven))
    assert "another architecture" in refused(capsys, *TINY, *OWN, "--kd", "nkd", "--teacher", "out/student")
    Path("out/student/config.json").write_text(json.dumps(config))
    Path("out/student/model.safetensors").write_bytes(b"damaged")
    assert "damaged" in refused(capsys, *TINY, *OWN, "--kd", "nkd", "--teacher", "out/student")
    Path("out/last.pt").write_bytes(b"damaged")
    Path("out/previous.pt").unlink(missing_ok=True)
    assert "out/last.pt: damaged, or not a checkpoint of train.py" in refused(capsys, *RESUME)


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_refused(photos, capsys):
    run(*TINY, "--data", photos, "--batch-size", 8, "--output", "teacher")
    capsys.readouterr()
    kd = ["--kd", "nkd", "--teacher", "teacher/student", *OWN]
    assert "teacher/student lacks 10 of --data's 10 classes: 0, 1, 2" in refused(capsys, *TINY, *kd)
    for part in ("train", "val"):  # the same number of classes with other names
        (photos / part / "china").rename(photos / part / "zebra")
    line = refused(capsys, *TINY, "--data", photos, "--batch-size", 8, *kd)
    assert "teacher/student lacks 1 of --data's 2 classes: zebra" in line


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(capsys):
    run(*TINY, "--output", "out")
    kept = Path("out/last.pt").read_bytes()
    capsys.readouterr()
    line = refused(capsys, *RESUME, "--epochs", 2, "--lr", 1e18)
    assert re.search(r"not finite at step \d+: ce (nan|inf); try a lower --lr", line)
    assert Path("out/last.pt").read_bytes() == kept


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(photos, forks):
    run(*TINY, "--data", photos, "--batch-size", 8, "--workers", 0, "--output", "out")
    kept = Path("out/last.pt").read_bytes()
    forks.start(script_with_small_files, len(kept) // 2, *RESUME, "--epochs", 2)
    (status,), (text,) = forks.wait()
    assert status == 2, text
    assert re.search(r"could not save out/\w+.pt: File too large; the old file is kept", text)
    assert "Traceback" not in text
    assert Path("out/last.pt").read_bytes() == kept
    assert not list(Path("out").glob("**/*.partial"))
    torch.load("out/last.pt", weights_only=True)


def script_with_small_files(size, *flags):
    """Run train.py in a process that may write files of at most `size` bytes, which acts as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run_script(ROOT / "train.py", *flags)

"""Test the loops of examples/loops: gradients, checkpoints, resume and several processes.

Most of the loops run in forks: see tests/forks.py.
"""

import importlib.util
import os
import re
import runpy
from pathlib import Path

import oracle
import pytest
import torch
from forks import LIBRARIES, Forks, run_script
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
LOOPS = sorted((ROOT / "examples" / "loops").glob("*.py"))
MISSING = [name for name in LIBRARIES if not importlib.util.find_spec(name.partition(".")[0])]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("forks"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]


def load(name):
    """Import a loop without running it; return its names."""
    return runpy.run_path(str(ROOT / "examples" / "loops" / name))


def loop(name, *argv):
    """Run the loop, as from the command line."""
    run_script(ROOT / "examples" / "loops" / name, *argv)


def loop_under_sgd(name, *argv):
    """Run the loop with SGD, because a step of AdamW does not depend on the scale of the gradient."""
    torch.optim.AdamW = lambda parameters, lr: torch.optim.SGD(parameters, lr=0.1)
    loop(name, *argv)


@pytest.fixture
def run(forks):
    return forks.run


def weights(path):
    if path.suffix == ".safetensors":
        return pytest.importorskip("safetensors.torch").load_file(path)
    return torch.load(path, weights_only=True)


def assert_equal(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def nkd_gradient(logits, teacher_logits, labels, gamma=1.5):
    """Return d (sum of cross-entropy + NKD) / d logits for rows (R, C), derived by hand."""
    ce = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    rows = zip(logits.tolist(), teacher_logits.tolist(), labels.tolist())
    return ce + torch.tensor([oracle.nkd_row_gradient(s, t, y, gamma, 1.0) for s, t, y in rows])


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.name)
def test_a_loop_is_short_and_does_not_have_the_name_of_a_library(path):
    assert len(path.read_text().splitlines()) <= 90
    assert importlib.util.find_spec(path.stem) is None  # because a loop's folder comes first on sys.path


# ---- timm ----


@pytest.fixture(scope="module")
def timm_task():
    pytest.importorskip("timm")
    return load("timm_task.py")


def task_of(timm_task, kind):
    torch.manual_seed(0)
    student = timm_task["vit"](16)
    if kind == "uskd":
        return timm_task["USKDTask"](
            timm_task["WithWeakHead"](student, example_input=timm_task["images"][:2]), F.cross_entropy
        )
    return timm_task["NKDTask"](student, timm_task["vit"](16), F.cross_entropy)


def steps_of(timm_task, task, optimizer, n=2):
    for i in range(n):
        task.train()
        task(timm_task["images"][i : i + 8], timm_task["labels"][i : i + 8])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()


def test_the_timm_loop_saves_plain_students_that_learn(run, tmp_path, timm_task):
    accuracies = re.findall(r"(\w+)Task +([\d.]+)%", run(loop, "timm_task.py", tmp_path))
    assert [name for name, _ in accuracies] == ["Classification", "NKD", "USKD"]
    assert min(float(accuracy) for _, accuracy in accuracies) > 40
    for name, accuracy in accuracies[1:]:
        student = timm_task["vit"](48)
        student.load_state_dict(weights(tmp_path / f"{name}Task" / "last.pth.tar")["state_dict_ema"])
        right = student.eval()(timm_task["images"][1400:]).argmax(1) == timm_task["labels"][1400:]
        assert f"{right.float().mean().item():.1%}" == f"{accuracy}%"


def test_a_timm_task_has_the_gradient_of_the_paper(timm_task):
    task = task_of(timm_task, "nkd").eval()
    x, y = timm_task["images"][:8], timm_task["labels"][:8]
    result = task(x, y)
    (gradient,) = torch.autograd.grad(result["loss"], result["output"])
    expected = nkd_gradient(result["output"].detach(), task.teacher.model(x).detach(), y) / 8
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", ["nkd", "uskd"])
def test_a_timm_task_resumes_with_its_ema_and_its_head(timm_task, kind, tmp_path):
    from timm.task import load_task_ema_checkpoint, resume_task_checkpoint

    def begin():
        task = task_of(timm_task, kind)
        return task, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1, momentum=0.9)

    task, optimizer = begin()
    task.setup_ema(decay=0.5)
    steps_of(timm_task, task, optimizer)
    saver = timm_task["CheckpointSaver"](
        task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task
    )
    saver.save_checkpoint(0, 0.5)
    resumed, its_optimizer = begin()
    resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"), its_optimizer)
    resumed.setup_ema(decay=0.5)
    load_task_ema_checkpoint(resumed, str(tmp_path / "last.pth.tar"))
    for any_task, any_optimizer in ((task, optimizer), (resumed, its_optimizer)):
        steps_of(timm_task, any_task, any_optimizer)
    assert_equal(dict(resumed.named_parameters()), dict(task.named_parameters()), rtol=0, atol=0)


def test_a_compiled_timm_task_evaluates_and_saves_the_plain_student(timm_task):
    task = task_of(timm_task, "uskd")
    plain = set(timm_task["vit"](16).state_dict())
    task.setup_ema(decay=0.5)
    task.compile(backend="eager")
    task.compile_ema(backend="eager")
    for ema in (False, True):
        assert isinstance(timm_task["unwrap_model"](task.get_eval_model(ema=ema)), type(timm_task["vit"](16)))
        assert set(task.get_checkpoint_state(ema=ema)["state_dict_ema" if ema else "state_dict"]) == plain


# ---- Hugging Face ----

FAST = ["--optim", "sgd", "--learning_rate", "0.1", "--max_steps", "6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run the loop of the Trainer in one process, without gradient accumulation; return its folder."""
    output = tmp_path_factory.mktemp("trained")
    Forks(output).run(loop, "hf_trainer.py", "--output_dir", output, *FAST)
    return output


def test_the_trainer_evaluates_and_saves_the_plain_student(trained, run):
    lines = re.findall(r"^(\w+) +([\d.]+)%, loss ([\d.]+)$", (trained / "log0.txt").read_text(), re.M)
    assert [name for name, _, _ in lines] == ["Trainer", "NKDTrainer", "USKDTrainer"]
    assert all(0 < float(loss) < 3 for _, _, loss in lines)  # because the evaluation computes the cross-entropy alone
    run(assert_loads, trained / "nkd", lines[1])
    run(assert_loads, trained / "uskd", lines[2])


def assert_loads(folder, line):
    from transformers import ViTForImageClassification

    its = load("hf_trainer.py")
    student, info = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    labels = torch.tensor(its["digits"].target[1408:])
    logits = student.eval()(its["images"][1408:]).logits
    assert f"{(logits.argmax(1) == labels).float().mean():.1%}" == line[1] + "%"
    assert f"{F.cross_entropy(logits, labels):.3f}" == line[2]


def test_the_trainer_on_two_processes_equals_one(trained, run, tmp_path):
    run(loop, "hf_trainer.py", "--output_dir", tmp_path, "--per_device_train_batch_size", 32, *FAST, processes=2)
    for kind in ("nkd", "uskd"):
        assert_equal(
            weights(tmp_path / kind / "model.safetensors"),
            weights(trained / kind / "model.safetensors"),
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_trainer_with_accumulation_and_checkpointing_equals_one_pass(trained, run, tmp_path):
    flags = ["--per_device_train_batch_size", 32, "--gradient_accumulation_steps", 2, "--gradient_checkpointing"]
    run(loop, "hf_trainer.py", "--output_dir", tmp_path, *flags, *FAST)
    # USKD is not compared, because each pass has its own batch mean
    assert_equal(
        weights(tmp_path / "nkd" / "model.safetensors"),
        weights(trained / "nkd" / "model.safetensors"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_each_model_of_the_trainer_resumes_from_its_own_checkpoints(run, tmp_path):
    flags = [*FAST[:4], "--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", "3"]
    run(loop, "hf_trainer.py", "--output_dir", tmp_path / "whole", *flags, "--max_steps", 6)
    run(loop, "hf_trainer.py", "--output_dir", tmp_path / "parts", *flags, "--max_steps", 3)
    for name in ("teacher", "nkd", "uskd"):
        assert [path.name for path in (tmp_path / "parts" / name).glob("checkpoint-*")] == ["checkpoint-3"]
    resume = ["--max_steps", 6, "--resume_from_checkpoint", "True"]
    run(loop, "hf_trainer.py", "--output_dir", tmp_path / "parts", *flags, *resume)
    parts, whole = (weights(tmp_path / name / "uskd" / "model.safetensors") for name in ("parts", "whole"))
    assert_equal(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_trainer_writes_into_its_output_folder_only(run, tmp_path):
    run(loop_in, tmp_path, "hf_trainer.py", *FAST)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("log")] == ["runs"]


def loop_in(folder, name, *argv):
    os.chdir(folder)
    loop(name, *argv)


TAPS = {
    "ViT": ("vit.layers.1", 32),
    "DeiT": ("deit.layers.1", 32),
    "Dinov2": ("dinov2.encoder.layer.1", 32),
    "ResNet": ("resnet.encoder.stages.2", 48),
    "ConvNext": ("convnext.encoder.stages.2", 48),
    "MobileNetV1": ("mobilenet_v1.layer.21", 128),
    "MobileNetV2": ("mobilenet_v2.layer.15", 112),
    "Swin": ("swin.encoder.layers.2.blocks.1", 64),
}


def test_hugging_face_classifiers_have_a_default_tap_and_vit_allows_gradient_checkpointing(run):
    run(assert_taps)


def assert_taps():
    import transformers

    from kdlite import WithWeakHead

    stages = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
    blocks = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8)
    options = {
        "ViT": blocks,
        "DeiT": blocks,
        "Dinov2": blocks,
        "ResNet": dict(embedding_size=16, **stages),
        "ConvNext": stages,
        "MobileNetV1": dict(depth_multiplier=0.25),
        "MobileNetV2": dict(depth_multiplier=0.35),
        "Swin": dict(image_size=64, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=2),
    }
    for name, (tap, channels) in TAPS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(num_labels=5, **options[name])
        model = getattr(transformers, f"{name}ForImageClassification")(config)
        size = min(getattr(config, "image_size", 64), 64)
        student = WithWeakHead(model, example_input=torch.zeros(1, 3, size, size))
        assert (student.tap, student.head.in_features) == (tap, channels)
        x = torch.randn(2, 3, size, size)
        logits, weak_logits = student(pixel_values=x)
        assert logits.shape == weak_logits.shape == (2, 5)
        if name == "ViT":
            weak_logits.sum().backward()
            plain = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
            student.zero_grad()
            student.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            student(pixel_values=x)[1].sum().backward()
            assert_equal({key: p.grad for key, p in student.named_parameters() if p.grad is not None}, plain)


def test_a_step_of_the_trainer_follows_the_gradient_of_the_paper(run, tmp_path):
    run(assert_step_of_the_trainer, tmp_path)


def assert_step_of_the_trainer(output):
    from transformers import TrainingArguments

    its = load("hf_trainer.py")
    torch.manual_seed(0)
    student, teacher = its["vit"](16), its["vit"](16).eval()
    its["NKDTrainer"].compute_loss.__globals__["teacher"] = teacher
    x, y = its["images"][:12], torch.tensor(its["digits"].target[:12])
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    logits = student(x).logits
    logits.backward(nkd_gradient(logits.detach(), teacher(x).logits.detach(), y) / 12)
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    args = TrainingArguments(
        output,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        optim="sgd",
        learning_rate=1,
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    its["NKDTrainer"](student, args, train_dataset=its["data"][:12]).train()
    taken = {name: before[name] - p.detach() for name, p in student.named_parameters()}
    assert_equal(taken, gradients, rtol=1e-3, atol=1e-5)


def test_the_three_losses_of_the_language_model_have_the_gradient_of_the_paper(run):
    run(assert_language_model)


def assert_language_model():
    its = load("language_model.py")
    names = its["from_logits"].__globals__
    torch.manual_seed(0)
    names["student"], names["teacher"] = its["llama"](16, 128), its["llama"](32, 144).eval()
    tokens, labels = its["batch"](4, 32)
    gradients = {}
    for way in ("from_logits", "from_hidden", "from_top_k"):
        names["student"].zero_grad()
        options = dict(k=128) if way == "from_top_k" else {}  # all classes, so that the loss is exact
        its[way](tokens, labels, **options).backward()
        gradients[way] = {name: p.grad.clone() for name, p in names["student"].named_parameters()}
    names["student"].zero_grad()
    logits = names["student"](tokens).logits[:, :-1]
    learnt = labels[:, 1:] != -100
    teacher_logits = names["teacher"](tokens).logits[:, :-1, :128].detach()
    by_hand = torch.zeros_like(logits)
    by_hand[learnt] = nkd_gradient(logits.detach()[learnt], teacher_logits[learnt], tokens[:, 1:][learnt])
    logits.backward(by_hand / learnt.sum())
    for way in gradients:
        expected = {name: p.grad for name, p in names["student"].named_parameters()}
        assert_equal(gradients[way], expected, rtol=1e-3, atol=1e-6)


def test_the_language_model_loop_learns_with_each_loss(run):
    lines = dict(re.findall(r"^(\w+) +cross-entropy ([\d.]+)$", run(loop, "language_model.py"), re.M))
    assert lines.keys() == {"cross_entropy", "from_logits", "from_hidden", "from_top_k"}
    assert max(map(float, lines.values())) < 3.5  # before training it is 4.85
    assert abs(float(lines["from_logits"]) - float(lines["from_hidden"])) < 0.05


# ---- Accelerate, Lightning, FSDP2 ----


def test_accelerate_on_two_processes_equals_one(run, tmp_path):
    printed = [run(loop_under_sgd, "accelerate_loop.py", tmp_path / str(n), processes=n) for n in (1, 2)]
    assert float(re.search(r"USKD ([\d.]+)%", printed[0])[1]) > 30  # chance is 10
    one, two = (weights(tmp_path / n / "model.safetensors") for n in "12")
    assert_equal(one, two, rtol=1e-4, atol=1e-5)
    load("accelerate_loop.py")["cnn"]().load_state_dict(one)  # it is the plain student
    state = weights(tmp_path / "1" / "state" / "model.safetensors")
    assert state.keys() == {f"model.{name}" for name in one} | {"head.weight", "head.bias"}


def test_the_lightning_loop_saves_the_best_student_without_its_teacher(run, tmp_path):
    printed = dict(re.findall(r"^width (\d+): ([\d.]+)%$", run(loop, "lightning_module.py", tmp_path), re.M))
    assert printed.keys() == {"32", "8"}
    run(assert_lightning_checkpoint, tmp_path / "8.ckpt", printed["8"])


def assert_lightning_checkpoint(path, accuracy):
    its = load("lightning_module.py")
    keys = torch.load(path, weights_only=True)["state_dict"].keys()
    assert keys == {f"student.model.{name}" for name in its["cnn"](8).state_dict()} | {
        "student.head.weight",
        "student.head.bias",
    }
    restored = its["Classifier"].load_from_checkpoint(path)
    plain = restored.student.close().eval()
    right = (plain(its["images"][1400:]).argmax(1) == its["labels"][1400:]).float().mean()
    assert f"{right:.1%}" == f"{accuracy}%"


def test_lightning_on_two_devices_equals_one(run, tmp_path):
    for devices in (1, 2):
        run(fit_whole_batches, tmp_path / str(devices), devices, processes=devices)
    one, two = (weights(tmp_path / n / "8.ckpt")["state_dict"] for n in "12")
    assert_equal(one, two, rtol=1e-4, atol=1e-5)


def fit_whole_batches(output, devices):
    """Train on all images in one batch, because Lightning orders the images differently on several devices."""
    its = load("lightning_module.py")
    torch.optim.AdamW = lambda parameters, lr: torch.optim.SGD(parameters, lr=0.1)
    its["L"].seed_everything(0)
    its["fit"](its["Classifier"](8, distil=True, teacher=its["cnn"](8)), output, devices, batch_size=1400)


def test_fsdp2_on_two_processes_equals_one(run, tmp_path):
    printed = [run(loop_under_sgd, "fsdp2.py", tmp_path / str(n), processes=n) for n in (1, 2)]
    assert float(re.search(r"USKD ([\d.]+)%", printed[0])[1]) > 80
    one, two = (weights(tmp_path / n / "student.pt") for n in "12")
    assert_equal(one, two, rtol=1e-4, atol=1e-5)
    load("fsdp2.py")["Network"]().load_state_dict(one)


# ---- dense predictions and several losses ----


def test_the_segmentation_loop_learns(run):
    lines = dict(re.findall(r"^(\w+) +([\d.]+)$", run(loop, "segmentation.py"), re.M))
    assert lines.keys() == {"cross_entropy", "with_teacher", "without_teacher"}
    assert float(lines["cross_entropy"]) < 1.5  # before training it is 2.4, the logarithm of 11


def test_segmentation_has_the_gradient_of_the_paper_and_no_gradient_at_label_255():
    its = load("segmentation.py")
    x, y = its["scene"](torch.arange(1))
    y[:, :56] = 255  # few labels are left, because the oracle is slow
    logits = torch.randn(1, 11, 64, 64, requires_grad=True)
    teacher_logits = torch.randn(1, 11, 64, 64)
    its["with_teacher"].__globals__["teacher"] = Constant(teacher_logits)
    its["with_teacher"](Constant(logits), x, y).backward()
    kept = y[0] != 255
    rows = (t.detach()[0].permute(1, 2, 0)[kept] for t in (logits, teacher_logits))
    expected = nkd_gradient(*rows, y[0][kept]) / kept.sum()
    torch.testing.assert_close(logits.grad[0].permute(1, 2, 0)[kept], expected)
    assert logits.grad[0].permute(1, 2, 0)[~kept].abs().max() == 0


class Constant(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return {"out": self.logits}


def test_several_losses_together_have_the_sum_of_their_gradients():
    its = load("several_losses.py")
    torch.manual_seed(0)
    teachers = [its["Teacher"](its["cnn"](width)) for width in (12, 6)]
    student = its["Student"](its["cnn"](4), channels=8, teacher_channels=24)
    x, y = its["images"][:16], its["labels"][:16]

    def gradients(*kept):
        student.zero_grad()
        losses = its["losses_of"](student, teachers, x, y)
        sum(losses[name] for name in kept or losses).backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in student.named_parameters()}

    together = gradients()
    alone = [gradients(name) for name in ("ce", "nkd", "uskd", "hint")]
    assert_equal(together, {name: sum(g[name] for g in alone) for name in together})
    assert all(any(p.abs().sum() > 0 for p in g.values()) for g in alone)


def test_the_loop_of_several_losses_learns(run):
    assert float(re.search(r"student ([\d.]+)%", run(loop, "several_losses.py"))[1]) > 60


# ---- the notebook ----


@pytest.mark.trial
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "kdlite.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    row = re.compile(r"^([\w-]+(?:, 800 more)?) +([\d.]+) \+- [\d.]+ +(?:[-+][\d.]+ \+- [\d.]+  (\w+))?", re.M)
    rows = {name: (float(top1), effect) for name, top1, effect in row.findall(outputs)}
    assert rows.keys() == {"cross-entropy", "NKD", "NKD, 800 more", "USKD"}
    assert min(top1 for top1, _ in rows.values()) > 60
    assert rows["NKD, 800 more"][1] == "ahead"

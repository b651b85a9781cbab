"""Test examples/loops/ultralytics_trainer.py: its gradients, its resume and its saved students.

`make test` does not install Ultralytics. Without it, pytest skips these tests.
"""

import importlib.util
import os
import re
import runpy
import sys
from pathlib import Path

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ultralytics"), reason="needs pip install ultralytics"),
]


@pytest.fixture(scope="module")
def its(tmp_path_factory):
    """Return the script's globals, and its folder of digits. Block downloads; keep the settings in the folder."""
    folder = tmp_path_factory.mktemp("ultralytics")
    settings = dict(YOLO_CONFIG_DIR=str(folder), YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
    os.environ |= settings  # because the library reads them at its import
    names = runpy.run_path(str(ROOT / "examples/loops/ultralytics_trainer.py"))
    names["write_digits"](folder / "digits")
    return names | {"digits": folder / "digits"}


def options(its, folder, **changes):
    shared = dict(data=str(its["digits"]), project=str(folder), device="cpu", imgsz=32, plots=False, amp=False)
    small = dict(epochs=1, batch=100, nbs=100, fraction=0.25, optimizer="SGD", model="yolov8n-cls.yaml")
    return shared | small | changes


class Stopped(Exception):
    pass


def step_of(trainer_class, overrides):
    """Return the trainer, the batch and the gradients of the first step, before they are clipped."""

    class Recording(trainer_class):
        def preprocess_batch(self, batch):
            self.batch = super().preprocess_batch(batch)
            return self.batch

        def optimizer_step(self):
            raise Stopped

    trainer = Recording(overrides=overrides)
    with pytest.raises(Stopped):
        trainer.train()
    return trainer, trainer.batch, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_a_step_of_nkd_has_the_gradient_of_the_paper(its, tmp_path):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    its["NKDTrainer"].teacher = its["Teacher"](network)
    trainer, batch, gradients = step_of(its["NKDTrainer"], options(its, tmp_path))
    trainer.model.zero_grad()
    # in training mode, so that batch norm uses the statistics of the batch again
    logits, labels = trainer.model(batch["img"]), batch["cls"]
    rows = zip(logits.tolist(), network(batch["img"]).tolist(), labels.tolist())
    by_hand = torch.tensor([oracle.nkd_row_gradient(s, t, y, 1.5, 1.0) for s, t, y in rows])
    by_hand += logits.detach().softmax(1) - F.one_hot(labels, 10)
    logits.backward(by_hand / len(labels))
    assert_equal(gradients, {name: p.grad for name, p in trainer.model.named_parameters()})


def test_a_step_of_uskd_has_the_loss_of_the_paper_and_trains_the_weak_head(its, tmp_path):
    trainer, batch, gradients = step_of(its["USKDTrainer"], options(its, tmp_path))
    model, labels = trainer.model, batch["cls"]
    with torch.no_grad():
        logits, feature = model(batch["img"]), nn.Sequential(*model.model[:7])(batch["img"]).mean((2, 3))
        weak_logits = model.weak_head(feature)
    one_hot = F.one_hot(labels, 10)
    rows = oracle.uskd_rows(logits.tolist(), weak_logits.tolist(), one_hot.tolist(), 1.0, 0.1, 0.005, 0.1)
    assert trainer.loss_items["kd_loss"].item() == pytest.approx(sum(rows) / len(labels), rel=1e-4)
    # d (mu x the smoothed cross-entropy) / d (weight of the head)
    by_hand = 0.005 * (weak_logits.softmax(1) - 0.9 * one_hot - 0.01).T @ feature / len(labels)
    torch.testing.assert_close(gradients["weak_head.weight"], by_hand, rtol=1e-3, atol=1e-7)
    assert gradients["model.0.conv.weight"].abs().sum() > 0


def test_the_loop_learns_and_its_students_are_plain(its, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["ultralytics_trainer.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples/loops/ultralytics_trainer.py"), run_name="__main__")
    printed = dict(re.findall(r"^(\w+Trainer) +([\d.]+)%$", capfd.readouterr().out, re.M))
    assert printed.keys() == {"ClassificationTrainer", "NKDTrainer", "USKDTrainer"}
    assert min(map(float, printed.values())) > 20  # chance is 10
    for name in printed:
        student = its["YOLO"](tmp_path / name / "weights/best.pt")
        assert type(student.model).__name__ == "ClassificationModel"
        assert student.model.state_dict().keys() == plain_keys(its)
        answer = student.predict(next((tmp_path / "digits/val/3").iterdir()), imgsz=32, verbose=False)[0]
        assert answer.probs.data.shape == (10,)


def plain_keys(its):
    return its["YOLO"]("yolov8n-cls.yaml").model.state_dict().keys()


def test_uskd_resumes_with_its_weak_head_and_draws_its_plots(its, tmp_path):
    class Stopping(its["USKDTrainer"]):
        def save_model(self):
            super().save_model()
            raise Stopped

    with pytest.raises(Stopped):
        Stopping(overrides=options(its, tmp_path, epochs=2, name="uskd")).train()
    last = tmp_path / "uskd/weights/last.pt"
    saved = torch.load(last, weights_only=False)["ema"].weak_head.weight.float()
    found = []

    class Resumed(its["USKDTrainer"]):
        def resume_training(self, checkpoint):
            super().resume_training(checkpoint)
            found.append(self.model.weak_head.weight.detach().clone())

    Resumed(overrides=dict(resume=str(last), plots=True)).train()
    torch.testing.assert_close(found, [saved])
    student = torch.load(last, weights_only=False)["model"]
    assert student.state_dict().keys() == plain_keys(its)

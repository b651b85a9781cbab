"""Test the start of fine-tuning: a linear probe of the frozen features, and frozen batch norms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from running import run
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from kdlite.training.loading import Batch, CorruptCount, ToDevice
from kdlite.training.probe import WEIGHT_DECAY, fit_classifiers, fit_linear
from kdlite.training.weights import freeze_batch_norm

TO_DEVICE = ToDevice([0.0] * 3, [1 / 255] * 3, torch.device("cpu"))  # leaves pixel values as they are


def clusters(rows=60, features=8, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    return torch.tensor(
        5 + 3 * rng.normal(size=(classes, features))[labels] + rng.normal(size=(rows, features))
    ), labels


def batches(images, labels, size=16):
    return [Batch(images[i : i + size], labels[i : i + size], []) for i in range(0, len(images), size)]


class Backbone(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU()), head

    def forward(self, images):
        return self.head(self.body(images))


def test_the_probe_equals_scikit_learns_logistic_regression_on_standardised_features():
    features, labels = clusters()
    scaler = StandardScaler().fit(features)
    theirs = LogisticRegression(C=1 / (WEIGHT_DECAY * len(labels)), tol=1e-8, max_iter=1000)
    theirs.fit(scaler.transform(features), labels)
    weight, bias, top1 = fit_linear(features.float(), torch.tensor(labels), 3)
    ours = (features.float() @ weight.T + bias).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(scaler.transform(features)), atol=2e-3)
    assert top1 == pytest.approx(100 * theirs.score(scaler.transform(features), labels))


def test_a_class_without_an_image_and_a_constant_feature_leave_the_probe_finite():
    features = torch.cat([clusters()[0].float(), torch.ones(60, 1)], 1)
    weight, bias, _ = fit_linear(features, torch.zeros(60, dtype=torch.long), 3)
    assert weight.isfinite().all()
    assert bias.isfinite().all()


def test_class_weights_move_the_probe_towards_a_rare_class():
    features, labels = clusters(features=2, rows=90)
    target = torch.tensor(np.where(labels == 0, 0, 1))
    plain, weighted = (fit_linear(features.float(), target, 2, w) for w in (None, torch.tensor([9.0, 1.0])))
    shares = [(features.float() @ w.T + b).softmax(1)[:, 0].mean() for w, b, _ in (plain, weighted)]
    assert shares[1] > shares[0] + 0.05


def test_a_linear_classifier_is_fitted_on_labelled_readable_images_only():
    torch.manual_seed(0)
    model = Backbone(nn.Linear(8, 2))
    bright = torch.arange(40) % 2
    images = torch.randint(0, 60, (40, 3, 2, 2)) + 150 * bright.view(-1, 1, 1, 1)
    parts = batches(images.to(torch.uint8), bright)
    parts.append(Batch(None, None, [("broken.jpg", "cut off")]))
    line = fit_classifiers(model, {"head": model.head}, parts, TO_DEVICE, CorruptCount("training", 1000))
    assert "head starts as a linear probe of 40 training images (100.0 % of them right)" in line
    with torch.no_grad():
        assert (model(images.float()).argmax(1) == bright).all()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("head", [nn.Conv2d(8, 2, 1), nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Linear(2, 2))])
def test_a_classifier_that_does_not_read_one_row_per_image_stays_at_zero(head):
    model = Backbone(head)
    if isinstance(head, nn.Conv2d):
        model.body.append(nn.Unflatten(1, (8, 1, 1)))
    layer = head if isinstance(head, nn.Conv2d) else head[1]
    nn.init.zeros_(layer.weight)
    images, labels = torch.zeros(8, 3, 2, 2, dtype=torch.uint8), torch.arange(8) % 2
    line = fit_classifiers(model, {"head": layer}, batches(images, labels), TO_DEVICE, CorruptCount("training", 8))
    assert "head starts at zero" in line
    assert not layer.weight.any()


def test_frozen_batch_norms_keep_their_averages_and_train_their_weights():
    trained, new = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    trained.running_var.fill_(2.0)
    net = nn.Sequential(trained, new)
    net.train()
    freeze_batch_norm(net)
    net(torch.randn(4, 3, 5, 5)).square().sum().backward()
    assert (trained.running_var == 2).all()
    assert trained.weight.grad.any()
    assert (new.running_var != 1).any()  # a new batch norm has no averages to keep


@pytest.mark.slow
def test_random_weights_start_without_a_probe_even_if_the_classifier_is_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "from torch import nn\n"
        "def zero(num_classes):\n"
        "    head = nn.Linear(8, num_classes)\n"
        "    nn.init.zeros_(head.weight)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)\n"
    )
    flags = ["--device", "cpu", "--epochs", 1, "--img-size", 16, "--reference", 0, "--model", "own.py:zero"]
    run(*flags, "--output", "first")
    assert "linear probe" not in capsys.readouterr().out

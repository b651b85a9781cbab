"""Train a segmentation model of torchvision with NKD or USKD at every pixel, except pixels of class 255.

python examples/loops/segmentation.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from kdlite import FeatureTap, nkd_loss, uskd_loss

CLASSES = 11  # background and ten digits
digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(load_digits().target)


def scene(i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 3, 64, 64) of digits, and the class of each pixel (N, 64, 64): 255 (ignored) for faint ink."""
    ink = F.interpolate(digits[i], size=64, mode="bilinear")
    mask = torch.where(ink[:, 0] > 0.5, labels[i].view(-1, 1, 1) + 1, 0)
    return ink.repeat(1, 3, 1, 1), mask.where((ink[:, 0] > 0.5) | (ink[:, 0] < 0.2), 255)


class WithDenseWeakHead(nn.Module):
    """In training, also return weak logits of each pixel. DDP and FSDP see network and weak head as one module."""

    def __init__(self, model: nn.Module, layer: str, channels: int) -> None:
        super().__init__()
        self.model, self.tap = model, FeatureTap(model, layer)
        self.head = nn.Conv2d(channels, CLASSES, 1)

    def forward(self, x):
        logits = self.model(x)["out"]
        weak_logits = F.interpolate(self.head(self.tap.pop()), logits.shape[2:], mode="bilinear")
        return (logits, weak_logits) if self.training else logits


def network() -> nn.Module:
    torch.manual_seed(0)
    return lraspp_mobilenet_v3_large(num_classes=CLASSES, weights_backbone=None)


def fit(model: nn.Module, loss_of, steps: int = 6) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        x, y = scene(torch.randint(1797, (8,)))
        loss = loss_of(model.train(), x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{loss_of.__name__:<16} {loss.item():.2f}")


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x)["out"], y, ignore_index=255)


def with_teacher(model, x, y):
    with torch.no_grad():
        teacher_logits = teacher.eval()(x)["out"]
    logits = model(x)["out"]
    return F.cross_entropy(logits, y, ignore_index=255) + nkd_loss(logits, teacher_logits, y, ignore_index=255)


def without_teacher(model, x, y):
    logits, weak_logits = model(x)
    return F.cross_entropy(logits, y, ignore_index=255) + uskd_loss(logits, weak_logits, y, ignore_index=255)


if __name__ == "__main__":
    teacher, student, alone = network(), network(), WithDenseWeakHead(network(), "backbone.8", channels=80)
    fit(teacher, cross_entropy)
    fit(student, with_teacher)
    fit(alone, without_teacher)
    alone.tap.close()  # alone.model is the plain student again

"""Train with several losses: cross-entropy, NKD from two teachers, USKD, and a hint from a teacher's feature.

python examples/loops/several_losses.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from kdlite import FeatureTap, Teacher, WithWeakHead, nkd_loss, uskd_loss

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)


def cnn(width: int) -> nn.Module:
    model = nn.Sequential()
    model.layer1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
    model.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.fc = nn.Linear(8 * width, 10)
    return model


def fit(parameters, compute, epochs: int = 4) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(64):
            losses = compute(images[batch], labels[batch])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    return losses  # by name, for the log


def accuracy(model: nn.Module) -> float:
    return (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()


class Student(nn.Module):
    """Hold the trained parts: student, weak head, and a layer that maps its channels to the teacher's."""

    def __init__(self, model: nn.Module, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.wrapped = WithWeakHead(model, "layer1", example_input=images[:2])
        self.tap = FeatureTap(model, "layer2")
        self.to_teacher = nn.Conv2d(channels, teacher_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weak_logits = self.wrapped(x)
        return logits, weak_logits, self.to_teacher(self.tap.pop())


def losses_of(student: nn.Module, teachers, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    first, second = teachers
    with FeatureTap(first, "model.layer2") as tap:
        first_logits, feature = first(x), tap.pop()
    logits, weak_logits, hint = student(x)
    return {
        "ce": F.cross_entropy(logits, y),
        "nkd": 0.5 * nkd_loss(logits, first_logits, y) + 0.5 * nkd_loss(logits, second(x), y),
        # NKD has a target term already, so add only the other two terms of USKD
        "uskd": uskd_loss(logits, weak_logits, y, alpha=0.0),
        "hint": 0.1 * F.mse_loss(hint, feature),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    teachers = []
    for width in (32, 24):
        model = cnn(width)
        fit(model.parameters(), lambda x, y, model=model: {"ce": F.cross_entropy(model(x), y)})
        teachers.append(Teacher(model))
    student = Student(cnn(8), channels=16, teacher_channels=64)
    last = fit(student.parameters(), lambda x, y: losses_of(student, teachers, x, y))
    print(", ".join(f"{name} {loss.item():.3f}" for name, loss in last.items()))
    student.tap.close()
    print(f"student {accuracy(student.wrapped.close()):.1%}")

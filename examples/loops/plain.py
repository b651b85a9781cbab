"""Show the lines to add to your own training loop, on scikit-learn's digits, in under a minute on a laptop.

python examples/loops/plain.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from kdlite import WithWeakHead, nkd_loss, uskd_loss

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, val = order[:1400], order[1400:]


def cnn(width: int) -> nn.Module:
    torch.manual_seed(0)  # all students start from the same weights
    model = nn.Sequential()
    model.layer1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    model.layer2 = nn.Sequential(
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
    )
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.fc = nn.Linear(2 * width, 10)
    return model


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return (model(images[val]).argmax(1) == labels[val]).float().mean().item()


def fit(model: nn.Module, loss_of, epochs: int = 15) -> nn.Module:
    """Train the model, as your loop does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        model.train()
        for batch in train[torch.randperm(len(train))].split(64):
            loss = loss_of(model, images[batch], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def plain(model, x, y):
    return F.cross_entropy(model(x), y)


def with_teacher(model, x, y):
    with torch.no_grad():
        teacher_logits = teacher(x)
    logits = model(x)
    return F.cross_entropy(logits, y) + nkd_loss(logits, teacher_logits, y)  # changed: + the loss


def without_teacher(model, x, y):
    logits, weak_logits = model(x)  # changed: WithWeakHead returns two logits in training, one in eval mode
    return F.cross_entropy(logits, y) + uskd_loss(logits, weak_logits, y)  # changed: + the loss


teacher = fit(cnn(32), plain)
print(f"teacher          {accuracy(teacher):.1%}")
print(f"cross-entropy    {accuracy(fit(cnn(8), plain)):.1%}")
print(f"NKD              {accuracy(fit(cnn(8), with_teacher)):.1%}")

student = WithWeakHead(cnn(8), tap="layer1", example_input=images[:2])  # head and student in one module
fit(student, without_teacher)
plain_student = student.close()  # the student without head and hook
print(f"USKD             {accuracy(plain_student):.1%}")

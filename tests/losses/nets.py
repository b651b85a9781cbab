"""Define small networks for the tests of FeatureTap and WithWeakHead."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdlite import uskd_loss


class Net(nn.Module):
    """Run a small CNN with two stages; the layer ``unused`` never runs."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.unused = nn.Identity()
        self.fc = nn.Linear(16, 5)
        self.reentrant = reentrant  # use_reentrant of activation checkpointing; None: no checkpointing

    def forward(self, x):
        if self.reentrant is None:
            x = self.layer2(self.layer1(x))
        else:
            x = checkpoint(lambda x: self.layer2(self.layer1(x)), x.requires_grad_(), use_reentrant=self.reentrant)
        return self.fc(x.mean((2, 3)))


class Entry(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.key = key

    def forward(self, output):
        return output[self.key]


class Transpose(nn.Module):
    """Swap the first two dimensions: (N, L, C) becomes (L, N, C)."""

    def forward(self, x):
        return x.transpose(0, 1)


class Returning(nn.Module):
    """Return ``pack(logits)`` of a small model."""

    def __init__(self, pack):
        super().__init__()
        self.net, self.pack = Net(), pack

    def forward(self, x):
        return self.pack(self.net(x))


class TwoInputs(Net):
    """Multiply the images by a mask, and the logits by a scale."""

    def forward(self, x, mask, *, scale):
        return super().forward(x * mask) * scale


class Second(nn.Module):
    def forward(self, x):
        return x[0].mean(1)


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


def classifier(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 5))


def fixed_size(*shape):
    """Return a model for images of 8 px only; its layer "1" returns a tensor (N, *shape)."""
    size = math.prod(shape)
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(192, size)), nn.Unflatten(1, shape), nn.Flatten(), nn.Linear(size, 5)
    )


def images(n=2, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def train_step(student, x):
    logits, weak_logits = student(x)
    target = torch.arange(len(x)) % logits.shape[1]
    loss = F.cross_entropy(logits, target) + uskd_loss(logits, weak_logits, target)
    loss.backward()
    return loss.detach()

"""Define models for the tests of user models, as in --model tests/own_models.py:tiny."""

import warnings

import torch
import torchvision
from timm.models.byobnet import RepVggBlock
from torch import nn


def tiny(num_classes):
    """Build two convolution stages and a classifier."""
    model = nn.Sequential()
    model.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    model.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.fc = nn.Linear(16, num_classes)
    return model


class OtherInEval(nn.Module):
    """Return logits in training, and a tuple or probabilities in eval mode."""

    def __init__(self, num_classes: int, change) -> None:
        super().__init__()
        self.net, self.change = tiny(num_classes), change

    def forward(self, x):
        return self.net(x) if self.training else self.change(self.net(x))


def eval_tuple(num_classes):
    return OtherInEval(num_classes, lambda logits: (logits, logits))


def eval_softmax(num_classes):
    return OtherInEval(num_classes, lambda logits: logits.softmax(1))


def tied(num_classes):
    """Build a model that uses one layer twice."""
    layer = nn.Linear(16, 16)  # for each row of 16 pixels
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def with_mean(num_classes):
    model = tiny(num_classes)
    model.register_buffer("mean", torch.full((1, 3, 1, 1), 0.25))
    return model


def with_input_size(num_classes):
    model = tiny(num_classes)
    model.input_size = 224
    return model


def dropout(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, num_classes))  # fmt: skip


def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def wrong_classes(num_classes):
    return tiny(3)


def not_a_model(num_classes):
    return num_classes


def raises(num_classes):
    return {}["nothing"]


class Branching(nn.Module):
    """Use one branch for dark images and another for bright images; a tracer keeps only one branch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        x = x.mean((2, 3))
        if x[0].mean() > 0:
            return self.fc(x)
        return -self.fc(x)


def branching(num_classes):
    return Branching(num_classes)


def small_swin(num_classes):
    """Build torchvision's Swin with two stages of two blocks."""
    return torchvision.models.SwinTransformer(
        [4, 4], 32, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=num_classes
    )


def small_shufflenet(num_classes):
    """Build torchvision's ShuffleNetV2 x1.0 with two units per stage."""
    return torchvision.models.ShuffleNetV2([2, 2, 2], [24, 116, 232, 464, 1024], num_classes=num_classes)


def small_regnet(num_classes):
    """Build torchvision's RegNetX with one or two blocks per stage."""
    blocks = torchvision.models.regnet.BlockParams.from_init_params(depth=5, w_0=24, w_a=36.0, w_m=2.5, group_width=24)
    return torchvision.models.RegNet(blocks, num_classes=num_classes)


def plain(num_classes):
    """Build a model without batch norm and dropout, so that its gradient does not depend on how a batch is split."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))  # fmt: skip


def softmax(num_classes):
    return nn.Sequential(plain(num_classes), nn.Softmax(1))


def weight_normed(num_classes):
    """Build a model with the old weight_norm, which stores a tensor that deepcopy cannot copy."""
    model = plain(num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[0])
    return model


def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.LazyLinear(num_classes))  # fmt: skip


class NaNAfter(nn.Module):
    """Return NaN in evaluation after 60 training steps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = plain(num_classes)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
            return self.model(x)
        return self.model(x) + torch.where(self.steps > 60, torch.nan, 0.0)


def nan_after(num_classes):
    return NaNAfter(num_classes)


def infinite_gradient(num_classes):
    """Build a model with a finite loss and an infinite gradient."""
    model = plain(num_classes)
    model[0].weight.register_hook(lambda grad: grad * torch.inf)
    return model


def parametrized(num_classes):
    """Build a model with the new weight_norm and a spectral norm, which compute the weights at every call."""
    model = plain(num_classes)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    torch.nn.utils.parametrizations.spectral_norm(model[2])
    return model


def branched(num_classes):
    """Build two blocks of RepVGG, which have several branches in training and one convolution after fusion."""
    return nn.Sequential(RepVggBlock(3, 8, stride=2), RepVggBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))  # fmt: skip


class Unused(nn.Module):
    """Contain a layer that never runs; several processes would wait for its gradient."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model, self.forgotten = plain(num_classes), nn.Linear(2, 2)

    def forward(self, x):
        return self.model(x)


def unused(num_classes):
    return Unused(num_classes)

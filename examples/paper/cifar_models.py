"""Build the networks of the papers on CIFAR-100 distillation, for 32x32 images. Torchvision and timm do not have them.

    python train.py --data cifar100 --model examples/paper/cifar_models.py:resnet8x4 ...

The names are those in the tables of Tian et al. 2020 (CRD, arXiv 1910.10699). Residual networks: He et al. 2016 (arXiv
1512.03385, section 4.2), with projection shortcuts. Wide residual networks: Zagoruyko and Komodakis 2016 (arXiv
1605.07146). If torchvision has a block, we use it.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from torchvision.models.vgg import make_layers
from torchvision.ops import Conv2dNormActivation


def classifier(num_classes: int, channels: int, **layers: nn.Module) -> nn.Sequential:
    """Return layers, global average pooling and a linear classifier; the convolutions have He's initialisation."""
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, num_classes)}
    model = nn.Sequential(OrderedDict(**layers, **head))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def stage(
    block: Callable[[int, int, int], nn.Module], channels_in: int, channels: int, blocks: int, stride: int = 2
) -> nn.Sequential:
    """Return a stage of blocks, made by block(channels_in, channels, stride).

    Only the first block may change the channels and the size.
    """
    first = block(channels_in, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))


def basic_block(channels_in: int, channels: int, stride: int) -> nn.Module:
    """Return torchvision's block, with a projection as the shortcut if the channels differ."""
    shortcut = None
    if channels_in != channels:
        shortcut = nn.Sequential(conv1x1(channels_in, channels, stride), nn.BatchNorm2d(channels))
    return BasicBlock(channels_in, channels, stride, shortcut)


def resnet(num_classes: int, depth: int = 20, width: int = 16, stem: int | None = None) -> nn.Module:
    """Return a network of 6n + 2 layers: three stages of n blocks with width, 2 x width and 4 x width channels."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
    blocks = depth // 6
    stem = stem or width
    return classifier(
        num_classes,
        4 * width,
        stem=nn.Sequential(conv3x3(3, stem), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)),
        layer1=stage(basic_block, stem, width, blocks, stride=1),
        layer2=stage(basic_block, width, 2 * width, blocks),
        layer3=stage(basic_block, 2 * width, 4 * width, blocks),
    )


resnet8, resnet14, resnet20, resnet32, resnet44, resnet56, resnet110 = (
    partial(resnet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)
)
resnet8x4, resnet32x4 = (partial(resnet, depth=depth, width=64, stem=32) for depth in (8, 32))


class PreActivationBlock(nn.Module):
    """Apply two convolutions, each after batch norm and ReLU.

    The shortcut is the input or, if the channels change, a projection of the first ReLU's output.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU(inplace=True))
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.norm2 = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.conv2 = conv3x3(channels, channels)
        self.shortcut = conv1x1(channels_in, channels, stride) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x)
        residual = self.conv2(self.norm2(self.conv1(active)))
        return residual + (self.shortcut(active) if self.shortcut else x)


def wrn(num_classes: int, depth: int = 40, width: int = 2) -> nn.Module:
    """Return a wide residual network of 6n + 4 layers; its stages have 16, 32 and 64 channels, each times `width`."""
    blocks = depth // 6
    return classifier(
        num_classes,
        64 * width,
        stem=conv3x3(3, 16),
        layer1=stage(PreActivationBlock, 16, 16 * width, blocks, stride=1),
        layer2=stage(PreActivationBlock, 16 * width, 32 * width, blocks),
        layer3=stage(PreActivationBlock, 32 * width, 64 * width, blocks),
        norm=nn.Sequential(nn.BatchNorm2d(64 * width), nn.ReLU(inplace=True)),
    )


wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2 = (
    partial(wrn, depth=depth, width=width) for depth, width in ((16, 1), (16, 2), (40, 1), (40, 2))
)


def vgg(num_classes: int, convolutions: int = 1) -> nn.Module:
    """Return VGG with batch norm: five groups of `convolutions` layers, three poolings, one linear layer."""
    widths: list[str | int] = []
    for width in (64, 128, 256):
        widths += [*[width] * convolutions, "M"]
    return classifier(num_classes, 512, features=make_layers([*widths, *[512] * 2 * convolutions], batch_norm=True))


vgg8, vgg13 = (partial(vgg, convolutions=n) for n in (1, 2))


class InvertedResidual(nn.Module):
    """Apply MobileNetV2's block with plain ReLU. It has the first 1x1 convolution even if the expansion is 1."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.layers = nn.Sequential(
            Conv2dNormActivation(channels_in, hidden, 1),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden),
            Conv2dNormActivation(hidden, channels, 1, activation_layer=None),
        )
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet_v2_half(num_classes: int) -> nn.Module:
    """Return MobileNetV2 of half the width (Sandler et al. 2018, table 2), with strides for 32 px."""
    stages, channels_in = [], 16
    for expansion, channels, blocks, stride in (
        (1, 8, 1, 1),
        (6, 12, 2, 1),
        (6, 16, 3, 2),
        (6, 32, 4, 2),
        (6, 48, 3, 1),
        (6, 80, 3, 2),
        (6, 160, 1, 1),
    ):
        layers = []
        for i in range(blocks):
            layers.append(InvertedResidual(channels_in, channels, stride if i == 0 else 1, expansion))
            channels_in = channels
        stages.append(nn.Sequential(*layers))
    return classifier(
        num_classes,
        1280,
        stem=Conv2dNormActivation(3, 16, 3, 2),
        stages=nn.Sequential(*stages),
        last=Conv2dNormActivation(160, 1280, 1),
    )


class ShuffleUnit(nn.Module):
    """Apply ShuffleNet's bottleneck of grouped 1x1 convolutions (Zhang et al. 2018, figure 2)."""

    def __init__(self, channels_in: int, channels: int, stride: int, groups: int = 3) -> None:
        super().__init__()
        branch = channels - channels_in if stride == 2 else channels  # the shortcut gives the other channels
        hidden = branch // 4
        first_groups = 1 if channels_in == 24 else groups
        self.layers = nn.Sequential(
            Conv2dNormActivation(channels_in, hidden, 1, groups=first_groups),
            nn.ChannelShuffle(first_groups),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden),
            Conv2dNormActivation(hidden, branch, 1, groups=groups, activation_layer=None),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return torch.relu(torch.cat([out, self.pool(x)], 1) if self.pool else out + x)


def shufflenet_v1(num_classes: int) -> nn.Module:
    """Return ShuffleNet with 3 groups and a stem that keeps 32 px."""
    return classifier(
        num_classes,
        960,
        stem=Conv2dNormActivation(3, 24, 1),
        layer1=stage(ShuffleUnit, 24, 240, 4),
        layer2=stage(ShuffleUnit, 240, 480, 8),
        layer3=stage(ShuffleUnit, 480, 960, 4),
    )


def shufflenet_v2(num_classes: int) -> nn.Module:
    """Return torchvision's network with a stem that keeps 32 px."""
    model = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=num_classes)
    model.conv1, model.maxpool = Conv2dNormActivation(3, 24, 1), nn.Identity()
    return model

"""ResNets for small images, built from torchvision's blocks: --model examples/small_resnet.py:resnet.

Three stages of width, 2 x width and 4 x width channels; width=16 blocks=3 is the ResNet-20 of He et al. 2016
(arXiv 1512.03385, section 4.2) with projection shortcuts.
"""

from collections import OrderedDict

from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3


def resnet(num_classes: int, width: int = 16, blocks: int = 3) -> nn.Module:
    def stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
        shortcut = None
        if channels_in != channels:
            shortcut = nn.Sequential(conv1x1(channels_in, channels, stride), nn.BatchNorm2d(channels))
        first = BasicBlock(channels_in, channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    model = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            layer1=stage(width, width, 1),
            layer2=stage(width, 2 * width, 2),
            layer3=stage(2 * width, 4 * width, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(4 * width, num_classes),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model

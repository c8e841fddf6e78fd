"""Small models written the ways people write them."""

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, **kwargs):
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False, **kwargs)
    return conv, nn.BatchNorm2d(channels_out)


class Plain(nn.Sequential):
    """One block of each activation."""

    def __init__(self):
        activations = [
            nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(inplace=True),
            nn.Hardswish(), nn.Hardtanh(0, 6),
        ]  # fmt: skip
        blocks = [nn.Sequential(*conv_bn(3 if i == 0 else 6, 6), a)
                  for i, a in enumerate(activations)]  # fmt: skip
        super().__init__(*blocks, nn.Sequential(*conv_bn(6, 4)))


class BasicBlock(nn.Module):
    """The ResNet block: one ReLU module called twice, a residual added in place."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(channels_in, channels, stride=stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_bn(channels, channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(*conv_bn(channels_in, channels, 1, stride))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(channels_in, channels, 1)
        self.conv2, self.bn2 = conv_bn(channels, channels, groups=2)
        self.conv3, self.bn3 = conv_bn(channels, channels_in, 1)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)).relu_()
        return torch.relu(torch.add(x, self.bn3(self.conv3(out))))


class Branches(nn.Module):
    """Sums of two patterns, written as an addition that either could take."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 4)
        self.conv2, self.bn2 = conv_bn(3, 4, 1)
        self.conv3, self.bn3 = conv_bn(4, 4)
        self.conv4, self.bn4 = conv_bn(4, 4, 1)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))
        shortcut = self.bn4(self.conv4(x))
        out = self.bn3(self.conv3(x))
        out += shortcut
        return F.relu(out)


class InvertedResidual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(*conv_bn(channels, 12, 1), nn.ReLU6(inplace=True)),
            nn.Sequential(*conv_bn(12, 12, groups=12), nn.ReLU6(inplace=True)),
            *conv_bn(12, channels, 1),
        )

    def forward(self, x):
        return x + self.conv(x)


class DenseLayer(nn.Module):
    """Takes a list, a longer one in every layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv1, self.bn1 = conv_bn(channels, 6, 1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, features):
        if isinstance(features, torch.Tensor):
            features = [features]
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.conv2(F.relu(self.bn1(self.conv1(x))))


class DenseBlock(nn.ModuleDict):
    def __init__(self):
        super().__init__({f"layer{i}": DenseLayer(4 * (i + 1)) for i in range(3)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8, stride=2)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12, 2))
        self.layer2 = nn.Sequential(Bottleneck(12, 6), InvertedResidual(12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        x = self.layer2(self.layer1(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


class Digits(nn.Module):
    """The small CNN of the field; its head depends on the mode."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.aux = nn.Linear(4 * 16, 10)
        self.fc = nn.Linear(8 * 4, 10)
        self.drop_rate = 0.3

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        aux = self.aux(x.flatten(1)) if self.training else None
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.dropout(x.view(x.size(0), -1), self.drop_rate, training=self.training)
        x = self.fc(x)
        return (x, aux) if self.training else x

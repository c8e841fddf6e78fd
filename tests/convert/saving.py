"""Models that save memory in training, and what tells them from the normal mode."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.kept import kept_bytes
from tests.convert.models import BasicBlock, conv_bn

LEVELS = [True, "recompute"]


def unit(channels_in, channels_out, act=nn.ReLU):
    return nn.Sequential(*conv_bn(channels_in, channels_out), act())


class Concat(nn.Module):
    """Branches joined, and a view read by a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = unit(3, 4), unit(3, 6, nn.SiLU), unit(10, 4, nn.Hardswish)
        self.fc = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        x = self.c(x)
        return self.fc(x.view(len(x), -1))


class InPlace(nn.Module):
    """Writes to the outputs of units before the next layer reads them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (unit(3 if i == 0 else 4, 4, nn.Identity) for i in range(3))
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = self.a(x)
        y.relu_()
        z = self.b(y)
        z.add_(y).mul_(2)
        z[:, 1:3].sigmoid_()
        return self.conv(F.dropout(self.c(z), 0.5, inplace=True))


class Halves(nn.Module):
    """Every layer reads half of what the one before wrote, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = unit(3, 8), unit(4, 4), unit(4, 4)

    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        return F.max_pool2d(torch.cat([self.b(left), right, self.c(right)], 1), 2)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.stem, self.use_reentrant = unit(3, 8), use_reentrant
        self.blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.tail = BasicBlock(8, 12, 2)

    def forward(self, x):
        x = checkpoint(self.blocks, self.stem(x), use_reentrant=self.use_reentrant)
        return self.tail(x)


def build(stock):
    torch.manual_seed(0)
    model = stock()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0)
            nn.init.normal_(part.bias)
    return model


@cache
def welded(stock, level):
    return tw.weld(build(stock), memory_saving=level)


def pair(stock, level):
    """A model welded normally and one that saves memory, apart in all state."""
    return copy.deepcopy(welded(stock, False)), copy.deepcopy(welded(stock, level))


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def loss_of(model, x):
    torch.manual_seed(2)
    return model(x).square().mean()


def step(model, x, loss_of=loss_of):
    """Everything a training step leaves behind."""
    x.grad = None
    loss = loss_of(model, x)
    loss.backward()
    return [loss, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same_bits(normal, saving, x, run=step):
    for ours, theirs in zip(run(saving, x), run(normal, x), strict=True):
        assert torch.equal(ours, theirs)


def kept(model, x, loss_of=loss_of):
    return kept_bytes(lambda: loss_of(model, x))

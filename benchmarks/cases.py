"""What the benchmarks measure: layers and whole models, parameters of models, linear layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks import models

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ConvCase:
    """A square convolution padded to keep its size, apart from the stride."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    @property
    def padding(self) -> int:
        """Rows of zeros on each side."""
        return self.dilation * (self.kernel // 2)

    @property
    def input_shape(self) -> Shape:
        """``[N, C_in, H, W]``."""
        return self.batch, self.in_channels, self.size, self.size

    @property
    def weight_shape(self) -> Shape:
        """``[C_out, C_in / groups, K, K]``."""
        return self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel

    @property
    def output_shape(self) -> Shape:
        """``[N, C_out, H_out, W_out]``."""
        covered = self.dilation * (self.kernel - 1) + 1
        size = (self.size + 2 * self.padding - covered) // self.stride + 1
        return self.batch, self.out_channels, size, size

    @property
    def operations(self) -> int:
        """Multiplications and additions of one pass."""
        return 2 * math.prod(self.output_shape) * math.prod(self.weight_shape[1:])


@dataclass(frozen=True)
class ModelCase:
    """A model and square images for it."""

    model: str
    build: Callable[[], nn.Module]
    batch: int
    channels: int = 3
    size: int = 224

    @property
    def name(self) -> str:
        """Model and batch."""
        return f"{self.model}, batch {self.batch}"

    @property
    def input_shape(self) -> Shape:
        """``[N, C, H, W]``."""
        return self.batch, self.channels, self.size, self.size


@dataclass(frozen=True)
class AdamWCase:
    """The parameters of a model."""

    name: str
    shapes: Sequence[Shape]

    @property
    def size(self) -> int:
        """Parameters in all."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class LinearCase:
    """``[M, K]`` times ``[N, K]`` transposed."""

    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        """``MxNxK``."""
        return f"{self.m}x{self.n}x{self.k}"


def resnet50_shapes() -> list[Shape]:
    """Return the shapes of ResNet-50's 161 parameters."""
    shapes: list[Shape] = []

    def conv_bn(out_channels: int, in_channels: int, kernel: int) -> None:
        shapes.extend([(out_channels, in_channels, kernel, kernel), (out_channels,)])
        shapes.append((out_channels,))

    conv_bn(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv_bn(width, channels, 1)
            conv_bn(width, width, 3)
            conv_bn(4 * width, width, 1)
            if block == 0:
                conv_bn(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def gpt2_shapes(layers: int = 12, width: int = 768) -> list[Shape]:
    """Return the shapes of the smallest GPT-2's 148 parameters."""
    shapes: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width)]
        shapes += [(width,)]
    return [*shapes, (width,), (width,)]


def mnist_cnn_shapes() -> list[Shape]:
    """Return the shapes of a small CNN's 16 parameters: three convolutions, two linear layers."""
    shapes: list[Shape] = []
    for out_channels, in_channels in ((16, 1), (32, 16), (64, 32)):
        shapes += [(out_channels, in_channels, 3, 3), *[(out_channels,)] * 3]
    return [*shapes, (128, 576), (128,), (10, 128), (10,)]


CONV = [
    ConvCase("mnist 1->16 3x3 @28", 64, 1, 16, 3, 28),
    ConvCase("mnist 16->32 3x3 @14", 64, 16, 32, 3, 14),
    ConvCase("r50 stem 3->64 7x7/2 @224", 8, 3, 64, 7, 224, stride=2),
    ConvCase("r50 64->64 3x3 @56", 8, 64, 64, 3, 56),
    ConvCase("r50 64->256 1x1 @56", 8, 64, 256, 1, 56),
    ConvCase("r50 256->256 3x3 @14", 8, 256, 256, 3, 14),
    ConvCase("r50 1024->256 1x1 @14", 8, 1024, 256, 1, 14),
    ConvCase("mbv2 depthwise 144 3x3 @56", 8, 144, 144, 3, 56, groups=144),
    # Above, the layers of the first comparison; below, what else there is in models and outside.
    ConvCase("r50 128->128 3x3 @28", 8, 128, 128, 3, 28),
    ConvCase("r50 512->512 3x3 @7", 8, 512, 512, 3, 7),
    ConvCase("64->64 3x3 @56, batch 1", 1, 64, 64, 3, 56),
    ConvCase("128->128 3x3 @28, batch 1", 1, 128, 128, 3, 28),
    ConvCase("512->512 3x3 @7, batch 1", 1, 512, 512, 3, 7),
    ConvCase("37->53 3x3 @28", 8, 37, 53, 3, 28),
    ConvCase("r50 128->128 3x3/2 @56", 8, 128, 128, 3, 56, stride=2),
    ConvCase("64->64 3x3 dilated 2 @28", 8, 64, 64, 3, 28, dilation=2),
    ConvCase("32->64 5x5 @28", 8, 32, 64, 5, 28),
    ConvCase("resnext 128 3x3 groups 32 @56", 8, 128, 128, 3, 56, groups=32),
    ConvCase("r50 256->512 1x1/2 @56", 8, 256, 512, 1, 56, stride=2),
    ConvCase("mbv2 24->144 1x1 @56", 8, 24, 144, 1, 56),
    ConvCase("mbv2 144->24 1x1 @56", 8, 144, 24, 1, 56),
    ConvCase("mbv2 depthwise 144 3x3/2 @56", 8, 144, 144, 3, 56, stride=2, groups=144),
    ConvCase("effnet depthwise 240 5x5 @28", 8, 240, 240, 5, 28, groups=240),
]
CONV_QUICK = [
    ConvCase("mnist 1->16 3x3 @28, batch 8", 8, 1, 16, 3, 28),
    ConvCase("64->64 3x3 @14, batch 1", 1, 64, 64, 3, 14),
    ConvCase("depthwise 32 3x3 @14, batch 1", 1, 32, 32, 3, 14, groups=32),
    ConvCase("24->24 3x3 dilated 2 @14, batch 1", 1, 24, 24, 3, 14, dilation=2),
]

# No dropout: the contenders are compared.
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": models.resnet18,
    "ResNet-50": models.resnet50,
    "MobileNetV2": partial(models.MobileNetV2, dropout=0.0),
}
MNIST = ModelCase("MNIST CNN", models.mnist_cnn, 64, channels=1, size=28)
TRAINING = [*(ModelCase(name, build, 8) for name, build in BUILDERS.items()), MNIST]
INFERENCE = [ModelCase(name, build, n) for name, build in BUILDERS.items() for n in (1, 8)]
TRAINING_QUICK = [ModelCase("ResNet-18", models.resnet18, 2, size=64), MNIST]
INFERENCE_QUICK = [ModelCase("ResNet-18", models.resnet18, 1, size=64)]

ADAMW = [
    AdamWCase("ResNet-50", resnet50_shapes()),
    AdamWCase("GPT-2", gpt2_shapes()),
    AdamWCase("MNIST CNN", mnist_cnn_shapes()),
    AdamWCase("1000 tensors of 64", [(64,)] * 1000),
]
ADAMW_QUICK = [
    AdamWCase("MNIST CNN", mnist_cnn_shapes()),
    AdamWCase("100 tensors of 64", [(64,)] * 100),
]

LINEAR = [
    *itertools.starmap(
        LinearCase,
        (
            (64, 128, 576), (32, 1000, 2048), (128, 3072, 768), (128, 768, 3072),
            (1, 4096, 4096), (1, 11008, 4096), (8, 4096, 4096), (512, 4096, 4096),
            # Above, the layers of the first comparison; below, other batches and odd sizes.
            (1, 768, 768), (2, 3072, 768), (3, 768, 3072), (5, 1000, 2048), (17, 4096, 1024),
            (33, 1023, 1025), (197, 2304, 768), (7, 4095, 577), (64, 1, 4096), (64, 4096, 1),
        ),
    )
]  # fmt: skip
# Weights of 16 million and more: beyond the cache they take a few copies.
LINEAR_COLD = [
    *itertools.starmap(
        LinearCase,
        (
            (1, 4096, 4096), (1, 11008, 4096), (1, 4096, 11008), (2, 4096, 4096),
            (3, 4095, 4097), (4, 4096, 4096), (8, 4096, 4096),
        ),
    )
]  # fmt: skip
# Where other questions are asked: a token or four, a batch, and a large one.
LINEAR_FEW = [
    *itertools.starmap(
        LinearCase, ((1, 4096, 4096), (4, 4096, 4096), (32, 1000, 2048), (128, 3072, 768))
    )
]
LINEAR_QUICK = [LinearCase(64, 128, 576), LinearCase(5, 257, 129)]

# What a GPU is asked. Batches are those of training and of fine-tuning; one image is inference's.
CUDA_CONV = [
    ConvCase(f"{name}, batch {batch}", batch, *shape, **how)
    for batch in (256, 32)
    for name, shape, how in (
        ("r50 stem 3->64 7x7/2 @224", (3, 64, 7, 224), {"stride": 2}),
        ("r50 64->64 1x1 @56", (64, 64, 1, 56), {}),
        ("r50 64->64 3x3 @56", (64, 64, 3, 56), {}),
        ("r50 64->256 1x1 @56", (64, 256, 1, 56), {}),
        ("r50 256->64 1x1 @56", (256, 64, 1, 56), {}),
        ("r50 128->128 3x3 @28", (128, 128, 3, 28), {}),
        ("r50 256->256 3x3 @14", (256, 256, 3, 14), {}),
        ("r50 1024->256 1x1 @14", (1024, 256, 1, 14), {}),
        ("r50 512->2048 1x1 @7", (512, 2048, 1, 7), {}),
        ("mbv2 depthwise 144 3x3 @56", (144, 144, 3, 56), {"groups": 144}),
        ("mbv2 depthwise 96 3x3/2 @112", (96, 96, 3, 112), {"groups": 96, "stride": 2}),
        ("effnet depthwise 240 5x5 @28", (240, 240, 5, 28), {"groups": 240}),
    )
]  # fmt: skip
CUDA_CONV_QUICK = [
    ConvCase("16->24 3x3 @8, batch 4", 4, 16, 24, 3, 8),
    ConvCase("depthwise 16 3x3 @8, batch 4", 4, 16, 16, 3, 8, groups=16),
]
CUDA_TRAINING = [ModelCase("ResNet-50", models.resnet50, n) for n in (256, 32)]
CUDA_INFERENCE = [ModelCase("ResNet-50", models.resnet50, n) for n in (1, 32, 256)]


def shapes_of(build: Callable[[], nn.Module]) -> list[Shape]:
    """Return the shapes of a model's parameters."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in build().parameters()]


CUDA_ADAMW = [
    AdamWCase("1 M in 100 tensors", [(100, 100)] * 100),
    AdamWCase("MobileNetV2", shapes_of(models.mobilenet_v2)),
    AdamWCase("ResNet-18", shapes_of(models.resnet18)),
    AdamWCase("ResNet-50", resnet50_shapes()),
    AdamWCase("GPT-2", gpt2_shapes()),
    AdamWCase("67 M in 4 tensors", [(4096, 4096)] * 4),  # one shape, for which torchao compiles
    AdamWCase("GPT of 1 B", gpt2_shapes(layers=30, width=1600)),
]
CUDA_LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 512, 2048, 4096)
CUDA_LINEAR = [
    *(
        LinearCase(m, n, k)
        for n, k in ((4096, 4096), (11008, 4096), (4096, 11008))
        for m in CUDA_LINEAR_ROWS
    ),
    *(
        LinearCase(m, n, k)
        for n, k in ((4095, 4097), (1000, 2048), (768, 3072))
        for m in (1, 16, 512)
    ),
]  # fmt: skip

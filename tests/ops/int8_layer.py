"""What the tests of the quantized linear layer share: the ops, shapes and a random layer."""

import torch
import torchweld as tw

from tests.reference import quantized_linear as reference

op = torch.ops.torchweld.quantized_linear
accumulators = torch.ops.torchweld.quantized_linear_accumulators
backward = torch.ops.torchweld.quantized_linear_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = list(reference.ACTIVATIONS)
# Every tail of rows, panels and quads, and all sizes of 0 and 1.
SHAPES = [
    (0, 5, 7),
    (3, 0, 7),
    (3, 5, 0),
    (1, 1, 1),
    (1, 10, 128),
    (2, 16, 4),
    (5, 17, 3),
    (8, 48, 64),
    (9, 49, 65),
    (33, 131, 257),
    (300, 97, 7),
]


class Weight:
    """A random layer; int8 values reach both ends."""

    def __init__(self, n, k, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.k = k
        self.q = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
        self.scale = torch.rand(n, generator=generator) * 0.01 + 1e-4
        self.bias = torch.randn(n, generator=generator) if bias else None
        self.packed, self.sum = tw.ops.pack_weight(self.q)

    def __call__(self, x, activation="identity", residual=None, group_size=0):
        weight = self.packed, self.scale, self.sum, self.bias
        return op(x, *weight, residual, self.k, activation, group_size)

    def to(self, device):
        """A copy of what the operators are given, elsewhere."""
        copy = object.__new__(Weight)
        copy.k = self.k
        for name in ("q", "scale", "bias", "packed", "sum"):
            tensor = getattr(self, name)
            setattr(copy, name, None if tensor is None else tensor.to(device))
        return copy

    def accumulators(self, x):
        return accumulators(x, self.packed, self.scale, self.sum, self.k)


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

"""What the tests of the int4 linear layer share: the ops, shapes and a random layer."""

import torch
import torchweld as tw

from tests.reference import quantized_linear as int8_reference
from tests.reference import quantized_linear_int4 as reference

op = torch.ops.torchweld.quantized_linear_int4
accumulators = torch.ops.torchweld.quantized_linear_int4_accumulators
backward = torch.ops.torchweld.quantized_linear_int4_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = list(int8_reference.ACTIVATIONS)
# M, N, K, group size: every tail of rows, panels, octets and groups, and all sizes of 0 and 1.
SHAPES = [
    (0, 5, 7, 8),
    (3, 0, 7, 8),
    (3, 5, 0, 32),
    (1, 1, 1, 8),
    (1, 10, 128, 128),
    (2, 16, 8, 8),
    (3, 33, 130, 64),
    (5, 17, 3, 32),
    (8, 48, 64, 64),
    (13, 49, 65, 24),
    (9, 65, 1000, 512),
    (33, 131, 257, 128),
    (300, 97, 40, 40),
]


class Weight:
    """A random layer; values and zeros reach both ends."""

    def __init__(self, n, k, group_size, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        groups = -(-k // group_size)
        self.n, self.k, self.group_size = n, k, group_size
        self.q = torch.randint(0, 256, (n, -(-k // 2)), generator=generator).to(torch.uint8)
        if k % 2:
            self.q[:, -1] &= 15
        self.scale = (torch.rand(n, groups, generator=generator) * 0.01 + 1e-4).bfloat16()
        self.zero = torch.randint(0, 16, (n, groups), generator=generator).to(torch.uint8)
        self.bias = torch.randn(n, generator=generator) if bias else None
        self.packed = tw.ops.pack_weight_int4(*self.canonical, k, group_size)

    @property
    def canonical(self):
        return self.q, self.scale, self.zero

    def __call__(self, x, activation="identity", residual=None):
        return op(x, *self.packed, self.bias, residual, self.k, self.n, activation)

    def to(self, device):
        """A copy of what the operators are given, elsewhere."""
        copy = object.__new__(Weight)
        copy.n, copy.k, copy.group_size = self.n, self.k, self.group_size
        copy.q, copy.scale, copy.zero = (x.to(device) for x in self.canonical)
        copy.packed = tuple(x.to(device) for x in self.packed)
        copy.bias = None if self.bias is None else self.bias.to(device)
        return copy

    def accumulators(self, x):
        return accumulators(x, *self.packed, self.k, self.n)

    def backward(self, grad):
        return backward(grad, *self.packed, self.k, self.n)

    def dequantize(self):
        return reference.dequantize(*self.canonical, self.k, self.group_size)


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

"""A model whose gradients are known, the layouts it is trained in, and how.

The loss is linear in the parameters, so that the gradient of one rank is what that rank was fed.
The numbers fed are multiples of 1/128 below 1: the mean over two ranks is exact in every dtype, and
what two processes compute must be what one computes, bit for bit.
"""

import torch
import torchweld as tw
from torch import nn
from torch.distributed.tensor import DTensor

# Rows that do not divide by two, one row for two ranks, more than a block of int8 states per rank.
SHAPES = {
    "embed": {"weight": (33, 40)},
    "layer": {"weight": (5, 7), "bias": (5,), "scale": (1,)},
    "head": {"weight": (1, 70), "kernel": (4, 3, 3, 3)},
}
STEPS = 3
HYPER = {"lr": 1e-2, "weight_decay": 0.1}
# Name: dtype of the parameters, arguments of the optimizer.
LAYOUTS = {
    "float32": (torch.float32, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
}
CLIPPED = {
    "clipped": (torch.float32, {"max_grad_norm": 0.5}),
}


class Part(nn.Module):
    """Some parameters and the sum of their products with what is fed."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, total, fed):
        for name, param in self.named_parameters():
            total = total + (param * fed[name]).sum()
        return total


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, shapes in SHAPES.items():
            self.add_module(name, Part(shapes))

    def forward(self, fed):
        total = torch.zeros(())
        for name, part in self.named_children():
            total = part(total, fed[name])
        return total


def fed(step, rank, dtype):
    """What a rank's model is fed at a step; with None for the rank, the mean over both."""
    if rank is None:
        both = [fed(step, rank, dtype) for rank in range(2)]
        return {
            part: {name: (one + both[1][part][name]) / 2 for name, one in values.items()}
            for part, values in both[0].items()
        }
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        part: {
            name: (torch.randint(-127, 128, shape, generator=generator) / 128).to(dtype)
            for name, shape in shapes.items()
        }
        for part, shapes in SHAPES.items()
    }


def build(layout):
    dtype, options = {**LAYOUTS, **CLIPPED}[layout]
    return Model().to(dtype), {**HYPER, **options}


def optimizer_for(model, options):
    # Two groups, in an order that is not that of the modules.
    parts = [[*model.head.parameters(), *model.embed.parameters()], [*model.layer.parameters()]]
    return tw.optim.AdamW([{"params": parts[0]}, {"params": parts[1], "lr": 3e-2}], **options)


def train(model, optimizer, rank, steps=range(STEPS)):
    """Train, and return the norms of the gradients."""
    dtype, norms = next(model.parameters()).dtype, []
    for step in steps:
        optimizer.zero_grad()
        model(fed(step, rank, dtype)).backward()
        optimizer.step()
        norms.append(getattr(optimizer, "grad_norm", None))
    return norms


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def snapshot(model, optimizer):
    """Parameters and states by name, gathered from all ranks."""
    model = getattr(model, "module", model)
    return {
        name: {
            "param": whole(param.detach()).clone(),
            **{key: whole(value).clone() for key, value in optimizer.state[param].items()},
        }
        for name, param in model.named_parameters()
    }


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(
                ours[name][key], value, **(tolerance or {"rtol": 0, "atol": 0}),
                msg=lambda text, name=name, key=key: f"{name}, {key}: {text}",
            )  # fmt: skip


def alone(layout, groups=True):
    """What one process computes, and its norms; in one group of parameters or in two."""
    model, options = build(layout)
    make = optimizer_for if groups else lambda m, kw: tw.optim.AdamW(m.parameters(), **kw)
    norms = train(model, optimizer := make(model, options), None)
    return snapshot(model, optimizer), norms

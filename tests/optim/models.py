"""A small network and what its steps need."""

import torch
from torch import nn


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    # No bias before the normalization: its gradient is rounding noise, which AdamW would amplify.
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(180, 7),
    )
    return model.to(dtype)


def backward(model, step, scale=1.0):
    torch.manual_seed(100 + step)
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    loss = model(torch.randn(4, 1, 8, 8, dtype=dtype)).square().mean() * scale
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def parameter(*sizes, dtype=torch.float32, seed=0, grad_scale=0.1):
    """Return a parameter of random values with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values, grad = (torch.randn(sizes, generator=generator) for _ in range(2))
    param = nn.Parameter(values.to(dtype))
    param.grad = (grad_scale * grad).to(dtype)
    return param

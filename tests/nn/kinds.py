"""The layers with an integer weight, and what each computes, from its state_dict alone."""

import torch
import torchweld as tw
from torch import nn

from tests.reference import quantized_linear as reference

KINDS = {
    "int8": (tw.nn.QuantizedLinear, {}),
    "int8 in groups": (tw.nn.QuantizedLinear, {"input_group_size": 32}),
    "weight only": (tw.nn.WeightOnlyLinear, {}),
    "int4": (tw.nn.Int4Linear, {"group_size": 32}),
}
INT8 = ["int8", "int8 in groups", "weight only"]

# Signal to noise in dB that a layer of Gaussian or uniform weights has at least.
SQNR = {"int8": 37, "int8 in groups": 37, "weight only": 40, "int4": 18}


def make(kind, n=21, k=37, bias=True, activation="identity", seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias)
    return linear, converted(kind, linear, activation)


def converted(kind, linear, activation="identity"):
    cls, options = KINDS[kind]
    return cls.from_float(linear, activation, **options)


def empty(kind, n=21, k=37, bias=True, **arguments):
    cls, options = KINDS[kind]
    return cls(k, n, bias, **arguments, **options)


def weight_of(kind, state, k=37):
    """The weight that canonical tensors stand for, in float64."""
    q, scale = state["qweight"], state["weight_scale"].double()
    if kind != "int4":
        return q.double() * scale[:, None]
    u = torch.stack((q & 15, q >> 4), 2).flatten(1)[:, :k].double()
    group = torch.arange(k) // KINDS[kind][1]["group_size"]
    return (u - state["weight_zero"].double()[:, group]) * scale[:, group]


def input_seen(kind, x):
    """The input after rounding to int8, in float64."""
    if kind == "weight only":
        return x.double()
    size = KINDS[kind][1].get("input_group_size", 0) or x.shape[-1]
    parts = []
    for part in x.split(size, -1):
        q, scale = reference.quantize_rows(part)
        parts.append(q.double() * scale.double()[..., None])
    return torch.cat(parts, -1)


def expected(kind, state, x, activation="identity", residual=None):
    """What the layer of a state_dict computes, in float64."""
    y = input_seen(kind, x) @ weight_of(kind, state, x.shape[-1]).T
    if "bias" in state:
        y = y + state["bias"].double()
    y = reference.ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.double()


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))

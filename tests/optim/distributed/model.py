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
    "bfloat16 states": (torch.float32, {"state_dtype": torch.bfloat16}),
    "int8 states": (torch.float32, {"state_dtype": "int8"}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 7}),
    "kahan": (torch.bfloat16, {"kahan": True}),
    "split master": (torch.bfloat16, {"split_master": True}),
    "stochastic, int8 states": (
        torch.bfloat16,
        {"stochastic_rounding": True, "state_dtype": "int8"},
    ),
}
CLIPPED = {
    "clipped": (torch.float32, {"max_grad_norm": 0.5}),
    "stochastic, clipped": (torch.bfloat16, {"stochastic_rounding": True, "max_grad_norm": 0.5}),
}
INT8 = [layout for layout, (_, options) in LAYOUTS.items() if "int8" in options.values()]
# These have a second formula for exp_avg_sq, torch's, at the end of a tensor: here, of a shard.
LIKE_STOCK = ("float32", "amsgrad", "clipped")


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


def train_scaled(model, optimizer, rank, scaler):
    """Train with a scaler; the second step meets an infinity, in a shard of the second rank.

    Returns:
        The scale after each step.
    """
    scales = []
    for step in range(STEPS):
        numbers = fed(step, rank, torch.float32)
        if step == 1 and rank != 0:
            numbers["embed"]["weight"][32, 39] = torch.inf
        optimizer.zero_grad()
        scaler.scale(model(numbers)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def observe(model, optimizer, rank):
    """Train while the steps look at what they do; return what they saw, and the averages."""
    optimizer.observe(statistics=True, average=0.75)
    seen = []
    for step in range(STEPS):
        train(model, optimizer, rank, [step])
        seen.append({name: v.clone() for name, v in optimizer.statistics._asdict().items()})
    averages = {n: whole(optimizer.average(p)).clone() for n, p in model.named_parameters()}
    return {"seen": seen, "averages": averages}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def snapshot(model, optimizer):
    """Parameters and states by name, gathered from all ranks; codes of 8 bits as they stand."""
    states = {}
    saved = optimizer.state_dict()["state"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for name, param in model.named_parameters():
        (number,) = (i for i, other in enumerate(params) if other is param)
        states[name] = {"param": whole(param.detach()).clone()}
        for key, value in saved[number].items():
            value = whole(value).clone()
            states[name][key] = value.to(torch.int16) if key == "remainder" else value
    return states


def decoded(snapshot):
    """The same with moments in float32 instead of codes."""
    out = {}
    for name, values in snapshot.items():
        out[name] = dict(values)
        for key, signed in ("exp_avg", True), ("exp_avg_sq", False):
            if f"{key}_code" in values:
                code, scale = out[name].pop(f"{key}_code"), out[name].pop(f"{key}_scale")
                out[name][key] = torch.empty(code.shape)
                torch.ops.torchweld._adamw_decode(code, scale, signed, out[name][key])
    return out


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(
                ours[name][key], value, **(tolerance or {"rtol": 0, "atol": 0}),
                msg=lambda text, name=name, key=key: f"{name}, {key}: {text}",
            )  # fmt: skip


def assert_same_in_shards(ours, theirs, layout):
    """Compare what was computed in shards with what was computed, or sharded, otherwise."""
    if layout in INT8:
        most = 0.1 if "stochastic" not in layout else 0.5  # steps are few ulps long
        assert_near(decoded(ours), decoded(theirs), layout, most)
    elif layout in LIKE_STOCK:
        assert_same(ours, theirs, rtol=5e-7, atol=1e-8)
    else:
        assert_same(ours, theirs)


def assert_near(ours, theirs, layout, most=0.1):
    """Blocks of 8-bit states are those of a shard: compare how far parameters and states went."""
    start = {name: param.detach() for name, param in build(layout)[0].named_parameters()}
    for name, values in theirs.items():
        assert ours[name].keys() == values.keys()
        for key, value in values.items():
            zero = start[name] if key == "param" else torch.zeros(())
            error = (ours[name][key].double() - value.double()).norm()
            assert error <= most * (value.double() - zero.double()).norm(), (name, key)


def alone_scaled(scaler):
    model, options = build("clipped")
    optimizer = optimizer_for(model, options)
    scales = train_scaled(model, optimizer, None, scaler)
    return snapshot(model, optimizer), scales


def alone(layout, groups=True):
    """What one process computes, and its norms; in one group of parameters or in two."""
    model, options = build(layout)
    make = optimizer_for if groups else lambda m, kw: tw.optim.AdamW(m.parameters(), **kw)
    norms = train(model, optimizer := make(model, options), None)
    return snapshot(model, optimizer), norms

"""Tests of the optimizer for any device; a test file gives them one and collects them."""

import copy
import math

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.optim.models import parameter

BFLOAT16 = torch.bfloat16
FORMATS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "float16": (torch.float16, {}),
    "bfloat16": (BFLOAT16, {}),
    "complex64": (torch.complex64, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "maximize": (torch.float32, {"maximize": True}),
    "bfloat16 states": (torch.float32, {"state_dtype": BFLOAT16}),
    "bfloat16 states of float16, amsgrad": (
        torch.float16,
        {"state_dtype": BFLOAT16, "amsgrad": True},
    ),
    "int8 states": (torch.float32, {"state_dtype": "int8"}),
    "stochastic": (BFLOAT16, {"stochastic_rounding": True}),
    "kahan": (BFLOAT16, {"kahan": True}),
    "split": (BFLOAT16, {"split_master": True}),
    "split, amsgrad": (BFLOAT16, {"split_master": True, "amsgrad": True}),
    "stochastic, int8": (BFLOAT16, {"stochastic_rounding": True, "state_dtype": "int8"}),
    "kahan, int8": (BFLOAT16, {"kahan": True, "state_dtype": "int8"}),
    "split, int8": (BFLOAT16, {"split_master": True, "state_dtype": "int8"}),
}
SHAPES = ((9001,), (3,), (20, 30), (0,), (257,))


def make(device, name, **options):
    """Return parameters with gradients and an optimizer of a format."""
    dtype, form = FORMATS[name]
    params = [nn.Parameter(parameter(*s, dtype=dtype).detach().to(device)) for s in SHAPES]
    optimizer = tw.optim.AdamW(params, **{"lr": 1e-2, **form, **options})
    return params, optimizer


def new_grads(params, step, scale=1.0):
    """Give parameters gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        values = torch.randn(param.shape, generator=generator) * 0.1 * scale
        param.grad = values.to(param.dtype).to(param.device)


def train(params, optimizer, steps):
    for step in steps:
        new_grads(params, step)
        optimizer.step()


def bits(params, optimizer):
    """Return all parameters and states, on the CPU."""
    states = optimizer.state_dict()["state"]
    return [p.detach().cpu() for p in params] + [
        states[i][name].cpu() for i in states for name in sorted(states[i])
    ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BFLOAT16], ids=str)
def test_stock_within_tolerance(device, dtype, options):
    params = [nn.Parameter(parameter(n, dtype=dtype).detach().to(device)) for n in (5000, 7)]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours = tw.optim.AdamW(params, lr=1e-2, **options)
    stock = torch.optim.AdamW(copies, lr=1e-2, fused=True, **options)
    for step in range(5):
        for optimizer, list_ in ((ours, params), (stock, copies)):
            new_grads(list_, step)
            optimizer.step()
    # f(1 - beta2) on a CPU and 1 - f(beta2) on CUDA differ by 1.3e-5.
    close = {"rtol": 8e-3, "atol": 1e-3} if dtype is BFLOAT16 else {"rtol": 2e-5, "atol": 1e-6}
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, **close)
        for name, value in stock.state[q].items():
            torch.testing.assert_close(ours.state[p][name], value, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["float32", "stochastic, int8"])
def test_a_learning_rate_on_the_device_is_that_number(device, dtype, name):
    lrs = torch.tensor([1e-2, 3e-4], dtype=dtype)
    results = []
    for as_tensor in (False, True):
        params, _ = make(device, name)
        lr = lrs[0].to(device, copy=True) if as_tensor else lrs[0].item()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-3}]
        optimizer = tw.optim.AdamW(groups, lr=lr, **FORMATS[name][1])
        train(params, optimizer, range(2))
        if as_tensor:
            lr.copy_(lrs[1])
        else:
            optimizer.param_groups[0]["lr"] = lrs[1].item()
        train(params, optimizer, range(2, 4))
        results.append([p.detach() for p in params])
    assert_same(*results)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8 states"])
def test_clips_as_torch_does(device, name):
    params, ours = make(device, name, max_grad_norm=0.5)
    copies, theirs = make(device, name)
    for step in range(3):
        new_grads(params, step)
        ours.step()
        new_grads(copies, step)
        norm = torch.nn.utils.clip_grad_norm_([p for p in copies if p.numel()], 0.5)
        theirs.step()
        assert ours.grad_norm.device.type == torch.device(device).type
        torch.testing.assert_close(ours.grad_norm.float(), norm.float(), rtol=1e-2, atol=0)
        assert norm > 0.5
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_skips_what_is_not_finite(device, name):
    params, optimizer = make(device, name, skip_nonfinite=True)
    train(params, optimizer, range(2))
    before = bits(params, optimizer)
    for bad in (math.nan, math.inf):
        new_grads(params, 3)
        params[0].grad[8000] = bad
        optimizer.step()
        assert_same(bits(params, optimizer), before)
    assert optimizer.skipped_steps == 2
    train(params, optimizer, [4])
    assert optimizer.skipped_steps == 2
    assert optimizer.state[params[0]]["step"] == 3


def test_scaler(device):
    """An infinity in some steps; the scale and the parameters are those of torch's."""
    results = []
    for scaler, cls, options in (
        (tw.amp.GradScaler, tw.optim.AdamW, {}),
        (torch.amp.GradScaler, torch.optim.AdamW, {"fused": True}),
    ):
        param = nn.Parameter(parameter(3000).detach().to(device))
        optimizer = cls([param], lr=1e-2, **options)
        scales = []
        scaler = scaler(torch.device(device).type, init_scale=1024.0, growth_interval=2)
        for step in range(8):
            optimizer.zero_grad()
            weight = math.inf if step in (2, 5) else 1.0
            scaler.scale((param * param).sum() * weight).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((scales, param.detach(), optimizer.state[param]["step"].cpu()))
    (scales, param, step), (other_scales, other_param, other_step) = results
    assert scales == other_scales
    assert step == other_step == 6
    torch.testing.assert_close(param, other_param, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"complex64"}))
def test_statistics(device, name):
    params, optimizer = make(device, name, lr=3e-3)
    optimizer.observe(statistics=True)
    for step in range(3):
        new_grads(params, step)
        before = [p.detach().clone() for p in params]
        optimizer.step()
    seen = optimizer.statistics

    def norm(tensors):
        return math.sqrt(sum(x.abs().double().square().sum().item() for x in tensors))

    updates = [p.detach() - b for p, b in zip(params, before, strict=True)]
    assert seen.grad_norm.item() == pytest.approx(norm(p.grad for p in params), rel=1e-10)
    assert seen.nonfinite == 0
    if "kahan" in name or "split" in name:
        assert seen.lost < 0.01  # of the weights with their compensation
    else:
        assert seen.update_norm.item() == pytest.approx(norm(updates), rel=1e-2)
        lost = sum(u.eq(0).sum() for u in updates).item() / sum(u.numel() for u in updates)
        assert seen.lost.item() == pytest.approx(lost, abs=2e-3)


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "int8 states", "stochastic"])
def test_average_and_shadow(device, name):
    params, optimizer = make(device, name)
    optimizer.observe(average=0.8, shadow=None if name == "float64" else BFLOAT16)
    expected = [p.detach().to(torch.float64, copy=True) for p in params]
    for step in range(4):
        new_grads(params, step)
        optimizer.step()
        for average, p in zip(expected, params, strict=True):
            average += 0.2 * (p.detach().double() - average)
    for average, p in zip(expected, params, strict=True):
        torch.testing.assert_close(optimizer.average(p).double(), average, rtol=1e-5, atol=1e-6)
        if name != "float64":
            assert torch.equal(optimizer.shadow(p), p.detach().bfloat16())


@pytest.mark.parametrize("name", ["float32", "stochastic", "int8 states"])
def test_observing_changes_nothing(device, name):
    results = []
    for watched in (False, True):
        params, optimizer = make(device, name, max_grad_norm=0.5)
        if watched:
            optimizer.observe(statistics=True, average=0.99, shadow=BFLOAT16)
        train(params, optimizer, range(3))
        results.append([p.detach() for p in params])
    assert_same(*results)


def test_gradients_come_and_go_and_move(device):
    params, optimizer = make(device, "float32")
    copies = [nn.Parameter(p.detach().cpu()) for p in params]
    reference = torch.optim.AdamW(copies, lr=1e-2)
    for step, present in enumerate([(1,), (0, 1, 2, 3, 4), (2, 4), (), (0, 1, 2, 3, 4)] * 2):
        for list_, o in ((params, optimizer), (copies, reference)):
            new_grads(list_, step)
            for i, p in enumerate(list_):
                p.grad = p.grad.clone() if i in present else None
            o.step()
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == reference.state[q]["step"]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "kahan", "int8 states", "split, int8"])
def test_views_that_begin_anywhere(device, name):
    """Memory that is not aligned to a word gives the same bits."""
    dtype, form = FORMATS[name]
    results = []
    for shift in (0, 1, 3):
        values = torch.cat([torch.zeros(shift), parameter(5000).detach()]).to(dtype).to(device)
        param = nn.Parameter(values[shift:])
        optimizer = tw.optim.AdamW([param], lr=1e-2, **form)
        train([param], optimizer, range(3))
        results.append([param.detach()])
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("name", FORMATS)
def test_states_move_between_devices(device, name):
    """From here to the CPU and back in the middle of a training, and no bit is lost."""
    params, optimizer = make(device, name)
    train(params, optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    elsewhere, other = make("cpu", name)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(params, elsewhere, strict=True):
        theirs.data = mine.detach().cpu()
    back, again = make(device, name)
    again.load_state_dict(other.state_dict())
    for theirs, mine in zip(elsewhere, back, strict=True):
        mine.data = theirs.detach().to(device)
    for i, state in kept["state"].items():
        for key, value in again.state_dict()["state"][i].items():
            assert value.device == value.new_empty(0, device=device).device
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    for list_, o in ((params, optimizer), (back, again)):
        train(list_, o, range(2, 4))
    assert_same(bits(params, optimizer), bits(back, again))


def test_states_elsewhere_are_refused(device):
    params, optimizer = make(device, "float32")
    train(params, optimizer, range(1))
    before = params[0].detach().clone()
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(20, 30, device="meta")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        train(params, optimizer, range(1))
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    "views",
    [
        lambda w: (w[:, :20], w[:, :20]),
        lambda w: (w[:, :20], w[:, 10:30]),
        lambda w: (w[:, :20], w[:, 20:40]),
        lambda w: (w, w[:, :20]),
        lambda w: (w[:, :20], w),
    ],
    ids=["same", "partly", "side by side", "with the whole", "before the whole"],
)
def test_parameters_with_gaps_in_one_memory_are_stepped_one_after_the_other(device, views):
    def run(made):
        memory = parameter(40, 50).detach().to(device)
        params = [nn.Parameter(torch.empty(0, device=device)) for _ in range(3)]
        for param, view in zip(params, (*views(memory), memory.new_ones(7)), strict=True):
            param.data = view
        train(params, made(params), range(3))
        return memory

    # Its fused step takes every parameter for one without gaps.
    expected = run(lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False))
    torch.testing.assert_close(run(lambda p: tw.optim.AdamW(p, lr=1e-2)), expected)

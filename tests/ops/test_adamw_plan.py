"""The operators below the optimizer: what they refuse, and parameters in parts."""

import pytest
import torch
import torchweld as tw  # registers the operators
from torchweld.optim import _state

ops = torch.ops.torchweld
HYPER = [1e-2, 0.9, 0.999, 1e-8, 0.1, 0.0]
NONE = -1


def row(*tensors, group=0, number=0, state=0, rounding=0, place=(0, 0, 0)):
    """Return a row of places; tensors from the parameter on, in order."""
    return [group, number, state, rounding, *place, *tensors, *[NONE] * (10 - len(tensors))]


def plan(tensors, *rows):
    return ops._adamw_plan(tensors, torch.tensor(rows))


def run(
    handle, grads, which=(), hyper=HYPER, lrs=(), max_norm=None, scale=None, total=None, skip=False
):
    return ops._adamw_run(
        handle, grads, which, hyper, lrs, max_norm, scale, total, skip, 0, False, 0.0
    )


def tensors_of(param):
    return [param, torch.zeros(()), torch.zeros_like(param), torch.zeros_like(param)]


def test_is_the_public_step():
    torch.manual_seed(0)
    param, grad = torch.randn(5, 7), torch.randn(5, 7)
    ours, theirs = tensors_of(param.clone()), tensors_of(param.clone())
    run(plan(ours, row(0, 1, 2, 3)), [grad])
    p, step, m, v = theirs
    tw.ops.adamw_step_(
        *([x] for x in (p, grad, m, v)), [], [step],
        lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_plan_keeps_its_tensors_and_frees_them():
    tensors = tensors_of(torch.ones(1000))
    handle = plan(tensors, row(0, 1, 2, 3))
    param = tensors[0]
    del tensors
    run(handle, [torch.ones(1000)])
    assert (param < 1).all()


@pytest.mark.parametrize(
    ("tensors", "rows", "message"),
    [
        (4, [[0] * 5], r"places: expected int64 \[n, 17\], got \[1, 5\]"),
        (4, [row(0, 1, 2)], r"places: expected a place in tensors, got -1"),
        (4, [row(0, 1, 2, 4)], r"places: expected a place in tensors, got 4"),
        (4, [row(0, 1, 2, 3, state=3)], r"places: expected a state and a rounding, got 3 and 0"),
    ],
)
def test_bad_places(tensors, rows, message):
    with pytest.raises(RuntimeError, match=r"torchweld::_adamw_plan: " + message):
        plan(tensors_of(torch.ones(3))[:tensors], *rows)


def bad_runs():
    ones = torch.ones(3)
    good = tensors_of(ones)
    bfloat16 = tensors_of(ones.bfloat16())
    code = torch.zeros(300, dtype=torch.uint8)
    wide = [torch.ones(300), torch.zeros(()), code, code.clone()]
    scales = [torch.zeros(1), torch.zeros(2)]
    return {
        "bytes": (torch.zeros(8, dtype=torch.uint8), [ones], {}, "what _adamw_plan returned"),
        "count": (plan(good, row(0, 1, 2, 3)), [], {}, "grads: expected 1 tensors, got 0"),
        "which": (plan(good, row(0, 1, 2, 3)), [ones], {"which": [1]}, "an entry of the plan"),
        "group": (plan(good, row(0, 1, 2, 3, group=1)), [ones], {}, "values for each group"),
        "scale": (
            plan(good, row(0, 1, 2, 3)), [ones], {"scale": torch.ones(2)}, "loss_scale: expected",
        ),
        "dtype": (plan(good, row(0, 1, 2, 3)), [ones.double()], {}, "grads: expected float32"),
        "format": (
            plan(bfloat16, row(0, 1, 2, 3, rounding=2)), [ones], {}, "grads: expected bfloat16",
        ),
        "state": (
            plan(tensors_of(ones.double()), row(0, 1, 2, 3, state=1)), [ones.double()], {},
            "exp_avgs: expected bfloat16 beside params",
        ),
        "kernel": (
            plan([ones.double(), *bfloat16[1:]], row(0, 1, 2, 3, state=1)), [ones.double()], {},
            "params: expected a dtype with kernels for these states",
        ),
        "twice": (
            plan(good, row(0, 1, 2, 3), row(0, 1, 2, 3)), [ones, ones], {"which": [1, 1]},
            "an entry of the plan, after the one before",
        ),
        "scales": (
            plan([*wide, *scales], row(0, 1, 2, 3, NONE, NONE, 4, 5, state=2)),
            [torch.ones(300)], {}, r"exp_avg_scales: expected shape \[2\]",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_runs())
def test_bad_runs(name):
    handle, grads, arguments, message = bad_runs()[name]
    for _ in range(2):  # a run that failed does not let the next one pass
        with pytest.raises(RuntimeError, match=message):
            run(handle, grads, **arguments)


@pytest.mark.parametrize("missing", [4, 5])
def test_what_a_format_needs_must_be_there(missing):
    code = torch.zeros(300, dtype=torch.uint8)
    tensors = [torch.ones(300), torch.zeros(()), code, code.clone(), torch.zeros(2), torch.zeros(2)]
    places = [0, 1, 2, 3, NONE, NONE, 4, 5]
    places[places.index(missing)] = NONE
    with pytest.raises(RuntimeError, match=r"exp_avg(_sq)?_scales: expected"):
        run(plan(tensors, row(*places, state=2)), [torch.ones(300)])
    bfloat16 = tensors_of(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="compensations: expected"):
        run(plan(bfloat16, row(0, 1, 2, 3, rounding=2)), [torch.ones(3, dtype=torch.bfloat16)])


def test_a_sum_from_elsewhere_clips_and_skips():
    param = torch.zeros(3)
    handle = plan(tensors_of(param), row(0, 1, 2, 3))
    total = torch.tensor([25.0], dtype=torch.float64)
    report = run(handle, [torch.ones(3)], max_norm=1.0, total=total)
    assert report[0] == 5
    before = param.clone()
    report = run(handle, [torch.ones(3)], total=total * torch.inf, skip=True)
    assert report[1] == 1
    assert torch.equal(param, before)


@pytest.mark.parametrize("signed", [True, False])
def test_codes(signed):
    torch.manual_seed(0)
    value = torch.randn(4, 100, 3).exp() * 1e-4
    if signed:
        value *= torch.randn(4, 100, 3).sign()
    value[0, :90] = 0  # a block of zeros
    code, scale = _state._encode(value, value, signed)
    assert scale.shape == (5,)
    decoded = _state._decode(code, scale, signed)
    assert (decoded[0, :90] == 0).all()
    # 8 steps to each power of two, down to 2^-15 (2^-31) of the largest of the block.
    assert ((decoded - value).abs() <= value.abs() / 14 + 1e-2 * value.abs().max()).all()
    again, rescaled = _state._encode(decoded, value, signed)
    assert torch.equal(_state._decode(again, rescaled, signed), decoded)

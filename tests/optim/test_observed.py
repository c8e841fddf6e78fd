"""What an optimizer sees of its own step is what one finds by comparing before and after."""

import math

import pytest
import torch
import torchweld as tw

from tests.optim.models import parameter

BFLOAT16 = torch.bfloat16


def made(dtype=torch.float32, **options):
    # Several pieces, and shapes that fill none.
    params = [parameter(n, dtype=dtype, seed=n) for n in (9001, 3, 300)]
    return params, tw.optim.AdamW(params, **options)


def norm(tensors):
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BFLOAT16, torch.float16], ids=str)
def test_statistics(dtype):
    params, optimizer = made(dtype, lr=3e-3)
    assert optimizer.statistics is None
    optimizer.observe(statistics=True)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        optimizer.step()
        seen = optimizer.statistics
        updates = [p.detach().double() - b.double() for p, b in zip(params, before, strict=True)]
        assert seen.grad_norm.item() == pytest.approx(norm(p.grad for p in params), rel=1e-12)
        assert seen.update_norm.item() == pytest.approx(norm(updates), rel=1e-6)
        lost = sum((u == 0).sum().item() for u in updates) / sum(u.numel() for u in updates)
        assert seen.lost.item() == pytest.approx(lost, abs=1e-3)
        assert (lost > 0.05) == (dtype is BFLOAT16)
        assert seen.nonfinite == 0
    optimizer.observe()
    optimizer.step()
    assert optimizer.statistics is None


@pytest.mark.parametrize("options", [{"kahan": True}, {"split_master": True}], ids=str)
def test_compensation_loses_nothing(options):
    _, optimizer = made(BFLOAT16, lr=1e-4, **options)
    _, plain = made(BFLOAT16, lr=1e-4)
    for o in (optimizer, plain):
        o.observe(statistics=True)
        for _ in range(3):
            o.step()
    assert plain.statistics.lost > 0.5
    assert optimizer.statistics.lost < 0.1 * plain.statistics.lost


@pytest.mark.parametrize("skip", [False, True])
def test_gradients_that_are_not_finite_are_counted(skip):
    params, optimizer = made(skip_nonfinite=skip)
    optimizer.observe(statistics=True)
    params[0].grad[[5, 8000]] = torch.tensor([math.inf, math.nan])
    params[2].grad[299] = -math.inf
    optimizer.step()
    assert optimizer.statistics.nonfinite == 3
    assert optimizer.skipped_steps == skip


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "int8"}),
        (torch.float64, {}),
        (BFLOAT16, {"stochastic_rounding": True}),
        (torch.complex64, {}),
    ],
    ids=str,
)
def test_average(dtype, options):
    param = torch.nn.Parameter(torch.randn(5000, dtype=dtype))
    optimizer = tw.optim.AdamW([param], lr=1e-2, **options)
    with pytest.raises(RuntimeError, match="no weight average"):
        optimizer.average(param)
    optimizer.observe(average=0.8)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = param.detach().to(wide, copy=True)
    torch.testing.assert_close(optimizer.average(param).to(wide), expected)
    for _ in range(5):
        param.grad = torch.randn_like(param)
        optimizer.step()
        expected += 0.2 * (param.detach().to(wide) - expected)
    average = optimizer.average(param)
    assert average.dtype == (torch.float32 if dtype is BFLOAT16 else dtype)
    torch.testing.assert_close(average.to(wide), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.state_dict()["state"][0]["average"] is average


def test_average_of_the_master():
    param = parameter(3000, dtype=BFLOAT16)
    optimizer = tw.optim.AdamW([param], lr=1e-5, split_master=True)
    optimizer.observe(average=0.0)
    for _ in range(5):
        optimizer.step()
    low = optimizer.state[param]["remainder"].int()
    master = ((param.detach().view(torch.int16).int() << 16) + low).view(torch.float32)
    torch.testing.assert_close(optimizer.average(param), master, rtol=1e-6, atol=0)
    assert not torch.equal(master, param.detach().float())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
def test_shadow(layout):
    values = torch.randn(8, 6, 5, 4)
    if layout == "channels_last":
        values = values.to(memory_format=torch.channels_last)
    elif layout == "gaps":
        values = values[:, ::2]
    param = torch.nn.Parameter(values)
    optimizer = tw.optim.AdamW([param], lr=1e-2)
    with pytest.raises(RuntimeError, match="no copy is kept"):
        optimizer.shadow(param)
    optimizer.observe(shadow=BFLOAT16)
    shadow = optimizer.shadow(param)
    assert torch.equal(shadow, param.detach().to(BFLOAT16))
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
        assert optimizer.shadow(param) is shadow
        assert torch.equal(shadow, param.detach().to(BFLOAT16))
    assert "shadow" not in str(optimizer.state_dict())


def test_observing_changes_nothing():
    results = []
    for watched in (False, True):
        params, optimizer = made(BFLOAT16, stochastic_rounding=True, max_grad_norm=0.5)
        if watched:
            optimizer.observe(statistics=True, average=0.99, shadow=BFLOAT16)
        for _ in range(3):
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_same_sums_for_any_number_of_threads():
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param = parameter(200_003)
            optimizer = tw.optim.AdamW([param])
            optimizer.observe(statistics=True)
            optimizer.step()
            seen.append(optimizer.statistics)
    finally:
        torch.set_num_threads(threads)
    assert seen[0] == seen[1] == seen[2]


def test_bad_choices():
    optimizer = tw.optim.AdamW([parameter(3)])
    with pytest.raises(ValueError, match=r"Invalid average value: 1\.5"):
        optimizer.observe(average=1.5)
    with pytest.raises(ValueError, match=r"Invalid shadow value: torch\.float16"):
        optimizer.observe(shadow=torch.float16)


def test_a_step_that_was_not_observed_has_no_statistics():
    _, optimizer = made(max_grad_norm=1.0)
    optimizer.step()
    optimizer.observe(statistics=True)
    assert optimizer.statistics is None
    assert optimizer.grad_norm is not None
    optimizer.step()
    assert optimizer.statistics is not None


def test_an_average_begins_anew_where_it_missed_steps():
    params, optimizer = made(lr=0.1)
    optimizer.observe(average=0.9)
    optimizer.step()
    saved = optimizer.state_dict()
    kept = optimizer.average(params[0]).clone()
    optimizer.observe()
    for _ in range(50):
        optimizer.step()
    assert "average" not in optimizer.state[params[0]]
    optimizer.observe(average=0.9)
    assert torch.equal(optimizer.average(params[0]), params[0])
    before = params[0].detach().clone()
    optimizer.step()
    expected = before + 0.1 * (params[0].detach() - before)
    torch.testing.assert_close(optimizer.average(params[0]), expected)

    params, resumed = made(lr=0.1)
    saved["state"][0]["average"] = kept.clone()
    resumed.load_state_dict(saved)
    resumed.observe(average=0.9)
    assert torch.equal(resumed.average(params[0]), kept)
    resumed.step()
    expected = kept + 0.1 * (params[0].detach() - kept)
    torch.testing.assert_close(resumed.average(params[0]), expected)

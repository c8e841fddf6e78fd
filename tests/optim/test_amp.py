"""tw.amp.GradScaler does what torch's does, in fewer passes."""

import copy
import math

import pytest
import torch
import torchweld as tw

from tests.optim.models import assert_same, make_model


def train(model, optimizer, scaler, steps=8, bad=(2, 5), unscale=(), clip=None):
    """Train with an infinity in some steps; return the scale after each."""
    scales = []
    for step in range(steps):
        torch.manual_seed(step)
        model.zero_grad()
        scaler.scale(model(torch.randn(4, 1, 8, 8)).square().mean()).backward()
        if step in bad:
            model[4].bias.grad[step % 7] = math.nan if step % 2 else math.inf
        if step in unscale:
            scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


SETTINGS = {"init_scale": 1024.0, "growth_interval": 2, "growth_factor": 4.0}


@pytest.mark.parametrize("unscale", [(), (0, 3, 5), range(8)], ids=str)
@pytest.mark.parametrize("bad", [(), (0,), (2, 5), range(8)], ids=str)
def test_follows_torchs_bit_for_bit(bad, unscale):
    a, b = make_model(), make_model()
    ours, theirs = tw.optim.AdamW(a.parameters()), torch.optim.AdamW(b.parameters(), fused=True)
    scales = train(a, ours, tw.amp.GradScaler("cpu", **SETTINGS), bad=bad, unscale=unscale)
    assert scales == train(b, theirs, torch.amp.GradScaler("cpu", **SETTINGS), bad=bad)
    assert_same(a, b)
    states = [o.state_dict()["state"].values() for o in (ours, theirs)]
    if not len(states[0]):  # torch's fused step makes states even if it is to skip
        assert all(y["step"] == 0 for y in states[1])
        return
    for x, y in zip(*states, strict=True):
        assert x["step"] == y["step"]  # a skipped step does not count
        torch.testing.assert_close(x["exp_avg_sq"], y["exp_avg_sq"], rtol=0, atol=0)


def test_clips_the_unscaled_gradients():
    a, b = make_model(), make_model()
    ours = tw.optim.AdamW(a.parameters(), max_grad_norm=0.01)
    theirs = torch.optim.AdamW(b.parameters(), fused=True)
    train(a, ours, tw.amp.GradScaler("cpu", **SETTINGS))
    train(b, theirs, torch.amp.GradScaler("cpu", **SETTINGS), unscale=range(8), clip=0.01)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert 0 < ours.grad_norm < 10
    assert ours.skipped_steps == 2


def test_gradients_are_not_rewritten():
    model = make_model()
    optimizer = tw.optim.AdamW(model.parameters())
    scaler = tw.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 1, 8, 8)).sum()).backward()
    before = [p.grad.clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert optimizer._loss_scale is None


@pytest.mark.parametrize("scaler", [tw.amp.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "int8"], ids=str)
def test_skips_with_every_format(scaler, state_dtype):
    model = make_model()
    optimizer = tw.optim.AdamW(model.parameters(), state_dtype=state_dtype)
    scaler = scaler("cpu", **SETTINGS)
    train(model, optimizer, scaler, steps=2, bad=())
    before = copy.deepcopy(optimizer.state_dict()["state"]), copy.deepcopy(model)
    train(model, optimizer, scaler, steps=2, bad=(0, 1))
    assert_same(*(m[4] for m in (model, before[1])))
    for old, new in zip(before[0].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_with_torchs_optimizers_it_is_torchs():
    for make in (
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ):
        a, b = make_model(), make_model()
        ours, theirs = (c("cpu", **SETTINGS) for c in (tw.amp.GradScaler, torch.amp.GradScaler))
        assert train(a, make(a.parameters()), ours) == train(b, make(b.parameters()), theirs)
        assert_same(a, b)


def test_two_optimizers_share_a_scale():
    model = make_model()
    ours = tw.optim.AdamW(model[:4].parameters())
    theirs = torch.optim.SGD(model[4].parameters(), lr=0.1)
    scaler = tw.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(torch.ones(2, 1, 8, 8)).sum()).backward()
    model[0].weight.grad[0] = math.inf
    before = copy.deepcopy(model)
    scaler.step(ours)
    scaler.step(theirs)
    scaler.update()
    assert scaler.get_scale() == 32
    assert_same(model[:4], before[:4])
    assert not torch.equal(model[4].weight, before[4].weight)


def test_misuse_is_refused_as_by_torch():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = tw.optim.AdamW([param])
    scaler = tw.amp.GradScaler("cpu")
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    loss = scaler.scale(param.sum())
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)
    loss.backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(optimizer)
    half = tw.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.float16))])
    half.param_groups[0]["params"][0].grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(half)


def test_disabled_it_only_steps():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.full((2,), math.inf)
    optimizer = tw.optim.AdamW([param])
    tw.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert optimizer.state[param]["step"] == 1


def test_a_half_parameter_without_a_gradient_is_no_obstacle():
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = tw.optim.AdamW([half, param])
    half.grad = torch.ones_like(half)
    param.grad = torch.ones_like(param)
    optimizer.step()  # both have states now
    half.grad = None
    scaler = tw.amp.GradScaler("cpu")
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert optimizer.state[param]["step"] == 2
    assert optimizer.state[half]["step"] == 1


def test_hooks_run_in_a_skipped_step():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = tw.optim.AdamW([param])
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler = tw.amp.GradScaler("cpu")
    scaler.scale(param.sum() * math.inf).backward()
    scaler.step(optimizer)
    assert calls == [1]
    assert optimizer.skipped_steps == 1

"""What is kept from step to step is never stale, and a step that fails has written nothing."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torchweld as tw
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchweld.optim import _distributed, _plan

from tests.optim.models import parameter

CPU = torch.device("cpu")


def pair(*params, **options):
    """Return our optimizer and torch's over copies of the parameters."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    return tw.optim.AdamW(params, **options), torch.optim.AdamW(copies, fused=True, **options)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_both(ours, theirs):
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    ours.step()
    theirs.step()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_data_of_parameters_and_states_replaced():
    optimizers = pair(parameter(5, 3), parameter(40))
    step_both(*optimizers)
    for change in (
        lambda p, s: setattr(p, "data", torch.ones(5, 3)),
        lambda p, s: p.data.copy_(torch.zeros(5, 3)),
        lambda p, s: s.__setitem__("exp_avg", torch.full((5, 3), 0.5)),
        lambda p, s: setattr(s["exp_avg_sq"], "data", torch.full((5, 3), 0.25)),
        lambda p, s: s["step"].fill_(9),
        lambda p, s: s.__setitem__("step", torch.tensor(20.0)),
        lambda p, s: s.clear(),
    ):
        for optimizer in optimizers:
            change(params_of(optimizer)[0], optimizer.state[params_of(optimizer)[0]])
        step_both(*optimizers)
        step_both(*optimizers)


@pytest.mark.parametrize("context", [nullcontext, torch._C.DisableTorchFunction])
def test_states_replaced_by_equal_ones(context):
    """Equal is not the same: what is stepped is what the state holds now."""
    param = parameter(1)
    optimizer = tw.optim.AdamW([param])
    optimizer.step()
    state = optimizer.state[param]
    old = dict(state)
    for name, value in old.items():
        state[name] = value.clone()
    with context():
        optimizer.step()
    assert state["step"] == 2
    assert old["step"] == 1
    assert not torch.equal(state["exp_avg"], old["exp_avg"])


def test_equal_parameters_exchanged():
    first, second = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = tw.optim.AdamW([first])
    for param in (first, second):
        optimizer.param_groups[0]["params"] = [param]
        param.grad = torch.ones(1)
        optimizer.step()
    assert torch.equal(first, second)


def test_a_state_turned_where_it_is():
    """The same memory, dtype and sizes are not the same layout."""
    stepped = []
    for turn in (lambda x: x.t(), lambda x: x.t().clone()):
        param = parameter(5, 5)
        optimizer = tw.optim.AdamW([param])
        optimizer.step()
        average = optimizer.state[param]["exp_avg"]
        average.data = turn(average.data)
        optimizer.step()
        stepped.append(param.detach())
    assert torch.equal(*stepped)


def test_states_thrown_away():
    optimizers = pair(parameter(5))
    step_both(*optimizers)
    for optimizer in optimizers:
        optimizer.state.clear()
    step_both(*optimizers)
    assert optimizers[0].state[params_of(optimizers[0])[0]]["step"] == 1


def test_gradients_come_and_go():
    params = [parameter(n, seed=n) for n in (3, 50, 7)]
    grads = [p.grad for p in params]
    ours, theirs = pair(*params)
    for present in ((1,), (0, 1), (0, 1, 2), (2,), (), (0, 2), (0, 1, 2)):
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            p.grad = grad.clone() if i in present else None
        step_both(ours, theirs)
    assert [ours.state[p]["step"].item() for p in params] == [4, 4, 4]


def test_groups_rearranged():
    ours, theirs = pair(parameter(3), parameter(4), parameter(5), lr=1e-2)
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        first = optimizer.param_groups[0]
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(6))], "lr": 1.0})
        optimizer.param_groups[1]["params"].append(first["params"].pop())
    params_of(ours)[2].grad = torch.ones(6)
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["amsgrad"] = True
        for p in optimizer.param_groups[0]["params"]:  # torch does not make them by itself
            optimizer.state[p].setdefault("max_exp_avg_sq", torch.zeros_like(p))
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
    params_of(ours)[0].grad = torch.ones(3)
    step_both(ours, theirs)


def test_a_parameter_exchanged_for_another_of_its_memory():
    ours, theirs = pair(parameter(3))
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        old = params_of(optimizer)[0]
        new = nn.Parameter(old.detach())
        new.grad = old.grad
        optimizer.state[new] = optimizer.state.pop(old)
        optimizer.param_groups[0]["params"] = [new]
    step_both(ours, theirs)


@pytest.mark.parametrize("breaks", ["shape", "dtype", "state", "state dtype", "device"])
def test_a_misfit_in_a_later_group_leaves_no_half_step(breaks):
    good, bad = parameter(5), parameter(6)
    optimizer = tw.optim.AdamW([{"params": [good]}, {"params": [bad]}], max_grad_norm=1.0)
    optimizer.step()
    if breaks == "shape":
        bad.data = torch.ones(7)
    elif breaks == "dtype":
        bad.data = torch.ones(6, dtype=torch.float64)
    elif breaks == "device":
        optimizer.state[bad]["exp_avg"] = torch.ones(6, device="meta")
    elif breaks == "state dtype":
        optimizer.state[bad]["exp_avg_sq"].data = torch.ones(6, dtype=torch.bfloat16)
    else:
        optimizer.state[bad]["exp_avg_sq"] = torch.ones(3, 2)
    before = good.detach().clone(), {k: v.clone() for k, v in optimizer.state[good].items()}
    message = "Expected all tensors to be on the same device" if breaks == "device" else "expected"
    for _ in range(2):  # nor has a check that failed let the next one pass
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert torch.equal(good, before[0])
    for name, value in before[1].items():
        assert torch.equal(optimizer.state[good][name], value)


def test_scales_that_shrink_are_seen():
    param = parameter(1000)
    optimizer = tw.optim.AdamW([param], state_dtype="int8")
    optimizer.step()
    optimizer.state[param]["exp_avg_scale"].data = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"exp_avg_scales: expected shape \[4\]"):
        optimizer.step()


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_parameters_on_several_devices(monkeypatch, options, statistics):
    """Here all of them the CPU: what is checked is that the parts make one step."""
    results = []
    finish = _plan._OnDevice.finish
    for devices in (1, 2):
        params = [parameter(*sizes, seed=len(sizes)) for sizes in ((700,), (5, 9), (40,), ())]
        optimizer = tw.optim.AdamW(params, state_dtype="int8", **options)
        optimizer.observe(statistics=statistics)
        with monkeypatch.context() as patch:
            if devices == 2:
                patch.setattr(_plan._OnDevice, "finish", lambda o, _: finish(o, CPU))
                patch.setattr(_distributed, "device", lambda x: torch.device("cpu", x.dim() % 2))
            for step in range(4):
                params[2].grad = None if step == 1 else torch.ones(40)
                if options and step == 2:
                    params[1].grad[2, 3] = torch.inf
                optimizer.step()
                params[1].grad[2, 3] = 0.1
            assert len(optimizer._plan._on) == devices
        results.append([optimizer.skipped_steps, *map(torch.clone, params)])
        if statistics:
            results[-1] += optimizer.statistics
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert results[0][0] == (1 if options else 0)


def test_a_sparse_gradient_later_leaves_no_half_step():
    good, bad = parameter(5), parameter(4, 3)
    optimizer = tw.optim.AdamW([good, bad])
    optimizer.step()
    before = good.detach().clone()
    bad.grad = bad.grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(good, before)


def test_an_optimizer_frees_what_it_held():
    param = parameter(1000)
    optimizer = tw.optim.AdamW([param])
    optimizer.step()
    state = weakref.ref(optimizer.state[param]["exp_avg"])
    reference = weakref.ref(param)
    del optimizer, param
    gc.collect()
    assert state() is None
    assert reference() is None


def test_gradients_are_not_held():
    param = parameter(1000)
    optimizer = tw.optim.AdamW([param])
    optimizer.step()
    grad = weakref.ref(param.grad)
    optimizer.zero_grad()
    assert grad() is None


def test_backward_through_a_stepped_parameter_is_an_error():
    param = parameter(3)
    optimizer = tw.optim.AdamW([param])
    loss = (param * param).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_made_on_meta():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = tw.optim.AdamW(model.parameters())
    optimizer.step()  # no gradients
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.ones_(p)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert (model.weight < 1).all()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_profilers_and_global_hooks_see_a_step():
    param = parameter(3)
    optimizer = tw.optim.AdamW([param])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}
    calls = []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert calls == [1]


def test_a_subclass_may_override_step():
    class Doubled(tw.optim.AdamW):
        def step(self, closure=None):
            super().step()
            return super().step(closure)

    param = parameter(3)
    optimizer = Doubled([param])
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


def test_modules_may_swap_their_parameters():
    model = nn.Linear(3, 2)
    optimizer = tw.optim.AdamW(model.parameters())
    weight = model.weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            optimizer.state.clear()
            model(torch.ones(1, 3, dtype=dtype)).sum().backward()
            before = model.weight.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            assert (model.weight != before).all()
        assert model.weight is weight
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)

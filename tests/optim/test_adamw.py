"""tw.optim.AdamW is torch.optim.AdamW in everything but speed."""

import copy
import io
import math
import pickle

import pytest
import torch
import torchweld as tw
from torch import nn

from tests.optim.models import assert_same, backward, make_model
from tests.reference import adamw as reference


def pair(ours=None, theirs=None, **arguments):
    models = make_model(), make_model()
    return (
        *models,
        tw.optim.AdamW(models[0].parameters(), **arguments, **(ours or {})),
        torch.optim.AdamW(models[1].parameters(), **arguments, **(theirs or {"fused": True})),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"amsgrad": True},
        {"maximize": True, "lr": 1e-2},
        {"weight_decay": 0.3, "eps": 1e-3, "betas": (0.0, 0.5)},
        {"lr": torch.tensor(3e-3)},
        {"betas": (torch.tensor(0.8), torch.tensor(0.99))},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_follows_torch_fused_bit_for_bit(arguments):
    a, b, ours, theirs = pair(**arguments)
    for step in range(5):
        backward(a, step)
        backward(b, step)
        ours.step()
        theirs.step()
        assert_same(a, b)
    assert arguments.get("lr") == 0.0 or not torch.equal(a[0].weight, make_model()[0].weight)


def test_defaults_groups_and_keys_are_torchs():
    a, b, ours, theirs = pair(ours={"fused": True})
    assert ours.defaults == theirs.defaults
    for model, optimizer in ((a, ours), (b, theirs)):
        backward(model, 0)
        optimizer.step()
    mine, stock = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == stock["param_groups"]
    for i, state in stock["state"].items():
        assert list(mine["state"][i]) == list(state)
        for name, value in state.items():
            torch.testing.assert_close(mine["state"][i][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("stock", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_state_dict_goes_both_ways_in_the_middle(stock):
    a, b, ours, theirs = pair(theirs=stock, amsgrad=True)
    for step in range(3):
        backward(b, step)
        theirs.step()
    a.load_state_dict(b.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    exact = {} if stock == {"fused": True} else {"rtol": 1e-5, "atol": 1e-6}

    def train(steps):
        for step in steps:
            for model, optimizer in ((a, ours), (b, theirs)):
                backward(model, step)
                optimizer.step()
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(p, q, **(exact or {"rtol": 0, "atol": 0}))

    train(range(3, 6))
    theirs = torch.optim.AdamW(b.parameters(), **stock)
    b.load_state_dict(a.state_dict())
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer))
    train(range(6, 9))
    assert ours.state[a[0].weight]["step"] == 9


def test_loads_a_float64_step_and_a_plain_number():
    model = make_model()
    optimizer = tw.optim.AdamW(model.parameters())
    backward(model, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for i, state in saved["state"].items():
        state["step"] = 7 if i % 2 else torch.tensor(7.0, dtype=torch.float64)
    optimizer.load_state_dict(saved)
    optimizer.step()
    for state in optimizer.state.values():
        assert state["step"].dtype == torch.float32
        assert state["step"] == 8


def test_param_groups_schedulers_and_a_group_added_later():
    models = make_model(), make_model()
    optimizers = []
    for model, cls, extra in (
        (models[0], tw.optim.AdamW, {}),
        (models[1], torch.optim.AdamW, {"fused": True}),
    ):
        groups = [
            {"params": list(model[0].named_parameters()), "lr": 1e-2, "weight_decay": 0.0},
            {"params": list(model[1].named_parameters()), "amsgrad": True, "maximize": True},
        ]
        optimizers.append(cls(groups, **extra))
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8) for o in optimizers]
    for step in range(6):
        if step == 2:
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.add_param_group(
                    {"params": list(model[4].named_parameters()), "betas": (0.5, 0.9)}
                )
                # A scheduler knows the groups it was made with.
                optimizer.param_groups[2].update(max_momentum=0.95, base_momentum=0.85)
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            backward(model, step)
            optimizer.step()
            if step < 2:
                scheduler.step()
        assert_same(*models)
    assert not torch.equal(models[0][4].weight, make_model()[4].weight)


def test_scheduler_writes_into_a_tensor_lr():
    a, b, ours, theirs = pair({"lr": torch.tensor(1e-2)}, {"lr": torch.tensor(1e-2), "fused": True})
    for model, optimizer in ((a, ours), (b, theirs)):
        lr = optimizer.param_groups[0]["lr"]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(1e-2 / 8)
    assert_same(a, b)


def test_closure_and_hooks():
    model = make_model()
    optimizer = tw.optim.AdamW(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    before = model[4].weight.clone()

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        return backward(model, 0)

    loss = optimizer.step(closure)
    assert loss.requires_grad
    assert calls == ["pre", "closure", "post"]
    assert not torch.equal(model[4].weight, before)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6, math.inf])
def test_max_grad_norm_is_clip_grad_norm(max_norm):
    a, b, ours, theirs = pair(ours={"max_grad_norm": max_norm}, lr=1e-2)
    assert ours.grad_norm is None
    for step in range(4):
        backward(a, step, 10.0)
        backward(b, step, 10.0)
        grads = [p.grad.clone() for p in a.parameters()]
        ours.step()
        norm = nn.utils.clip_grad_norm_(b.parameters(), max_norm)
        theirs.step()
        assert ours.grad_norm.dtype == torch.float64
        assert ours.grad_norm.item() == pytest.approx(reference.norm(grads), rel=1e-13)
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        # The gradients are never rewritten.
        assert all(torch.equal(p.grad, g) for p, g in zip(a.parameters(), grads, strict=True))
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            q.data.copy_(p)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                mine, stock = ours.state[p][name], theirs.state[q][name]
                torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-9)


def test_max_grad_norm_is_one_norm_over_all_groups():
    p, q = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = tw.optim.AdamW([{"params": [p]}, {"params": [q]}], max_grad_norm=1.0)
    p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert optimizer.grad_norm == 5
    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(0.1 * 3 / 5, rel=1e-5)
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_spreads_as_in_torch(value):
    results = []
    for cls in (tw.optim.AdamW, torch.optim.AdamW):
        p, q = (torch.ones(4, requires_grad=True) for _ in range(2))
        p.grad, q.grad = torch.ones(4), torch.tensor([1.0, value, 2.0, 3.0])
        if cls is tw.optim.AdamW:
            optimizer = cls([p, q], max_grad_norm=1.0)
        else:
            optimizer = cls([p, q], fused=True)
            nn.utils.clip_grad_norm_([p, q], 1.0)
        optimizer.step()
        results.append((p.detach(), q.detach()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_grad_scaler_unscales_and_skips():
    a, b, ours, theirs = pair(ours={"fused": True}, theirs={"fused": None})
    for model, optimizer in ((a, ours), (b, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
        for step in range(4):
            torch.manual_seed(step)
            model.zero_grad()
            scaler.scale(model(torch.randn(4, 1, 8, 8)).square().mean()).backward()
            if step == 2:
                model[4].bias.grad[0] = math.inf
            if step == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512
        assert optimizer.state[model[0].weight]["step"] == 3
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deepcopy_and_pickle_go_on(duplicate):
    model = make_model()
    optimizer = tw.optim.AdamW(model.parameters(), max_grad_norm=0.1)
    backward(model, 0)
    optimizer.step()
    twin_model, twin = duplicate((model, optimizer))
    assert twin.max_grad_norm == 0.1
    assert torch.equal(twin.grad_norm, optimizer.grad_norm)
    for m, o in ((model, optimizer), (twin_model, twin)):
        backward(m, 1)
        o.step()
    assert_same(model, twin_model)
    assert twin.state[twin_model[0].weight]["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"max_grad_norm": -1.0}, ValueError, "Invalid max_grad_norm value: -1.0"),
        ({"max_grad_norm": math.nan}, ValueError, "Invalid max_grad_norm value: nan"),
        ({"fused": False}, ValueError, "always fused"),
        ({"foreach": True}, ValueError, "excludes foreach=True"),
        ({"differentiable": True}, ValueError, "cannot be differentiated"),
        ({"state_dtype": torch.float16}, ValueError, "Invalid state_dtype value: torch.float16"),
        (
            {"kahan": True, "stochastic_rounding": True},
            ValueError,
            "stochastic_rounding and kahan are different ways",
        ),
        ({"kahan": True, "split_master": True}, ValueError, "choose one"),
        ({"state_dtype": "int8", "amsgrad": True}, ValueError, "amsgrad does not go with"),
    ],
    ids=str,
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tw.optim.AdamW([torch.zeros(2, requires_grad=True)], **arguments)


@pytest.mark.parametrize("name", ["fused", "capturable"])
def test_accepted_arguments_stay_in_the_group(name):
    p = torch.ones(2, requires_grad=True)
    optimizer = tw.optim.AdamW([p], foreach=False, **{name: True})
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups[0][name] is True
    assert (p < 1).all()


def test_parameters_without_gradients_and_empty_ones():
    p, q, empty = (torch.ones(n, requires_grad=True) for n in (3, 3, 0))
    optimizer = tw.optim.AdamW([p, q, empty], max_grad_norm=1.0)
    optimizer.step()  # no gradient at all
    assert optimizer.grad_norm == 0
    assert not optimizer.state
    q.grad, empty.grad = torch.ones(3), torch.zeros(0)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert (q < 1).all()
    assert set(optimizer.state) == {q, empty}


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = tw.optim.AdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients.*SparseAdam"):
        optimizer.step()


def test_other_devices_are_refused():
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, device="meta", requires_grad=True)
    optimizer = tw.optim.AdamW([p, q])
    p.grad, q.grad = torch.ones(2), torch.ones(2, device="meta")
    with pytest.raises(NotImplementedError, match="got a parameter on meta"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(dtype):
    torch.manual_seed(0)
    value = torch.randn(5, 3, dtype=dtype)
    p, q = (value.clone().requires_grad_() for _ in range(2))
    ours, theirs = tw.optim.AdamW([p], amsgrad=True), torch.optim.AdamW([q], amsgrad=True)
    for _ in range(3):
        p.grad = torch.randn(3, 5, dtype=dtype).mH  # strided and lazily conjugated
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_load_after_the_model_changed_its_dtype(dtype):
    model = make_model()
    optimizer = tw.optim.AdamW(model.parameters())
    backward(model, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    model.to(dtype)
    backward(model, 1)
    with pytest.raises(
        RuntimeError, match=r"exp_avgs: expected \w+ beside params\[0\] of \w+, got float32"
    ):
        optimizer.step()
    optimizer = tw.optim.AdamW(model.parameters())
    optimizer.load_state_dict(saved)
    before = model[0].weight.clone()
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == dtype
    assert not torch.equal(model[0].weight, before)


def test_memory_format_and_data_change_between_steps():
    a, b, ours, theirs = pair(theirs={"foreach": False})
    for step in range(6):
        for model, optimizer in ((a, ours), (b, theirs)):
            if step == 2:
                model.to(memory_format=torch.channels_last)
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if step == 4:
                model[4].weight.data = torch.ones(7, 180)
            backward(model, step)
            optimizer.step()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    moment = ours.state[a[0].weight]["exp_avg"]
    assert moment.stride() == torch.empty_like(a[0].weight).stride()


def test_step_inside_torch_compile():
    a, b = make_model(), make_model()
    eager, graph = (tw.optim.AdamW(m.parameters(), max_grad_norm=0.1) for m in (a, b))
    compiled = torch.compile(graph.step, backend="eager")
    for step in range(3):
        for model, run in ((a, eager.step), (b, compiled)):
            backward(model, step)
            run()
        assert torch.equal(eager.grad_norm, graph.grad_norm)
    assert_same(a, b)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_same_parameter_twice_is_refused():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="expected each parameter once"):
        tw.optim.AdamW([param, param])
    optimizer = tw.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="expected each parameter once"):
        optimizer.add_param_group({"params": [param, param]})
    assert len(optimizer.param_groups) == 1


def test_foreign_entries_of_a_state_are_left_alone():
    optimizer = tw.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    state = optimizer.state_dict()
    state["state"] = {"ema": 0.99, "of somebody else": {"step": "two"}}
    optimizer.load_state_dict(state)
    assert optimizer.state["ema"] == 0.99

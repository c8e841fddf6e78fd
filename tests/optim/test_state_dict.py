"""States from any format of ours, and torch's, to any other."""

import copy
import io
import pickle

import pytest
import torch
import torchweld as tw

from tests.optim.models import parameter

BFLOAT16 = torch.bfloat16
OPTIONS = {
    "plain": {},
    "bfloat16": {"state_dtype": BFLOAT16},
    "int8": {"state_dtype": "int8"},
    "stochastic": {"stochastic_rounding": True},
    "kahan": {"kahan": True},
    "split, int8": {"split_master": True, "state_dtype": "int8"},
}


def made(name, dtype=BFLOAT16, steps=3, **more):
    params = [parameter(5, 60, dtype=dtype), parameter(17, dtype=dtype, seed=1)]
    optimizer = tw.optim.AdamW(params, **OPTIONS[name], **more)
    for _ in range(steps):
        optimizer.step()
    return optimizer


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def assert_same_state(a, b):
    for x, y in zip(a["state"].values(), b["state"].values(), strict=True):
        assert list(x) == list(y)
        for name in x:
            assert x[name].dtype == y[name].dtype
            torch.testing.assert_close(x[name], y[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("duplicate", [through_a_file, copy.deepcopy])
def test_what_is_saved_is_loaded_exactly(name, duplicate):
    first = made(name)
    saved = duplicate(first.state_dict())
    second = made(name, steps=0)
    second.load_state_dict(saved)
    assert_same_state(second.state_dict(), first.state_dict())
    for p, q in zip(params_of(second), params_of(first), strict=True):
        p.data.copy_(q)
    first.step()
    second.step()
    assert_same_state(second.state_dict(), first.state_dict())
    for p, q in zip(params_of(second), params_of(first), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("target", OPTIONS)
@pytest.mark.parametrize("source", [*OPTIONS, "torch"])
def test_every_format_loads_into_every_other(source, target):
    if source == "torch":
        params = params_of(made("plain", steps=0))
        first = torch.optim.AdamW(params, fused=True)
        for _ in range(3):
            first.step()
        truth = first.state_dict()["state"]
    else:
        first = made(source)
        truth = first.stock_state_dict()["state"]
    second = made(target, steps=1)
    second.load_state_dict(first.state_dict())
    keys = {i: set(s) for i, s in made(target).state_dict()["state"].items()}
    for i, state in second.state_dict()["state"].items():
        # Its own format, whatever it was given, but for low bits that nobody has.
        assert keys[i] - set(state) <= {"compensation", "remainder"}
        assert set(state) <= keys[i]
        assert state["step"] == 3
    for i, state in second.stock_state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            error = (state[name] - truth[i][name]).float().norm() / truth[i][name].float().norm()
            assert error < 0.05  # of 8 bits
            if "int8" not in target:
                assert error == 0
    second.step()
    assert {i: set(s) for i, s in second.state_dict()["state"].items()} == keys


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_loads_our_stock_state(name):
    first = made(name, steps=3)
    saved = through_a_file(first.stock_state_dict())
    stock = torch.optim.AdamW(
        [torch.nn.Parameter(p.detach().clone()) for p in params_of(first)], fused=True
    )
    assert saved["param_groups"][0].keys() == stock.state_dict()["param_groups"][0].keys()
    stock.load_state_dict(saved)
    for p, q in zip(params_of(first), params_of(stock), strict=True):
        q.grad = p.grad.clone()
    before = [p.detach().clone() for p in params_of(first)]
    first.step()
    stock.step()
    for p, q, b in zip(params_of(first), params_of(stock), before, strict=True):
        assert stock.state[q]["step"] == 4
        assert (p - q).float().norm() < 0.5 * (p - b).float().norm() + 2**-8 * p.float().norm()


def test_torch_refuses_codes_rather_than_misread_them():
    stock = torch.optim.AdamW([parameter(5, 60), parameter(17)], fused=True)
    stock.load_state_dict(made("int8", torch.float32).state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        stock.step()


def test_states_keep_their_dtype_when_loaded():
    # torch casts every state to its parameter's dtype.
    first = made("kahan")
    first.observe(average=0.5)
    first.step()
    second = made("kahan", steps=0)
    second.load_state_dict(first.state_dict())
    assert second.state[params_of(second)[0]]["average"].dtype == torch.float32
    wide = made("bfloat16", torch.float32)
    narrow = made("bfloat16", torch.float32, steps=0)
    narrow.load_state_dict(wide.state_dict())
    assert narrow.state[params_of(narrow)[0]]["exp_avg_sq"].dtype == BFLOAT16


def test_hooks_see_tensors():
    first, second = made("int8"), made("int8", steps=0)
    seen = []

    def hook(_, state):
        seen.extend(type(v) for s in state["state"].values() for v in s.values())

    second.register_load_state_dict_pre_hook(hook)
    second.load_state_dict(first.state_dict())
    assert set(seen) == {torch.Tensor}
    second.load_state_dict(first.state_dict())  # the hook of ours has gone


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on(name, duplicate):
    first = made(name, max_grad_norm=0.3, skip_nonfinite=True, seed=4)
    first.observe(statistics=True, average=0.9, shadow=BFLOAT16)
    first.step()
    second = duplicate(first)
    for p, q in zip(params_of(first), params_of(second), strict=True):
        q.grad = p.grad.clone()
    first.step()
    second.step()
    assert_same_state(second.state_dict(), first.state_dict())
    assert second.statistics == first.statistics
    for p, q in zip(params_of(first), params_of(second), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(first.shadow(p), second.shadow(q))
        assert torch.equal(first.average(p), second.average(q))


def test_int8_of_another_memory_format():
    param = parameter(8, 6, 3, 3)
    first = tw.optim.AdamW([param], state_dtype="int8")
    first.step()
    truth = first.stock_state_dict()["state"][0]["exp_avg"]
    other = torch.nn.Parameter(param.detach().to(memory_format=torch.channels_last))
    second = tw.optim.AdamW([other], state_dtype="int8")
    second.load_state_dict(first.state_dict())
    assert second.state[other]["exp_avg_code"].stride() == other.stride()
    again = second.stock_state_dict()["state"][0]["exp_avg"]
    assert (again - truth).norm() < 0.05 * truth.norm()


def test_a_state_of_another_shape():
    first = made("plain", torch.float32)
    second = tw.optim.AdamW([parameter(300), parameter(17)], state_dtype="int8")
    with pytest.raises(ValueError, match=r"exp_avg of shape \(5, 60\) .* of shape \(300,\)"):
        second.load_state_dict(first.state_dict())


def test_amsgrad_loaded_without_and_the_other_way():
    first = made("bfloat16", amsgrad=True)
    second = made("int8", steps=0)
    state = first.state_dict()
    state["param_groups"][0]["amsgrad"] = False
    second.load_state_dict(state)
    second.step()
    assert "max_exp_avg_sq" not in second.state[params_of(second)[0]]
    third = made("plain", amsgrad=True)
    third.load_state_dict({**made("plain").state_dict(), "param_groups": state["param_groups"]})
    third.param_groups[0]["amsgrad"] = True
    third.step()
    assert (third.state[params_of(third)[0]]["max_exp_avg_sq"] > 0).any()


def test_amsgrad_is_never_dropped_beside_int8():
    params = params_of(made("plain", steps=0))
    stock = torch.optim.AdamW(params, amsgrad=True, fused=True)
    stock.step()
    second = made("int8")
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match='amsgrad does not go with state_dtype="int8"'):
        second.load_state_dict(stock.state_dict())
    assert_same_state(second.state_dict(), before)
    assert second.state_dict()["param_groups"] == before["param_groups"]
    second.param_groups[0]["amsgrad"] = True
    weights = [p.detach().clone() for p in params_of(second)]
    for _ in range(2):
        with pytest.raises(ValueError, match='amsgrad does not go with state_dtype="int8"'):
            second.step()
    assert_same_state(second.state_dict(), before)
    assert all(torch.equal(p, w) for p, w in zip(params_of(second), weights, strict=True))
    second.param_groups[0]["amsgrad"] = False
    second.step()

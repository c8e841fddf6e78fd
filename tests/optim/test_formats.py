"""States and weights of fewer bits: what they keep, and that their random bits are what we say."""

import copy
import math

import pytest
import torch
import torchweld as tw

from tests.optim.models import make_model, parameter, train
from tests.reference import adamw as reference

BFLOAT16 = torch.bfloat16
FORMATS = {
    "bfloat16 states": {"state_dtype": BFLOAT16},
    "int8 states": {"state_dtype": "int8"},
    "stochastic": {"stochastic_rounding": True},
    "kahan": {"kahan": True},
    "split": {"split_master": True},
    "stochastic, int8": {"stochastic_rounding": True, "state_dtype": "int8"},
    "kahan, int8": {"kahan": True, "state_dtype": "int8"},
    "split, int8": {"split_master": True, "state_dtype": "int8"},
}
KEEPING = [name for name, options in FORMATS.items() if len(options.keys() - {"state_dtype"})]
MOMENTS = {"exp_avg", "exp_avg_sq"}
CODES = {f"{name}_{part}" for name in MOMENTS for part in ("code", "scale")}


def bits(optimizer):
    """Return all bytes of parameters and states, to compare."""
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    states = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return b"".join(x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                    for x in (*params, *states))  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.float16], ids=str)
def test_what_a_state_holds(name, dtype):
    options = FORMATS[name]
    param = parameter(1000, dtype=dtype)
    optimizer = tw.optim.AdamW([param], **options)
    optimizer.step()
    state = optimizer.state[param]
    int8 = options.get("state_dtype") == "int8"
    compensation = set()
    if dtype is BFLOAT16:
        compensation = {"kahan": {"compensation"}, "split": {"remainder"}}.get(
            name.split(",")[0], set()
        )
    assert set(state) == {"step"} | (CODES if int8 else MOMENTS) | compensation
    if int8:
        assert sum(state[k].nbytes for k in CODES) <= 2.1 * param.numel()
    else:
        narrow = options.get("state_dtype") is BFLOAT16 or dtype is BFLOAT16
        assert state["exp_avg"].dtype == (BFLOAT16 if narrow else dtype)


def full(param, state=None):
    """Return the weight with the bits that are kept apart from it."""
    state = state or {}
    if "remainder" in state:
        master = (param.detach().view(torch.int16).int() << 16) + state["remainder"].int()
        return master.view(torch.float32).double()
    return param.detach().double() + state.get("compensation", 0.0)


@pytest.mark.parametrize("name", KEEPING)
def test_small_updates_of_bfloat16_weights_are_kept(name):
    steps, lr = 60, 1e-5
    param, stock = (parameter(20_000, dtype=BFLOAT16) for _ in range(2))
    start = param.detach().double()
    optimizer = tw.optim.AdamW([param], lr=lr, **FORMATS[name])
    theirs = torch.optim.AdamW([stock], lr=lr, fused=True)
    p, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    hyper = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-2, "eps": 1e-8}
    for t in range(1, steps + 1):
        p, m, v, _ = reference.step(p, param.grad, m, v, None, t, **hyper)
        optimizer.step()
        theirs.step()
    expected = p - start
    # The total along the gradient: stock loses most of it.
    weights = full(param, optimizer.state[param]), full(stock)
    share = [((w - start) @ expected / (expected @ expected)).item() for w in weights]
    assert share[1] < 0.5
    assert share[0] == pytest.approx(1, abs=0.1)
    # The part kept apart is below half a unit in the last place, so the stored weight is the best.
    assert ((weights[0] - param.detach()).abs() <= 2**-8 * param.detach().abs()).all() or (
        FORMATS[name].get("stochastic_rounding")
    )


@pytest.mark.parametrize("name", ["kahan", "split"])
def test_compensation_is_as_good_as_float32(name):
    param = parameter(5000, dtype=BFLOAT16)
    optimizer = tw.optim.AdamW([param], lr=1e-4, **FORMATS[name])
    wide = torch.nn.Parameter(param.detach().float())
    theirs = tw.optim.AdamW([wide], lr=1e-4, state_dtype=BFLOAT16)
    for _ in range(50):
        wide.grad = param.grad.float()
        optimizer.step()
        theirs.step()
    # Rounded to bfloat16 they agree but where it nearly tied: within one unit in the last place.
    error = (param.detach().float() - wide.detach()).abs() / wide.detach().abs()
    assert error.max() < 2**-7
    assert error.mean() < 2**-9
    if name == "split":
        drift = (full(param, optimizer.state[param]) - wide.detach()).abs() / 50e-4
        assert drift.max() < 0.05  # of the way both went, by their states' random bits


@pytest.mark.parametrize("name", ["bfloat16 states", "int8 states", "stochastic"])
def test_second_moments_decay(name):
    param, stock = (parameter(2000, dtype=BFLOAT16) for _ in range(2))
    optimizer = tw.optim.AdamW([param], lr=0.0, **FORMATS[name])
    theirs = torch.optim.AdamW([stock], lr=0.0, fused=True)
    for o in (optimizer, theirs):
        o.step()
    start = theirs.state[stock]["exp_avg_sq"].clone()
    for o, p in ((optimizer, param), (theirs, stock)):
        p.grad.zero_()
        for _ in range(700):
            o.step()
    # Rounded to nearest none moves, ever.
    assert torch.equal(theirs.state[stock]["exp_avg_sq"], start)
    v = optimizer.stock_state_dict()["state"][0]["exp_avg_sq"]
    share = (v.double().sum() / start.double().sum()).item()
    assert share == pytest.approx(0.999**700, rel=0.1)


@pytest.mark.parametrize("name", FORMATS)
def test_trains_as_float32_does(name):
    a, b = make_model(), make_model()
    train(a, tw.optim.AdamW(a.parameters(), lr=1e-3, **FORMATS[name]), range(30))
    train(b, torch.optim.AdamW(b.parameters(), lr=1e-3, fused=True), range(30))
    start = make_model()
    for p, q, s in zip(*(m.parameters() for m in (a, b, start)), strict=True):
        far = (q - s).norm()
        assert (p - q).norm() < 0.2 * far
        assert far > 0


@pytest.mark.parametrize("name", KEEPING[:3])
def test_roundings_leave_other_dtypes_alone(name):
    for dtype in (torch.float32, torch.float16, torch.float64, torch.complex64):
        results = []
        for options in ({}, FORMATS[name]):
            narrow = parameter(100, dtype=BFLOAT16)
            other = parameter(100, dtype=dtype)
            optimizer = tw.optim.AdamW([narrow, other], **options)
            for _ in range(3):
                optimizer.step()
            results.append((narrow.detach(), other.detach()))
        assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[1][0]) or name != "stochastic"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_narrow_states_of_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="state_dtype is for float32, bfloat16 and float16"):
        tw.optim.AdamW([parameter(3, dtype=dtype)], state_dtype="int8")
    optimizer = tw.optim.AdamW([parameter(3)], state_dtype=BFLOAT16)
    with pytest.raises(ValueError, match=f"got one of {dtype}"):
        optimizer.add_param_group({"params": [parameter(3, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_same_bits_for_any_number_of_threads(name):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = [parameter(n, dtype=BFLOAT16, seed=n) for n in (100_003, 5, 40_000, 257)]
            optimizer = tw.optim.AdamW(params, max_grad_norm=1.0, **FORMATS[name])
            for _ in range(2):
                optimizer.step()
            results.append(bits(optimizer))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", FORMATS)
def test_random_bits_are_of_the_seed_and_resume(name):
    def run(seed, interrupted=False):
        params = [parameter(300, dtype=BFLOAT16), parameter(300, dtype=BFLOAT16)]
        optimizer = tw.optim.AdamW(params, seed=seed, **FORMATS[name])
        for step in range(4):
            if interrupted and step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = tw.optim.AdamW(params, **FORMATS[name])
                optimizer.load_state_dict(saved)
                assert optimizer.seed == seed
            optimizer.step()
        return optimizer

    assert bits(run(7)) == bits(run(7, interrupted=True))
    assert bits(run(7)) != bits(run(8))
    a, b = run(7).state_dict()["state"].values()
    # Equal parameters with equal gradients draw different bits.
    assert any(not torch.equal(a[k], b[k]) for k in a if k != "step")


def test_seed_may_be_changed():
    optimizer = tw.optim.AdamW([parameter(3, dtype=BFLOAT16)], stochastic_rounding=True)
    assert optimizer.seed == 0
    optimizer.seed = 5
    optimizer.add_param_group({"params": [parameter(3)]})
    assert optimizer.seed == 5
    assert "seed" not in tw.optim.AdamW([parameter(3)], seed=3).param_groups[0]


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_that_fill_no_block(name):
    params = [parameter(*size, dtype=BFLOAT16) for size in ((), (1,), (0, 3), (255,), (257,))]
    params[-1].grad.zero_()
    start = [p.detach().clone() for p in params]
    optimizer = tw.optim.AdamW(params, weight_decay=0.0, lr=0.1, **FORMATS[name])
    for _ in range(3):
        optimizer.step()
    for p, s in zip(params[:-1], start[:-1], strict=True):
        assert (p.isfinite() & (p != s)).all()
    assert torch.equal(params[-1], start[-1])  # moments of zero over moments of zero


@pytest.mark.parametrize("name", ["int8 states", "kahan", "split, int8"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_spreads_no_further_than_its_block(name, value):
    param = parameter(1024, dtype=BFLOAT16)
    optimizer = tw.optim.AdamW([param], **FORMATS[name])
    optimizer.step()
    param.grad[300] = value
    optimizer.step()
    assert not param[300].isfinite()
    param.grad[300] = 0.1
    optimizer.step()
    assert not param[300].isfinite()
    assert param[:256].isfinite().all()
    assert param[512:].isfinite().all()


@pytest.mark.parametrize("name", ["plain", *FORMATS])
def test_skip_nonfinite_leaves_everything_as_it_is(name):
    params = [parameter(300, dtype=BFLOAT16), parameter(20)]
    optimizer = tw.optim.AdamW(params, skip_nonfinite=True, **FORMATS.get(name, {}))
    optimizer.step()
    before = bits(optimizer)
    for bad in (math.nan, math.inf, -math.inf):
        params[1].grad[7] = bad
        optimizer.step()
        assert bits(optimizer) == before
    assert optimizer.skipped_steps == 3
    assert not optimizer.grad_norm.isfinite()
    params[1].grad[7] = 0.0
    optimizer.step()
    assert optimizer.skipped_steps == 3
    assert bits(optimizer) != before
    assert optimizer.state[params[0]]["step"] == 2


def test_a_norm_beyond_float64_is_not_a_reason_to_skip():
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = tw.optim.AdamW([param], skip_nonfinite=True)
    param.grad = torch.full((2,), 1e200, dtype=torch.float64)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert (param < 1).all()


@pytest.mark.parametrize("name", ["bfloat16 states", "int8 states"])
def test_channels_last_and_gaps(name):
    for view in (lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, ::2]):
        values = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
        start = view(values).clone()
        param = torch.nn.Parameter(view(values))
        plain = torch.nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        optimizers = [tw.optim.AdamW([p], lr=1e-2, **FORMATS[name]) for p in (param, plain)]
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            plain.grad = torch.randn(plain.shape, generator=generator)
            param.grad = plain.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert (param - plain).abs().max() < 5e-3  # of a way of 5e-2; blocks and bits differ
        assert (param - start).abs().min() > 0


def test_codes_stay_in_their_order_when_the_parameter_changes_its():
    param = parameter(8, 6, 3, 3)
    optimizer = tw.optim.AdamW([param], state_dtype="int8", lr=1e-2)
    twin = tw.optim.AdamW([parameter(8, 6, 3, 3)], state_dtype="int8", lr=1e-2)
    optimizer.step()
    twin.step()
    param.data = param.data.to(memory_format=torch.channels_last)
    optimizer.step()
    twin.step()
    torch.testing.assert_close(param, twin.param_groups[0]["params"][0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["stochastic, int8", "kahan, int8", "split, int8", "kahan"])
def test_a_model_that_becomes_bfloat16_keeps_small_updates(name):
    options = {"state_dtype": BFLOAT16, **FORMATS[name]}
    param = torch.nn.Parameter(torch.ones(4096))
    param.grad = torch.ones(4096)
    optimizer = tw.optim.AdamW([param], lr=1e-4, weight_decay=0.0, **options)
    optimizer.step()
    for tensor in (param, param.grad):
        tensor.data = tensor.data.bfloat16()  # as module.bfloat16() does
    for _ in range(100):
        optimizer.step()
    state = optimizer.state[param]
    assert ("compensation" in state) == ("kahan" in name)
    assert ("remainder" in state) == ("split" in name)
    moved = 1 - full(param, state).mean().item()
    assert moved == pytest.approx(1e-2, rel=0.1)  # 0 if each is rounded to nearest


@pytest.mark.parametrize("name", ["stochastic, int8", "kahan, int8", "split, int8"])
def test_a_model_that_becomes_float32_drops_low_bits(name):
    param = parameter(600, dtype=BFLOAT16)
    optimizer = tw.optim.AdamW([param], **FORMATS[name])
    optimizer.step()
    for tensor in (param, param.grad):
        tensor.data = tensor.data.float()
    before = param.detach().clone()
    optimizer.step()
    assert set(optimizer.state[param]) == {"step"} | CODES
    assert (param != before).all()


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"Invalid seed value: {seed}"):
        tw.optim.AdamW([parameter(3)], seed=seed)
    optimizer = tw.optim.AdamW([parameter(3, dtype=BFLOAT16)], kahan=True, seed=2**63 - 1)
    optimizer.step()
    with pytest.raises(ValueError, match=f"Invalid seed value: {seed}"):
        optimizer.seed = seed
    assert optimizer.seed == 2**63 - 1

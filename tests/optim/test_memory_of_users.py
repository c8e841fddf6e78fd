"""What users do to the memory of parameters and gradients between steps."""

import pytest
import torch
import torchweld as tw


def _train(model, optimizer, x, steps, between=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            between()


@pytest.mark.parametrize("options", [{"split_master": True}, {"kahan": True}], ids=str)
@pytest.mark.parametrize("state_dtype", [None, "int8"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda w, mask: w.mul_(mask),
        lambda w, mask: w.zero_(),
        lambda w, mask: w.zero_().neg_(),
        lambda w, mask: w.clamp_(min=0),
    ],
    ids=["masked", "zero", "negative zero", "clamped"],
)
def test_weights_written_between_steps_stay_numbers(options, state_dtype, edit):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64).bfloat16()
    mask = (torch.rand(64, 64) > 0.5).bfloat16()
    optimizer = tw.optim.AdamW(model.parameters(), lr=1e-2, state_dtype=state_dtype, **options)
    x = torch.randn(8, 64).bfloat16()
    _train(model, optimizer, x, 4, lambda: edit(model.weight, mask))
    optimizer.step()
    assert model.weight.isfinite().all()


def test_a_split_zero_begins_anew():
    weight = torch.nn.Parameter(torch.full((64,), 1.0).bfloat16())
    optimizer = tw.optim.AdamW([weight], lr=1e-3, split_master=True, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight.zero_()
    optimizer.step()
    torch.testing.assert_close(
        weight.detach().float(), torch.full((64,), -1e-3), rtol=2**-7, atol=0.0
    )


def test_parameters_in_one_memory_are_stepped_one_after_the_other():
    def run(make, threads):
        torch.manual_seed(0)
        a, b = torch.nn.Parameter(torch.randn(400, 500)), torch.nn.Parameter(torch.empty(400, 500))
        b.data = a.data
        optimizer = make([a, b], lr=1e-2)
        torch.set_num_threads(threads)
        for _ in range(5):
            for p in (a, b):
                p.grad = torch.randn_like(p)
            optimizer.step()
        return a.detach()

    before = torch.get_num_threads()
    try:
        expected = run(lambda p, **k: torch.optim.AdamW(p, fused=True, **k), 1)
        for threads in (1, 2, 3):
            assert torch.equal(run(tw.optim.AdamW, threads), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_infinities_are_counted_wherever_they_are(dtype):
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (100_003, 1, 40_000)]
    optimizer = tw.optim.AdamW(params, skip_nonfinite=True)
    optimizer.observe(statistics=True)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[[0, 17_000, 100_002]] = float("inf")
    params[1].grad[0] = float("nan")
    params[2].grad[31] = -float("inf")
    if dtype is torch.float64:
        params[2].grad[5] = 1e300  # finite, and its square is not
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.statistics.nonfinite == 5
    assert all(p.eq(0).all() for p in params)

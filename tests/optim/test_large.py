"""A parameter of more than 2^31 elements, whose places do not fit into 32 bits with a sign.

Takes 13 GB, hence on request only: TORCHWELD_TEST_LARGE=1.
"""

import os

import pytest
import torch
import torchweld as tw
from torch import nn
from torchweld.optim import _state

SIZE = 2**31 + 1000  # the last block of 8-bit states is not full
PART = 4 * _state.BLOCK  # elements that are followed at both ends, and more at the last
GIB = 2**30


def needs_memory(gib):
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // GIB
    if not os.environ.get("TORCHWELD_TEST_LARGE"):
        return pytest.mark.skip(reason=f"takes {gib} GiB of memory; set TORCHWELD_TEST_LARGE=1")
    return pytest.mark.skipif(free < gib, reason=f"takes {gib} GiB of memory, {free} are free")


def states_by_themselves(param, grad, offset, steps):
    """Step elements of a parameter as if they were all that this process has of it."""
    state = _state.create(param, _state.Format(_state.INT8, _state.STOCHASTIC), False)
    names = ("step", "exp_avg_code", "exp_avg_sq_code", "exp_avg_scale", "exp_avg_sq_scale")
    row = [0, 0, _state.INT8, _state.STOCHASTIC, offset, 0, 0, 0, 1, 2, 3, -1, -1, 4, 5, -1, -1]
    plan = torch.ops.torchweld._adamw_plan(
        [param, *map(state.get, names)], torch.tensor([row], dtype=torch.int64)
    )
    hyper = [1e-2, 0.9, 0.999, 1e-8, 0.1, False]
    for _ in range(steps):
        torch.ops.torchweld._adamw_run(
            plan, [grad], [], hyper, [], None, None, None, False, 0, False, 0.0
        )
    return state


@needs_memory(16)
def test_more_elements_than_32_bits_count():
    begins = (0, SIZE - SIZE % _state.BLOCK - PART)
    param = nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 0.5)
    torch.manual_seed(0)
    for begin in begins:
        param.grad[begin : begin + PART] = torch.randn(PART)
    ends = [slice(0, PART), slice(begins[1], SIZE)]
    parts = [(param.detach()[end].clone(), param.grad[end].clone()) for end in ends]

    optimizer = tw.optim.AdamW(
        [param], lr=1e-2, weight_decay=0.1, stochastic_rounding=True, state_dtype="int8"
    )
    for _ in range(2):
        optimizer.step()
    state = optimizer.state[param]

    for end, (part, grad) in zip(ends, parts, strict=True):
        expected = states_by_themselves(part, grad, end.start, 2)
        assert torch.equal(param.detach()[end], part)
        for name in ("exp_avg", "exp_avg_sq"):
            blocks = slice(end.start // _state.BLOCK, -(-end.stop // _state.BLOCK))
            assert torch.equal(state[f"{name}_code"][end], expected[f"{name}_code"])
            assert torch.equal(state[f"{name}_scale"][blocks], expected[f"{name}_scale"])
    # Alike in all but their places, and so in all but their random bits.
    assert not torch.equal(param.detach()[SIZE - 200 :], param.detach()[2 * PART : 2 * PART + 200])
    # Two steps of nearly lr each, everywhere; an element left out would be 1.
    smallest, largest = param.detach()[PART : begins[1]].aminmax()
    assert smallest > 0.965
    assert largest < 0.99

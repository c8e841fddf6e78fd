"""The AdamW operators against torch's fused step and against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchweld as tw
from torchweld import _C

from tests.reference import adamw as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BETAS = [(0.9, 0.999), (0.0, 0.0), (0.3, 0.5), (0.5, 0.9), (0.99999, 0.999999)]
# Every remainder a register of any instruction set can leave, and what several threads share.
SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 4099, 33_001]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
# Torch's fused step leaves contraction to its compiler; on other CPUs than these it may choose
# otherwise, by up to one ulp.
MAX_ULPS = 0 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 1
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@pytest.fixture
def one_thread():
    """Torch's step opens a parallel region per tensor, which takes long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ulps(a, b):
    """Return the largest distance in units in the last place; NaN and NaN are equal."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    if not a.numel():
        return 0
    integer = INTEGER[a.element_size()]
    lines = []
    for x in (a, b):
        bits = x.view(integer).long()
        # Negative numbers count down from zero.
        lines.append(torch.where(bits < 0, torch.iinfo(integer).min - bits, bits))
    return (lines[0] - lines[1]).abs().masked_fill(a.isnan(), 0).max().item()


def state(shapes, dtype, amsgrad=False, seed=0):
    """params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps at the start of a training."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    return (
        params,
        *zeros[:2],
        zeros[2] if amsgrad else [],
        [torch.zeros(()) for _ in params],
    )


def gradients(params, step, scale=0.1):
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for p in params
    ]


def torch_step(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **hyper):
    for t in steps:
        t += 1
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **hyper)


def apply(step, tensors, grads, amsgrad=False, maximize=False, **hyper):
    params, *rest = tensors
    step(params, grads, *rest, **{**HYPER, **hyper}, amsgrad=amsgrad, maximize=maximize)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_step_is_that_of_torch_fused(dtype, betas, amsgrad, one_thread):
    ours, theirs = state(SIZES, dtype, amsgrad), state(SIZES, dtype, amsgrad)
    for step in range(6):
        hyper = {
            "beta1": betas[0],
            "beta2": betas[1],
            "maximize": step % 2 == 1,
            "weight_decay": 0.0 if step == 2 else 0.1,
            "lr": 0.0 if step == 3 else 1e-2,
            "eps": 1e-3 if step == 4 else 1e-8,
        }
        grads = gradients(ours[0], step)
        apply(tw.ops.adamw_step_, ours, grads, amsgrad, **hyper)
        apply(torch_step, theirs, [g.clone() for g in grads], amsgrad, **hyper)
        for mine, stock in zip(ours, theirs, strict=True):
            for a, b in zip(mine, stock, strict=True):
                assert ulps(a, b) <= MAX_ULPS
                a.copy_(b)
    assert all(t == 6 for t in ours[-1])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_as_torch(dtype, amsgrad):
    tiny, big = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, tiny, big, -big, 1.0])
    ours, theirs = ([values.repeat(9).to(dtype)] for _ in range(2))
    ours, theirs = (
        (
            p,
            *([torch.zeros_like(p[0])] for _ in range(2)),
            [torch.zeros_like(p[0])] * amsgrad,
            [torch.zeros(())],
        )
        for p in (ours, theirs)
    )
    grad = values.repeat_interleave(9).to(dtype)
    for _ in range(3):
        apply(tw.ops.adamw_step_, ours, [grad], amsgrad, eps=0.0)
        apply(torch_step, theirs, [grad.clone()], amsgrad, eps=0.0)
        for mine, stock in zip(ours[:4], theirs[:4], strict=True):
            for a, b in zip(mine, stock, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_gradient_is_nearer_to_float64_than_torch(dtype):
    # Stock rounds the clipped gradient to storage before the step; here it never is.
    ours, theirs = state([5000], dtype), state([5000], dtype)
    scale = 0.3
    for t in range(1, 5):
        grads = gradients(ours[0], t)
        before = [[x[0].clone() for x in s[:3]] for s in (ours, theirs)]
        apply(tw.ops.adamw_step_, ours, grads, grad_scale=torch.tensor(scale, dtype=torch.float64))
        apply(torch_step, theirs, [g * scale for g in grads])
        for index in range(3):
            error = []
            for (p, m, v), after in zip(before, (ours, theirs), strict=True):
                exact = reference.step(p, grads[0], m, v, None, t, **HYPER, grad_scale=scale)
                error.append((after[index][0].double() - exact[index]).norm().item())
            assert error[0] <= 1.05 * error[1]


def test_maximize_and_amsgrad_follow_the_formula():
    ours = state([257], torch.float64, amsgrad=True)
    expected = [x[0].clone() for x in ours[:4]]
    for t in range(1, 6):
        grads = gradients(ours[0], t, scale=1 / t)
        expected = reference.step(
            expected[0], grads[0], *expected[1:], t, **HYPER, maximize=True, grad_scale=0.5
        )
        scale = torch.tensor(0.5, dtype=torch.float64)
        apply(tw.ops.adamw_step_, ours, grads, True, True, grad_scale=scale)
        for a, b in zip(ours[:4], expected, strict=True):
            torch.testing.assert_close(a[0], b, rtol=1e-12, atol=1e-14)


def layouts():
    memory = torch.zeros(40, 9)
    return {
        "channels_last": torch.randn(4, 6, 3, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(7, 5).t(),
        "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
        "gaps": memory[::2, 1:8],
        "size one": torch.randn(6, 1, 1, 5).as_strided((6, 1, 1, 5), (5, 77, 99, 1)),
        "zero-dim": torch.randn(()),
        "empty": torch.randn(0, 3),
        "offset": torch.randn(33)[1:],
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("states", ["like the parameter", "contiguous"])
def test_any_strides(name, states):
    param = layouts()[name]
    make = torch.zeros_like if states == "like the parameter" else lambda p: torch.zeros(p.shape)
    strided = ([param], [make(param)], [make(param)], [make(param)], [torch.zeros(())])
    plain = tuple([x[0].contiguous().clone()] for x in strided)
    for _ in range(3):
        grad = torch.randn(param.shape)
        wide = torch.stack([grad, grad], -1)[..., 0]  # every other element
        apply(tw.ops.adamw_step_, strided, [wide], amsgrad=True)
        apply(tw.ops.adamw_step_, plain, [grad], amsgrad=True)
        for a, b in zip(strided, plain, strict=True):
            # A remainder's place in memory moves its rounding by an ulp of v.
            torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-7)
    assert strided[4][0] == 3


def test_what_lies_between_is_not_touched():
    memory = torch.full((10, 10), 7.0)
    param = memory[::2, 2:8]
    tensors = ([param], [torch.zeros(5, 6)], [torch.zeros(5, 6)], [], [torch.zeros(())])
    apply(tw.ops.adamw_step_, tensors, [torch.ones(5, 6)])
    assert (param < 7).all()
    assert (memory == 7).sum() == 70


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_two_reals(dtype):
    p, g = torch.randn(33, dtype=dtype), torch.randn(33, dtype=dtype)
    both = []
    for view in (lambda x: x, torch.view_as_real):
        q = p.clone()
        zeros = [torch.zeros_like(q) for _ in range(3)]
        tensors = ([view(q)], *([view(z)] for z in zeros), [torch.zeros(())])
        # The conjugate bit is not in the memory a kernel reads.
        grad = g.conj() if view(q) is q else torch.view_as_real(g.conj().resolve_conj())
        apply(tw.ops.adamw_step_, tensors, [grad], amsgrad=True)
        both.append([q, *zeros])
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0


def test_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            tensors = state([100_003, 5, 40_000, 33], torch.float32)
            apply(tw.ops.adamw_step_, tensors, gradients(tensors[0], 0))
            results.append([*tensors[0], *tensors[2], tw.ops.grad_norm(tensors[0])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ISA_PROGRAM = """
import hashlib, sys
sys.path.insert(0, {root!r})
import tests.ops.test_adamw as t
import torch, torchweld as tw
digest = hashlib.sha256()
for dtype in t.DTYPES:
    tensors = t.state(t.SIZES, dtype, amsgrad=True)
    for step in range(3):
        grads = t.gradients(tensors[0], step)
        t.apply(tw.ops.adamw_step_, tensors, grads, amsgrad=True)
        digest.update(tw.ops.grad_norm(grads).numpy().tobytes())
    for group in tensors:
        for x in group:
            digest.update(x.view(t.INTEGER[x.element_size()]).numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_bits_on_every_instruction_set():
    program = ISA_PROGRAM.format(root=str(Path(__file__).parents[2]))
    digests = {}
    for capability in _C.available_cpu_capabilities().split(","):
        environment = {**os.environ, "TORCHWELD_CPU_CAPABILITY": capability}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        digests[capability] = result.stdout
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_grad_norm_against_float64(dtype):
    torch.manual_seed(0)
    grads = [torch.randn(s, dtype=dtype) for s in SIZES] + [torch.randn(5, 6, dtype=dtype)[:, ::2]]
    norm = tw.ops.grad_norm(grads)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    assert norm.item() == pytest.approx(reference.norm(grads), rel=1e-14)


def test_grad_norm_of_special_values():
    assert tw.ops.grad_norm([]) == 0
    assert tw.ops.grad_norm([torch.zeros(0)]) == 0
    assert tw.ops.grad_norm([torch.tensor([1.0, torch.inf])]) == torch.inf
    assert tw.ops.grad_norm([torch.tensor([torch.inf, torch.nan])]).isnan()
    # The squares of these are beyond float32.
    large = tw.ops.grad_norm([torch.full((4,), 1e30), torch.ones(2, dtype=torch.bfloat16)])
    assert large.item() == pytest.approx(2e30)


def test_backward_through_a_stepped_parameter_is_an_error():
    w = torch.randn(3, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        zeros = [[torch.zeros(3)] for _ in range(2)]
        apply(tw.ops.adamw_step_, ([w], *zeros, [], [torch.zeros(())]), [torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def bad(**change):
    def tensors(n):
        return [torch.ones(2, 3) for _ in range(n)]

    arguments = {
        "params": tensors(2),
        "grads": tensors(2),
        "exp_avgs": tensors(2),
        "exp_avg_sqs": tensors(2),
        "max_exp_avg_sqs": [],
        "state_steps": [torch.zeros(()) for _ in range(2)],
        "amsgrad": False,
    }
    return {**arguments, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.ones(2, 3)]}, r"grads: expected 2 tensors, one per param, got 1"),
        (
            {"grads": [torch.ones(2, 3), torch.ones(3, 2)]},
            r"grads: expected the shape \[2, 3\] of params\[1\], got \[3, 2\]",
        ),
        (
            {"grads": [torch.ones(2, 3), torch.ones(2, 3).half()]},
            r"grads: expected float32 beside params\[1\] of float32, got Half|float16",
        ),
        (
            {"exp_avg_sqs": [torch.ones(2, 3).double()] * 2},
            r"exp_avg_sqs: expected float32 beside params\[0\] of float32, got float64",
        ),
        ({"params": [torch.ones(2, 3).int()] * 2}, r"params: expected float32, .*, got int32"),
        (
            {"params": [torch.ones(3).expand(2, 3)] * 2},
            r"params: expected memory without overlap, got an expanded tensor at 0",
        ),
        ({"amsgrad": True}, r"max_exp_avg_sqs: expected 2 tensors"),
        (
            {"max_exp_avg_sqs": [torch.ones(2, 3)] * 2},
            r"max_exp_avg_sqs: expected an empty list without amsgrad, got 2 tensors",
        ),
        (
            {"state_steps": [torch.zeros((), dtype=torch.int64)] * 2},
            r"state_steps: expected float32 scalars on the device of params, got int64",
        ),
        (
            {"grad_scale": torch.ones(())},
            r"grad_scale: expected a float64 scalar on the device of params",
        ),
    ],
)
def test_bad_arguments_write_nothing(change, message):
    arguments = bad(**change)
    before = {k: [x.clone() for x in v] for k, v in arguments.items() if isinstance(v, list)}
    with pytest.raises(RuntimeError, match=r"torchweld::adamw_step_: " + message):
        tw.ops.adamw_step_(**arguments, **HYPER)
    for name, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, arguments[name], strict=True))


@pytest.mark.parametrize("name", ["grad_norm", "_adamw_sum_of_squares"])
def test_norm_of_integers_is_an_error(name):
    with pytest.raises(RuntimeError, match=rf"torchweld::{name}: grads: .*got int64"):
        getattr(torch.ops.torchweld, name)([torch.ones(2), torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, amsgrad):
    params, *rest = state([(4, 3), (5,)], dtype, amsgrad)
    grads = gradients(params, 0)
    hyper = {**HYPER, "amsgrad": amsgrad, "maximize": False}
    torch.library.opcheck(torch.ops.torchweld.adamw_step_, (params, grads, *rest), hyper)
    torch.library.opcheck(torch.ops.torchweld.grad_norm, (grads,))


def test_compiles_in_one_graph():
    def clipped_step(params, grads, exp_avgs, exp_avg_sqs, steps):
        norm = tw.ops.grad_norm(grads)
        scale = (0.1 / (norm + 1e-6)).clamp(max=1.0)
        tw.ops.adamw_step_(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, **HYPER, grad_scale=scale
        )
        return norm

    compiled = torch.compile(clipped_step, fullgraph=True)
    eager, graph = state([(4, 3), (5,)], torch.float32), state([(4, 3), (5,)], torch.float32)
    for step in range(3):
        grads = gradients(eager[0], step)
        norms = [
            f(s[0], grads, s[1], s[2], s[4]) for f, s in ((clipped_step, eager), (compiled, graph))
        ]
        assert torch.equal(*norms)
    for a, b in zip(eager, graph, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)

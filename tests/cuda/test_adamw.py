"""The AdamW operators on a GPU: the bits of the CPU's, in any memory, stream or graph."""

import pytest
import torch
import torchweld as tw

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
SHAPES = [(1,), (7,), (0,), (64, 33), (3, 5, 7, 9), (70_001,)]


class Lists:
    """Parameters, gradients and states, on the CPU or a copy of them elsewhere."""

    def __init__(self, tensors: list[list[torch.Tensor]]) -> None:
        self.tensors = tensors

    @classmethod
    def random(cls, shapes, dtype, amsgrad=False) -> "Lists":
        generator = torch.Generator().manual_seed(0)

        def of(shape, positive=False):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            if dtype.is_complex:
                y = torch.randn(shape, generator=generator, dtype=torch.float64)
                return torch.complex(x.abs() if positive else x, y.abs() if positive else y).to(
                    dtype
                )
            return (x.abs() if positive else x).to(dtype)

        lists = [[of(shape) for shape in shapes] for _ in range(3)]
        lists.append([of(shape, positive=True) for shape in shapes])
        lists.append([of(shape, positive=True) for shape in shapes] if amsgrad else [])
        lists.append([torch.tensor(3.0) for _ in shapes])
        return cls(lists)

    def map(self, f) -> "Lists":
        return Lists([[f(x) for x in tensors] for tensors in self.tensors])

    def to(self, device) -> "Lists":
        return self.map(lambda x: x.to(device, copy=True))

    def step(self, **kwargs) -> None:
        tw.ops.adamw_step_(*self.tensors, **HYPER, amsgrad=bool(self.tensors[4]), **kwargs)

    def assert_equal(self, other: "Lists") -> None:
        for mine, others in zip(self.tensors, other.tensors, strict=True):
            for a, b in zip(mine, others, strict=True):
                torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_step_has_the_bits_of_the_cpu(dtype, amsgrad, maximize):
    on_cpu = Lists.random(SHAPES, dtype, amsgrad)
    on_gpu = on_cpu.to("cuda")
    for _ in range(3):
        on_cpu.step(maximize=maximize)
        on_gpu.step(maximize=maximize)
    on_gpu.assert_equal(on_cpu)


def test_grad_scale_is_read_on_the_device():
    on_cpu = Lists.random(SHAPES, torch.float32)
    on_gpu = on_cpu.to("cuda")
    scale = torch.tensor(0.3, dtype=torch.float64)
    on_cpu.step(grad_scale=scale)
    on_gpu.step(grad_scale=scale.cuda())
    on_gpu.assert_equal(on_cpu)
    with pytest.raises(RuntimeError, match="grad_scale: expected a float64 scalar on the device"):
        on_gpu.step(grad_scale=scale)


def test_stock_within_tolerance():
    param = torch.nn.Parameter(torch.randn(10_000, device="cuda"))
    param.grad = torch.randn_like(param)
    moments = [torch.zeros_like(param) for _ in range(2)]
    step = torch.zeros((), device="cuda")
    mine = param.detach().clone()
    stock = torch.optim.AdamW([param], lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(5):
        stock.step()
        tw.ops.adamw_step_([mine], [param.grad], [moments[0]], [moments[1]], [], [step], **HYPER)
    torch.testing.assert_close(mine, param.detach(), rtol=1e-5, atol=1e-6)
    # f(1 - beta2) there and 1 - f(beta2) here.
    torch.testing.assert_close(moments[1], stock.state[param]["exp_avg_sq"], rtol=2e-5, atol=0)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("layout", [misaligned, with_gaps, lambda x: x.mT.contiguous().mT])
@pytest.mark.parametrize("which", ["all", "grads"])
def test_memory_of_any_layout(layout, which):
    on_cpu = Lists.random([(64, 33), (257, 3)], torch.bfloat16, amsgrad=True)
    on_gpu = on_cpu.to("cuda")
    for i, tensors in enumerate(on_gpu.tensors[:5]):
        if which == "all" or i == 1:
            on_gpu.tensors[i] = [layout(x) for x in tensors]
    on_cpu.step()
    on_gpu.step()
    on_gpu.assert_equal(on_cpu)


def test_many_tensors_at_once():
    on_cpu = Lists.random([(n % 50 + 1,) for n in range(1500)], torch.float32)
    on_gpu = on_cpu.to("cuda")
    on_cpu.step()
    on_gpu.step()
    on_gpu.assert_equal(on_cpu)


def test_parameters_in_one_memory_are_stepped_in_turn():
    on_cpu = Lists.random([(50_000,), (50_000,)], torch.float32)
    on_gpu = on_cpu.to("cuda")
    for lists in (on_cpu, on_gpu):
        lists.tensors[0][1] = lists.tensors[0][0]
        lists.step()
    on_gpu.assert_equal(on_cpu)


def test_past_2_to_31_elements():
    size = 2**31 + 2**15 + 3
    if torch.cuda.mem_get_info()[0] < 5 * size * 2:
        pytest.skip("needs 22 GB of GPU memory")
    p, g, m, v = (torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    g[-5:] = 1.0
    tw.ops.adamw_step_([p], [g], [m], [v], [], [torch.zeros((), device="cuda")], **HYPER)
    assert torch.equal(p[-5:].float(), torch.full((5,), -0.01, device="cuda").bfloat16().float())
    assert not p[: 2**31].any()
    assert tw.ops.grad_norm([g]).item() == 5**0.5


def test_step_on_a_side_stream():
    on_cpu = Lists.random(SHAPES, torch.float32)
    on_cpu.to("cuda").step()  # a kernel is loaded in its first launch, which may wait
    on_gpu = on_cpu.to("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for tensor in on_gpu.tensors[1]:
            tensor.mul_(2)  # before the step, or its result is another
        on_gpu.step()
        assert not stream.query(), "the step waits for nothing"
    torch.cuda.current_stream().wait_stream(stream)
    for tensor in on_cpu.tensors[1]:
        tensor.mul_(2)
    on_cpu.step()
    on_gpu.assert_equal(on_cpu)


def test_capture_in_a_graph():
    on_cpu = Lists.random(SHAPES, torch.float32)
    on_gpu = on_cpu.to("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_gpu.step()
        norm = tw.ops.grad_norm(on_gpu.tensors[1])
    for _ in range(3):
        on_cpu.step()
        graph.replay()
    on_gpu.assert_equal(on_cpu)
    assert norm.item() == tw.ops.grad_norm(on_cpu.tensors[1]).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_has_the_bits_of_the_cpu(dtype):
    grads = Lists.random(SHAPES, dtype).tensors[1]
    norm = tw.ops.grad_norm([grad.cuda() for grad in grads])
    assert norm.device.type == "cuda"
    assert norm.shape == ()
    assert norm.item() == tw.ops.grad_norm(grads).item()


def test_operator_checks():
    lists = Lists.random([(5,), (2, 3)], torch.float32, amsgrad=True).to("cuda").tensors
    op = torch.ops.torchweld.adamw_step_.default
    torch.library.opcheck(op, tuple(lists), HYPER | {"amsgrad": True, "maximize": False})
    torch.library.opcheck(torch.ops.torchweld.grad_norm.default, (lists[0],))


@pytest.mark.parametrize("place", [0, 1, 2, 3, 5])
def test_tensors_elsewhere_are_refused(place):
    on_gpu = Lists.random([(5,), (2, 3)], torch.float32).to("cuda")
    on_gpu.tensors[place][1] = on_gpu.tensors[place][1].cpu()
    before = on_gpu.map(torch.clone)
    with pytest.raises(RuntimeError, match=r"adamw_step_: .*expected .*device"):
        on_gpu.step()
    on_gpu.assert_equal(before)


def test_the_host_never_waits(no_sync):
    on_gpu = Lists.random(SHAPES, torch.float32).to("cuda")
    scale = torch.tensor(0.3, dtype=torch.float64, device="cuda")
    with no_sync():
        on_gpu.step(grad_scale=scale)
        tw.ops.grad_norm(on_gpu.tensors[1])


def test_parameters_that_share_a_count():
    """All step with the count as it was, and each adds to it."""
    on_cpu = Lists.random([(1000,)] * 700, torch.float32)
    on_gpu = on_cpu.to("cuda")
    for lists in (on_cpu, on_gpu):
        lists.tensors[5] = [lists.tensors[5][0]] * 700
        lists.step()
    on_gpu.assert_equal(on_cpu)
    assert on_gpu.tensors[5][0].item() == 703

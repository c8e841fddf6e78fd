"""Which convolution the CUDA operators ask for, on an emulated device: test_conv_bn_relu.py runs
this.

cuDNN's operators are stood in for: what counts is when they are called, and with what.
"""

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch.profiler import ProfilerActivity, profile

NHWC = torch.channels_last
calls = []


def stand_in(name, x, weight, residual, alpha, bias, stride, padding, dilation, groups):
    calls.append((name, tuple(stride), tuple(padding), tuple(dilation), groups))
    if residual is not None and residual.isnan().any():
        raise RuntimeError("GET was unable to find an engine to execute this computation")
    assert alpha is None
    assert bias is None or bias.is_contiguous()
    y = torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )
    return F.relu(y if residual is None else y + residual).contiguous(memory_format=NHWC)


library = torch.library.Library("aten", "IMPL")
library.impl(
    "cudnn_convolution_relu",
    lambda x, w, b, *conv: stand_in("relu", x, w, None, None, b, *conv),
    "CPU",
)
library.impl("cudnn_convolution_add_relu", lambda *args: stand_in("add_relu", *args), "CPU")


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def layer(c_in=16, c_out=24, dtype=torch.bfloat16, groups=1, layout=NHWC):
    torch.manual_seed(0)
    x = torch.randn(2, c_in, 9, 8).to(dtype).contiguous(memory_format=layout)
    weight = (torch.randn(c_out, c_in // groups, 3, 3) / 12).to(dtype)
    bias, residual = torch.randn(c_out).to(dtype), torch.randn(2, c_out, 5, 4).to(dtype)
    return x, weight, bias, residual.contiguous(memory_format=layout)


def run(x, weight, bias, residual, activation="relu", groups=1):
    return tw.ops.conv_relu(
        x, weight, bias, residual, stride=2, padding=1, groups=groups, activation=activation
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_relu_is_in_the_convolution(dtype, with_residual, with_bias):
    x, weight, bias, residual = layer(dtype=dtype)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    actual = run(x, weight, bias, residual)
    kind = "add_relu" if with_residual else "relu"
    assert calls == [(kind, (2, 2), (1, 1), (1, 1), 1)]
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    expected = torch.conv2d(*wide[:3], stride=2, padding=1)
    expected = F.relu(expected if residual is None else expected + wide[3])
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    assert actual.is_contiguous(memory_format=NHWC)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.float64},
        {"c_in": 3},
        {"c_out": 30},
        {"c_in": 12},  # in 16 bits
        {"layout": torch.contiguous_format},
        {"groups": 2},
    ],
    ids=str,
)
def test_what_cudnn_is_not_asked_for(arguments):
    run(*layer(**arguments), groups=arguments.get("groups", 1))
    assert calls == []


@pytest.mark.parametrize("activation", ["identity", "relu6", "silu"])
def test_other_activations_are_a_pass_of_ours(activation):
    run(*layer(), activation=activation)
    assert calls == []


def test_float32_wants_fewer_channels_in_a_row():
    run(*layer(c_in=12, c_out=20, dtype=torch.float32))
    assert len(calls) == 1


@pytest.mark.parametrize(("forced", "asked"), [("aten", 0), ("depthwise", 0), ("cudnn", 1)])
def test_the_switch_decides(monkeypatch, forced, asked):
    monkeypatch.setattr(tw.config, "convolution", forced)
    run(*layer(c_in=3, c_out=30))
    assert len(calls) == asked


@pytest.mark.parametrize(
    ("algorithm", "taps", "ours"),
    [("auto", 3, True), ("aten", 3, False), ("cudnn", 3, False), ("auto", 9, False),
     ("depthwise", 9, True)],
)  # fmt: skip
def test_depthwise_calls_no_convolution_of_torch(monkeypatch, algorithm, taps, ours):
    monkeypatch.setattr(tw.config, "convolution", algorithm)
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=NHWC).requires_grad_()
    w = torch.randn(16, 1, taps, taps, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        y = tw.ops.conv_bn_relu(x, w, padding=taps // 2, groups=16)[0]
        y.sum().backward()
        tw.ops.conv_relu(x.detach(), w.detach(), padding=taps // 2, groups=16)
    names = {event.key for event in profiled.key_averages()}
    convolutions = {name for name in names if name.startswith("aten::") and "conv" in name}
    assert (not convolutions) == ours, convolutions


def test_a_refusal_is_remembered():
    """The last test: from here on, this process asks cuDNN no more in bfloat16."""
    x, weight, bias, residual = layer()
    for _ in range(2):
        actual = run(x, weight, bias, torch.full_like(residual, float("nan")))
        assert actual.isnan().all()
    assert len(calls) == 1
    assert not run(x, weight, bias, residual).isnan().any()
    assert len(calls) == 1
    run(*layer(dtype=torch.float16))
    assert len(calls) == 2

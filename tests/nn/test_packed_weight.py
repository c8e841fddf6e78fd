"""A folded convolution's packed weight is that of its weight, whatever became of it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn


@pytest.fixture
def folded():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
    return tw.nn.ConvReLU2d.from_float(conv, bn)


def check(module):
    x = torch.randn(2, 32, 12, 12).to(memory_format=torch.channels_last)
    expected = F.relu(F.conv2d(x, module.weight, module.bias, padding=1))
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


def edit(module):
    with torch.no_grad():
        module.weight.mul_(-2)


def test_it_is_in_use(folded):
    check(folded)
    assert folded.packed_weight.numel() > 0
    folded._pack(folded.weight).zero_()
    x = torch.randn(1, 32, 12, 12).to(memory_format=torch.channels_last)
    assert folded(x).eq(F.relu(folded.bias)[:, None, None]).all()


def test_written_in_place(folded):
    edit(folded)
    check(folded)


def test_another_tensor(folded):
    folded.weight = folded.weight.detach() * -2
    check(folded)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded(folded, assign):
    state = {key: -2 * value for key, value in folded.state_dict().items()}
    assert "packed_weight" not in state
    folded.load_state_dict(state, assign=assign)
    check(folded)


def test_called_with_other_weights(folded):
    x = torch.randn(2, 32, 12, 12).to(memory_format=torch.channels_last)
    other = {"weight": folded.weight * -2}
    with torch.no_grad():
        output = torch.func.functional_call(folded, other, (x,))
    expected = F.relu(F.conv2d(x, other["weight"], folded.bias, padding=1))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(folded, copied):
    edit(folded)
    check(folded)
    edit(folded)
    check(copied(folded))


def test_made_and_written_in_inference_mode():
    with torch.inference_mode():
        module = tw.nn.ConvReLU2d.from_float(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        check(module)
        module.weight.mul_(-2)
        check(module)


def test_moved(folded):
    check(folded.double().float())
    half = folded.bfloat16()
    x = torch.randn(1, 32, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert half(x).dtype == torch.bfloat16


def test_compiled_and_exported(folded):
    x = torch.randn(2, 32, 12, 12).to(memory_format=torch.channels_last)
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(folded, (x,)).module()
    with torch.no_grad():
        compiled(x)
        edit(folded)
        exported.load_state_dict(folded.state_dict(), strict=False)
        expected = F.relu(F.conv2d(x, folded.weight, folded.bias, padding=1))
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-4)


def test_traced_after_a_copy(folded):
    module, x = copy.deepcopy(folded), torch.randn(2, 32, 12, 12)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "conv_relu_pack" not in str(traced.graph)
        assert torch.equal(traced(x), module(x))


def test_a_gradient_for_the_weight_is_refused_too(folded):
    folded.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        folded(torch.randn(1, 32, 12, 12)).sum().backward()


@pytest.mark.parametrize("kernel", [{"kernel_size": 1}, {"kernel_size": 3, "dilation": 2}], ids=str)
def test_packed_in_another_dtype_than_autocasts(kernel):
    # Pairs of bfloat16 and floats, packed to one size: the bits of one are not the other's.
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(1, 32, **kernel), nn.BatchNorm2d(32), nn.ReLU()).eval()
    snapshot = tw.weld(stock, inference=True)
    x = torch.randn(2, 1, 24, 24).to(memory_format=torch.channels_last)
    x = x.as_strided(x.shape, (576, 1, 24, 1))  # one channel: both orders are one
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(snapshot(x), stock(x), atol=0.05, rtol=0.05)

"""Outputs of more than 8 MiB go past the caches: their bits are those of one image at a time."""

import pytest
import torch
import torchweld as tw

from tests.tolerances import ROUNDOFF

LAYOUTS = [torch.contiguous_format, torch.channels_last]


# Runs that begin on a cache line, and runs that do not.
@pytest.mark.parametrize("shape", [(16, 96, 48, 60), (17, 97, 47, 57)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_normalized(dtype, layout, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype, memory_format=layout)
    assert x.nbytes > 8 << 20
    mean = torch.randn(shape[1], dtype=torch.float64)
    invstd = torch.rand(shape[1], dtype=torch.float64) + 0.5
    together = tw.ops.batch_norm_relu(x, mean, invstd, activation="silu")
    alone = [tw.ops.batch_norm_relu(image, mean, invstd, activation="silu") for image in x.split(1)]
    assert torch.equal(together, torch.cat(alone))


# With stride 2, the rows of each phase begin on a cache line or they do not.
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [24, 32, 37])
def test_gradient_of_a_depthwise_input(channels, stride, monkeypatch):
    monkeypatch.setattr(tw.config, "convolution", "depthwise")
    torch.manual_seed(0)
    weight = torch.randn(channels, 1, 3, 3)
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    x = torch.randn(30, channels, 56, 60).contiguous(memory_format=torch.channels_last)
    assert x.nbytes > 8 << 20

    def gradient(images):
        images = images.clone().requires_grad_()
        y, _ = tw.ops.conv_bn_relu_frozen(
            images, weight, None, None, None, mean, var, stride=stride, padding=1, groups=channels
        )
        return torch.autograd.grad(y.sum(), images)[0]

    assert torch.equal(gradient(x), torch.cat([gradient(image) for image in x.split(1)]))

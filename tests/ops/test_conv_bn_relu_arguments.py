"""Every argument of the conv-bn-relu operators that does not fit is refused by name."""

import re

import pytest
import torch
import torchweld as tw

ops = torch.ops.torchweld
X, W, Y = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.zeros(2, 6, 3, 3)
SIX = torch.ones(6, dtype=torch.float64)

BATCH_NORM = [
    ({"bn_weight": torch.zeros(5)}, "bn_weight: expected shape [6], one value per channel"),
    ({"bn_weight": SIX.long()}, "bn_weight: expected float32, got int64"),
    ({"bn_bias": torch.zeros(6).half()}, "bn_bias: expected float32, got float16"),
    ({"residual": X}, "residual: expected shape [2, 6, 3, 3], got [2, 4, 5, 5]"),
    ({"activation": "gelu"}, "activation: expected identity, relu, relu6, leaky_relu, silu or"),
]
CONVOLUTION = [
    ({"input": X[0]}, "input: expected 4 dimensions [N, C, H, W], got [4, 5, 5]"),
    ({"input": X.int()}, "input: expected float32, float64, bfloat16 or float16, got int32"),
    ({"weight": W[0]}, "weight: expected a non-empty [out_channels, in_channels / groups, kH, kW]"),
    ({"weight": W[:, :3]}, "input: expected 3 channels"),
    ({"weight": W.double()}, "weight: expected float32, got float64"),
    ({"groups": 4}, "groups: expected a divisor of the 6 output channels, got 4"),
    ({"stride": [0, 0]}, "stride: expected 2 integers of at least 1, got [0, 0]"),
    ({"padding": [1, -1]}, "padding: expected 2 integers of at least 0, got [1, -1]"),
    ({"dilation": [3, 3]}, "input: expected a padded height of at least the kernel's 7, got 5"),
]
BIAS = [({"bias": X[0, 0, 0]}, "bias: expected shape [6], got [5]")]
STATISTICS = [
    ({"mean": SIX.float()}, "mean: expected a contiguous float64 tensor of shape [6], got float32"),
    ({"invstd": SIX[:5]}, "invstd: expected a contiguous float64 tensor of shape [6], got float64"),
]
RUNNING = [
    ({"running_mean": SIX.long()}, "running_mean: expected float32, got int64"),
    ({"running_var": torch.ones(5)}, "running_var: expected shape [6]"),
]
GRADIENT = [({"grad_output": X}, "grad_output: expected shape [2, 6, 3, 3], got [2, 4, 5, 5]")]
BACKWARD = [
    *GRADIENT,
    ({"conv_output": Y.double()}, "conv_output: expected float32, got float64"),
    ({"output_mask": [True] * 5}, "output_mask: expected 6 values, got 5"),
]
SUMS = [
    ({"sum_g": SIX.float()}, "sum_g: expected a contiguous float64"),
    ({"sum_g_xhat": SIX[:5]}, "sum_g_xhat: expected a contiguous float64"),
    ({"count": SIX}, "count: expected a contiguous float64 tensor of shape [1]"),
]
REFUSED = {
    "conv_bn_relu": [*CONVOLUTION, *BIAS, *BATCH_NORM],
    "conv_bn_relu_frozen": [*CONVOLUTION, *BIAS, *BATCH_NORM, *RUNNING],
    "conv_bn_relu_backward": [*CONVOLUTION, *BATCH_NORM, *STATISTICS, *BACKWARD],
    "conv_bn_relu_frozen_backward": [*CONVOLUTION, *BATCH_NORM, *RUNNING, *BACKWARD],
    "conv_relu": [*CONVOLUTION, *BIAS, *BATCH_NORM[3:]],
    "batch_norm_relu": [*BATCH_NORM, *STATISTICS],
    "batch_norm_relu_backward_reduce": [*BATCH_NORM, *STATISTICS, *GRADIENT],
    "batch_norm_relu_backward": [*BATCH_NORM, *STATISTICS, *GRADIENT, *SUMS],
}
FITTING = {
    **{"weight": W, "packed_weight": None, "bias": None, "bn_weight": None, "bn_bias": None},
    **{"residual": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1},
    **{"running_mean": SIX.float(), "running_var": SIX.float(), "mean": SIX, "invstd": SIX},
    **{"eps": 1e-5, "activation": "relu", "negative_slope": 0.0, "output_mask": [True] * 6},
    **{"grad_output": Y, "conv_output": Y, "sum_g": SIX, "sum_g_xhat": SIX, "count": SIX[:1]},
}


def call(name, **changes):
    """Call an operator with arguments that fit, but for the changes."""
    op = getattr(ops, name).default
    given = {**FITTING, "input": Y if name.startswith("batch_norm") else X, **changes}
    return op(*(given[argument.name] for argument in op._schema.arguments))


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_is_taken(name):
    call(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else a if a in REFUSED else "",
)
def test_what_does_not_fit_is_named(name, changes, message):
    with pytest.raises(RuntimeError, match=re.escape(f"torchweld::{name}: {message}")):
        call(name, **changes)


def test_public_functions_hand_it_on():
    with pytest.raises(RuntimeError, match=r"torchweld::conv_bn_relu: stride: .*got \[0, 0\]"):
        tw.ops.conv_bn_relu(X, W, stride=0)

"""The CUDA half of conv_bn_relu around its kernels, without a GPU: layouts, routes, gradients."""

import pytest

from tests.emulated.library import build, run_tests

KERNELS = [
    "batch_norm_relu",
    "batch_norm_relu_backward",
    "batch_norm_small",
    "batch_norm_stats",
    "depthwise",
    "depthwise_weight",
]
OPERATORS = ["conv_bn_relu", "cuda/convolution"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"), "cuda/conv_bn_relu", KERNELS, OPERATORS)


@pytest.mark.parametrize(
    "tests",
    [
        ["tests/ops/test_depthwise.py", "-k", "auto and (float32 or bfloat16)"],
        ["tests/ops/test_conv_bn_relu.py", "-k", "error_is_no_more and float16"],
        ["tests/ops/test_batch_norm_stats.py", "-k", "another_layout"],
        ["tests/emulated/routes.py"],
    ],
    ids=["depthwise", "operators", "parts", "routes"],
)
def test_operators_on_an_emulated_device(library, tests):
    run_tests(library, "conv_bn_relu", *tests)

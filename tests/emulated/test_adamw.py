"""The CUDA half of AdamW around its kernels, without a GPU: plans, tables, chunks, reports.

The optimizer's tests compare its operators with torch's fused step, bit for bit.
"""

import pytest

from tests.emulated.library import build, run_tests

KERNELS = ["adamw", "adamw_bfloat16", "adamw_int8", "adamw_prepare"]
OPERATORS = ["adamw", "adamw_plan", "adamw_work", "cuda/adamw_run"]
TESTS = ["tests/optim/test_on_cpu.py", "tests/optim/test_plan.py", "tests/ops/test_adamw_plan.py"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"), "cuda/adamw", KERNELS, OPERATORS)


def test_optimizer_on_an_emulated_device(library):
    run_tests(library, "_adamw_run", *TESTS)

"""What crosses the stable ABI has one owner: a call leaves nothing behind on the heap."""

import ctypes
import gc
import subprocess
import sys

import pytest
import torch
import torchweld as tw


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def bytes_in_use() -> int:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("needs glibc 2.33 or newer")
    mallinfo2.restype = _Mallinfo2
    gc.collect()
    return int(mallinfo2().uordblks)


def make_calls():
    x, w, residual = torch.ones(2, 4, 5, 5), torch.ones(6, 4, 3, 3), torch.ones(2, 6, 3, 3)
    statistics = torch.ones(6, dtype=torch.float64)
    packed, weight_sum = tw.ops.pack_weight(torch.ones(5, 7, dtype=torch.int8))
    weight = (packed, torch.ones(5), weight_sum)
    p, m = [torch.ones(3)], [torch.ones(3)]
    step = {"lr": 0.0, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1.0}

    def refused():
        with pytest.raises(RuntimeError, match="activation"):
            tw.ops.conv_relu(x, w, activation="x" * 100)

    return {
        "conv_bn_relu": lambda: tw.ops.conv_bn_relu(x, w, residual=residual),
        "conv_relu": lambda: tw.ops.conv_relu(x, w),
        "batch_norm_relu": lambda: tw.ops.batch_norm_relu(residual, statistics, statistics),
        "quantized_linear": lambda: tw.ops.quantized_linear(
            torch.ones(3, 7), *weight, torch.ones(5), torch.ones(3, 5), 7, "relu"
        ),
        "adamw_step_": lambda: tw.ops.adamw_step_(p, p, m, m, [], [torch.zeros(())], **step),
        "refused": refused,
    }


@pytest.mark.parametrize("name", list(make_calls()))
def test_a_call_leaves_nothing_behind(name):
    call, calls, threads = make_calls()[name], 1000, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(calls):  # whatever caches there are fill here
            call()
        before = bytes_in_use()
        for _ in range(calls):
            call()
        assert bytes_in_use() - before < 16 * calls
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 3, 16, 4), (2, 3, 16, 4), (64, 512, 16, 4)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_packed_weight_in_huge_pages(shape, dtype):
    weight = torch.randint(0, 127, (shape[0], shape[2], shape[1], shape[3])).to(dtype)
    weight = weight.transpose(1, 2)
    actual = torch.ops.torchweld._in_huge_pages(weight)
    assert actual.is_contiguous()
    assert actual.dtype == dtype
    assert torch.equal(actual, weight)
    torch.library.opcheck(torch.ops.torchweld._in_huge_pages, (weight,))


FORKS = """
import os, signal, threading, torch, torchweld as tw
torch.set_num_threads(1)
tw.config.memory_pool = 1  # so that what is freed is unmapped at once, under the pool's lock
one = torch.ones(4, dtype=torch.float64)
def chain(x):
    for _ in range(16):
        x = tw.ops.batch_norm_relu(x, one, one)
    return x
small, large = torch.ones(1, 4, 256, 1024), torch.ones(1, 4, 1024, 1024)
traced = torch.jit.trace(chain, small, check_trace=False)  # frees without Python's lock
def run():
    while True:
        traced(large)
threading.Thread(target=run, daemon=True).start()
for _ in range(60):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        tw.ops.batch_norm_relu(small, one, one)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        os._exit(1)
os._exit(0)
"""


def test_a_process_forks_while_another_thread_frees():
    """As a data loader's does: the child is not left with a lock that nobody opens."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], check=True, timeout=120)

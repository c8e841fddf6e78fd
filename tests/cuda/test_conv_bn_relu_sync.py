"""Synchronized batch norm on GPUs: what two processes on the CPU are held to."""

import pytest
import torch
import torch.multiprocessing as mp

from tests.convert.test_sync_batch_norm import (  # noqa: F401
    test_data_parallel,
    test_two_processes,
    worker,
)


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def ranks(request, tmp_path_factory):
    """Over gloo, two processes share a GPU; NCCL wants one for each."""
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants two GPUs")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder), "cuda", request.param), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(2)]

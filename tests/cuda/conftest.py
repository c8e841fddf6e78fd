"""Tests of what runs on a GPU; without one they are skipped and say why.

Fixtures, all plain functions or context managers:

- ``side_stream``: the test runs on a stream that is not the default one.
- ``no_sync``: ``with no_sync():`` fails where the host waits for the device.
- ``graph``: ``graph(f)`` captures ``f()`` and returns a replay, which returns what ``f`` did.
- ``no_leak``: ``no_leak(f)`` fails where repeated calls of ``f`` keep more and more memory.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torchweld import _library


def reason_to_skip() -> str | None:
    if _library.cuda_status != "loaded":
        return f"CUDA library: {_library.cuda_status}"
    if not torch.cuda.is_available():
        return "no GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    if reason is None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def side_stream() -> Iterator[torch.cuda.Stream]:
    """The current stream of the test; what it did is done when the test ends."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def forbid_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not find every synchronization
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def no_sync() -> Callable[[], AbstractContextManager[None]]:
    return forbid_sync


def capture(function: Callable[[], Any], warm_up: int = 2) -> Callable[[], Any]:
    """Return a replay of the captured function; its results lie where the capture put them.

    Args:
        function: leaves its inputs as it found them, or bears ``warm_up`` calls beforehand; a
            capture by itself runs nothing.
        warm_up: calls before the capture, on the capture's stream: libraries and optimizers
            allocate what they keep in the first ones.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, stream=stream):
        result = function()

    def replay() -> Any:
        recorded.replay()
        return result

    return replay


@pytest.fixture
def graph() -> Callable[..., Callable[[], Any]]:
    return capture


def check_for_leaks(function: Callable[[], Any], calls: int = 10) -> None:
    """Fail if the allocator holds more after some calls than after the first two."""

    def held_after(times: int) -> int:
        for _ in range(times):
            function()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = held_after(2)
    after = held_after(calls)
    assert after == before, f"{calls} calls keep {after - before} bytes"


@pytest.fixture
def no_leak() -> Callable[..., None]:
    return check_for_leaks

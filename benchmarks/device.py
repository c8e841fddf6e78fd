"""What the harness must know of a device: how to time work on it, and how fast it can be at best.

On a GPU the host only queues work, so time is what the device's own events say. Repeated, short
work finds its data in the L2 cache, where in a model others were in between: a cold sample
overwrites the cache before every call. That writing also keeps the device busy while the host
queues what comes, so a cold time is the device's alone; another one is the host's where that is
the slower of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# Worker threads of the last contender's library spin this long in wait of more work.
SETTLE_SECONDS = 5e-3


class Device:
    """The CPU; a GPU differs in what it overrides.

    Attributes:
        type: for ``torch.device``.
        name: shown and recorded.
    """

    type = "cpu"
    name = "CPU"

    def sample(self, run: Callable[[], object], calls: int, cold: bool = False) -> float:
        """Return the mean milliseconds of a call over some calls in a row.

        Args:
            run: what to call.
            calls: how often.
            cold: each call finds nothing in the cache. The CPU has no say in that: see the cases of
                :mod:`benchmarks.bench_quantized_linear` that take turns over many weights.
        """
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls * 1e3

    def settle(self) -> None:
        """Wait between contenders, until the last one's threads sleep."""
        time.sleep(SETTLE_SECONDS)

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return what does the same with no work for the host, where a device can."""
        return run


CPU = Device()


class Cuda(Device):
    """A GPU of CUDA, the current one.

    Args:
        api: ``torch.cuda``, or what stands in for it.
    """

    type = "cuda"

    def __init__(self, api: Any = torch.cuda):
        self.api = api
        facts = api.get_device_properties(api.current_device())
        self.name: str = facts.name
        self.capability = f"sm_{facts.major}{facts.minor}"
        self.cache_bytes: int = facts.L2_cache_size
        # Enough that no line is left of what was there, whichever the cache replaces first.
        self._spare: Any = None

    def overwrite_cache(self) -> None:
        """Queue the writing of more than the cache holds."""
        if self._spare is None:
            self._spare = torch.empty(2 * self.cache_bytes, dtype=torch.int8, device=self.type)
        self._spare.zero_()

    def sample(self, run: Callable[[], object], calls: int, cold: bool = False) -> float:
        """See :meth:`Device.sample`."""
        spans = calls if cold else 1
        pairs = [[self.api.Event(enable_timing=True) for _ in range(2)] for _ in range(spans)]
        for start, end in pairs:
            if cold:
                self.overwrite_cache()
            start.record()
            for _ in range(calls // spans):
                run()
            end.record()
        self.api.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls

    def settle(self) -> None:
        """Leave the device idle; nothing spins on it."""
        self.api.synchronize()

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return a replay of the run as a CUDA graph; its results lie in the graph's memory."""
        stream = self.api.Stream()
        stream.wait_stream(self.api.current_stream())
        with self.api.stream(stream):
            for _ in range(3):  # libraries allocate and choose algorithms in the first calls
                run()
        self.api.current_stream().wait_stream(stream)
        graph = self.api.CUDAGraph()
        with self.api.graph(graph, stream=stream):
            results = run()

        def replay() -> Any:
            graph.replay()
            return results

        return replay


def measured(device: Cuda) -> dict[str, Any]:
    """Return the bandwidths and peaks of a GPU, the fields of :class:`benchmarks.machine.Machine`.

    Peaks are of square products of random numbers, float32 by TF32 as convolutions compute it.
    """
    a = torch.randn(2**28, device=device.type)
    b = torch.empty_like(a)

    def rate(work: float, run: Callable[[], object]) -> float:
        device.sample(run, 2)
        return work / min(device.sample(run, 3) for _ in range(5)) / 1e6

    result: dict[str, Any] = {
        "memory_gb_s": rate(2 * a.nbytes, lambda: b.copy_(a)),
        "read_gb_s": rate(a.nbytes, a.sum),
    }
    n = 8192
    x, y = torch.randn(2, n, n, device=device.type)
    low = [t.bfloat16() for t in (x, y)]
    codes = [t.mul(30).clamp(-127, 127).to(torch.int8) for t in (x, y)]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    result["peak"] = {
        unit: rate(2 * n**3, run)
        for unit, run in {
            "float32": lambda: x @ y,
            "bfloat16": lambda: low[0] @ low[1].t(),
            "int8": lambda: torch._int_mm(codes[0], codes[1].t()),
        }.items()
    }
    torch.set_float32_matmul_precision(precision)
    return result


def find(name: str) -> Device:
    """Return the device of that type.

    Raises:
        RuntimeError: there is none.
    """
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise RuntimeError("expected a GPU and a torch with CUDA, found none")
    return Cuda()

"""What a benchmark ran on, and the floor under a piece of work there."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchweld as tw

from benchmarks import malloc
from benchmarks.device import CPU, Cuda, Device, measured

_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """The least a piece of work can cost.

    Attributes:
        bytes: what must cross between memory and processor, each tensor once per pass that needs
            it, in both directions.
        operations: multiplications and additions of the direct algorithm (one that needs fewer,
            as Winograd's, may pass 100 % of the floor).
        unit: what does them, ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        cold: the bytes are only read, and come from memory however few they are.
    """

    bytes: int
    operations: int = 0
    unit: str = "float32"
    cold: bool = False

    @classmethod
    def layer(
        cls,
        x: int,
        w: int,
        y: int,
        operations: int,
        *,
        training: bool = False,
        unit: str = "float32",
    ) -> Cost:
        """Return that of conv-bn-act or linear with so many elements of input, weight and output.

        Forward: read x, w; write y, and in training the convolution's output too. Backward: read
        x, w, the convolution's output and the gradient of y; write the gradients of x and w.
        """
        elements, passes = (3 * x + 3 * w + 4 * y, 3) if training else (x + w + y, 1)
        return cls(_BYTES[unit] * elements, passes * operations, unit)


@dataclass(frozen=True)
class Machine:
    """What goes into every row of the record; from the cache on it is that of the device.

    Attributes:
        cpu_model: name, family and model of the CPU, which virtual machines do not always name.
        capability: instruction set torchweld uses, or architecture of the GPU.
        malloc: the state of malloc, see :mod:`benchmarks.malloc`.
        load: processes that wanted a core in the minute before, without ours.
        cache_bytes: last-level cache; data below twice its size have no memory floor.
        memory_gb_s: bandwidth, reads and writes counted: the better of a copy and a sum in place.
        read_gb_s: bandwidth of reading alone.
        peak: operations per second in units of 1e9 by unit of :class:`Cost`, the best that
            stock matrix products reach.
        device: name of the GPU, ``"CPU"`` if there is none in it.
    """

    cpu_model: str
    capability: str
    threads: int
    torch: str
    torchweld: str
    malloc: str
    load: float
    date: str
    cache_bytes: int
    memory_gb_s: float
    read_gb_s: float
    peak: dict[str, float]
    device: str = CPU.name

    @classmethod
    def probe(cls, device: Device = CPU) -> Machine:
        """Look at this machine and measure its two floors, in a few seconds."""
        facts = tw.info()
        floors: dict[str, Any]
        if isinstance(device, Cuda):
            capability = device.capability
            floors = {"cache_bytes": device.cache_bytes, **measured(device)}
        else:
            capability = facts["cpu capability"]
            peak = {
                "float32": _float32_peak(), "bfloat16": _bfloat16_peak(), "int8": _int8_peak()
            }  # fmt: skip
            floors = {
                "cache_bytes": cache_bytes(), "memory_gb_s": _memory_gb_s(),
                "read_gb_s": _read_gb_s(), "peak": peak,
            }  # fmt: skip
        return cls(
            cpu_model=_cpu_model(),
            device=device.name,
            capability=capability,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            torchweld=facts["torchweld"],
            malloc=malloc.describe(),
            load=os.getloadavg()[0],
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **floors,
        )

    def floor_ms(self, costs: Iterable[Cost]) -> float | None:
        """Return the time of these parts in turn at the limit, None where nothing limits them."""
        total = 0.0
        for cost in costs:
            memory = 0.0
            if cost.cold:
                memory = cost.bytes / self.read_gb_s
            elif cost.bytes > 2 * self.cache_bytes:
                memory = cost.bytes / self.memory_gb_s
            total += max(memory, cost.operations / self.peak[cost.unit])
        return total / 1e6 or None

    @property
    def place(self) -> str:
        """Names what the work ran on."""
        if self.device == CPU.name:
            return f"{self.cpu_model}, {self.capability}"
        return f"{self.device} ({self.capability}) beside {self.cpu_model}"

    def __str__(self) -> str:
        peak = {unit: f"{unit} {value:.0f}" for unit, value in self.peak.items()}
        return (
            f"{self.place}, {self.threads} threads, "
            f"torch {self.torch}, torchweld {self.torchweld}, malloc {self.malloc}\n"
            f"measured: memory {self.memory_gb_s:.1f} GB/s, reading {self.read_gb_s:.1f}, "
            f"{peak['float32']}, {peak['bfloat16']} GFLOP/s, {peak['int8']} Gop/s"
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = facts.get("model name", platform.machine())
    if "cpu family" not in facts:
        return name
    return f"{name} (family {facts['cpu family']} model {facts['model']})"


@functools.cache
def cache_bytes() -> int:
    """Return the size of the last-level cache."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(t[:-1]) * units[t[-1]] for t in texts if t[-1] in units), default=32 * 2**20)


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _memory_gb_s() -> float:
    a = torch.ones(2**26)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / _best_seconds(lambda: b.copy_(a))
    # A cache line that is written without having been read is fetched all the same, which a copy's
    # count leaves out; an update in place reads all that it writes.
    return max(copy, 3 * a.nbytes / _best_seconds(lambda: a.add_(b, alpha=0.5))) / 1e9


def _read_gb_s() -> float:
    a = torch.ones(2**26)
    return a.nbytes / _best_seconds(a.sum) / 1e9


def _float32_peak() -> float:
    n = 2048
    a, b = torch.randn(2, n, n)
    product = 2 * n**3 / _best_seconds(lambda: torch.mm(a, b))
    # On some CPUs oneDNN's convolution comes closer to the peak than MKL's product.
    x, w = torch.randn(8, 256, 14, 14), torch.randn(256, 256, 3, 3)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    operations = 2 * w.numel() * 8 * 14 * 14
    return max(product, operations / _best_seconds(lambda: F.conv2d(x, w, padding=1))) / 1e9


def _bfloat16_peak() -> float:
    def product(n: int) -> Callable[[], object]:
        a, b = torch.randn(2, n, n, dtype=torch.bfloat16)
        return lambda: torch.mm(a, b)

    return _product_peak(product)


def _int8_peak() -> float:
    def product(n: int) -> Callable[[], object]:
        a, b = torch.randint(-127, 128, (2, n, n), dtype=torch.int8)
        return lambda: torch._int_mm(a, b.t())

    return _product_peak(product)


def _product_peak(product: Callable[[int], Callable[[], object]]) -> float:
    best = 0.0
    for n in (256, 1024, 2048):
        best = max(best, 2 * n**3 / _best_seconds(product(n)) / 1e9)
        if best < 2:  # held to old instructions stock may have no fast one: that takes minutes
            break
    return best

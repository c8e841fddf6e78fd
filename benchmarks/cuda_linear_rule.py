"""Which kernel makes the product of a linear layer on a GPU: times every path, fits the rule.

    python -m benchmarks.cuda_linear_rule build/cuda_linear.csv --sweep   # measures, a minute
    python -m benchmarks.cuda_linear_rule build/cuda_linear.csv           # rates and verdict

A path is forced by ``TORCHWELD_CUDA_LINEAR_PATH``; times are those of a CUDA graph with nothing in
the L2 cache. The rule (``csrc/kernels/cuda/linear_path.h``) gives each kind of tile a rate: what is
fitted here goes into its table. Rates count products per clock at 1.755 GHz; only their ratios
matter.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchweld as tw
from torch import nn
from tqdm import tqdm

from benchmarks.device import Device, find

# Rows and columns of a tile, as linear_path.h has them.
TILES = {
    "small_tiles": (64, 64),
    "large_tiles": (128, 128),
    "warpgroups": (128, 128),
    "wide_warpgroups": (256, 128),
}
CHOSEN, FEW = "", "few_rows"
PATHS = (CHOSEN, FEW, *TILES)
KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8": tw.nn.QuantizedLinear.from_float,
    "int8 weight-only": tw.nn.WeightOnlyLinear.from_float,
    "int4": partial(tw.nn.Int4Linear.from_float, group_size=128),
}
LAYERS = ((4096, 4096), (11008, 4096), (768, 3072))
ROWS = (16, 64, 256, 512, 1024, 4096)
SIZES = ("rows", "out_features", "in_features", "multiprocessors")
COLUMNS = ("kind", *SIZES, "path", "microseconds")
VARIABLE = "TORCHWELD_CUDA_LINEAR_PATH"
CLOCK_GHZ = 1.755
CALLS = 10


@dataclass(frozen=True)
class Product:
    """A product that was timed: its sizes, and microseconds by path."""

    rows: int
    out_features: int
    in_features: int
    multiprocessors: int
    times: Mapping[str, float]

    def turns(self, path: str) -> int:
        """Return how often a multiprocessor must take a tile, if it takes one at a time."""
        rows, columns = TILES[path]
        tiles = math.ceil(self.rows / rows) * math.ceil(self.out_features / columns)
        return math.ceil(tiles / self.multiprocessors)

    def is_whole(self, path: str) -> bool:
        """Return whether K is surely one block's: there are tiles for half the device."""
        rows, columns = TILES[path]
        tiles = math.ceil(self.rows / rows) * math.ceil(self.out_features / columns)
        return 2 * tiles > self.multiprocessors

    def choose(self, rates: Mapping[str, float]) -> str:
        """Return the path the rule takes with these rates."""
        areas = {path: rows * columns for path, (rows, columns) in TILES.items()}
        known = [path for path in TILES if path in self.times and path in rates]
        return min(known, key=lambda path: self.turns(path) * areas[path] / rates[path])


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Have products take a path; ``CHOSEN`` leaves it to the rule."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = path
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def sweep(device: Device, multiprocessors: int) -> Iterator[dict[str, str | float]]:
    """Yield a row of the record for each path of each product."""
    for n, k in tqdm(LAYERS, unit="layer"):
        layer = nn.Linear(k, n, device=device.type)
        modules = {kind: make(layer) for kind, make in KINDS.items()}
        for kind, m in ((kind, m) for kind in KINDS for m in ROWS):
            x = torch.randn(m, k, device=device.type).bfloat16()
            sizes = dict(zip(SIZES, (m, n, k, multiprocessors), strict=True))
            for path in PATHS:
                found = measure(device, modules[kind], x, path)
                if found is not None:
                    yield {"kind": kind, **sizes, "path": path, "microseconds": round(found, 3)}


@torch.no_grad()
def measure(device: Device, module: nn.Module, x: torch.Tensor, path: str) -> float | None:
    """Return microseconds of a call, or nothing where the path does not take it."""
    with forced(path):
        try:
            run = device.captured(lambda: module(x))
        except RuntimeError as error:
            if VARIABLE in str(error):
                return None
            raise
        device.sample(run, 2, cold=True)
        return 1e3 * min(device.sample(run, CALLS, cold=True) for _ in range(3))


def read(path: Path) -> dict[str, list[Product]]:
    """Return the products of each kind of layer."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["kind"], *(row[name] for name in SIZES)
            times.setdefault(key, {})[row["path"]] = float(row["microseconds"])
    products: dict[str, list[Product]] = {}
    for (kind, *sizes), of in times.items():
        rows, columns, k, multiprocessors = map(int, sizes)
        products.setdefault(kind, []).append(Product(rows, columns, k, multiprocessors, of))
    return products


def fit(products: Sequence[Product]) -> dict[str, float]:
    """Return products per clock of a multiprocessor, by kind of tile: the median."""
    rates: dict[str, list[float]] = {}
    for product in products:
        for path, (rows, columns) in TILES.items():
            if path in product.times and product.is_whole(path):
                work = product.turns(path) * rows * columns * product.in_features
                clocks = product.times[path] * 1e3 * CLOCK_GHZ
                rates.setdefault(path, []).append(work / clocks)
    return {path: statistics.median(found) for path, found in rates.items()}


def losses(products: Sequence[Product], rates: Mapping[str, float]) -> list[float]:
    """Return the time of the tiles taken over that of the best ones, for each product."""
    result = []
    for product in products:
        known = [product.times[path] for path in TILES if path in product.times and path in rates]
        if known:
            result.append(product.times[product.choose(rates)] / min(known))
    return result


def table(products: Sequence[Product]) -> Iterator[str]:
    """Yield a line for each product: microseconds by path, and whether the rule's is the best."""
    yield "".join(name.rjust(16) for name in ("m x n x k", "rule", *PATHS[1:]))
    for p in products:
        cells = [f"{p.times[path]:.1f}" if path in p.times else "-" for path in PATHS]
        yield "".join(c.rjust(16) for c in (f"{p.rows}x{p.out_features}x{p.in_features}", *cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_linear_rule", description=__doc__
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV")
    parser.add_argument("--sweep", action="store_true", help="measure and write the file first")
    options = parser.parse_args()
    if options.sweep:
        device = find("cuda")
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        options.file.parent.mkdir(parents=True, exist_ok=True)
        with options.file.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in sweep(device, facts.multi_processor_count):
                writer.writerow(row)
                file.flush()
    for kind, products in read(options.file).items():
        print(f"--- {kind}, microseconds", *table(products), sep="\n")
        rates = fit(products)
        found = losses(products, rates)
        print("products per clock:", {path: round(rate) for path, rate in rates.items()})
        if found:
            mean = statistics.geometric_mean(found)
            print(f"with them, tiles of {mean:.3f} x the best's time, at worst {max(found):.2f}")


if __name__ == "__main__":
    main()

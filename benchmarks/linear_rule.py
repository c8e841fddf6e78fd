"""Which linear layers are too small to gain from integers: sweeps small sizes, fits the thresholds.

    python -m benchmarks.linear_rule build/linear.csv --sweep     # measures, under a minute
    python -m benchmarks.linear_rule build/linear.csv             # prints what to put in _rule.py

Every layer is timed as a module, since that is what a call costs, with 1, 16 and 128 rows: its time
is that of all three, so that microseconds lost on one row do not outweigh what a batch saves.
A config gets the pair of smallest sizes with which the layers taken gain most; a loss weighs more
than a gain, as in the rule for convolutions.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchweld as tw
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import malloc
from benchmarks.device import CPU
from benchmarks.fit_rule import score
from benchmarks.harness import Contender, interleave

CONFIGS = {"Int8": tw.Int8(), "Int8WeightOnly": tw.Int8WeightOnly(), "Int4": tw.Int4()}
ROWS = (1, 16, 128)
SIZES = (8, 16, 32, 64, 128, 256, 512)
COLUMNS = ("capability", "threads", "rows", "in_features", "out_features", "float32", *CONFIGS)
SAMPLE_MS = 1.0
PENALTY = 4.0  # the weight of a loss


@dataclass(frozen=True)
class Layer:
    """A layer that was timed, and the logarithm of a config's speed over float32's."""

    in_features: int
    out_features: int
    gain: float


def sweep(rounds: int) -> Iterator[dict[str, str | float]]:
    """Yield a row of the record for each size: microseconds."""
    machine = {"capability": tw.info()["cpu capability"], "threads": torch.get_num_threads()}
    for k, n in tqdm(list(itertools.product(SIZES, SIZES)), unit="layer"):
        layer = nn.Linear(k, n)
        modules = {"float32": layer}
        for name, config in CONFIGS.items():
            modules[name] = tw.quantize(layer, config, keep_small=False)
        for m in ROWS:
            times = measure(modules, torch.randn(m, k), rounds)
            yield {**machine, "rows": m, "in_features": k, "out_features": n, **times}


@torch.no_grad()
def measure(modules: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Return microseconds of a call by module: the least, as noise only adds."""

    def contender(name: str, module: nn.Module) -> Contender:
        return Contender(name, lambda: [module(x)], 0.0)

    group = [contender(*item) for item in modules.items()]
    once = {c.name: min(CPU.sample(c.run, 1) for _ in range(5)) for c in group}
    calls = {name: max(1, round(SAMPLE_MS / ms)) for name, ms in once.items()}
    times = interleave(group, rounds, calls)
    return {name: round(1e3 * min(found), 3) for name, found in times.items()}


def read(path: Path) -> dict[str, list[Layer]]:
    """Return the layers of each config: a call of each number of rows, taken together."""
    times: dict[tuple[int, int], dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            size = int(row["in_features"]), int(row["out_features"])
            total = times.setdefault(size, dict.fromkeys(("float32", *CONFIGS), 0.0))
            for name in total:
                total[name] += float(row[name])
    return {
        name: [Layer(*size, math.log(t["float32"] / t[name])) for size, t in times.items()]
        for name in CONFIGS
    }


def taken(layers: Sequence[Layer], smallest: tuple[int, int]) -> list[Layer]:
    """Return the layers of at least these many input and output features."""
    k, n = smallest
    return [x for x in layers if x.in_features >= k and x.out_features >= n]


def fit(layers: Sequence[Layer]) -> tuple[int, int]:
    """Return the smallest numbers of input and output features worth it."""

    def worth(smallest: tuple[int, int]) -> float:
        return sum(score(layer.gain, PENALTY) for layer in taken(layers, smallest))

    ks, ns = (
        sorted({getattr(layer, name) for layer in layers})
        for name in ("in_features", "out_features")
    )
    return max(itertools.product(ks, ns), key=worth)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_rule", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV")
    parser.add_argument("--sweep", action="store_true", help="measure and write the file first")
    parser.add_argument("--rounds", type=int, default=5, help="a layer (default: %(default)s)")
    options = parser.parse_args()
    if options.sweep:
        malloc.enter("kept")
        torch.set_num_threads(1)  # so little work is not worth a second one
        options.file.parent.mkdir(parents=True, exist_ok=True)
        with options.file.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sweep(options.rounds))
    for name, layers in read(options.file).items():
        smallest = fit(layers)
        gains = sorted(layer.gain for layer in taken(layers, smallest))
        mean = math.exp(sum(gains) / len(gains))
        lost = sum(gain < math.log(0.97) for gain in gains)
        print(
            f"{name}: {smallest}  # {len(gains)} of {len(layers)} taken, {mean:.2f} x float32, "
            f"slower in {lost}, worst {math.exp(gains[0]):.2f}"
        )


if __name__ == "__main__":
    main()

"""Says of a record of a GPU where the rule of csrc/ops/cuda/rule.h loses to ATen's convolution.

    python -m benchmarks.cuda_rule build/gpu/out/bench.csv

The rule holds a handful of thresholds, each with its reason; a layer named here is a reason to move
one. The exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cuda_conv_bn_relu import AROUND_ATEN
from benchmarks.records import OURS, Row, by_case, geometric_mean, read

LOSS = 0.97  # what is no loss but noise


def gains(records: Iterable[Row]) -> dict[str, float]:
    """Return, for every case with both, how many times as fast the rule is as ATen's."""
    found = {}
    for rows in by_case(records):
        times = {row["contender"]: float(row["median_ms"]) for row in rows}
        if {OURS, AROUND_ATEN} <= times.keys():
            found[f"{rows[0]['op']}: {rows[0]['case']}"] = times[AROUND_ATEN] / times[OURS]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each layer, the worst first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path)
    found = gains(row for path in parser.parse_args(arguments).records for row in read(path))
    for case, gain in sorted(found.items(), key=lambda item: item[1]):
        print(f"{gain:6.2f}x  {case}{'  LOST' if gain < LOSS else ''}")
    if found:
        print(f"{geometric_mean([*found.values()]):6.2f}x  geometric mean of {len(found)}")
    return 1 if not found or min(found.values()) < LOSS else 0


if __name__ == "__main__":
    sys.exit(main())

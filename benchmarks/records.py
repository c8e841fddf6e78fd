"""The record of a run: a CSV file, and who was fastest in it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

Row = dict[str, str | float]

STOCK, PEER, OURS = "stock", "peer", "torchweld"
# The record is tidy: a row is one contender in one case, and stands by itself.
TEXT = ("op", "case", "contender", "kind", "asked")
NUMBERS = (
    "median_ms", "p25", "p75", "rounds", "ratio", "floor_pct", "error", "saved_mb",
    "bytes_per_param",
)  # fmt: skip
MACHINE = (
    "torch", "torchweld", "cpu_model", "device", "capability", "threads", "malloc", "load",
    "memory_gb_s", "read_gb_s", "float32_gflops", "bfloat16_gflops", "int8_gops", "date",
)  # fmt: skip
# What can be asked of a contender beside its speed over another's: at least this share of the
# floor, and at most this part of what another keeps for backward.
FLOOR, SAVED = "floor %", "saved MB of "
COLUMNS = (*TEXT, *NUMBERS, *MACHINE)


class Writer:
    """Appends rows to a new CSV file, so that an interrupted run keeps what it has measured."""

    def __init__(self, file: IO[str]):
        self._file = file
        self._csv = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        self._csv.writeheader()

    def write(self, rows: Iterable[Row]) -> None:
        """Append and flush."""
        self._csv.writerows(rows)
        self._file.flush()


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file, numbers as numbers, columns it does not have empty."""
    with path.open(newline="") as file:
        return [
            dict.fromkeys(COLUMNS, "")
            | {k: float(v) if k in NUMBERS and v != "" else v for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def by_case(records: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each case in each state of malloc together, in the order they came in."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in records:
        groups.setdefault((row["op"], row["case"], row["malloc"]), []).append(row)
    return list(groups.values())


def fastest(record: Iterable[Row]) -> tuple[Row | None, Row | None]:
    """Return the fastest rival of a case and our fastest."""
    ranked = sorted(record, key=lambda row: row["median_ms"])
    rivals, ours = ([r for r in ranked if (r["kind"] == OURS) == own] for own in (False, True))
    return next(iter(rivals), None), next(iter(ours), None)


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the mean that halves and doubles cancel out in."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def asked(limits: Mapping[str, float]) -> str:
    """Return what is asked of a contender as the record holds it."""
    return "; ".join(f"{key} {limit:g}" for key, limit in limits.items())


@dataclass(frozen=True)
class Bar:
    """What was asked of a contender, and what came; NaN if the other was not there."""

    row: Row
    key: str
    limit: float
    got: float

    @property
    def verdict(self) -> str:
        """In a word."""
        if math.isnan(self.got):
            return "not measured"
        # Of bytes few are asked for, of all else much.
        sign = -1 if self.key.startswith(SAVED) else 1
        return "reached" if sign * self.got >= sign * self.limit else "missed"


def bars(record: Sequence[Row]) -> list[Bar]:
    """Return what was asked in a case."""
    by_name = {row["contender"]: row for row in record}

    def got(row: Row, key: str) -> float:
        if key == FLOOR:
            return _number(row["floor_pct"])
        column = "saved_mb" if key.startswith(SAVED) else "median_ms"
        other = by_name.get(key.removeprefix(SAVED))
        if other is None:
            return math.nan
        theirs, mine = _number(other[column]), _number(row[column])
        return mine / theirs if column == "saved_mb" else theirs / mine

    found = []
    for row in record:
        for text in filter(None, str(row["asked"]).split("; ")):
            key, limit = text.rsplit(" ", 1)
            found.append(Bar(row, key, float(limit), got(row, key)))
    return found


def _number(value: str | float) -> float:
    return math.nan if value == "" else float(value)

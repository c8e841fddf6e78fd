"""Tables of what the benchmarks recorded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks import plots
from benchmarks.records import Bar, Row, bars, by_case, fastest, geometric_mean, read


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return aligned text, the first column to the left and the others to the right.

    A column with nothing in it is left out.
    """
    full = [i for i in range(len(header)) if i == 0 or any(line[i] for line in lines)]
    header, *lines = ([line[i] for i in full] for line in (header, *lines))
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in (header, rule, *lines)
    )


def case(record: Sequence[Row]) -> str:
    """Return the contenders of one case, fastest first."""
    header = (
        f"{record[0]['op']}: {record[0]['case']}",
        "ms",
        "p25",
        "p75",
        "x rival",
        "floor",
        "dB",
        "saved MB",
        "B/param",
    )
    lines = [
        (
            str(row["contender"]),
            *(_milliseconds(row[k]) for k in ("median_ms", "p25", "p75")),
            _ratio(row),
            _percent(row["floor_pct"]),
            _decibels(row["error"]),
            f"{row['saved_mb']}",
            _bytes(row),
        )
        for row in sorted(record, key=lambda row: row["median_ms"])
    ]
    asked = [
        f"  {bar.row['contender']}: {bar.key} {bar.limit:g} asked, {bar.got:.3g}: {bar.verdict}"
        for bar in bars(record)
    ]
    return "\n".join([table(header, lines), *asked])


def summary(records: Iterable[Row]) -> str:
    """Return torchweld's fastest against the fastest rival, a line for each case."""
    header = (
        "case", "fastest rival", "ms", "B/param", "torchweld", "B/param", "x rival", "floor",
    )  # fmt: skip
    parts = []
    for op, cases in groupby(by_case(records), key=lambda record: record[0]["op"]):
        lines, ratios = [], []
        for record in cases:
            rival, ours = fastest(record)
            if rival is None or ours is None:
                continue
            ratios.append(ours["ratio"])
            lines.append(
                (
                    str(ours["case"]),
                    str(rival["contender"]),
                    _milliseconds(rival["median_ms"]),
                    _bytes(rival),
                    _milliseconds(ours["median_ms"]),
                    _bytes(ours),
                    _ratio(ours),
                    _percent(ours["floor_pct"]),
                )
            )
        if ratios:
            mean = f"{geometric_mean(ratios):.2f}"
            lines.append(("geometric mean", *[""] * 5, mean, ""))
            parts.append(f"{op}\n{table(header, lines)}")
    return "\n\n".join(parts)


def reached(records: Iterable[Row]) -> str:
    """Return what was asked and what came, a line for each, empty if nothing was."""
    header = ("case", "torchweld", "against", "asked", "got", "")

    def line(bar: Bar) -> tuple[str, ...]:
        case, name = f"{bar.row['op']}: {bar.row['case']}", str(bar.row["contender"])
        return case, name, bar.key, f"{bar.limit:g}", f"{bar.got:.3g}", bar.verdict

    lines = [line(bar) for record in by_case(records) for bar in bars(record)]
    return table(header, lines) if lines else ""


def _milliseconds(value: str | float) -> str:
    return f"{float(value):#.4g}".rstrip(".")


def _bytes(row: Row) -> str:
    return "" if row["bytes_per_param"] == "" else f"{row['bytes_per_param']:.4g}"


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f}"


def _percent(value: str | float) -> str:
    return "" if value == "" else f"{value:.0f} %"


def _decibels(error: str | float) -> str:
    """Signal to noise; exact results have no noise."""
    return "exact" if error == 0 else f"{-20 * math.log10(error):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Print what `python -m benchmarks` recorded.",
        epilog="example: python -m benchmarks.report benchmarks/results/*.csv --plot build/plots",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="CSV files to read")
    parser.add_argument(
        "--cases", action="store_true", help="every contender of every case, not the summary alone"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="also draw a figure per operator, of all files together (needs matplotlib)",
    )
    options = parser.parse_args()
    everything: list[Row] = []
    for path in options.files:
        records = read(path)
        everything += records
        print(path, end="\n\n")
        if options.cases:
            print(*map(case, by_case(records)), sep="\n\n", end="\n\n")
        print(*filter(None, (summary(records), reached(records))), sep="\n\n", end="\n\n")
    if options.plot:
        print(*plots.draw(everything, options.plot), sep="\n")


if __name__ == "__main__":
    main()

"""Tables and plots of what the benchmarks recorded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.harness import OURS, STOCK, Row, read


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return aligned text, the first column to the left and the others to the right."""
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
        "x stock",
        "floor",
        "dB",
    )
    lines = [
        (
            str(row["contender"]),
            *(_milliseconds(row[k]) for k in ("median_ms", "p25", "p75")),
            _ratio(row),
            _percent(row["floor_pct"]),
            _decibels(row["error"]),
        )
        for row in sorted(record, key=lambda row: row["median_ms"])
    ]
    return table(header, lines)


def summary(records: Iterable[Row]) -> str:
    """Return torchweld's fastest against the fastest stock contender, a line for each case."""
    header = ("case", "best stock", "ms", "torchweld", "x stock", "floor")
    parts = []
    for op, cases in groupby(by_case(records), key=lambda record: record[0]["op"]):
        lines, ratios = [], []
        for record in cases:
            stock, ours = (_best(record, kind) for kind in (STOCK, OURS))
            if stock is None or ours is None:
                continue
            ratios.append(ours["ratio"])
            lines.append(
                (
                    str(ours["case"]),
                    str(stock["contender"]),
                    _milliseconds(stock["median_ms"]),
                    _milliseconds(ours["median_ms"]),
                    _ratio(ours),
                    _percent(ours["floor_pct"]),
                )
            )
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(("geometric mean", "", "", "", f"{mean:.2f}", ""))
            parts.append(f"{op}\n{table(header, lines)}")
    return "\n\n".join(parts)


def by_case(records: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each case together, in the order they came in."""
    groups: dict[tuple[object, object], list[Row]] = {}
    for row in records:
        groups.setdefault((row["op"], row["case"]), []).append(row)
    return list(groups.values())


def plot(records: Iterable[Row], directory: Path) -> list[Path]:
    """Draw speed over the best stock contender, a figure for each operator.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for op, cases in groupby(by_case(records), key=lambda record: record[0]["op"]):
        found = [r for r in (_best(record, OURS) for record in cases) if r is not None]
        figure = Figure(figsize=(7, 1.2 + 0.35 * len(found)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        ratios = [r["ratio"] for r in found]
        bars = axes.barh([str(r["case"]) for r in found], ratios, color="tab:blue")
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(op)
        first = found[0]
        axes.set_xlabel(
            f"speed, best stock contender = 1\n{first['cpu_model']}, {first['threads']} threads, "
            f"torch {first['torch']}",
            fontsize=8,
        )
        directory.mkdir(parents=True, exist_ok=True)
        paths.append(directory / f"{str(op).replace(' ', '_')}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _best(record: Sequence[Row], kind: str) -> Row | None:
    rows = [row for row in record if row["kind"] == kind]
    return min(rows, key=lambda row: row["median_ms"], default=None)


def _milliseconds(value: str | float) -> str:
    return f"{float(value):#.4g}".rstrip(".")


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
        "--plot", type=Path, metavar="DIR", help="also draw a PNG per operator (needs matplotlib)"
    )
    options = parser.parse_args()
    for path in options.files:
        records = read(path)
        print(path, end="\n\n")
        if options.cases:
            print(*map(case, by_case(records)), sep="\n\n", end="\n\n")
        print(summary(records), end="\n\n")
        if options.plot:
            print(*plot(records, options.plot / path.stem), sep="\n")


if __name__ == "__main__":
    main()

"""What a conversion did to a model, layer by layer, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

_ATTRIBUTE = "_torchweld_report"


@dataclass(frozen=True)
class Row:
    """One place in a model that a conversion looked at.

    Attributes:
        name: qualified name of the module in the model, as in ``named_modules``; several modules
            converted together are joined by ``" + "``.
        conversion: ``"conv_bn_relu"``, ``"max_pool2d"``, ``"quantized_linear"`` or
            ``"qat_linear"``.
        converted: whether it was converted.
        detail: what it became, or why it was left alone.
        weight_sqnr: signal to noise in dB of the quantized weight, against the one it was made of;
            infinite if equal.
        output_sqnr: the same of the module's output, on the example inputs of the conversion.
        bytes_before: bytes of the module's tensors in a state_dict, as they were.
        bytes_after: as they are now.
    """

    name: str
    conversion: str
    converted: bool
    detail: str
    weight_sqnr: float | None = None
    output_sqnr: float | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def gain(self) -> float | None:
        """Bytes before over bytes after.

        It is the speedup to expect of a few rows at a time, whose time is that of reading the
        weight from memory. It says nothing of many rows, whose time is that of the arithmetic:
        measure those.
        """
        if not self.bytes_before or not self.bytes_after:
            return None
        return self.bytes_before / self.bytes_after


class Report:
    """The rows of a conversion, in the order of the model; prints as a table."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.rows = tuple(rows)

    @property
    def converted(self) -> tuple[Row, ...]:
        """Rows of what was converted."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """Rows of what was left alone, each with its reason."""
        return tuple(row for row in self.rows if not row.converted)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: Report) -> Report:
        return Report((*self.rows, *other.rows))

    def __repr__(self) -> str:
        return f"Report({len(self.converted)} converted, {len(self.skipped)} left alone)"

    def __str__(self) -> str:
        if not self.rows:
            return "torchweld: nothing to convert was found"
        header = ["module", "conversion", "converted", *(title for title, _ in _MEASURED), "detail"]
        cells = [
            [row.name or "(root)", row.conversion, "yes" if row.converted else "no"]
            + [show(row) for _, show in _MEASURED]
            + [row.detail]
            for row in self.rows
        ]
        # Columns of measurements only where there are any.
        kept = [i for i in range(len(header)) if any(line[i] for line in cells)]
        lines = [[line[i] for i in kept] for line in [header, *cells]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(kept) - 1)]
        lines.insert(1, [*("-" * width for width in widths), "------"])
        return "\n".join("  ".join([*map(str.ljust, line, widths), line[-1]]) for line in lines)


_MEASURED: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("weight dB", lambda row: "" if row.weight_sqnr is None else f"{row.weight_sqnr:.1f}"),
    ("output dB", lambda row: "" if row.output_sqnr is None else f"{row.output_sqnr:.1f}"),
    ("bytes", lambda row: "" if row.gain is None else f"{row.bytes_before} -> {row.bytes_after}"),
    ("gain", lambda row: "" if row.gain is None else f"{row.gain:.2f}"),
)


def record(model: nn.Module, report: Report, *, replacing: str | None = None) -> None:
    """Append a conversion's report to the model it returns.

    Args:
        model: the converted model.
        report: what the conversion did.
        replacing: drop the rows that an earlier conversion of this name left. Rows that the new
            report has again are dropped in any case.
    """
    again = {(row.conversion, row.name) for row in report}
    earlier = [
        row
        for row in model.__dict__.get(_ATTRIBUTE, ())
        if row.conversion != replacing and (row.conversion, row.name) not in again
    ]
    # Past nn.Module.__setattr__: a plain attribute, in no state_dict, kept by deepcopy and pickle.
    model.__dict__[_ATTRIBUTE] = Report(earlier) + report


def report(model: nn.Module) -> Report:
    """Return what :func:`torchweld.weld` and :func:`torchweld.quantize` did to a model.

    Args:
        model: a model one of them returned. Any other model gives an empty report.

    Returns:
        The report; ``print`` shows it as a table.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> import torch, torchweld as tw
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256))
        >>> len(tw.report(tw.quantize(model)).converted)
        1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model: expected an nn.Module, got {type(model).__name__}")
    found = model.__dict__.get(_ATTRIBUTE, Report())
    assert isinstance(found, Report)
    return found

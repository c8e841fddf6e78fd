"""What a conversion did to a model, layer by layer, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

_ATTRIBUTE = "_torchweld_report"


@dataclass(frozen=True)
class Row:
    """One place in a model that a conversion looked at.

    Attributes:
        name: qualified name of the module in the model, as in ``named_modules``; several modules
            converted together are joined by ``" + "``.
        conversion: ``"conv_bn_relu"`` or ``"quantized_linear"``.
        converted: whether it was converted.
        detail: what it became, or why it was left alone.
    """

    name: str
    conversion: str
    converted: bool
    detail: str


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
        header = ("module", "conversion", "converted", "detail")
        cells = [
            (row.name or "(root)", row.conversion, "yes" if row.converted else "no", row.detail)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *cells]) for i in range(3)]
        rule = (*("-" * width for width in widths), "------")
        return "\n".join(
            "  ".join([*map(str.ljust, line[:3], widths), line[3]])
            for line in [header, rule, *cells]
        )


def record(model: nn.Module, report: Report, *, replacing: str | None = None) -> None:
    """Append a conversion's report to the model it returns.

    Args:
        model: the converted model.
        report: what the conversion did.
        replacing: drop the rows that an earlier conversion of this name left.
    """
    earlier = [row for row in model.__dict__.get(_ATTRIBUTE, ()) if row.conversion != replacing]
    # Past nn.Module.__setattr__: a plain attribute, in no state_dict, kept by deepcopy and pickle.
    model.__dict__[_ATTRIBUTE] = Report(earlier) + report


def report(model: nn.Module) -> Report:
    """Return what :func:`torchweld.weld` and :func:`torchweld.quantize` did to a model.

    Args:
        model: a model one of them returned. Any other model gives an empty report.

    Returns:
        The report; ``print`` shows it as a table.

    Example:
        >>> import torch, torchweld as tw
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256))
        >>> len(tw.report(tw.quantize(model)).converted)
        1
    """
    found = model.__dict__.get(_ATTRIBUTE, Report())
    assert isinstance(found, Report)
    return found

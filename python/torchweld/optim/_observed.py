"""What an optimizer looks at and keeps beside the parameters while it steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchweld.optim import _arguments, _distributed, _state

if TYPE_CHECKING:
    from torchweld.optim._plan import Plan


class Statistics(NamedTuple):
    """What :meth:`torchweld.optim.AdamW.observe` saw of the last step: float64, of no dimensions.

    Of sharded parameters they are those of all processes' shards together.

    Attributes:
        grad_norm: 2-norm of all gradients before clipping.
        update_norm: 2-norm of what the step added to all parameters.
        lost: share of the elements whose update, though not zero, left the stored weight as it was.
        nonfinite: number of elements of the gradients that are infinite or NaN.
    """

    grad_norm: Tensor
    update_norm: Tensor
    lost: Tensor
    nonfinite: Tensor


class Report(NamedTuple):
    """What _adamw_run returns; see csrc/ops/schema.cpp."""

    grad_norm: Tensor
    skipped: Tensor
    update_norm: Tensor
    lost: Tensor
    nonfinite: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Report:
        return cls(*values.unbind())


class Observed:
    """The part of an optimizer that users reach it through."""

    state: Any
    _plan: Plan | None
    _report: Tensor | None  # a Report in one tensor, which is cheaper to keep

    _statistics: bool = False
    _has_statistics = False  # whether the last step was asked for them
    _average: float | None = None
    _shadows: dict[Tensor, Tensor] | None = None

    @property
    def statistics(self) -> Statistics | None:
        """Statistics of the last step; None unless :meth:`observe` was told before that step."""
        if self._report is None or not (self._statistics and self._has_statistics):
            return None
        seen = Report.of(self._report)
        return Statistics(seen.grad_norm, seen.update_norm, seen.lost, seen.nonfinite)

    def observe(
        self,
        *,
        statistics: bool = False,
        average: float | None = None,
        shadow: torch.dtype | None = None,
    ) -> None:
        r"""Choose what the steps from now on look at or keep beside the parameters.

        All of it happens while the elements just stepped are in cache, not in passes of its own.
        Each call replaces the choice of the last one.

        Args:
            statistics: fill in :attr:`statistics`.
            average: decay :math:`d` of an exponential moving average of the weights, which begins
                with the weights as they are at its first step and then moves by
                :math:`a \leftarrow a + (1 - d)(p - a)`; see :meth:`average`. It is in the
                ``state_dict``, in float32 (float64 and complex beside such parameters). With
                ``kahan`` and ``split_master`` it is that of the weights with their lower bits.
                A loaded one goes on; one that was not asked for in a step is dropped by that step.
            shadow: ``torch.bfloat16``, to keep a copy of every real parameter in that dtype,
                rounded to nearest; see :meth:`shadow`. It is not in the ``state_dict``.

        Raises:
            ValueError: ``average`` is not within [0, 1], or ``shadow`` is another dtype.

        Example:
            >>> import torch, torchweld as tw
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = tw.optim.AdamW([weight])
            >>> optimizer.observe(statistics=True, average=0.9)
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> optimizer.step()
            >>> optimizer.statistics.grad_norm
            tensor(5., dtype=torch.float64)
            >>> optimizer.average(weight)
            tensor([0.9999, 0.9999])
        """
        if average is not None and not 0 <= average <= 1:
            raise ValueError(f"Invalid average value: {average}")
        if shadow not in (None, torch.bfloat16):
            raise ValueError(f"Invalid shadow value: {shadow}, expected torch.bfloat16")
        self._statistics = statistics
        self._average = average
        self._shadows = None if shadow is None else {}
        self._plan = None

    def average(self, param: Tensor) -> Tensor:
        """Return the average of a parameter that :meth:`observe` keeps.

        Args:
            param: a parameter of this optimizer.

        Returns:
            The very tensor that the next step will move; shape of the parameter. For a parameter
            that has made no step: its value.

        Raises:
            RuntimeError: no average is kept.
        """
        if self._average is None:
            raise RuntimeError("no weight average is kept; call observe(average=0.999) first")
        average = self.state.get(param, {}).get("average")
        return _copy(param, _state.average_dtype(param)) if average is None else average

    def shadow(self, param: Tensor) -> Tensor:
        """Return the bfloat16 copy of a parameter that :meth:`observe` keeps.

        Args:
            param: a real parameter of this optimizer.

        Returns:
            The very tensor that the next step will write; shape of the parameter. It is as of the
            last step: what else writes the parameter does not change it.

        Raises:
            RuntimeError: no copies are kept.
        """
        shadow = self._shadow_of(param)
        if shadow is None:
            raise RuntimeError("no copy is kept; call observe(shadow=torch.bfloat16) first")
        return shadow

    def _begin_average(self, param: Tensor, state: _state.State) -> None:
        if self._average is None:
            state.pop("average", None)  # it would not have seen this step
        elif "average" not in state:
            _arguments.refuse_capture(_distributed.device(param))
            state["average"] = _copy(param, _state.average_dtype(param))

    def _shadow_of(self, param: Tensor) -> Tensor | None:
        if self._shadows is None or param.is_complex():
            return None
        if param not in self._shadows:
            _arguments.refuse_capture(_distributed.device(param))
            self._shadows[param] = _copy(param, torch.bfloat16)
        return self._shadows[param]


def _copy(param: Tensor, dtype: torch.dtype) -> Tensor:
    return param.detach().to(dtype, copy=True)

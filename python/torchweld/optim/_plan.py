"""What the steps of an optimizer work on, found once and kept while it stays the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchweld.optim import _arguments, _distributed, _state
from torchweld.optim._observed import Report

if TYPE_CHECKING:
    from torchweld.optim.adamw import AdamW

# The kernels' roles (AdamWRole in csrc/ops/adamw_plan.h), as keys of a state. The parameter comes
# before them, its bfloat16 copy after them.
_ROLES = (
    ("step",),
    ("exp_avg", "exp_avg_code"),
    ("exp_avg_sq", "exp_avg_sq_code"),
    ("max_exp_avg_sq",),
    ("compensation", "remainder"),
    ("exp_avg_scale",),
    ("exp_avg_sq_scale",),
    ("average",),
)


class Plan:
    """Parameters that have states, and the operator's handle on both.

    The handle keeps tensors and not pointers, so it sees `p.data = x`; that they are the same
    tensors is checked here before every step, by identity, which is what is cheap.
    """

    def __init__(self, optimizer: AdamW) -> None:
        groups = optimizer.param_groups
        _arguments.check_amsgrad(groups, optimizer._format)
        self.params: list[Tensor] = []
        self._idle: list[Tensor] = []  # no gradient so far
        self._all = [[*group["params"]] for group in groups]
        self._dtypes = _dtypes(self._all)
        self._amsgrad = [group["amsgrad"] for group in groups]
        self._tensors: list[Tensor] = []
        self._sharded: list[Tensor] = []
        rows: list[list[int]] = []
        ids = optimizer._ids()
        for k, group in enumerate(groups):
            for param in group["params"]:
                state = optimizer._state_of(param, group["amsgrad"])
                if state is None:
                    self._idle.append(param)
                else:
                    row = self._row(optimizer, param, state, group["amsgrad"])
                    rows.append([k, ids[param], *row])
                    self.params.append(param)
        self.is_sharded = bool(self._sharded)
        self._local_parts = [_distributed.local(x) for x in self._sharded]
        self._reductions = [_distributed.reduction(param) for param in self.params]
        self._keys = list(optimizer.state)
        self._states = [
            dict(state) if isinstance(state, dict) else state for state in optimizer.state.values()
        ]
        self._check_devices()
        places = torch.tensor(rows, dtype=torch.int64)
        self._handle = torch.ops.torchweld._adamw_plan(self._tensors, places) if rows else None
        self._run = torch.ops.torchweld._adamw_run.default

    def is_current(self, optimizer: AdamW) -> bool:
        """Tell whether nothing has changed but values and gradients."""
        groups = optimizer.param_groups
        state = optimizer.state
        return (
            _same([group["params"] for group in groups], self._all)
            and [group["amsgrad"] for group in groups] == self._amsgrad
            and all(param.grad is None for param in self._idle)
            and _same(list(state), self._keys)
            and _same(list(state.values()), self._states)
            # A plain format does with any dtype; the others differ from one to the next.
            and (not optimizer._format.is_random or _dtypes(self._all) == self._dtypes)
            and (
                not self._sharded
                or _same([_distributed.local(x) for x in self._sharded], self._local_parts)
            )
        )

    def gradients(self) -> tuple[list[Tensor], list[int]]:
        """Return the gradients there are, and whose they are; an empty list if all are there."""
        grads = [grad for param in self.params if (grad := param.grad) is not None]
        which: list[int] = []
        if len(grads) < len(self.params):
            which = [i for i, param in enumerate(self.params) if param.grad is not None]
        if self._sharded:
            params = [self.params[i] for i in which] if which else self.params
            grads = [_distributed.local_grad(p, g) for p, g in zip(params, grads, strict=True)]
        return grads, which

    def sum_of_squares(self, grads: Sequence[Tensor], which: Sequence[int]) -> Tensor | None:
        """Return that of all processes' gradients; None if this one has them whole.

        Raises:
            RuntimeError: here or in a process with other shards of the same parameters: all of
                those raise then, and none waits for another.
        """
        if not self.is_sharded:
            return None
        parts = self._parts(grads, which)
        sums = {reduction: torch.zeros(1, dtype=torch.float64) for reduction in parts}
        failure = None
        try:
            for reduction, (part, _) in parts.items():
                sums[reduction] = torch.ops.torchweld._adamw_sum_of_squares(part)
        except RuntimeError as error:
            failure = error
        failed = torch.full((1,), failure is not None, dtype=torch.float64)
        total = torch.zeros(2, dtype=torch.float64)
        for reduction, squares in sums.items():
            total += _distributed.reduce_sum(torch.cat([squares, failed]), reduction)
        if failure is not None:
            raise failure
        if total[1] != 0:
            raise RuntimeError(
                "torchweld.optim.AdamW: another process could not take the norm of its gradients"
            )
        return total[0]

    def run(self, grads: Sequence[Tensor], which: Sequence[int], *arguments: Any) -> Tensor:
        """Do one step; see _adamw_run in csrc/ops/schema.cpp."""
        report: Tensor = self._run(self._handle, grads, which, *arguments)
        # So that a backward through a graph that saved them before the step is an error and not a
        # wrong number.
        params = [self.params[i] for i in which] if which else self.params
        torch.autograd.graph.increment_version(params)
        return report

    def run_in_parts(
        self, grads: Sequence[Tensor], which: Sequence[int], *arguments: Any
    ) -> Tensor:
        """Do one step, and return the statistics of all processes' parameters.

        What is sharded alike goes together, since its sums are reduced together. A process whose
        step raises takes part in the sums all the same: the others wait for it there.
        """
        parts = self._parts(grads, which)
        sums = {reduction: torch.full((4,), torch.nan, dtype=torch.float64) for reduction in parts}
        try:
            if len(parts) > 1:
                self._check(grads, which, *arguments)
            for reduction, (part, places) in parts.items():
                seen = Report.of(self.run(part, places, *arguments))
                size = torch.tensor(sum(grad.numel() for grad in part), dtype=torch.float64)
                values = (seen.update_norm.square(), seen.lost * size, seen.nonfinite, size)
                sums[reduction] = torch.stack(values)
        finally:
            total = torch.zeros(4, dtype=torch.float64)
            for reduction, values_of_part in sums.items():
                total += _distributed.reduce_sum(values_of_part, reduction)
        squares, lost, nonfinite, size = total
        return torch.stack(
            [seen.grad_norm, seen.skipped, squares.sqrt(), lost / size.clamp(min=1), nonfinite]
        )

    def _check(self, grads: Sequence[Tensor], which: Sequence[int], *arguments: Any) -> None:
        """Raise what the step would: run one to be skipped, which checks everything first."""
        hyper, max_grad_norm, loss_scale, sum_of_squares, _, *rest = arguments
        nan = torch.full_like(sum_of_squares, torch.nan)
        self._run(self._handle, grads, which, hyper, max_grad_norm, loss_scale, nan, True, *rest)

    def _parts(
        self, grads: Sequence[Tensor], which: Sequence[int]
    ) -> dict[_distributed.Reduction | None, tuple[list[Tensor], list[int]]]:
        """Return gradients, and whose they are, by what sums over them are reduced over."""
        parts: dict[_distributed.Reduction | None, tuple[list[Tensor], list[int]]] = {}
        for place, grad in zip(which or range(len(self.params)), grads, strict=True):
            part, places = parts.setdefault(self._reductions[place], ([], []))
            part.append(grad)
            places.append(place)
        return parts

    def _row(
        self, optimizer: AdamW, param: Tensor, state: _state.State, amsgrad: bool
    ) -> list[int]:
        """Return the format, the place and the tensors of a parameter, as the operator has them."""
        unused = {"max_exp_avg_sq": not amsgrad, "average": optimizer._average is None}
        values: list[Tensor | None] = [param]
        for names in _ROLES:
            found = (state[name] for name in names if name in state and not unused.get(name))
            values.append(next(found, None))
        values.append(optimizer._shadow_of(param))
        form = optimizer._format.of(param)
        place = _distributed.place(param)
        if form.state == _state.INT8:
            place = _distributed.Place(place.offset)  # blocks are not cut into rows
        return [*form, *place, *map(self._add, values)]

    def _add(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        if _distributed.is_dtensor(tensor):
            self._sharded.append(tensor)
        self._tensors.append(_distributed.local(tensor))
        return len(self._tensors) - 1

    def _check_devices(self) -> None:
        for param in self.params:
            if not param.is_cpu:
                raise NotImplementedError(
                    "torchweld.optim.AdamW runs on the CPU and not on other devices yet, "
                    f"got a parameter on {param.device}"
                )
        for tensor in self._tensors:
            if not tensor.is_cpu:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, cpu and {tensor.device}!"
                )


def _dtypes(groups: Iterable[Iterable[Tensor]]) -> list[torch.dtype]:
    return [param.dtype for params in groups for param in params]


class _OtherTensorError(Exception):
    pass


class _ByIdentity(TorchFunctionMode):
    """Where tensors are equal only to themselves, which == asks of list items before all else."""

    def __torch_function__(self, *_: Any) -> Any:
        raise _OtherTensorError


_BY_IDENTITY = _ByIdentity()


def _same(a: list[Any], b: list[Any]) -> bool:
    """Tell whether two lists, also of lists or dicts, hold the very same tensors.

    Comparing lists takes a few nanoseconds an item, and does not touch tensors; a loop takes
    50, and a thousand small parameters have five thousand of them.
    """
    if torch._C._is_torch_function_all_disabled():
        return False  # == would ask the tensors, and those that are equal are not the same
    try:
        with _BY_IDENTITY:
            return a == b
    except Exception:  # whatever somebody else keeps there says of ==
        return False

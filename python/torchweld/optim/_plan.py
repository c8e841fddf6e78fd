"""What the steps of an optimizer work on, found once and kept while it stays the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """Parameters that have states, and the operator's handles on both, one for each device.

    A handle keeps tensors and not pointers, so it sees `p.data = x`; that they are the same
    tensors is checked here before every step, by identity, which is what is cheap.
    """

    def __init__(self, optimizer: AdamW) -> None:
        groups = optimizer.param_groups
        _arguments.check_amsgrad(groups, optimizer._format)
        self.params: list[Tensor] = []
        self._idle: list[Tensor] = []  # no gradient so far
        self._all = [[*group["params"]] for group in groups]
        flat = [param for params in self._all for param in params]
        self._dtypes = _dtypes(self._all)
        self._amsgrad = [group["amsgrad"] for group in groups]
        self._sharded: list[Tensor] = []
        self._on: dict[torch.device, _OnDevice] = {}
        self._places: list[int] = []  # of parameters, among those on their devices
        ids = optimizer._ids()
        for k, group in enumerate(groups):
            for param in group["params"]:
                state = optimizer._state_of(param, group["amsgrad"])
                if state is None:
                    self._idle.append(param)
                else:
                    device = _distributed.device(param)
                    part = self._on.setdefault(device, _OnDevice())
                    row = self._row(part, optimizer, param, state, group["amsgrad"])
                    self._places.append(len(part.rows))
                    part.rows.append([k, ids[param], *row])
                    self.params.append(param)
        # The same in every process, whichever parameters have gradients there: what is reduced over
        # them is reduced by all, in this order.
        self._shared = [part for part in dict.fromkeys(map(_part_of, flat)) if part.is_shared]
        self.is_sharded = bool(self._shared)
        self._local_parts = [_distributed.local(x) for x in self._sharded]
        self._parts_of = [*map(_part_of, self.params)]
        self._keys = list(optimizer.state)
        self._states = [
            dict(state) if isinstance(state, dict) else state for state in optimizer.state.values()
        ]
        for device, part in self._on.items():
            part.finish(device)
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
        """Return that of all processes' and devices' gradients; None if one has them whole.

        Raises:
            RuntimeError: here or in a process with other shards of the same parameters: all of
                those raise then, and none waits for another.
        """
        if not self.is_sharded and len(self._on) == 1:
            return None
        parts = self._parts(grads, which)
        sums = {part: torch.zeros(1, dtype=torch.float64, device=part.device) for part in parts}
        failure = None
        try:
            for part, (part_grads, _) in parts.items():
                if part_grads:
                    sums[part] = torch.ops.torchweld._adamw_sum_of_squares(part_grads)
        except RuntimeError as error:
            failure = error
        total = torch.zeros(2, dtype=torch.float64, device=next(iter(parts)).device)
        for part, squares in sums.items():
            both = torch.cat([squares, torch.full_like(squares, failure is not None)])
            total += _distributed.reduce_sum(both, part.reduction).to(total.device)
        if failure is not None:
            raise failure
        if not total.is_cpu:  # to ask is to wait; who failed has said so, and ends the others
            return torch.where(total[1] == 0, total[0], torch.nan)
        if total[1] != 0:
            raise RuntimeError(
                "torchweld.optim.AdamW: another process could not take the norm of its gradients"
            )
        return total[0]

    def run(
        self, grads: Sequence[Tensor], which: Sequence[int], arguments: _arguments.Run
    ) -> Tensor:
        """Do one step; return its report, with the statistics of all processes' parameters."""
        if len(self._on) > 1 or (self.is_sharded and (arguments.statistics or not grads)):
            return self._run_in_parts(grads, which, arguments)
        (device,) = self._on
        report = self._run_on(device, grads, which, arguments.on(device))
        self._count_writes(which)
        return report

    def _run_on(
        self,
        device: torch.device,
        grads: Sequence[Tensor],
        which: Sequence[int],
        arguments: _arguments.Run,
    ) -> Tensor:
        places = which if len(self._on) == 1 else [self._places[i] for i in which]
        report: Tensor = self._run(self._on[device].handle, grads, places, *arguments)
        return report

    def _count_writes(self, which: Sequence[int]) -> None:
        # So that a backward through a graph that saved them before the step is an error and not a
        # wrong number.
        params = [self.params[i] for i in which] if which else self.params
        torch.autograd.graph.increment_version(params)

    def _run_in_parts(
        self, grads: Sequence[Tensor], which: Sequence[int], arguments: _arguments.Run
    ) -> Tensor:
        """Do one step on each device.

        What is sharded alike goes together, since its sums are reduced together. A process whose
        step raises takes part in the sums all the same: the others wait for it there.
        """
        parts = self._parts(grads, which)
        first = next(iter(parts)).device
        stepped = {part: held for part, held in parts.items() if held[0]}
        sums = {part: torch.zeros(4, dtype=torch.float64, device=part.device) for part in parts}
        for part in stepped:
            sums[part].fill_(torch.nan)  # until it is known
        reports = []
        try:
            if len(stepped) > 1:
                self._check(stepped, arguments)
            for part, (part_grads, places) in stepped.items():
                device = part.device
                report = self._run_on(device, part_grads, places, arguments.on(device))
                self._count_writes(places)
                reports.append(Report.of(report))
                seen = reports[-1]
                size = torch.full_like(seen.lost, sum(grad.numel() for grad in part_grads))
                values = (seen.update_norm.square(), seen.lost * size, seen.nonfinite, size)
                sums[part] = torch.stack(values)
        finally:
            total = torch.zeros(4, dtype=torch.float64, device=first)
            for part, values_of_part in sums.items():
                if arguments.statistics:
                    values_of_part = _distributed.reduce_sum(values_of_part, part.reduction)
                total += values_of_part.to(first)
        squares, lost, nonfinite, size = total
        norm, skipped, *_ = reports[0] if reports else _of_others(arguments, first)
        return torch.stack([norm, skipped, squares.sqrt(), lost / size.clamp(min=1), nonfinite])

    def _check(self, parts: _Parts, arguments: _arguments.Run) -> None:
        """Raise what the step would: run one to be skipped, which checks everything first."""
        for part, (grads, which) in parts.items():
            nan = torch.full((), torch.nan, dtype=torch.float64, device=part.device)
            skipped = arguments.on(part.device)._replace(sum_of_squares=nan, skip_nonfinite=True)
            self._run_on(part.device, grads, which, skipped)

    def _parts(self, grads: Sequence[Tensor], which: Sequence[int]) -> _Parts:
        """Return gradients, and whose they are, by where they are and what to reduce over."""
        parts: _Parts = {part: ([], []) for part in self._shared}
        for place, grad in zip(which or range(len(grads)), grads, strict=True):
            part_grads, places = parts.setdefault(self._parts_of[place], ([], []))
            part_grads.append(grad)
            places.append(place)
        return parts

    def _row(
        self, part: _OnDevice, optimizer: AdamW, param: Tensor, state: _state.State, amsgrad: bool
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
        self._sharded += [x for x in values if x is not None and _distributed.is_dtensor(x)]
        return [*form, *place, *map(part.add, values)]


class _OnDevice:
    """What the operator knows of the parameters of one device."""

    handle: Tensor

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self._tensors: list[Tensor] = []

    def add(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        self._tensors.append(_distributed.local(tensor))
        return len(self._tensors) - 1

    def finish(self, device: torch.device) -> None:
        _arguments.check_device(device)
        for tensor in self._tensors:
            if tensor.device != device:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {device} and {tensor.device}!"
                )
        places = torch.tensor(self.rows, dtype=torch.int64, device="cpu")
        self.handle = torch.ops.torchweld._adamw_plan(self._tensors, places)


class _Part(NamedTuple):
    """What gradients have in common that are summed up together."""

    device: torch.device
    reduction: _distributed.Reduction | None

    @property
    def is_shared(self) -> bool:
        return self.reduction is not None and bool(self.reduction.dims)


_Parts = dict[_Part, tuple[list[Tensor], list[int]]]


def _part_of(param: Tensor) -> _Part:
    return _Part(_distributed.device(param), _distributed.reduction(param))


def _of_others(arguments: _arguments.Run, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return norm and skipped of a report where only other processes have gradients."""
    norm = torch.full((), torch.nan, dtype=torch.float64, device=device)
    skipped = torch.zeros_like(norm)
    if arguments.sum_of_squares is not None:
        norm = arguments.sum_of_squares.sqrt()
        if arguments.loss_scale is not None:
            norm = norm * arguments.loss_scale.to(norm).reciprocal()
        if arguments.skip_nonfinite or arguments.loss_scale is not None:
            skipped = (~norm.isfinite()).double()
    return norm, skipped


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

"""What of an optimizer is saved, loaded and copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchweld.optim import _arguments, _distributed, _state

if TYPE_CHECKING:
    from torchweld.optim._plan import Plan

_ATTRIBUTES = (
    "max_grad_norm",
    "skip_nonfinite",
    "_format",
    "_seed",
    "_skipped",
    "_statistics",
    "_average",
    "_shadows",
    "_report",
    "_has_norm",
    "_has_statistics",
    "_fixed_ids",
)


class Saved(torch.optim.AdamW):
    """The part of an optimizer that checkpoints and copies go through."""

    _format: _state.Format
    _seed: int
    _plan: Plan | None
    _zero: Any = None  # the ZeroRedundancyOptimizer that this is a part of
    _fixed_ids: dict[Tensor, int] | None = None  # what a copy keeps of _zero's

    def state_dict(self) -> dict[str, Any]:
        """Return the state as :meth:`torch.optim.Optimizer.state_dict` does.

        Float states are under torch's keys in the dtype they are kept in, ``state_dtype="int8"``
        under keys of their own (``exp_avg_code``, ``exp_avg_scale`` and likewise for
        ``exp_avg_sq``), ``kahan`` adds ``compensation``, ``split_master`` ``remainder``.
        8-bit states of a DTensor are given as float32 DTensors under torch's keys, so that they
        can be loaded into any other sharding: their blocks are made anew then, with the loss of
        one more rounding to 8 bits. A DTensor's ``remainder`` is given in int32.
        """
        saved = super().state_dict()
        for key, param in self._numbered():
            if _distributed.is_dtensor(param) and key in saved["state"]:
                saved["state"][key] = _state.portable(saved["state"][key], param)
        return saved

    def stock_state_dict(self) -> dict[str, Any]:
        """Return the state for :class:`torch.optim.AdamW` to load.

        The moments are cast to the dtypes of their parameters, and what torch does not know is
        left out: the low bits of ``kahan`` and ``split_master``, averages, the seed.
        """
        saved = super().state_dict()
        for key, param in self._numbered():
            if key in saved["state"]:
                saved["state"][key] = _state.to_stock(saved["state"][key], param)
        for group in saved["param_groups"]:
            group.pop("seed", None)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of :class:`torch.optim.AdamW`, in whatever dtypes it is.

        It is converted to the dtypes this optimizer was made with. Loading 8-bit states into an
        optimizer that keeps them so loses nothing; other conversions lose what the narrower dtype
        cannot hold.

        Args:
            state_dict: what :meth:`state_dict` or torch's returned.

        Raises:
            ValueError: the param groups do not match, or have ``amsgrad`` where the states are in
                8 bits; nothing has been loaded then.
        """
        # After the hooks of the user, who is to see tensors.
        hook = self.register_load_state_dict_pre_hook(_state.keep_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k in _ATTRIBUTES}
        if self._zero is not None:  # which does not go along: torch's cannot be copied
            kept["_fixed_ids"] = self._ids()
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _arguments.check_amsgrad(state["param_groups"], state.get("_format") or self._format)
        super().__setstate__(state)
        self._plan = None
        self._complete_groups()
        for param, values in self.state.items():
            if not isinstance(values, dict) or not isinstance(param, Tensor):
                continue  # somebody else's, which torch loads as it is
            for name, value in values.items():
                if isinstance(value, _state.Kept):
                    values[name] = value.tensor
            if isinstance(values.get("step"), Tensor):
                # torch keeps it in float64 where that is the default dtype, and on the GPU.
                device = _distributed.device(param)
                values["step"] = values["step"].to(device, torch.float32)
            self.state[param] = _state.adapt(values, param, self._format.of(param))

    def _ids(self) -> dict[Tensor, int]:
        """Return what parameters are told apart by in random bits: their places among all."""
        if self._zero is not None:  # which gives this process some of them
            return dict(self._zero._param_to_index)
        return {param: number for number, param in self._numbered()} | (self._fixed_ids or {})

    def _numbered(self) -> list[tuple[int, Tensor]]:
        return list(enumerate(p for group in self.param_groups for p in group["params"]))

    def _complete_groups(self) -> None:
        if self._format.is_random:
            for group in self.param_groups:
                group.setdefault("seed", self._seed)

"""Checks of what a user gives an optimizer, and the words they are refused in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchweld import _library
from torchweld.optim import _state


def check_stock(fused: bool | None, foreach: bool | None, differentiable: bool) -> None:
    if fused is False:
        raise ValueError(
            "torchweld.optim.AdamW is always fused; for fused=False use torch.optim.AdamW"
        )
    if foreach:
        raise ValueError(
            "torchweld.optim.AdamW is fused, which excludes foreach=True; "
            "for foreach use torch.optim.AdamW"
        )
    if differentiable:
        raise ValueError(
            "torchweld.optim.AdamW is fused, and a fused step cannot be differentiated; "
            "for differentiable=True use torch.optim.AdamW"
        )


def format_of(
    state_dtype: _state.StateDtype, stochastic_rounding: bool, kahan: bool, split_master: bool
) -> _state.Format:
    states = {None: _state.LIKE_PARAM, torch.bfloat16: _state.BFLOAT16, "int8": _state.INT8}
    if state_dtype not in states:
        raise ValueError(
            f'Invalid state_dtype value: {state_dtype}, expected None, torch.bfloat16 or "int8"'
        )
    roundings = {
        "stochastic_rounding": (stochastic_rounding, _state.STOCHASTIC),
        "kahan": (kahan, _state.KAHAN),
        "split_master": (split_master, _state.SPLIT),
    }
    chosen = {name: number for name, (on, number) in roundings.items() if on}
    if len(chosen) > 1:
        raise ValueError(
            f"torchweld.optim.AdamW: {' and '.join(chosen)} are different ways to keep small "
            "updates of bfloat16 parameters; choose one"
        )
    return _state.Format(states[state_dtype], next(iter(chosen.values()), _state.NEAREST))


def check_amsgrad(groups: Iterable[dict[str, Any]], form: _state.Format) -> None:
    if form.state == _state.INT8 and any(group.get("amsgrad") for group in groups):
        raise ValueError('torchweld.optim.AdamW: amsgrad does not go with state_dtype="int8"')


def check_seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"Invalid seed value: {seed}, expected a signed 64-bit integer")
    return seed


class Run(NamedTuple):
    """What _adamw_run is given besides a plan and gradients; see csrc/ops/schema.cpp."""

    hyper: list[float]
    lrs: list[Tensor]
    max_grad_norm: float | None
    loss_scale: Tensor | None
    sum_of_squares: Tensor | None
    skip_nonfinite: bool
    seed: int
    statistics: bool
    average_weight: float

    def on(self, device: torch.device) -> Run:
        """Return this with its tensors on a device. The host waits only if that is the CPU."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=device.type != "cpu")

        scale, squares = self.loss_scale, self.sum_of_squares
        return self._replace(
            lrs=[lr if lr is _NO_LR else move(lr) for lr in self.lrs],
            loss_scale=None if scale is None else move(scale),
            sum_of_squares=None if squares is None else move(squares),
        )


_NO_LR = torch.empty(0, device="cpu")


def hyperparameters(groups: list[dict[str, Any]]) -> tuple[list[float], list[Tensor]]:
    """Return the numbers of all groups, and the learning rates that a device holds.

    Those are not read here, where one would have to wait for them.
    """
    values: list[float] = []
    lrs: list[Tensor] = []
    for group in groups:
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        lrs.append(_NO_LR)
        if isinstance(lr, Tensor) and not lr.is_cpu:
            exact = lr.dtype in (torch.float32, torch.float64)
            lrs[-1], lr = lr if exact else lr.double(), 0.0
        values += (
            float(lr),
            float(beta1),
            float(beta2),
            group["eps"],
            group["weight_decay"],
            group["maximize"],
        )
    return values, [] if all(lr is _NO_LR for lr in lrs) else lrs


def check_device(device: torch.device) -> None:
    if device.type == "cuda" and _library.cuda_status != "loaded":
        raise NotImplementedError(
            f"torchweld.optim.AdamW: got a parameter on {device}, and torchweld's CUDA library is "
            f"not there: {_library.cuda_status}"
        )
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            "torchweld.optim.AdamW runs on the CPU and on CUDA and not on other devices yet, "
            f"got a parameter on {device}"
        )


def refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "torchweld.optim.AdamW: this step makes states, and a CUDA graph would make them anew "
            "in every replay; do one step like it before the capture"
        )


def refuse_sparse(grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(
            "torchweld.optim.AdamW does not support sparse gradients: every step moves "
            "every element through its moments, also where the gradient is zero; "
            "consider torch.optim.SparseAdam"
        )

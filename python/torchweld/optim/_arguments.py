"""Checks of what a user gives an optimizer, and the words they are refused in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

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


def hyperparameters(groups: list[dict[str, Any]]) -> list[float]:
    values: list[float] = []
    for group in groups:
        beta1, beta2 = group["betas"]
        values += (
            float(group["lr"]),
            float(beta1),
            float(beta2),
            group["eps"],
            group["weight_decay"],
            group["maximize"],
        )
    return values


def refuse_sparse(grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(
            "torchweld.optim.AdamW does not support sparse gradients: every step moves "
            "every element through its moments, also where the gradient is zero; "
            "consider torch.optim.SparseAdam"
        )

"""The AdamW step in float64, from the paper's formula (https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    t: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the parameter and its states after step t, counted from 1; nothing is written."""
    p, g, m, v = (x.double() for x in (param, grad, exp_avg, exp_avg_sq))
    g = g * (-grad_scale if maximize else grad_scale)
    p = p - lr * weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    v_max = None if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.double(), v)
    second = (v if v_max is None else v_max) / (1 - beta2**t)
    return p - lr / (1 - beta1**t) * m / (second.sqrt() + eps), m, v, v_max


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the 2-norm over all elements of all tensors."""
    return math.sqrt(sum(x.to(torch.complex128).abs().square().sum().item() for x in tensors))

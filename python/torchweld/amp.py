"""Gradient scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from torchweld.optim import AdamW


class GradScaler(torch.amp.GradScaler):
    """A :class:`torch.amp.GradScaler` that leaves unscaling to :class:`torchweld.optim.AdamW`.

    torch's scaler reads and rewrites every gradient to unscale it and to look for infinities.
    With our optimizer, :meth:`step` does both inside the passes the optimizer makes anyway: the
    gradients are not rewritten, and where one is not finite nothing is. Scale, growth and backoff
    are torch's, as is everything with any other optimizer, or after :meth:`unscale_`.

    Args:
        device: the device of the optimizers, as torch takes it.
        init_scale: the first scale.
        growth_factor: factor on the scale after ``growth_interval`` steps without infinities.
        backoff_factor: factor on the scale after a step with one.
        growth_interval: as above.
        enabled: False: do nothing but step.

    Note:
        On a GPU no step waits for the device, and a skipped one may be part of a CUDA graph. After
        :meth:`unscale_` it is torch's step, which waits.

        The gradients stay scaled after :meth:`step`; call :meth:`unscale_` first to look at them
        or to change them, or give ``max_grad_norm`` to the optimizer to clip them. A skipped step
        is a call of the optimizer's ``step`` that writes nothing, so that its hooks run.

    Example:
        >>> import torch, torchweld as tw
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = tw.optim.AdamW(model.parameters(), max_grad_norm=1.0)
        >>> scaler = tw.amp.GradScaler("cpu")
        >>> scaler.scale(model(torch.ones(3, 4)).square().sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step an optimizer, unless a gradient is not finite.

        Args:
            optimizer: any optimizer.
            *args: for its ``step``.
            **kwargs: for its ``step``; no closure.

        Returns:
            What its ``step`` returned; None if torch's scaler skipped it.

        Raises:
            RuntimeError: a closure is given, or this optimizer was stepped since :meth:`update`.
            ValueError: a gradient is float16.
            AssertionError: no parameter has a gradient.
        """
        if not self._enabled or not isinstance(optimizer, AdamW) or "closure" in kwargs:
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:
            return super().step(optimizer, *args, **kwargs)
        self._check_scale_growth_tracker("step")
        # By way of step() itself, which hooks, schedulers and subclasses wrap.
        optimizer._loss_scale, optimizer._found_inf = self._scale, None
        try:
            result: float | None = optimizer.step(*args, **kwargs)
        finally:
            optimizer._loss_scale = None
        found_inf = optimizer._found_inf
        if found_inf is None:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        state["found_inf_per_device"] = {found_inf.device: found_inf}
        state["stage"] = OptState.STEPPED
        return result

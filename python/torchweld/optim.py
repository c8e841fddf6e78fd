"""Optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchweld import ops

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class _Batch(NamedTuple):
    """What one call of the operator updates: the parameters of a group that have gradients."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


class AdamW(torch.optim.AdamW):
    r"""AdamW in one pass over memory, with clipping by the global norm inside the step.

    A :class:`torch.optim.AdamW` in everything but speed: the same arguments, defaults, param
    groups and ``state_dict``, which may go from one to the other and back in the middle of a
    training. For each parameter :math:`p` with gradient :math:`g`, at step :math:`t`

    .. math::
        g &\leftarrow g \cdot \min(1, \text{max\_grad\_norm} / (\lVert g \rVert_2 + 10^{-6})) \\
        p &\leftarrow p - \text{lr} \cdot \text{weight\_decay} \cdot p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\text{lr}}{1 - \beta_1^t} \cdot
            \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \text{eps}}

    Parameters are float32, float64, bfloat16, float16, complex64 or complex128 tensors on the CPU,
    of any strides; the states have their dtype. The gradients are read and never written.

    Args:
        params: parameters, named parameters or dicts of param groups, as torch takes them.
        lr: learning rate, a float or a tensor of one element on the CPU.
        betas: decay of the moments :math:`m` and :math:`v`: two floats or two tensors.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: divide by the root of the largest :math:`v` so far.
        maximize: ascend instead of descend.
        max_grad_norm: scale all gradients of all groups together so that their 2-norm is at most
            this, as :func:`torch.nn.utils.clip_grad_norm_` does, without writing them back. A norm
            that is not finite spreads into the parameters, as there. None: no clipping. It is an
            attribute of the optimizer, not of a group, and not in the ``state_dict``.
        state_dtype: None, the states have the dtype of their parameters.
        stochastic_rounding: False.
        kahan: False.
        split_master: False.
        skip_nonfinite: False.
        capturable: accepted and written into the param groups; without effect on the CPU.
        fused: None or True, this optimizer is always fused.
        foreach: None or False.
        differentiable: False; a fused step cannot be differentiated.

    Attributes:
        max_grad_norm: the argument; may be changed between steps.
        grad_norm: 2-norm of all gradients in the last step before clipping, a float64 tensor of no
            dimensions; None before the first step and if ``max_grad_norm`` is None.

    Raises:
        ValueError: a hyperparameter is out of range (torch's words), or ``fused=False``,
            ``foreach=True`` or ``differentiable=True`` is asked for.
        NotImplementedError: an argument that is to come (``state_dtype``, ``stochastic_rounding``,
            ``kahan``, ``split_master``, ``skip_nonfinite``) is set; in :meth:`step`, a parameter
            is not on the CPU.
        RuntimeError: in :meth:`step`, a gradient is sparse, or a state does not fit its parameter.

    Note:
        16-bit parameters are updated in float32 and each result is rounded once, when it is
        stored; the norm is accumulated in float64. The results are the same bits for any number
        of threads and on every instruction set; without clipping they are, on x86, those of
        ``torch.optim.AdamW(fused=True)``. ``torch.amp.GradScaler`` unscales the gradients itself.
        :func:`torch.compile` breaks the graph at :meth:`step` and runs it as it is.

    Reference:
        I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019,
        https://arxiv.org/abs/1711.05101; S. Reddi et al., "On the Convergence of Adam and Beyond",
        2018, https://arxiv.org/abs/1904.09237.

    Example:
        >>> import torch, torchweld as tw
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = tw.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm.shape
        torch.Size([])
    """

    max_grad_norm: float | None
    grad_norm: Tensor | None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        kahan: bool = False,
        split_master: bool = False,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        later = {
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "kahan": kahan,
            "split_master": split_master,
            "skip_nonfinite": skip_nonfinite,
        }
        for name, value in later.items():
            if value:
                raise NotImplementedError(
                    f"torchweld.optim.AdamW does not implement {name} yet, got {name}={value}"
                )
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
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.grad_norm = None
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            capturable=capturable,
            fused=fused,
            foreach=foreach,
        )
        # torch sets this for fused=True. A GradScaler that sees it leaves the unscaling to step().
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: as :meth:`torch.optim.Optimizer.add_param_group` takes it.

        Raises:
            ValueError: a parameter is in the group twice, or in another group.
        """
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({*map(id, params)}) < len(params):
            del self.param_groups[-1]
            raise ValueError(
                "torchweld.optim.AdamW steps all parameters of a group at once: "
                "expected each parameter once, got one twice"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "max_grad_norm": self.max_grad_norm,
            "grad_norm": self.grad_norm,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for param, values in self.state.items():
            if not isinstance(values, dict):
                continue  # somebody else's, which torch loads as it is
            step = values.get("step")
            if isinstance(step, Tensor):
                # torch keeps it in float64 where that is the default dtype, and on the GPU.
                values["step"] = step.to(param.device, torch.float32)
            for name in _MOMENTS:
                # The memory format of the model that saved the state may have been another one.
                # Only speed depends on it, so a misfit is left for step() to report.
                moment = values.get(name)
                if moment is not None and moment.shape == param.shape:
                    values[name] = _with_strides_of(param, moment)

    # One operator is all there is to compile, and dynamo's model of an optimizer loses what a step
    # does to attributes; so torch.compile runs the step as it stands.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: called first, with gradients enabled, to compute the loss and its gradients.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        batches = [self._batch(group) for group in self.param_groups]
        scale = self._clip([grad for batch in batches for grad in batch.grads])
        for group, batch in zip(self.param_groups, batches, strict=True):
            beta1, beta2 = group["betas"]
            ops.adamw_step_(
                *batch,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
                grad_scale=scale,
            )
        return loss

    def _clip(self, grads: list[Tensor]) -> Tensor | None:
        if self.max_grad_norm is None:
            self.grad_norm = None
            return None
        self.grad_norm = ops.grad_norm(grads)
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _batch(self, group: dict[str, Any]) -> _Batch:
        batch = _Batch([], [], [], [], [], [])
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if not param.is_cpu:
                raise NotImplementedError(
                    "torchweld.optim.AdamW runs on the CPU and not on other devices yet, "
                    f"got a parameter on {param.device}"
                )
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    "torchweld.optim.AdamW does not support sparse gradients: every step moves "
                    "every element through its moments, also where the gradient is zero; "
                    "consider torch.optim.SparseAdam"
                )
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            if group["amsgrad"]:
                if "max_exp_avg_sq" not in state:
                    state["max_exp_avg_sq"] = torch.zeros_like(param)
                batch.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
            batch.params.append(param)
            batch.grads.append(grad)
            batch.exp_avgs.append(state["exp_avg"])
            batch.exp_avg_sqs.append(state["exp_avg_sq"])
            batch.steps.append(state["step"])
        return batch


def _with_strides_of(param: Tensor, value: Tensor) -> Tensor:
    like = torch.empty_like(param, dtype=value.dtype, device=value.device)
    return value if value.stride() == like.stride() else like.copy_(value)

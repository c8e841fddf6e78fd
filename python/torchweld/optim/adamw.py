"""The AdamW optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer
from torch.optim.optimizer import ParamsT

from torchweld.optim import _arguments, _distributed, _state
from torchweld.optim._observed import Observed, Report
from torchweld.optim._plan import Plan
from torchweld.optim._saved import Saved


class AdamW(Observed, Saved):
    r"""AdamW in one pass over memory, with clipping by the global norm inside the step.

    A :class:`torch.optim.AdamW` in all else, unless more is asked for: the same arguments,
    defaults, param groups and ``state_dict``, which may go from one to the other and back in the
    middle of a training. For each parameter :math:`p` with gradient :math:`g`, at step :math:`t`

    .. math::
        g &\leftarrow g \cdot \min(1, \text{max\_grad\_norm} / (\lVert g \rVert_2 + 10^{-6})) \\
        p &\leftarrow p - \text{lr} \cdot \text{weight\_decay} \cdot p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\text{lr}}{1 - \beta_1^t} \cdot
            \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \text{eps}}

    Parameters are float32, float64, bfloat16, float16, complex64 or complex128 tensors of any
    strides, on the CPU or, where :func:`torchweld.info` says that the CUDA library is loaded, on
    GPUs, or DTensors of such. The gradients are read and never written.

    The states have the dtype of their parameters, unless ``state_dtype`` says otherwise:
    ``torch.bfloat16``, or ``"int8"``: a byte for each moment and one float32 scale for every 256
    of them. Both are rounded stochastically, so that :math:`v` can decay (rounded to nearest in
    bfloat16 it cannot at :math:`\beta_2 = 0.999`, as then each change is below half a unit in the
    last place). They are for float32, bfloat16 and float16 parameters.

    A bfloat16 parameter rounded to nearest loses every update below half a unit in its last place,
    2 to 4 thousandths of its value. Three arguments keep them, with states in bfloat16 or int8;
    they leave parameters of other dtypes alone, so that a model may mix them:

    ======================= ============================================ ===================
    argument                a stored weight is                           bytes per parameter
    ======================= ============================================ ===================
    ``stochastic_rounding`` rounded up or down at random, right on average                 0
    ``kahan``               rounded, and the remainder kept in bfloat16                    2
    ``split_master``        the upper half of a float32 master                             2
    ======================= ============================================ ===================

    Args:
        params: parameters, named parameters or dicts of param groups, as torch takes them.
        lr: learning rate, a float or a tensor of one element; one on a GPU is read there.
        betas: decay of the moments :math:`m` and :math:`v`: two floats or two tensors.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: divide by the root of the largest :math:`v` so far; not with ``"int8"``.
        maximize: ascend instead of descend.
        max_grad_norm: scale all gradients of all groups together so that their 2-norm is at most
            this, as :func:`torch.nn.utils.clip_grad_norm_` does, without writing them back. A norm
            that is not finite spreads into the parameters, as there. None: no clipping. It is an
            attribute of the optimizer, not of a group, and not in the ``state_dict``.
        state_dtype: None, ``torch.bfloat16`` or ``"int8"``; see above.
        stochastic_rounding: see above.
        kahan: see above.
        split_master: see above.
        skip_nonfinite: where a gradient is infinite or NaN, leave parameters and states as they
            are and count the step in :attr:`skipped_steps`.
        seed: of the random bits, which depend on it, on the step, on the number of the parameter
            and on the place of the element in it, and on nothing else: not on threads, instruction
            set, rank or sharding. Processes that are to stay equal must have equal seeds.
        capturable: accepted and written into the param groups; a step on a GPU can be captured
            with it and without.
        fused: None or True, this optimizer is always fused.
        foreach: None or False.
        differentiable: False; a fused step cannot be differentiated.

    Attributes:
        max_grad_norm: the argument; may be changed between steps.
        skip_nonfinite: likewise.

    Raises:
        ValueError: a hyperparameter is out of range (torch's words); arguments do not go together;
            ``fused=False``, ``foreach=True`` or ``differentiable=True`` is asked for;
            ``max_grad_norm`` inside a ``ZeroRedundancyOptimizer``, where no process sees all
            gradients.
        NotImplementedError: in :meth:`step`, a parameter is neither on the CPU nor on a GPU that
            torchweld is built for.
        RuntimeError: in :meth:`step`, a gradient is sparse, or a state does not fit its parameter
            or is on another device; or a step that would make states is captured in a CUDA graph.
            Nothing has been written then.

    Note:
        16-bit parameters are updated in float32 and each result is rounded once, when it is
        stored; the norm is accumulated in float64. The results are the same bits for any number
        of threads and on every instruction set; with none of the arguments above, and without
        clipping, they are, on x86, those of ``torch.optim.AdamW(fused=True)``.

        On a GPU results have the bits of the CPU's, unless a value is NaN; of float64 parameters,
        but for one step in a thousand whose bias correction the C library's ``pow`` rounds the
        other way. Of the statistics, ``update_norm`` is added up in another order. A step there is
        two kernels, three with a norm, and one more for each further dtype and where gradients have
        moved; the host waits for nothing (but reads ``betas`` that are tensors). It may be captured
        in a CUDA graph once states have been made: each replay counts, clips, skips and draws
        random bits as a step of its own; what is a number in the param groups stays as captured, a
        learning rate in a tensor is read anew. Parameters may be on several devices, with one norm
        over all. Compiled and run on an emulator, the CUDA half has not yet run on a GPU.

        DTensors are stepped where they are. Their float states are DTensors placed alike, the norm
        is reduced over the mesh, the random bits are those of the unsharded parameter. 8-bit states
        have blocks of their own in every shard. Under FSDP1, which shows flat shards, the norm
        would be that of one process: clip with its own ``clip_grad_norm_``.

        Parameters, states and their grouping may be changed between steps in any way.
        :func:`torch.compile` breaks the graph at :meth:`step` and runs it as it is.

    Reference:
        I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019,
        https://arxiv.org/abs/1711.05101; S. Reddi et al., "On the Convergence of Adam and Beyond",
        2018, https://arxiv.org/abs/1904.09237; P. Zamirai et al., "Revisiting BFloat16 Training",
        2021, https://arxiv.org/abs/2010.06192; T. Dettmers et al., "8-bit Optimizers via Block-wise
        Quantization", 2022, https://arxiv.org/abs/2110.02861.

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
    skip_nonfinite: bool

    _plan: Plan | None = None
    _report: Tensor | None = None
    _has_norm = False  # whether the norm was needed
    # Set and read by torchweld.amp.GradScaler around its step.
    _loss_scale: Tensor | None = None
    _found_inf: Tensor | None = None

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
        state_dtype: _state.StateDtype = None,
        stochastic_rounding: bool = False,
        kahan: bool = False,
        split_master: bool = False,
        skip_nonfinite: bool = False,
        seed: int = 0,
        capturable: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        _arguments.check_stock(fused, foreach, differentiable)
        self._format = _arguments.format_of(state_dtype, stochastic_rounding, kahan, split_master)
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        self._zero = _distributed.enclosing_zero()
        if self._zero is not None and (max_grad_norm is not None or skip_nonfinite):
            name = "skip_nonfinite" if max_grad_norm is None else "max_grad_norm"
            raise ValueError(
                f"torchweld.optim.AdamW: {name} does not work inside a ZeroRedundancyOptimizer, "
                "which shows each process the gradients of some parameters only; call "
                "torch.nn.utils.clip_grad_norm_ before the step"
            )
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._seed = _arguments.check_seed(seed)
        self._skipped: Tensor | float = 0.0
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
        if self._format.is_random:
            self.defaults["seed"] = seed
        self._complete_groups()
        # torch sets this for fused=True. A GradScaler that sees it leaves the unscaling to step().
        self._step_supports_amp_scaling = False

    @property
    def seed(self) -> int:
        """Seed of the random bits; kept in the ``param_groups`` of the ``state_dict``."""
        seed: int = self.param_groups[0].get("seed", self._seed)
        return seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = _arguments.check_seed(value)
        for group in self.param_groups:
            group.pop("seed", None)
        self._complete_groups()

    @property
    def grad_norm(self) -> Tensor | None:
        """2-norm of all gradients in the last step before clipping: float64, of no dimensions.

        None before the first step and where nothing asked for it: neither ``max_grad_norm`` nor
        ``skip_nonfinite`` nor :meth:`observe` nor a scaler.
        """
        if self._report is None or not self._has_norm:
            return None
        return Report.of(self._report).grad_norm

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a gradient that was not finite."""
        return int(self._skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: as :meth:`torch.optim.Optimizer.add_param_group` takes it.

        Raises:
            ValueError: a parameter is in the group twice, or in another group; or its dtype, or
                ``amsgrad``, does not go with ``state_dtype``.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if len({*map(id, group["params"])}) < len(group["params"]):
                raise ValueError(
                    "torchweld.optim.AdamW steps all parameters at once: "
                    "expected each parameter once, got one twice"
                )
            _arguments.check_amsgrad([group], self._format)
            for param in group["params"]:
                self._format.of(param)
        except ValueError:
            del self.param_groups[-1]
            raise

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

        plan = self._plan
        if plan is None or not plan.is_current(self):
            plan = self._plan = Plan(self)
        grads, which = plan.gradients()
        scaled = self._loss_scale is not None
        if scaled and any(grad.dtype is torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients.")
        may_skip = scaled or self.skip_nonfinite
        self._has_norm = may_skip or self._statistics or self.max_grad_norm is not None
        try:
            self._report = self._run(plan, grads, which)
        except (RuntimeError, NotImplementedError):
            for grad in grads:
                _arguments.refuse_sparse(grad)
            raise
        self._has_statistics = self._statistics
        if may_skip and (grads or plan.is_sharded):
            skipped = Report.of(self._report).skipped
            self._count_skipped(skipped)
            if scaled:
                self._found_inf = skipped.float()
        if torch.__future__.get_swap_module_params_on_conversion():
            self._plan = None  # torch swaps only tensors that nobody else holds
        return loss

    def _run(self, plan: Plan, grads: list[Tensor], which: list[int]) -> Tensor:
        if not grads and not plan.is_sharded:
            return torch.zeros(len(Report._fields), dtype=torch.float64, device="cpu")
        arguments = _arguments.Run(
            *_arguments.hyperparameters(self.param_groups),
            self.max_grad_norm,
            self._loss_scale,
            plan.sum_of_squares(grads, which) if self._has_norm else None,
            self.skip_nonfinite,
            self.seed,
            self._statistics,
            0.0 if self._average is None else 1 - self._average,
        )
        return plan.run(grads, which, arguments)

    def _count_skipped(self, skipped: Tensor) -> None:
        if not isinstance(self._skipped, Tensor) or self._skipped.device != skipped.device:
            _arguments.refuse_capture(skipped.device)
            self._skipped = torch.full_like(skipped, float(self._skipped))
        self._skipped += skipped  # in place, for the replays of a graph

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a step as torch does, for profilers and hooks; where there are none, at no cost."""
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: AdamW, *args: Any, **kwargs: Any) -> Any:
            watched = (
                torch.autograd.profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or optimizer._global_optimizer_pre_hooks
                or optimizer._global_optimizer_post_hooks
            )
            return (hooked if watched else func)(self, *args, **kwargs)

        return step

    def _state_of(self, param: Tensor, amsgrad: bool) -> _state.State | None:
        """Return the state a parameter steps with; None if it has none and no gradient."""
        state: _state.State | None = self.state.get(param)
        form = self._format.of(param)
        if not state:
            if param.grad is None:
                return None
            device = _distributed.device(param)
            _arguments.check_device(device)
            _arguments.refuse_capture(device)
            state = self.state[param]
            state.update(_state.create(param, form, amsgrad))
        else:
            _state.complete(state, param, form, amsgrad)
        self._begin_average(param, state)
        return state

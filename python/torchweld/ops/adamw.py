"""The AdamW step and the norm it clips by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
) -> None:
    r"""Update parameters and their states in place by one AdamW step, in one pass over memory.

    .. math::
        g &\leftarrow \pm \text{grad\_scale} \cdot g \\
        p &\leftarrow p - \text{lr} \cdot \text{weight\_decay} \cdot p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\text{lr}}{1 - \beta_1^t} \cdot
            \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \text{eps}}

    With ``amsgrad`` the last line takes the largest :math:`v` so far in place of :math:`v`.
    All tensors are on one device: the CPU, or a GPU where :func:`torchweld.info` says that the CUDA
    library is loaded.

    Args:
        params: tensors of float32, float64, bfloat16, float16, complex64 or complex128, of any
            shapes and strides and not necessarily of one dtype. A complex tensor is updated as its
            :func:`torch.view_as_real`.
        grads: gradients; each has the shape and the dtype of its parameter and any strides. They
            are not written.
        exp_avgs: first moments :math:`m`, like ``params``.
        exp_avg_sqs: second moments :math:`v`, like ``params``.
        max_exp_avg_sqs: largest second moments so far, like ``params``; empty unless ``amsgrad``.
        state_steps: float32 tensors of one element: the steps done before this one. Each is
            incremented, which gives :math:`t`.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: decoupled weight decay.
        eps: added to the denominator.
        amsgrad: whether to use ``max_exp_avg_sqs``.
        maximize: whether to turn the sign of the gradients.
        grad_scale: factor on every gradient: a float64 tensor of one element.

    Raises:
        RuntimeError: the lists differ in length; a tensor differs from its parameter in shape,
            dtype or device; a dtype is not one of the above; a tensor that is written overlaps
            itself. Nothing has been written then.

    Note:
        16-bit tensors are computed in float32 and each result is rounded once, when it is stored.
        The results are the same bits for any number of threads and on every instruction set; on
        x86 they are those of ``torch.optim.AdamW(fused=True)``. A tensor whose strides differ
        from its parameter's, or a parameter with gaps, costs a copy. On a GPU they are those of
        the CPU too, unless a value is NaN; of float64, but for one step in a thousand whose bias
        correction the C library's ``pow`` rounds the other way. There the step
        waits for nothing, reads ``state_steps`` and ``grad_scale`` on the device, and may be
        captured in a CUDA graph.

    Reference:
        I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019,
        https://arxiv.org/abs/1711.05101; S. Reddi et al., "On the Convergence of Adam and Beyond",
        2018, https://arxiv.org/abs/1904.09237.

    Example:
        >>> import torch, torchweld as tw
        >>> p, g, m, v = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
        >>> tw.ops.adamw_step_([p], [g], [m], [v], [], [torch.zeros(())], lr=0.1, beta1=0.9,
        ...                    beta2=0.999, weight_decay=0.0, eps=1e-8)
        >>> p
        tensor([0.9000, 0.9000, 0.9000])
    """
    if not params:
        return
    torch.ops.torchweld.adamw_step_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
    )
    if not torch.compiler.is_compiling():
        # So that a backward through a graph that saved them before the step is an error and not
        # a wrong number: an operator of the stable ABI does not count its writes itself.
        torch.autograd.graph.increment_version(params)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Compute the 2-norm over all elements of all tensors, as if they were one vector.

    Args:
        grads: tensors of float32, float64, bfloat16, float16, complex64 or complex128, of any
            shapes and strides and not necessarily of one dtype. May be empty.

    Returns:
        A float64 tensor of no dimensions, on the device of ``grads``.

    Raises:
        RuntimeError: a dtype is not one of the above; the tensors are on several devices.

    Note:
        Accumulated in float64 whatever the dtype, in an order fixed by the sizes alone: the same
        bits for any number of threads, on every instruction set and on a GPU. There is no gradient.

    Example:
        >>> import torch, torchweld as tw
        >>> tw.ops.grad_norm([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])
        tensor(5., dtype=torch.float64)
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.ops.torchweld.grad_norm(grads)
    return norm

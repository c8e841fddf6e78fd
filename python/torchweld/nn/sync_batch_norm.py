"""Batch normalization with the statistics of all processes, on the CPU as well."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_ops = torch.ops.torchweld


class SyncBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` that runs on the CPU too, and inside ``DistributedDataParallel`` there.

    State, arguments and meaning are those of the stock class. :func:`torchweld.weld` puts it in the
    place of every ``nn.SyncBatchNorm``, :func:`torchweld.unweld` takes it out again.

    Args:
        num_features: as in ``nn.SyncBatchNorm``, and so all others.
        eps: see there.
        momentum: see there.
        affine: see there.
        track_running_stats: see there.
        process_group: the processes to exchange with; all by default.
        device: see there.
        dtype: see there.

    Note:
        See :func:`sync_batch_norm_relu`. Without a process group, or alone in it, this is plain
        batch normalization. Tensors on other devices than the CPU go to the stock class, unless
        :func:`torchweld.weld` fused the layer.

    Example:
        >>> import torch, torchweld as tw
        >>> tw.nn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``[N, C, ...]`` with the statistics of all processes."""
        output: Tensor
        if not exchanges(self):
            output = super().forward(input)
        elif input.device.type != "cpu":
            output = nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        else:
            self._check_input_dim(input)
            shape = *input.shape[:2], math.prod(input.shape[2:]), 1
            image = input if input.dim() == 4 else input.reshape(shape)
            output = sync_batch_norm_relu(image, self, "identity").view_as(input)
        return output


def exchanges(bn: nn.Module) -> bool:
    """Whether a call of ``bn`` takes its statistics from more than one process."""
    return (
        isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm))
        and bn.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(bn.process_group) > 1
    )


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def sync_batch_norm_relu(
    input: Tensor,
    bn: SyncBatchNorm | nn.SyncBatchNorm,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Compute ``activation(bn(input) + residual)`` with the statistics of all processes.

    What ``nn.SyncBatchNorm`` computes, which runs on no CPU. Every process sends
    the count of its values, their mean, and the sum of squared deviations from it; merged,

    .. math::
        n = \sum_i n_i, \quad \mu = \tfrac{1}{n} \sum_i n_i \mu_i, \quad
        M_2 = \sum_i M_{2,i} + n_i (\mu_i - \mu)^2 .

    Args:
        input: ``[N, C, H, W]``; ``N`` may differ between processes and be 0.
        bn: the batch norm, in training, in a process group of more than one process.
        activation: see :func:`torchweld.nn.functional.conv_bn_relu`.
        negative_slope: see there.
        residual: see there.

    Returns:
        The output, in the shape, dtype and memory format of the input.

    Raises:
        ValueError: if there is one value per channel in all processes together; on the CPU, as
            elsewhere the host would have to wait to know.

    Note:
        Sums are float64, merged in the order of the ranks: every process gets the same bits. As
        with ``nn.SyncBatchNorm``, gradients of weight and bias are of this process's values alone
        (``DistributedDataParallel`` averages them), and every process has to call forward and
        backward in the same order. torch.compile breaks its graph here.

    Reference:
        Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    # As nn.SyncBatchNorm.forward: the count moves first, then the input is looked at.
    tracks = bn.track_running_stats
    momentum = bn.momentum
    if tracks and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    with torch.no_grad():
        count, mean, m2 = _merge(_ops.batch_norm_stats(input), bn.process_group)
        if count.is_cpu and int(count) == 1:
            size = [1, input.shape[1], 1, 1]
            F._verify_batch_size(size)  # type: ignore[attr-defined]
        var = m2 / count.clamp(min=1.0)
        if tracks and bn.running_mean is not None and bn.running_var is not None:
            # Not update_running_stats, which takes the count as a number. No values move nothing.
            weight = (momentum or 0.0) * count.clamp(max=1.0)
            unbiased = m2 / (count - 1.0).clamp(min=1.0)
            for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
                running.copy_((1.0 - weight) * running + weight * batch)
        invstd = (var + bn.eps).rsqrt()
    output: Tensor = _Normalize.apply(
        input, bn.weight, bn.bias, residual, mean, invstd, count,
        activation, negative_slope, bn.process_group,
    )  # fmt: skip
    return output


def _merge(statistics: tuple[Tensor, Tensor, Tensor], group: Any) -> tuple[Tensor, Tensor, Tensor]:
    mine = torch.cat(statistics)
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, mine, group=group)
    channels = statistics[1].numel()
    counts, means, m2s = torch.stack(all_of_them).split([1, channels, channels], dim=1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp(min=1.0)
    return total, mean, (m2s + counts * (means - mean).square()).sum(0)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        activation: str,
        negative_slope: float,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias, residual, mean, invstd, count)
        ctx.activation, ctx.group = (activation, negative_slope), group
        output: Tensor = _ops.batch_norm_relu(
            input, mean, invstd, weight, bias, residual, activation, negative_slope
        )
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, residual, mean, invstd, count = ctx.saved_tensors
        of_input, of_weight, of_bias, of_residual = ctx.needs_input_grad[:4]
        common = (grad_output, input, mean, invstd, weight, bias, residual)
        sum_g, sum_g_xhat = _ops.batch_norm_relu_backward_reduce(*common, *ctx.activation)
        # The gradients of the parameters are of this process; what follows is of all.
        grad_weight = sum_g_xhat.to(weight.dtype) if of_weight else None
        grad_bias = sum_g.to(bias.dtype) if of_bias else None
        grad_input = grad_residual = None
        if of_input or of_residual:
            sums = torch.stack([sum_g, sum_g_xhat])
            dist.all_reduce(sums, group=ctx.group)
            grad_input, grad_residual = _ops.batch_norm_relu_backward(
                *common, sums[0], sums[1], count, *ctx.activation
            )
        return (
            grad_input if of_input else None,
            grad_weight,
            grad_bias,
            grad_residual if of_residual else None,
            *(None,) * 6,
        )

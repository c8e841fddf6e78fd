"""Convolution, batch norm, residual and activation as one module."""

from typing import Any, List, Optional, Tuple  # noqa: UP035

import torch
from torch import Tensor, nn

from torchweld.nn.functional import (
    _both_sides,
    _check_modules,
    _conv_bn_relu,
    _pad,
    conv_bn_relu,
)
from torchweld.nn.packed_weight import packed_weight, without_pack
from torchweld.ops.conv_bn_relu import inference_only

_conv_relu = torch.ops.torchweld.conv_relu.default
ACTIVATIONS = ("identity", "relu", "relu6", "leaky_relu", "silu", "hardswish")


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f'{op}: activation: expected one of {", ".join(ACTIVATIONS)}, got "{activation}"'
        )


def _to_module(activation: str, negative_slope: float) -> nn.Module:
    modules: dict[str, nn.Module] = {
        "identity": nn.Identity(),
        "relu": nn.ReLU(),
        "relu6": nn.ReLU6(),
        "leaky_relu": nn.LeakyReLU(negative_slope),
        "silu": nn.SiLU(),
        "hardswish": nn.Hardswish(),
    }
    return modules[activation]


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the weight ``[C, ...]`` before it, in float64, rounded once."""
    # Writes to tensors made in inference mode are not counted, and packed weights count on it.
    with torch.inference_mode(False), torch.no_grad():
        scale = (var.double() + eps).rsqrt()
        if bn_weight is not None:
            scale = scale * bn_weight.double()
        shift = -mean.double() * scale
        if bias is not None:
            shift = shift + bias.double() * scale
        if bn_bias is not None:
            shift = shift + bn_bias.double()
        scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        return scaled.to(weight), shift.to(weight)


class ConvBNReLU2d(nn.Module):
    """``activation(bn(conv(input)) + residual)``, fused in training and evaluation.

    A drop-in for ``nn.Sequential(nn.Conv2d(...), nn.BatchNorm2d(...), nn.ReLU())``: the children
    ``conv`` and ``bn`` are the stock modules and hold all state, so keys are ``conv.weight``,
    ``bn.weight``, ``bn.running_mean`` and so on. They are read, not called: hooks belong on this
    module. ``bn.training`` chooses the statistics, so ``module.bn.eval()`` freezes them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: as in ``nn.Conv2d``, and so ``stride``, ``padding`` (numbers, ``"same"`` or
            ``"valid"``), ``dilation``, ``groups`` and ``bias`` (default off: batch statistics
            cancel it).
        stride: see ``kernel_size``.
        padding: see ``kernel_size``.
        dilation: see ``kernel_size``.
        groups: see ``kernel_size``.
        bias: see ``kernel_size``.
        eps: as in ``nn.BatchNorm2d``, and so ``momentum``, ``affine`` and ``track_running_stats``.
        momentum: see ``eps``.
        affine: see ``eps``.
        track_running_stats: see ``eps``.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"`` or
            ``"hardswish"``.
        negative_slope: slope of ``"leaky_relu"`` below zero.
        device: where parameters and buffers are made.
        dtype: what they are made as.

    Raises:
        ValueError: if ``activation`` is not one of those.

    Note:
        Numerics, limits and references: :func:`torchweld.nn.functional.conv_bn_relu`.

    Example:
        >>> import torch, torchweld as tw
        >>> block = tw.nn.ConvBNReLU2d(3, 8, 3, padding=1)
        >>> block(torch.randn(2, 3, 16, 16), residual=torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_activation("ConvBNReLU2d", activation)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Compute the block; ``residual`` has the output's shape and dtype."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return conv_bn_relu(
                input, self.conv, self.bn, self.activation, self.negative_slope, residual
            )
        # TorchScript cannot pass modules to a function.
        return _conv_bn_relu(
            input,
            self.conv.weight,
            self.conv.bias,
            list(self.conv.stride),
            self._script_padding(),
            list(self.conv.dilation),
            self.conv.groups,
            self.conv.padding_mode,
            self.bn.weight,
            self.bn.bias,
            self.bn.running_mean,
            self.bn.running_var,
            self.bn.num_batches_tracked,
            self.bn.training,
            self.bn.track_running_stats,
            self.bn.momentum,
            self.bn.eps,
            self.activation,
            self.negative_slope,
            residual,
        )

    def _script_padding(self) -> List[int]:  # noqa: UP006
        if isinstance(self.conv.padding, str):
            return self.conv._reversed_padding_repeated_twice
        if self.conv.padding_mode != "zeros":
            return self.conv._reversed_padding_repeated_twice
        height, width = self.conv.padding
        return [width, width, height, height]

    def extra_repr(self) -> str:
        """Name the activation; the children print themselves."""
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation!r}{slope}"

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        activation: str = "relu",
        negative_slope: float = 0.01,
    ) -> "ConvBNReLU2d":
        """Fuse two stock modules, which the result shares: parameters, buffers, modes and all.

        Args:
            conv: any ``nn.Conv2d``.
            bn: the batch norm over its output.
            activation: see the class.
            negative_slope: see the class.

        Returns:
            The fused module, in the mode ``bn`` is in.

        Raises:
            TypeError: if one is not the stock class or has a forward of its own.
            ValueError: if the channels do not fit or ``activation`` is unknown.
        """
        _check_modules("ConvBNReLU2d.from_float", conv, bn)
        _check_activation("ConvBNReLU2d.from_float", activation)
        if conv.out_channels != bn.num_features:
            raise ValueError(
                f"ConvBNReLU2d.from_float: bn: expected {conv.out_channels} features, as conv has "
                f"output channels, got {bn.num_features}"
            )
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.conv = conv
        module.bn = bn
        module.activation = activation
        module.negative_slope = negative_slope
        module.training = bn.training  # not train(), which would also switch the children
        return module

    def to_float(self) -> nn.Sequential:
        """Return the stock modules ``conv``, ``bn`` and activation, sharing all state."""
        stock = nn.Sequential(self.conv, self.bn, _to_module(self.activation, self.negative_slope))
        stock.training = self.training
        return stock


class ConvReLU2d(nn.Module):
    """``activation(conv(input) + residual)`` with a batch norm folded into the convolution.

    For inference: ``weight`` and ``bias`` are buffers of its own, in no way tied to the modules it
    was built from, and have no gradient. Built by :meth:`from_float`. Beside them it keeps the
    weight once more as the kernels read it, ``packed_weight`` (up to four times its size for a 3x3
    kernel, see ``torchweld.config.winograd``), which is in no state_dict. It is packed again when
    the weight changes, but for writes through ``weight.data``; ``torch.compile``, ``torch.export``
    and ``torch.jit.script`` do without it.

    Example:
        >>> import torch, torchweld as tw
        >>> conv, bn = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        >>> folded = tw.nn.ConvReLU2d.from_float(conv, bn)
        >>> folded(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 14, 14])
    """

    weight: Tensor
    bias: Tensor
    packed_weight: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, ...],
        both_sides: list[int],
        dilation: tuple[int, ...],
        groups: int,
        padding_mode: str = "zeros",
        activation: str = "relu",
        negative_slope: float = 0.01,
    ):
        super().__init__()
        _check_activation("ConvReLU2d", activation)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride = list(stride)
        self.both_sides = list(both_sides)
        self.dilation = list(dilation)
        self.groups = groups
        self.padding_mode = padding_mode
        self.activation = activation
        self.negative_slope = negative_slope
        self.register_buffer("packed_weight", weight.new_empty(0), persistent=False)
        self._pack(weight)

    def _pack(self, weight: Tensor) -> Optional[Tensor]:  # noqa: UP045
        """Return the packed weight, packed again if the weight has changed; None for no use."""
        padding = [self.both_sides[2], self.both_sides[0]]
        return packed_weight(self, weight, self.stride, padding, self.dilation, self.groups)

    def __getstate__(self) -> dict[str, Any]:
        """Copies pack their own weight."""
        return without_pack(self.__dict__)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Compute the block; a gradient through it raises RuntimeError in the backward."""
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._convolve(input, residual, self.activation, self.negative_slope)
        padded, padding = self._padded(input)
        output: Tensor = torch.ops.torchweld.conv_relu(
            padded, self.weight, None, self.bias, residual, self.stride, padding, self.dilation,
            self.groups, self.activation, self.negative_slope,
        )  # fmt: skip
        return output

    def _padded(self, input: Tensor) -> Tuple[Tensor, List[int]]:  # noqa: UP006
        """Return the input, padded if need be, and the padding left for the convolution."""
        padding = [self.both_sides[2], self.both_sides[0]]
        return _pad(input, padding, self.both_sides, self.padding_mode)

    @torch.jit.unused
    def _convolve(
        self,
        input: Tensor,
        residual: Optional[Tensor],  # noqa: UP045
        activation: str,
        negative_slope: float,
    ) -> Tensor:
        """Compute the block with this activation in the place of its own."""
        both_sides = self.both_sides
        padding = [both_sides[2], both_sides[0]]
        padded, padding = _pad(input, padding, both_sides, self.padding_mode)
        # Found as attributes, they would take longer than the layer's arithmetic may.
        weight, bias = self._buffers.get("weight"), self._buffers.get("bias")
        if weight is None or bias is None:  # parameters, or parametrized
            weight, bias = self.weight, self.bias
        output: Tensor = _conv_relu(
            padded, weight, self._pack(weight), bias, residual, self.stride, padding,
            self.dilation, self.groups, activation, negative_slope,
        )  # fmt: skip
        return inference_only(output, padded, weight, bias, residual)

    def extra_repr(self) -> str:
        """Name what is not in the buffers."""
        out_channels, in_channels, *kernel = self.weight.shape
        return (
            f"{in_channels * self.groups}, {out_channels}, kernel_size={tuple(kernel)}, "
            f"stride={tuple(self.stride)}, activation={self.activation!r}"
        )

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        activation: str = "relu",
        negative_slope: float = 0.01,
    ) -> "ConvReLU2d":
        r"""Fold the running statistics of ``bn`` into ``conv``, in float64, rounded once.

        .. math::
            s = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad
            W' = s W, \qquad b' = s (b - \mu) + \beta

        Args:
            conv: any ``nn.Conv2d``.
            bn: the batch norm over its output, with running statistics.
            activation: see :class:`ConvBNReLU2d`.
            negative_slope: see :class:`ConvBNReLU2d`.

        Returns:
            A module in evaluation mode with tensors of its own, in the dtype of ``conv``.

        Raises:
            TypeError: if one is not the stock class or has a forward of its own.
            ValueError: if ``bn`` has no running statistics, if the channels do not fit, or if
                ``activation`` is unknown.
        """
        _check_modules("ConvReLU2d.from_float", conv, bn)
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError(
                "ConvReLU2d.from_float: bn: expected running statistics to fold, got None"
            )
        if conv.out_channels != bn.num_features:
            raise ValueError(
                f"ConvReLU2d.from_float: bn: expected {conv.out_channels} features, as conv has "
                f"output channels, got {bn.num_features}"
            )
        weight, shift = _fold(
            conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
        )
        module = cls(
            weight, shift, conv.stride, _both_sides(conv), conv.dilation, conv.groups,
            conv.padding_mode, activation, negative_slope,
        )  # fmt: skip
        return module.eval()

"""A linear layer by the product of the convolutions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld.nn.packed_weight import packed_weight

# Weights a layer must have: below, the call takes longer than what is gained.
SMALLEST = 1 << 18


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` for inference in float32 on the CPU.

    The layer as the 1x1 convolution it is, by ``tw.ops.conv_relu``, for the sake of processors on
    which the vendor's product is slow. It keeps the weight once more as the kernels read it,
    ``packed_weight``, which is in no state_dict and is packed again when the weight changes (but
    for writes through ``weight.data``). Everything else is ``nn.Linear``'s: so are other devices
    and dtypes, autocast, ``torch.compile``, ``torch.export``, and calls that need a gradient.
    Built by :meth:`from_float`.

    Note:
        Accumulates in float32. Same bits for any number of threads and rows.

    Example:
        >>> import torch, torchweld as tw
        >>> linear = tw.nn.PackedLinear.from_float(torch.nn.Linear(512, 512))
        >>> linear(torch.randn(2, 512)).shape
        torch.Size([2, 512])
    """

    packed_weight: Tensor

    @classmethod
    def from_float(cls, linear: nn.Linear) -> "PackedLinear":
        """Build one that shares the tensors of an ``nn.Linear``.

        Args:
            linear: the layer; it is not changed.

        Raises:
            TypeError: it is not an ``nn.Linear`` itself.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"PackedLinear.from_float: expected an nn.Linear, got {type(linear).__name__}"
            )
        packed = cls(linear.in_features, linear.out_features, device="meta")
        packed.weight, packed.bias = linear.weight, linear.bias
        packed.start()
        return packed.train(linear.training)

    def start(self) -> None:
        """Pack for the first time, before anybody traces a call."""
        self.register_buffer("packed_weight", torch.empty(0), persistent=False)
        self._packed()

    def _packed(self) -> Tensor | None:
        return packed_weight(self, self.weight, [1, 1], [0, 0], [1, 1], 1)

    def __getstate__(self) -> dict[str, Any]:
        """Copies pack their own weight."""
        return {k: v for k, v in self.__dict__.items() if k != "_packed_from"}

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``input @ weight.T + bias``.

        Args:
            input: ``[..., in_features]``.

        Returns:
            ``[..., out_features]``.
        """
        packed = self._pack(input)
        if packed is None or packed.untyped_storage().nbytes() == 0:  # which no trace records
            return F.linear(input, self.weight, self.bias)
        one, none = [1, 1], [0, 0]
        image = input.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        output: Tensor = torch.ops.torchweld.conv_relu(
            image, self.weight[:, :, None, None], packed, self.bias, None, one, none, one, 1,
            "identity", 0.0,
        )  # fmt: skip
        return output.permute(0, 2, 3, 1).reshape([*input.shape[:-1], self.out_features])

    def _pack(self, input: Tensor) -> Tensor | None:
        tensors = (input, self.weight) if self.bias is None else (input, self.weight, self.bias)
        if any(x.dtype != torch.float32 or not x.is_cpu for x in tensors):
            return None
        # A trace keeps no answer about sizes; one that does not fit fails in reshape there.
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if not is_tracing and (input.dim() == 0 or input.shape[-1] != self.in_features):
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return None
        return self._packed()

"""A linear layer by the product of the convolutions."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchweld.nn.packed_weight import packed_weight, without_pack

# Weights a layer must have: below, the call takes longer than what is gained.
SMALLEST = 1 << 18


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` for inference in float32 or bfloat16 on the CPU.

    The layer as the 1x1 convolution it is, by ``tw.ops.conv_relu``, for the sake of processors on
    which the vendor's product is slow. It keeps the weight once more as the kernels read it,
    ``packed_weight``, which is in no state_dict and is packed again when the weight changes (but
    for writes through ``weight.data``). Everything else is ``nn.Linear``'s: so are other devices
    and dtypes, autocast, ``torch.compile``, ``torch.export``, ``torch.func``, and calls that need a
    gradient. ``torch.jit.trace`` records the packed weight as it is then, for inputs of as many
    dimensions: load a state_dict before. Built by :meth:`from_float`.

    Note:
        Accumulates in float32. Where the weight is packed (a rule leaves some shapes to the
        vendor), the bits are the same for any number of threads and rows.

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
        packed._start()
        return packed.train(linear.training)

    def _start(self) -> None:
        """Pack for the first time, before anybody traces a call."""
        self.register_buffer("packed_weight", torch.empty(0), persistent=False)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        """Copies pack their own weight."""
        return without_pack(self.__dict__)

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``input @ weight.T + bias``.

        Args:
            input: ``[..., in_features]``.

        Returns:
            ``[..., out_features]``.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            packed = self._pack() if self._takes(input) else None
            if packed is not None and packed.untyped_storage().nbytes() > 0:
                return self._multiply(input, packed)
        return F.linear(input, self.weight, self.bias)

    @torch.jit.unused
    def _multiply(self, input: Tensor, packed: Tensor) -> Tensor:
        one, none = [1, 1], [0, 0]
        image = input.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        output: Tensor = torch.ops.torchweld.conv_relu(
            image, self.weight[:, :, None, None], packed, self.bias, None, one, none, one, 1,
            "identity", 0.0,
        )  # fmt: skip
        return output.permute(0, 2, 3, 1).reshape([*input.shape[:-1], self.out_features])

    @torch.jit.unused
    def _pack(self) -> Optional[Tensor]:  # noqa: UP045
        return packed_weight(self, self.weight, [1, 1], [0, 0], [1, 1], 1)

    @torch.jit.unused
    def _takes(self, input: Tensor) -> bool:
        """Whether this call has plain tensors of one dtype on the CPU, and wants no gradient."""
        tensors = (input, self.weight) if self.bias is None else (input, self.weight, self.bias)
        if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
            return False
        if input.layout != torch.strided or input.is_nested:
            return False
        dtype = self.weight.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            return False
        if any(x.dtype != dtype or not x.is_cpu for x in tensors):
            return False
        if torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return False
        # A trace keeps no answer about sizes; one that does not fit fails in reshape there.
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            return True
        return input.dim() > 0 and input.shape[-1] == self.in_features and input.numel() > 0

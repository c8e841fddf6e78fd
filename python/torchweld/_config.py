"""Switches for the whole process."""

from __future__ import annotations

from torchweld import _C


class Config:
    """Switches for the whole process, read by every call; an instance is ``torchweld.config``.

    Each begins as its environment variable says.

    Example:
        >>> import torchweld as tw
        >>> before = tw.config.winograd
        >>> tw.config.winograd = False  # 3x3 convolutions by direct sums
        >>> tw.config.winograd = before
    """

    __slots__ = ()

    @property
    def winograd(self) -> bool:
        """Whether 3x3 convolutions may run as Winograd F(4x4, 3x3) (``TORCHWELD_WINOGRAD``).

        On by default. It needs a quarter of the multiplications; its rounding errors are a few
        times those of direct sums, and of the size batch norm's are.
        """
        return _C.winograd()

    @winograd.setter
    def winograd(self, on: bool) -> None:
        _C.set_winograd(on)

    @property
    def convolution(self) -> str:
        """The algorithm of channels_last convolutions (``TORCHWELD_CONVOLUTION``).

        ``"auto"``: the one expected to be fastest for the shape. ``"aten"``: the vendor's, through
        ATen. ``"dense"``, ``"winograd"`` (on the CPU), ``"depthwise"``, ``"cudnn"`` (on CUDA: a
        folded convolution with bias, residual and ReLU in one kernel): that one wherever it can,
        ATen's elsewhere.
        Setting another name raises RuntimeError.
        """
        return _C.convolution_algorithm()

    @convolution.setter
    def convolution(self, name: str) -> None:
        _C.set_convolution_algorithm(name)

    @property
    def memory_pool(self) -> int:
        """Bytes of freed activations kept for the next ones (``TORCHWELD_MEMORY_POOL``).

        Large outputs and gradients of the fused operators lie in huge pages that are used again,
        instead of being faulted in afresh at every step. By default a quarter of the machine's
        memory, at most 4 GiB. Lowering it gives memory back to the system at once; 0 keeps none.
        A negative number raises RuntimeError.
        """
        return _C.memory_pool()

    @memory_pool.setter
    def memory_pool(self, bytes: int) -> None:
        _C.set_memory_pool(bytes)

    def __repr__(self) -> str:
        """Show every switch."""
        return (
            f"Config(winograd={self.winograd}, convolution={self.convolution!r}, "
            f"memory_pool={self.memory_pool})"
        )


config = Config()

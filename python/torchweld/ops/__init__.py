"""Functional operators; ``torch.ops.torchweld`` with documentation and defaults."""

from torchweld.ops.conv_bn_relu import *  # noqa: F403
from torchweld.ops.conv_bn_relu import __all__ as _conv_bn_relu

__all__ = [*_conv_bn_relu]

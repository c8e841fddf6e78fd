"""What Python adds to the registered ops: fake kernels, derivatives, autocast."""

from torchweld._dispatch import conv_bn_relu

__all__ = ["conv_bn_relu"]

"""What torch needs to know of each operator beyond its kernels: shapes, gradients, autocast."""

from torchweld._dispatch import adamw as adamw

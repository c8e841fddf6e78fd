"""Documented functions over ``torch.ops.torchweld``."""

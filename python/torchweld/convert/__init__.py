"""Converts whole models: ``weld`` and ``unweld``."""

from torchweld.convert._convert import unweld, weld

__all__ = ["unweld", "weld"]

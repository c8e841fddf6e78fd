"""Puts the operators of an emulated CUDA library in the place of the CPU's.

A plugin for pytest in a process of its own: what it loads cannot be unloaded.
"""

import os

import torch
import torchweld  # noqa: F401 registers what is replaced


def registration() -> str:
    """Return where the operator that a CPU tensor gets was registered."""
    lines = torch._C._dispatch_dump(f"torchweld::{os.environ['TORCHWELD_EMULATED_OP']}")
    return next(line for line in lines.splitlines() if line.startswith("CPU:"))


before = registration()
torch.ops.load_library(os.environ["TORCHWELD_EMULATED_LIBRARY"])
if registration() == before:
    raise RuntimeError("the CPU's operators are still there")

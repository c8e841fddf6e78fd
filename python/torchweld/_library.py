"""Finds the compiled libraries, and loads them on import."""

from __future__ import annotations

from pathlib import Path

import torch

# torch first: _C and the operator library resolve torch's symbols from what is already loaded.
from torchweld import _C

# In an editable install Python files stay in the checkout and binaries land in site-packages, so
# every path is taken from the compiled module.
root = Path(_C.__file__).parent
ops_library = root / "lib" / "libtorchweld_ops.so"
cuda_library = root / "lib" / "libtorchweld_cuda.so"
cmake_prefix_path = str(root / "share" / "cmake")

# Raises RuntimeError if TORCHWELD_CPU_CAPABILITY names an instruction set that is unknown or that
# this machine cannot run: better here than at the first operator.
_C.cpu_capability()

# Registers the operators under torch.ops.torchweld.
torch.ops.load_library(ops_library)


def _load_cuda() -> str:
    """Load the CUDA library if there is one and torch has CUDA; return what became of it.

    Loading registers operators and asks nothing of a driver, which the first operator does: so it
    needs no GPU, and leaves a process free to fork.
    """
    if not _C.cuda_architectures:
        return "none"
    if torch.version.cuda is None:
        return "not loaded: this torch has no CUDA"
    try:
        torch.ops.load_library(cuda_library)
    except OSError as error:
        return f"not loaded: {error}"
    return "loaded"


cuda_status = _load_cuda()

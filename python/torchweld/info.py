"""What is installed and in use."""

from __future__ import annotations

import platform

import torch

from torchweld import _C, _library


def info() -> dict[str, str]:
    """Return versions, the instruction set in use, and where the libraries are.

    Returns:
        Facts by name, in the order they are worth reading. All values are text.

    Example:
        >>> import torchweld as tw
        >>> tw.info()["cpu capability"] .startswith(("scalar", "avx"))
        True
    """
    return {
        "torchweld": _C.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "torch ABI target": f"{_C.torch_abi_target} (runs in every torch from this release on)",
        "cpu capability": _C.cpu_capability(),
        "cpu capabilities available": _C.available_cpu_capabilities().replace(",", ", "),
        "threads": str(torch.get_num_threads()),
        "cuda architectures": _C.cuda_architectures or "none (built without nvcc or CUDA in torch)",
        "cuda library": _library.cuda_status,
        "operator library": str(_library.ops_library),
        "cmake prefix path": _library.cmake_prefix_path,
    }

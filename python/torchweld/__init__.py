"""torchweld: fused operators for PyTorch, for CPU and CUDA, from Python and from C++."""

from torchweld import _library

_library.load()

from torchweld import _dispatch, nn, ops  # noqa: E402, F401
from torchweld._C import __version__  # noqa: E402
from torchweld._library import cmake_prefix_path  # noqa: E402
from torchweld.export import export  # noqa: E402
from torchweld.info import info  # noqa: E402
from torchweld.quantization import Int4, Int8, Int8WeightOnly, quantize  # noqa: E402
from torchweld.report import Report, report  # noqa: E402

__all__ = [
    "Int4",
    "Int8",
    "Int8WeightOnly",
    "Report",
    "__version__",
    "cmake_prefix_path",
    "export",
    "info",
    "nn",
    "ops",
    "quantize",
    "report",
]

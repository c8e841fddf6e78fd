"""torchweld: fused operators for PyTorch, for CPU and CUDA, from Python and from C++."""

from torchweld import _dispatch as _dispatch
from torchweld import amp, nn, ops, optim, quantization
from torchweld._C import __version__
from torchweld._config import config
from torchweld._library import cmake_prefix_path
from torchweld.convert import unweld, weld
from torchweld.export import export
from torchweld.info import info
from torchweld.quantization import Int4, Int8, Int8WeightOnly, prepare_qat, quantize
from torchweld.report import Report, report

__all__ = [
    "Int4",
    "Int8",
    "Int8WeightOnly",
    "Report",
    "__version__",
    "amp",
    "cmake_prefix_path",
    "config",
    "export",
    "info",
    "nn",
    "ops",
    "optim",
    "prepare_qat",
    "quantization",
    "quantize",
    "report",
    "unweld",
    "weld",
]

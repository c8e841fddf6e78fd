"""Tests of what runs on a GPU; without one they are skipped and say why."""

from pathlib import Path

import pytest
import torch
from torchweld import _library


def reason_to_skip() -> str | None:
    if _library.cuda_status != "loaded":
        return f"CUDA library: {_library.cuda_status}"
    if not torch.cuda.is_available():
        return "no GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    if reason is None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))

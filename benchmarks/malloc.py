"""The state of malloc a run is in: whether large tensors get memory whose pages are there already.

Touching a page for the first time can cost more than the arithmetic on it. glibc maps large blocks
afresh or keeps them, by a threshold that moves with what was freed before, so a run says which it
wants. Both are read when a process starts, hence the new one.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# mallopt(3): no block is mapped, and what is freed stays in the heap; or every block of 1 MiB
# or more is mapped, and the heap gives back its end.
STATES: Mapping[str, Mapping[str, str]] = {
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
    "fresh": {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"},
    "tcmalloc": {"LD_PRELOAD": "tcmalloc"},
    "default": {},
}


def environment(state: str, current: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process in that state.

    Raises:
        FileNotFoundError: tcmalloc is not installed.
    """
    kept = {k: v for k, v in current.items() if k not in _settings(current)}
    wanted = dict(STATES[state])
    if "LD_PRELOAD" in wanted:
        names = map(ctypes.util.find_library, ("tcmalloc_minimal", "tcmalloc"))
        library = next(filter(None, names), None)
        if library is None:
            raise FileNotFoundError(
                "expected libtcmalloc_minimal (Debian: libtcmalloc-minimal4), found none"
            )
        wanted["LD_PRELOAD"] = library
    return kept | wanted


def enter(state: str) -> None:
    """Start this process again if it is in another state.

    Raises:
        FileNotFoundError: see :func:`environment`.
    """
    wanted = environment(state, os.environ)
    if _settings(wanted) != _settings(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, wanted)


def describe() -> str:
    """Return the name of the state, or what else was set."""
    found = _settings(os.environ)
    for state, settings in STATES.items():
        if found == settings:
            return state
    if "tcmalloc" in found.get("LD_PRELOAD", "") and len(found) == 1:
        return "tcmalloc"
    # File names only: where a library lies says nothing to a reader elsewhere.
    return " ".join(f"{k}={Path(v).name}" for k, v in found.items())


def _settings(variables: Mapping[str, str]) -> dict[str, str]:
    names = sorted(k for k in variables if k.startswith("MALLOC_"))
    return {k: variables[k] for k in (*names, "GLIBC_TUNABLES", "LD_PRELOAD") if k in variables}

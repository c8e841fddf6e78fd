"""Prints what `-Xptxas -v` says of every kernel, as a table.

Fails if one spills registers, or has products of warpgroups that wait for one another.
"""

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
    re.S,
)


def main(log: Path) -> str | None:
    """Print the table; return what is wrong, if anything."""
    text = log.read_text()
    # Entry by entry, so that no expression runs on into the next one.
    parts = re.split(r"(?=ptxas info\s+: Compiling entry)", text)
    kernels: dict[str, dict[str, re.Match[str]]] = {}
    for part in parts:
        if found := ENTRY.search(part):
            kernels.setdefault(readable(found["name"]), {})[found["arch"]] = found
    archs = sorted({arch for entries in kernels.values() for arch in entries})
    if not kernels:
        return "no kernel in the log"
    print(f"registers of {len(kernels)} kernels on {', '.join(archs)}:")
    for name, entries in sorted(kernels.items()):
        registers = "  ".join(
            entries[a]["registers"].rjust(3) if a in entries else "  -" for a in archs
        )
        print(f"  {registers}  {name}")
    if waits := re.findall(r".*wgmma.*serialized.*", text):
        return "\n".join(waits)
    spills = [
        f"{name} on {arch}"
        for name, entries in kernels.items()
        for arch, entry in entries.items()
        if int(entry["stores"]) + int(entry["loads"]) > 0
    ]
    return f"registers are spilled: {', '.join(spills)}" if spills else None


def readable(symbol: str) -> str:
    """Return the name of a kernel without its parameters and namespaces."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"torchweld::kernels::(cuda::)?|\(anonymous namespace\)::|^void ", "", name)
    return name[: name.rindex("(")]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""``python -m torchweld``."""

from __future__ import annotations

import argparse

from torchweld.info import info


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torchweld",
        description="Fused operators for PyTorch.",
        epilog="TORCHWELD_CPU_CAPABILITY=scalar|avx2|avx512|avx512_vnni|avx512_bf16 forces an "
        "instruction set.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="print versions, instruction sets, threads and library paths")
    parser.parse_args()

    facts = info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()

"""Lists the stable-ABI functions that every given torch offers, for tests/build/shim_2_10.txt.

    python tools/list_shims.py TORCH_OF_X86_64 TORCH_OF_AARCH64 > tests/build/shim_2_10.txt

Run it on the oldest supported torch of each machine, unpacked anywhere: a wheel that needs a
function outside of the list would fail to load there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import elf

#: Prefixes of libtorch's C functions. Everything else it exports is C++, whose ABI is not stable.
PREFIXES = ("aoti_torch_", "torch_")


def main() -> None:
    """Prints one function a line, sorted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "torch", type=Path, nargs="+", help="directory of an installed or unpacked torch"
    )
    offered = [elf.read(t / "lib" / "libtorch_cpu.so").defined for t in parser.parse_args().torch]
    shared = frozenset.intersection(*offered)
    print("\n".join(sorted(s for s in shared if s.startswith(PREFIXES))))


if __name__ == "__main__":
    main()

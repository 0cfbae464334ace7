"""Makes a libtorch_cpu.so to link against where the target's torch is not installed.

    python tools/make_stub.py DIR/libtorch_cpu.so --compiler aarch64-linux-gnu-gcc

It defines the functions of tests/build/shim_2_10.txt, all empty, and nothing else: a library that
needs a function which torch 2.10 does not have fails to link.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SHIMS = Path(__file__).resolve().parent.parent / "tests" / "build" / "shim_2_10.txt"


def make_stub(output: Path, symbols: list[str], compiler: str) -> None:
    """Compiles one empty function per symbol into a shared library named libtorch_cpu.so."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    source = "".join(f"void {symbol}(void) {{}}\n" for symbol in symbols)
    command = [compiler, "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libtorch_cpu.so"]
    subprocess.run(
        [*command, "-x", "c", "-", "-o", str(temporary)], input=source, text=True, check=True
    )
    temporary.rename(output)


def main() -> int:
    """Writes the library named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--compiler", default="cc", help="a C compiler of the target; default: cc")
    arguments = parser.parse_args()
    symbols = SHIMS.read_text().split()
    make_stub(arguments.output, symbols, arguments.compiler)
    print(f"wrote {arguments.output}: {len(symbols)} functions of torch 2.10")
    return 0


if __name__ == "__main__":
    sys.exit(main())

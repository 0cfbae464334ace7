"""What a shared library asks of others and offers to them, read with pyelftools."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection


@dataclass(frozen=True)
class Library:
    """The dynamic section and the dynamic symbols of one ELF file."""

    machine: str  # "x86_64", "aarch64": the last part of a wheel's platform tag
    needed: tuple[str, ...]
    run_paths: tuple[str, ...]  # RPATH and RUNPATH
    undefined: frozenset[str]
    defined: frozenset[str]


#: ELF's names of machines, where the tags of wheels use another one.
MACHINES = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}


def read(source: Path | bytes) -> Library:
    """Reads a library from a file or from its bytes."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    elf = ELFFile(io.BytesIO(data))
    dynamic = elf.get_section_by_name(".dynamic")
    symbols = elf.get_section_by_name(".dynsym")
    if not isinstance(dynamic, DynamicSection) or not isinstance(symbols, SymbolTableSection):
        raise ValueError("not a shared library: it has no dynamic section")
    tags: list[Any] = list(dynamic.iter_tags())  # their attributes are named after their kind
    names = [(s.name.split("@")[0], s["st_shndx"] == "SHN_UNDEF") for s in symbols.iter_symbols()]
    return Library(
        machine=MACHINES.get(elf["e_machine"], elf["e_machine"]),
        needed=tuple(t.needed for t in tags if t.entry.d_tag == "DT_NEEDED"),
        run_paths=tuple(
            t.rpath if t.entry.d_tag == "DT_RPATH" else t.runpath
            for t in tags
            if t.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")
        ),
        undefined=frozenset(name for name, missing in names if missing and name),
        defined=frozenset(name for name, missing in names if not missing and name),
    )

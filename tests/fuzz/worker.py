"""Fuzzes one reader with Atheris (libFuzzer), guided by the branches that an input reaches.

``run.py`` starts this in a process of its own: a crash of native code ends the process, and
libFuzzer leaves the input behind.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import atheris

from sapwood._files import atomic_write_text
from tests.fuzz.judge import Judge, limit_memory
from tests.fuzz.mutators import mutate
from tests.fuzz.readers import READERS

#: Modules whose branches guide.
_GUIDES = (
    *("sapwood._files", "sapwood.data", "sapwood.gaussian", "sapwood.pruning", "sapwood.ops._cost"),
    *("sapwood.ops._dispatch", "sapwood.minimize.storage", "sapwood.minimize.plan"),
    *("sapwood.minimize._cycle", "sapwood.minimize.modules", "sapwood.cli.checkpoints"),
    *("zipfile", "gzip", "pickletools"),
)
_NATIVE = 0.25  # share of inputs that libFuzzer's own mutations make, from what it learned
_AFRESH = 0.5  # share of the others that begin from an intact file


def watch_branches() -> None:
    """Instruments what is imported; Atheris' import hook does not see an editable installation."""
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(_GUIDES) or module is None:
            continue
        for owner in (module, *(c for c in vars(module).values() if inspect.isclass(c))):
            for value in list(vars(owner).values()):
                function = getattr(value, "__func__", value)  # of class and static methods
                if inspect.isfunction(function) and function.__module__ == name:
                    atheris.instrument_func(function)


def custom_mutator(seeds: list[bytes], name: str) -> Callable[[bytes, int, int], bytes]:
    repair = READERS[name].repair

    def change(content: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < _NATIVE:
            changed: bytes = atheris.Mutate(content, most)
            return changed
        if random.random() < _AFRESH:
            content = random.choice(seeds)
        return mutate(content, random, seeds, repair)[:most]

    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", required=True)
    parser.add_argument("--executions", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--tally", type=Path, required=True)
    chosen = parser.parse_args()
    seeds = READERS[chosen.reader].seeds()
    with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(content)
        judge = Judge(READERS[chosen.reader], Path(folder), chosen.keep)
        watch_branches()
        limit_memory()
        written = 0.0

        def once(content: bytes) -> None:
            nonlocal written
            judge(content)
            done = judge.tally.executions >= chosen.executions
            if done or time.monotonic() - written > 0.5:
                written = time.monotonic()
                atomic_write_text(chosen.tally, json.dumps(judge.tally.to_dict()))
            if done:
                os._exit(0)  # libFuzzer itself counts otherwise

        arguments = [
            *(sys.argv[0], corpus, f"-seed={chosen.seed}", "-timeout=20", "-rss_limit_mb=0"),
            *(
                f"-artifact_prefix={chosen.keep}/{chosen.reader}-",
                "-max_len=65536",
                "-len_control=0",
            ),
        ]
        atheris.Setup(arguments, once, custom_mutator=custom_mutator(seeds, chosen.reader))
        atheris.Fuzz()


if __name__ == "__main__":
    main()

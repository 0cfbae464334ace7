"""Compares two commits in bench/history.csv: ``python bench/compare.py A B``.

Exit status 1 when the ratio of a case worsened by more than 15 % on the same machine, 2 when the
two commits have no measurement in common.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import history

WORSE = 1.15
_SAME = ("machine", "op", "case", "provider", "dtype")


def compare(
    rows: Sequence[history.Row], before: str, after: str
) -> list[tuple[tuple[str, ...], float, float]]:
    """(machine, op, case, provider, dtype) with the ratio of both commits, where both have one."""

    def ratios(commit: str) -> dict[tuple[str, ...], float]:
        matching = [row for row in rows if row["commit"].startswith(commit)]
        if len({row["commit"] for row in matching}) > 1:
            raise SystemExit(f"{commit} stands for several commits in the history")
        return {tuple(row[c] for c in _SAME): float(row["ratio"]) for row in matching}

    old, new = ratios(before), ratios(after)
    return [(case, old[case], new[case]) for case in old if case in new]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", help="commit, or the beginning of its id")
    parser.add_argument("after", help="commit, or the beginning of its id")
    parser.add_argument("--history", type=Path, default=history.FILE)
    options = parser.parse_args(arguments)
    pairs = compare(history.read(options.history), options.before, options.after)
    if not pairs:
        print(f"{options.before} and {options.after} have no measurement in common")
        return 2
    worse = [(case, old, new) for case, old, new in pairs if new > WORSE * old]
    for case, old, new in worse:
        print(f"worse: {', '.join(case)}: ratio {old:.3f} -> {new:.3f} ({new / old - 1:+.0%})")
    print(f"{len(pairs)} compared, {len(worse)} worse by more than {WORSE - 1:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())

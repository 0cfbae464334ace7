"""Fails when a test run skipped more or less than it may, or for a reason that is not listed.

    python tools/check_skips.py build/ci/tests.xml --count 1 "real data is absent"

Reads a JUnit report of pytest. A suite that skips whatever it cannot run is green and empty, so the
reasons that may skip are named here; without any, nothing may skip.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def skipped(report: Path) -> Counter[str]:
    """How often each reason occurs."""
    root = ElementTree.parse(report).getroot()
    return Counter(node.get("message", "") for node in root.iter("skipped"))


def main() -> int:
    """Prints the reasons and compares them with the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("allowed", nargs="*", help="beginnings of reasons that may skip")
    parser.add_argument("--count", type=int, default=0, help="how many tests skip; default: 0")
    arguments = parser.parse_intermixed_args()
    reasons = skipped(arguments.report)
    unexpected = [r for r in reasons if not r.startswith(tuple(arguments.allowed))]
    print(f"{reasons.total()} skipped, {arguments.count} expected")
    for reason, count in reasons.most_common():
        print(f"  {count:4d}  {reason}{'  (not allowed)' if reason in unexpected else ''}")
    return int(bool(unexpected) or reasons.total() != arguments.count)


if __name__ == "__main__":
    sys.exit(main())

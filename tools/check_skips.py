"""Fails when a test run skipped something for a reason that is not on the list.

    python tools/check_skips.py build/ci/tests.xml "real data is absent"

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
    arguments = parser.parse_args()
    reasons = skipped(arguments.report)
    unexpected = [r for r in reasons if not r.startswith(tuple(arguments.allowed))]
    print(f"{sum(reasons.values())} skipped")
    for reason, count in reasons.most_common():
        print(f"  {count:4d}  {reason}{'  (not allowed)' if reason in unexpected else ''}")
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())

"""``python -m sapwood``: a report on this installation; with a command, the same as ``sapwood``."""

from __future__ import annotations

import sys

from sapwood.cli import main

if __name__ == "__main__":
    main(sys.argv[1:] if sys.argv[1:] and sys.argv[1] != "--json" else ["info", *sys.argv[1:]])

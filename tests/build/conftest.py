"""Makes the scripts of tools/ and the build backend importable."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tools", "build_support"):
    sys.path.insert(0, str(ROOT / folder))

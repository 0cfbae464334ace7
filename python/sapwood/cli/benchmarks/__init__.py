"""What can be timed: one module per family, each with its cases and its providers."""

from __future__ import annotations

#: Families with a benchmark module in this package.
FAMILIES = ("masked_matmul", "logsemiring", "similarity", "splat2d", "copruned_conv")

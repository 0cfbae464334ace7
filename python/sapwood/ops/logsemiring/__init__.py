"""Sums and products in the log semiring, exact for -inf and at any scale of the logits.

:func:`log_matmul` and what is built on it (:func:`log_einsum`, :func:`log_conv`), the max-plus twin
and exact sampling, segments, chains, and elementwise functions with derivatives right at infinity.
"""

from sapwood.ops.logsemiring._einsum import log_einsum
from sapwood.ops.logsemiring._elementwise import log1mexp, log_normalize, logaddexp, logsumexp
from sapwood.ops.logsemiring._matmul import MaxMatmul, log_matmul, max_matmul, sample_matmul
from sapwood.ops.logsemiring._segment import SegmentPlan, segment_logsumexp
from sapwood.ops.logsemiring._sequence import log_conv, log_scan

__all__ = [
    "MaxMatmul",
    "SegmentPlan",
    "log1mexp",
    "log_conv",
    "log_einsum",
    "log_matmul",
    "log_normalize",
    "log_scan",
    "logaddexp",
    "logsumexp",
    "max_matmul",
    "sample_matmul",
    "segment_logsumexp",
]

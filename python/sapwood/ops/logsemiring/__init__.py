"""Sums and products in the log semiring, exact for -inf and at any scale of the logits.

:func:`log_matmul` and what is built on it (:func:`log_einsum`, :func:`log_conv`), the max-plus twin
and exact sampling, segments, chains, circuits, and elementwise functions with derivatives right at
infinity.
"""

from sapwood.ops.logsemiring._circuit import CircuitSum, LogCircuit, Selector, log_circuit
from sapwood.ops.logsemiring._einsum import log_einsum
from sapwood.ops.logsemiring._elementwise import log1mexp, log_normalize, logaddexp, logsumexp
from sapwood.ops.logsemiring._matmul import MaxMatmul, log_matmul, max_matmul, sample_matmul
from sapwood.ops.logsemiring._paths import BestPath, log_scan_argmax, log_scan_sample
from sapwood.ops.logsemiring._segment import (
    SegmentMax,
    SegmentPlan,
    segment_logsumexp,
    segment_max,
    segment_softmax,
)
from sapwood.ops.logsemiring._sequence import log_conv, log_scan

__all__ = [
    "BestPath",
    "CircuitSum",
    "LogCircuit",
    "MaxMatmul",
    "SegmentMax",
    "SegmentPlan",
    "Selector",
    "log1mexp",
    "log_circuit",
    "log_conv",
    "log_einsum",
    "log_matmul",
    "log_normalize",
    "log_scan",
    "log_scan_argmax",
    "log_scan_sample",
    "logaddexp",
    "logsumexp",
    "max_matmul",
    "sample_matmul",
    "segment_logsumexp",
    "segment_max",
    "segment_softmax",
]

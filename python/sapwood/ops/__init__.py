"""The kernels as torch ops. Importing this module loads the compiled library."""

from sapwood.ops._dispatch import DispatchTable, calibrate
from sapwood.ops.logsemiring import (
    MaxMatmul,
    SegmentPlan,
    log1mexp,
    log_conv,
    log_einsum,
    log_matmul,
    log_normalize,
    log_scan,
    logaddexp,
    logsumexp,
    max_matmul,
    sample_matmul,
    segment_logsumexp,
)
from sapwood.ops.masked_matmul import (
    Decision,
    PackedWeight,
    explain,
    masked_matmul,
    pack_sparse,
    packed_linear,
    sampled_matmul,
    unpack,
)

__all__ = [
    "Decision",
    "DispatchTable",
    "MaxMatmul",
    "PackedWeight",
    "SegmentPlan",
    "calibrate",
    "explain",
    "log1mexp",
    "log_conv",
    "log_einsum",
    "log_matmul",
    "log_normalize",
    "log_scan",
    "logaddexp",
    "logsumexp",
    "masked_matmul",
    "max_matmul",
    "pack_sparse",
    "packed_linear",
    "sample_matmul",
    "sampled_matmul",
    "segment_logsumexp",
    "unpack",
]

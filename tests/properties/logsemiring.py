"""Arguments of the logsemiring family; its infinities are in ``test_logsemiring.py``."""

from __future__ import annotations

import torch
from torch import Tensor

import tests.test_logsemiring as batteries
from tests import log_circuits
from tests.properties.strategies import SIZES, Arguments, Property, Source

SEED = 1234567890123
_ANY = (0, SIZES[-1])


def _operands(s: Source) -> tuple[Tensor, Tensor]:
    """a (B, M, K) and b (B, K, N); one in three large enough for the certified product."""
    if s.pick((False, False, True)):
        batch, m, k, n = 1, s.size(), s.size(), s.size()
    else:
        batch, m, k, n = s.sizes(_ANY, _ANY, _ANY, _ANY, most=16384)
    return s.normal(batch, m, k), s.normal(batch, k, n)


def _gradient(s: Source, a: Tensor, b: Tensor) -> Tensor:
    return s.normal(a.shape[0], a.shape[1], b.shape[2])


def _product(s: Source) -> Arguments:
    return *_operands(s), s.flag()


def _backward(s: Source) -> Arguments:
    a, b = _operands(s)
    return _gradient(s, a, b), a, b, s.flag(), s.flag(), s.flag()


def _double_backward(s: Source) -> Arguments:
    a, b = _operands(s)
    return _gradient(s, a, b), a, b, s.normal(*a.shape), s.normal(*b.shape)


def _samples(s: Source) -> Arguments:
    return *_operands(s), s.size(0, 3), SEED


def _segments(s: Source) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (O, n, I), where each segment ends, and the order of the entries."""
    outer, n, inner = s.sizes(_ANY, _ANY, _ANY, most=32768)
    count = s.size(1 if n else 0)
    index = torch.randint(max(count, 1), (n,), generator=s.generator)
    is_sorted = s.flag()
    index = index.sort().values if is_sorted else index
    ptr = torch.nn.functional.pad(index.bincount(minlength=count)[:count].cumsum(0), (1, 0))
    x = s.normal(outer, n, inner)
    return x, ptr, None if is_sorted else index.argsort(stable=True)


def _like_values(s: Source, x: Tensor, ptr: Tensor) -> Tensor:
    return s.normal(x.shape[0], len(ptr) - 1, x.shape[2])


def _segments_backward(s: Source) -> Arguments:
    x, ptr, order = _segments(s)
    return _like_values(s, x, ptr), x, ptr, order


def _segments_double_backward(s: Source) -> Arguments:
    x, ptr, order = _segments(s)
    return _like_values(s, x, ptr), x, s.normal(*x.shape), ptr, order


def _chain(s: Source) -> tuple[int, int, int]:
    """Batch, length and states."""
    batch, length, k = s.sizes(_ANY, _ANY, (1, SIZES[-1]), most=4096)
    return batch, length, k


def _scan(s: Source) -> Arguments:
    batch, length, k = _chain(s)
    return s.normal(batch, length, k, k), s.normal(batch, s.size(1, 3), k), s.flag()


def _scan_backward(s: Source) -> Arguments:
    batch, length, k = _chain(s)
    shape = (batch, length + 1, s.size(1, 3), k)
    return s.normal(*shape), s.normal(batch, length, k, k), s.normal(*shape), s.flag()


def _scan_path(s: Source) -> Arguments:
    batch, length, k = _chain(s)
    tensors = s.normal(batch, length, k, k), s.normal(batch, length + 1, k), s.normal(batch, k)
    return *tensors, s.size(0, 3), SEED, s.flag()


def _circuit(s: Source) -> Arguments:
    """Lists and terms of all lengths; some evidence is not known."""
    seed = int(torch.randint(10_000, (), generator=s.generator))
    inputs = s.size()
    circuit, columns = log_circuits.anything(seed, inputs, s.size(0, 33))
    blocks = s.pick([m for m in (1, 2, 3) if inputs % m == 0])
    rows = s.size()
    x = s.normal(blocks, rows, inputs // blocks)
    seen = log_circuits.evidence(seed, rows, columns)
    return x, seen, circuit.tables(x.device), circuit.counts


def _circuit_backward(s: Source) -> Arguments:
    args = _circuit(s)
    return s.normal(args[0].shape[1], args[3][1]), *args


PROPERTIES = {
    "log_matmul": Property(batteries.TestLogMatmul, _product),
    "log_matmul_backward": Property(batteries.TestLogMatmulBackward, _backward),
    "log_matmul_double_backward": Property(batteries.TestLogMatmulDoubleBackward, _double_backward),
    "max_matmul": Property(batteries.TestMaxMatmul, _operands),
    "sample_matmul": Property(batteries.TestSampleMatmul, _samples),
    "segment_logsumexp": Property(batteries.TestSegmentLogsumexp, _segments),
    "segment_logsumexp_backward": Property(
        batteries.TestSegmentLogsumexpBackward, _segments_backward
    ),
    "segment_logsumexp_double_backward": Property(
        batteries.TestSegmentLogsumexpDoubleBackward, _segments_double_backward
    ),
    "segment_softmax": Property(batteries.TestSegmentSoftmax, _segments),
    "segment_max": Property(batteries.TestSegmentMax, _segments),
    "log_scan": Property(batteries.TestLogScan, _scan),
    "log_scan_backward": Property(batteries.TestLogScanBackward, _scan_backward),
    "log_scan_path": Property(batteries.TestLogScanPath, _scan_path),
    "log_circuit": Property(batteries.TestLogCircuit, _circuit),
    "log_circuit_backward": Property(batteries.TestLogCircuitBackward, _circuit_backward),
}

"""The logsemiring family: the battery of every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sapwood.ops  # noqa: F401  declares the ops
from tests import log_circuits
from tests.check_op import (
    FLOATS,
    HALVES,
    DifferentiableBattery,
    OpBattery,
    Sample,
    TraceableBattery,
    cast,
    outputs,
    pytest_generate_tests,  # noqa: F401  parametrises the battery in this module
)

MAIN = frozenset({"main"})


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


#: (B, M, K, N): small ones run the exact kernel, the others the certified product.
SIZES = [
    (2, 3, 4, 5),
    (1, 1, 1, 1),
    (0, 3, 4, 5),
    (2, 0, 4, 5),
    (1, 4, 6, 0),
    (3, 40, 3, 1),
    (1, 65, 64, 33),
    (2, 49, 70, 40),
]


def operands(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    batch, m, k, n = size
    return normal(batch, m, k), 1.5 * normal(batch, k, n)


def named(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


class LogBattery:
    """Logarithms: the absolute error of log S is the relative error of S."""

    c = 4.0

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return tuple(o.abs() + 1 for o in outputs(self.reference(*args)))  # type: ignore[attr-defined]


class TestLogMatmul(LogBattery, DifferentiableBattery):
    name = "log_matmul"
    vmappable = (0, 1)
    samples = (
        *(
            Sample(named(s), (*operands(s), False), (0, 1), MAIN if i == 0 else frozenset())
            for i, s in enumerate(SIZES)
        ),
        Sample("exact", (*operands((1, 20, 30, 35)), True)),
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[2])


def backward_args(size: tuple[int, ...], exact: bool = False, **need: bool) -> tuple[Any, ...]:
    batch, m, _, n = size
    return (
        normal(batch, m, n),
        *operands(size),
        exact,
        need.get("a", True),
        need.get("b", True),
    )


class GradientBattery:
    """Gradients: sums of grad times a probability, whose exponent carries the rounding of a + b."""

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(8, args[1].shape[1] + args[1].shape[2] + args[2].shape[2])

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = outputs(self.reference(args[0].abs(), *args[1:]))  # type: ignore[attr-defined]
        return found


class TestLogMatmulBackward(GradientBattery, DifferentiableBattery):
    name = "log_matmul_backward"
    vmappable = (0, 1, 2)
    samples = (
        Sample("main", backward_args((1, 2, 3, 2)), (0, 1, 2), MAIN),
        *(Sample(named(s), backward_args(s)) for s in SIZES),
        Sample("exact", backward_args((1, 20, 30, 35), True)),
        Sample("a only", backward_args((1, 20, 30, 35), b=False)),
        Sample("b only", backward_args((1, 20, 30, 35), a=False)),
    )


class TestLogMatmulDoubleBackward(DifferentiableBattery):
    name = "log_matmul_double_backward"
    vmappable = (0, 1, 2, 3, 4)
    samples = tuple(
        Sample(
            named(s),
            (*backward_args(s)[:3], normal(*operands(s)[0].shape), normal(*operands(s)[1].shape)),
            (0, 1, 2, 3, 4) if i == 0 else (),
            MAIN if i == 0 else frozenset(),
        )
        for i, s in enumerate([(1, 2, 3, 2), (0, 3, 4, 5), (2, 20, 13, 35)])
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(8, args[1].shape[1] + args[1].shape[2] + args[2].shape[2])

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        grad, a, b, ta, tb = args
        terms = ta.abs()[..., None] + tb.abs()[:, None]  # (B, M, K, N)
        p = torch.softmax(a[..., None] + b[:, None], 2)
        mean = (p * terms).sum(2)
        weighted = grad.abs()[:, :, None] * p * (terms + mean[:, :, None])
        return mean, weighted.sum(3), weighted.sum(1)


class TestMaxMatmul(DifferentiableBattery):
    name = "max_matmul"
    exact = True
    vmappable = (0, 1)
    samples = tuple(
        Sample(named(s), operands(s), (0, 1), MAIN if i == 0 else frozenset())
        for i, s in enumerate(SIZES)
    )


class TestSampleMatmul(TraceableBattery):
    name = "sample_matmul"
    exact = True
    samples = tuple(
        Sample(named(s), (*operands(s), 3, 1234567890123), (), MAIN if i == 0 else frozenset())
        for i, s in enumerate(SIZES[:6])
    )


def segments(n: int, count: int, outer: int, inner: int, ordered: bool) -> tuple[Any, ...]:
    index = torch.arange(n) % count  # no segment is empty
    order = None if ordered else index.argsort(stable=True)
    ptr = torch.nn.functional.pad(index.bincount(minlength=count).cumsum(0), (1, 0))
    return normal(outer, n, inner), ptr, order


SEGMENTS = (
    Sample("main", segments(7, 3, 2, 2, False), (0,), MAIN),
    Sample("ordered", segments(6, 2, 1, 3, True), (0,)),
    Sample("no entries", (normal(2, 0, 2), torch.zeros(1, dtype=torch.long), None)),
    Sample("wide", segments(50, 7, 2, 130, False)),
    Sample("long", segments(5000, 3, 1, 1, True)),
)


class TestSegmentLogsumexp(LogBattery, DifferentiableBattery):
    name = "segment_logsumexp"
    vmappable = (0,)
    samples = SEGMENTS

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(8, int(args[0].shape[1]))


def segment_backward(n: int, count: int, *rest: Any) -> tuple[Any, ...]:
    x, ptr, order = segments(n, count, *rest)
    return normal(x.shape[0], count, x.shape[2]), x, ptr, order


class TestSegmentLogsumexpBackward(DifferentiableBattery):
    name = "segment_logsumexp_backward"
    vmappable = (0, 1)
    samples = (
        Sample("main", segment_backward(7, 3, 2, 2, False), (0, 1), MAIN),
        Sample("ordered", segment_backward(6, 2, 1, 3, True), (0, 1)),
        Sample("no entries", (normal(2, 0, 2), *SEGMENTS[2].args)),
        Sample("wide", segment_backward(50, 7, 2, 130, False)),
        Sample("long", segment_backward(5000, 3, 1, 1, True)),
        Sample("one column", segment_backward(500, 7, 2, 1, False)),
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(8, int(args[1].shape[1]))

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return outputs(self.reference(args[0].abs(), *args[1:]))


def segment_second(*size: Any) -> tuple[Any, ...]:
    grad, x, ptr, order = segment_backward(*size)
    return grad, x, normal(*reversed(x.shape)).mT.reshape(x.shape), ptr, order


class TestSegmentLogsumexpDoubleBackward(DifferentiableBattery):
    name = "segment_logsumexp_double_backward"
    vmappable = (0, 1, 2)
    samples = (
        Sample("main", segment_second(7, 3, 2, 2, False), (0, 1, 2), MAIN),
        Sample("ordered", segment_second(6, 2, 1, 3, True), (0, 1, 2)),
        Sample("no entries", (normal(2, 0, 2), normal(2, 0, 2), *SEGMENTS[2].args)),
        Sample("wide", segment_second(50, 7, 2, 130, False)),
        Sample("one column", segment_second(500, 7, 2, 1, False)),
    )

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(8, int(args[1].shape[1]))

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        grad, x, tangent, ptr, order = args
        mean, _ = self.reference(grad, x, tangent.abs(), ptr, order)
        flat = torch.zeros_like(tangent)
        _, spread = self.reference(grad.abs(), x, flat + tangent.abs(), ptr, order)
        p = torch.ops.sapwood.segment_softmax(x, ptr, order)
        return mean.abs() + 1e-3, spread.abs() + p + 1e-3


class TestSegmentSoftmax(DifferentiableBattery):
    name = "segment_softmax"
    vmappable = (0,)
    samples = SEGMENTS

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(8, int(args[0].shape[1]))

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return outputs(self.reference(*args))


class TestSegmentMax(DifferentiableBattery):
    name = "segment_max"
    exact = True
    vmappable = (0,)
    samples = SEGMENTS


# B, L, k, R: chains alone, some and more than one kernel takes side by side, and a large matrix
CHAINS = [(2, 3, 2, 2), (1, 0, 3, 1), (0, 2, 2, 2), (2, 40, 5, 1), (9, 20, 3, 2), (2, 2, 33, 1)]


def chain(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    batch, length, k, rows = size
    return normal(batch, length, k, k), normal(batch, rows, k)


class WideBattery(OpBattery):
    """States are float64 whatever the input."""

    @pytest.mark.smoke
    @pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
    def test_forward(self, sample: Sample, dtype: torch.dtype) -> None:
        args = cast(sample.args, dtype)
        actual, expected = self.op(*args), self.reference(*args)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestLogScan(WideBattery, DifferentiableBattery):
    name = "log_scan"
    vmappable = (0, 1)
    samples = tuple(
        Sample(
            f"{named(s)}{' max' if maximum else ''}",
            (*chain(s), maximum),
            (0, 1),
            MAIN if i == 0 else frozenset(),
        )
        for maximum in (False, True)
        for i, s in enumerate(CHAINS)
    )


def scan_backward(size: tuple[int, ...]) -> tuple[Tensor, ...]:
    batch, length, k, rows = size
    shape = (batch, length + 1, rows, k)
    return normal(*shape), normal(batch, length, k, k), 0.5 * normal(*shape)


class TestLogScanBackward(DifferentiableBattery):
    name = "log_scan_backward"
    vmappable = (0, 1, 2)
    samples = tuple(
        Sample(
            f"{named(s)}{' max' if maximum else ''}",
            (*scan_backward(s), maximum),
            (0,) if maximum else (0, 1, 2),
            MAIN if i == 0 and not maximum else frozenset(),
        )
        for maximum in (False, True)
        for i, s in enumerate([(1, 2, 2, 1), *CHAINS[1:]])
    )

    def shortened(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        grad, t, states, maximum = args
        steps = min(4, t.shape[1])
        return grad[:, : steps + 1], t[:, :steps], states[:, : steps + 1], maximum

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(8, args[1].shape[1] * args[1].shape[2] * args[0].shape[2])

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return outputs(self.reference(args[0].abs(), *args[1:]))


def path_args(size: tuple[int, ...], maximum: bool) -> tuple[Any, ...]:
    batch, length, k = size
    states = normal(batch, length + 1, k)
    return (normal(batch, length, k, k), states, normal(batch, k), 3, 1234567890123, maximum)


class TestLogScanPath(TraceableBattery):
    name = "log_scan_path"
    exact = True
    samples = tuple(
        Sample(
            f"{named(s)}{' max' if maximum else ''}",
            path_args(s, maximum),
            (),
            MAIN if i == 0 else frozenset(),
        )
        for maximum in (False, True)
        for i, s in enumerate([(2, 3, 4), (1, 0, 3), (0, 2, 2), (9, 20, 1), (2, 2, 33)])
    )


def differentiable(args: tuple[Any, ...]) -> tuple[int, ...]:
    """x, unless a result is -inf: that has no difference to take."""
    values = torch.ops.sapwood.log_circuit(*args)
    return (0,) if bool(values.isfinite().all()) else ()


class CircuitBattery(DifferentiableBattery):
    """Values of all columns bound the error: each is a sum of some of the others."""

    def reduction(self, args: tuple[Any, ...]) -> int:
        counts = args[-1]
        return max(8, int(counts[4]) + int(counts[6]))  # sums and terms


class TestLogCircuit(LogBattery, CircuitBattery):
    name = "log_circuit"
    vmappable = (0,)
    samples = tuple(
        Sample(name, args, differentiable(args), MAIN if name == "main" else frozenset())
        for name, args in log_circuits.samples()
    )


class TestLogCircuitBackward(CircuitBattery):
    name = "log_circuit_backward"
    vmappable = (0, 1)
    samples = tuple(
        Sample(
            name,
            (normal(args[0].shape[1], args[3][1]), *args),
            (0, 1) if differentiable(args) else (),
            MAIN if name == "main" else frozenset(),
        )
        for name, args in log_circuits.samples()
    )

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_opcheck(self, sample: Sample, dtype: torch.dtype) -> None:
        """Its derivative reads the tables: compiled functions have the first one only."""
        super().test_opcheck(Sample(sample.id, sample.args), dtype)

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Slopes of normalised inputs are differences: their terms are those without heads."""
        grad, x, evidence, tables, counts = args
        plain = [*counts[:2], 0, *counts[3:]]
        heads = tables[counts[1] : counts[1] + 2 * counts[2]].view(-1, 2).tolist()
        tables = torch.cat([tables[: counts[1]], tables[counts[1] + 2 * counts[2] :]])
        flat = x.transpose(0, 1).flatten(1).clone()
        for begin, end in heads:
            flat[:, begin:end] = flat[:, begin:end].log_softmax(1)
        slopes = self.reference(grad.abs(), flat.unsqueeze(0), evidence, tables, plain)[0]
        for begin, end in heads:
            slopes[:, begin:end] += flat[:, begin:end].exp() * slopes[:, begin:end].sum(1, True)
        blocks, rows, width = x.shape
        return (slopes.view(rows, blocks, width).transpose(0, 1),)

"""The masked_matmul family: samples of every op, and the battery over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood.ops.masked_matmul import ACTIVATIONS
from sapwood.reference import masked_matmul as reference
from tests.check_op import (
    DifferentiableBattery,
    OpBattery,
    Sample,
    TraceableBattery,
    floating,
    pytest_generate_tests,  # noqa: F401  parametrises the battery in this module
)

MAIN = (9, 33, 17)  # batch, in, out
SHAPES = [
    MAIN,
    (0, 7, 5),
    (1, 1, 1),
    (3, 0, 4),
    (2, 5, 0),
    (1, 129, 130),
    (8, 130, 151),
    (65, 64, 48),
    (17, 257, 33),
]
GRADCHECK_SHAPES = [(3, 5, 4), (2, 7, 3), (4, 3, 6), (1, 17, 2), (5, 2, 2)]
SPARSITIES = (0.0, 0.5, 0.9, 1.0)


def problem(batch: int, k: int, n: int, sparsity: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(batch * 1000003 + k * 1009 + n * 7 + int(sparsity * 100))
    mask = torch.rand(n, k, generator=g) >= sparsity
    if n > 2:
        mask[0], mask[1] = False, True  # an empty row and a full one
    return {
        "x": torch.randn(batch, k, generator=g),
        "weight": torch.randn(n, k, generator=g),
        "mask": mask,
        "bias": torch.randn(n, generator=g),
        "grad": torch.randn(batch, n, generator=g),
    }


def each_problem() -> list[tuple[str, frozenset[str], dict[str, Tensor]]]:
    found = []
    for b, k, n in SHAPES + GRADCHECK_SHAPES:
        for s in SPARSITIES if (b, k, n) == MAIN else (0.4,):
            tags = frozenset({"main"} if ((b, k, n), s) == (MAIN, 0.5) else ())
            found.append((f"{b}x{k}x{n}-{s}", tags, problem(b, k, n, s)))
    return found


def samples(
    make: Callable[[dict[str, Tensor]], tuple[Any, ...]],
    grad: tuple[int, ...] = (),
    label: str = "",
) -> list[Sample]:
    return [Sample(i + label, make(p), grad, tags) for i, tags, p in each_problem()]


def structure(p: dict[str, Tensor], fmt: str) -> tuple[Tensor, ...]:
    """Values and index tensors of a format, built by the reference."""
    packer = {
        "csr": reference.pack_csr,
        "bitmap": reference.pack_bitmap,
        "sell": reference.pack_sell,
    }
    return packer[fmt](p["weight"], p["mask"])


NOT_TRANSPOSED = (None, None, None, None)


class TestMaskedMatmul(DifferentiableBattery):
    name = "masked_matmul"
    bitwise = False
    vmappable = (0, 1, 3)
    samples = samples(
        lambda p: (p["x"], p["weight"], p["mask"], p["bias"], False), grad=(0, 1, 3)
    ) + [
        Sample(f"{i}-no-bias", (p["x"], p["weight"], p["mask"], None, False), (0, 1))
        for i, _, p in each_problem()[:4]
    ]

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[1]) + 1


class TestMaskedMatmulBackward(DifferentiableBattery):
    name = "masked_matmul_backward"
    bitwise = False
    vmappable = (0, 1)
    samples = samples(
        lambda p: (p["grad"], p["x"], p["weight"], p["mask"], True, True, False), grad=(0, 1, 2)
    ) + [
        Sample(f"{i}-{label}", (p["grad"], p["x"], p["weight"], p["mask"], *flags), grad)
        for i, _, p in each_problem()[:2]
        for label, flags, grad in (
            ("only-x", (True, False, False), (0, 2)),
            ("only-weight", (False, True, False), (0, 1)),
            ("neither", (False, False, False), ()),
        )
    ]

    def reduction(self, args: tuple[Any, ...]) -> int:
        return max(args[0].shape)


class TestPackCsr(OpBattery):
    name = "pack_csr"
    exact = True
    samples = samples(lambda p: (p["weight"], p["mask"]))


class TestPackBitmap(OpBattery):
    name = "pack_bitmap"
    exact = True
    samples = samples(lambda p: (p["weight"], p["mask"]))


class TestPackSell(OpBattery):
    name = "pack_sell"
    exact = True
    samples = samples(lambda p: (p["weight"], p["mask"]))


class TestTransposeCsr(TraceableBattery):
    name = "transpose_csr"
    exact = True
    samples = samples(lambda p: (*structure(p, "csr")[1:3], p["weight"].shape[1]))


class LinearBattery:
    """Bounds of the packed products: an activation moves no error by more than a factor 1.13."""

    c = 4.0 * 1.13

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[1]) + 1

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        linear = ["none" if isinstance(a, str) else a.abs() if floating(a) else a for a in args]
        return (self.reference(*linear),)  # type: ignore[attr-defined]


def with_activations(make: Callable[[dict[str, Tensor], str], tuple[Any, ...]]) -> list[Sample]:
    problems = each_problem()
    return samples(lambda p: make(p, "none")) + [
        Sample(f"{i}-{act}", make(p, act)) for i, _, p in problems[:2] for act in ACTIVATIONS[1:]
    ]


class TestPackedLinearCsr(LinearBattery, DifferentiableBattery):
    name = "packed_linear_csr"
    vmappable = (0, 1, 5)
    samples = (
        samples(
            lambda p: (
                *(p["x"], *structure(p, "csr"), p["bias"], p["x"].shape[1], "none"),
                *NOT_TRANSPOSED,
            ),
            grad=(0, 1, 5),
        )
        + samples(
            lambda p: (
                *(p["x"], *structure(p, "csr"), None, p["x"].shape[1], "none"),
                *reference.transpose_csr(*structure(p, "csr")[1:3], p["x"].shape[1]),
            ),
            grad=(0, 1),
            label="-transposed-given",
        )
        + with_activations(
            lambda p, act: (
                *(p["x"], *structure(p, "csr"), p["bias"], p["x"].shape[1], act),
                *NOT_TRANSPOSED,
            )
        )[-2 * (len(ACTIVATIONS) - 1) :]
    )


class TestPackedLinearBitmap(LinearBattery, TraceableBattery):
    name = "packed_linear_bitmap"
    vmappable = (0, 1, 4)
    samples = with_activations(
        lambda p, act: (p["x"], *structure(p, "bitmap"), p["bias"], p["x"].shape[1], act)
    )


class TestPackedLinearSell(LinearBattery, TraceableBattery):
    name = "packed_linear_sell"
    vmappable = (0, 1, 5)
    samples = with_activations(
        lambda p, act: (
            *(p["x"], *structure(p, "sell"), p["bias"]),
            *(p["weight"].shape[0], p["x"].shape[1], act),
        )
    )


class TestSampledMatmul(DifferentiableBattery):
    name = "sampled_matmul"
    vmappable = (0, 1)
    samples = samples(lambda p: (p["grad"], p["x"], *structure(p, "csr")[1:3]), grad=(0, 1))

    def reduction(self, args: tuple[Any, ...]) -> int:
        return int(args[0].shape[0])

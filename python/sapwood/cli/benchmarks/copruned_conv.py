"""The copruned_conv family against its peers: what each provider runs stands here in full.

Every sample keeps its own random tiles (and filter groups, where the case says so). Bias and ReLU
are part of every forward call; lists of tiles, zeros and borders are part of ours.
``channels_last`` and ``contiguous`` are ``F.conv2d`` on an input in that memory format, without
masks; ``masked`` multiplies the result by the masks, as networks do that are trained with masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood._measure import Call
from sapwood.cli.benchmarks.runner import WrongResult
from sapwood.reference import copruned_conv as reference

CONVOLUTIONS = ("channels_last", "contiguous", "masked", "sapwood")
#: op of a case -> (baseline, providers)
PROVIDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "copruned_conv2d": ("channels_last", CONVOLUTIONS),
    "copruned_depthwise_conv2d": ("channels_last", CONVOLUTIONS),
    "copruned_conv2d_backward": ("channels_last", ("channels_last", "contiguous", "sapwood")),
    "copruned_conv_lstm_step": ("channels_last", ("channels_last", "contiguous", "sapwood")),
    "tile_list": ("nonzero", ("nonzero", "sapwood")),
}
#: Largest difference, relative to the norm of the result in float64.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


@dataclass(frozen=True)
class ConvCase:
    """One op at one size; ``keep`` is the share of the tiles, ``filters_kept`` of the groups."""

    op: str
    batch: int
    channels: int
    filters: int
    size: int
    kernel: int
    keep: float
    filters_kept: float = 1.0
    tile: int = 8
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        shape = f"B={self.batch} {self.channels}-{self.filters} {self.size}x{self.size}"
        cut = 1 - self.keep * self.filters_kept
        joint = " joint" if self.filters_kept < 1 else ""
        return f"{shape} k={self.kernel} t={self.tile} cut={cut:.2g}{joint}"

    @property
    def baseline(self) -> str:
        return PROVIDERS[self.op][0]

    @property
    def providers(self) -> tuple[str, ...]:
        return PROVIDERS[self.op][1]

    @property
    def depthwise(self) -> bool:
        return self.op == "copruned_depthwise_conv2d"

    def build(self, provider: str) -> Call:
        return _BUILDERS[self.op](problem_of(self), provider)

    def check(self, provider: str, result: object) -> None:
        error = _error(self, provider, result)
        if not error <= TOLERANCE[self.dtype]:
            raise WrongResult(
                f"{self.op} {self.name}: {provider} is off by {error:.1e}, "
                f"allowed are {TOLERANCE[self.dtype]:.0e}"
            )


@dataclass(frozen=True)
class Problem:
    """Tensors of a case."""

    case: ConvCase
    x: Tensor  # (B, C, H, W) channels last
    weight: Tensor  # (K, C, k, k)
    bias: Tensor  # (K,)
    region: Tensor  # (B, tiles, tiles)
    filters: Tensor | None  # (B, groups)
    slope: Tensor  # (B, K, H, W) channels last, gradient of the result
    h: Tensor  # (B, D, H, W) channels last, LSTM only
    weight_h: Tensor  # (4 D, D, k, k), LSTM only

    @property
    def groups(self) -> int:
        return self.case.channels if self.case.depthwise else 1

    @property
    def half(self) -> int:
        return self.case.kernel // 2


@lru_cache(maxsize=1)  # the providers of a case follow one another; a sweep must not pile up
def problem_of(case: ConvCase) -> Problem:
    """The tensors of a case, from a fixed seed; every sample keeps the same number of tiles."""
    g = torch.Generator().manual_seed(1)
    kind = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    last = torch.channels_last

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(**kind)

    side, inputs = -(-case.size // case.tile), 1 if case.depthwise else case.channels
    region = sapwood.ops.tile_mask(torch.rand(case.batch, side, side, generator=g), keep=case.keep)
    groups = torch.rand(case.batch, 1, case.filters // 16, generator=g)
    filters = sapwood.ops.tile_mask(groups, keep=case.filters_kept)[:, 0]
    image = (case.batch, case.channels, case.size, case.size)
    units = case.filters // 4
    return Problem(
        case,
        normal(*image).contiguous(memory_format=last),
        normal(case.filters, inputs, case.kernel, case.kernel) / (inputs * case.kernel**2) ** 0.5,
        normal(case.filters),
        region.to(case.device),
        filters.to(case.device) if case.filters_kept < 1 else None,
        normal(case.batch, case.filters, *image[2:]).contiguous(memory_format=last),
        normal(case.batch, units, *image[2:]).contiguous(memory_format=last),
        normal(case.filters, units, case.kernel, case.kernel) / (units * case.kernel**2) ** 0.5,
    )


def cases(*, quick: bool, device: str = "cpu", dtype: str = "float32") -> Iterator[ConvCase]:
    """The sweep: every op at a cut of 70 %, and in the full one more cuts and shapes."""
    main = ConvCase("copruned_conv2d", 8, 64, 64, 56, 3, 0.3, dtype=dtype, device=device)
    deep = replace(main, channels=128, filters=128, kernel=7)
    yield main
    yield replace(main, keep=0.6, filters_kept=0.5)
    yield replace(deep, op="copruned_depthwise_conv2d")
    yield replace(main, op="copruned_conv2d_backward")
    yield replace(main, op="copruned_conv_lstm_step", filters=256, size=32, kernel=5)
    yield replace(main, op="tile_list")
    if quick:
        return
    for keep in (1.0, 0.9, 0.7, 0.5, 0.15, 0.05):
        yield replace(main, keep=keep)
    yield replace(main, batch=1)
    yield replace(main, tile=4)
    yield replace(main, channels=128, filters=128, size=28)


# what is timed -----------------------------------------------------------------------------------


def _layout(x: Tensor, provider: str) -> Tensor:
    return x.contiguous() if provider == "contiguous" else x


def _convolution(p: Problem, provider: str) -> Call:
    if provider == "sapwood":
        return lambda: sapwood.ops.copruned_conv2d(
            p.x,
            p.weight,
            p.bias,
            p.region,
            p.filters,
            padding=p.half,
            groups=p.groups,
            tile=p.case.tile,
            activation="relu",
        )
    x = _layout(p.x, provider)
    factor = kept(p).to(x.dtype)

    def dense() -> Tensor:
        return F.conv2d(x, p.weight, p.bias, padding=p.half, groups=p.groups).relu_()

    return (lambda: dense() * factor) if provider == "masked" else dense


def _backward(p: Problem, provider: str) -> Call:
    ones, half, needs = [1, 1], [p.half] * 2, [True, True, False]
    if provider == "sapwood":
        sizes = (ones, half, ones, 1, p.case.tile, 16)
        masks = (p.region, p.filters, None)
        return lambda: torch.ops.sapwood.copruned_conv2d_backward(
            p.slope, p.x, p.weight, *masks, *sizes, *needs
        )[:2]
    x, slope = _layout(p.x, provider), _layout(p.slope, provider)
    arguments = (slope, x, p.weight, None, ones, half, ones, False, [0, 0], 1, needs)
    return lambda: torch.ops.aten.convolution_backward.default(*arguments)[:2]


def _lstm(p: Problem, provider: str) -> Call:
    if provider == "sapwood":
        weights = (p.weight, p.weight_h, p.bias)
        return lambda: sapwood.ops.copruned_conv_lstm_step(
            p.x, p.h, p.h, *weights, p.region, tile=p.case.tile
        )
    x, h, c = (_layout(t, provider) for t in (p.x, p.h, p.h))
    joined = torch.cat([p.weight, p.weight_h], 1)

    def dense() -> tuple[Tensor, Tensor]:
        gates = F.conv2d(torch.cat([x, h], 1), joined, p.bias, padding=p.half)
        i, f, g, o = gates.chunk(4, 1)
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c_new.tanh(), c_new

    return dense


def _list(p: Problem, provider: str) -> Call:
    if provider == "sapwood":
        return lambda: sapwood.ops.tile_list(p.region)
    return lambda: p.region.flatten().nonzero()


_BUILDERS: dict[str, Callable[[Problem, str], Call]] = {
    "copruned_conv2d": _convolution,
    "copruned_depthwise_conv2d": _convolution,
    "copruned_conv2d_backward": _backward,
    "copruned_conv_lstm_step": _lstm,
    "tile_list": _list,
}


# checks against float64 ---------------------------------------------------------------------------


def kept(p: Problem) -> Tensor:
    """(B, K, H, W) bool: what is computed; the same for all filters without a filter mask."""
    region = reference.over_pixels(p.region, p.case.tile, p.case.size, p.case.size)
    filters = reference.over_channels(p.filters, 16)
    assert region is not None
    return region if filters is None else region & filters


def _exact(p: Problem) -> tuple[Tensor, ...]:
    """What a sapwood call returns, in float64."""
    x, w, b, slope, h, w_h = (t.double() for t in (p.x, p.weight, p.bias, p.slope, p.h, p.weight_h))
    ones, half, sizes = [1, 1], [p.half] * 2, (p.groups, p.case.tile, 16)
    masks = (p.region, p.filters, None)
    if p.case.op == "copruned_conv2d_backward":
        needs = (True, True, False)
        return reference.copruned_conv2d_backward(
            slope, x, w, *masks, ones, half, ones, *sizes, *needs
        )[:2]
    if p.case.op == "copruned_conv_lstm_step":
        return reference.copruned_conv_lstm_step(x, h, h, w, w_h, b, p.region, tile=p.case.tile)
    if p.case.op == "tile_list":
        return reference.tile_list(p.region)
    return (reference.copruned_conv2d(x, w, b, *masks, None, ones, half, ones, *sizes, "relu"),)


def _error(case: ConvCase, provider: str, result: object) -> float:
    """Largest relative difference; of dense providers where they compute the same numbers."""
    p = problem_of(case)
    exact = _exact(p)
    found = result if isinstance(result, tuple) else (result,)
    if case.op == "tile_list" and provider == "nonzero":
        return float((torch.as_tensor(result)[:, 0] != exact[0][: exact[1]]).sum())
    if case.op == "copruned_conv2d_backward" and provider != "sapwood":
        return 0.0 if case.keep < 1 else _difference(found, exact)  # another gradient
    if case.op == "copruned_conv_lstm_step" or provider in ("channels_last", "contiguous"):
        on = kept(p)
        found, exact = (tuple(torch.where(on, t, 0) for t in ts) for ts in (found, exact))
    return _difference(found, exact)


def _difference(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    return max(
        float((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30))
        for a, e in zip(found, exact, strict=True)
    )

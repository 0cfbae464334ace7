"""copruned_conv against torch's dense convolution in float64: values, zeros, halos, gradients."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood.ops.copruned_conv import _specs
from tests.check_op import HALVES

KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (3, 1), (1, 7))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
}


def expected(x: Tensor, w: Tensor, b: Tensor | None, o: dict[str, Any]) -> Tensor:
    """The definition, written once more on torch's convolution: masks as 0/1 factors."""
    tile, group = o["tile"], o["filter_group"]
    if o["input_filter_mask"] is not None:
        x = x * o["input_filter_mask"].repeat_interleave(group, 1)[..., None, None]
    z = F.conv2d(x, w, b, o["stride"], o["padding"], o["dilation"], o["groups"])
    z = ACTIVATIONS[o["activation"]](z)
    keep = torch.ones_like(z)
    if o["region_mask"] is not None:
        for n, i, j in itertools.product(*(range(s) for s in o["region_mask"].shape)):
            rows = slice(i * tile, (i + 1) * tile)
            keep[n, :, rows, j * tile : (j + 1) * tile] *= bool(o["region_mask"][n, i, j])
    if o["filter_mask"] is not None:
        keep *= o["filter_mask"].repeat_interleave(group, 1)[..., None, None]
    return z * keep + (0 if o["residual"] is None else o["residual"])


def region(kind: str, shape: tuple[int, int, int], g: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "one":
        mask = torch.zeros(shape, dtype=torch.bool)
        for sample in mask:
            sample.flatten()[torch.randint(sample.numel(), (1,), generator=g)] = True
        return mask
    if kind == "checkerboard":
        i, j = torch.arange(shape[1])[:, None], torch.arange(shape[2])
        return ((i + j) % 2 == 0).expand(shape).contiguous()
    share = {"on": 1.1, "off": -1.0, "random": 0.4}[kind]
    return torch.rand(shape, generator=g) < share


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Everything drawn at random; float64."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        kernel, dilation = draw.choice(KERNELS), draw.choice((1, 2, 3))
        size = (draw.randint(1, 37), draw.randint(1, 37))
        stride = (draw.choice((1, 2)), draw.choice((1, 2)))
        padding = tuple(draw.randint(0, dilation * (k - 1)) for k in kernel)
        out = tuple(
            (n + 2 * p - dilation * (k - 1) - 1) // s + 1
            for n, p, k, s in zip(size, padding, kernel, stride, strict=True)
        )
        if min(out) > 0:
            break
    depthwise, batch = draw.random() < 0.3, draw.choice((1, 2, 7))
    channels = draw.choice((16, 48, 64))
    filters = channels if depthwise else draw.choice((16, 48, 64))
    tile, group = draw.choice((2, 4, 8, 16)), draw.choice((8, 16))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def groups(count: int) -> Tensor | None:
        share = draw.choice((None, 0.0, 0.5, 1.1))
        return None if share is None else torch.rand(batch, count // group, generator=g) < share

    tiles = (batch, -(-out[0] // tile), -(-out[1] // tile))
    kind = draw.choice(("none", "on", "off", "one", "checkerboard", "random", "random"))
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": channels if depthwise else 1,
        "tile": tile,
        "filter_group": group,
        "region_mask": region(kind, tiles, g),
        "filter_mask": groups(filters),
        "input_filter_mask": groups(channels),
        "activation": draw.choice(tuple(ACTIVATIONS)),
        "residual": normal(batch, filters, *out) if draw.random() < 0.4 else None,
    }
    weight = normal(filters, 1 if depthwise else channels, *kernel)
    bias = normal(filters) if draw.random() < 0.7 else None
    return normal(batch, channels, *size), weight, bias, options


def cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    residual = options["residual"]
    return {**options, "residual": None if residual is None else residual.to(dtype)}


def off(norm_of: Tensor, actual: Tensor) -> float:
    """The difference relative to the expected norm; absolute where that is 0."""
    difference = (actual.double() - norm_of).norm()
    return float(difference / (norm_of.norm() if norm_of.any() else 1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", range(8))
def test_equals_the_masked_dense_convolution(block: int, dtype: torch.dtype) -> None:
    for seed in range(25 * block, 25 * block + 25):
        x, w, b, o = problem(seed)
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
        o = cast(o, dtype)
        y = sapwood.ops.copruned_conv2d(x, w, b, **o)
        wide = (x.double(), w.double(), None if b is None else b.double())
        assert off(expected(*wide, cast(o, torch.float64)), y) <= TOLERANCE[dtype], (seed, o)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_rounds_the_float32_sum_once(dtype: torch.dtype) -> None:
    for seed in range(200, 230):
        x, w, b, o = problem(seed)
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
        y = sapwood.ops.copruned_conv2d(x, w, b, **cast(o, dtype))
        wide = (x.float(), w.float(), None if b is None else b.float())
        residual = cast(cast(o, dtype), torch.float32)
        single = sapwood.ops.copruned_conv2d(*wide, **residual)
        ulp = torch.finfo(dtype).eps * single.abs() + torch.finfo(dtype).tiny
        # Where dense torch ran, its float32 sum had another order.
        absolute = (t if t is None else t.double().abs() for t in wide)
        terms = expected(*absolute, {**o, "residual": None, "activation": "none"})
        order = 4 * w[0].numel() * torch.finfo(torch.float32).eps * terms
        assert bool(((y.double() - single.double()).abs() <= ulp + order).all()), (seed, o)


def test_skipped_outputs_are_bitwise_zero_or_the_residual() -> None:
    for seed in range(300, 340):
        x, w, b, o = problem(seed)
        x, w, b, o = x.float(), w.float(), None if b is None else b.float(), cast(o, torch.float32)
        on = expected(
            torch.ones_like(x).double(),
            torch.zeros_like(w).double(),
            torch.ones(len(w), dtype=torch.float64),
            {**cast(o, torch.float64), "residual": None, "activation": "none"},
        ).bool()
        y = sapwood.ops.copruned_conv2d(x, w, b, **o)
        skipped = torch.zeros_like(y) if o["residual"] is None else o["residual"]
        assert torch.equal(y[~on].view(torch.int32), skipped[~on].contiguous().view(torch.int32))


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_a_tile_reads_its_halo_and_nothing_else(stride: int, dilation: int) -> None:
    kernel, padding, tile = 3, dilation, 4
    x, w = torch.randn(1, 16, 24, 24), torch.rand(16, 16, kernel, kernel) + 0.1
    mask = torch.zeros(1, *(2 * [-(-((24 - 1) // stride + 1) // tile)]), dtype=torch.bool)
    mask[0, 1, 1] = True
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}

    def convolve(image: Tensor) -> Tensor:
        return sapwood.ops.copruned_conv2d(image, w, None, mask, tile=tile, **options)

    first = tile * stride - padding
    last = (2 * tile - 1) * stride - padding + dilation * (kernel - 1)
    before = convolve(x)
    for row, column in ((first, first), (last, last), (first, last)):
        changed = x.clone()
        changed[..., row, column] += 1
        assert not torch.equal(convolve(changed), before)
    outside = torch.full_like(x, torch.nan)
    outside[..., first : last + 1, first : last + 1] = x[..., first : last + 1, first : last + 1]
    assert torch.equal(convolve(outside), before)


def test_nan_in_what_is_skipped_does_not_leak() -> None:
    x, w = torch.randn(2, 32, 9, 9), torch.randn(32, 32, 3, 3)
    inputs, filters = torch.tensor([[True, False]] * 2), torch.tensor([[False, True]] * 2)
    x[:, 16:], w[:16] = torch.nan, torch.nan
    masks = {"filter_mask": filters, "input_filter_mask": inputs}
    for requires_grad in (False, True):
        leaf = x.clone().requires_grad_(requires_grad)
        y = sapwood.ops.copruned_conv2d(leaf, w, padding=1, **masks)
        assert bool(y.isfinite().all())
        if requires_grad:
            (grad,) = torch.autograd.grad(y.sum(), leaf)
            assert bool(grad.isfinite().all())
            assert not bool(grad[:, 16:].any())
    deep = torch.randn(32, 1, 3, 3)
    y = sapwood.ops.copruned_depthwise_conv2d(x, deep, padding=1, input_filter_mask=inputs)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("block", range(5))
def test_gradients_equal_those_of_the_dense_convolution(block: int) -> None:
    for seed in range(400 + 12 * block, 412 + 12 * block):
        x, w, b, o = problem(seed)
        for dtype, tolerance in TOLERANCE.items():
            given = [x, w, b, o["residual"]]
            leaves = [None if t is None else t.to(dtype).requires_grad_() for t in given]
            wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
            y = sapwood.ops.copruned_conv2d(*leaves[:3], **{**o, "residual": leaves[3]})
            z = expected(*wide[:3], {**o, "residual": wide[3]})
            slope = torch.randn_like(z)
            present = [t for t in leaves if t is not None]
            grads = torch.autograd.grad(y, present, slope.to(dtype))
            exact = torch.autograd.grad(z, [t for t in wide if t is not None], slope)
            for a, e in zip(grads, exact, strict=True):
                assert off(e, a) <= 3 * tolerance, (seed, o)


def test_dense_dispatch_obeys_masks_bit_for_bit() -> None:
    x, w, b = torch.randn(4, 16, 40, 40), torch.randn(32, 16, 3, 3), torch.randn(32)
    mask = torch.ones(4, 10, 10, dtype=torch.bool)
    mask[0, 0, 0] = mask[3, 9, 2] = False  # so little that dense torch runs
    options: dict[str, Any] = {"padding": 1, "tile": 4, "activation": "gelu"}
    residual = torch.randn(4, 32, 40, 40)
    y = sapwood.ops.copruned_conv2d(x, w, b, mask, residual=residual, **options)
    assert torch.equal(y[0, :, :4, :4], residual[0, :, :4, :4])
    assert torch.equal(y[3, :, 36:, 8:12], residual[3, :, 36:, 8:12])
    dense = F.gelu(F.conv2d(x.double(), w.double(), b.double(), padding=1)) + residual
    on = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    assert off(torch.where(on, dense, residual.double()), y) <= 1e-5


def test_memory_formats_are_equal() -> None:
    x, w, b, o = problem(7)
    other = {**o, "tile": o["tile"]}
    last = x.contiguous(memory_format=torch.channels_last)
    packed = w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    y = sapwood.ops.copruned_conv2d(x, w, b, **o)
    assert torch.equal(sapwood.ops.copruned_conv2d(last, packed, b, **other), y)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_results_do_not_depend_on_tiles() -> None:
    """A pixel's sum has one order, whichever tiles, items and register tiles it falls into."""
    x, w = torch.randn(2, 24, 19, 23), torch.randn(40, 24, 5, 5)
    deep = torch.randn(24, 1, 7, 7)
    some = torch.tensor([[True, True, False], [False, True, True]])
    mask = {"input_filter_mask": some, "filter_group": 8}
    for weight, groups in ((w, 1), (deep, 24)):
        found = [
            sapwood.ops.copruned_conv2d(x, weight, groups=groups, padding=2, tile=t, **mask)
            for t in (2, 4, 8, 16)
        ]
        assert all(torch.equal(y, found[0]) for y in found)


def test_twenty_runs_and_all_thread_counts_are_bitwise_equal(threads: None) -> None:
    x, w, b, o = problem(21)
    leaves = [x.float().requires_grad_(), w.float().requires_grad_()]
    o = {**cast(o, torch.float32), "region_mask": None}
    found = []
    for count in (1, 2, 4, 7, *[2] * 16):
        torch.set_num_threads(count)
        y = sapwood.ops.copruned_conv2d(*leaves, None if b is None else b.float(), **o)
        found.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for results in found[1:]:
        assert all(torch.equal(a, e) for a, e in zip(results, found[0], strict=True))


def test_second_derivatives_come_from_the_op_itself() -> None:
    """The derivative of the gradient is again made of the op and its gradient."""
    assert _specs.copruned_conv2d_backward is not None
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[True, False, True], [False, True, True], [True, True, False]]])

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return sapwood.ops.copruned_conv2d(
            x, w, None, mask, padding=1, tile=2, filter_group=8, activation="silu"
        )

    assert torch.autograd.gradgradcheck(convolve, (x, w), atol=1e-4)

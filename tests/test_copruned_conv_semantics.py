"""copruned_conv as a user meets it: soft masks, autocast, masks, counts, the LSTM step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood import ops

X, W = torch.randn(2, 16, 9, 9), torch.randn(32, 16, 3, 3)
TILES = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
GROUPS = torch.tensor([[True, False], [False, True]])


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


# soft masks ---------------------------------------------------------------------------------------


def test_soft_masks_are_factors_with_gradients() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 8, 4, 4, generator=g)
    w = torch.randn(8, 8, 1, 1, generator=g)
    region, filters, inputs = (torch.rand(s, generator=g) for s in ((1, 2, 2), (1, 1), (1, 1)))

    def convolve(x: Tensor, w: Tensor, region: Tensor, filters: Tensor, inputs: Tensor) -> Tensor:
        options: dict[str, Any] = {"input_filter_mask": inputs, "activation": "silu"}
        return ops.copruned_conv2d(x, w, None, region, filters, tile=2, filter_group=8, **options)

    leaves = double(x, w, region, filters, inputs)
    z = F.silu(F.conv2d(leaves[0] * leaves[4], leaves[1]))
    wide = leaves[2].repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(convolve(*leaves), z * wide[:, None] * leaves[3])
    assert torch.autograd.gradcheck(convolve, leaves)
    assert torch.autograd.gradgradcheck(convolve, leaves)


def test_soft_masks_of_zeros_and_ones_equal_hard_ones() -> None:
    hard = ops.copruned_conv2d(X, W, None, TILES, GROUPS, padding=1)
    soft = ops.copruned_conv2d(X, W, None, TILES.float(), GROUPS.float(), padding=1)
    mixed = ops.copruned_conv2d(X, W, None, TILES, GROUPS.float(), padding=1)
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed, hard, rtol=1e-4, atol=1e-4)


# gradients of the public function -----------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu", "leaky_relu"])
def test_gradcheck(activation: str) -> None:
    g = torch.Generator().manual_seed(4)
    shapes = ((1, 2, 5, 4), (8, 2, 3, 3), (8,), (1, 8, 5, 4))
    leaves = double(*(torch.randn(s, generator=g) for s in shapes))
    mask = torch.tensor([[[True, False], [False, True], [True, True]]])

    def convolve(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        options: dict[str, Any] = {"tile": 2, "filter_group": 8, "activation": activation}
        return ops.copruned_conv2d(x, w, b, mask, padding=1, residual=residual, **options)

    assert torch.autograd.gradcheck(convolve, leaves)
    assert torch.autograd.gradgradcheck(convolve, leaves)


def test_only_wanted_gradients_are_computed() -> None:
    w = W.clone().requires_grad_()
    y = ops.copruned_conv2d(X, w, None, TILES, padding=1)
    y.sum().backward()
    assert w.grad is not None
    assert not ops.copruned_conv2d(X, W, None, TILES, padding=1).requires_grad


def test_func_transforms_and_compile_of_the_public_function() -> None:
    def loss(x: Tensor) -> Tensor:
        return ops.copruned_conv2d(x, W, None, TILES, padding=1, activation="gelu").square().sum()

    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(X), expected, rtol=1e-4, atol=1e-3)
    stacked = torch.stack([X, 2 * X])
    both = torch.vmap(lambda t: ops.copruned_conv2d(t, W, None, TILES, padding=1))(stacked)
    alone = ops.copruned_conv2d(2 * X, W, None, TILES, padding=1)
    torch.testing.assert_close(both[1], alone)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), loss(X))


# autocast, dispatch, explanations -----------------------------------------------------------------


def test_autocast_follows_conv2d() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.copruned_conv2d(X, W, None, TILES, padding=1).dtype == torch.bfloat16
        h = torch.zeros(2, 8, 9, 9)
        state = ops.copruned_conv_lstm_step(X, h, h, W, torch.randn(32, 8, 3, 3), None, TILES)
        assert all(s.dtype == torch.bfloat16 for s in state)


def test_explanations_name_the_reasons() -> None:
    hard = sapwood.explain(ops.copruned_conv2d, X, W, None, TILES, padding=1)
    assert hard.chosen == "native"
    assert "counts what is kept" in str(hard)
    soft = sapwood.explain("copruned_conv2d", X, W, None, TILES.float(), padding=1)
    assert soft.chosen == "dense"
    assert "a floating (soft) mask is a product" in str(soft)
    with sapwood.backend("reference"):
        y = ops.copruned_conv2d(X, W, None, TILES, padding=1)
    torch.testing.assert_close(
        y, ops.copruned_conv2d(X, W, None, TILES, padding=1), rtol=1e-4, atol=1e-4
    )


def test_expected_keep_decides_for_dense_torch_off_the_cpu() -> None:
    x, w, mask = (t.to("meta") for t in (X, W, TILES))
    few = sapwood.explain(ops.copruned_conv2d, x, w, None, mask, padding=1, expected_keep=0.3)
    most = sapwood.explain(ops.copruned_conv2d, x, w, None, mask, padding=1, expected_keep=0.9)
    assert few.chosen == "reference"
    assert "pays above expected_keep = 0.75, this is 0.3" in str(few)
    assert most.chosen == "dense"


# masks and counts ---------------------------------------------------------------------------------


def test_tile_mask() -> None:
    score = torch.tensor([[[0.4, 0.6], [0.5, torch.nan]], [[0.1, 0.1], [0.1, 0.1]]])
    assert ops.tile_mask(score).tolist() == [[[False, True], [False, False]], [[False] * 2] * 2]
    best = ops.tile_mask(score, keep=0.5)
    assert best.tolist() == [[[False, True], [True, False]], [[True, True], [False, False]]]
    assert not bool(ops.tile_mask(score, keep=0.0).any())
    assert ops.tile_mask(score, keep=1.0).tolist()[0] == [[True, True], [True, False]]
    many = ops.tile_mask(torch.rand(5, 3, 7, 7), keep=0.3)
    assert many.sum((2, 3)).unique().tolist() == [15]


@pytest.mark.parametrize(("halo", "tile"), [(0, 4), (1, 4), (4, 4), (5, 4), (9, 2)])
def test_dilate_tile_mask(halo: int, tile: int) -> None:
    mask = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(halo)) < 0.15
    pixels = mask.repeat_interleave(tile, 1).repeat_interleave(tile, 2).float()[:, None]
    near = F.max_pool2d(F.pad(pixels, [halo] * 4), 2 * halo + 1, 1)
    expected = F.max_pool2d(near, tile)[:, 0].bool()
    assert torch.equal(ops.dilate_tile_mask(mask, halo=halo, tile=tile), expected)
    assert ops.dilate_tile_mask(mask[:0], halo=halo, tile=tile).shape == (0, 5, 6)


@pytest.mark.parametrize("depthwise", [False, True])
def test_flops_equal_a_brute_force_count(depthwise: bool) -> None:
    g = torch.Generator().manual_seed(5)
    batch, channels, filters, rows, cols, tile, group = 3, 32, 32, 11, 6, 4, 8
    region = torch.rand(batch, 3, 2, generator=g) < 0.5
    on = torch.rand(batch, filters // group, generator=g) < 0.5
    inputs = torch.rand(batch, channels // group, generator=g) < 0.5
    shape = (filters, 1 if depthwise else channels, 3, 5)
    counted = []
    for b in range(batch):
        total = 0
        for k, y, x in itertools.product(range(filters), range(rows), range(cols)):
            if not (bool(on[b, k // group]) and bool(region[b, y // tile, x // tile])):
                continue
            sources = (k,) if depthwise else range(channels)
            total += sum(15 for c in sources if bool(inputs[b, c // group]))
        counted.append(total)
    sizes: dict[str, int] = {"tile": tile, "filter_group": group}
    sizes["groups"] = channels if depthwise else 1
    output = (batch, filters, rows, cols)
    assert ops.copruned_flops(shape, output, region, on, inputs, **sizes).tolist() == counted
    dense = filters * rows * cols * 15 * (1 if depthwise else channels)
    assert ops.copruned_flops(shape, output, **sizes).tolist() == [dense] * batch


# the LSTM step ------------------------------------------------------------------------------------


def dense_step(
    x: Tensor, h: Tensor, c: Tensor, w_x: Tensor, w_h: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor]:
    half = w_x.shape[-1] // 2
    i, f, g, o = F.conv2d(torch.cat([x, h], 1), torch.cat([w_x, w_h], 1), b, padding=half).chunk(
        4, 1
    )
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@pytest.mark.parametrize("kernel", [3, 5])
def test_lstm_equals_the_dense_cell_where_it_is_on_and_copies_elsewhere(kernel: int) -> None:
    g = torch.Generator().manual_seed(6)
    batch, channels, units, size, tile = 2, 5, 16, 13, 4
    h, c = (torch.randn(batch, units, size, size, generator=g) for _ in range(2))
    w_x = 0.2 * torch.randn(4 * units, channels, kernel, kernel, generator=g)
    w_h = 0.1 * torch.randn(4 * units, units, kernel, kernel, generator=g)
    b = torch.randn(4 * units, generator=g)
    for _ in range(20):
        x = torch.randn(batch, channels, size, size, generator=g)
        region = torch.rand(batch, 4, 4, generator=g) < 0.5
        units_on = torch.rand(batch, units // 8, generator=g) < 0.7
        new_h, new_c = ops.copruned_conv_lstm_step(
            x, h, c, w_x, w_h, b, region, units_on, tile=tile, filter_group=8
        )
        wide = [t.double() for t in (x, h, c, w_x, w_h, b)]
        expected = dense_step(*wide)
        on = region.repeat_interleave(tile, 1).repeat_interleave(tile, 2)[:, None, :size, :size]
        on = on & units_on.repeat_interleave(8, 1)[:, :, None, None]
        for new, old, exact in zip((new_h, new_c), (h, c), expected, strict=True):
            torch.testing.assert_close(new[on].double(), exact[on], rtol=1e-5, atol=1e-5)
            assert torch.equal(new[~on], old[~on])
            assert new.data_ptr() != old.data_ptr()
        h, c = new_h, new_c


def test_lstm_gradcheck() -> None:
    g = torch.Generator().manual_seed(7)
    shapes = ((1, 1, 2, 2), (1, 8, 2, 2), (1, 8, 2, 2), (32, 1, 1, 1), (32, 8, 1, 1), (32,))
    leaves = double(*(0.5 * torch.randn(s, generator=g) for s in shapes))
    region = torch.tensor([[[True]]])
    soft = double(torch.rand(1, 1, 1, generator=g))

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        mask = given[6] if len(given) > 6 else region
        return ops.copruned_conv_lstm_step(*given[:6], mask, tile=2, filter_group=8)

    assert torch.autograd.gradcheck(step, leaves)
    assert torch.autograd.gradcheck(step, [*leaves, *soft])

"""Offsets beyond 2^31 elements, in Triton's interpreter; ``test_interpreter.py`` runs this file.

More are in ``interpreted_masked_matmul.py`` and ``interpreted_similarity.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sapwood.triton_kernels import copruned_conv, logsemiring, similarity, splat2d
from sapwood.triton_kernels._logsemiring_sequence_kernels import chain_kernel
from torch import Tensor
from torch.nn.functional import conv2d
from triton.runtime.interpreter import interpreter_builder

from sapwood.ops.logsemiring import _triton
from sapwood.reference import logsemiring as reference
from tests.large_index.memory import FAR, alone, apart, behind, last_of, on_linux, reserved

pytestmark = [
    on_linux,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]

Call = Callable[[Tensor, Tensor, Tensor], Any]
PRODUCTS: dict[str, Call] = {
    "log_matmul": lambda g, a, b: _triton.log_matmul(a, b, False),
    "log_matmul exact": lambda g, a, b: _triton.log_matmul(a, b, True),
    "backward": lambda g, a, b: _triton.log_matmul_backward(g, a, b, False, True, True),
    "backward exact": lambda g, a, b: _triton.log_matmul_backward(g, a, b, True, True, True),
    "max_matmul": lambda g, a, b: _triton.max_matmul(a, b),
    "sample_matmul": lambda g, a, b: _triton.sample_matmul(a, b, 3, 7),
}


@contextmanager
def last_program(kernels: Any, before: int = 0) -> Iterator[None]:
    """Every launch of a module runs its last program alone, or one that is ``before`` it."""
    launch, set_dim, set_idx = (
        kernels.launch,
        interpreter_builder.set_grid_dim,
        interpreter_builder.set_grid_idx,
    )

    def launch_last(kernel: Any, grid: tuple[int], *rest: Any, **constants: Any) -> None:
        with (
            patch.object(interpreter_builder, "set_grid_dim", lambda *_: set_dim(grid[0], 1, 1)),
            patch.object(
                interpreter_builder, "set_grid_idx", lambda *_: set_idx(grid[0] - 1 - before, 0, 0)
            ),
        ):
            launch(kernel, (1,), *rest, **constants)

    with patch.object(kernels, "launch", launch_last):
        yield


def tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


# logsemiring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (3, 9, 12, 20)], ids=["small", "certified"])
def test_products_of_operands_far_apart(name: str, shape: tuple[int, int, int, int]) -> None:
    batch, m, k, n = shape
    grad, a, b = torch.randn(batch, m, n), torch.randn(batch, m, k), torch.randn(batch, k, n)
    wanted = PRODUCTS[name](grad, a, b)
    for dim in range(3):
        found = PRODUCTS[name](*(apart(t, dim) for t in (grad, a, b)))
        for x, y in zip(tensors(found), tensors(wanted), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["log_matmul", "log_matmul exact", "max_matmul", "sample_matmul"])
def test_last_tile_of_2_31_results(name: str) -> None:
    side, last = 192, 16
    a, b = torch.randn(1, side, 8), torch.randn(1, 8, side)
    batch = FAR // side**2 + 1
    if name == "sample_matmul":  # three of each, of which the numbers depend on the batch
        batch = batch // 3 + 1
        a[:, -last:, :-1] = -torch.inf
    with last_program(logsemiring):
        found = PRODUCTS[name](a, *(t.expand(batch, -1, -1) for t in (a, b)))
    wanted = PRODUCTS[name](a, a[:, -last:], b[:, :, -last:])
    for x, y in zip(tensors(found), tensors(wanted), strict=True):
        assert x.numel() > FAR
        ends = [t.flatten(0, -3)[-1, -last:, -last:] for t in (x, y)]
        torch.testing.assert_close(*ends)


@pytest.mark.parametrize("exact", [False, True], ids=["certified", "exact"])
def test_last_gradient_of_2_31_results(exact: bool) -> None:
    """Weights and shifts of all results; gradients of few terms. One tile of results has any."""
    side, last, k = 192, 64, 8
    batch = FAR // side**2 + 1
    grad = torch.zeros(1, side, side)
    grad[:, -last:, -last:] = torch.randn(last, last)
    a, b = torch.randn(1, side, k), torch.randn(1, k, side)
    far = [t.expand(batch, -1, -1) for t in (grad, a, b)]
    with last_program(logsemiring):
        da, db = _triton.log_matmul_backward(*far, exact, True, True)
    near = (grad[:, -last:, -last:], a[:, -last:], b[:, :, -last:])
    wanted = reference.log_matmul_backward(*near, True, True, True)
    for x, y in zip((da[-1:, -last:], db[-1:, :, -last:]), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [1, 3])
def test_segments_behind_2_31_entries(inner: int) -> None:
    x, grad, ptr = torch.randn(6, inner), torch.randn(1, 3, inner), torch.tensor([0, 2, 2, 6])
    far, order = behind(x)[None], torch.tensor([3, 0, 5, 1, 2, 4])
    before = far.shape[1] - 6
    for weights in (False, True):
        scale = grad if weights else None
        for given in (None, order):
            wanted = logsemiring.segment_sums(x[None], ptr, given, weights=weights, scale=scale)
            places = None if given is None else last_of(order + before, before + 6)
            found = logsemiring.segment_sums(
                far, ptr + before, places, weights=weights, scale=scale
            )
            assert torch.equal(found[:, -wanted.shape[1] :], wanted)


@pytest.mark.parametrize("dim", range(4))
def test_chains_far_apart(dim: int) -> None:
    t, init = torch.randn(3, 4, 5, 5), torch.randn(3, 2, 5)
    states = _triton.log_scan(t, init, False)
    assert torch.equal(_triton.log_scan(apart(t, dim), init, False), states)
    grad = torch.randn(states.shape, dtype=torch.float64)
    wanted = _triton.log_scan_backward(grad, t, states, False)
    for x, y in zip(
        _triton.log_scan_backward(grad, apart(t, dim), states, False), wanted, strict=True
    ):
        assert torch.equal(x, y)


def test_last_chain_of_2_31_states() -> None:
    batch, steps, rows, k = 2**11 + 1, 3, 2**12, 64
    t = torch.randn(1, steps, k, k)
    init = reserved(batch, rows, k, dtype=torch.float64)
    init[-1, -1] = torch.randn(k)
    with last_program(logsemiring):
        states = _triton.log_scan(t.expand(batch, -1, -1, -1), init, False)
    assert states.numel() > FAR
    near = _triton.log_scan(t, init[-1:, -1:], False)
    assert torch.equal(states[-1, :, -1], near[0, :, 0])


def test_gradients_of_the_last_chain_of_2_31_states() -> None:
    batch, steps, rows, k = 2**22 + 1, 15, 32, 1
    t = torch.randn(1, steps, k, k)
    near = [torch.randn(1, steps + 1, rows, k, dtype=torch.float64) for _ in range(2)]
    grad, states = (last_of(x, batch) for x in near)
    with last_program(logsemiring):
        dt, dinit = _triton.log_scan_backward(grad, t.expand(batch, -1, -1, -1), states, False)
    wanted = _triton.log_scan_backward(near[0], t, near[1], False)
    assert torch.equal(dt[-1:], wanted[0])
    assert torch.equal(dinit[-1:], wanted[1])


def test_a_step_of_2_31_states() -> None:
    """From a chain's first states to its second ones."""
    rows, k = 2**25 + 1, 64
    t = torch.randn(1, 1, k, k)
    init, states = (reserved(1, n, rows, k, dtype=torch.float64) for n in (1, 2))
    init[0, 0, -1] = torch.randn(k)
    config = logsemiring._choose(logsemiring._CHAIN, k)
    with last_program(logsemiring):
        args = (t, init, states, 1, rows, k, *t.stride())
        logsemiring.launch(chain_kernel, (rows,), config, None, args)
    near = _triton.log_scan(t, init[:, 0, -1:], False)
    assert torch.equal(states[:, :, -1], near[:, :, 0])


# splat2d ------------------------------------------------------------------------------------------


def gaussians(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """mu, chol and feat of one Gaussian at (8, 8)."""
    chol = torch.tensor([[[2.0, 0.3, 1.5]]])
    return torch.full((1, 1, 2), 8.0), chol, torch.randn(1, 1, channels)


def test_last_tile_of_an_image_of_2_31_values() -> None:
    side, channels = 23_200, 4
    mu, chol, feat = gaussians(channels)
    with last_program(splat2d):
        image = splat2d.splat2d(mu + side - 16, chol, feat, None, side, side, 9.0)
    assert image.numel() > FAR
    want = splat2d.splat2d(mu, chol, feat, None, 16, 16, 9.0)
    assert torch.equal(image[..., -16:, -16:], want)


def test_gradient_of_an_image_of_2_31_values() -> None:
    side, channels = 23_200, 4
    mu, chol, feat = gaussians(channels)
    near = torch.randn(1, channels, 16, 16)
    far = reserved(1, channels, side, side)
    far[..., -16:, -16:] = near
    found = splat2d.splat2d_backward(far, mu + side - 16, chol, feat, None, 9.0, True)
    wanted = splat2d.splat2d_backward(near, mu, chol, feat, None, 9.0, True)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


# similarity ---------------------------------------------------------------------------------------


def test_clusters_of_the_last_rows() -> None:
    """Rows 2^31 elements and more into a matrix; the last program sees the last four."""
    rows, k = 2**20 + 4, 2**11
    near = torch.nn.functional.normalize(torch.randn(4, k))
    near[2] = near[0]
    unit = last_of(near, rows)

    def exact(row: Tensor, col: Tensor) -> Tensor:
        return (unit[row].double() * unit[col].double()).sum(1)

    with last_program(similarity):
        problem = similarity.Rows(unit, unit, True, False, True, exact)
        labels = similarity.similarity_clusters(problem, 0.99)
    assert (labels[-4:] - labels[-4]).tolist() == [0, 1, 0, 2]


# copruned_conv ------------------------------------------------------------------------------------


def channels_last(near: Tensor, batch: int) -> Tensor:
    return last_of(near.permute(0, 2, 3, 1).contiguous(), batch).permute(0, 3, 1, 2)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_last_image_of_2_31_values(masked: bool) -> None:
    """The last program has the last tile of 8 x 8."""
    channels, size = 16, 64
    batch = FAR // (channels * size * size) + 1
    x, weight = torch.randn(1, channels, size, size), torch.randn(8, channels, 3, 3)
    region = last_of(torch.ones(1, 2, 2, dtype=torch.bool), batch) if masked else None
    shape = ((4, 4), (1, 1), (1, 1), 8, 8, "none")
    with last_program(copruned_conv):
        y = copruned_conv.copruned_conv2d(
            channels_last(x, batch), weight, None, region, None, None, None, *shape
        )
    wanted = conv2d(x, weight, stride=4, padding=1)
    torch.testing.assert_close(y[-1:, :, -8:, -8:], wanted[:, :, -8:, -8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", range(4))
def test_weight_far_apart(dim: int) -> None:
    x, weight = torch.randn(1, 16, 8, 8), torch.randn(8, 16, 3, 3)
    shape = ((1, 1), (1, 1), (1, 1), 8, 8, "none")
    rest = (None, None, None, None, None, *shape)
    found = copruned_conv.copruned_conv2d(x, apart(weight, dim), *rest)
    assert torch.equal(found, copruned_conv.copruned_conv2d(x, weight, *rest))


def test_tiles_of_more_pixels_than_32_bits_count() -> None:
    """An image of fewer than 2^31 pixels whose tiles, which reach beyond it, have more."""
    side, tile, of_program = 46_340, 64, 64
    last = (side - 1) // tile * tile  # where the last tile begins
    assert side**2 < FAR < (last + tile) ** 2
    x = reserved(1, 1, side, side, dtype=torch.half)
    x[0, 0, last, last:] = torch.randn(side - last).half()
    shape = ((1, 1), (0, 0), (1, 1), tile, 8, "none")
    with alone(), last_program(copruned_conv, before=tile**2 // of_program - 1):
        y = copruned_conv.copruned_conv2d(
            x, torch.full((1, 1, 1, 1), 2.0).half(), None, None, None, None, None, *shape
        )
    assert torch.equal(y[0, 0, last, last:], 2 * x[0, 0, last, last:])

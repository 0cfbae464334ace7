"""splat2d against a dense oracle in float64: errors, derivatives, batches, extreme scenes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sapwood.ops import splat2d, splat2d_backward, splat2d_pairs
from tests.splat2d_scenes import BORDER, CUTOFF, Scene, Terms, random_scene

SMALL = [
    random_scene(1, 3, 2, (4, 5)),
    random_scene(1, 1, 3, (3, 3), seed=1),
    random_scene(2, 2, 1, (2, 6), seed=2),
    random_scene(1, 4, 4, (5, 2), sigma=1.0, seed=3),
    random_scene(3, 1, 1, (1, 1), seed=4),
]
MIDDLE = [
    random_scene(1, 200, 3, (50, 37)),
    random_scene(2, 90, 1, (17, 64), sigma=3.0),
    random_scene(1, 40, 17, (33, 20)),
]
by_mode = pytest.mark.parametrize("mode", ["sum", "norm"])


def double(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    return scene.mu.double(), scene.chol.double(), scene.feat.double()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@by_mode
@pytest.mark.parametrize("at", range(len(SMALL)))
def test_first_and_second_derivatives(at: int, mode: str) -> None:
    scene = SMALL[at]
    args = tuple(t.requires_grad_() for t in double(scene))

    def image(*given: Tensor) -> Tensor:
        # eps of the size of the weights: a division by weights near 0 has no useful differences
        return splat2d(*given, scene.size, mode=mode, cutoff=math.inf, eps=0.1)

    assert torch.autograd.gradcheck(image, args)
    assert torch.autograd.gradgradcheck(image, args)


@pytest.mark.parametrize("scene", MIDDLE, ids=lambda s: f"{s.size[0]}x{s.size[1]}")
def test_float64_with_a_cut(scene: Scene) -> None:
    mu, chol, feat = double(scene)
    terms = Terms(mu, chol, scene.size, CUTOFF)
    grad = torch.randn(len(mu), feat.shape[-1], *scene.size, dtype=torch.float64)
    assert float((splat2d(mu, chol, feat, scene.size) - terms.image(feat)).abs().max()) <= 1e-10
    found = splat2d_backward(grad, mu, chol, feat, with_stats=True)
    for actual, expected in zip(found, terms.gradients(grad, feat), strict=True):
        assert actual is not None
        assert float((actual - expected).abs().max()) <= 1e-8
    assert torch.equal(splat2d_pairs(mu, chol, scene.size), (terms.w > 0).sum((1, 2, 3)))


@pytest.mark.parametrize("n", [50, 800])
def test_float32_error(n: int) -> None:
    """Pixels with a pair at the border of the cut may differ by what the pair adds there."""
    scene = random_scene(1, n, 3, (70, 90), sigma=2.5, seed=n)
    terms = Terms(scene.mu, scene.chol, scene.size, CUTOFF)
    most = float(scene.feat.abs().max())
    pairs = float((terms.w > 0).sum(1).max())
    allowed = torch.full_like(terms.q[:, 0], 1e-5 * max(1.0, most * pairs / 16))
    border = terms.near(BORDER)
    slack = border.sum(1) * most / 255
    error = (splat2d(scene.mu, scene.chol, scene.feat, scene.size) - terms.image(scene.feat)).abs()
    assert bool((error.amax(1) <= allowed + slack).all())
    assert float((slack > 0).double().mean()) < 0.01
    grad = torch.randn(1, 3, *scene.size)
    grad = torch.where(border.any(1)[:, None], 0.0, grad)
    found = splat2d_backward(grad, scene.mu, scene.chol, scene.feat, with_stats=True)
    for actual, expected in zip(found, terms.gradients(grad, scene.feat), strict=True):
        assert actual is not None
        assert relative(actual, expected) <= 1e-5


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_batch_is_its_items(channels: int) -> None:
    scene = random_scene(5, 40, channels, (37, 21))
    counts = torch.tensor([40, 0, 7, 39, 20])
    grad = torch.randn(5, channels, *scene.size)
    images = splat2d(scene.mu, scene.chol, scene.feat, scene.size, counts=counts)
    grads = splat2d_backward(grad, scene.mu, scene.chol, scene.feat, counts=counts)
    for b, count in enumerate(counts.tolist()):
        item = scene.mu[b, :count], scene.chol[b, :count], scene.feat[b, :count]
        assert torch.equal(images[b], splat2d(*item, scene.size))
        for whole, part in zip(grads[:3], splat2d_backward(grad[b], *item)[:3], strict=True):
            assert torch.equal(whole[b, :count], part)
            assert not whole[b, count:].any()


def test_order_of_the_gaussians_changes_roundings_only() -> None:
    scene = random_scene(1, 500, 3, (64, 64))
    order = torch.randperm(500)
    image = splat2d(scene.mu, scene.chol, scene.feat, scene.size)
    other = splat2d(scene.mu[:, order], scene.chol[:, order], scene.feat[:, order], scene.size)
    assert relative(other, image.double()) <= 1e-5


@pytest.mark.parametrize("n", [300, 5000])
def test_many_gaussians_on_one_tile(n: int) -> None:
    """None of them is dropped: each adds the same to the pixel it lies on."""
    mu = torch.full((n, 2), 7.0)
    chol = torch.tensor([0.3, 0.0, 0.3]).expand(n, 3)
    image = splat2d(mu, chol, torch.ones(n, 1), (16, 16))
    assert image[0, 7, 7].item() == n
    grads = splat2d_backward(torch.ones(1, 16, 16), mu, chol, torch.ones(n, 1))
    assert bool((grads.feat == grads.feat[0]).all())


EXTREME = {
    "sigma 0.3": (random_scene(1, 60, 3, (30, 30), seed=5), (0.3, 0.0, 0.3)),
    "sigma above the image": (random_scene(1, 8, 3, (23, 31), seed=6), (400.0, 100.0, 300.0)),
    "sheared": (random_scene(1, 30, 3, (40, 40), seed=7), (1.5, 6.0, 1.5)),
    "needles": (random_scene(1, 20, 3, (40, 40), seed=8), (12.0, 11.0, 0.4)),
    "upright needles": (random_scene(1, 20, 3, (40, 40), seed=9), (0.4, 8.0, 12.0)),
    "narrow image": (random_scene(1, 30, 3, (50, 5), seed=10), (2.0, 0.5, 1.0)),
    "one row": (random_scene(1, 30, 3, (1, 100), seed=11), (2.0, 0.5, 1.0)),
    "one pixel": (random_scene(1, 30, 3, (1, 1), seed=12), (2.0, 0.5, 1.0)),
}


@pytest.mark.parametrize("cutoff", [1.0, CUTOFF, 60.0, math.inf])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_shapes(name: str, cutoff: float) -> None:
    scene, shape = EXTREME[name]
    mu, chol, feat = double(scene)
    chol = torch.tensor(shape, dtype=torch.float64).expand_as(chol)
    terms = Terms(mu, chol, scene.size, cutoff)
    grad = torch.randn(1, 3, *scene.size, dtype=torch.float64)
    torch.testing.assert_close(
        splat2d(mu, chol, feat, scene.size, cutoff=cutoff), terms.image(feat)
    )
    found = splat2d_backward(grad, mu, chol, feat, cutoff=cutoff, with_stats=True)
    torch.testing.assert_close(tuple(found), terms.gradients(grad, feat))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_away_and_out_of_range(dtype: torch.dtype) -> None:
    """Positions and shapes near the ends of the range give zeros or the limit, never NaN."""
    huge = torch.finfo(dtype).max / 4
    tiny = torch.finfo(dtype).tiny
    mu = torch.tensor([[1e9, -1e9], [huge, 0], [3, 3], [3, 3], [3, 3], [5, 5]], dtype=dtype)
    chol = torch.tensor(
        [[1, 0, 1], [1, 0, 1], [huge, 0, huge], [1, huge, 1], [tiny, 0, tiny], [huge, huge, tiny]],
        dtype=dtype,
    )
    for at, (m, c) in enumerate(zip(mu, chol, strict=True)):
        one = splat2d(m[None], c[None], torch.ones(1, 1, dtype=dtype), (9, 9))
        grads = splat2d_backward(
            torch.ones_like(one), m[None], c[None], torch.ones(1, 1, dtype=dtype)
        )
        assert bool(one.isfinite().all()), at
        assert all(bool(g.isfinite().all()) for g in grads[:3]), at
    wide = splat2d(mu[2:3], chol[2:3], torch.ones(1, 1, dtype=dtype), (9, 9))
    assert bool((wide == 1).all())
    point = splat2d(mu[4:5], chol[4:5], torch.ones(1, 1, dtype=dtype), (9, 9))
    assert point.sum().item() == 1
    assert point[0, 3, 3].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_that_are_no_normal_numbers_are_zero(dtype: torch.dtype) -> None:
    """Of a round Gaussian on a row of pixels, with weights that fall to 0 within the image."""
    tiny = torch.finfo(dtype).tiny
    width = 50
    mu, chol = torch.zeros(1, 2, dtype=dtype), torch.tensor([[1.0, 0.0, 1.0]], dtype=dtype)
    row = splat2d(mu, chol, torch.ones(1, 1, dtype=dtype), (1, width), cutoff=math.inf)[0, 0]
    exact = [math.exp(-(x**2) / 2) for x in range(width)]
    drawn = [w for w in exact if w > 1.01 * tiny]
    wanted = torch.tensor(drawn, dtype=dtype)
    torch.testing.assert_close(row[: len(drawn)], wanted, rtol=1e-4, atol=0.0)
    assert bool((row[len(drawn) + 1 :] == 0).all())
    assert 0 < len(drawn) < width - 1


def test_rendering_twice_as_large_and_averaging() -> None:
    """A shift of half a pixel would show: centres lie at integers, so x' = 2 x + 1/2."""
    scene = random_scene(1, 60, 3, (48, 64), sigma=4.0)
    small = splat2d(scene.mu, scene.chol, scene.feat, scene.size)
    large = splat2d(2 * scene.mu + 0.5, 2 * scene.chol, scene.feat, (96, 128))
    mean = torch.nn.functional.avg_pool2d(large, 2)
    span = float(small.max() - small.min())
    psnr = 10 * math.log10(span**2 / float((mean - small).square().mean()))
    assert psnr >= 40
    shifted = splat2d(2 * scene.mu, 2 * scene.chol, scene.feat, (96, 128))
    wrong = torch.nn.functional.avg_pool2d(shifted, 2)
    assert 10 * math.log10(span**2 / float((wrong - small).square().mean())) < psnr - 6


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    """One process each, since the variable is read once; only instructions this CPU has are run."""
    script = """
import torch
from sapwood.ops import splat2d, splat2d_backward
from tests.splat2d_scenes import CUTOFF, Terms, clear_scene
for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    for channels in (1, 2, 3, 4, 5):
        scene = clear_scene(2, 60, channels, (35, 27))
        mu, chol, feat = (t.to(dtype) for t in (scene.mu, scene.chol, scene.feat))
        grad = torch.randn(2, channels, 35, 27).to(dtype)
        terms = Terms(mu, chol, scene.size, CUTOFF)
        pairs = [(splat2d(mu, chol, feat, scene.size), terms.image(feat))]
        found = splat2d_backward(grad, mu, chol, feat, with_stats=True)
        pairs += zip(found, terms.gradients(grad, feat), strict=True)
        for actual, expected in pairs:
            error = float((actual.double() - expected).norm() / expected.norm())
            assert error <= bound, (dtype, channels, error)
"""
    env = {**os.environ, "SAPWOOD_CPU_CAPABILITY": capability}
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=root
    )
    assert run.returncode == 0, run.stderr[-2000:]

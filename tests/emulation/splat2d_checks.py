"""Checks of the device kernels of splat2d, shared by the emulation and by real devices.

Every check takes the namespace of ops (``torch.ops.sapwood_emu`` or ``torch.ops.sapwood``) and a
scene that lies where the ops run. Expected values are a dense oracle in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.splat2d_scenes import CUTOFF, Scene, Terms, clear_scene

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Shape = tuple[int, int, int, int, int]  # B, N, C, H, W
SHAPES: list[Shape] = [
    (1, 1, 1, 1, 1),
    (1, 40, 3, 20, 33),
    (2, 35, 4, 17, 16),
    (3, 5, 2, 7, 5),
    (1, 70, 1, 16, 40),
    (1, 9, 9, 18, 18),
    (2, 0, 3, 4, 4),
    (0, 3, 3, 4, 4),
]


def problem(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Scene:
    """Random Gaussians without a pair at the border of the cut."""
    batch, n, channels, height, width = shape
    scene = clear_scene(batch, n, channels, (height, width))
    mu, chol, feat = (t.to(device, dtype) for t in (scene.mu, scene.chol, scene.feat))
    return Scene(mu, chol, feat, scene.size)


def image_grad(scene: Scene) -> Tensor:
    """A gradient of the image, from a fixed seed."""
    shape = (len(scene.mu), scene.feat.shape[2], *scene.size)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return grad.to(scene.mu.device, scene.mu.dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of a sum in float32 or float64, and of the result's own type."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    if not actual.numel():
        return
    wide = 1e-12 if dtype == torch.float64 else 1e-5
    bound = wide * (1 + expected.abs().max()) + torch.finfo(dtype).eps * expected.abs()
    assert bool(((actual.cpu().double() - expected).abs() <= bound).all())


def exact(scene: Scene, cutoff: float) -> tuple[Scene, Terms]:
    """The scene on the CPU, and its pairs in float64."""
    here = Scene(scene.mu.cpu(), scene.chol.cpu(), scene.feat.cpu(), scene.size)
    return here, Terms(here.mu, here.chol, here.size, cutoff)


def check_image(ops: Any, scene: Scene, cutoff: float = CUTOFF) -> None:
    here, terms = exact(scene, cutoff)
    image = ops.splat2d(scene.mu, scene.chol, scene.feat, None, *scene.size, cutoff)
    assert_close(image, terms.image(here.feat), scene.mu.dtype)


def check_gradients(ops: Any, scene: Scene, cutoff: float = CUTOFF, *, stats: bool = True) -> None:
    here, terms = exact(scene, cutoff)
    grad = image_grad(scene)
    found = ops.splat2d_backward(grad, scene.mu, scene.chol, scene.feat, None, cutoff, stats)
    wanted = terms.gradients(grad.cpu(), here.feat)
    for actual, expected in zip(found[:3], wanted[:3], strict=True):
        assert_close(actual, expected, scene.mu.dtype)
    assert_close(found[3], wanted[3] if stats else wanted[3][:, :0], scene.mu.dtype)


def check_pairs(ops: Any, scene: Scene, cutoff: float = CUTOFF) -> None:
    _, terms = exact(scene, cutoff)
    found = ops.splat2d_pairs(scene.mu, scene.chol, None, *scene.size, cutoff)
    assert torch.equal(found.cpu(), (terms.q <= cutoff).sum((1, 2, 3)))


def check_counts(ops: Any, scene: Scene) -> None:
    """A ragged batch is, bit for bit, its items one by one."""
    counts = torch.arange(len(scene.mu), device=scene.mu.device) * 7 % (scene.mu.shape[1] + 1)
    args = (scene.mu, scene.chol, scene.feat)
    grad = image_grad(scene)
    images = ops.splat2d(*args, counts, *scene.size, CUTOFF)
    grads = ops.splat2d_backward(grad, *args, counts, CUTOFF, True)
    pairs = ops.splat2d_pairs(*args[:2], counts, *scene.size, CUTOFF)
    for b, count in enumerate(counts.tolist()):
        item = [t[b : b + 1, :count] for t in args]
        assert torch.equal(images[b : b + 1], ops.splat2d(*item, None, *scene.size, CUTOFF))
        assert pairs[b] == ops.splat2d_pairs(*item[:2], None, *scene.size, CUTOFF)[0]
        alone = ops.splat2d_backward(grad[b : b + 1], *item, None, CUTOFF, True)
        for whole, part in zip(grads, alone, strict=True):
            assert torch.equal(whole[b : b + 1, :count], part)
            assert not whole[b, count:].any()


def check_not_drawn(ops: Any, device: str = "cpu") -> None:
    """What is not a Gaussian leaves no trace."""
    scene = problem((1, 6, 3, 9, 12), device=device)
    mu, chol = scene.mu.clone(), scene.chol.clone()
    mu[0, 0, 1], chol[0, 1, 0], chol[0, 2, 2], chol[0, 3, 1] = math.nan, 0.0, -1.0, math.inf
    kept = [4, 5]
    image = ops.splat2d(mu, chol, scene.feat, None, *scene.size, CUTOFF)
    alone = ops.splat2d(mu[:, kept], chol[:, kept], scene.feat[:, kept], None, *scene.size, CUTOFF)
    assert torch.equal(image, alone)
    grads = ops.splat2d_backward(image_grad(scene), mu, chol, scene.feat, None, CUTOFF, True)
    assert all(not g[0, :4].any() and bool(g[0, 4:].any()) for g in grads)

"""What splat2d promises beside numbers: errors, values that are refused, shapes, torch.func."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sapwood
from sapwood.ops import splat2d, splat2d_backward, splat2d_pairs
from sapwood.ops.splat2d import DEFAULT_CUTOFF
from tests.splat2d_scenes import CUTOFF, Terms, random_scene

SIZE = (9, 12)
SCENE = random_scene(2, 5, 3, SIZE)
MU, CHOL, FEAT = SCENE.mu, SCENE.chol, SCENE.feat


def call(**changes: Any) -> Tensor:
    given: dict[str, Any] = {"mu": MU, "chol": CHOL, "feat": FEAT, "size": SIZE, **changes}
    return splat2d(
        given.pop("mu"), given.pop("chol"), given.pop("feat"), given.pop("size"), **given
    )


def replaced(t: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    changed = t.clone()
    changed[at] = value
    return changed


ERRORS: list[tuple[type[Exception], dict[str, Any], str]] = [
    (TypeError, {"mu": [1.0]}, "mu must be a tensor, got list"),
    (TypeError, {"mu": MU.long()}, "mu must be floating point, got torch.int64"),
    (TypeError, {"chol": CHOL.long()}, "chol must be floating point, got torch.int64"),
    (
        TypeError,
        {"mu": MU.half(), "chol": CHOL.half(), "feat": FEAT.half()},
        "mu must be torch.float32 or torch.float64, got torch.float16",
    ),
    (
        RuntimeError,
        {"feat": FEAT.double()},
        "feat must have mu's dtype torch.float32, got torch.float64",
    ),
    (
        RuntimeError,
        {"feat": FEAT.half()},
        "feat must have mu's dtype torch.float32, got torch.float16",
    ),
    (ValueError, {"mu": torch.zeros(2)}, "mu must have at least 2 dimensions, got shape (2,)"),
    (
        ValueError,
        {"chol": CHOL[:, :4]},
        "chol must have shape (..., N, 3) = (2, 5, 3), got (2, 4, 3)",
    ),
    (ValueError, {"mu": MU[..., :1]}, "mu must have shape (..., N, 2) = (2, 5, 2), got (2, 5, 1)"),
    (
        ValueError,
        {"feat": FEAT[..., :0]},
        "feat must have shape (..., N, C) = (2, 5, 1), got (2, 5, 0)",
    ),
    (
        ValueError,
        {"mu": MU.expand(3, 2, 5, 2), "chol": CHOL[None].expand(4, 2, 5, 3)},
        "mu, chol and feat must have leading dimensions that broadcast, got ((3, 2), (4, 2), (2,))",
    ),
    (ValueError, {"size": (0, 5)}, "size must be at least (1, 1), got (0, 5)"),
    (
        ValueError,
        {"size": (1, 2**24 + 1)},
        "size must be at most (16777216, 16777216), got (1, 16777217)",
    ),
    (TypeError, {"size": 5}, "size must be a pair (height, width), got 5"),
    (TypeError, {"size": (4.0, 5)}, "size must be a pair of integers, got (4.0, 5)"),
    (ValueError, {"cutoff": 0.0}, "cutoff must be positive, got 0.0"),
    (ValueError, {"cutoff": math.nan}, "cutoff must be positive, got nan"),
    (ValueError, {"eps": 0.0}, "eps must be positive and finite, got 0.0"),
    (ValueError, {"mode": "max"}, "mode must be one of sum, norm, got 'max'"),
    (TypeError, {"counts": torch.ones(2)}, "counts must be torch.int64, got torch.float32"),
    (
        ValueError,
        {"counts": torch.ones(3, dtype=torch.int64)},
        "counts must broadcast to the leading shape (2,), got (3,)",
    ),
    (ValueError, {"counts": torch.tensor([1, 6])}, "counts must be in [0, 5], got 6"),
    (ValueError, {"counts": torch.tensor([-1, 2])}, "counts must be in [0, 5], got -1"),
    (
        ValueError,
        {"mu": replaced(MU, (1, 2, 0), math.nan)},
        "mu must be finite, got nan at (1, 2, 0)",
    ),
    (
        ValueError,
        {"chol": replaced(CHOL, (0, 1, 1), math.inf)},
        "chol must be finite, got inf at (0, 1, 1)",
    ),
    (
        ValueError,
        {"feat": replaced(FEAT, (0, 0, 2), math.nan)},
        "feat must be finite, got nan at (0, 0, 2)",
    ),
    (
        ValueError,
        {"chol": replaced(CHOL, (0, 1, 2), 0.0)},
        "chol must have l1 > 0 and l3 > 0, got 0.0",
    ),
    (RuntimeError, {"feat": FEAT.to("meta")}, "mu is on cpu but feat is on meta"),
]


@pytest.mark.parametrize(("kind", "changes", "text"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(kind: type[Exception], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape('sapwood.splat2d: ' + text)}"):
        call(**changes)


def test_errors_of_the_gradient() -> None:
    grad = torch.ones(2, 3, *SIZE)
    for bad in (grad[0], grad[:, :2], torch.ones(2, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"grad must have shape \(2, 3, H, W\), got"):
            splat2d_backward(bad, MU, CHOL, FEAT)
    with pytest.raises(RuntimeError, match=r"grad must have mu.s dtype torch\.float32"):
        splat2d_backward(grad.double(), MU, CHOL, FEAT)
    with pytest.raises(TypeError, match=r"splat2d_backward: grad must be a tensor, got int"):
        splat2d_backward(1, MU, CHOL, FEAT)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["splat2d", "splat2d_backward", "splat2d_pairs"])
def test_the_raw_ops_check_what_memory_safety_needs(op: str) -> None:
    raw = getattr(torch.ops.sapwood, op)
    tail: dict[str, tuple[Any, ...]] = {
        "splat2d": (FEAT, None, 4, 5, CUTOFF),
        "splat2d_backward": (FEAT, None, CUTOFF, False),
        "splat2d_pairs": (None, 4, 5, CUTOFF),
    }
    head = (torch.ones(2, 3, 4, 5),) if op == "splat2d_backward" else ()
    with pytest.raises(RuntimeError, match=rf"sapwood.{op}: chol must have shape \(2, 5, 3\)"):
        raw(*head, MU, CHOL[:, :4], *tail[op])
    with pytest.raises(RuntimeError, match=rf"sapwood.{op}: chol must have mu's dtype"):
        raw(*head, MU, CHOL.double(), *tail[op])


def test_values_are_not_looked_at_when_told_so() -> None:
    """What is not a Gaussian is not drawn and has gradient 0."""
    good = call()
    for name, source, at in (
        ("mu", MU, (0, 1, 0)),
        ("chol", CHOL, (0, 1, 1)),
        ("chol", CHOL, (0, 1, 2)),
    ):
        for value in (math.nan, math.inf, -math.inf, *((0.0, -1.0) if at[2] == 2 else ())):
            got = call(**{name: replaced(source, at, value)}, validate=False)
            kept = [0, 2, 3, 4]
            alone = splat2d(MU[0, kept], CHOL[0, kept], FEAT[0, kept], SIZE)
            torch.testing.assert_close(got[0], alone)
            assert torch.equal(got[1], good[1])
            given = {"mu": MU, "chol": CHOL, name: replaced(source, at, value)}
            grads = splat2d_backward(
                torch.ones_like(good), given["mu"], given["chol"], FEAT, validate=False
            )
            assert all(not g[0, 1].any() for g in grads[:3])
            assert all(bool(g.isfinite().all()) for g in grads[:3])


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_stay_in_their_ellipse(value: float, channels: int) -> None:
    scene = random_scene(1, 6, channels, (30, 40), sigma=1.5)
    feat = scene.feat.clone()
    feat[0, 2, 0] = value
    inside = Terms(scene.mu, scene.chol, scene.size, CUTOFF).w[0, 2] > 0
    got = splat2d(scene.mu, scene.chol, feat, scene.size, validate=False)
    plain = splat2d(scene.mu, scene.chol, scene.feat, scene.size)
    assert torch.equal(got[0, 0].isfinite(), ~inside)
    torch.testing.assert_close(got[0, 0][~inside], plain[0, 0][~inside])
    torch.testing.assert_close(got[0, 1:], plain[0, 1:])


def test_gradients_that_are_not_finite_reach_only_what_covers_their_pixel() -> None:
    scene = random_scene(1, 30, 3, (40, 40), sigma=1.5)
    grad = torch.randn(1, 3, 40, 40)
    plain = splat2d_backward(grad, scene.mu, scene.chol, scene.feat)
    x, y = (int(v) for v in scene.mu[0, 0].round().clamp(0, 39))
    covers = Terms(scene.mu, scene.chol, scene.size, CUTOFF).w[0, :, y, x] > 0
    assert 0 < int(covers.sum()) < 30
    grad[0, 1, y, x] = math.nan
    found = splat2d_backward(grad, scene.mu, scene.chol, scene.feat)
    assert torch.equal(found.mu[0].isnan().any(-1), covers)
    torch.testing.assert_close(found.mu[0][~covers], plain.mu[0][~covers])
    assert not found.feat[0][:, [0, 2]].isnan().any()


def test_leading_dimensions_broadcast() -> None:
    one = splat2d(MU[0], CHOL[0], FEAT[0], SIZE)
    assert one.shape == (3, *SIZE)
    grid = splat2d(MU[:, None], CHOL[0], FEAT[None, :1].expand(1, 4, 5, 3), SIZE)
    assert grid.shape == (2, 4, 3, *SIZE)
    assert torch.equal(grid[0, 3], one)
    leaf = MU[0].clone().requires_grad_()
    splat2d(leaf.expand(2, 5, 2), CHOL, FEAT, SIZE).sum().backward()
    assert leaf.grad is not None
    each = splat2d_backward(torch.ones(2, 3, *SIZE), MU[0], CHOL, FEAT)
    torch.testing.assert_close(leaf.grad, each.mu.sum(0))


@pytest.mark.parametrize("mode", ["sum", "norm"])
def test_the_low_level_gradient_is_that_of_autograd(mode: str) -> None:
    leaves = [t.double().requires_grad_() for t in (MU, CHOL, FEAT)]
    grad = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    counts = torch.tensor([5, 3])
    splat2d(*leaves, SIZE, mode=mode, counts=counts).backward(grad)
    found = splat2d_backward(
        grad, *(t.detach() for t in leaves), mode=mode, counts=counts, with_stats=True
    )
    for leaf, actual in zip(leaves, found[:3], strict=True):
        torch.testing.assert_close(actual, leaf.grad)
    assert found.abs_mu is not None
    assert bool((found.abs_mu >= found.mu.abs() - 1e-12).all())


def test_gradients_of_an_image_that_no_cache_holds() -> None:
    """Such an image is read band by band; what lies beyond a corner of it has no slope here."""
    height, width = 380, 300
    assert 3 * height * width * 4 > 1 << 20
    scene = random_scene(2, 40, 3, (height, width), sigma=9.0)
    mu = scene.mu.clone()
    mu[:, ::3] -= 60.0  # some beyond the upper border
    grad = torch.zeros(2, 3, height, width)
    corner = (slice(None), slice(None), slice(0, 70), slice(0, 90))
    grad[corner] = torch.randn(2, 3, 70, 90)
    large = splat2d_backward(grad, mu, scene.chol, scene.feat)
    small = splat2d_backward(grad[corner].contiguous(), mu, scene.chol, scene.feat)
    assert any(bool(part.any()) for part in small)
    for a, b in zip(large, small, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_norm_is_a_weighted_mean() -> None:
    same = torch.full_like(FEAT, 0.75)
    image = splat2d(MU, CHOL, same, SIZE, mode="norm", eps=1e-12)
    covered = splat2d(MU, CHOL, torch.ones(2, 5, 1), SIZE)[:, 0] > 1e-3
    assert bool(((image - 0.75).abs().amax(1)[covered] < 1e-5).all())
    assert bool((image >= 0).all())


def test_channels_do_not_know_each_other() -> None:
    feat = torch.randn(2, 5, 17)
    together = splat2d(MU, CHOL, feat, SIZE)
    for c in range(17):
        alone = splat2d(MU, CHOL, feat[..., c : c + 1], SIZE)
        torch.testing.assert_close(together[:, c : c + 1], alone, rtol=1e-6, atol=1e-6)


def test_autocast_computes_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = splat2d(MU, CHOL, FEAT.bfloat16(), SIZE)
    assert image.dtype == torch.float32
    assert torch.equal(image, splat2d(MU, CHOL, FEAT.bfloat16().float(), SIZE))


def test_pairs_without_a_cut_are_all_pixels() -> None:
    everything = 5 * SIZE[0] * SIZE[1]
    assert splat2d_pairs(MU, CHOL, SIZE, cutoff=math.inf).tolist() == [everything, everything]
    assert splat2d_pairs(MU[0], CHOL[0], SIZE, counts=torch.tensor(0)).item() == 0


def test_the_default_cut_is_at_one_255th() -> None:
    assert math.exp(-DEFAULT_CUTOFF / 2) == pytest.approx(1 / 255)
    assert torch.equal(call(), call(cutoff=DEFAULT_CUTOFF))


def loss(mu: Tensor, mode: str) -> Tensor:
    return splat2d(mu, CHOL[0], FEAT[0], SIZE, mode=mode).square().sum()


@pytest.mark.parametrize("mode", ["sum", "norm"])
def test_torch_func(mode: str) -> None:
    leaf = MU[0].clone().requires_grad_()
    loss(leaf, mode).backward()
    torch.testing.assert_close(torch.func.grad(loss)(MU[0], mode), leaf.grad)
    each = torch.vmap(torch.func.grad(lambda m: loss(m, mode)))(MU)
    torch.testing.assert_close(each[0], leaf.grad)
    jacobian: Any = torch.func.jacrev(lambda m: splat2d(m, CHOL[0], FEAT[0], SIZE, mode=mode))(
        MU[0]
    )
    assert jacobian.shape == (3, *SIZE, 5, 2)


@pytest.mark.parametrize("mode", ["sum", "norm"])
def test_compile_and_export(mode: str) -> None:
    def image(mu: Tensor, chol: Tensor, feat: Tensor) -> Tensor:
        return splat2d(mu, chol, feat, SIZE, mode=mode)

    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(image, fullgraph=True, backend="aot_eager")
    leaf = MU.clone().requires_grad_()
    result = compiled(leaf, CHOL, FEAT)
    assert torch.equal(result, image(MU, CHOL, FEAT))
    result.sum().backward()
    plain = MU.clone().requires_grad_()
    image(plain, CHOL, FEAT).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)

    class Module(torch.nn.Module):
        def forward(self, mu: Tensor, chol: Tensor, feat: Tensor) -> Tensor:
            return image(mu, chol, feat)

    exported = torch.export.export(Module(), (MU, CHOL, FEAT))
    assert torch.equal(exported.module()(MU, CHOL, FEAT), image(MU, CHOL, FEAT))


def test_explain_and_the_reference_backend() -> None:
    assert sapwood.explain(splat2d, MU, CHOL, FEAT, SIZE).chosen == "native"
    assert sapwood.explain(splat2d_pairs, MU, CHOL, SIZE).chosen == "native"
    grad = torch.ones(2, 3, *SIZE)
    assert sapwood.explain(splat2d_backward, grad, MU, CHOL, FEAT).chosen == "native"
    with sapwood.backend("reference"):
        torch.testing.assert_close(call(), splat2d(MU, CHOL, FEAT, SIZE))
        reference = splat2d_backward(torch.ones(2, 3, *SIZE), MU, CHOL, FEAT)
    native = splat2d_backward(torch.ones(2, 3, *SIZE), MU, CHOL, FEAT)
    for a, b in zip(reference[:3], native[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

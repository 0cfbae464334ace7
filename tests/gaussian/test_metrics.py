"""PSNR and SSIM against definitions written as loops in float64, and against scikit-image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sapwood.gaussian import metrics, psnr, ssim


def pair(height: int = 17, width: int = 23, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
    noise = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
    return image, (0.8 * image + 0.2 * noise).clamp(0, 1)


def ssim_by_loops(a: Tensor, b: Tensor) -> float:
    """Equation 13 of Wang et al. at every valid position, with the window as a plain table."""
    table = [
        [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
        for i in range(11)
    ]
    window = torch.tensor(table, dtype=torch.float64)
    window = window / window.sum()
    values = []
    for c in range(a.shape[0]):
        for y in range(a.shape[1] - 10):
            for x in range(a.shape[2] - 10):
                p, q = a[c, y : y + 11, x : x + 11], b[c, y : y + 11, x : x + 11]
                mp, mq = float((window * p).sum()), float((window * q).sum())
                vp = float((window * (p - mp) ** 2).sum())
                vq = float((window * (q - mq) ** 2).sum())
                both = float((window * (p - mp) * (q - mq)).sum())
                top = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                values.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return sum(values) / len(values)


def test_ssim_is_the_definition() -> None:
    a, b = pair()
    assert float(ssim(a, b)) == pytest.approx(ssim_by_loops(a, b), abs=1e-12)
    assert float(ssim(a.float(), b.float())) == pytest.approx(ssim_by_loops(a, b), abs=2e-6)


def test_ssim_is_that_of_scikit_image() -> None:
    package = pytest.importorskip("skimage.metrics")
    a, b = pair(40, 50)
    value = package.structural_similarity(
        a.numpy(),
        b.numpy(),
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1]
    inside = value[:, 5:-5, 5:-5]  # elsewhere the window is padded
    assert float(ssim(a, b)) == pytest.approx(inside.mean(), abs=1e-9)


def test_psnr_is_the_definition() -> None:
    a, b = pair()
    squares = [
        (x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    ]
    expected = 10 * math.log10(len(squares) / math.fsum(squares))
    assert float(psnr(a, b)) == pytest.approx(expected, abs=1e-10)


def test_equal_images() -> None:
    a, _ = pair()
    assert float(psnr(a, a)) == math.inf
    assert float(ssim(a, a)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_leading_dimensions_are_images(metric: object) -> None:
    assert callable(metric)
    pairs = [pair(seed=s) for s in range(6)]
    a = torch.stack([p[0] for p in pairs]).view(2, 3, 3, 17, 23)
    b = torch.stack([p[1] for p in pairs]).view(2, 3, 3, 17, 23)
    values = metric(a, b)
    assert values.shape == (2, 3)
    single = torch.stack([metric(*p) for p in pairs]).view(2, 3)
    torch.testing.assert_close(values, single, rtol=0, atol=1e-12)
    torch.testing.assert_close(metric(a.transpose(-1, -2), b.transpose(-1, -2)), values)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_gradients(metric: object) -> None:
    assert callable(metric)
    a, b = pair(12, 13)
    a = a * 0.8 + 0.1  # away from the clamp's corners
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: metric(x, b), (a,))


def test_clamping() -> None:
    a, b = pair()
    beyond = a * 3 - 1
    assert float(psnr(beyond, b)) == float(psnr(beyond.clamp(0, 1), b))
    assert float(psnr(beyond, b, clamp=False)) < float(psnr(beyond, b))
    assert float(ssim(beyond, b, clamp=False)) != float(ssim(beyond, b))


def test_half_precision_is_widened() -> None:
    a, b = pair()
    value = ssim(a.bfloat16(), b.bfloat16())
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(ssim(a, b)), abs=0.02)


def test_the_smallest_image_has_one_window() -> None:
    a, b = pair(11, 11)
    assert float(ssim(a, b)) == pytest.approx(ssim_by_loops(a, b), abs=1e-12)
    assert metrics.WINDOW == 11


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_errors(name: str) -> None:
    metric = getattr(metrics, name)
    a, b = pair()
    with pytest.raises(TypeError, match=f"sapwood.{name}: image must be a tensor, got list"):
        metric([1.0], b)
    with pytest.raises(TypeError, match=f"sapwood.{name}: target must be floating point, got"):
        metric(a, (b > 0.5).long())
    with pytest.raises(
        ValueError,
        match=rf"sapwood.{name}: target must have image's shape \(3, 17, 23\), got \(3, 17, 22\)",
    ):
        metric(a, b[..., 1:])
    with pytest.raises(
        ValueError,
        match=rf"sapwood.{name}: image must have at least 3 dimensions, got shape \(17, 23\)",
    ):
        metric(a[0], b[0])
    with pytest.raises(
        RuntimeError, match=f"sapwood.{name}: image is on cpu but target is on meta"
    ):
        metric(a, b.to("meta"))


def test_an_image_below_the_window_is_refused() -> None:
    a, b = pair(10, 23)
    expected = r"sapwood.ssim: image must be at least 11 x 11, got \(10, 23\)"
    with pytest.raises(ValueError, match=expected):
        ssim(a, b)

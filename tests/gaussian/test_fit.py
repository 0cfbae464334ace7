"""fit_image and fit_images: what they reach, that they repeat, and how they end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood.gaussian import FitProgress, fit_image, fit_images, psnr, ssim
from sapwood.gaussian._settings import default_count
from sapwood.gaussian.images import as_image
from tests.gaussian.conftest import scene

DENSIFY = ("error", "split", "none")


@pytest.mark.parametrize("mode", ["sum", "norm"])
@pytest.mark.parametrize("densify", DENSIFY)
def test_fits_reach_their_image(image: Tensor, densify: str, mode: str) -> None:
    result = fit_image(image, 160, steps=200, densify=densify, mode=mode)
    assert result.psnr > 30
    assert result.history[0]["psnr"] < result.psnr - 10
    picture = result.field.render(clamp=True)
    assert float(psnr(picture, image)) == pytest.approx(result.psnr, abs=1e-3)
    assert float(ssim(picture, image)) == pytest.approx(result.ssim, abs=1e-4)
    assert (result.field.height, result.field.width, result.field.mode) == (40, 48, mode)
    assert len(result.field) <= 160
    assert densify == "split" or len(result.field) == 160


def test_the_loss_with_ssim_gains_similarity() -> None:
    """Noise is expensive in squares and cheap in structure, texture the other way round."""
    image = scene(64, 64, seed=2)
    image = (image + 0.1 * (torch.arange(64) % 3 - 1.0)).clamp(0, 1)
    options: dict[str, Any] = {"steps": 200, "densify": "none"}
    by_square = fit_image(image, 250, loss="mse", **options)
    by_ssim = fit_image(image, 250, loss="l1ssim", **options)
    assert by_ssim.ssim > by_square.ssim


def test_more_gaussians_and_more_steps_are_better() -> None:
    image = scene(48, 56, seed=3)
    by_count = [fit_image(image, n, steps=150).psnr for n in (60, 120, 240)]
    by_steps = [fit_image(image, 120, steps=s).psnr for s in (50, 100, 200)]
    assert by_count == sorted(by_count)
    assert by_steps == sorted(by_steps)


def test_positions_by_gradient_beat_uniform_ones() -> None:
    """On a photo: a roof in front of the sky."""
    datasets = pytest.importorskip("sklearn.datasets")
    photo = as_image(datasets.load_sample_image("china.jpg"))[:, 100:228, 230:358]
    options: dict[str, Any] = {"steps": 200, "densify": "none"}
    gains = [
        fit_image(photo, 1200, seed=s, **options).psnr
        - fit_image(photo, 1200, seed=s, init="uniform", **options).psnr
        for s in range(3)
    ]
    assert min(gains) > 0.5


@pytest.mark.parametrize("densify", DENSIFY)
def test_fits_repeat_bit_for_bit(image: Tensor, densify: str) -> None:
    first, second = (fit_image(image, 90, steps=60, densify=densify) for _ in range(2))
    assert torch.equal(first.field.mu, second.field.mu)
    assert torch.equal(first.field.feat, second.field.feat)
    assert first.history == second.history
    other = fit_image(image, 90, steps=60, densify=densify, seed=1)
    assert not torch.equal(first.field.mu[:5], other.field.mu[:5])


@pytest.mark.parametrize("densify", DENSIFY)
@pytest.mark.parametrize("mode", ["sum", "norm"])
def test_a_batch_is_its_images_one_by_one(densify: str, mode: str) -> None:
    images = torch.stack([scene(28, 36, seed) for seed in range(4)])
    options: dict[str, Any] = {"steps": 90, "densify": densify, "mode": mode}
    together = fit_images(images, 70, **options)
    for image, result in zip(images, together, strict=True):
        alone = fit_image(image, 70, **options)
        assert result.psnr == pytest.approx(alone.psnr, abs=0.05)
        assert len(result.field) == len(alone.field)
        assert [h["n"] for h in result.history] == [h["n"] for h in alone.history]


def test_what_an_image_can_be(image: Tensor) -> None:
    eight_bits = (image * 255).round().to(torch.uint8)
    array = eight_bits.permute(1, 2, 0).numpy()
    options: dict[str, Any] = {"steps": 20}
    expected = fit_image(eight_bits.float() / 255, 50, **options).psnr
    assert fit_image(eight_bits, 50, **options).psnr == expected
    assert fit_image(array, 50, **options).psnr == expected
    assert fit_image(array.astype(np.float64) / 255, 50, **options).psnr == pytest.approx(expected)
    grey = fit_image(array[..., 0], 50, **options)
    assert grey.field.feat.shape == (50, 1)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_any_number_of_channels(channels: int) -> None:
    image = scene(20, 24).repeat(2, 1, 1)[:channels]
    result = fit_image(image, 60, steps=80)
    assert result.field.render().shape == (channels, 20, 24)
    assert result.psnr > 25


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2)])
@pytest.mark.parametrize("densify", DENSIFY)
def test_tiny_images(size: tuple[int, int], densify: str) -> None:
    result = fit_image(torch.full((3, *size), 0.5), 4, steps=200, densify=densify)
    assert result.psnr > 25
    assert math.isnan(result.ssim)


@pytest.mark.parametrize("densify", DENSIFY)
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_runs_of_a_few_steps(image: Tensor, densify: str, steps: int) -> None:
    result = fit_image(image, 33, steps=steps, densify=densify)
    assert result.history[-1]["step"] == steps
    assert len(result.field) == 33 or densify == "split"


def test_one_gaussian(image: Tensor) -> None:
    for densify in DENSIFY:
        assert len(fit_image(image, 1, steps=20, densify=densify).field) == 1


def test_a_strided_view_is_an_image(image: Tensor) -> None:
    view = image.transpose(1, 2)
    first, second = fit_image(view, 40, steps=20), fit_image(view.contiguous(), 40, steps=20)
    assert torch.equal(first.field.mu, second.field.mu)
    assert (first.field.height, first.field.width) == (48, 40)


def test_the_image_does_not_change(image: Tensor) -> None:
    before = image.clone()
    fit_image(image, 40, steps=20)
    assert torch.equal(image, before)


def test_default_number() -> None:
    assert [default_count(s) for s in ((256, 256), (8, 8), (4000, 4000))] == [5041, 64, 20_000]
    assert len(fit_image(scene(30, 40), steps=4).field) == 92


def test_history_and_callback(image: Tensor) -> None:
    seen: list[FitProgress] = []
    result = fit_image(image, 40, steps=35, callback=seen.append)
    assert [h["step"] for h in result.history] == [0, 10, 20, 30, 35]
    assert [p.step for p in seen] == [0, 10, 20, 30, 35]
    assert [p.psnr for p in seen] == [h["psnr"] for h in result.history]
    assert seen[0].steps == 35
    assert seen[0].n == 12
    assert seen[-1].n == 40
    assert 0 < seen[-1].seconds <= result.seconds
    assert result.history[-1]["stopped"] == "steps"
    assert result.history[-1]["psnr"] == result.psnr


def test_a_callback_can_end_the_fit(image: Tensor) -> None:
    result = fit_image(image, 40, steps=100, callback=lambda now: now.step >= 20)
    assert result.history[-1]["step"] == 20
    assert result.history[-1]["stopped"] == "callback"
    assert float(psnr(result.field.render(), image)) == pytest.approx(result.psnr, abs=1e-3)


def test_time_and_quality_can_end_the_fit(image: Tensor) -> None:
    timed = fit_image(image, 40, steps=10**6, time_limit=0.2)
    assert timed.history[-1]["stopped"] == "time_limit"
    assert 0.2 <= timed.seconds < 5
    good = fit_image(image, 160, steps=400, target_psnr=25.0)
    assert good.history[-1]["stopped"] == "target_psnr"
    assert good.psnr >= 25 > good.history[-2]["psnr"]


def test_a_batch_goes_on_until_all_are_good() -> None:
    images = [torch.full((3, 20, 24), 0.5), scene(20, 24)]
    results = fit_images(images, 90, steps=400, target_psnr=28.0)
    assert all(r.psnr >= 28 for r in results)
    assert results[0].history[-2]["psnr"] >= 28 > results[1].history[-2]["psnr"]


def test_an_error_in_the_callback_gets_out(image: Tensor) -> None:
    def fail(_: FitProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_image(image, 40, steps=35, callback=fail)


def test_no_images() -> None:
    assert fit_images([], 10) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_gaussians": 0}, "n_gaussians must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"mode": "max"}, "mode must be one of sum, norm, got 'max'"),
        ({"init": "zero"}, "init must be one of gradient, uniform, got 'zero'"),
        ({"densify": "all"}, "densify must be one of error, split, none, got 'all'"),
        ({"loss": "l2"}, "loss must be one of mse, l1ssim, got 'l2'"),
        ({"lr_pos": 0.0}, "lr_pos must be positive, got 0.0"),
        ({"lr_chol": math.nan}, "lr_chol must be positive, got nan"),
        ({"lr_feat": math.inf}, "lr_feat must be positive, got inf"),
        ({"sigma_min": -1.0}, "sigma_min must be positive, got -1.0"),
        ({"time_limit": 0.0}, "time_limit must be positive, got 0.0"),
        ({"target_psnr": math.nan}, "target_psnr must be a number, got nan"),
    ],
)
@pytest.mark.parametrize("function", [fit_image, fit_images])
def test_arguments_are_checked(
    image: Tensor, options: dict[str, Any], text: str, function: Any
) -> None:
    given = image if function is fit_image else image[None]
    with pytest.raises(ValueError) as caught:
        function(given, **options)
    assert str(caught.value) == f"sapwood.{function.__name__}: {text}"


def test_ssim_needs_its_window() -> None:
    text = "sapwood.fit_image: image must be at least 11 x 11 for the loss l1ssim, got (10, 20)"
    with pytest.raises(ValueError) as caught:
        fit_image(torch.zeros(3, 10, 20), loss="l1ssim")
    assert str(caught.value) == text


def test_images_of_one_size() -> None:
    with pytest.raises(ValueError, match=r"sapwood.fit_images: images must have one shape, got \["):
        fit_images([torch.zeros(3, 4, 5), torch.zeros(3, 5, 4)])
    with pytest.raises(TypeError, match=r"options must be those of fit_image, got \['step'\]"):
        fit_images(torch.zeros(1, 3, 4, 5), step=3)

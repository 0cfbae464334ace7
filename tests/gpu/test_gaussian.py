"""Fits on a GPU begin where those on the CPU begin, and end as well."""

from __future__ import annotations

import pytest
import torch

from sapwood.gaussian import GaussianField, fit_image, fit_images
from tests.gaussian.conftest import scene

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["sum", "norm"])
@pytest.mark.parametrize("densify", ["error", "split", "none"])
def test_a_fit_is_as_good_as_on_the_cpu(densify: str, mode: str) -> None:
    image = scene(64, 80)
    here = fit_image(image, 300, steps=300, densify=densify, mode=mode)
    there = fit_image(image, 300, steps=300, densify=densify, mode=mode, device="cuda")
    assert there.field.mu.is_cuda
    assert there.history[0]["psnr"] == pytest.approx(here.history[0]["psnr"], abs=1e-3)
    assert there.psnr == pytest.approx(here.psnr, abs=0.5)
    torch.testing.assert_close(
        there.field.render().cpu(), there.field.to("cpu").render(), rtol=0, atol=1e-4
    )


def test_a_batch_and_its_file(tmp_path: object) -> None:
    images = torch.stack([scene(40, 48, seed) for seed in range(8)])
    results = fit_images(images.cuda(), 150, steps=200, loss="l1ssim")
    assert min(result.psnr for result in results) > 25
    path = f"{tmp_path}/a.safetensors"
    results[0].field.save(path)
    assert torch.equal(GaussianField.load(path).mu, results[0].field.mu.cpu())

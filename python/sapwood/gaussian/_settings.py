"""What a fit can be told, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sapwood import _check
from sapwood.gaussian.metrics import WINDOW
from sapwood.nn.splat2d import MODES

INITS = ("gradient", "uniform")
DENSIFY = ("error", "split", "none")
LOSSES = ("mse", "l1ssim")
_PIXELS_EACH, _FEWEST, _MOST = 13, 64, 20_000


def default_count(size: tuple[int, int]) -> int:
    """One Gaussian per 13 pixels, at least 64 and at most 20 000."""
    return min(max(_FEWEST, size[0] * size[1] // _PIXELS_EACH), _MOST)


@dataclass(frozen=True)
class Settings:
    """The arguments of ``fit_image`` beside the image."""

    n_gaussians: int
    steps: int
    mode: str
    init: str
    densify: str
    loss: str
    lr_pos: float
    lr_chol: float
    lr_feat: float
    sigma_min: float
    seed: int
    time_limit: float | None
    target_psnr: float | None

    def check(self, owner: str, size: tuple[int, int]) -> None:
        """Raises ``ValueError`` for what cannot be done."""
        for name in ("n_gaussians", "steps"):
            if getattr(self, name) < 1:
                _check.fail(ValueError, owner, name, "be at least 1", getattr(self, name))
        for name, allowed in (
            ("mode", MODES),
            ("init", INITS),
            ("densify", DENSIFY),
            ("loss", LOSSES),
        ):
            _check.one_of(owner, name, getattr(self, name), allowed)
        for name in ("lr_pos", "lr_chol", "lr_feat", "sigma_min"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                _check.fail(ValueError, owner, name, "be positive", value)
        if self.time_limit is not None and not self.time_limit > 0:
            _check.fail(ValueError, owner, "time_limit", "be positive", self.time_limit)
        if self.target_psnr is not None and math.isnan(self.target_psnr):
            _check.fail(ValueError, owner, "target_psnr", "be a number", self.target_psnr)
        if self.loss == "l1ssim" and min(size) < WINDOW:
            expected = f"be at least {WINDOW} x {WINDOW} for the loss l1ssim"
            _check.fail(ValueError, owner, "image", expected, size)

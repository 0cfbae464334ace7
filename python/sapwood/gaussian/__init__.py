"""Images made of 2D Gaussians: fitted to photos, drawn at any size, kept in a file.

An image is a sum of N Gaussians, ``image(p) = sum_n w_n(p) feat_n``, drawn and differentiated by
:func:`sapwood.ops.splat2d`. :func:`fit_image` finds them for a photo, :func:`fit_images` for many
at once; :class:`GaussianField` is the result.

Our implementation of accumulated summation in the manner of GaussianImage (Zhang et al., ECCV
2024, arXiv:2403.08551), with the initialisation by gradient and the growth by error of Image-GS
(Zhang et al., SIGGRAPH 2025, arXiv:2407.01866) and the split, clone and prune of 3D Gaussian
splatting (Kerbl et al., 2023, arXiv:2308.04079). Where each of these is:

- equation of the image, mode ``"sum"`` and ``"norm"``: :func:`sapwood.ops.splat2d`
- positions by gradient, growth by error: ``_place``, ``_densify.ByError``
- split, clone and prune: ``_densify.BySplitting``
- Adam and its rates, which are ours: ``_parameters``, ``_optimise``
"""

from __future__ import annotations

from sapwood.gaussian.field import GaussianField
from sapwood.gaussian.fit import FitProgress, FitResult, fit_image, fit_images
from sapwood.gaussian.metrics import psnr, ssim

__all__ = [
    "FitProgress",
    "FitResult",
    "GaussianField",
    "fit_image",
    "fit_images",
    "psnr",
    "ssim",
]

"""How alike two images are: PSNR and SSIM, both differentiable.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error
visibility to structural similarity", IEEE TIP 13(4), 2004, equation 13, per channel and averaged
over pixels and channels. No rounding to eight bits takes place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood import _check

WINDOW = 11  # pixels
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(image: Tensor, target: Tensor, *, clamp: bool = True) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1].

    Example:
        >>> import torch
        >>> from sapwood.gaussian import psnr
        >>> psnr(torch.full((3, 8, 8), 0.6), torch.full((3, 8, 8), 0.5)).round()
        tensor(20.)

    Args:
        image: (..., C, H, W), floating point.
        target: as ``image``.
        clamp: whether both are first clamped to [0, 1], as a file would be. Where a value is
            clamped, its gradient is zero.

    Returns:
        One figure per image, (...); infinite where the two agree exactly.

    Raises:
        TypeError: when one is not a floating point tensor.
        ValueError: when the shapes differ or have fewer than three dimensions.
        RuntimeError: when the devices differ.
    """
    image, target = _pair("psnr", image, target, clamp)
    return -10 * (image - target).square().mean((-3, -2, -1)).log10()


def ssim(image: Tensor, target: Tensor, *, clamp: bool = True) -> Tensor:
    """Structural similarity of images in [0, 1], with a Gaussian window of 11 x 11, sigma 1.5.

    Example:
        >>> import torch
        >>> from sapwood.gaussian import ssim
        >>> image = torch.rand(3, 16, 16)
        >>> f"{ssim(image, image):.4f}"
        '1.0000'

    Args:
        image: (..., C, H, W), floating point, H and W at least 11.
        target: as ``image``.
        clamp: whether both are first clamped to [0, 1], as a file would be.

    Returns:
        One figure per image, (...): the mean over channels and over the positions where the
        window lies inside the image.

    Raises:
        TypeError: when one is not a floating point tensor.
        ValueError: when the shapes differ, have fewer than three dimensions, or are smaller than
            the window.
        RuntimeError: when the devices differ.

    References:
        Wang et al., IEEE TIP 13(4), 2004, equation 13, with C1 = 0.01^2 and C2 = 0.03^2.
    """
    image, target = _pair("ssim", image, target, clamp)
    if min(image.shape[-2:]) < WINDOW:
        size = tuple(image.shape[-2:])
        _check.fail(ValueError, "ssim", "image", f"be at least {WINDOW} x {WINDOW}", size)
    moments = torch.stack(
        [image, target, image * image, target * target, image * target]
    )  # (5, ..., C, H, W)
    mx, my, xx, yy, xy = _blur(moments).unbind(0)
    vx, vy, vxy = xx - mx * mx, yy - my * my, xy - mx * my
    value = (2 * mx * my + _C1) * (2 * vxy + _C2)
    value = value / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return value.mean((-3, -2, -1))


def _taps() -> list[float]:
    weights = [math.exp(-0.5 * (i - WINDOW // 2) ** 2 / _SIGMA**2) for i in range(WINDOW)]
    return [weight / math.fsum(weights) for weight in weights]


class _Blur(torch.autograd.Function):
    """The Gaussian window over the last two dimensions, at valid positions only.

    A sum of shifted images: with one channel that is many times as fast as a convolution, and so
    is the derivative, which is the same sum over the padded gradient, the window being symmetric.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        first, *others = _taps()
        for dim in (-2, -1):
            size = x.shape[dim] - WINDOW + 1
            total = x.narrow(dim, 0, size) * first
            for shift, tap in enumerate(others, 1):
                total.add_(x.narrow(dim, shift, size), alpha=tap)
            x = total
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _blur(F.pad(grad, (WINDOW - 1,) * 4))


def _blur(x: Tensor) -> Tensor:
    result: Tensor = _Blur.apply(x)  # type: ignore[no-untyped-call]
    return result


def _pair(op: str, image: Tensor, target: Tensor, clamp: bool) -> tuple[Tensor, Tensor]:
    for name, value in (("image", image), ("target", target)):
        _check.tensor(op, name, value)
        _check.floating(op, name, value)
    if image.dim() < 3:
        shape = f"shape {tuple(image.shape)}"
        _check.fail(ValueError, op, "image", "have at least 3 dimensions", shape)
    _check.shape(op, "target", target, tuple(image.shape), "image")
    _check.same_device(op, image=image, target=target)
    dtype = torch.promote_types(torch.promote_types(image.dtype, target.dtype), torch.float32)
    image, target = image.to(dtype), target.to(dtype)
    return (image.clamp(0, 1), target.clamp(0, 1)) if clamp else (image, target)

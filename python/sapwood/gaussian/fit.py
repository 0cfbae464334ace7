"""Fits Gaussians to images: :func:`fit_image` and, for many images at once, :func:`fit_images`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sapwood import _check
from sapwood.gaussian import metrics
from sapwood.gaussian._optimise import Optimiser
from sapwood.gaussian._settings import Settings, default_count
from sapwood.gaussian.field import GaussianField
from sapwood.gaussian.images import as_image

_EVERY = 10  # steps between entries of the history


@dataclass(frozen=True)
class FitProgress:
    """Where a fit is: what its callback gets."""

    step: int  # done so far
    steps: int
    psnr: float  # dB; of a batch, the mean
    n: int  # Gaussians; of a batch, the most
    seconds: float


class Callback(Protocol):
    """Called every ten steps; a true result ends the fit early."""

    def __call__(self, progress: FitProgress, /) -> object: ...


@dataclass(frozen=True)
class FitResult:
    """A fitted image and how it came about.

    ``history`` has an entry every ten steps and one at the end: ``step``, ``psnr`` and ``n``. The
    last one says in ``stopped`` what ended the fit: ``"steps"``, ``"time_limit"``,
    ``"target_psnr"`` or ``"callback"``.
    """

    field: GaussianField
    history: list[dict[str, Any]]
    psnr: float  # dB, of the clamped image, without rounding to eight bits
    ssim: float  # NaN where the image is smaller than the window
    seconds: float  # of a batch, for all of it


def fit_image(
    image: object,
    n_gaussians: int | None = None,
    *,
    steps: int = 1500,
    mode: str = "sum",
    init: str = "gradient",
    densify: str = "error",
    loss: str = "mse",
    lr_pos: float = 0.15,
    lr_chol: float = 0.05,
    lr_feat: float = 0.01,
    sigma_min: float = 0.3,
    seed: int = 0,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
    time_limit: float | None = None,
    target_psnr: float | None = None,
) -> FitResult:
    """Turns an image into 2D Gaussians by gradient descent.

    Example:
        >>> import torch
        >>> from sapwood.gaussian import fit_image
        >>> y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 32), indexing="ij")
        >>> image = torch.stack([x, y, x * y])
        >>> result = fit_image(image, 60, steps=150)
        >>> len(result.field), result.psnr > 30
        (60, True)
        >>> result.field.render((48, 64)).shape
        torch.Size([3, 48, 64])

    Args:
        image: a tensor (C, H, W), float in [0, 1] or uint8; a numpy array (H, W, C) or (H, W); a
            PIL image; or a path.
        n_gaussians: N; default: one per 13 pixels, at least 64 and at most 20 000.
        steps: of Adam. 1500 suits 256 x 256 pixels, 3000 suits 512 x 512.
        mode: ``"sum"`` adds the Gaussians, ``"norm"`` takes their weighted mean.
        init: ``"gradient"`` puts 70 % of them where luma changes, ``"uniform"`` puts them anywhere.
        densify: ``"error"`` begins with 30 % of them and adds the rest where the error is;
            ``"split"`` begins with 70 % and splits those that are pulled hardest, up to N;
            ``"none"`` begins with all.
        loss: ``"mse"``, or ``"l1ssim"`` for L1 + 0.1 (1 - SSIM).
        lr_pos: learning rate of centres, in pixels.
        lr_chol: learning rate of shapes, in pixels.
        lr_feat: learning rate of colours.
        sigma_min: smallest l1 and l3, in pixels.
        seed: of the positions; the same on every device.
        device: where to work; default: the tensor's device, else the CPU.
        callback: called every ten steps with a :class:`FitProgress`; true ends the fit.
        time_limit: seconds after which the fit ends with what it has.
        target_psnr: dB at which it ends; looked at every ten steps.

    Returns:
        The field, the history, PSNR, SSIM and the time taken.

    Raises:
        ValueError: for arguments out of range, and images as ``images.as_image`` says.
        TypeError: for an image of another type.
        OSError: when an image file cannot be read.

    References:
        Accumulated summation: Zhang et al., GaussianImage, arXiv:2403.08551. Initialisation by
        gradient and growth by error: Zhang et al., Image-GS, arXiv:2407.01866. Both read in their
        public code; this is our implementation, with schedules and rates of our own.
    """
    pixels = as_image(image, owner="fit_image")
    target = pixels[None] if device is None else pixels[None].to(device)
    settings = Settings(
        default_count(_size(pixels)) if n_gaussians is None else n_gaussians,
        steps,
        mode,
        init,
        densify,
        loss,
        lr_pos,
        lr_chol,
        lr_feat,
        sigma_min,
        seed,
        time_limit,
        target_psnr,
    )
    settings.check("fit_image", _size(pixels))
    return _fit(target, settings, callback)[0]


def fit_images(
    images: Tensor | Sequence[object],
    n_gaussians: int | None = None,
    *,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> list[FitResult]:
    """Fits many images of one size in one optimisation; each as ``fit_image`` would alone.

    Example:
        >>> import torch
        >>> from sapwood.gaussian import fit_images
        >>> ramp = torch.linspace(0, 1, 16).expand(1, 12, 16)
        >>> results = fit_images(torch.stack([ramp, ramp.flip(-1)]), 30, steps=60)
        >>> len(results), len(results[1].field)
        (2, 30)

    Args:
        images: (B, C, H, W), or a sequence of what ``fit_image`` takes, all of one size.
        n_gaussians: N of each image.
        device: as ``fit_image``.
        callback: as ``fit_image``; gets the mean PSNR of the images.
        options: the other arguments of ``fit_image``. Every image has the same seed. The fit ends
            early for all of them together: at ``target_psnr`` when all have reached it.

    Returns:
        One result per image, in order.

    Raises:
        ValueError: as ``fit_image``, and for images of different sizes.
        TypeError: as ``fit_image``, and for an option that it does not have.
    """
    owner = "fit_images"
    pixels = [as_image(image, owner=owner) for image in images]
    if len({tuple(image.shape) for image in pixels}) > 1:
        shapes = sorted({tuple(image.shape) for image in pixels})
        _check.fail(ValueError, owner, "images", "have one shape", shapes)
    defaults: dict[str, Any] = fit_image.__kwdefaults__ or {}
    if unknown := set(options) - set(defaults):
        _check.fail(TypeError, owner, "options", "be those of fit_image", sorted(unknown))
    if not pixels:
        return []
    known = {k: v for k, v in (defaults | options).items() if k not in ("device", "callback")}
    count = default_count(_size(pixels[0])) if n_gaussians is None else n_gaussians
    settings = Settings(n_gaussians=count, **known)
    settings.check(owner, _size(pixels[0]))
    batch = torch.stack(pixels)
    return _fit(batch if device is None else batch.to(device), settings, callback)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[1], image.shape[2]


class _Log:
    """The histories of a batch, and when to stop."""

    def __init__(self, images: Tensor, settings: Settings, callback: Callback | None) -> None:
        self._images, self._settings, self._callback = images, settings, callback
        self._start = time.perf_counter()
        self.histories: list[list[dict[str, Any]]] = [[] for _ in images]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def note(self, step: int, image: Tensor, counts: Sequence[int]) -> str | None:
        """Writes an entry per image; returns a reason to stop, if there is one."""
        quality = metrics.psnr(image, self._images).tolist()
        for history, value, n in zip(self.histories, quality, counts, strict=True):
            history.append({"step": step, "psnr": value, "n": n})
        seconds, settings = self.seconds, self._settings
        if self._callback is not None:
            mean = sum(quality) / len(quality)
            now = FitProgress(step, settings.steps, mean, max(counts), seconds)
            if self._callback(now):
                return "callback"
        if settings.time_limit is not None and seconds >= settings.time_limit:
            return "time_limit"
        if settings.target_psnr is not None and min(quality) >= settings.target_psnr:
            return "target_psnr"
        return None


@torch.no_grad()
def _fit(images: Tensor, settings: Settings, callback: Callback | None) -> list[FitResult]:
    log = _Log(images, settings, callback)
    optimiser = Optimiser(images, settings)
    counts = optimiser.parameters.counts
    reason = None
    for step in range(settings.steps):
        optimiser.densify(step)
        image = optimiser.draw()
        if step % _EVERY == 0:
            reason = log.note(step, image, counts)
            if reason is not None:
                break
        optimiser.descend(step, image)
    if reason is None:
        image = optimiser.draw()
        log.note(settings.steps, image, counts)
    for history in log.histories:
        history[-1]["stopped"] = reason or "steps"
    return _results(optimiser, image, log)


def _results(optimiser: Optimiser, images: Tensor, log: _Log) -> list[FitResult]:
    large_enough = min(optimiser.size) >= metrics.WINDOW
    alike = metrics.ssim(images, optimiser.images).tolist() if large_enough else None
    seconds = log.seconds
    return [
        FitResult(
            field=optimiser.field(item),
            history=history,
            psnr=history[-1]["psnr"],
            ssim=math.nan if alike is None else alike[item],
            seconds=seconds,
        )
        for item, history in enumerate(log.histories)
    ]

"""Steps towards images: draw, compare, go down the gradient. Autograd is not needed."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.gaussian import _place
from sapwood.gaussian._densify import ByError, BySplitting, Densifier, Fixed
from sapwood.gaussian._parameters import Parameters
from sapwood.gaussian._settings import Settings
from sapwood.gaussian.field import GaussianField
from sapwood.gaussian.metrics import ssim
from sapwood.nn.splat2d import clamp_geometry_
from sapwood.ops.splat2d import splat2d, splat2d_backward

_EPS = 1e-6  # of the weighted mean, the op's default
_CONSTANT, _FINAL = 0.6, 0.02  # of the learning rate: share of the run, last value
_SSIM_WEIGHT = 0.1  # public code of Image-GS


class Optimiser:
    """A batch of images and the Gaussians that approach them.

    Args:
        images: (B, C, H, W) float32.
        settings: what the user asked for, checked.
    """

    def __init__(self, images: Tensor, settings: Settings) -> None:
        batch, channels = images.shape[:2]
        self.images, self._settings = images, settings
        self.size = (images.shape[2], images.shape[3])
        generators = [torch.Generator().manual_seed(settings.seed) for _ in range(batch)]
        self._densifier = _densifier(settings, generators)
        rates = (settings.lr_pos, settings.lr_chol, settings.lr_feat)
        n = settings.n_gaussians
        self.parameters = Parameters(batch, n, channels, rates, images.device)
        first = self._densifier.first_count()
        for item, generator in enumerate(generators):
            rows = _place.initial(images[item], first, settings.init, settings.mode, generator)
            self.parameters.append(item, rows)
        self._clamp()
        self._counts = self._count_tensor()

    def densify(self, step: int) -> None:
        """Adds or splits Gaussians where this step calls for it."""
        if self._densifier.due(step):
            self._densifier.change(step, self.parameters, self.draw(), self.images)
            self._clamp()
            self._counts = self._count_tensor()

    def draw(self) -> Tensor:
        """The images as the Gaussians are now, (B, C, H, W)."""
        self._sums = splat2d(
            self.parameters.mu,
            self.parameters.chol,
            self._features(),
            self.size,
            counts=self._counts,
            validate=False,
        )
        if self._settings.mode == "sum":
            return self._sums
        return self._sums[:, :-1] / (self._sums[:, -1:] + _EPS)

    def descend(self, step: int, image: Tensor) -> None:
        """One step of Adam from what ``draw`` has just returned."""
        p, wants = self.parameters, self._densifier.wants_statistics(step)
        gradient = loss_gradient(image, self.images, self._settings.loss)
        gradients = splat2d_backward(
            self._upstream(image, gradient),
            p.mu,
            p.chol,
            self._features(),
            counts=self._counts,
            with_stats=wants,
            validate=False,
        )
        if gradients.abs_mu is not None:
            self._densifier.observe(gradients.abs_mu)
        feat = gradients.feat[..., : p.feat.shape[-1]]
        p.adam((gradients.mu, gradients.chol, feat), rate_factor(step, self._settings.steps))
        self._clamp()

    def field(self, item: int) -> GaussianField:
        """One image's Gaussians, as they are now."""
        rows = self.parameters.values.rows(item, slice(self.parameters.counts[item]))
        mu, chol, feat = (part.clone() for part in rows)
        height, width = self.size
        return GaussianField(mu, chol, feat, height=height, width=width, mode=self._settings.mode)

    def _features(self) -> Tensor:
        """The colours; for a mean also a channel of ones, whose sum is the total weight."""
        feat = self.parameters.feat
        if self._settings.mode == "sum":
            return feat
        return torch.cat([feat, torch.ones_like(feat[..., :1])], -1)

    def _upstream(self, image: Tensor, gradient: Tensor) -> Tensor:
        """The loss's gradient with respect to the sums."""
        if self._settings.mode == "sum":
            return gradient
        direct = gradient / (self._sums[:, -1:] + _EPS)
        return torch.cat([direct, -(direct * image).sum(1, keepdim=True)], 1)

    def _clamp(self) -> None:
        p = self.parameters
        clamp_geometry_(p.mu, p.chol, self.size, self._settings.sigma_min)

    def _count_tensor(self) -> Tensor:
        return torch.tensor(self.parameters.counts, device=self.images.device)


def loss_gradient(image: Tensor, target: Tensor, loss: str) -> Tensor:
    """dL/dimage of the sum of the items' losses; nothing is clamped, so no gradient dies."""
    if loss == "mse":
        return (image - target).mul_(2 / image[0].numel())
    with torch.enable_grad():
        free = image.detach().requires_grad_()
        value = (free - target).abs().mean((1, 2, 3)) + _SSIM_WEIGHT * (
            1 - ssim(free, target, clamp=False)
        )
        (gradient,) = torch.autograd.grad(value.sum(), free)
    return gradient


def rate_factor(step: int, steps: int) -> float:
    """1 for 60 % of the run, then exponentially down to 2 %."""
    start = _CONSTANT * steps
    if step <= start:
        return 1.0
    return float(_FINAL ** ((step - start) / max(1.0, steps - 1 - start)))


def _densifier(settings: Settings, generators: list[torch.Generator]) -> Densifier:
    n, steps, mode = settings.n_gaussians, settings.steps, settings.mode
    if settings.densify == "error":
        return ByError(n, steps, mode, generators)
    return BySplitting(n, steps, mode) if settings.densify == "split" else Fixed(n)

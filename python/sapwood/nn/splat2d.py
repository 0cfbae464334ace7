"""An image whose parameters are 2D Gaussians."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.ops.splat2d import DEFAULT_CUTOFF, splat2d

MODES = ("sum", "norm")
SIGMA_MIN = 0.3  # pixels
MAX_SHEAR = 4.0  # largest |l2| / l3
_SIGMA = 0.6  # of the mean spacing between Gaussians


def initial_sigma(size: tuple[int, int], n: int) -> float:
    """The size, in pixels, of n round Gaussians that together cover an image."""
    return _SIGMA * math.sqrt(size[0] * size[1] / max(n, 1))


def rescale(
    mu: Tensor,  # (..., N, 2)
    chol: Tensor,  # (..., N, 3)
    size: tuple[int, int],
    new_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Geometry of the same picture on another pixel grid; pixel centres are whole numbers."""
    if size == new_size:
        return mu, chol
    sy, sx = new_size[0] / size[0], new_size[1] / size[1]
    scale = mu.new_tensor([sx, sy])
    return (mu + 0.5) * scale - 0.5, chol * chol.new_tensor([sx, sy, sy])


@torch.no_grad()
def clamp_geometry_(
    mu: Tensor,  # (..., N, 2)
    chol: Tensor,  # (..., N, 3)
    size: tuple[int, int],
    sigma_min: float = SIGMA_MIN,
) -> None:
    """Keeps centres inside the image and shapes positive, bounded and not too oblique, in place."""
    height, width = size
    mu[..., 0].clamp_(-0.5, width - 0.5)
    mu[..., 1].clamp_(-0.5, height - 0.5)
    l1, l2, l3 = chol.unbind(-1)
    largest = max(height, width, sigma_min)
    l1.clamp_(sigma_min, largest)
    l3.clamp_(sigma_min, largest)
    bound = MAX_SHEAR * l3
    torch.minimum(torch.maximum(l2, -bound, out=l2), bound, out=l2)


class Splat2d(nn.Module):
    """An image made of Gaussians, as a module with the parameters ``mu``, ``chol`` and ``feat``.

    Example:
        >>> import torch, sapwood
        >>> _ = torch.manual_seed(0)
        >>> target = torch.rand(3, 8, 8).cumsum(-1) / 8
        >>> picture = sapwood.nn.Splat2d(40, (8, 8))
        >>> optimizer = torch.optim.Adam(picture.parameters(), lr=0.05)
        >>> before = (picture() - target).square().mean().item()
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     (picture() - target).square().mean().backward()
        ...     optimizer.step()
        ...     picture.clamp_()
        >>> (picture() - target).square().mean().item() < before / 10
        True
        >>> picture((16, 24)).shape
        torch.Size([3, 16, 24])

    Centres start uniformly in the image, shapes as circles of 0.6 times the mean spacing, colours
    at zero. To start from given Gaussians, copy them into the parameters.

    Args:
        n: number of Gaussians, N.
        size: (H, W) of the pixel grid that ``mu`` and ``chol`` refer to.
        channels: C.
        mode: ``"sum"`` adds weighted features, ``"norm"`` averages them.
        cutoff: squared Mahalanobis distance beyond which a Gaussian ends; ``inf`` never.
        generator: of the centres; default: torch's.
        device: of the parameters.
        dtype: float32 or float64.

    Raises:
        ValueError: for a size, count or cutoff that is not positive, or an unknown mode.
    """

    def __init__(
        self,
        n: int,
        size: tuple[int, int],
        channels: int = 3,
        *,
        mode: str = "sum",
        cutoff: float = DEFAULT_CUTOFF,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.one_of("Splat2d", "mode", mode, MODES)
        if n < 0:
            _check.fail(ValueError, "Splat2d", "n", "be at least 0", n)
        if len(size) != 2 or min(size) < 1:
            _check.fail(ValueError, "Splat2d", "size", "be two sizes of at least 1", tuple(size))
        if channels < 1:
            _check.fail(ValueError, "Splat2d", "channels", "be at least 1", channels)
        if not cutoff > 0:
            _check.fail(ValueError, "Splat2d", "cutoff", "be positive", cutoff)
        self.size, self.mode, self.cutoff = (int(size[0]), int(size[1])), mode, float(cutoff)
        where = torch.rand(n, 2, generator=generator).to(device=device, dtype=dtype)
        self.mu = nn.Parameter(where * where.new_tensor([size[1], size[0]]) - 0.5)  # (N, 2)
        sigma = initial_sigma(self.size, n)
        self.chol = nn.Parameter(self.mu.new_tensor([sigma, 0.0, sigma]).repeat(n, 1))  # (N, 3)
        self.feat = nn.Parameter(torch.zeros(n, channels, device=device, dtype=dtype))  # (N, C)

    def forward(self, size: tuple[int, int] | None = None) -> Tensor:
        """The image, (C, H, W); ``size`` renders the same picture on another grid."""
        size = self.size if size is None else (int(size[0]), int(size[1]))
        mu, chol = rescale(self.mu, self.chol, self.size, size)
        return splat2d(mu, chol, self.feat, size, mode=self.mode, cutoff=self.cutoff)

    def clamp_(self, sigma_min: float = SIGMA_MIN) -> None:
        """Keeps centres inside the image and shapes valid; call it after each optimizer step.

        Args:
            sigma_min: smallest l1 and l3, in pixels.
        """
        clamp_geometry_(self.mu, self.chol, self.size, sigma_min)

    def extra_repr(self) -> str:
        return (
            f"n={len(self.mu)}, size={self.size}, channels={self.feat.shape[1]}, mode={self.mode}"
        )

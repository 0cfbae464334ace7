"""Where Gaussians begin: drawn at random from maps of where an image needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.nn.splat2d import initial_sigma

SHARE_UNIFORM = 0.3  # of the "gradient" initialisation (public code of Image-GS)
_FLOOR = 1e-3  # added to |gradient|, so that flat regions are not left out
_LUMA = (0.299, 0.587, 0.114)
FIRST_COLOUR = 0.3  # share of a missing colour that a new Gaussian begins with


def gradient_map(image: Tensor) -> Tensor:
    """|gradient of luma|, central differences: (C, H, W) -> (H, W)."""
    luma = image.mean(0)
    if len(image) == 3:
        luma = torch.einsum("c,chw->hw", image.new_tensor(_LUMA), image)
    padded = torch.nn.functional.pad(luma[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    along_x = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    along_y = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return torch.hypot(along_x, along_y)


def sample(
    density: Tensor,  # (H, W), not negative
    n: int,
    generator: torch.Generator,
) -> Tensor:
    """n positions (n, 2) drawn in proportion to a map, anywhere within their pixels.

    The random numbers come from the CPU, so that devices draw the same ones; a map of zeros counts
    as uniform.
    """
    height, width = density.shape
    cumulative = density.double().cpu().flatten().cumsum(0)
    if not cumulative[-1] > 0:
        cumulative = torch.arange(1, height * width + 1, dtype=torch.float64)
    draws = torch.rand(n, generator=generator, dtype=torch.float64) * cumulative[-1]
    pixel = torch.searchsorted(cumulative, draws, right=True).clamp(max=height * width - 1)
    jitter = torch.rand(n, 2, generator=generator) - 0.5
    centre = torch.stack([pixel % width, pixel // width], -1).float()  # (n, 2) as x, y
    return (centre + jitter).to(density.device)


def uniform(size: tuple[int, int], n: int, generator: torch.Generator) -> Tensor:
    """n positions (n, 2) anywhere in an image, on the CPU."""
    height, width = size
    return torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) - 0.5


def colours_at(image: Tensor, positions: Tensor) -> Tensor:
    """The pixels under positions: (C, H, W), (n, 2) -> (n, C)."""
    height, width = image.shape[-2:]
    pixel = positions.round().long()
    x, y = pixel[:, 0].clamp(0, width - 1), pixel[:, 1].clamp(0, height - 1)
    return image[:, y, x].T


def round_shapes(positions: Tensor, sigma: float) -> Tensor:
    """Circles of one size: (n, 3)."""
    return positions.new_tensor([sigma, 0.0, sigma]).repeat(len(positions), 1)


def initial(
    image: Tensor,  # (C, H, W)
    n: int,
    init: str,
    mode: str,
    generator: torch.Generator,
) -> list[Tensor]:
    """mu (n, 2), chol (n, 3), feat (n, C) of the first Gaussians."""
    size = (image.shape[1], image.shape[2])
    count = n if init == "uniform" else round(SHARE_UNIFORM * n)
    mu = uniform(size, count, generator).to(image.device)
    if count < n:
        mu = torch.cat([mu, sample(gradient_map(image) + _FLOOR, n - count, generator)])
    chol = round_shapes(mu, initial_sigma(size, n))
    share = 1.0 if mode == "norm" else FIRST_COLOUR
    return [mu, chol, share * colours_at(image, mu)]

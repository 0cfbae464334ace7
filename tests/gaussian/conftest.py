"""Small images with edges, ramps and texture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def scene(height: int, width: int, seed: int = 0) -> Tensor:
    """A ramp, a disc with a sharp rim, and smooth texture: (3, H, W) in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    disc = ((x - 0.6) ** 2 + (y - 0.45) ** 2 < 0.06).float()
    phase = torch.rand(3, generator=torch.Generator().manual_seed(seed)) * 6
    waves = torch.stack([(9 * x + 7 * y + p).sin() for p in phase])
    return (0.35 + 0.2 * x + 0.25 * disc + 0.15 * waves * y).clamp(0, 1)


@pytest.fixture(name="image")
def small_image() -> Tensor:
    """(3, 40, 48)."""
    return scene(40, 48)


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)

"""The Gaussians of a batch of images, and Adam over all of their numbers at once.

Everything lies in flat buffers, so that a step is a dozen element-wise passes however many tensors
there are, and rows can be added and removed together with their moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BETAS = (0.9, 0.99)
_EPS = 1e-8


class Slab:
    """One number per parameter: a flat buffer and its parts mu, chol, feat, each (B, N, *)."""

    def __init__(self, batch: int, capacity: int, channels: int, device: torch.device) -> None:
        widths = (2, 3, channels)
        sizes = [batch * capacity * width for width in widths]
        self.flat = torch.zeros(sum(sizes), device=device)
        self.parts: list[Tensor] = []
        for part, width in zip(torch.split(self.flat, sizes), widths, strict=True):
            self.parts.append(part.view(batch, capacity, width))

    def rows(self, item: int, which: slice | Tensor) -> list[Tensor]:
        """Some rows of each part: (n, 2), (n, 3), (n, C)."""
        return [part[item, which] for part in self.parts]

    def put(self, item: int, which: slice | Tensor, rows: Sequence[Tensor | float]) -> None:
        for part, row in zip(self.parts, rows, strict=True):
            part[item, which] = row


class Parameters:
    """Values, gradients and moments of up to ``capacity`` Gaussians per image.

    ``counts[b]`` says how many of item b exist; the rows behind are not drawn and do not move.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        channels: int,
        rates: tuple[float, float, float],  # of mu, chol, feat
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        slabs = [Slab(batch, capacity, channels, device) for _ in range(4)]
        self.values, self._rates, self._first, self._second = slabs
        for part, rate in zip(self._rates.parts, rates, strict=True):
            part.fill_(rate)
        self._gradient = torch.zeros_like(self.values.flat)
        self._scratch = torch.zeros_like(self.values.flat)
        self.counts = [0] * batch
        self._steps = 0

    @property
    def mu(self) -> Tensor:
        """(B, N, 2)."""
        return self.values.parts[0]

    @property
    def chol(self) -> Tensor:
        """(B, N, 3)."""
        return self.values.parts[1]

    @property
    def feat(self) -> Tensor:
        """(B, N, C)."""
        return self.values.parts[2]

    def adam(self, gradients: Sequence[Tensor], factor: float) -> None:
        """One step of Adam; ``factor`` scales the learning rates.

        References:
            Kingma and Ba, "Adam", algorithm 1, with the bias corrections drawn into the scalars.
        """
        self._steps += 1
        bias1, bias2 = (1 - beta**self._steps for beta in _BETAS)
        first, second, scratch = self._first.flat, self._second.flat, self._scratch
        torch.cat([g.reshape(-1) for g in gradients], out=self._gradient)
        first.lerp_(self._gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(self._gradient, self._gradient, value=1 - _BETAS[1])
        torch.sqrt(second, out=scratch)
        scratch.add_(_EPS * math.sqrt(bias2))
        torch.div(first, scratch, out=scratch)
        self.values.flat.addcmul_(
            scratch, self._rates.flat, value=-factor * math.sqrt(bias2) / bias1
        )

    def append(
        self, item: int, rows: Sequence[Tensor], second: Sequence[Tensor | float] | None = None
    ) -> None:
        """Adds Gaussians behind the last one.

        Args:
            item: of the batch.
            rows: (n, 2), (n, 3), (n, C), values.
            second: their second moments; default: the median of the Gaussians that exist, because
                with none the first steps would be as large as the learning rate allows.
        """
        n = self.counts[item]
        at = slice(n, n + len(rows[0]))
        if second is None:
            second = (
                [m.median(0).values for m in self._second.rows(item, slice(n))]
                if n
                else [0.0, 0.0, 0.0]
            )
        self.values.put(item, at, rows)
        self._first.put(item, at, [0.0, 0.0, 0.0])
        self._second.put(item, at, second)
        self.counts[item] = at.stop

    def replace(self, item: int, which: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
        """Puts other Gaussians in the place of some; returns the second moments, which stay."""
        self.values.put(item, which, rows)
        self._first.put(item, which, [0.0, 0.0, 0.0])
        return self._second.rows(item, which)

    def keep(self, item: int, which: Tensor) -> None:
        """Drops all Gaussians of an item but those at ``which`` (n,), in that order."""
        n = len(which)
        for slab in (self.values, self._first, self._second):
            kept = slab.rows(item, which)  # indexing by a tensor copies
            slab.put(item, slice(n), kept)
            slab.put(item, slice(n, self.counts[item]), [0.0, 0.0, 0.0])
        self.counts[item] = n

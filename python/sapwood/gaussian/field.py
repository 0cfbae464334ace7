"""Gaussians that are an image, and their file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from sapwood import _check
from sapwood._files import atomic_write_bytes
from sapwood.gaussian import _field_file
from sapwood.nn.splat2d import MODES, rescale
from sapwood.ops.splat2d import DEFAULT_CUTOFF, splat2d

_OWNER = "GaussianField"


class GaussianField:
    """An image as a sum (or a weighted mean) of N Gaussians, to be drawn at any size.

    Example:
        >>> import torch
        >>> from sapwood.gaussian import GaussianField
        >>> mu, chol = torch.tensor([[7.5, 3.5]]), torch.tensor([[2.0, 0.0, 1.0]])
        >>> field = GaussianField(mu, chol, torch.ones(1, 3), height=8, width=16)
        >>> field.render().shape, field.render((80, 160)).shape
        (torch.Size([3, 8, 16]), torch.Size([3, 80, 160]))
        >>> field.save("dot.safetensors")
        >>> len(GaussianField.load("dot.safetensors"))
        1

    Args:
        mu: (N, 2) float32 or float64, centres (x, y) in pixels; pixel centres are whole numbers.
        chol: (N, 3), (l1, l2, l3) of the lower Cholesky factor of the covariance, in pixels.
        feat: (N, C), colours; in ``"sum"`` mode they may be negative.
        height: of the image, in pixels.
        width: of the image, in pixels.
        mode: ``"sum"`` or ``"norm"``.
        cutoff: squared Mahalanobis distance at which a Gaussian ends.

    Raises:
        TypeError: when a tensor is not floating point.
        ValueError: for other shapes, sizes below 1, an unknown mode, a cutoff that is not
            positive, numbers that are not finite, and l1 or l3 that are not positive.
        RuntimeError: when the tensors differ in device or dtype.
    """

    def __init__(
        self,
        mu: Tensor,
        chol: Tensor,
        feat: Tensor,
        *,
        height: int,
        width: int,
        mode: str = "sum",
        cutoff: float = DEFAULT_CUTOFF,
    ) -> None:
        _check_tensors(mu, chol, feat)
        _check.one_of(_OWNER, "mode", mode, MODES)
        for name, side in (("height", height), ("width", width)):
            if side < 1:
                _check.fail(ValueError, _OWNER, name, "be at least 1", side)
        if not cutoff > 0:
            _check.fail(ValueError, _OWNER, "cutoff", "be positive", cutoff)
        self.mu, self.chol, self.feat = mu, chol, feat
        self.height, self.width = int(height), int(width)
        self.mode, self.cutoff = mode, float(cutoff)

    def __len__(self) -> int:
        return len(self.mu)

    def __repr__(self) -> str:
        return (
            f"GaussianField({len(self)} Gaussians, {self.feat.shape[1]} channels, "
            f"{self.height} x {self.width}, mode={self.mode!r})"
        )

    def render(self, size: tuple[int, int] | None = None, *, clamp: bool = False) -> Tensor:
        """Draws the image; differentiable in ``mu``, ``chol`` and ``feat``.

        Args:
            size: (H, W) of the result; default: the field's own. Another size shows the same
                picture, larger or smaller; there is no smoothing against aliasing when it shrinks.
            clamp: whether the result is clamped to [0, 1], as files are.

        Returns:
            (C, H, W).

        Raises:
            ValueError: when a side is below 1.
        """
        own = (self.height, self.width)
        size = own if size is None else (int(size[0]), int(size[1]))
        if min(size) < 1:
            _check.fail(ValueError, f"{_OWNER}.render", "size", "be at least (1, 1)", size)
        mu, chol = rescale(self.mu, self.chol, own, size)
        image = splat2d(mu, chol, self.feat, size, mode=self.mode, cutoff=self.cutoff)
        return image.clamp(0, 1) if clamp else image

    def to(self, device: torch.device | str) -> GaussianField:
        """The same field with its tensors on a device."""
        return GaussianField(
            self.mu.to(device),
            self.chol.to(device),
            self.feat.to(device),
            height=self.height,
            width=self.width,
            mode=self.mode,
            cutoff=self.cutoff,
        )

    def bits_per_pixel(self, *, half: bool = False) -> float:
        """Bits that the file of ``save`` takes, per pixel; nothing in it is entropy coded."""
        return 8 * len(self._encoded(half)) / (self.height * self.width)

    def save(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Writes a safetensors file: float32, or half as large with ``half``.

        Args:
            path: the file; it is written under a temporary name, then renamed.
            half: centres as 16-bit fixed point over the image, shapes and features in float16.
                Rounds: compare ``load(path).render()`` with ``render()``.

        Raises:
            ValueError: when ``half`` cannot hold the numbers: centres outside the image, values
                beyond float16's range.
            OSError: when the file cannot be written.
        """
        atomic_write_bytes(path, self._encoded(half))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GaussianField:
        """Reads a file of ``save``; refuses every other one.

        Args:
            path: the file.

        Returns:
            The field, float32 on the CPU.

        Raises:
            ValueError: when the file is damaged, of another format, or larger than 1 GiB.
            OSError: when it cannot be read.
        """
        file = Path(path)
        try:
            if (size := file.stat().st_size) > _field_file.MAX_BYTES:
                raise ValueError(f"the file must have at most 1 GiB, got {size} bytes")
            stored = _field_file.decode(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"sapwood.{_OWNER}.load: {file}: {error}") from None
        return cls(
            torch.from_numpy(stored.mu),
            torch.from_numpy(stored.chol),
            torch.from_numpy(stored.feat),
            height=stored.height,
            width=stored.width,
            mode=stored.mode,
            cutoff=stored.cutoff,
        )

    def _encoded(self, half: bool) -> bytes:
        mu, chol, feat = (t.detach().cpu().float().numpy() for t in (self.mu, self.chol, self.feat))
        stored = _field_file.Stored(mu, chol, feat, self.height, self.width, self.mode, self.cutoff)
        try:
            return _field_file.encode(stored, half=half)
        except ValueError as error:
            raise ValueError(f"sapwood.{_OWNER}.save: {error}") from None


def _check_tensors(mu: Tensor, chol: Tensor, feat: Tensor) -> None:
    for name, value in (("mu", mu), ("chol", chol), ("feat", feat)):
        _check.tensor(_OWNER, name, value)
        _check.floating(_OWNER, name, value)
        _check.dims(_OWNER, name, value, 2)
    _check.shape(_OWNER, "mu", mu, (len(mu), 2))
    _check.shape(_OWNER, "chol", chol, (len(mu), 3))
    _check.shape(_OWNER, "feat", feat, (len(mu), max(1, feat.shape[1])))
    _check.same_device(_OWNER, mu=mu, chol=chol, feat=feat)
    if not mu.dtype == chol.dtype == feat.dtype:
        found = ", ".join(str(t.dtype) for t in (mu, chol, feat))
        _check.fail(RuntimeError, _OWNER, "mu, chol and feat", "have one dtype", found)
    for name, value in (("mu", mu), ("chol", chol), ("feat", feat)):
        if not value.isfinite().all():
            _check.fail(ValueError, _OWNER, name, "be finite", "NaN or inf")
    if not (chol[:, ::2] > 0).all():
        _check.fail(ValueError, _OWNER, "chol", "have positive l1 and l3", "others")

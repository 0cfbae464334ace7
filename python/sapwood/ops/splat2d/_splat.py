"""The image of 2D Gaussians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.splat2d import _specs, _triton, _validate
from sapwood.ops.splat2d._validate import DEFAULT_CUTOFF
from sapwood.reference import splat2d as reference

_NAME = "splat2d"


def _backends(op: str) -> tuple[_backend.Backend, ...]:
    return (
        _backend.native(op, getattr(_specs, op)),
        *_triton.backends(op),
        _backend.Backend("reference", lambda *_: None, getattr(reference, op)),
    )


_SPLAT, _PAIRS = _backends("splat2d"), _backends("splat2d_pairs")


def with_weight(feat: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C + 1)
    """A further channel of ones: its image is the sum of weights."""
    return torch.cat([feat, feat.new_ones((*feat.shape[:-1], 1))], -1)


def _explain(
    mu: Tensor, chol: Tensor, feat: Tensor, size: Sequence[int], **options: Any
) -> _backend.Explanation:
    height, width = _validate.size_of(_NAME, size)
    scene = _validate.scene(_NAME, mu, chol, feat, options.get("counts"), False)
    cutoff = options.get("cutoff", DEFAULT_CUTOFF)
    args = (scene.mu, scene.chol, scene.feat, scene.counts, height, width, cutoff)
    return _backend.Explanation(_NAME, _backend.candidates(_SPLAT, *args))


@_backend.explainable(_explain)
def splat2d(
    mu: Tensor,  # (..., N, 2)
    chol: Tensor,  # (..., N, 3)
    feat: Tensor,  # (..., N, C)
    size: Sequence[int],
    *,
    mode: str = "sum",
    cutoff: float = DEFAULT_CUTOFF,
    eps: float = 1e-6,
    counts: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """The image that a sum of N Gaussians with C channels gives, without depth or opacity.

    Example:
        >>> import torch
        >>> from sapwood.ops import splat2d
        >>> mu = torch.tensor([[4.0, 2.0]])  # column 4, row 2
        >>> chol = torch.tensor([[1.0, 0.0, 1.0]])  # round, one pixel wide
        >>> image = splat2d(mu, chol, torch.ones(1, 3), (6, 8))
        >>> image.shape, image[0, 2, 4].item()
        (torch.Size([3, 6, 8]), 1.0)

    Pixel centres lie at integers: column i of row j is the point (i, j). Every Gaussian has weight
    ``w = exp(-q / 2)`` with ``q = |L^-1 (p - mu)|^2`` at the pixels where ``q <= cutoff``, and none
    elsewhere. The cut is a step of height ``|feat| exp(-cutoff / 2)``, through which no gradient
    flows. Sums are taken in the order of the Gaussians: the result is bitwise the same for every
    number of threads, and for a batch and its items one by one.

    Args:
        mu: (..., N, 2), (x, y) in pixels, float32 or float64, any strides.
        chol: (..., N, 3), (l1, l2, l3) of the covariance ``L L^T``, ``L = [[l1, 0], [l2, l3]]``, in
            pixels; l1 and l3 positive.
        feat: (..., N, C), C at least 1. Leading dimensions broadcast.
        size: (H, W) of the image, both at least 1.
        mode: "sum" for ``sum w feat``, or "norm" for ``sum w feat / (sum w + eps)``.
        cutoff: the largest q that is drawn; inf for no cut. The default ends at weight 1/255.
        eps: of mode "norm".
        counts: (...) int64, optional: only the first ``counts[b]`` Gaussians of item b exist.
        validate: whether values are checked. None: on the CPU, where that is cheap. Without it, a
            Gaussian that is not finite or has l1 or l3 <= 0 is not drawn and has gradient 0; what
            is not finite in feat goes into the image.

    Returns:
        (..., C, H, W), contiguous, of mu's dtype; zeros where nothing is drawn.

    Raises:
        ValueError: for shapes that do not fit, an image without pixels, a cutoff or eps that is not
            positive, an unknown mode, and (validated) for values that are not finite, l1 or l3 that
            are not positive, and counts outside [0, N].
        TypeError: for non-tensors and dtypes other than float32 and float64. Under autocast half
            precision is accepted and computed in float32.
        RuntimeError: for tensors on different devices or of different dtypes.

    References:
        Accumulated summation: Zhang et al., GaussianImage, ECCV 2024, arXiv 2403.08551, equation 7.
        Mode "norm" as in Zhang et al., Image-GS, SIGGRAPH 2025, arXiv 2407.01866, without its
        restriction to the nearest Gaussians. Both read in their public code; this is our own.
    """
    _check.one_of(_NAME, "mode", mode, _validate.MODES)
    height, width = _validate.size_of(_NAME, size)
    cutoff, eps = _validate.cutoff_of(_NAME, cutoff), _validate.eps_of(_NAME, eps)
    scene = _validate.scene(_NAME, mu, chol, feat, counts, validate)
    features = with_weight(scene.feat) if mode == "norm" else scene.feat
    args = (scene.mu, scene.chol, features, scene.counts, height, width, cutoff)
    image: Tensor = _backend.choose(_NAME, _SPLAT, *args).run(*args)
    if mode == "norm":
        image = image[:, :-1] / (image[:, -1:] + eps)
    return scene.restore(image)


def _explain_pairs(
    mu: Tensor, chol: Tensor, size: Sequence[int], **options: Any
) -> _backend.Explanation:
    height, width = _validate.size_of("splat2d_pairs", size)
    scene = _validate.scene("splat2d_pairs", mu, chol, mu, options.get("counts"), False)
    args = (scene.mu, scene.chol, scene.counts, height, width, DEFAULT_CUTOFF)
    return _backend.Explanation("splat2d_pairs", _backend.candidates(_PAIRS, *args))


@_backend.explainable(_explain_pairs)
def splat2d_pairs(
    mu: Tensor,  # (..., N, 2)
    chol: Tensor,  # (..., N, 3)
    size: Sequence[int],
    *,
    cutoff: float = DEFAULT_CUTOFF,
    counts: Tensor | None = None,
) -> Tensor:
    """How many (pixel, Gaussian) pairs :func:`splat2d` evaluates: those with ``q <= cutoff``.

    Example:
        >>> import torch
        >>> from sapwood.ops import splat2d_pairs
        >>> mu, chol = torch.tensor([[4.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> splat2d_pairs(mu, chol, (6, 8), cutoff=1.0)  # the centre and its four neighbours
        tensor(5)

    Args:
        mu: (..., N, 2) as in :func:`splat2d`.
        chol: (..., N, 3).
        size: (H, W) of the image.
        cutoff: the largest q that counts; inf for every pixel.
        counts: (...) int64, optional: only the first ``counts[b]`` Gaussians of item b exist.

    Returns:
        (...) int64.

    Raises:
        ValueError: as :func:`splat2d`.
        TypeError: as :func:`splat2d`.
        RuntimeError: as :func:`splat2d`.
    """
    op = "splat2d_pairs"
    height, width = _validate.size_of(op, size)
    cutoff = _validate.cutoff_of(op, cutoff)
    scene = _validate.scene(op, mu, chol, mu, counts, None)
    args = (scene.mu.detach(), scene.chol.detach(), scene.counts, height, width, cutoff)
    pairs: Tensor = _backend.choose(op, _PAIRS, *args).run(*args)
    return scene.restore(pairs)

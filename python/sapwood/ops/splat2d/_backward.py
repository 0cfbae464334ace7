"""The gradients of :func:`splat2d` as a call of their own, for loops that do without autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.splat2d import _specs, _triton, _validate
from sapwood.ops.splat2d._splat import with_weight
from sapwood.ops.splat2d._validate import DEFAULT_CUTOFF
from sapwood.reference import splat2d as reference

_NAME = "splat2d_backward"
_BACKENDS = (
    _backend.native(_NAME, _specs.splat2d_backward),
    *_triton.backends(_NAME),
    _backend.Backend("reference", lambda *_: None, reference.splat2d_backward),
)


class Splat2dGradients(NamedTuple):
    """What :func:`splat2d_backward` returns.

    Example:
        >>> import torch
        >>> from sapwood.ops import splat2d_backward
        >>> mu, chol = torch.tensor([[4.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> splat2d_backward(torch.ones(1, 6, 8), mu, chol, torch.ones(1, 1)).abs_mu is None
        True

    Args:
        mu: (..., N, 2), the derivative of the loss in mu.
        chol: (..., N, 3), in chol.
        feat: (..., N, C), in feat.
        abs_mu: (..., N, 2), the sum of magnitudes of what each pixel adds to ``mu``, if asked for.
    """

    mu: Tensor
    chol: Tensor
    feat: Tensor
    abs_mu: Tensor | None


def _explain(
    grad: Tensor, mu: Tensor, chol: Tensor, feat: Tensor, **options: Any
) -> _backend.Explanation:
    scene = _validate.scene(_NAME, mu, chol, feat, options.get("counts"), False)
    cutoff = options.get("cutoff", DEFAULT_CUTOFF)
    args = (_image_grad(grad, scene), scene.mu, scene.chol, scene.feat, scene.counts, cutoff, False)
    return _backend.Explanation(_NAME, _backend.candidates(_BACKENDS, *args))


@_backend.explainable(_explain)
def splat2d_backward(
    grad: Tensor,  # (..., C, H, W)
    mu: Tensor,  # (..., N, 2)
    chol: Tensor,  # (..., N, 3)
    feat: Tensor,  # (..., N, C)
    *,
    mode: str = "sum",
    cutoff: float = DEFAULT_CUTOFF,
    eps: float = 1e-6,
    counts: Tensor | None = None,
    with_stats: bool = False,
    validate: bool | None = None,
) -> Splat2dGradients:
    """The gradients of :func:`splat2d` for a gradient of its image, without autograd.

    Example:
        >>> import torch
        >>> from sapwood.ops import splat2d_backward
        >>> mu, chol = torch.tensor([[4.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> grad, feat = torch.ones(1, 6, 8), torch.ones(1, 1)
        >>> grads = splat2d_backward(grad, mu, chol, feat, with_stats=True)
        >>> bool((grads.abs_mu >= grads.mu.abs()).all())
        True

    Args:
        grad: (..., C, H, W), the derivative of the loss in the image, any strides.
        mu: (..., N, 2) as in :func:`splat2d`. Gradients have the leading dimensions of all
            arguments together: a broadcast argument gets one gradient per item.
        chol: (..., N, 3).
        feat: (..., N, C).
        mode: "sum" or "norm"; the second renders the weights once more.
        cutoff: that of the forward pass.
        eps: of mode "norm".
        counts: (...) int64, optional.
        with_stats: also return the sums of magnitudes, by which densification chooses: opposite
            pulls cancel in the gradient but not in them.
        validate: whether values are checked, as in :func:`splat2d`.

    Returns:
        The gradients, contiguous, and the statistic or None.

    Raises:
        ValueError: as :func:`splat2d`, and for a grad that is not the image's shape.
        TypeError: as :func:`splat2d`.
        RuntimeError: as :func:`splat2d`.

    References:
        Sums of magnitudes: Ye et al., AbsGS, ACM MM 2024, arXiv 2404.10484.
    """
    _check.one_of(_NAME, "mode", mode, _validate.MODES)
    cutoff, eps = _validate.cutoff_of(_NAME, cutoff), _validate.eps_of(_NAME, eps)
    scene = _validate.scene(_NAME, mu, chol, feat, counts, validate)
    flat = _image_grad(grad, scene)
    features = scene.feat
    if mode == "norm":
        features = with_weight(features)
        flat = _through_division(flat, scene, features, cutoff, eps)
    args = (flat, scene.mu, scene.chol, features, scene.counts, cutoff, with_stats)
    d_mu, d_chol, d_feat, stats = _backend.choose(_NAME, _BACKENDS, *args).run(*args)
    if mode == "norm":
        d_feat = d_feat[..., :-1].contiguous()
    return Splat2dGradients(
        scene.restore(d_mu),
        scene.restore(d_chol),
        scene.restore(d_feat),
        scene.restore(stats) if with_stats else None,
    )


def _image_grad(grad: Tensor, scene: _validate.Scene) -> Tensor:  # (B, C, H, W)
    _check.tensor(_NAME, "grad", grad)
    _check.same_device(_NAME, mu=scene.mu, grad=grad)
    if grad.dtype != scene.mu.dtype:
        raise RuntimeError(
            f"sapwood.{_NAME}: grad must have mu's dtype {scene.mu.dtype}, got {grad.dtype}"
        )
    wanted = (*scene.lead, scene.feat.shape[-1])
    if grad.dim() < 3 or tuple(grad.shape[:-2]) != wanted or 0 in grad.shape[-2:]:
        text = ", ".join(str(s) for s in wanted)
        _check.fail(ValueError, _NAME, "grad", f"have shape ({text}, H, W)", tuple(grad.shape))
    return grad.reshape(-1, *grad.shape[-3:]) if len(scene.lead) != 1 else grad


def _through_division(
    grad: Tensor, scene: _validate.Scene, features: Tensor, cutoff: float, eps: float
) -> Tensor:
    """The gradient in the sums (B, C + 1, H, W) of ``image = sums[:C] / (sums[C] + eps)``."""
    sums = _specs.splat2d(
        scene.mu, scene.chol, features, scene.counts, grad.shape[2], grad.shape[3], cutoff
    )
    total = sums[:, -1:] + eps
    direct = grad / total
    return torch.cat([direct, -(direct * sums[:, :-1]).sum(1, keepdim=True) / total], 1)

"""logsumexp, logaddexp and log1mexp: torch's values, and derivatives right at infinity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sapwood import _check
from sapwood.ops.logsemiring._matmul import floats


class _Softmax(torch.autograd.Function):
    """The gradient of logsumexp over several dimensions, by the policy for infinities."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        top = x.amax(dims, keepdim=True)
        infinite = top == math.inf
        e = torch.where(infinite, x - math.inf, x - torch.where(top.isfinite(), top, 0.0)).exp()
        e = torch.where(infinite, (x == math.inf).to(x.dtype), e)
        return e / torch.where(top == -math.inf, 1.0, e.sum(dims, keepdim=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dims = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return p * (grad - (p * grad).sum(ctx.dims, keepdim=True)), None


class _LogSumExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...]) -> Tensor:  # dimensions are kept
        return torch.logsumexp(x, dims, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dims = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * _Softmax.apply(x, ctx.dims), None  # type: ignore[no-untyped-call]


class _Share(torch.autograd.Function):
    """exp(a - logaddexp(a, b)): 1/2 for equal operands, 0 where both are -inf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        tie = torch.where(a == -math.inf, 0.0, 0.5)
        return torch.where(a == b, tie, torch.sigmoid(a - b))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (w,) = ctx.saved_tensors
        slope = grad * w * (1 - w)
        return slope, -slope


class _LogAddExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.logaddexp(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        first, second = _Share.apply(a, b), _Share.apply(b, a)  # type: ignore[no-untyped-call]
        return grad * first, grad * second


class _Slope(torch.autograd.Function):
    """-1 / expm1(-x), the derivative of log1mexp; 0 at 0, where no mass is left."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x == 0, 0.0, -1 / torch.expm1(-x)).masked_fill(x > 0, math.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        h: Tensor = ctx.saved_tensors[0]
        return grad * h * (1 - h)


class _Log1mExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        near = x > -math.log(2)
        return torch.where(near, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * _Slope.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def _dimensions(op: str, x: Tensor, dim: int | tuple[int, ...]) -> tuple[int, ...]:
    count = max(x.dim(), 1)
    found = []
    for d in (dim,) if isinstance(dim, int) else tuple(dim):
        if not -count <= d < count:
            _check.fail(ValueError, op, "dim", f"be in [{-count}, {count - 1}]", d)
        found.append(d % count)
    if len(set(found)) != len(found):
        _check.fail(ValueError, op, "dim", "name each dimension once", dim)
    return tuple(found)


def logsumexp(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """``torch.logsumexp`` whose gradient is never NaN because of -inf.

    Example:
        >>> import torch, sapwood
        >>> x = torch.full((3,), -torch.inf, requires_grad=True)
        >>> sapwood.ops.logsumexp(x, 0).backward()
        >>> x.grad  # torch.logsumexp gives NaN
        tensor([0., 0., 0.])

    Args:
        x: (*) floating point.
        dim: the dimension, or several.
        keepdim: whether they stay with size 1.

    Returns:
        log sum exp over ``dim``. -inf where nothing has mass (gradient 0), +inf where some term is
        (its gradient shared by those), NaN where a term is.

    Raises:
        ValueError: for a ``dim`` that does not exist.
        TypeError: if ``x`` is not a floating tensor.
    """
    (x,) = floats("logsumexp", x=x)
    dims = _dimensions("logsumexp", x, dim)
    y: Tensor = _LogSumExp.apply(x, dims)  # type: ignore[no-untyped-call]
    return y if keepdim or x.dim() == 0 else y.squeeze(dims)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """``torch.logaddexp`` whose gradient is never NaN because of -inf.

    Example:
        >>> import torch, sapwood
        >>> a = torch.tensor(-torch.inf, requires_grad=True)
        >>> sapwood.ops.logaddexp(a, a.detach()).backward()
        >>> a.grad  # torch.logaddexp gives NaN
        tensor(0.)

    Args:
        a: (*) floating point.
        b: (*), broadcast against ``a``.

    Returns:
        log(exp(a) + exp(b)). Both -inf: -inf, gradients 0. Both +inf: +inf, gradients 1/2.

    Raises:
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices or shapes that do not broadcast.
    """
    a, b = torch.broadcast_tensors(*floats("logaddexp", a=a, b=b))
    y: Tensor = _LogAddExp.apply(a, b)  # type: ignore[no-untyped-call]
    return y


def log_normalize(x: Tensor, dim: int = -1) -> Tensor:
    """Subtracts the logsumexp; a slice of -inf stays -inf.

    Example:
        >>> import torch, sapwood
        >>> sapwood.ops.log_normalize(torch.zeros(4)).exp()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Args:
        x: (*) floating point.
        dim: the dimension that shall sum to one in probability.

    Returns:
        (*), as ``torch.log_softmax`` where anything has mass.

    Raises:
        ValueError: for a ``dim`` that does not exist.
        TypeError: if ``x`` is not a floating tensor.
    """
    total = logsumexp(x, dim, keepdim=True)
    return x - torch.where(total == -math.inf, 0.0, total)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x <= 0, right to the last digits near 0 and far from it.

    Example:
        >>> import torch, sapwood
        >>> sapwood.ops.log1mexp(torch.tensor([-1e-10, -50.0]))
        tensor([-2.3026e+01, -1.9287e-22])

    Args:
        x: (*) floating point; a log-probability.

    Returns:
        (*): the log-probability of the complement. -inf at 0 (gradient 0: no mass is left there),
        NaN above 0.

    Raises:
        TypeError: if ``x`` is not a floating tensor.

    References:
        Maechler, Accurately computing log(1 - exp(-|a|)), 2012, equation 7.
    """
    (x,) = floats("log1mexp", x=x)
    y: Tensor = _Log1mExp.apply(x)  # type: ignore[no-untyped-call]
    return y

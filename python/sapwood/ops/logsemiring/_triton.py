"""The Triton kernels as ops ``sapwood::<op>_triton``, for CUDA devices without compiled kernels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapwood import _backend, _register
from sapwood.ops.logsemiring import _sequence_specs, _specs

# Typed loosely: mypy does not see the folder that is installed as sapwood.triton_kernels.
_kernels: Any = importlib.import_module("sapwood.triton_kernels")
_library = torch.library.Library("sapwood", "FRAGMENT")
_WITHOUT_NAMESPACE = len("sapwood::")


def why_not(x: Tensor, *_: Any) -> str | None:
    """Why Triton cannot compute a product or a segment of ``x``; None when it can."""
    reason: str | None = _kernels.why_not(x.device.type, x.dtype, device_index=x.device.index)
    return reason


def why_not_chain(t: Tensor, init: Tensor, maximum: bool) -> str | None:
    """Why Triton cannot walk the chain t (B, L, k, k); None when it can."""
    reason = why_not(t)
    if reason is None and maximum:
        return "takes the log semiring, not max"
    if reason is None and t.shape[-1] > _kernels.logsemiring.LARGEST_CHAIN:
        reason = f"takes up to {_kernels.logsemiring.LARGEST_CHAIN} states, not {t.shape[-1]}"
    return reason


def log_matmul(*args: Any) -> Tensor:
    c: Tensor = _kernels.logsemiring.log_matmul(*args)
    return c


def log_matmul_backward(*args: Any) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _kernels.logsemiring.log_matmul_backward(*args)
    return gradients


def max_matmul(*args: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _kernels.logsemiring.max_matmul(*args)
    return found


def sample_matmul(*args: Any) -> Tensor:
    drawn: Tensor = _kernels.logsemiring.sample_matmul(*args)
    return drawn


def segment_logsumexp(x: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
    y: Tensor = _kernels.logsemiring.segment_sums(x, ptr, order, weights=False)
    return y


def segment_softmax(x: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
    p: Tensor = _kernels.logsemiring.segment_sums(x, ptr, order, weights=True)
    return p


def segment_logsumexp_backward(
    grad: Tensor, x: Tensor, ptr: Tensor, order: Tensor | None
) -> Tensor:
    dx: Tensor = _kernels.logsemiring.segment_sums(x, ptr, order, weights=True, scale=grad)
    return dx


def log_scan(t: Tensor, init: Tensor, maximum: bool) -> Tensor:
    states: Tensor = _kernels.logsemiring.log_scan(t, init)
    return states


def log_scan_backward(
    grad: Tensor, t: Tensor, states: Tensor, maximum: bool
) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _kernels.logsemiring.log_scan_backward(grad, t, states)
    return gradients


def _define(kernel: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
    """An op with the schema, derivatives and vmap rule of the compiled one, but for ``changes``."""
    name = kernel.__name__
    schema = str(getattr(torch.ops.sapwood, name).default._schema)[_WITHOUT_NAMESPACE:]
    _library.define(schema.replace(name, f"{name}_triton", 1))
    _library.impl(f"{name}_triton", kernel, "CUDA")
    spec = _register.declared()[name]
    return _register.define_op(
        dataclasses.replace(spec, name=f"{name}_triton", variant=True, **changes)
    )


_backward_of: dict[str, Callable[..., Any]] = {
    kernel.__name__: _define(kernel)
    for kernel in (log_matmul_backward, segment_logsumexp_backward, log_scan_backward)
}


def _by(backward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The backward of a spec, calling the Triton op for the gradient."""

    def run(ctx: Any, *grads: Any) -> Any:
        return backward(ctx, *grads, op=_backward_of[name])

    return run


def _backend_of(
    kernel: Callable[..., Any], why: Callable[..., str | None], **changes: Any
) -> _backend.Backend:
    return _backend.Backend("triton", why, _define(kernel, **changes))


_BACKENDS = {
    "log_matmul": _backend_of(
        log_matmul, why_not, backward=_by(_specs.backward_log_matmul, "log_matmul_backward")
    ),
    "max_matmul": _backend_of(max_matmul, why_not),
    "sample_matmul": _backend_of(sample_matmul, why_not),
    "segment_logsumexp": _backend_of(
        segment_logsumexp,
        why_not,
        backward=_by(_sequence_specs.backward_values, "segment_logsumexp_backward"),
    ),
    "segment_softmax": _backend_of(segment_softmax, why_not),
    "log_scan": _backend_of(
        log_scan,
        why_not_chain,
        backward=_by(_sequence_specs.backward_scan, "log_scan_backward"),
    ),
}


def backend(op: str) -> _backend.Backend:
    """The Triton backend of an op."""
    return _BACKENDS[op]

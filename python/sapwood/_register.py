"""One declaration makes an op complete: fake, autograd, vmap, torch.func, fallback device.

One ``setup`` and ``backward`` serve four ways to call an op, because none is right for all:

- ``register_autograd``: what torch.compile and torch.export trace. Its kernel is written in Python
  and takes 5 us without and 15 us with a derivative, more than a small product does.
- eager, with a derivative: an ``autograd.Function`` of our own that runs the kernel below autograd.
- eager, without one: the kernel below autograd at once.
- under a functorch transform: an ``autograd.Function`` with a ``setup_context`` of its own, without
  which ``torch.func.grad``, ``jacrev`` and ``vmap(grad)`` raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sapwood import _load

_load.require_ops()

#: A vmap rule: (call, info, in_dims, *args) -> (outputs, out_dims). ``call`` is the op itself, one
#: transform level further down, so that a rule composes with grad and nested vmap.
VmapRule = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class OpSpec:
    """What define_op needs to know about one op of ``csrc/schema.cpp``."""

    name: str  # as in the schema, without the namespace
    family: str  # folder, file and docs page that hold it
    fake: Callable[..., Any]  # exact shape, dtype, device and strides
    reference: Callable[..., Any]  # the same maths in plain torch: oracle, and kernel elsewhere
    vmap: VmapRule
    setup: Callable[..., None] | None = None  # (ctx, inputs, output): save only what is needed
    backward: Callable[..., Any] | None = None  # differentiable; honours ctx.needs_input_grad
    variant: bool = False  # another kernel for an op of the schema, under a name of its own


_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active

_declared: dict[str, OpSpec] = {}
_callables: dict[str, Callable[..., Any]] = {}


def declared() -> dict[str, OpSpec]:
    """Every op of the schema that was declared, by name."""
    return {name: spec for name, spec in _declared.items() if not spec.variant}


def callable_for(name: str) -> Callable[..., Any]:
    """The function :func:`define_op` returned for this op."""
    return _callables[name]


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jacrev, ...) is running."""
    return bool(_transforms_active())


def define_op(spec: OpSpec) -> Callable[..., Any]:
    """Registers everything ``spec`` declares and returns the function to call."""
    name = f"sapwood::{spec.name}"
    op = getattr(torch.ops.sapwood, spec.name).default
    torch.library.register_fake(name, spec.fake)
    torch.library.register_kernel(name, None, spec.reference)
    torch.library.register_vmap(
        name, lambda info, in_dims, *args: spec.vmap(op, info, in_dims, *args)
    )
    _declared[spec.name] = spec
    _callables[spec.name] = op
    if spec.backward is None:
        return op  # type: ignore[no-any-return]
    torch.library.register_autograd(name, spec.backward, setup_context=spec.setup)
    call = _differentiable(spec, op, spec.backward)
    _callables[spec.name] = call
    return call


def _differentiable(
    spec: OpSpec, op: Callable[..., Any], derivative: Callable[..., Any]
) -> Callable[..., Any]:
    """The function to call for an op with a derivative."""
    setup = spec.setup
    kernel: Callable[..., Any] = getattr(op, "_op", op)  # OpOverload.__call__ only calls it

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with _below_autograd():
                output = kernel(*args)
            if setup is not None:
                setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return derivative(ctx, *grads)

    class UnderTransforms(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if setup is not None:
                setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return derivative(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            return spec.vmap(UnderTransforms.apply, info, in_dims, *args)

    # What Function.apply does before this is for transforms, which ``call`` has ruled out.
    eager: Callable[..., Any] = super(torch.autograd.Function, Eager).apply
    under_transforms: Callable[..., Any] = UnderTransforms.apply

    def call(*args: Any) -> Any:
        if _is_compiling():
            return op(*args)
        if _transforms_active():
            return under_transforms(*args)
        if _is_grad_enabled() and _any_requires_grad(*args):
            return eager(*args)
        with _below_autograd():
            return kernel(*args)

    return call


def loop_over_batch(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> Any:
    """The vmap rule of last resort: one call per batch element, results stacked in front."""
    results = [
        call(
            *(
                a.select(d, i) if isinstance(a, torch.Tensor) and d is not None else a
                for a, d in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(
            results[0]
        )
    return torch.stack(results), 0

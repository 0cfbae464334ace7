"""Declarations of the family's ops: fakes, derivatives and vmap rules.

B samples, C channels, K filters; "options" are stride, padding, dilation, groups, tile and
filter_group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood._register import OpSpec, define_op, loop_over_batch
from sapwood.reference import copruned_conv as reference

FAMILY = "copruned_conv"


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Merges the vmapped dimension, or as many copies, with the samples."""
    if t is None:
        return None
    moved = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    folded: Tensor = moved.flatten(0, 1)
    return folded


def _unfold(t: Tensor, size: int) -> Tensor:
    unfolded: Tensor = t.unflatten(0, (size, t.shape[0] // size))
    return unfolded


# copruned_conv2d ----------------------------------------------------------------------------------


def _fake_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    region: Tensor | None,
    filters: Tensor | None,
    input_filters: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
) -> Tensor:
    size = reference.output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _empty(x, (x.shape[0], weight.shape[0], *size))


def _slope_is_in_output(activation: str, residual: Tensor | None) -> bool:
    """Whether the sign of the output is that of the sum."""
    return activation in ("relu", "leaky_relu") and residual is None


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, region, filters, input_filters, residual, *options, activation = inputs
    ctx.options, ctx.activation = options, activation
    kept = output if _slope_is_in_output(activation, residual) else None
    needs_bias = activation != "none" and kept is None
    ctx.save_for_backward(
        x, weight, bias if needs_bias else None, region, filters, input_filters, kept
    )


def _through_activation(activation: str, grad: Tensor, z: Tensor) -> Tensor:
    """grad times the slope at z; for relu and leaky_relu z may be the result as well."""
    if activation == "relu":
        return torch.where(z <= 0, 0.0, grad)
    if activation == "leaky_relu":
        return torch.where(z > 0, grad, reference.LEAK * grad)
    if activation == "silu":
        s = torch.sigmoid(z)
        return grad * (s * (1 + z * (1 - s)))
    normal = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) * (0.5 * math.sqrt(2 / math.pi))
    return grad * (normal + z * density)


def _backward_conv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, region, filters, input_filters, kept = ctx.saved_tensors
    need_x, need_weight, need_bias, *_, need_residual = ctx.needs_input_grad[:7]
    slope = grad
    if ctx.activation != "none":
        z = kept
        if z is None:
            masks = (region, filters, input_filters)
            z = copruned_conv2d(x, weight, bias, *masks, None, *ctx.options, "none")
        slope = _through_activation(ctx.activation, grad, z)
    found: tuple[Tensor | None, ...] = (None, None, None)
    needs = (need_x, need_weight, need_bias)
    if any(needs):
        masks = (region, filters, input_filters)
        gradients = copruned_conv2d_backward(slope, x, weight, *masks, *ctx.options, *needs)
        found = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
    rest = (None,) * (len(ctx.options) + 1)
    return (*found, None, None, None, grad if need_residual else None, *rest)


def _vmap_conv(
    call: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    x, weight, bias, *tensors = args[:7]
    if in_dims[1] is not None or in_dims[2] is not None:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    size = info.batch_size
    folded = [_fold(t, d, size) for t, d in zip(tensors, in_dims[3:7], strict=True)]
    y = call(_fold(x, in_dims[0], size), weight, bias, *folded, *args[7:])
    return _unfold(y, size), 0


# copruned_conv2d_backward -------------------------------------------------------------------------


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    region: Tensor | None,
    filters: Tensor | None,
    input_filters: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_weight, need_bias = options[-3:]
    return (
        _empty(x, x.shape) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, weight, region, filters, input_filters, *options = inputs
    ctx.options, ctx.needs = options[:-3], options[-3:]
    ctx.save_for_backward(grad, x, weight, region, filters, input_filters)


def _double_backward(
    ctx: Any, gg_x: Tensor | None, gg_weight: Tensor | None, gg_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The first derivative is linear in grad, in weight (through x) and in x (through weight)."""
    grad, x, weight, *masks = ctx.saved_tensors
    need_grad, need_x, need_weight = ctx.needs_input_grad[:3]
    gg_x, gg_weight, gg_bias = (
        gg if need else None for gg, need in zip((gg_x, gg_weight, gg_bias), ctx.needs, strict=True)
    )
    to_grad = to_x = to_weight = None
    if need_grad and gg_x is not None:
        to_grad = copruned_conv2d(gg_x, weight, None, *masks, None, *ctx.options, "none")
    if need_grad and (gg_weight is not None or gg_bias is not None):
        other = torch.zeros_like(weight) if gg_weight is None else gg_weight
        more = copruned_conv2d(x, other, gg_bias, *masks, None, *ctx.options, "none")
        to_grad = more if to_grad is None else to_grad + more
    if need_x and gg_weight is not None:
        needs = (True, False, False)
        to_x = copruned_conv2d_backward(grad, x, gg_weight, *masks, *ctx.options, *needs)[0]
    if need_weight and gg_x is not None:
        needs = (False, True, False)
        to_weight = copruned_conv2d_backward(grad, gg_x, weight, *masks, *ctx.options, *needs)[1]
    return (to_grad, to_x, to_weight, None, None, None, *(None,) * (len(ctx.options) + 3))


def _vmap_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    need_x, need_weight, need_bias = args[-3:]
    if in_dims[2] is not None or need_weight or need_bias:
        return loop_over_batch(call, info, in_dims, *args)  # type: ignore[no-any-return]
    size, weight = info.batch_size, args[2]
    grad, x = (_fold(t, d, size) for t, d in zip(args[:2], in_dims[:2], strict=True))
    masks = [_fold(t, d, size) for t, d in zip(args[3:6], in_dims[3:6], strict=True)]
    gx, gw, gb = call(grad, x, weight, *masks, *args[6:])
    if need_x:
        return (_unfold(gx, size), gw, gb), (0, None, None)
    return (gx, gw, gb), (None, None, None)


copruned_conv2d_backward = define_op(
    OpSpec(
        "copruned_conv2d_backward",
        FAMILY,
        fake=_fake_backward,
        reference=reference.copruned_conv2d_backward,
        vmap=_vmap_backward,
        setup=_setup_backward,
        backward=_double_backward,
    )
)
copruned_conv2d = define_op(
    OpSpec(
        "copruned_conv2d",
        FAMILY,
        fake=_fake_conv,
        reference=reference.copruned_conv2d,
        vmap=_vmap_conv,
        setup=_setup_conv,
        backward=_backward_conv,
    )
)


# tile_list ----------------------------------------------------------------------------------------


def _fake_tile_list(mask: Tensor) -> tuple[Tensor, Tensor]:
    return (
        mask.new_empty(mask.numel(), dtype=torch.int32),
        mask.new_empty((), dtype=torch.int32),
    )


tile_list = define_op(
    OpSpec(
        "tile_list",
        FAMILY,
        fake=_fake_tile_list,
        reference=reference.tile_list,
        vmap=loop_over_batch,
    )
)

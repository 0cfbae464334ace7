"""Operations that act on every entry alone: activations, residual additions, gates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sapwood.minimize._facts import CONSTANT, Facts, align, compress, varying
from sapwood.minimize.rules._registry import Step, largest, opaque, rule

_UNARY = """
relu relu6 gelu silu tanh sigmoid hardswish hardsigmoid hardtanh elu celu selu leaky_relu softplus
mish exp expm1 neg abs sqrt rsqrt square reciprocal log log1p erf sin cos logsigmoid log_sigmoid
softshrink hardshrink softsign alias clone detach detach_ contiguous dropout feature_dropout
alpha_dropout sign floor ceil round isnan isinf logical_not to _to_copy lift_fresh_copy
"""
_OVERLOADS = ("default", "dtype", "device", "other", "int")
_BINARY = """
add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor div.Tensor div.Scalar
div.Tensor_mode maximum.default minimum.default pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar
clamp.default clamp.Tensor clamp_min.default clamp_max.default where.self where.ScalarOther
where.ScalarSelf masked_fill.Scalar masked_fill.Tensor threshold.default
eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor
ge.Scalar ge.Tensor logical_and.default logical_or.default bitwise_and.Tensor bitwise_or.Tensor
bitwise_not.default lerp.Scalar lerp.Tensor addcmul.default atan2.default fmod.Tensor
"""
#: What may be infinite for finite arguments, so that 0 times it need not be 0.
_UNBOUNDED = "exp expm1 div reciprocal rsqrt log log1p pow atan2 matrix_exp tan cosh sinh"


@rule(*(f"aten.{name}.{overload}" for name in _UNARY.split() for overload in _OVERLOADS))
@rule(*(f"aten.{name}" for name in _BINARY.split()))
def pointwise(step: Step) -> Any:
    """Channels at the same place live and die together; the result is as live as its arguments."""
    if step.name in ("dropout", "feature_dropout", "alpha_dropout") and step.bound()["train"]:
        return opaque(step, f"{step.place} is in training mode")
    operands = [step.analysis.labelled(facts) for facts in step.facts()]
    kind = largest([align(facts.kind, step.value.dim()) for facts in operands])
    result = _combined(step, operands, kind)
    if step.name in ("clone", "alias", "contiguous", "detach"):
        return replace(result, tail=operands[0].tail)
    return result


@rule("aten._assert_tensor_metadata.default")
def assertion(step: Step) -> None:
    """What ``torch.export`` notes of a tensor in front of a conversion; it computes nothing."""


@rule("aten.mul.Tensor", "aten.mul.Scalar")
def product(step: Step) -> Facts:
    """As every gate, but an exact zero makes the product zero whatever the other factor does."""
    operands = [step.analysis.labelled(facts) for facts in step.facts()]
    ndim = step.value.dim()
    kind = largest([align(facts.kind, ndim) for facts in operands])
    if len(operands) == 2 and step.value.is_floating_point():
        first, second = step.node.args
        for factor, other in ((operands[0], second), (operands[1], first)):
            if not _may_be_infinite(other):
                kind = torch.where(align(factor.zero(), ndim), CONSTANT, kind)
    return _combined(step, operands, compress(kind.to(torch.uint8)))


def _may_be_infinite(node: Any) -> bool:
    name = str(getattr(node, "target", "")).removeprefix("aten.").split(".")[0]
    return name in _UNBOUNDED.split()


@rule("aten.prelu.default")
def prelu(step: Step) -> Facts:
    """A slope per channel on axis 1, cut with the channels."""
    x, slope = step.bound()["self"], step.bound()["weight"]
    slope = step.analysis.labelled(slope)
    if slope.value.numel() > 1:
        shape = [1] * x.ndim
        shape[1] = slope.value.numel()
        fields = tuple(field.reshape(shape) for field in slope.fields)
        slope = Facts(slope.value.reshape(shape), slope.kind.reshape([1] * x.ndim), fields)
    else:
        slope = Facts(slope.value.reshape([1] * x.ndim), slope.kind.reshape([1] * x.ndim))
    return _combined(step, [x, slope], x.kind)


def _combined(step: Step, operands: list[Facts], kind: Tensor) -> Facts:
    return Facts(step.value, compress(kind), combined_fields(step, operands))


def combined_fields(step: Step, operands: list[Facts]) -> tuple[Tensor, ...]:
    """The channels of a broadcast result: equal ones are united, unmatched ones stay."""
    atoms, ndim = step.analysis.atoms, step.value.dim()
    shapes = [align(facts.value, ndim).shape for facts in operands]
    found: list[tuple[Tensor, set[int]]] = []  # a field and the operands that carry it
    broken: list[Tensor] = []
    for place, facts in enumerate(operands):
        for field in (align(f, ndim) for f in facts.fields):
            axes = varying(field)
            same = [i for i, (f, _) in enumerate(found) if varying(f) == axes]
            crossing = [f for f, _ in found if set(varying(f)) & set(axes) and varying(f) != axes]
            if crossing:
                broken += [field, *crossing]
            elif same:
                atoms.unite(found[same[0]][0], field)
                found[same[0]][1].add(place)
            else:
                found.append((field, {place}))
    for field, carriers in found:
        if any(
            shape[axis] > 1
            for place, shape in enumerate(shapes)
            if place not in carriers
            for axis in varying(field)
        ):
            broken.append(field)
    for field in broken:
        atoms.pin(field, f"{step.place} combines channels with an axis that has none")
    kept = [field for field, _ in found if not any(field is other for other in broken)]
    return tuple(kept)

"""Products with a packed weight: the fastest format for each batch size, or dense torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops import _dispatch
from sapwood.ops._autocast import autocast
from sapwood.ops.masked_matmul import _packed_specs as specs
from sapwood.ops.masked_matmul import _triton
from sapwood.ops.masked_matmul._layouts import FORMATS, TRANSPOSED, supported
from sapwood.ops.masked_matmul._packed_weight import PackedWeight
from sapwood.ops.masked_matmul._training import as_flat
from sapwood.reference import masked_matmul as reference

_NAME = "packed_linear"
ACTIVATIONS = tuple(reference.ACTIVATIONS)
_check_finite = os.environ.get("SAPWOOD_CHECK_FINITE", "0") == "1"
_HALVES = (torch.bfloat16, torch.float16)


_BACKENDS = {
    "csr": (
        _backend.native("packed_linear_csr", specs.packed_linear_csr),
        _backend.Backend("reference", lambda *_: None, reference.packed_linear_csr),
    ),
    "bitmap": (
        _backend.native("packed_linear_bitmap", specs.packed_linear_bitmap),
        _backend.Backend("triton", _triton.why_not, _triton.packed_linear_bitmap),
        _backend.Backend("reference", lambda *_: None, reference.packed_linear_bitmap),
    ),
    "sell": (
        _backend.native("packed_linear_sell", specs.packed_linear_sell),
        _backend.Backend("reference", lambda *_: None, reference.packed_linear_sell),
    ),
}
_SAMPLED_BACKENDS = (
    _backend.native("sampled_matmul", specs.sampled_matmul),
    _backend.Backend("triton", _triton.why_not, _triton.sampled_matmul),
    _backend.Backend("reference", lambda *_: None, reference.sampled_matmul),
)


@dataclass(frozen=True)
class Decision:
    """What :func:`packed_linear` runs for one batch size."""

    format: str
    batch: int
    predicted: dict[str, float]  # seconds, by format
    reasons: dict[str, str]  # why each other format is not taken

    def __str__(self) -> str:
        lines = [f"sapwood.packed_linear, batch {self.batch}:"]
        for name in FORMATS:
            time = self.predicted.get(name)
            shown = f"{time * 1e6:10.1f} us" if time is not None else " " * 13
            lines.append(f"  {name:<7}{shown}  {self.reasons.get(name, 'will run')}")
        return "\n".join(lines)


def explain(packed: PackedWeight, batch: int) -> Decision:
    """Which format runs for a batch size, the predicted times, and why the others do not.

    Example::

        print(sapwood.ops.explain(packed, batch=64))

    Args:
        packed: a weight from :func:`pack_sparse`.
        batch: number of input rows, the product of all leading dimensions.
    """
    table = _dispatch.table_for(packed.device.type, packed.dtype)
    _, predicted = _dispatch.choose(table, *packed.shape, packed.nnz, batch, FORMATS)
    chosen = packed.plan()[_dispatch.batch_bucket(batch)]
    reasons = {}
    for name in FORMATS:
        if name == chosen:
            continue
        if not supported(name, packed.dtype, packed.device.type):
            reasons[name] = f"has no fast kernel for {packed.dtype} on {packed.device.type}"
        elif name not in packed.formats:
            reasons[name] = "not held by this packed weight"
        elif name in predicted and chosen in predicted:
            reasons[name] = f"predicted {predicted[name] / predicted[chosen]:.2f}x the time"
        else:
            reasons[name] = "not for this batch size"
    return Decision(chosen, batch, predicted, reasons)


def _run(fmt: str, x: Tensor, packed: PackedWeight, bias: Tensor | None, act: str) -> Tensor:
    n, k = packed.shape
    if fmt == "dense":
        _backend.log(_NAME, fmt, x)
        weight = packed.layouts["dense"]["weight"]
        y = F.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), bias)
        return y if act == "none" else reference.ACTIVATIONS[act](y)
    layout = tuple(packed.layouts[fmt].values())
    sizes: tuple[Any, ...] = {"csr": (k,), "bitmap": (k,), "sell": (n, k)}[fmt]
    chosen = _backend.choose(f"packed_linear_{fmt}", _BACKENDS[fmt], x)
    last = (act, None, None, None, None) if fmt == "csr" else (act,)
    product: Tensor = chosen.run(x, *layout, bias, *sizes, *last)
    return product


def _differentiable(x: Tensor, packed: PackedWeight, bias: Tensor | None, act: str) -> Tensor:
    csr = packed.csr
    transposed = packed._derived.get("transposed")
    if transposed is None and not torch.compiler.is_compiling():
        transposed = packed.transposed
    chosen = _backend.choose("packed_linear_csr", _BACKENDS["csr"], x)
    y: Tensor = chosen.run(
        *(x, csr["values"], csr["cols"], csr["row_ptr"], csr["row_order"], bias),
        *(packed.shape[1], "none"),
        *((transposed[name] for name in TRANSPOSED) if transposed else [None] * 4),
    )
    return reference.ACTIVATIONS[act](y)


def _checked(x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str) -> None:
    if not isinstance(packed, PackedWeight):
        _check.fail(TypeError, _NAME, "packed", "be a PackedWeight", type(packed).__name__)
    _check.last_dim(_NAME, "input", x, packed.shape[1], "the packed weight's columns")
    if x.dtype != packed.dtype and not (x.dtype == torch.float32 and packed.dtype in _HALVES):
        _check.dtype(_NAME, "input", x, (packed.dtype,))
    if bias is not None:
        _check.tensor(_NAME, "bias", bias)
        _check.shape(_NAME, "bias", bias, packed.shape[:1])
        _check.same_dtype(_NAME, "bias", bias, "input", x)
    _check.one_of(_NAME, "activation", activation, ACTIVATIONS)
    if x.device != packed.device or (bias is not None and bias.device != x.device):
        _check.same_device(_NAME, input=x, packed=packed._any, bias=bias)
    if (_check_finite or _check.values_are_checked()) and not x.isfinite().all():
        count = int((~x.isfinite()).sum())
        _check.fail(ValueError, _NAME, "input", "be finite", f"{count} inf or NaN")


def _explain(
    input: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, activation: str = "none"
) -> _backend.Explanation:
    batch = as_flat(input, packed.shape[1]).shape[0]
    decision = explain(packed, batch)
    order = sorted(FORMATS, key=lambda f: f != decision.format)
    return _backend.Explanation(
        _NAME, tuple(_backend.Candidate(f, decision.reasons.get(f)) for f in order)
    )


@_backend.explainable(_explain)
def packed_linear(
    input: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """Linear layer with a packed weight, and optionally a fused activation.

    Example::

        packed = sapwood.ops.pack_sparse(weight)               # (N, K), mostly zeros
        y = sapwood.ops.packed_linear(x, packed, activation="relu")

    Equals ``activation(F.linear(input, unpack(packed), bias))`` for finite input. An absent entry
    is absent: where dense torch computes ``0 * inf = NaN``, the packed formats do not, and the
    dispatch may pick either, so non-finite input is outside the contract
    (``sapwood.check_values()`` or ``SAPWOOD_CHECK_FINITE=1`` raises on it). Differentiable in
    ``input``, ``bias`` and the values of ``packed.with_values(...)``; gradients use the csr format.
    Each format is bitwise deterministic and independent of the number of threads.

    Args:
        input: (*, K) in the dtype of ``packed``, or float32 with bfloat16/float16 values.
        packed: from :func:`pack_sparse`, N x K.
        bias: (N,) in the dtype of ``input``, or None.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        (*, N) in the dtype of ``input``.

    Raises:
        ValueError: for shapes that do not match, or an unknown activation.
        TypeError: for wrong dtypes.
        RuntimeError: for tensors on different devices.
    """
    _check.tensor(_NAME, "input", input)
    x, b = input, bias
    if torch.is_autocast_enabled(input.device.type):
        x, b = autocast(input, bias)
        packed = packed if packed.dtype == x.dtype else packed.to(x.dtype)
    _checked(x, packed, b, activation)
    flat = as_flat(x, packed.shape[1])
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or packed._any.requires_grad or (b is not None and b.requires_grad)
    )
    if needs_grad:
        y = _differentiable(flat, packed, b, activation)
    else:
        fmt = packed.plan()[_dispatch.batch_bucket(flat.shape[0])]
        y = _run(fmt, flat, packed, b, activation)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], packed.shape[0])


def sampled_matmul(grad_output: Tensor, input: Tensor, packed: PackedWeight) -> Tensor:
    """The weight gradient at the kept positions only: ``(grad_output.T @ input)[mask]``.

    Example::

        dvalues = sapwood.ops.sampled_matmul(dy, x, packed)    # (nnz,)

    Args:
        grad_output: (*, N).
        input: (*, K), same leading dimensions and dtype.
        packed: the weight whose structure samples the product, N x K.

    Returns:
        (nnz,) in row-major order, dtype of ``input``.

    Raises:
        ValueError: for shapes that do not match.
        TypeError: for different dtypes.
        RuntimeError: for tensors on different devices.
    """
    op = "sampled_matmul"
    _check.tensor(op, "grad_output", grad_output)
    _check.tensor(op, "input", input)
    _check.last_dim(op, "grad_output", grad_output, packed.shape[0], "the packed weight's rows")
    _check.last_dim(op, "input", input, packed.shape[1], "the packed weight's columns")
    _check.shape(op, "grad_output", grad_output, (*input.shape[:-1], packed.shape[0]))
    _check.floating(op, "input", input)
    _check.same_dtype(op, "grad_output", grad_output, "input", input)
    _check.same_device(op, grad_output=grad_output, input=input, packed=packed._any)
    flat, csr = as_flat(input, packed.shape[1]), packed.csr
    chosen = _backend.choose(op, _SAMPLED_BACKENDS, flat)
    y: Tensor = chosen.run(as_flat(grad_output, packed.shape[0]), flat, csr["cols"], csr["row_ptr"])
    return y

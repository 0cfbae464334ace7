"""The masked_matmul family against its peers: what each provider runs stands here in full.

Sizes: x (B, K), weight (N, K), random mask, bias (N,). ``dense`` is torch with the weight
multiplied by its mask beforehand, which is what a user would write for inference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood._measure import Call
from sapwood.cli.benchmarks.runner import FamilyCase, Unavailable, require_small_error

#: op of a case -> (baseline, providers)
PROVIDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "packed_linear": (
        "dense",
        ("dense", "sapwood", "csr", "bitmap", "sell", "masked_dense", "torch_csr", "scipy"),
    ),
    "packed_linear_grad_input": ("dense", ("dense", "sapwood", "torch_csr")),
    "sampled_matmul": ("dense", ("dense", "sapwood")),
    "masked_matmul": ("masked_dense", ("masked_dense", "sapwood", "sparse_linear")),
    "pack_sparse": ("torch_csr", ("torch_csr", "csr", "bitmap", "sell")),
}

SHAPES = ((256, 256), (1024, 1024), (2048, 2048), (4096, 1024))
BATCHES = (1, 16, 64, 256)
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
#: Largest relative error in norm of a result that may be timed.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class MaskedMatmulCase(FamilyCase):
    """One op at one size."""

    table: ClassVar = PROVIDERS

    n: int
    k: int
    batch: int
    sparsity: float
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k} s={self.sparsity:g} B={self.batch}"

    def build(self, provider: str) -> Call:
        return _BUILDERS[self.op](problem_of(self), provider)

    def check(self, provider: str, result: object) -> None:
        results = result if isinstance(result, tuple) else (result,)
        for got, want in zip(results, _expected(self, provider), strict=True):
            error = _relative_error(_as_tensor(got), want)
            require_small_error(self, provider, error, TOLERANCE[self.dtype])


@dataclass(frozen=True)
class Problem:
    """The tensors of a case."""

    x: Tensor  # (B, K)
    weight: Tensor  # (N, K)
    mask: Tensor  # (N, K) bool
    product: Tensor  # (N, K), weight where the mask is set, else 0
    bias: Tensor  # (N,)
    grad: Tensor  # (B, N), of the output


@lru_cache(maxsize=1)  # the providers of a case follow one another; a sweep must not pile up
def problem_of(case: MaskedMatmulCase) -> Problem:
    """The tensors of a case, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, dtype)

    weight = normal(case.n, case.k)
    mask = (torch.rand(case.n, case.k, generator=generator) >= case.sparsity).to(case.device)
    return Problem(
        x=normal(case.batch, case.k),
        weight=weight,
        mask=mask,
        product=torch.where(mask, weight, 0.0),
        bias=normal(case.n),
        grad=normal(case.batch, case.n),
    )


def cases(
    *, quick: bool, device: str = "cpu", dtype: str = "float32"
) -> Iterator[MaskedMatmulCase]:
    """The sweep: 2048 x 2048 in the quick one, every shape and sparsity in the full one."""
    shapes = ((2048, 2048),) if quick else SHAPES
    sparsities = (0.5, 0.9, 0.95) if quick else SPARSITIES
    for n, k in shapes:
        for batch in BATCHES:
            for sparsity in sparsities:
                yield MaskedMatmulCase("packed_linear", n, k, batch, sparsity, dtype, device)
    for op, batch in (
        ("packed_linear_grad_input", 64),
        ("sampled_matmul", 64),
        ("masked_matmul", 256),
        ("pack_sparse", 1),
    ):
        yield MaskedMatmulCase(op, 2048, 2048, batch, 0.9, dtype, device)


def _forward(p: Problem, provider: str) -> Call:
    x, weight, mask, product, bias = p.x, p.weight, p.mask, p.product, p.bias
    if provider == "dense":
        return lambda: F.linear(x, product, bias)
    if provider == "masked_dense":
        return lambda: F.linear(x, weight * mask, bias)
    if provider == "torch_csr":
        csr = _torch_csr(product)
        columns = x.mT  # (K, B)
        return lambda: (csr @ columns).mT + bias
    if provider == "scipy":
        return _scipy_forward(p)
    if provider in ("bitmap", "sell") and len(x) > 8 and x.device.type == "cpu":
        raise Unavailable(f"{provider} has kernels for batches up to 8")
    packed = sapwood.ops.pack_sparse(
        weight, mask, format="auto" if provider == "sapwood" else provider
    )
    return lambda: sapwood.ops.packed_linear(x, packed, bias)


def _torch_csr(product: Tensor) -> Tensor:
    """int32 indices are the ones the vendor library takes without converting them at each call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = product.to_sparse_csr()
        return torch.sparse_csr_tensor(
            csr.crow_indices().int(),
            csr.col_indices().int(),
            csr.values(),
            csr.shape,
            check_invariants=False,
        )


def _scipy_forward(p: Problem) -> Call:
    if p.x.device.type != "cpu" or p.x.dtype not in (torch.float32, torch.float64):
        raise Unavailable("scipy multiplies float32 and float64 on the CPU")
    try:
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise Unavailable("scipy is not installed: pip install 'sapwood[bench]'") from error
    csr = csr_matrix(p.product.numpy())
    x, bias = p.x.numpy(), p.bias.numpy()
    return lambda: (csr @ x.T).T + bias


def _grad_input(p: Problem, provider: str) -> Call:
    """Backward through the input alone; the graph is kept, so only dX is timed."""
    x = p.x.clone().requires_grad_()
    with torch.enable_grad():
        if provider == "dense":
            y = F.linear(x, p.product)
        elif provider == "torch_csr":
            transposed = _torch_csr(p.product.mT.contiguous())
            return lambda: (transposed @ p.grad.mT).mT
        else:
            packed = sapwood.ops.pack_sparse(p.weight, p.mask, format="csr")
            y = sapwood.ops.packed_linear(x, packed)
    return lambda: torch.autograd.grad(y, x, p.grad, retain_graph=True)[0]


def _sampled(p: Problem, provider: str) -> Call:
    grad, x = p.grad, p.x
    if provider == "dense":
        return lambda: grad.mT @ x
    packed = sapwood.ops.pack_sparse(p.weight, p.mask, format="csr")
    return lambda: sapwood.ops.sampled_matmul(grad, x, packed)


def _training_step(p: Problem, provider: str) -> Call:
    """Forward and the gradients of input, weight (or values) and bias."""
    x = p.x.clone().requires_grad_()
    weight = p.weight.clone().requires_grad_()
    bias = p.bias.clone().requires_grad_()
    mask, grad = p.mask, p.grad
    inputs: tuple[Tensor, ...] = (x, weight, bias)
    if provider == "masked_dense":
        forward: Callable[[], Tensor] = lambda: F.linear(x, weight * mask, bias)  # noqa: E731
    elif provider == "sapwood":
        forward = lambda: sapwood.ops.masked_matmul(x, weight, mask, bias)  # noqa: E731
    else:
        packed = sapwood.ops.pack_sparse(p.weight, mask, format="csr")
        layer = sapwood.nn.SparseLinear(packed, p.bias)
        forward = lambda: layer(x)  # noqa: E731
        inputs = (x, *layer.parameters())  # values, bias

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = forward()
            return y.detach(), *torch.autograd.grad(y, inputs, grad)

    return step


def _pack(p: Problem, provider: str) -> Call:
    weight, mask, product = p.weight, p.mask, p.product
    if provider == "torch_csr":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            product.to_sparse_csr()  # torch warns at the first one only
        return lambda: product.to_sparse_csr()
    return lambda: sapwood.ops.pack_sparse(weight, mask, format=provider)


_BUILDERS: dict[str, Callable[[Problem, str], Call]] = {
    "packed_linear": _forward,
    "packed_linear_grad_input": _grad_input,
    "sampled_matmul": _sampled,
    "masked_matmul": _training_step,
    "pack_sparse": _pack,
}


def _expected(case: MaskedMatmulCase, provider: str) -> tuple[Tensor, ...]:
    """The results in float64, by plain torch."""
    p = problem_of(case)
    x, product, bias, grad = (t.double() for t in (p.x, p.product, p.bias, p.grad))
    if case.op == "packed_linear":
        return (F.linear(x, product, bias),)
    if case.op == "packed_linear_grad_input":
        return (grad @ product,)
    if case.op == "pack_sparse":
        return (product,)
    grad_weight = grad.mT @ x
    if case.op == "sampled_matmul":
        return (grad_weight if provider == "dense" else grad_weight[p.mask],)
    kept = grad_weight[p.mask] if provider == "sparse_linear" else grad_weight * p.mask
    return F.linear(x, product, bias), grad @ product, kept, grad.sum(0)


def _as_tensor(result: object) -> Tensor:
    if isinstance(result, sapwood.ops.PackedWeight):
        return sapwood.ops.unpack(result)
    return torch.as_tensor(result)


def _relative_error(got: Tensor, want: Tensor) -> float:
    if got.layout != torch.strided:
        got = got.to_dense()
    if got.shape != want.shape:
        return float("inf")
    return float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-300))

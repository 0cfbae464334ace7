"""One forward and one backward pass of every family against plain torch in float64.

    python tools/smoke_checks.py [--installed-in DIRECTORY]

Prints a line per family and exits with 1 when one of them is wrong. It needs nothing but the
installed sapwood, and shares no code with it: it states by itself what the ops promise.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sapwood
from sapwood import ops

Function = Callable[..., Tensor]


def worst(*errors: float) -> float:
    """The largest, or NaN when one is NaN, which max() would overlook."""
    return float(torch.tensor(errors).max())


def differ(found: Function, exact: Function, inputs: Sequence[Tensor]) -> float:
    """The largest difference of the values and of all gradients, relative to the largest entry."""
    single = [t.clone().requires_grad_() for t in inputs]
    double = [t.double().requires_grad_() for t in inputs]
    y, z = found(*single), exact(*double)
    slope = torch.linspace(-1, 2, z.numel(), dtype=torch.float64).view_as(z)
    actual = [y, *torch.autograd.grad(y, single, slope.to(y.dtype))]
    expected = [z, *torch.autograd.grad(z, double, slope)]
    pairs = zip(actual, expected, strict=True)
    errors = [(a.double() - e).detach().abs().max() / e.detach().abs().max() for a, e in pairs]
    return worst(*map(float, errors))


def masked_matmul() -> float:
    mask = torch.rand(48, 96) > 0.8

    def exact(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, torch.where(mask, w, 0.0), bias)

    inputs = torch.randn(16, 96), torch.randn(48, 96), torch.randn(48)
    errors = [differ(lambda x, w, b: ops.masked_matmul(x, w, mask, b), exact, inputs)]
    x, weight, bias = inputs
    for layout in ("dense", "bitmap", "csr", "sell"):
        packed = ops.pack_sparse(weight, mask, format=layout)
        if not torch.equal(ops.unpack(packed), torch.where(mask, weight, 0.0)):
            raise ArithmeticError(f"packing as {layout} changes the weight")
        errors.append(
            differ(
                lambda x, packed=packed: ops.packed_linear(x, packed, bias),
                lambda x: exact(x, weight.double(), bias.double()),
                [x],
            )
        )
    return worst(*errors)


def logsemiring() -> float:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.logsumexp(a[:, :, None] + b, 1)

    def chain(t: Tensor, start: Tensor) -> Tensor:
        for step in t:
            start = torch.logsumexp(start[:, None] + step, 0)
        return start

    return worst(
        differ(ops.log_matmul, product, [50 * torch.randn(20, 70), torch.randn(70, 30)]),
        differ(ops.log_scan, chain, [torch.randn(40, 5, 5), torch.randn(5)]),
    )


def similarity() -> float:
    x = torch.randn(60, 16)
    x[40:] = x[:20] + 0.1 * torch.randn(20, 16)

    def matrix(x: Tensor) -> Tensor:
        unit = x / x.square().sum(1, keepdim=True).sqrt()
        return unit @ unit.T

    pairs = ops.similarity_pairs(x, threshold=0.9)
    wanted = (matrix(x.double()) >= 0.9).triu(1).nonzero()
    if not torch.equal(torch.stack([pairs.row, pairs.col], 1), wanted):
        raise ArithmeticError(f"{len(pairs)} pairs instead of {len(wanted)}")
    return worst(
        differ(ops.similarity_matrix, matrix, [x]),
        differ(
            lambda x: ops.similarity_pairs(x, threshold=0.9).value,
            lambda x: matrix(x)[pairs.row, pairs.col],
            [x],
        ),
    )


def splat2d() -> float:
    def image(mu: Tensor, chol: Tensor, feat: Tensor) -> Tensor:
        l1, l2, l3 = chol[0, :, :, None, None].unbind(1)
        u = (torch.arange(32) - mu[0, :, 0, None, None]) / l1
        v = (torch.arange(24)[:, None] - mu[0, :, 1, None, None] - l2 * u) / l3
        return torch.einsum("nhw,nc->chw", (-(u * u + v * v) / 2).exp(), feat[0])[None]

    inputs = [torch.rand(1, 20, 2) * 24, torch.rand(1, 20, 3) + 1.5, torch.rand(1, 20, 3)]
    return differ(lambda m, c, f: ops.splat2d(m, c, f, (24, 32), cutoff=60.0), image, inputs)


def copruned_conv() -> float:
    tiles = torch.rand(2, 5, 5) < 0.4
    filters = torch.tensor([[True, False], [False, True]])
    kept = tiles.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    kept = kept & filters.repeat_interleave(16, 1)[:, :, None, None]  # (2, 32, 20, 20)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return torch.where(kept, F.conv2d(x, weight, padding=1), 0.0)

    def found(x: Tensor, weight: Tensor) -> Tensor:
        return ops.copruned_conv2d(x, weight, None, tiles, filters, padding=1, tile=4)

    return differ(found, exact, [torch.randn(2, 16, 20, 20), torch.randn(32, 16, 3, 3)])


FAMILIES = (masked_matmul, logsemiring, similarity, splat2d, copruned_conv)
ALLOWED = 1e-5


def main() -> int:
    """Runs all checks, whatever fails among them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--installed-in", type=Path, help="fail when sapwood lies elsewhere")
    folder = parser.parse_args().installed_in
    package = Path(sapwood.__file__).resolve().parent
    if folder is not None and not package.is_relative_to(folder.resolve()):
        print(f"smoke_checks: sapwood must be under {folder}, got {package}", file=sys.stderr)
        return 1
    python = f"Python {platform.python_version()}, {platform.machine()}"
    print(f"sapwood {sapwood.__version__}, torch {torch.__version__}, {python}")
    failed = False
    for family in FAMILIES:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            error = family()
            passed, detail = error <= ALLOWED, f"values and gradients within {error:.0e}"
        except Exception as fault:  # the other families are still worth a line
            passed, detail = False, f"{type(fault).__name__}: {fault}"
        failed |= not passed
        seconds = time.perf_counter() - start
        print(f"{'ok' if passed else 'FAILED':<8}{family.__name__:<16}{detail}; {seconds:.1f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

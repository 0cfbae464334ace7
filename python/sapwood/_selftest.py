"""A check of about a second per family that the installed kernels compute what they should."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Result:
    """Whether one family works here."""

    family: str
    passed: bool
    seconds: float
    detail: str


def run() -> list[Result]:
    """Runs every family's check; a failure is a result, not an exception.

    >>> [result.family for result in run()]
    ['masked_matmul', 'logsemiring', 'similarity', 'splat2d', 'copruned_conv', 'pruning']

    Returns:
        One result per family, in the order of ``FAMILIES``.
    """
    return [_run_one(family, check) for family, check in FAMILIES.items()]


def _run_one(family: str, check: Callable[[], str]) -> Result:
    start = time.perf_counter()
    try:
        detail, passed = check(), True
    except Exception as error:  # the report must reach the user whatever is broken
        detail, passed = f"{type(error).__name__}: {error}", False
    return Result(family, passed, time.perf_counter() - start, detail)


def _difference(name: str, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected value; raises above 1e-5."""
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    if not error <= 1e-5:  # also catches NaN
        raise ArithmeticError(f"{name} is off by {error.item():.1e} (relative), allowed is 1e-5")
    return float(error)


def _masked_matmul() -> str:
    from sapwood import ops

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 300, generator=generator)
    weight = torch.randn(70, 300, generator=generator)
    mask = torch.rand(70, 300, generator=generator) < 0.2
    bias = torch.randn(70, generator=generator)
    kept = weight.double().masked_fill(~mask, 0)
    expected = x.double() @ kept.T + bias.double()  # (5, 70)

    leaf = weight.clone().requires_grad_()
    output = ops.masked_matmul(x, leaf, mask, bias)
    output.sum().backward()
    if leaf.grad is None:
        raise ArithmeticError("masked_matmul gave its weight no gradient")
    slope = x.double().sum(0).expand(70, 300).masked_fill(~mask, 0)
    worst = [
        _difference("masked_matmul", output.detach(), expected),
        _difference("the gradient of masked_matmul", leaf.grad, slope),
    ]
    for layout in PACKED_FORMATS:
        packed = ops.pack_sparse(weight, mask, format=layout)
        worst.append(_difference(layout, ops.packed_linear(x, packed, bias), expected))
    return f"training op, gradient, {', '.join(PACKED_FORMATS)}: within {max(worst):.0e}"


def _logsemiring() -> str:
    from sapwood import ops

    generator = torch.Generator().manual_seed(0)
    worst = []
    for scale in (1.0, 100.0):
        a = scale * torch.randn(50, 60, generator=generator)
        b = scale * torch.randn(60, 40, generator=generator)
        expected = torch.logsumexp(a.double()[:, :, None] + b.double(), 1)
        worst.append(_difference("log_matmul", ops.log_matmul(a, b), expected))
    empty = torch.full((30, 60), -torch.inf, requires_grad=True)
    output = ops.log_matmul(empty, b)
    output.sum().backward()
    if empty.grad is None or empty.grad.any() or not output.eq(-torch.inf).all():
        raise ArithmeticError("log_matmul gives rows without mass a value or a gradient")
    steps = torch.randn(200, 4, 4, generator=generator)
    forward = ops.logsumexp(ops.log_scan(steps, torch.zeros(4)).double(), 0)
    backward = ops.logsumexp(ops.log_scan(steps, torch.zeros(4), reverse=True).double(), 0)
    worst.append(_difference("log_scan", forward[None], backward[None]))
    value, path = ops.log_scan_argmax(steps, torch.zeros(4))
    weight = steps[torch.arange(200), path[:-1], path[1:]].double().sum()
    worst.append(_difference("log_scan_argmax", value[None], weight[None]))
    return f"products at scales 1 and 100, -inf, a chain of 200: within {max(worst):.0e}"


def _similarity() -> str:
    from sapwood import ops

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=generator)
    x[200:] = x[:100] + 0.3 * torch.randn(100, 20, generator=generator)
    unit = torch.nn.functional.normalize(x.double())
    exact = unit @ unit.T  # (300, 300)

    pairs = ops.similarity_pairs(x, threshold=0.9)
    wanted = (exact >= 0.9).triu(1).nonzero()
    if not torch.equal(torch.stack([pairs.row, pairs.col], 1), wanted):
        raise ArithmeticError(f"similarity_pairs found {len(pairs)} pairs instead of {len(wanted)}")
    values, _ = ops.similarity_topk(x, 5)
    labels = ops.similarity_clusters(x, threshold=0.9)
    if not torch.equal(labels[pairs.row], labels[pairs.col]):
        raise ArithmeticError("similarity_clusters separates a pair that reaches the threshold")
    worst = max(
        _difference("similarity_matrix", ops.similarity_matrix(x), exact),
        _difference("similarity_pairs", pairs.value, exact[pairs.row, pairs.col]),
        _difference("similarity_topk", values, exact.fill_diagonal_(-1).topk(5).values),
    )
    return f"matrix, {len(pairs)} pairs, top 5, clusters: within {worst:.0e}"


def _splat2d() -> str:
    from sapwood import ops
    from sapwood.reference import splat2d as reference

    generator = torch.Generator().manual_seed(0)
    size = (50, 70)
    mu = torch.rand(1, 60, 2, generator=generator) * 60
    shape = torch.tensor([2.0, 0.7, 1.5]).expand(1, 60, 3)
    feat = torch.rand(1, 60, 3, generator=generator)
    grad = torch.randn(1, 3, *size, generator=generator)
    m, s, f = mu.double(), shape.double(), feat.double()
    cutoff = 40.0  # the weight there is 2e-9: rounding at the border of the cut does not show
    exact = reference.splat2d(m, s, f, None, *size, cutoff)
    slopes = reference.splat2d_backward(grad.double(), m, s, f, None, cutoff, True)
    found = ops.splat2d_backward(grad, mu, shape, feat, cutoff=cutoff, with_stats=True)
    worst = [_difference("splat2d", ops.splat2d(mu, shape, feat, size, cutoff=cutoff), exact)]
    for name, actual, expected in zip(found._fields, found, slopes, strict=True):
        if actual is None:
            raise ArithmeticError(f"splat2d_backward gave no {name}")
        worst.append(_difference(f"the gradient of splat2d in {name}", actual, expected))
    return f"60 Gaussians, image and gradients: within {max(worst):.0e}"


def _copruned_conv() -> str:
    from torch.nn import functional as F

    from sapwood import ops

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 20, 20, generator=generator)
    weight = torch.randn(32, 32, 3, 3, generator=generator)
    region = ops.tile_mask(torch.rand(2, 5, 5, generator=generator), keep=0.4)
    filters = torch.tensor([[True, False], [False, True]])
    on = region.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    on = on & filters.repeat_interleave(16, 1)[:, :, None, None]  # (2, 32, 20, 20)

    leaf, wide = weight.clone().requires_grad_(), weight.double().requires_grad_()
    y = ops.copruned_conv2d(x, leaf, None, region, filters, padding=1, tile=4)
    exact = torch.where(on, F.conv2d(x.double(), wide, padding=1), 0.0)
    (grad,) = torch.autograd.grad(y.square().sum(), leaf)
    (exact_grad,) = torch.autograd.grad(exact.square().sum(), wide)
    if y[~on].any():
        raise ArithmeticError("copruned_conv2d gives what is skipped a value")
    worst = max(
        _difference("copruned_conv2d", y.detach(), exact.detach()),
        _difference("the gradient of copruned_conv2d", grad, exact_grad),
    )
    return f"20 of 50 tiles, half of the filters, gradient: within {worst:.0e}"


def _pruning() -> str:
    from sapwood import pruning

    weights = [torch.linspace(-1, 1, 2000).view(50, 40), torch.linspace(-1, 1, 500).view(10, 50)]
    model = torch.nn.ParameterDict({f"w{i}": w for i, w in enumerate(weights)})
    masks = pruning.prune(model, 0.9, include=list(model))
    zeros = sum(int((weight == 0).sum()) for weight in model.values())
    if zeros != 2250 or masks.check(model):
        raise ArithmeticError(f"pruning 2500 weights by 90 % left {zeros} zeros instead of 2250")
    return "90 % of 2500 weights: exactly 2250 zeros"


PACKED_FORMATS = ("bitmap", "csr", "sell")

#: Family name -> check; it returns what was compared and raises when something is wrong.
FAMILIES: dict[str, Callable[[], str]] = {
    "masked_matmul": _masked_matmul,
    "logsemiring": _logsemiring,
    "similarity": _similarity,
    "splat2d": _splat2d,
    "copruned_conv": _copruned_conv,
    "pruning": _pruning,
}

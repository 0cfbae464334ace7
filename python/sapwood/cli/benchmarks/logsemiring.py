"""The logsemiring family against torch's broadcast forms and the product without a certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sapwood
from sapwood._measure import Call
from sapwood.cli.benchmarks import logsemiring_circuits as circuits
from sapwood.cli.benchmarks.runner import Unavailable, WrongResult

#: op -> (baseline, providers)
PROVIDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "log_matmul": ("broadcast", ("broadcast", "uncertified", "torch_semiring_einsum", "sapwood")),
    "log_matmul_grad": ("broadcast", ("broadcast", "uncertified", "sapwood")),
    "log_matmul_grad_grad": ("broadcast", ("broadcast", "sapwood")),
    "max_matmul": ("broadcast", ("broadcast", "sapwood")),
    "sample_matmul": ("broadcast", ("broadcast", "sapwood")),
    "segment_logsumexp": ("scatter", ("scatter", "sapwood")),
    "segment_logsumexp_grad_grad": ("scatter", ("scatter", "sapwood")),
    "segment_softmax": ("scatter", ("scatter", "sapwood")),
    "segment_max": ("scatter", ("scatter", "sapwood")),
    "log_scan": ("loop", ("loop", "sapwood")),
    "log_scan_argmax": ("loop", ("loop", "sapwood")),
    "log_circuit": ("loop", ("loop", "gather", "sapwood")),
}


@dataclass(frozen=True)
class LogsemiringCase:
    """One size: a batch of products (M, K) by (K, N), a chain, segments, or a circuit."""

    op: str
    batch: int
    m: int
    k: int
    n: int
    dtype: str = "float32"
    device: str = "cpu"
    scale: float = 1.0

    @property
    def name(self) -> str:
        sizes = f"{self.m}x{self.k}x{self.n}"
        scale = "" if self.scale == 1 else f" scale={self.scale:g}"
        return (f"{self.batch}x({sizes})" if self.batch > 1 else sizes) + scale

    @property
    def baseline(self) -> str:
        return PROVIDERS[self.op][0]

    @property
    def providers(self) -> tuple[str, ...]:
        every = PROVIDERS[self.op][1]
        if self.scale == 1:
            return every
        return tuple(p for p in every if p != "uncertified")  # wrong at large scales: gets no time

    def build(self, provider: str) -> Call:
        return _BUILDERS[self.op](self, provider)

    def check(self, provider: str, result: object) -> None:
        got = result if isinstance(result, tuple) else (result,)
        wide = LogsemiringCase(**{**vars(self), "dtype": "float64"})
        want = wide.build(self.baseline)() if self.op != "sample_matmul" else None
        if want is None:
            return _check_draws(self, got[0])
        for g, w in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
            if not torch.allclose(torch.as_tensor(g).double(), w.double(), rtol=1e-4, atol=1e-3):
                raise WrongResult(f"{self.op} {self.name}: {provider} differs from float64")
        return None

    def operands(self) -> tuple[Tensor, Tensor]:
        """a (B, M, K) and b (B, K, N), in float32 values whatever the dtype."""
        generator = torch.Generator().manual_seed(self.m + self.k + self.n)
        a = torch.randn(self.batch, self.m, self.k, generator=generator) * self.scale
        b = torch.randn(self.batch, self.k, self.n, generator=generator) * self.scale
        kind = getattr(torch, self.dtype)
        return a.to(self.device, kind), b.to(self.device, kind)


def _check_draws(case: LogsemiringCase, drawn: object) -> None:
    """Draws are in range; their distribution is a matter of the tests."""
    k = torch.as_tensor(drawn)
    if k.shape != (case.batch, case.m, case.n) or k.min() < 0 or k.max() >= case.k:
        raise WrongResult(f"sample_matmul {case.name}: draws out of range")


def cases(*, quick: bool, device: str = "cpu", dtype: str = "float32") -> Iterator[LogsemiringCase]:
    """The sweep: small batches, cubes, a scale that certifies little."""
    sizes = [(1, 64, 64, 64), (256, 10, 10, 19)]
    if not quick:
        sizes += [(1, 256, 256, 256), (32, 64, 64, 64), (10_000, 2, 2, 2)]
    for size in sizes:
        yield LogsemiringCase("log_matmul", *size, dtype, device)
        yield LogsemiringCase("log_matmul_grad", *size, dtype, device)
    yield LogsemiringCase("log_matmul", 1, 64, 64, 64, dtype, device, 100.0)
    yield LogsemiringCase("log_matmul_grad_grad", 1, 24, 24, 24, dtype, device)
    yield LogsemiringCase("max_matmul", 1, 64, 64, 64, dtype, device)
    yield LogsemiringCase("sample_matmul", 1, 16, 16, 16, dtype, device)
    yield LogsemiringCase("segment_logsumexp", 1, 20_000, 1, 300, dtype, device)
    yield LogsemiringCase("segment_logsumexp_grad_grad", 1, 20_000, 1, 300, dtype, device)
    yield LogsemiringCase("segment_softmax", 1, 20_000, 1, 300, dtype, device)
    yield LogsemiringCase("segment_max", 1, 20_000, 1, 300, dtype, device)
    yield LogsemiringCase("log_scan", 32, 64, 2, 2, dtype, device)
    yield LogsemiringCase("log_scan_argmax", 32, 64, 8, 8, dtype, device)
    for digits in (4,) if quick else (1, 4, 15):
        yield LogsemiringCase("log_circuit", 32, digits, 10, 2, dtype, device)


def _forward(case: LogsemiringCase, provider: str) -> Callable[[Tensor, Tensor], Tensor]:
    if provider == "broadcast":
        return lambda a, b: torch.logsumexp(a[..., None] + b[:, None], 2)
    if provider == "uncertified":
        return _uncertified
    if provider == "torch_semiring_einsum":
        return _semiring_einsum()
    return sapwood.ops.log_matmul


def _uncertified(a: Tensor, b: Tensor) -> Tensor:
    """The usual trick: wrong without a sign wherever the product underflows."""
    alpha, beta = a.amax(2, keepdim=True), b.amax(1, keepdim=True)
    return ((a - alpha).exp() @ (b - beta).exp()).log() + alpha + beta


def _semiring_einsum() -> Callable[[Tensor, Tensor], Tensor]:
    try:
        import torch_semiring_einsum as peer
    except ImportError as error:
        raise Unavailable(f"torch-semiring-einsum is not installed: {error}") from error
    equation = peer.compile_equation("bik,bkj->bij")
    return lambda a, b: peer.log_einsum(equation, a, b)


def _values(case: LogsemiringCase, provider: str) -> Call:
    a, b = case.operands()
    call = _forward(case, provider)
    return lambda: call(a, b)


def _gradients(case: LogsemiringCase, provider: str) -> Call:
    a, b = (t.requires_grad_() for t in case.operands())
    call = _forward(case, provider)

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(call(a, b).sum(), (a, b))

    return step


def _second(case: LogsemiringCase, provider: str) -> Call:
    a, b = (t.requires_grad_() for t in case.operands())
    call = _forward(case, provider)

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            first = torch.autograd.grad(call(a, b).sin().sum(), (a, b), create_graph=True)
            return torch.autograd.grad(sum((g * g).sum() for g in first), (a, b))  # type: ignore[arg-type]

    return step


def _maxima(case: LogsemiringCase, provider: str) -> Call:
    a, b = case.operands()
    if provider == "broadcast":
        return lambda: tuple((a[..., None] + b[:, None]).max(2))
    return lambda: tuple(sapwood.ops.max_matmul(a, b))


def _draws(case: LogsemiringCase, provider: str) -> Call:
    a, b = case.operands()
    if provider == "broadcast":

        def draw() -> Tensor:
            p = torch.softmax(a[..., None] + b[:, None], 2).mT.flatten(0, -2)
            return torch.multinomial(p, 1).view(case.batch, case.m, case.n)

        return draw
    return lambda: sapwood.ops.sample_matmul(a, b)


def _segments(case: LogsemiringCase, provider: str) -> Call:
    """m entries in n segments: forward and gradient, or the second derivative."""
    x = case.operands()[0].flatten()[: case.m].clone().requires_grad_()
    index = torch.arange(case.m, device=case.device) * 7919 % case.n
    plan = sapwood.ops.SegmentPlan(index, case.n)

    def scatter() -> Tensor:
        empty = x.new_full((case.n,), -torch.inf)
        top = empty.scatter_reduce(0, index, x.detach(), "amax")
        total = torch.zeros_like(empty).index_add(0, index, (x - top[index]).exp())
        return total.log() + top

    def values() -> Tensor:
        return scatter() if provider == "scatter" else sapwood.ops.segment_logsumexp(x, plan=plan)

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = values()
            return y.detach(), *torch.autograd.grad(y.sum(), x)

    def second() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            (first,) = torch.autograd.grad(values().sin().sum(), x, create_graph=True)
            return torch.autograd.grad((first * first).sum(), x)

    return second if case.op == "segment_logsumexp_grad_grad" else step


def _segment_forward(case: LogsemiringCase, provider: str) -> Call:
    """m entries in n segments: the largest of each and its place, or the softmax within each."""
    x = case.operands()[0].flatten()[: case.m].clone()
    index = torch.arange(case.m, device=case.device) * 7919 % case.n
    plan = sapwood.ops.SegmentPlan(index, case.n)
    empty = x.new_full((case.n,), -torch.inf)

    def softmax() -> Tensor:
        e = (x - empty.scatter_reduce(0, index, x, "amax")[index]).exp()
        return e / torch.zeros_like(empty).index_add(0, index, e)[index]

    def maxima() -> tuple[Tensor, Tensor]:
        top = empty.scatter_reduce(0, index, x, "amax")
        entry = torch.arange(case.m, device=case.device)
        first = torch.where(x == top[index], entry, case.m)
        none = torch.full((case.n,), case.m, device=case.device)
        return top, none.scatter_reduce(0, index, first, "amin")

    if case.op == "segment_max":
        if provider == "sapwood":
            return lambda: tuple(sapwood.ops.segment_max(x, plan=plan))
        return maxima
    if provider == "sapwood":
        return lambda: sapwood.ops.segment_softmax(x, plan=plan)
    return softmax


def _chain_operands(case: LogsemiringCase) -> tuple[Tensor, Tensor]:
    """A chain of m matrices k x k per batch entry, and its start."""
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(case.batch, case.m, case.k, case.k, generator=generator)
    t = t.to(case.device, getattr(torch, case.dtype))
    return t, t.new_zeros(case.batch, case.k)


def _best_path(case: LogsemiringCase, provider: str) -> Call:
    """The Viterbi path of each chain."""
    t, init = _chain_operands(case)
    if provider == "sapwood":
        return lambda: tuple(sapwood.ops.log_scan_argmax(t, init))

    def loop() -> tuple[Tensor, Tensor]:
        u, pointers = init, []
        for step in t.unbind(1):
            best = (u[:, :, None] + step).max(1)
            u = best.values
            pointers.append(best.indices)
        value, state = u.max(1)
        path = [state]
        for pointer in reversed(pointers):
            path.append(pointer.gather(1, path[-1][:, None])[:, 0])
        return value, torch.stack(path[::-1], 1)

    return loop


def _chain(case: LogsemiringCase, provider: str) -> Call:
    """The sum over all paths of each chain, forward and gradient."""
    t, init = _chain_operands(case)
    t.requires_grad_()

    def loop() -> Tensor:
        u = init
        for step in t.unbind(1):
            u = torch.logsumexp(u[:, :, None] + step, 1)
        return u

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = loop() if provider == "loop" else sapwood.ops.log_scan(t, init)
            return y.detach(), *torch.autograd.grad(y.sum(), t)

    return step


def _addition(case: LogsemiringCase, provider: str) -> Call:
    """Sums of two numbers of m digits in base k, forward and gradient."""
    generator = torch.Generator().manual_seed(case.m)
    x = torch.randn(2 * case.m, case.batch, case.k, generator=generator) * case.scale
    x = x.to(case.device, getattr(torch, case.dtype)).requires_grad_()
    sums = circuits.sums(case.batch, case.m, case.k, generator).to(case.device)
    call = circuits.PROVIDERS[provider](case.m, case.k)

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = call(x, sums)
            return y.detach(), *torch.autograd.grad(y.sum(), x)

    return step


_BUILDERS: dict[str, Callable[[LogsemiringCase, str], Call]] = {
    "log_matmul": _values,
    "log_matmul_grad": _gradients,
    "log_matmul_grad_grad": _second,
    "max_matmul": _maxima,
    "sample_matmul": _draws,
    "segment_logsumexp": _segments,
    "segment_logsumexp_grad_grad": _segments,
    "segment_softmax": _segment_forward,
    "segment_max": _segment_forward,
    "log_scan": _chain,
    "log_scan_argmax": _best_path,
    "log_circuit": _addition,
}

__all__ = ["PROVIDERS", "LogsemiringCase", "cases"]

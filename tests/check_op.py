"""The battery every op passes. A test file subclasses :class:`OpBattery` and gives samples.

A sample holds the arguments of the raw op in float32; the battery casts the floating ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sapwood import _register

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
GRADCHECK_LIMIT = 128  # input elements; a numerical Jacobian calls the op twice for each


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of the raw op."""

    id: str
    args: tuple[Any, ...]
    grad: tuple[int, ...] = ()  # positions of arguments that may require gradients
    tags: frozenset[str] = field(default_factory=frozenset)


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cast(args: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda a: a.to(dtype) if floating(a) else a, args)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def leaves(sample: Sample, dtype: torch.dtype, which: Sequence[int]) -> tuple[Any, ...]:
    args = cast(sample.args, dtype)
    return tuple(a.clone().requires_grad_(True) if i in which else a for i, a in enumerate(args))


def layouts_of(t: Tensor) -> dict[str, Tensor]:
    """The same values under other strides, offsets and overlaps."""
    gaps = torch.full([2 * s for s in t.shape], 7, dtype=t.dtype)
    gaps = gaps[tuple(slice(None, None, 2) for _ in t.shape)]
    gaps.copy_(t)
    shifted = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    shifted.copy_(t)
    found = {"gaps": gaps, "offset": shifted}
    if t.dim() >= 2:
        found["transposed"] = t.mT.contiguous().mT
    return found


def assert_grad_sparsity(actual: Tensor, expected: Tensor) -> None:
    """Per row the magnitude is within [0.5, 2] of the reference: no row is silently zero."""
    if actual.numel() == 0:
        return
    a, e = (
        actual.reshape(len(actual), -1).norm(dim=1),
        expected.reshape(len(actual), -1).norm(dim=1),
    )
    floor = 1e-4 * e.max()
    ok = (a.double() <= 2 * e.double() + floor) & (a.double() >= 0.5 * e.double() - floor)
    assert bool(ok.all()), f"row magnitudes differ: {a[~ok][:4]} against {e[~ok][:4]}"


class OpBattery:
    """What every op passes. Subclass it (or a richer battery below), name it Test*, set these."""

    name: ClassVar[str]  # op name of the schema
    samples: ClassVar[Sequence[Sample]]
    exact: ClassVar[bool] = False  # results are copies or integers: compare bit for bit
    #: factor c of the forward bound c * K * eps * sum|terms|; 4 leaves room for any summation order
    c: ClassVar[float] = 4.0
    #: False where the platform's GEMM does the sum: its order may follow alignment and threads
    bitwise: ClassVar[bool] = True
    #: the type that the result under test was summed in, or a wider one; known in ``magnitude``
    precision: torch.dtype = torch.float32

    def reduction(self, args: tuple[Any, ...]) -> int:
        """K of the error bound: the number of terms of one output."""
        raise NotImplementedError

    def magnitude(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """sum|terms| of each output, in float64."""
        absolute = tree_map(lambda a: a.abs() if floating(a) else a, cast(args, torch.float64))
        return outputs(self.reference(*absolute))

    def has_expected_layout(self, result: Tensor) -> bool:
        return result.is_contiguous()

    @property
    def spec(self) -> _register.OpSpec:
        return _register.declared()[self.name]

    @property
    def op(self) -> Callable[..., Any]:
        return getattr(torch.ops.sapwood, self.name).default

    @property
    def call(self) -> Callable[..., Any]:
        """What the package calls: the op, or its autograd.Function under a transform."""
        return _register.callable_for(self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return self.spec.reference

    # forward

    @pytest.mark.smoke
    @pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
    def test_forward(self, sample: Sample, dtype: torch.dtype) -> None:
        args = cast(sample.args, dtype)
        actual = outputs(self.op(*args))
        if self.exact:
            for a, e in zip(actual, outputs(self.reference(*args)), strict=True):
                assert a.dtype == e.dtype
                assert torch.equal(a, e)
            return
        wide = cast(args, torch.float64)
        self.precision = torch.float64 if dtype == torch.float64 else torch.float32
        eps = torch.finfo(self.precision).eps
        half = torch.finfo(dtype).eps if dtype in HALVES else 0.0
        bounds = self.magnitude(wide)
        for a, e, m in zip(actual, outputs(self.reference(*wide)), bounds, strict=True):
            assert a.dtype == dtype
            assert a.shape == e.shape
            assert self.has_expected_layout(a)
            tolerance = self.c * max(1, self.reduction(args)) * eps * m + half * e.abs()
            tiny = torch.finfo(dtype).tiny if dtype in HALVES else 0.0
            near = (a.double() - e).abs() <= tolerance + tiny
            assert bool((near | (a == e)).all())  # infinities are equal, and have no distance

    # opcheck

    def shortened(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with fewer steps where a tracer unrolls them one by one."""
        return args

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_opcheck(self, sample: Sample, dtype: torch.dtype) -> None:
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # The costly one, whose graph does not depend on the type: in both types for one sample.
        if self.spec.backward and (dtype == torch.float32 or "main" in sample.tags):
            utilities.append("test_aot_dispatch_dynamic")
        short = replace(sample, args=self.shortened(sample.args))
        args = leaves(short, dtype, sample.grad if self.spec.backward else ())
        torch.library.opcheck(self.op, args, test_utils=utilities)

    # layout

    def test_layouts(self, sample: Sample) -> None:
        expected = outputs(self.op(*sample.args))
        before = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, sample.args)
        for i, arg in enumerate(sample.args):
            if not floating(arg) and not (isinstance(arg, Tensor) and arg.dtype == torch.bool):
                continue  # index tensors are contiguous by the definition of their format
            for kind, same in layouts_of(arg).items():
                args = (*sample.args[:i], same, *sample.args[i + 1 :])
                for a, e in zip(outputs(self.op(*args)), expected, strict=True):
                    self.assert_same(a, e, f"argument {i} {kind}")
        for a, b in zip(sample.args, before, strict=True):
            assert not isinstance(a, Tensor) or torch.equal(a, b), "an input was written to"

    def assert_same(self, actual: Tensor, expected: Tensor, what: str) -> None:
        if self.bitwise:
            assert torch.equal(actual, expected), what
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=what)

    def _main_sample(self) -> Sample:
        return next(s for s in self.samples if "main" in s.tags)

    # determinism and threads

    def test_deterministic(self, threads: None) -> None:
        for sample in self.samples:
            torch.set_num_threads(1)
            expected = outputs(self.op(*sample.args))
            for count in (1, 2, 4, 7, *[2] * 16):
                torch.set_num_threads(count)
                for a, e in zip(outputs(self.op(*sample.args)), expected, strict=True):
                    self.assert_same(a, e, f"{sample.id} with {count} threads")

    def test_called_from_many_threads(self) -> None:
        sample = self._main_sample()
        expected = outputs(self.op(*sample.args))
        with ThreadPoolExecutor(16) as pool:
            for result in pool.map(lambda _: self.op(*sample.args), range(64)):
                for a, e in zip(outputs(result), expected, strict=True):
                    assert torch.equal(a, e)


class TraceableBattery(OpBattery):
    """For ops whose output sizes follow from the input sizes."""

    vmappable: ClassVar[Sequence[int]] = ()  # arguments that may be vmapped

    # torch.func

    def test_vmap(self, sample: Sample) -> None:
        for which in [*((i,) for i in self.vmappable), tuple(self.vmappable)]:
            which = tuple(i for i in which if isinstance(sample.args[i], Tensor))
            if not which:
                continue
            batched = [
                torch.stack([a, a * 2, a * 0.5], dim=-1) if i in which else a
                for i, a in enumerate(sample.args)
            ]
            dims = tuple(-1 if i in which else None for i in range(len(batched)))
            actual = outputs(torch.vmap(self.call, in_dims=dims)(*batched))
            for b in range(3):
                one = [a[..., b] if i in which else a for i, a in enumerate(batched)]
                for a, e in zip(actual, outputs(self.op(*one)), strict=True):
                    torch.testing.assert_close(a[b], e, rtol=1e-5, atol=1e-5)

    # compile, export, meta

    def test_meta(self, sample: Sample) -> None:
        meta = tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, sample.args)
        for a, e in zip(outputs(self.op(*meta)), outputs(self.op(*sample.args)), strict=True):
            assert a.shape == e.shape
            assert a.dtype == e.dtype
            assert a.stride() == e.stride()

    def test_compile(self) -> None:
        torch._dynamo.reset()
        sample = self._main_sample()
        compiled = torch.compile(self.call, fullgraph=True, dynamic=True, backend="aot_eager")
        for a, e in zip(
            outputs(compiled(*sample.args)), outputs(self.op(*sample.args)), strict=True
        ):
            assert torch.equal(a, e)

    @pytest.mark.slow
    def test_inductor(self) -> None:
        torch._dynamo.reset()
        sample = self._main_sample()
        compiled = torch.compile(self.call, fullgraph=True)
        for a, e in zip(
            outputs(compiled(*sample.args)), outputs(self.op(*sample.args)), strict=True
        ):
            torch.testing.assert_close(a, e)

    def test_export(self) -> None:
        sample = self._main_sample()
        tensors = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor)]
        op = self.op

        class Module(torch.nn.Module):
            def forward(self, *given: Tensor) -> Any:
                args = list(sample.args)
                for i, value in zip(tensors, given, strict=True):
                    args[i] = value
                return op(*args)

        exported = torch.export.export(Module(), tuple(sample.args[i] for i in tensors))
        result = exported.module()(*(sample.args[i] for i in tensors))
        for a, e in zip(outputs(result), outputs(self.op(*sample.args)), strict=True):
            assert torch.equal(a, e)


class DifferentiableBattery(TraceableBattery):
    """For ops with gradients."""

    # derivatives

    def test_gradcheck(self, grad_sample: Sample) -> None:
        for which in [*((i,) for i in grad_sample.grad), grad_sample.grad]:
            args = leaves(grad_sample, torch.float64, which)
            assert torch.autograd.gradcheck(self.call, args)

    def test_gradgradcheck(self, grad_sample: Sample) -> None:
        args = leaves(grad_sample, torch.float64, grad_sample.grad)
        assert torch.autograd.gradgradcheck(self.call, args)

    @pytest.mark.smoke
    def test_gradients_in_float32(self, grad_sample: Sample) -> None:
        single = leaves(grad_sample, torch.float32, grad_sample.grad)
        double = leaves(grad_sample, torch.float64, grad_sample.grad)
        results = []
        for function, args in ((self.call, single), (self.reference, double)):
            total = sum(
                (o * torch.cos(torch.arange(o.numel(), dtype=o.dtype)).view(o.shape)).sum()
                for o in outputs(function(*args))
                if o.numel()
            )
            wanted = [args[i] for i in grad_sample.grad]
            if not isinstance(total, Tensor):
                return
            results.append(torch.autograd.grad(total, wanted, allow_unused=True))
        for a, e in zip(*results, strict=True):
            if e is None:
                assert a is None or not a.any()
                continue
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)
            assert_grad_sparsity(a, e)

    def test_nested_vmap(self, grad_sample: Sample) -> None:
        i = self.vmappable[0]
        arg = grad_sample.args[i]
        stacked = torch.stack([torch.stack([arg, arg * 2]), torch.stack([arg * 3, arg * 4])])

        def one(x: Tensor) -> Any:
            return self.call(*grad_sample.args[:i], x, *grad_sample.args[i + 1 :])

        actual = outputs(torch.vmap(torch.vmap(one))(stacked))
        expected = outputs(one(arg * 4))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[1, 1], e, rtol=1e-5, atol=1e-5)

    def test_func_transforms(self, grad_sample: Sample) -> None:
        args = cast(grad_sample.args, torch.float64)
        for i in grad_sample.grad:

            def loss(value: Tensor, function: Callable[..., Any] = self.call, i: int = i) -> Tensor:
                result = function(*args[:i], value, *args[i + 1 :])
                return torch.stack([o.sin().sum() for o in outputs(result)]).sum()

            def plain(value: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
                return loss(value, self.reference)

            x = args[i]
            torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(plain)(x))
            batch = torch.stack([x, x * 0.5])
            torch.testing.assert_close(
                torch.vmap(torch.func.grad(loss))(batch), torch.vmap(torch.func.grad(plain))(batch)
            )
            if x.numel() <= 16:
                torch.testing.assert_close(
                    torch.func.jacrev(torch.func.jacrev(loss))(x),
                    torch.func.jacrev(torch.func.jacrev(plain))(x),
                )


def _sizes(sample: Sample) -> list[int]:
    return [sample.args[i].numel() for i in sample.grad]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Imported by each test module: parametrises the battery with the class's samples."""
    cls = metafunc.cls
    if cls is None or not issubclass(cls, OpBattery):
        return
    if "sample" in metafunc.fixturenames:
        metafunc.parametrize("sample", cls.samples, ids=[s.id for s in cls.samples])
    if "grad_sample" in metafunc.fixturenames:
        chosen = [
            s
            for s in cls.samples
            if s.grad and min(_sizes(s)) > 0 and sum(_sizes(s)) <= GRADCHECK_LIMIT
        ]
        metafunc.parametrize("grad_sample", chosen, ids=[s.id for s in chosen])

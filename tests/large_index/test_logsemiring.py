"""logsemiring: operands, segments, chains and results that reach beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.cli.benchmarks.logsemiring_circuits import addition
from sapwood.ops import CircuitSum, LogCircuit

from .memory import FAR, apart, behind, last_blocks, last_of, on_linux, reserved

pytestmark = on_linux

Call = Callable[[Any, Tensor, Tensor, Tensor], Any]
PRODUCTS: dict[str, Call] = {
    "log_matmul": lambda ops, g, a, b: ops.log_matmul(a, b, False),
    "log_matmul exact": lambda ops, g, a, b: ops.log_matmul(a, b, True),
    "backward": lambda ops, g, a, b: ops.log_matmul_backward(g, a, b, False, True, True),
    "backward exact": lambda ops, g, a, b: ops.log_matmul_backward(g, a, b, True, True, True),
    "double backward": lambda ops, g, a, b: ops.log_matmul_double_backward(g, a, b, a, b),
    "max_matmul": lambda ops, g, a, b: ops.max_matmul(a, b),
    "sample_matmul": lambda ops, g, a, b: ops.sample_matmul(a, b, 3, 7),
}


def same(found: Any, wanted: Any) -> None:
    for x, y in zip(tensors(found), tensors(wanted), strict=True):
        assert torch.equal(x, y)


def tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


# Operands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (3, 9, 12, 20)], ids=["small", "certified"])
def test_operands_far_apart(ops: Any, name: str, shape: tuple[int, int, int, int]) -> None:
    """Batches, rows and columns, each in turn, spread over more than 2^31 elements."""
    batch, m, k, n = shape
    grad, a, b = torch.randn(batch, m, n), torch.randn(batch, m, k), torch.randn(batch, k, n)
    call = PRODUCTS[name]
    wanted = call(ops, grad, a, b)
    for dim in range(3):
        same(call(ops, *(apart(t, dim) for t in (grad, a, b))), wanted)


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("maximum", [False, True], ids=["log", "max"])
def test_chains_far_apart(ops: Any, dim: int, maximum: bool) -> None:
    t, init = torch.randn(3, 4, 5, 5), torch.randn(3, 2, 5)
    far = apart(t, dim)
    states = ops.log_scan(t, init, maximum)
    assert torch.equal(ops.log_scan(far, init, maximum), states)
    grad = torch.randn(states.shape, dtype=torch.float64)
    same(
        ops.log_scan_backward(grad, far, states, maximum),
        ops.log_scan_backward(grad, t, states, maximum),
    )


def test_path_through_a_large_step(ops: Any) -> None:
    """One step between 46 400 states; a path reads one column of it."""
    k = 46_400
    t = reserved(1, 1, k, k, dtype=torch.float64)
    t[0, 0, k - 2, k - 1] = 5
    final = torch.zeros(1, k, dtype=torch.float64)
    final[0, k - 1] = 1
    states = torch.zeros(1, 2, k, dtype=torch.float64)
    path = ops.log_scan_path(t, states, final, 1, 7, True)
    assert path.tolist() == [[[k - 2, k - 1]]]


@pytest.mark.slow
def test_maxima_of_2_31_terms() -> None:
    m, k = 2**15 + 3, 2**16
    a = reserved(1, m, k)
    a[0, -1, -1] = 3
    values, indices = torch.ops.sapwood.max_matmul(a, torch.zeros(1, k, 1))
    assert values[0, :, 0].nonzero().tolist() == [[m - 1]]
    assert float(values[0, -1, 0]) == 3
    assert int(indices[0, -1, 0]) == k - 1


# Results on the CPU: 8 GiB, written ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("room")
def test_gradient_of_2_31_terms() -> None:
    """The terms are views of a row; their gradients are not."""
    m, k = 2**15 + 1, 2**16
    a = torch.randn(k).expand(1, m, k)
    grad = torch.randn(1, m, 1)
    da, _ = torch.ops.sapwood.log_matmul_backward(grad, a, torch.zeros(1, k, 1), False, True, False)
    for rows in (slice(0, 2), slice(-2, None)):
        wanted = grad[0, rows].double() * a[0, 0].double().softmax(0)
        torch.testing.assert_close(da[0, rows].double(), wanted, rtol=2e-5, atol=1e-9)


@pytest.mark.slow
def test_states_of_2_31_entries() -> None:
    """The gradients of a chain's states lie behind 2^31 zeros, as do those states."""
    steps, rows, k = 2**11, 2**15 + 32, 32
    states = reserved(1, steps + 1, rows, k, dtype=torch.float64)
    grad = reserved(1, steps + 1, rows, k, dtype=torch.float64)
    states[0, -2:, -3:] = torch.randn(2, 3, k, dtype=torch.float64)
    grad[0, -1, -3:] = torch.randn(3, k, dtype=torch.float64)
    t = torch.randn(k, k).expand(1, steps, k, k)
    dt, _ = torch.ops.sapwood.log_scan_backward(grad, t, states, False)
    near = [x[:, -2:, -3:].contiguous() for x in (grad, states)]
    wanted, _ = torch.ops.sapwood.log_scan_backward(near[0], t[:, :1], near[1], False)
    torch.testing.assert_close(dt[:, -1:], wanted)


# Circuits -----------------------------------------------------------------------------------------


def test_rows_of_circuits_far_apart(ops: Any) -> None:
    """Blocks, rows and inputs, each in turn, spread over more than 2^31 elements."""
    circuit = addition(2)
    x, grad = torch.randn(4, 3, 10), torch.randn(3, 1)
    seen = torch.tensor([[3, 9, 0], [0, 0, 1], [10, 4, 0]])
    rest = (circuit.tables(x.device), circuit.counts)
    values = ops.log_circuit(x, seen, *rest)
    slopes = ops.log_circuit_backward(grad, x, seen, *rest)
    for dim in range(3):
        far, far_seen, far_grad = apart(x, dim), apart(seen, dim % 2), apart(grad, 0)
        assert torch.equal(ops.log_circuit(far, far_seen, *rest), values)
        assert torch.equal(ops.log_circuit_backward(far_grad, far, far_seen, *rest), slopes)


def ends_of(columns: int, results: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Tables and counts of a sum of the first and the last of many inputs."""
    circuit = LogCircuit(columns, [CircuitSum([[(0,), (columns - 1,)]])], results)
    return circuit.tables(torch.device("cpu")), circuit.counts


def test_last_rows_of_2_31_results_of_circuits(emulated: Any) -> None:
    """The last block walks every 2048th row, the last one among them."""
    columns, rows = 2**17 + 16, 8 * 2048
    rest = (None, *ends_of(columns, range(1, columns + 1)))
    near, near_grad = torch.randn(1, columns), torch.randn(1, columns)
    x, grad = last_of(near, rows)[None], last_of(near_grad, rows)
    with last_blocks():
        values = emulated.log_circuit(x, *rest)
        slopes = emulated.log_circuit_backward(grad, x, *rest)
    assert min(values.numel(), slopes.numel()) > FAR
    assert torch.equal(values[-1:], emulated.log_circuit(near[None], *rest))
    assert torch.equal(slopes[:, -1:], emulated.log_circuit_backward(near_grad, near[None], *rest))


@pytest.mark.slow
@pytest.mark.usefixtures("room")
def test_gradients_of_2_31_inputs_of_circuits() -> None:
    columns, rows = 4096, 2**19 + 1
    rest = (None, *ends_of(columns, [columns]))
    near, grad = torch.randn(columns), last_of(torch.tensor([[2.0]]), rows)
    slopes = torch.ops.sapwood.log_circuit_backward(grad, near.expand(1, rows, columns), *rest)
    wanted = 2 * near[[0, -1]].softmax(0)
    torch.testing.assert_close(slopes[0, -1, [0, -1]], wanted)
    assert slopes[0, -1].count_nonzero() == 2
    assert not slopes[0, :-1, -1].any()


# Segments -----------------------------------------------------------------------------------------

PTR = torch.tensor([0, 2, 2, 6])


def segment_calls(ops: Any, x: Tensor, ptr: Tensor, grad: Tensor, tangent: Tensor) -> list[Tensor]:
    """The results of all ops over segments: (O, S, I) first, then (O, n, I)."""
    values, indices = ops.segment_max(x, ptr, None)
    means, second = ops.segment_logsumexp_double_backward(grad, x, tangent, ptr, None)
    return [
        ops.segment_logsumexp(x, ptr, None),
        means,
        values,
        indices,
        ops.segment_logsumexp_backward(grad, x, ptr, None),
        second,
        ops.segment_softmax(x, ptr, None),
    ]


@pytest.mark.parametrize("inner", [1, 3])
def test_segments_behind_2_31_entries(emulated: Any, inner: int) -> None:
    x, tangent, grad = torch.randn(6, inner), torch.randn(6, inner), torch.randn(1, 3, inner)
    wanted = segment_calls(emulated, x[None], PTR, grad, tangent[None])
    far, far_tangent = behind(x)[None], behind(tangent)[None]
    before = far.shape[1] - 6
    found = segment_calls(emulated, far, PTR + before, grad, far_tangent)
    wanted[3] = wanted[3] + before * (wanted[3] >= 0)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got[:, -want.shape[1] :], want)


def test_segments_of_an_order_of_2_31_entries(emulated: Any) -> None:
    x, order = torch.randn(1, 6, 1), torch.tensor([3, 0, 5, 1, 2, 4])
    far = behind(x[0])[None]
    before = far.shape[1] - 6
    far_order = behind(order + before)
    for name in ("segment_logsumexp", "segment_softmax"):
        op = getattr(emulated, name)
        want = op(x, PTR, order)
        assert torch.equal(op(far, PTR + before, far_order)[:, -want.shape[1] :], want)


def test_the_last_segments_of_2_31(emulated: Any) -> None:
    """Results of more than 2^31 segments, one for each entry; the last blocks alone run."""
    count, inner, of_block = FAR // 64 + 1, 64, 8
    near = [torch.randn(1, inner) for _ in range(3)]
    ptr = torch.arange(count + 1)
    x, grad, tangent = (last_of(t, count)[None] for t in near)
    with last_blocks():
        found = segment_calls(emulated, x, ptr, grad, tangent)
    x, grad, tangent = (t[None] for t in near)
    wanted = segment_calls(emulated, x, ptr[:2], grad, tangent)
    wanted[3] = wanted[3] + count - 1
    for got, want in zip(found, wanted, strict=True):
        assert got.numel() > FAR
        assert torch.equal(got[:, -1, -of_block:], want[:, -1, -of_block:])


def long_segments() -> tuple[Tensor, Tensor, Tensor]:
    """x (1, n, 1) of 2^31 zeros and a few numbers, the ends of its segments, and those numbers."""
    near = torch.tensor([1.0, 3, 2, 6, 5, 4])
    ptr = torch.cat([torch.arange(0, FAR + 1, 2**16), torch.tensor([FAR + 2, FAR + 6])])
    x = reserved(1, FAR + 6, 1)
    x[0, FAR:, 0] = near
    return x, ptr, near


@pytest.mark.slow
def test_values_of_the_last_segments() -> None:
    x, ptr, near = long_segments()
    values, indices = torch.ops.sapwood.segment_max(x, ptr, None)
    assert values[0, -3:, 0].tolist() == [0, 3, 6]
    assert indices[0, -3:, 0].tolist() == [FAR - 2**16, FAR + 1, FAR + 3]
    sums = torch.ops.sapwood.segment_logsumexp(x, ptr, None)[0, :, 0]
    wanted = torch.stack([near[:2].logsumexp(0), near[2:].logsumexp(0)])
    torch.testing.assert_close(sums[-2:], wanted)
    torch.testing.assert_close(sums[:-2], torch.full((2**15,), 2.0**16).log())


@pytest.mark.slow
@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("name", ["softmax", "backward", "double_backward"])
def test_weights_of_the_last_segments(name: str) -> None:
    x, ptr, near = long_segments()
    grad = reserved(1, len(ptr) - 1, 1)
    grad[0, -2:, 0] = torch.tensor([2.0, -3.0])
    scale = torch.tensor([2.0, 2, -3, -3, -3, -3]).double()
    weights = torch.cat([near[:2].double().softmax(0), near[2:].double().softmax(0)])
    if name == "softmax":
        found = torch.ops.sapwood.segment_softmax(x, ptr, None)
    elif name == "backward":
        weights = scale * weights
        found = torch.ops.sapwood.segment_logsumexp_backward(grad, x, ptr, None)
    else:
        means, found = torch.ops.sapwood.segment_logsumexp_double_backward(grad, x, x, ptr, None)
        parts = (weights * near).split([2, 4])
        mean = torch.stack([p.sum() for p in parts])
        torch.testing.assert_close(means[0, -2:, 0].double(), mean, rtol=1e-5, atol=1e-6)
        weights = scale * weights * (near - mean.repeat_interleave(torch.tensor([2, 4])))
    torch.testing.assert_close(found[0, FAR:, 0].double(), weights, rtol=1e-5, atol=1e-6)


# Results of emulated kernels: their last blocks alone run -----------------------------------------


@pytest.mark.parametrize("name", PRODUCTS)
def test_last_tile_of_2_31_results(emulated: Any, name: str) -> None:
    """Batches of 192 x 192 results, and of as many gradients of terms."""
    side, last = 192, 16
    grad = torch.zeros(1, side, side)
    grad[:, -last:, -last:] = torch.randn(last, last)
    a, b = torch.randn(1, side, side), torch.randn(1, side, side)
    call, rows, cols, batch = PRODUCTS[name], last, last, FAR // side**2 + 1
    if name == "max_matmul":  # a block has 256 results, row after row
        rows = 1
    if name == "sample_matmul":  # three of each, of which the numbers depend on the batch
        rows, cols, batch = 1, 1, batch // 3 + 1
        a[:, -1, :-1] = b[:, :-1, -1] = -torch.inf
    with last_blocks():
        found = call(emulated, *(t.expand(batch, -1, -1) for t in (grad, a, b)))
    wanted = call(emulated, grad[:, -last:, -last:], a[:, -last:], b[:, :, -last:])
    for got, want in zip(tensors(found), tensors(wanted), strict=True):
        assert got.numel() > FAR
        ends = [t.flatten(0, -3)[-1, -rows:, -cols:] for t in (got, want)]
        assert torch.equal(*ends)


def test_last_chain_of_2_31_states(emulated: Any) -> None:
    batch, steps, rows, k = 513, 63, 2**15, 2
    t, init = torch.randn(1, steps, k, k), torch.randn(1, rows, k)
    with last_blocks():
        states = emulated.log_scan(t.expand(batch, -1, -1, -1), init.expand(batch, -1, -1), False)
    assert states.numel() > FAR
    near = emulated.log_scan(t, init, False)
    assert torch.equal(states[-1], near[0])


def test_gradients_of_the_last_chain_of_2_31_states(emulated: Any) -> None:
    batch, steps, rows, k = 513, 63, 2**15, 2
    t = torch.randn(1, steps, k, k)
    near = [torch.randn(1, steps + 1, rows, k, dtype=torch.float64) for _ in range(2)]
    grad, states = (last_of(x, batch) for x in near)
    with last_blocks():
        dt, dinit = emulated.log_scan_backward(grad, t.expand(batch, -1, -1, -1), states, False)
    wanted = emulated.log_scan_backward(near[0], t, near[1], False)
    same((dt[-1:], dinit[-1:]), wanted)


def test_gradients_of_the_last_chain_of_2_31_terms(emulated: Any) -> None:
    batch, steps, k = 2**15 + 1, 16, 64
    t = torch.randn(1, steps, k, k)
    near = [torch.randn(1, steps + 1, 1, k, dtype=torch.float64) for _ in range(2)]
    grad, states = (last_of(x, batch) for x in near)
    with last_blocks():
        dt, dinit = emulated.log_scan_backward(grad, last_of(t, batch), states, True)
    assert dt.numel() > FAR
    wanted = emulated.log_scan_backward(near[0], t, near[1], True)
    same((dt[-1:], dinit[-1:]), wanted)


@pytest.mark.parametrize(("rows", "k"), [(1, 2**16), (2**31, 2)], ids=["states", "rows"])
def test_steps_that_cannot_be_numbered_are_refused(emulated: Any, rows: int, k: int) -> None:
    """Views of stride 0: refused before anything of their size is made."""
    t = torch.zeros(1, 1, 1, 1).expand(1, 1, k, k)
    states = torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(1, 2, rows, k)
    what = rf"steps of fewer than 2\^32 entries, got {k} states and {rows} rows"
    with pytest.raises(RuntimeError, match=f"log_scan_backward: t and states must have {what}"):
        emulated.log_scan_backward(states, t, states, False)

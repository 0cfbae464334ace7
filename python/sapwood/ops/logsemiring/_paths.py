"""Paths through a chain: the best one, and exact draws."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapwood import _backend, _check
from sapwood.ops.logsemiring import _sequence_specs
from sapwood.ops.logsemiring._matmul import floats, max_matmul
from sapwood.ops.logsemiring._sequence import Chain, checked
from sapwood.reference import logsemiring as reference

_BACKENDS = (
    _backend.native("log_scan_path", _sequence_specs.log_scan_path),
    _backend.Backend("reference", lambda *_: None, reference.log_scan_path),
)


class BestPath(NamedTuple):
    """What :func:`log_scan_argmax` returns.

    Example:
        >>> import torch
        >>> from sapwood.ops import log_scan_argmax
        >>> steps = torch.tensor([[[0.0, 3.0], [1.0, 0.0]]])
        >>> best = log_scan_argmax(steps, torch.zeros(2))
        >>> best.value, best.path
        (tensor(3.), tensor([0, 1]))

    Args:
        value: (*), the largest weight of a path.
        path: (*, L + 1) int64, its states; -1 where no path has weight.
    """

    value: Tensor
    path: Tensor


class _Ended(NamedTuple):
    """A chain with one row, its float64 states, and what is added at the end."""

    chain: Chain
    states: Tensor  # (B, L + 1, 1, k)
    final: Tensor  # (B, k) float64

    def walk(self, op: str, count: int, seed: int, maximum: bool) -> Tensor:  # (S, B, L + 1)
        args = (self.chain.t.detach(), self.states.detach().squeeze(2), self.final.detach())
        chosen = _backend.choose(op, _BACKENDS, *args, count, seed, maximum)
        path: Tensor = chosen.run(*args, count, seed, maximum)
        return path


def _ended(op: str, t: Tensor, init: Tensor, final: Tensor | None, maximum: bool) -> _Ended:
    _check.tensor(op, "init", init)
    if final is None:
        chain = checked(op, t, init)
        end = chain.init.new_zeros(chain.init.shape[0], chain.init.shape[2])
    else:
        t, init, final = floats(op, t=t, init=init, final=final)
        chain = checked(op, t, init)
        shape = (*chain.batch, chain.t.shape[-1])
        try:
            end = final.expand(shape).reshape(chain.init.shape[0], shape[-1])
        except RuntimeError:
            want = f"broadcast to {tuple(shape)}"
            _check.fail(ValueError, op, "final", want, tuple(final.shape))
    return _Ended(chain, chain.states(op, maximum), end.double())


def _explainer(op: str) -> Any:
    def explain(t: Tensor, *_: Any, **__: Any) -> _backend.Explanation:
        return _backend.Explanation(op, _backend.candidates(_BACKENDS, t))

    return explain


@_backend.explainable(_explainer("log_scan_argmax"))
def log_scan_argmax(t: Tensor, init: Tensor, final: Tensor | None = None) -> BestPath:
    """The path of largest weight through a chain: the Viterbi algorithm.

    Example::

        steps, start = torch.randn(32, 100, 4, 4), torch.randn(32, 4)
        value, path = sapwood.ops.log_scan_argmax(steps, start)   # (32,), (32, 101)

    A path s_0 ... s_L weighs init[s_0] + sum_l t[l, s_l, s_{l+1}] + final[s_L].

    Args:
        t: (..., L, k, k) floating point; t[..., l, i, j] leads from state i to state j.
        init: (..., k), the weight of each first state.
        final: (..., k), the weight of each last state; default 0.

    Returns:
        ``value`` (...), whose gradient is 1 along the path, and ``path`` (..., L + 1) int64. Among
        equal paths the lowest last state, then the lowest one before; -1 where no path has weight.

    Raises:
        ValueError: for matrices that are not square, an ``init`` or ``final`` of another size.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.

    References:
        Viterbi, Error bounds for convolutional codes and an asymptotically optimum decoding
        algorithm, IEEE Transactions on Information Theory 1967.
    """
    ended = _ended("log_scan_argmax", t, init, final, maximum=True)
    path = ended.walk("log_scan_argmax", 1, 0, maximum=True)[0]
    last = ended.states[:, -1]  # (B, 1, k)
    value = max_matmul(last, ended.final[:, :, None]).values.to(ended.chain.t.dtype)
    batch = ended.chain.batch
    return BestPath(value.reshape(batch), path.reshape(*batch, path.shape[-1]))


@_backend.explainable(_explainer("log_scan_sample"))
def log_scan_sample(
    t: Tensor,
    init: Tensor,
    final: Tensor | None = None,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws paths through a chain with probability proportional to the exponential of their weight.

    Example::

        steps, start = torch.randn(32, 100, 4, 4), torch.randn(32, 4)
        paths = sapwood.ops.log_scan_sample(steps, start, num_samples=10)   # (10, 32, 101)

    Exact: the states are summed forwards and drawn backwards. The draws depend on the generator's
    state only, not on the number of threads.

    Args:
        t: (..., L, k, k) floating point; t[..., l, i, j] leads from state i to state j.
        init: (..., k), the weight of each first state.
        final: (..., k), the weight of each last state; default 0.
        num_samples: how many independent paths; None for one without a dimension of its own.
        generator: a CPU generator for the seed; default torch's.

    Returns:
        int64 (..., L + 1), or (num_samples, ..., L + 1); -1 where no path has weight. No gradient.

    Raises:
        ValueError: for matrices that are not square, an ``init`` or ``final`` of another size or a
            negative ``num_samples``.
        TypeError: for non-tensors and dtypes that are not floating point.
        RuntimeError: for tensors on different devices.

    References:
        Forward filtering, backward sampling: Carter and Kohn, Biometrika 1994; the noise as in
        :func:`sample_matmul`.
    """
    op = "log_scan_sample"
    if num_samples is not None and num_samples < 0:
        _check.fail(ValueError, op, "num_samples", "be at least 0", num_samples)
    with torch.no_grad():
        ended = _ended(op, t, init, final, maximum=False)
        seed = int(torch.randint(2**62, (), generator=generator))
        count = 1 if num_samples is None else num_samples
        paths = ended.walk(op, count, seed, maximum=False)
    paths = paths.reshape(count, *ended.chain.batch, paths.shape[-1])
    return paths[0] if num_samples is None else paths

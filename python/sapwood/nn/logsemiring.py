"""Modules over the log semiring: a stochastic matrix as a layer, and a hidden Markov model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.ops import (
    log_matmul,
    log_normalize,
    log_scan,
    log_scan_argmax,
    log_scan_sample,
    logsumexp,
)


class LogLinear(nn.Module):
    """Log-probabilities through a stochastic matrix: ``log sum_i exp(x[i]) p(j | i)``.

    Example::

        layer = sapwood.nn.LogLinear(8, 3)
        y = layer(torch.log_softmax(torch.randn(32, 8), -1))   # (32, 3), sums to one as x does

    The parameter ``logits`` (K, N) is normalised by rows to log p(j | i).

    Args:
        in_features: K.
        out_features: N.
        device: of the logits.
        dtype: of the logits.
    """

    def __init__(
        self, in_features: int, out_features: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                _check.fail(ValueError, "LogLinear", name, "be at least 1", value)
        self.in_features, self.out_features = in_features, out_features
        self.logits = nn.Parameter(
            torch.empty(in_features, out_features, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal logits."""
        nn.init.normal_(self.logits)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        _check.last_dim("LogLinear", "x", x, self.in_features, "in_features")
        return log_matmul(x, log_normalize(self.logits))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class States(NamedTuple):
    """The most probable states of :meth:`HMM.decode`: log-probability (B,) and path (B, L)."""

    log_prob: Tensor
    path: Tensor


class HMM(nn.Module):
    """A hidden Markov model of sequences of symbols.

    Example::

        model = sapwood.nn.HMM(num_states=4, num_symbols=6)
        sequences = torch.randint(6, (32, 50))
        loss = -model(sequences).mean()
        loss.backward()
        log_prob, path = model.decode(sequences)   # (32,), (32, 50)

    The parameters are logits, normalised by rows: ``start`` (k,) of the first state, ``transition``
    (k, k) of the next state given this one, ``emission`` (k, V) of the symbol given the state. One
    that is -inf forbids a transition or a symbol, exactly, and stays so in training.

    Args:
        num_states: k.
        num_symbols: V.
        device: of the logits.
        dtype: of the logits.

    References:
        Rabiner, A tutorial on hidden Markov models, Proceedings of the IEEE 1989.
    """

    def __init__(
        self, num_states: int, num_symbols: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        for name, value in (("num_states", num_states), ("num_symbols", num_symbols)):
            if value < 1:
                _check.fail(ValueError, "HMM", name, "be at least 1", value)
        self.num_states, self.num_symbols = num_states, num_symbols
        kind = {"device": device, "dtype": dtype}
        self.start = nn.Parameter(torch.empty(num_states, **kind))
        self.transition = nn.Parameter(torch.empty(num_states, num_states, **kind))
        self.emission = nn.Parameter(torch.empty(num_states, num_symbols, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal logits."""
        for logits in self.parameters():
            nn.init.normal_(logits)

    def forward(self, symbols: Tensor) -> Tensor:
        """The log-probability of each sequence.

        Args:
            symbols: (B, L) int64 in [0, V), L >= 1.

        Returns:
            (B,).
        """
        steps, first = self._chain(symbols)
        return logsumexp(log_scan(steps, first), -1)

    def decode(self, symbols: Tensor) -> States:
        """The most probable states of each sequence, and the log-probability of both together."""
        value, path = log_scan_argmax(*self._chain(symbols))
        return States(value, path)

    def sample_states(
        self,
        symbols: Tensor,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """States drawn from their distribution given the symbols: (B, L) or (num_samples, B, L)."""
        steps, first = self._chain(symbols)
        return log_scan_sample(steps, first, num_samples=num_samples, generator=generator)

    def _chain(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Steps (B, L - 1, k, k) with the symbol they lead to, and the first state (B, k)."""
        _check.tensor("HMM", "symbols", symbols)
        _check.dtype("HMM", "symbols", symbols, (torch.int64,))
        _check.dims("HMM", "symbols", symbols, 2)
        if symbols.shape[1] == 0:
            _check.fail(ValueError, "HMM", "symbols", "have L >= 1", tuple(symbols.shape))
        emitted = log_normalize(self.emission).t()[symbols]  # (B, L, k)
        first = log_normalize(self.start) + emitted[:, 0]
        return log_normalize(self.transition) + emitted[:, 1:, None, :], first

    def extra_repr(self) -> str:
        return f"num_states={self.num_states}, num_symbols={self.num_symbols}"

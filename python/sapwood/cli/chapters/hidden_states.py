"""Chapter: the hidden states of a sequence, by sums over all paths that never underflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sapwood
from sapwood._measure import interleave
from sapwood.cli.chapters import ChapterResult, Context
from sapwood.report import plots
from sapwood.report.page import Chapter, Figure, Section, Stat, Table

TITLE = "Hidden states"
OURS, LOOP = "log_scan", "loop of torch.logsumexp"
SHOWN = 300  # rolls in the picture


@dataclass(frozen=True)
class Measured:
    """Everything the chapter reports on."""

    rolls: int
    log_likelihood: float
    product: float  # the same likelihood by products of probabilities in float32
    decoded: float  # share of the rolls whose die the best path names
    states: Tensor  # (SHOWN,) the dice that rolled
    best: Tensor  # (SHOWN,) the dice of the best path
    loaded: Tensor  # (SHOWN,) share of the drawn paths with the loaded die
    draws: int
    seconds: dict[str, float]

    @property
    def speedup(self) -> float:
        return self.seconds[LOOP] / self.seconds[OURS]


def run(context: Context) -> ChapterResult:
    """Rolls a fair and a loaded die, and finds out which; some seconds."""
    m = _measure(context)
    return ChapterResult(
        page=Chapter(TITLE, _lead(m), [_section(m)]),
        headline=f"Summed over all ways to roll {m.rolls} dice {m.speedup:.0f}x as fast as by a "
        f"loop, and named the die of {100 * m.decoded:.0f} % of the rolls.",
        stats=[
            Stat(f"{100 * m.decoded:.0f} %", "of the rolls assigned to the right die"),
            Stat(f"{m.speedup:.0f}x", "as fast as a loop of torch.logsumexp, gradient included"),
        ],
        summary=_table(m),
        remarks=[
            f"The likelihood is exp({m.log_likelihood:.0f}); as a product in float32 it is "
            f"{m.product:g}."
        ],
        facts=[("Chain", f"{m.rolls} rolls, 2 states, {m.draws} paths drawn")],
        data=_data(m),
    )


def _model() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the first die (2,), of the next one (2, 2) and of its faces (2, 6)."""
    start = torch.tensor([0.5, 0.5])
    change = torch.tensor([[0.98, 0.02], [0.04, 0.96]])
    faces = torch.tensor([[1 / 6] * 6, [0.1] * 5 + [0.5]])
    return start.log(), change.log(), faces.log()


def _roll(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which die rolled, and what it showed, both (count,)."""
    generator = torch.Generator().manual_seed(seed)
    start, change, faces = (p.exp() for p in _model())
    states = [int(torch.multinomial(start, 1, generator=generator))]
    while len(states) < count:
        states.append(int(torch.multinomial(change[states[-1]], 1, generator=generator)))
    dice = torch.tensor(states)
    shown = torch.multinomial(faces[dice], 1, generator=generator)[:, 0]
    return dice, shown


def _chain(shown: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (L - 1, 2, 2) that include the face they lead to, and the first state (2,)."""
    start, change, faces = _model()
    emitted = faces.t()[shown]  # (L, 2)
    return change + emitted[1:, None], start + emitted[0]


def _measure(context: Context) -> Measured:
    rolls, draws = (1000, 200) if context.quick else (3000, 1000)
    dice, shown = _roll(rolls, context.seed)
    steps, first = _chain(shown)
    total = sapwood.ops.logsumexp(sapwood.ops.log_scan(steps, first).double(), 0)
    best = sapwood.ops.log_scan_argmax(steps, first).path
    generator = torch.Generator().manual_seed(context.seed)
    drawn = sapwood.ops.log_scan_sample(steps, first, num_samples=draws, generator=generator)
    times = interleave(
        {
            OURS: lambda: _gradient(steps, first, _scan),
            LOOP: lambda: _gradient(steps, first, _loop),
        },
        rounds=3 if context.quick else 7,
        seconds=0.0,
    )
    return Measured(
        rolls=rolls,
        log_likelihood=float(total),
        product=float(_product(steps, first)),
        decoded=float((best == dice).double().mean()),
        states=dice[:SHOWN],
        best=best[:SHOWN],
        loaded=drawn[:, :SHOWN].double().mean(0),
        draws=draws,
        seconds={name: min(samples) for name, samples in times.items()},
    )


def _scan(steps: Tensor, first: Tensor) -> Tensor:
    return sapwood.ops.log_scan(steps, first)


def _loop(steps: Tensor, first: Tensor) -> Tensor:
    u = first
    for step in steps:
        u = torch.logsumexp(u[:, None] + step, 0)
    return u


def _gradient(steps: Tensor, first: Tensor, scan: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The expected number of uses of every step: the gradient of the log-likelihood."""
    leaf = steps.detach().requires_grad_()
    (uses,) = torch.autograd.grad(sapwood.ops.logsumexp(scan(leaf, first), 0), leaf)
    return uses


def _product(steps: Tensor, first: Tensor) -> Tensor:
    p = first.exp()
    for step in steps:
        p = p @ step.exp()
    return p.sum()


def _lead(m: Measured) -> str:
    return (
        f"Somebody rolls a die {m.rolls} times and sometimes swaps it for a loaded one. Which die "
        f"rolled when? There are 2^{m.rolls} possible answers; the log semiring adds up all of "
        "them, finds the best and draws from them, each in one pass."
    )


def _section(m: Measured) -> Section:
    return Section(
        "A fair and a loaded die",
        [
            f"The probability of these rolls is exp({m.log_likelihood:.0f}). Multiplied out in "
            f"float32 it is {m.product:g}, and no gradient comes back from there; the sum of "
            "logarithms is exact, and its gradient says how often each swap is expected.",
            f"The best single path names the right die for {100 * m.decoded:.0f} % of the rolls. "
            f"{m.draws} paths drawn by their probability show where it is unsure.",
        ],
        [
            Figure(
                _picture(m), f"The first {SHOWN} rolls: which die rolled, and what was inferred."
            ),
            _table(m),
        ],
    )


def _picture(m: Measured) -> str:
    with plots.style():
        figure, (ax,) = plots.panels(1, height=2.2)
        roll = range(len(m.states))
        for label, dice, level, colour in (
            ("truth", m.states, 1.28, plots.INK),
            ("best path", m.best, 1.08, plots.SERIES[1]),
        ):
            ax.step(roll, (level + 0.1 * dice).tolist(), where="mid", color=colour, label=label)
        share, drawn = m.loaded.tolist(), "share of drawn paths"
        ax.fill_between(
            roll, 0, share, step="mid", color=plots.SERIES[0], alpha=0.35, linewidth=0, label=drawn
        )
        ax.set(title="Is the die loaded?", xlabel="roll", ylim=(0, 1.45))
        ax.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return plots.svg(figure, "share of drawn paths with the loaded die, by roll")


def _table(m: Measured) -> Table:
    return Table(
        ["way", "time, gradient included"],
        [[name, f"{1e3 * m.seconds[name]:.2f} ms"] for name in (LOOP, OURS)],
    )


def _data(m: Measured) -> dict[str, Any]:
    return {
        "rolls": m.rolls,
        "log_likelihood": m.log_likelihood,
        "float32_product": m.product if math.isfinite(m.product) else None,
        "decoded": m.decoded,
        "seconds": m.seconds,
        "speedup": m.speedup,
    }

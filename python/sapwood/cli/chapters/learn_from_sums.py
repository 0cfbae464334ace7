"""Chapter: a network learns digits although it is only told what pairs of them add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sapwood import nesy
from sapwood.cli import additions
from sapwood.cli.chapters import ChapterResult, Context
from sapwood.nesy import mnist_add
from sapwood.nesy.mnist_add import Trained
from sapwood.report.page import Chapter, Section, Stat, Table

TITLE = "Learn digits from sums"
PAIRS = 3000


@dataclass(frozen=True)
class Measured:
    """Everything the chapter reports on."""

    before: Trained
    after: Trained
    source: str
    epochs: int
    error: float  # relative, compiled against enumeration
    explained: Explained


@dataclass(frozen=True)
class Explained:
    """One test pair: its sum, and what the network makes of it."""

    total: int
    log_truth: float
    first: int
    second: int
    truth: tuple[int, int]


def run(context: Context) -> ChapterResult:
    """Trains on sums, compares with enumeration, explains one pair; a few seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the outcome depends on the seed alone
    try:
        m = _measure(context)
    finally:
        torch.set_num_threads(threads)
    return ChapterResult(
        page=Chapter(TITLE, _lead(m), [_section(m)]),
        headline=f"From {PAIRS} sums alone a network learns to read "
        f"{100 * m.after.digit_accuracy:.1f} % of the digits.",
        stats=[
            Stat(f"{100 * m.after.digit_accuracy:.1f} %", "of digits read, none of them labelled"),
            Stat(f"{m.after.seconds:.1f} s", f"to learn them from {PAIRS} sums"),
        ],
        summary=_table(m),
        remarks=[_remark(m)],
        facts=[("Sums", f"{m.source}, {PAIRS} pairs, {m.epochs} epochs on one thread")],
        data=_data(m),
    )


def _measure(context: Context) -> Measured:
    epochs = 4 if context.quick else 10
    task = mnist_add.load("digits", 1, PAIRS, context.seed)
    context.bars.start("sums")

    def on_step(done: int, total: int, loss: float) -> None:
        context.bars.step(done, total, f"loss {loss:6.3f}")

    settings = mnist_add.Settings(epochs=epochs, seed=context.seed)
    after = mnist_add.train(task, settings, on_step)
    before = mnist_add.train(task, mnist_add.Settings(epochs=0, seed=context.seed))
    checked = additions.check(task, settings.net)
    return Measured(
        before, after, task.source, epochs, checked.largest_error, _explained(task, after)
    )


def _explained(task: mnist_add.Task, trained: Trained) -> Explained:
    x, y, n = task.fitted(task.test[:1])
    with torch.no_grad():
        program = mnist_add.sentence(trained.digit, 1)(x, y, nesy.observed(n))
        log_truth = float(program.log_truth()[0])
    found = program.map().assignment
    first, second = (int(v) for v in task.test.digits(slice(0, 1)).flatten())
    return Explained(
        int(n), log_truth, int(found["digit[0]"][0]), int(found["digit[1]"][0]), (first, second)
    )


def _lead(m: Measured) -> str:
    return (
        "The network never sees a digit's label, only the sum of two digits. A sentence of three "
        "lines says how digits and sums belong together; its probability is summed over all pairs "
        "of digits, exactly, and is what the network learns from."
    )


def _section(m: Measured) -> Section:
    return Section(
        "Three lines of logic",
        [
            "d1 = yield digit(x); d2 = yield digit(y); return d1 + d2 == n. Run as it stands, this "
            "enumerates 100 pairs of digits a row; compiled, it sums the ten that fit. On "
            f"{additions.CHECKED_ROWS} rows both give the same, within {m.error:.0e}.",
            _remark(m),
        ],
        [_table(m)],
    )


def _remark(m: Measured) -> str:
    e = m.explained
    right = "which is right" if (e.first, e.second) == e.truth else f"in truth {e.truth}"
    return (
        f"Asked to explain the sum {e.total} of the first test pair, the network finds "
        f"{e.first} + {e.second} most probable, {right}."
    )


def _table(m: Measured) -> Table:
    rows = [
        [name, f"{100 * run.digit_accuracy:.1f} %", f"{100 * run.sum_accuracy:.1f} %", time]
        for name, run, time in (
            ("untrained", m.before, "-"),
            (f"{m.epochs} epochs", m.after, f"{m.after.seconds:.1f} s"),
        )
    ]
    return Table(["network", "digits right", "sums right", "time"], rows)


def _data(m: Measured) -> dict[str, Any]:
    return {
        "digit_accuracy": m.after.digit_accuracy,
        "sum_accuracy": m.after.sum_accuracy,
        "seconds": m.after.seconds,
        "epochs": m.epochs,
        "largest_error": m.error,
        "losses": m.after.losses,
    }

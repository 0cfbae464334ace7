"""What ``sapwood mnist-add`` and its chapter of the tour do: train, check, time, show."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sapwood import nesy
from sapwood._files import atomic_write_text
from sapwood._measure import hold_memory, interleave, machine_name
from sapwood.cli import console
from sapwood.nesy import mnist_add
from sapwood.nesy.mnist_add import Settings, Task, Trained

SCHEMA = "sapwood.mnist-add/1"
CHECKED_ROWS = 16
_TOLERANCE = 1e-4  # relative, of float32 against enumeration in float64
_MOST_JOINT = 10**8


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    data: str = "digits"
    digits: int = 1
    train: int = 3000
    epochs: int = 10
    seeds: list[int] | tuple[int, ...] = (0,)
    net: str = "small"
    batch_size: int = 32
    lr: float = 1e-3
    pairing: str = "random"
    check: bool = False


@dataclass(frozen=True)
class Check:
    """The compiled truth of some rows against enumeration of all branches."""

    rows: int
    largest_error: float  # relative

    @property
    def agrees(self) -> bool:
        return self.largest_error <= _TOLERANCE


@dataclass
class Result:
    """All seeds, none left out."""

    request: Request
    source: str
    check: Check | None
    runs: list[Trained]
    share: float  # of a step spent outside the network and the optimizer


def run(request: Request, bars: console.Bars, watch: Callable[[], None] = lambda: None) -> Result:
    """Trains every seed.

    Args:
        request: what to train.
        bars: shows progress.
        watch: called after every step.

    Raises:
        ValueError: for a size that the data do not have.
        MissingDataError: when a file is not there.
    """
    r = request
    tasks = [mnist_add.load(r.data, r.digits, r.train, seed, r.pairing) for seed in r.seeds]
    checked = check(tasks[0], r.net) if r.check else None
    runs = []
    if checked is None or checked.agrees:
        runs = [_train(r, task, bars, watch) for task in tasks]
    share = symbolic_share(tasks[0], r.net, r.batch_size)
    return Result(r, tasks[0].source, checked, runs, share)


def _train(request: Request, task: Task, bars: console.Bars, watch: Callable[[], None]) -> Trained:
    bars.start(f"seed {task.seed}")

    def on_step(done: int, total: int, loss: float) -> None:
        watch()
        bars.step(done, total, f"loss {loss:7.3f}")

    settings = Settings(request.epochs, request.batch_size, request.lr, request.net, task.seed)
    return mnist_add.train(task, settings, on_step)


def check(task: Task, net: str) -> Check:
    """Compares the compiled truth with enumeration, before training."""
    digit = nesy.Categorical(mnist_add.network(net, task.seed), range(10), name="digit")
    xs, ys, sums = task.fitted(task.train[:CHECKED_ROWS])
    program = mnist_add.sentence(digit, task.num_digits)(xs, ys, nesy.observed(sums))
    found = program.log_truth().detach().double().exp()
    expected = program.truth(nesy.Tens)
    error = float(((found - expected).abs() / expected).max())
    return Check(len(sums), error)


def symbolic_share(task: Task, net: str, batch_size: int) -> float:
    """The part of a training step that is not the network's: steps with and without the truth."""
    hold_memory()  # page faults would count now for one and now for the other
    digit = nesy.Categorical(mnist_add.network(net, 0), range(10), name="digit")
    formula = mnist_add.sentence(digit, task.num_digits)
    optimizer = torch.optim.Adam(digit.parameters())
    xs, ys, sums = task.fitted(task.train[:batch_size])

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def without() -> None:
        parts = [xs, ys] if xs.dim() == 4 else [*xs.unbind(1), *ys.unbind(1)]
        update(digit.net(torch.cat(parts)).mean())

    times = interleave(
        {"step": lambda: update(nesy.loss(formula(xs, ys, nesy.observed(sums)))), "net": without},
        rounds=15,
        seconds=1.0,
    )
    return statistics.median(
        (whole - part) / whole for whole, part in zip(times["step"], times["net"], strict=True)
    )


def ablate(request: Request) -> list[dict[str, Any]]:
    """Lazy elimination against the joint of all digits: symbolic part, forward and backward."""
    task = mnist_add.load(request.data, request.digits, request.batch_size, 0, request.pairing)
    n, batch = request.digits, request.batch_size
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, batch, n, 10, generator=generator)
    reader = nesy.Categorical(torch.nn.Identity(), range(10), name="digit")
    formula = mnist_add.sentence(reader, n)
    sums = task.fitted(task.train[:batch])[2]

    def step(strict: bool) -> Tensor:
        leaf = logits.clone().requires_grad_()
        xs, ys = (leaf[:, :, 0] if n == 1 else leaf).unbind(0)
        value = -formula(xs, ys, nesy.observed(sums)).log_truth(strict=strict).mean()
        value.backward()
        return value

    calls: dict[str, Callable[[], Tensor]] = {"lazy": lambda: step(False)}
    if batch * 100**n <= _MOST_JOINT:
        calls["strict joint"] = lambda: step(True)
    times = interleave(calls, rounds=5, seconds=1.0)
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        rows.append(
            {
                "way": name,
                "combinations": 100**n,
                "seconds": min(times[name]),
                "peak_bytes": peak_bytes(call),
                "network_calls": 1,
            }
        )
    if "strict joint" not in calls:
        rows.append({"way": "strict joint", "combinations": 100**n, "seconds": None})
    return rows


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive between ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._held = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor):
                self._see(found.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self._held += storage.nbytes()
            self.most = max(self.most, self._held)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self._held -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that the tensors made by a call hold at once."""
    call()
    live = _Live()
    with live:
        call()
    return live.most


def show(result: Result) -> None:
    """Prints the table, the mean over all seeds, and how it was measured."""
    out = console.stdout()
    if result.check is not None:
        verdict = "agrees with" if result.check.agrees else "DIFFERS FROM"
        out.print(
            f"check: compiled truth {verdict} enumeration on {result.check.rows} rows, "
            f"largest relative error {result.check.largest_error:.1e}",
            soft_wrap=True,
        )
    r = result.request
    if result.runs:
        title = f"{r.digits}-digit sums: {r.train} pairs"
        columns = ["seed", "sum", "digit", "train sum", "time"]
        out.print(console.table(title, columns, _rows(result)))
        right = 100 * statistics.fmean(run.sum_accuracy for run in result.runs)
        digit = statistics.fmean(run.digit_accuracy for run in result.runs)
        out.print(
            f"{right:.1f} % of the sums are right, from digits read right {100 * digit:.1f} % of "
            "the time; no digit was ever labelled.",
            soft_wrap=True,
        )
    out.print(
        f"{r.epochs} epochs of net {r.net} on {result.source}; symbolic part: "
        f"{100 * max(result.share, 0):.1f} % of a step ({machine_name()})",
        soft_wrap=True,
    )


def _rows(result: Result) -> list[list[str]]:
    runs = zip(result.request.seeds, result.runs, strict=True)
    rows = [
        [
            str(seed), _percent(run.sum_accuracy), _percent(run.digit_accuracy),
            _percent(run.train_sum_accuracy), f"{run.seconds:.1f} s",
        ]
        for seed, run in runs
    ]  # fmt: skip
    if len(rows) > 1:
        values = [100 * run.sum_accuracy for run in result.runs]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        rows.append(["mean", f"{mean:.2f} +- {deviation:.2f} %", "", "", ""])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def show_ablation(request: Request, rows: list[dict[str, Any]]) -> None:
    """Prints the ablation table."""
    title = f"{request.digits}-digit addition, batch {request.batch_size}: symbolic part alone"
    cells = [
        [
            row["way"], f"{row['combinations']:.0e}",
            "refused" if row["seconds"] is None else f"{1e3 * row['seconds']:.2f} ms",
            "-" if row["seconds"] is None else f"{row['peak_bytes'] / 1e6:.2f} MB",
            "-" if row["seconds"] is None else str(row["network_calls"]),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["way", "combinations a row", "time", "peak memory", "network calls"]
    console.stdout().print(console.table(title, columns, cells))


def as_data(result: Result) -> dict[str, Any]:
    """The result for ``--json``."""
    runs = [
        {
            "seed": seed,
            "sum_accuracy": run.sum_accuracy,
            "digit_accuracy": run.digit_accuracy,
            "train_sum_accuracy": run.train_sum_accuracy,
            "marginal_accuracy": run.marginal_accuracy,
            "seconds": run.seconds,
            "losses": run.losses,
        }
        for seed, run in zip(result.request.seeds, result.runs, strict=False)
    ]
    checked = None if result.check is None else {**asdict(result.check), "ok": result.check.agrees}
    return {
        "schema": SCHEMA,
        "request": asdict(result.request),
        "source": result.source,
        "machine": machine_name(),
        "check": checked,
        "symbolic_share": result.share,
        "runs": runs,
    }


def save(path: Path, result: Result) -> None:
    """Writes the weights of the last seed; complete or not at all."""
    from safetensors.torch import save_file

    if not result.runs:
        return
    temporary = path.with_name(path.name + ".part")
    save_file(result.runs[-1].digit.net.state_dict(), temporary)
    temporary.replace(path)


def write_page(path: Path, result: Result) -> None:
    """Writes a page with the table."""
    from sapwood.report.page import Chapter, Page, Section, Stat, Table, render

    r = result.request
    columns = ["seed", "sum", "digit", "train sum", "time"]
    mean = statistics.fmean(run.sum_accuracy for run in result.runs)
    lead = "The network saw sums only; the digits' probabilities are summed out exactly."
    table = Table(columns, _rows(result), f"{r.train} pairs, {r.epochs} epochs, net {r.net}.")
    facts = [
        ("Machine", machine_name()),
        ("Data", result.source),
        ("Written", time.strftime("%Y-%m-%d")),
    ]
    page = Page(
        title="sapwood mnist-add",
        headline=f"{100 * mean:.1f} % of {r.digits}-digit sums right, learned from sums alone",
        subtitle=f"{len(result.runs)} seeds, all counted.",
        stats=[Stat(f"{100 * max(result.share, 0):.1f} %", "of a step is symbolic")],
        chapters=[Chapter("Addition", lead, [Section("Results", [], [table])])],
        facts=facts,
    )
    atomic_write_text(path, render(page))

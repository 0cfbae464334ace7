"""What an attached Pruner costs per training step: target, measured, PASS or MISS.

``python bench/pruner_overhead.py [--case lenet300] [--seconds 20] [--batch N] [--json FILE]`` times
whole steps (zero_grad, forward, backward, optimizer) of one network with and without a Pruner that
holds 90 % of the weights at zero, interleaved in one process on one thread. The cost is the ratio
of the fastest steps less one; ``hooks`` is the time spent in the Pruner's two hooks by themselves.
The convolutional network runs at batch 32 unless told otherwise, a quarter of the promised batch:
the cost per step is the same, so its share is overstated. The exit status is 1 after a MISS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from sapwood._measure import interleave, machine_name
from sapwood.pruning import Constant, Pruner, prune

SPARSITY = 0.9
ROUNDS = 10
QUIET = 0.15


def lenet300() -> nn.Module:
    """784-300-100-10."""
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def vgg16() -> nn.Module:
    """The convolutions of VGG-16 for 32 x 32 images and one output layer: 14.7 M weights."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4)


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    # not foreach: with MKL torch's square root of many zeros takes six times as long as that of
    # other numbers, on some CPUs, and the moments of masked weights are zero whoever masks them
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


@dataclass(frozen=True)
class Case:
    """A network, its input, and the largest share of the step that the Pruner may cost."""

    name: str
    network: Callable[[], nn.Module]
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    shape: tuple[int, ...]
    batch: int
    target: float


CASES = (
    Case("lenet300 SGD", lenet300, sgd, (784,), 128, 0.08),
    Case("lenet300 AdamW", lenet300, adamw, (784,), 128, 0.08),
    Case("vgg16 SGD", vgg16, sgd, (3, 32, 32), 32, 0.03),
)


@dataclass(frozen=True)
class Row:
    """One measured case; times in seconds."""

    name: str
    batch: int
    step: float
    spread: float  # of the plain steps: median over fastest, less one
    hooks: float
    cost: float
    target: float

    @property
    def verdict(self) -> str:
        return "PASS" if self.cost <= self.target else "MISS"


def training_step(
    model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor
) -> Callable[[], None]:
    """x: (batch, ...), y: (batch,) classes."""

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def pruned(case: Case) -> tuple[nn.Module, Optimizer]:
    """The same weights at every call, 90 % of them zero."""
    torch.manual_seed(0)
    model = case.network()
    prune(model, SPARSITY)
    return model, case.optimizer(list(model.parameters()))


def hooks_alone(case: Case, x: Tensor, y: Tensor, rounds: int) -> float:
    """Seconds in both hooks of one step: the fastest of the rounds."""
    model, optimizer = pruned(case)
    marks: list[float] = []

    def mark(*_: object) -> None:
        marks.append(time.perf_counter())

    optimizer.register_step_pre_hook(mark)
    optimizer.register_step_post_hook(mark)
    masks = prune(model, SPARSITY, inplace=False)
    Pruner(model, Constant(SPARSITY), masks=masks).attach(optimizer)
    optimizer.register_step_pre_hook(mark)
    optimizer.register_step_post_hook(mark)
    step = training_step(model, optimizer, x, y)
    times = []
    for _ in range(rounds):
        marks.clear()
        step()
        times.append(marks[1] - marks[0] + marks[3] - marks[2])
    return min(times)


def measure(case: Case, seconds: float) -> Row:
    x = torch.randn(case.batch, *case.shape)
    y = torch.arange(case.batch) % 10
    plain, alone = pruned(case)
    model, optimizer = pruned(case)
    masks = prune(model, SPARSITY, inplace=False)
    pruner = Pruner(model, Constant(SPARSITY), masks=masks).attach(optimizer)
    calls = {
        "plain": training_step(plain, alone, x, y),
        "pruned": training_step(model, optimizer, x, y),
    }
    times = interleave(calls, rounds=ROUNDS, seconds=seconds)
    best = {name: min(samples) for name, samples in times.items()}
    if pruner.masks.check(model) or not masks.check(plain):
        raise SystemExit(f"{case.name}: the pruner must hold the zeros, and nothing else should")
    return Row(
        name=case.name,
        batch=case.batch,
        step=best["plain"],
        spread=statistics.median(times["plain"]) / best["plain"] - 1.0,
        hooks=hooks_alone(case, x, y, rounds=len(times["plain"])),
        cost=best["pruned"] / best["plain"] - 1.0,
        target=case.target,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="only cases whose name begins so")
    parser.add_argument("--seconds", type=float, default=20.0, help="of interleaved steps per case")
    parser.add_argument("--batch", type=int, help="instead of the cases' own")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{machine_name()}, torch {torch.__version__}, {options.seconds:g} s per case")
    print(f"{'network':<16}{'batch':>6}{'step':>12}{'hooks':>12}{'cost':>9}{'at most':>9}")
    rows = []
    for case in CASES:
        if options.case and not case.name.startswith(options.case):
            continue
        if options.batch:
            case = Case(**{**case.__dict__, "batch": options.batch})
        row = measure(case, options.seconds)
        rows.append(row)
        print(
            f"{row.name:<16}{row.batch:>6}{row.step * 1e3:>9.3f} ms{row.hooks * 1e3:>9.3f} ms"
            f"{row.cost:>9.2%}{row.target:>9.0%}  {row.verdict}"
            f"{' (the machine is not quiet)' if row.spread > QUIET else ''}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([{**asdict(r), "verdict": r.verdict} for r in rows]))
    return int(any(row.verdict == "MISS" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

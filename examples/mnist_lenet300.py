"""LeNet-300-100 on MNIST: dense, cut at once, and pruned progressively, under one recipe.

    python examples/mnist_lenet300.py --data mnist --sparsity 0.9 0.95 --seeds 0 1 2

DIR holds the four idx files, plain or gzip-compressed. Prints a table of test accuracies and writes
every run to a JSON file. Besides the accuracy, each run checks that the sparsity is exact to one
weight and that every weight that is off when the schedule ends stays +0.0 bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.data import Dataset, load_mnist
from sapwood.pruning import MaskSet, Progress, ProgressiveMagnitude, TrainConfig, prune

Row = dict[str, Any]

T1 = 0.75
EVERY = 50


def lenet300(features: int, classes: int, seed: int) -> nn.Module:
    """The 784-300-100-10 perceptron, initialised under a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        )


class ZeroWatch:
    """Remembers which weights are zero at a step and counts how many are not later on."""

    def __init__(self, model: nn.Module, from_step: int) -> None:
        self.weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        self.from_step = from_step
        self.zeros: list[Tensor] = []
        self.broken = 0

    def __call__(self, progress: Progress) -> None:
        bits = [weight.detach().view(torch.int32) for weight in self.weights]
        if progress.step == self.from_step:
            self.zeros = [b == 0 for b in bits]  # all bits zero: +0.0, not -0.0
        elif progress.step > self.from_step:
            pairs = zip(bits, self.zeros, strict=True)
            self.broken += sum(int(b[zero].count_nonzero()) for b, zero in pairs)


def run(data: Dataset, sparsity: float | None, schedule: str, seed: int, epochs: int) -> Row:
    """One training run; ``sparsity=None`` trains densely."""
    model = lenet300(data.features, data.classes, seed)
    config = TrainConfig(epochs=epochs, lr=0.1, weight_decay=1e-4, batch_size=128, seed=seed)
    steps = epochs * -(-len(data.train_inputs) // config.batch_size)
    watch = ZeroWatch(model, round(T1 * steps))
    recipe = ProgressiveMagnitude(
        sparsity,
        config,
        schedule=schedule,
        t1=T1,
        every=EVERY,
        progress=None if sparsity is None else watch,
    )
    test = (data.test_inputs, data.test_labels)
    result = recipe.fit(model, (data.train_inputs, data.train_labels), test)
    row: Row = {
        "method": "dense" if sparsity is None else schedule,
        "sparsity": sparsity or 0.0,
        "seed": seed,
        "accuracy": 100.0 * result.history[-1]["metric"],
        "wall_s": round(result.wall_s, 1),
        "history": result.history,
        "model": result.model,
    }
    if sparsity is not None and result.report is not None and result.masks is not None:
        total = result.report.prunable
        off = total - sum(kept for kept, _ in result.masks.counts().values())
        row |= {
            "zeros": off,
            "zeros_expected": round(sparsity * total),
            "masks_and_weights_agree": result.report.consistent,
            "zeros_broken_after_t1": watch.broken,
        }
    return row


def cut_once(data: Dataset, dense: nn.Module, sparsity: float, seed: int) -> Row:
    """The dense network cut to the same sparsity without any further training."""
    masks = prune(dense, sparsity, inplace=False)
    saved = {name: value.clone() for name, value in dense.state_dict().items()}
    masks.apply_(dense)
    with torch.no_grad():
        correct = dense(data.test_inputs).argmax(1) == data.test_labels
    dense.load_state_dict(saved)
    return {
        "method": "one-shot",
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": 100.0 * float(correct.double().mean()),
        "zeros": zeros_of(masks),
    }


def zeros_of(masks: MaskSet) -> int:
    """Elements that the masks switch off."""
    return sum(total - kept for kept, total in masks.counts().values())


def experiment(
    data: Dataset,
    sparsities: Sequence[float],
    schedules: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    done: Callable[[list[Row]], None],
) -> list[Row]:
    """All runs; ``done`` sees the rows after each."""
    rows: list[Row] = []
    for seed in seeds:
        rows.append(run(data, None, "linear", seed, epochs))
        dense = rows[-1].pop("model")
        rows += [cut_once(data, dense, sparsity, seed) for sparsity in sparsities]
        for sparsity in sparsities:
            for schedule in schedules:
                rows.append(run(data, sparsity, schedule, seed, epochs))
                rows[-1].pop("model")
                done(rows)
        done(rows)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Mean test accuracy and range over the seeds, and the distance to the dense mean."""
    dense = statistics.fmean(row["accuracy"] for row in rows if row["method"] == "dense")
    lines = [f"{'method':<12}{'sparsity':>9}{'accuracy':>10}{'lowest':>9}{'highest':>9}{'gap':>8}"]
    groups = dict.fromkeys((row["method"], row["sparsity"]) for row in rows)
    for method, sparsity in sorted(groups, key=lambda key: (key[1], key[0])):
        found = [
            row["accuracy"]
            for row in rows
            if (row["method"], row["sparsity"]) == (method, sparsity)
        ]
        mean = statistics.fmean(found)
        lines.append(
            f"{method:<12}{sparsity:>9.2%}{mean:>10.2f}{min(found):>9.2f}{max(found):>9.2f}"
            f"{mean - dense:>+8.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the MNIST idx files")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--schedule", nargs="+", default=["linear", "cubic"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("mnist_lenet300.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        data = load_mnist(options.data)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 3

    def save(rows: list[Row]) -> None:
        text = json.dumps([{k: v for k, v in r.items() if k != "model"} for r in rows], indent=1)
        temporary = options.out.with_name(f".{options.out.name}.part")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(options.out)

    rows = experiment(data, options.sparsity, options.schedule, options.seeds, options.epochs, save)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

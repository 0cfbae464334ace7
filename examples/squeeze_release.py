"""Squeeze-Release on real data: how small a network becomes over cycles, and what it still can do.

    python examples/squeeze_release.py --task mnist --data DIR --arch lenet300 --seed 0 --out R.json
    python examples/squeeze_release.py --task cifar10 --data cifar10_jpeg.zip --limit 10000 \\
        --arch convnext_micro --epochs 24 --optimizer adamw --lr 2e-3 --out R.json

DIR holds MNIST's four idx files; for CIFAR-10 see ``sapwood.data.load_cifar10``. ``--task
mnist10k`` divides MNIST's test file into 8 000 images for training and 2 000 for testing, a minute
of work; ``--task digits`` needs scikit-learn and no data.

Every cycle prunes, fine-tunes and minimizes, and a release begins the next; ``--no-release`` keeps
the zeros masked for the same number of epochs, ``--score`` takes another ranking. The accuracy is
that on the test set after each cycle; nothing was selected by it. ``--checkpoint`` keeps the
networks of finished cycles and goes on from there.

Prints a line per cycle and writes all figures to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cifar10 import Batches
from torch import Tensor, nn

from sapwood import models
from sapwood.data import Dataset, load_cifar10, load_digits, load_mnist
from sapwood.minimize import Cycle, SqueezeRelease
from sapwood.pruning import MaskSet, TrainConfig

Pair = tuple[Tensor, Tensor]


def read(arguments: argparse.Namespace) -> tuple[Dataset, Pair, Pair]:
    """The data set, and the pairs (X, y) to train and to test on."""
    if arguments.task == "digits":
        data = load_digits()
    elif arguments.task == "cifar10":
        per_class = None if arguments.limit is None else arguments.limit // 10
        data = load_cifar10(arguments.data, per_class=per_class)
    else:
        data = load_mnist(arguments.data)
    train, test = (data.train_inputs, data.train_labels), (data.test_inputs, data.test_labels)
    if arguments.task == "mnist10k":
        images, labels = test
        train, test = (images[:8000], labels[:8000]), (images[8000:], labels[8000:])
    return data, train, test


def batches(arguments: argparse.Namespace, data: Dataset, train: Pair) -> Any:
    """What training sees: the pair itself, or images that are cropped and mirrored."""
    if arguments.task != "cifar10":
        return train
    assert data.image_shape is not None
    images = train[0].unflatten(1, data.image_shape)
    device = config(arguments).resolve_device()
    return Batches(images, train[1], arguments.batch_size, device, augment=True)


def widths(network: nn.Module) -> dict[str, list[int]]:
    """Shapes of the weights that are left."""
    return {n: list(p.shape) for n, p in network.named_parameters() if p.dim() > 1}


def config(arguments: argparse.Namespace) -> TrainConfig:
    """How all phases train."""
    return TrainConfig(
        epochs=arguments.epochs,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=arguments.device,
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; its figures as JSON values."""
    data, train, test = read(arguments)
    assert data.image_shape is not None
    model = models.build(arguments.arch, data.image_shape, data.classes, arguments.seed)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []

    def tell(cycle: Cycle, network: nn.Module) -> None:
        seconds = time.perf_counter() - started
        rows.append({"number": cycle.number, "seconds": seconds, "widths": widths(network)})
        print(
            f"cycle {cycle.number}: {cycle.parameters:,} parameters, accuracy {cycle.metric:.2%}, "
            f"{cycle.nonzeros:,} weights, {len(cycle.refusals)} refusals, {seconds:.0f} s",
            flush=True,
        )

    driver = SqueezeRelease(
        cycles=arguments.cycles,
        first_sparsity=arguments.first_sparsity,
        nnz_factor=arguments.nnz_factor,
        score=arguments.score,
        train=config(arguments),
        phase_epochs=tuple(arguments.phase_epochs) if arguments.phase_epochs else None,
        release=not arguments.no_release,
        finish=arguments.finish,
        callback=tell,
        checkpoint=arguments.checkpoint,
        resume=arguments.checkpoint is not None,
    )
    result = driver.fit(model, batches(arguments, data, train), test)
    print(
        f"dense: {result.dense.parameters:,} parameters, accuracy {result.dense.metric:.2%}; "
        f"{result.dense.parameters / result.cycles[-1].parameters:.1f} times smaller"
    )
    setup = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    del setup["out"]
    return {
        "setup": setup,
        "train": asdict(config(arguments)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "prunable": sum(total for _, total in MaskSet.dense(model).counts().values()),
        **result.to_dict(),
        "seen": rows,
    }


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = ("digits", "mnist", "mnist10k", "cifar10")
    parser.add_argument("--task", choices=tasks, default="digits")
    parser.add_argument("--data", type=Path, help="folder or file of the data")
    parser.add_argument("--limit", type=int, help="training images of CIFAR-10, equally by class")
    parser.add_argument("--arch", choices=models.NAMES, default="lenet300")
    parser.add_argument("--cycles", type=int, default=4)
    parser.add_argument("--first-sparsity", type=float, default=0.90)
    parser.add_argument("--nnz-factor", type=float, default=0.5)
    parser.add_argument("--score", choices=("group", "activation", "magnitude"), default="group")
    parser.add_argument("--no-release", action="store_true")
    parser.add_argument("--finish", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8, help="of the dense training")
    parser.add_argument(
        "--phase-epochs", type=int, nargs=3, metavar=("PRUNE", "FINETUNE", "RELEASE")
    )
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--checkpoint", type=Path, help="folder to keep and to go on from")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    arguments = parser.parse_args(words)
    if arguments.task != "digits" and arguments.data is None:
        parser.error(f"--task {arguments.task} needs --data")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    report = run(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

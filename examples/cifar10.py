"""CIFAR-10 at paper scale: pruned ResNet-18, VGG-like and VGG-19, and what they compete with.

    python examples/cifar10.py --data cifar-10-batches-bin --arch resnet18 --method dense snip

PATH is the binary or the Python version of CIFAR-10, or a zip of JPEGs; see
``sapwood.data.load_cifar10``. The sparsities are those of the tables of arXiv:2606.12278: 72.9 %
for ResNet-18, 97 % for VGG-like, 97.97 % for VGG-19; 95 % for the other networks is ours. So is the
recipe, because the paper's epochs and optimizer are unknown to us: 160 epochs of SGD, learning rate
0.1 with a cosine, momentum 0.9, weight decay 5e-4, batches of 128, random crops out of images
padded by four pixels, horizontal flips.

It is meant for a GPU. ``--amp bf16`` is faster there, and on CPUs with bfloat16 instructions. A CPU
manages ``--arch resnet20 --limit 10000 --epochs 10``.

No accuracy is promised. JPEG copies of the images are lossy: accuracies measured on them are not
comparable with published ones, nor are those of short runs or fewer images. What each run does
check is that the sparsity is exact to one weight, counted by masks and by weights.

Prints a table and writes all runs to a JSON file. A folder beside it holds the checkpoints and the
masks of every run; ``--resume`` goes on from there after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sapwood import models
from sapwood.data import Dataset, load_cifar10
from sapwood.pruning import (
    DynamicSparseTraining,
    LayerPlan,
    LotteryTicket,
    MaskSet,
    Progress,
    ProgressiveMagnitude,
    PruneAtInit,
    PruneFinetuneConfig,
    PruningResult,
    Random,
    Recipe,
    TrainConfig,
    TrainPruneFinetune,
)

Row = dict[str, Any]

SPARSITIES = {"resnet18": 0.729, "vgg_like": 0.97, "vgg19": 0.9797}
OTHER_SPARSITY = 0.95
PADDING = 4
TEST_BATCH = 500

#: (sparsity, configuration, options that all recipes take) -> recipe
METHODS: dict[str, Callable[..., Recipe]] = {
    "dense": lambda s, c, **o: ProgressiveMagnitude(None, c, **o),
    "progressive": lambda s, c, **o: ProgressiveMagnitude(s, c, schedule="linear", **o),
    "cubic": lambda s, c, **o: ProgressiveMagnitude(s, c, schedule="cubic", **o),
    "snip": lambda s, c, **o: PruneAtInit(s, c, criterion="snip", **o),
    "grasp": lambda s, c, **o: PruneAtInit(s, c, criterion="grasp", **o),
    "magnitude": lambda s, c, **o: PruneAtInit(s, c, criterion="magnitude", **o),
    "random": lambda s, c, **o: PruneAtInit(s, c, criterion=Random(c.seed), **o),
    "rigl": lambda s, c, **o: DynamicSparseTraining(s, c, **o),
    "finetune": lambda s, c, **o: TrainPruneFinetune(finetuning(s, c), **o),
    "lottery": lambda s, c, **o: LotteryTicket(s, c, scope="global", **o),
}


def finetuning(sparsity: float, train: TrainConfig) -> PruneFinetuneConfig:
    """One cut after training; the last quarter of the learning rates once more."""
    again = replace(train, epochs=max(1, train.epochs // 4))
    return PruneFinetuneConfig(train, (sparsity,), finetune=again, rewind="lr")


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Each image moved by at most ``padding`` pixels in both directions, half of them mirrored.

    What moves in is zero, the mean colour of standardised images. The draws come from a generator
    on the CPU, so that they are the same on every device.

    Args:
        images: (n, channels, height, width).
        generator: decides.
        padding: in pixels.

    Returns:
        Images of the same shape, in the memory format ``channels_last``.
    """
    count, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool)
    rows = shifts[0] + torch.arange(height)  # (n, height)
    columns = shifts[1] + torch.arange(width)  # (n, width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(count, device=images.device)[:, None, None]
    moved = padded[image, rows[:, :, None], columns[:, None, :]]  # (n, height, width, channels)
    return moved.permute(0, 3, 1, 2)


class Batches:
    """Batches of images that live on the device, shuffled and augmented on the fly.

    One draw from torch's generator at the beginning of an epoch decides everything in it: whoever
    restores the generator sees the same epoch, as with a ``DataLoader``. Images come in the memory
    format ``channels_last``, in which convolutions are fastest on CPUs and on GPUs.

    Args:
        images: (n, channels, height, width).
        labels: (n,).
        batch_size: images per batch; the last one may be smaller.
        device: where the batches are.
        augment: shuffle, crop and flip; False yields the images in their order, as they are.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, device: torch.device, augment: bool
    ) -> None:
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.augment = augment

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.augment:
            pairs = self.images.split(self.batch_size), self.labels.split(self.batch_size)
            for images, labels in zip(*pairs, strict=True):
                yield images.contiguous(memory_format=torch.channels_last), labels
            return
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for rows in order.split(self.batch_size):
            yield crop_and_flip(self.images[rows], generator), self.labels[rows]


def report_epochs(method: str, per_epoch: int) -> Callable[[Progress], None]:
    """A line on the error stream after every epoch."""

    def progress(now: Progress) -> None:
        if now.step % per_epoch == 0:
            print(
                f"{method} {now.stage}: epoch {now.step // per_epoch} of {now.total // per_epoch}, "
                f"loss {now.loss:.3f}, sparsity {now.sparsity:.2%}",
                file=sys.stderr,
                flush=True,
            )

    return progress


def run(
    data: Dataset,
    arch: str,
    method: str,
    sparsity: float,
    config: TrainConfig,
    like: MaskSet | None = None,
    **options: Any,
) -> tuple[Row, PruningResult]:
    """One training run under one recipe.

    Args:
        data: CIFAR-10.
        arch: a name that ``sapwood.models.build`` knows.
        method: a key of ``METHODS``.
        sparsity: of the prunable weights; dense training ignores it.
        config: how to train.
        like: with the methods that prune at initialisation, the masks whose budgets per layer to
            copy; a random control is fair only with those of the method that it controls.
        options: what all recipes take: checkpoint, resume and others.

    Returns:
        The figures of the run, and its result with model and masks.
    """
    assert data.image_shape is not None
    model = models.build(arch, data.image_shape, data.classes, config.seed)
    device = config.resolve_device()
    train = Batches(data.train_images, data.train_labels, config.batch_size, device, augment=True)
    test = Batches(data.test_images, data.test_labels, TEST_BATCH, device, augment=False)
    if like is not None and method in ("snip", "grasp", "magnitude", "random"):
        options |= {"scope": LayerPlan.like(like), "min_keep_per_layer": 0}
        sparsity = like.sparsity()
    options.setdefault("progress", report_epochs(method, len(train)))
    recipe = METHODS[method](sparsity, config, **options)
    outcome = recipe.fit(model, train, test)  # type: ignore[attr-defined]
    result: PruningResult = outcome[-1] if isinstance(outcome, list) else outcome
    stages: list[PruningResult] = getattr(recipe, "results_", [result])
    row: Row = {
        "method": method,
        "arch": arch,
        "sparsity": 0.0 if method == "dense" else sparsity,
        "seed": config.seed,
        "accuracy": 100.0 * result.history[-1]["metric"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "wall_s": round(sum(stage.wall_s for stage in stages), 1),
        "steps": sum(stage.steps for stage in stages),
        "training": asdict(config),
        "data": data.source,
        "device": device_name(device),
        "torch": torch.__version__,
        "history": [row for stage in stages for row in stage.history],
    }
    return row | exactness(result, sparsity), result


def exactness(result: PruningResult, sparsity: float) -> Row:
    """Counts of what is off, by masks and by weights."""
    if result.masks is None or result.report is None:
        return {}
    total = result.report.prunable
    return {
        "prunable": total,
        "zeros": total - sum(kept for kept, _ in result.masks.counts().values()),
        "zeros_expected": round(sparsity * total),
        "masks_and_weights_agree": result.report.consistent,
        "masks_digest": result.masks.digest(),
    }


def device_name(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def table(rows: Sequence[Row]) -> str:
    """One line per run."""
    lines = [
        f"{'network':<10}{'method':<12}{'sparsity':>9}{'seed':>5}{'accuracy':>10}{'off':>11}"
        f"{'exact':>7}{'minutes':>9}"
    ]
    for row in rows:
        exact = row.get("zeros") == row.get("zeros_expected") and row.get(
            "masks_and_weights_agree", True
        )
        lines.append(
            f"{row['arch']:<10}{row['method']:<12}{row['sparsity']:>9.2%}{row['seed']:>5}"
            f"{row['accuracy']:>10.2f}{row.get('zeros', 0):>11}{'yes' if exact else 'NO':>7}"
            f"{row['wall_s'] / 60:>9.1f}"
        )
    return "\n".join(lines)


def save(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows under a temporary name, then renames the file."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = found.add_argument
    add("--data", type=Path, required=True, help="CIFAR-10: a folder or a zip of JPEGs")
    add("--arch", choices=models.NAMES, default="resnet18")
    add("--method", nargs="+", choices=METHODS, default=["progressive"])
    add("--sparsity", type=float, help="default: that of the paper's table, or 0.95")
    add("--epochs", type=int, default=160)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=0.1)
    add("--seed", type=int, nargs="+", default=[0])
    add("--amp", choices=("off", "bf16", "fp16"), default="off")
    add("--device", default="auto", help="cuda, cpu, ...; default: a GPU when there is one")
    add("--threads", type=int, help="of the CPU; default: all cores")
    add("--limit", type=int, help="training images, the same number of each class")
    add("--like", type=Path, help="masks whose budgets per layer methods at initialisation copy")
    add("--out", type=Path, default=Path("cifar10.json"))
    add("--resume", action="store_true", help="go on from the checkpoints beside --out")
    return found


def per_class(limit: int | None, classes: int = 10) -> int | None:
    """Training images per class."""
    if limit is not None and (limit < classes or limit % classes):
        raise ValueError(f"--limit must be a positive multiple of {classes}, got {limit}")
    return None if limit is None else limit // classes


def experiment(options: argparse.Namespace) -> list[Row]:
    """All runs, saved after each."""
    data = load_cifar10(options.data, per_class=per_class(options.limit))
    like = None if options.like is None else MaskSet.load(options.like)
    sparsity = options.sparsity
    if sparsity is None:
        sparsity = SPARSITIES.get(options.arch, OTHER_SPARSITY)
    rows: list[Row] = []
    for seed in options.seed:
        config = TrainConfig(
            epochs=options.epochs,
            lr=options.lr,
            weight_decay=5e-4,
            batch_size=options.batch_size,
            amp=options.amp,
            seed=seed,
            device=options.device,
        )
        for method in options.method:
            name = f"{options.arch}-{method}-{seed}"
            folder = options.out.with_suffix(".checkpoints") / name
            files = {"checkpoint": folder, "resume": options.resume}
            row, result = run(data, options.arch, method, sparsity, config, like, **files)
            if result.masks is not None:
                result.masks.save(folder / "model.masks.safetensors")
            rows.append(row)
            save(options.out, rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        rows = experiment(options)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 3
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

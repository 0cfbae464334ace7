"""Addition from sums: pairs, carries, networks, learning on the bundled digits."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from sapwood import nesy
from sapwood.nesy import mnist_add

pytest.importorskip("sklearn")


def write_mnist(folder: Path, train: int, test: int) -> None:
    """Random images and labels as the four idx files."""
    for name, count in (("train", train), ("t10k", test)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.randint(10, (count,), dtype=torch.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            content = bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(content)


def test_sums_are_exact_for_any_number_of_digits() -> None:
    digits = torch.randint(10, (50, 2, 25))
    found = mnist_add.sum_digits(digits)
    for row in range(50):
        a, b = (int("".join(map(str, d.tolist()[::-1]))) for d in digits[row])
        assert int("".join(map(str, found[row].tolist()[::-1]))) == a + b


def test_bundled_pairs() -> None:
    task = mnist_add.load("digits", num_digits=2, num_train=100, seed=3)
    assert (len(task.train), len(task.test)) == (100, 2000)
    assert (len(task.train.images), len(task.test.images)) == (1297, 500)
    assert float(task.train.images.min()) == 0
    assert float(task.train.images.max()) == 1
    xs, ys, sums = task.train[:5]
    assert xs.shape == ys.shape == (5, 2, 1, 8, 8)
    assert torch.equal(sums, mnist_add.sum_digits(task.train.digits(slice(0, 5))))
    again, other = (mnist_add.load("digits", 2, 100, seed) for seed in (3, 4))
    assert torch.equal(task.train.index, again.train.index)
    assert not torch.equal(task.train.index, other.train.index)
    assert torch.equal(task.test.index, other.test.index)


def test_batches_cover_every_pair_once() -> None:
    task = mnist_add.load("digits", num_train=70)
    batches = list(task.batches(32))
    assert [len(n) for _, _, n in batches] == [32, 32, 6]
    x, _, n = batches[0]
    assert x.shape == (32, 1, 8, 8)
    assert n.shape == (32,)
    total = sum(int(n.sum()) for _, _, n in batches)
    assert total == int(task.train.digits().sum())
    first, second = (torch.cat([n for _, _, n in task.batches(32, e)]) for e in (0, 1))
    assert not torch.equal(first, second)


def test_mnist_pairs(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=40, test=21)
    task = mnist_add.load(tmp_path, num_digits=2, num_train=10, seed=1)
    assert len(task.test) == 5
    assert task.test.index.flatten().tolist() == list(range(20))
    assert task.train.index.flatten().sort().values.tolist() == list(range(40))
    ordered = mnist_add.load(tmp_path, 2, 10, pairing="sequential")
    assert ordered.train.index.flatten().tolist() == list(range(40))
    assert float(task.train.images.min()) >= 0
    assert float(task.train.images.max()) <= 1 + 1e-6
    with pytest.raises(ValueError, match="need at most 40 images, got 44"):
        mnist_add.load(tmp_path, 2, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_digits": 0}, "num_digits must be at least 1, got 0"),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
        ({"pairing": "odd"}, "pairing must be one of random, sequential, got 'odd'"),
    ],
)
def test_wrong_sizes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mnist_add.load("digits", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name must be one of small, ltn, dpl, got 'big'"):
        mnist_add.network("big")


def test_networks() -> None:
    sizes = {
        name: sum(p.numel() for p in mnist_add.network(name).parameters())
        for name in mnist_add.NETS
    }
    convolutions = 6 * 25 + 6 + 16 * 6 * 25 + 16
    assert sizes["ltn"] == convolutions + 257 * 100 + 101 * 84 + 85 * 10
    assert sizes["dpl"] == convolutions + 257 * 120 + 121 * 84 + 85 * 10
    first, second = mnist_add.network("small", 1), mnist_add.network("small", 1)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(first(x), second(x))
    assert first(x).shape == (2, 10)


def test_untrained_accuracy_counts_digits_and_sums() -> None:
    task = mnist_add.load("digits", num_digits=2, num_train=20)

    class Cheating(torch.nn.Module):
        """Reads the label that is hidden in the first pixel."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 10).float() * 50

    hidden = task.test.labels.float().view(-1, 1, 1, 1)
    pairs = mnist_add.Pairs(hidden, task.test.labels, task.test.index)
    reader = nesy.Categorical(Cheating(), range(10))
    assert mnist_add.accuracy(reader, pairs) == (1.0, 1.0)
    wrong = mnist_add.Pairs(hidden, (task.test.labels + 1) % 10, task.test.index)
    assert mnist_add.accuracy(reader, wrong)[1] == 0.0
    single = mnist_add.Pairs(hidden, task.test.labels, task.test.index[:, :, :1])
    assert mnist_add.marginal_accuracy(reader, single) == 1.0


def test_training_is_reproducible_and_learns(threads: None) -> None:
    torch.set_num_threads(1)
    task = mnist_add.load("digits", num_train=600)
    steps: list[int] = []
    settings = mnist_add.Settings(epochs=3)
    first = mnist_add.train(task, settings, lambda done, total, loss: steps.append(total - done))
    second = mnist_add.train(task, settings)
    assert first.losses == second.losses
    assert first.losses[-1] < first.losses[0] - 0.1
    assert steps == list(range(3 * 19 - 1, -1, -1))


def test_the_strict_joint_learns_the_same(threads: None) -> None:
    torch.set_num_threads(1)
    task = mnist_add.load("digits", num_train=64)
    lazy, strict = (
        mnist_add.train(task, mnist_add.Settings(epochs=2, strict=s)).losses for s in (False, True)
    )
    assert lazy == pytest.approx(strict, rel=1e-5)


@pytest.mark.slow
def test_learns_digits_from_sums(threads: None) -> None:
    """N = 1 from 3 000 pairs: at least 93.5 % of the sums in the mean of three seeds."""
    torch.set_num_threads(1)
    tasks = [mnist_add.load("digits", 1, 3000, seed) for seed in range(3)]
    runs = [mnist_add.train(task, mnist_add.Settings(seed=task.seed)) for task in tasks]
    assert statistics.fmean(r.sum_accuracy for r in runs) >= 0.935
    assert all(r.digit_accuracy > 0.5 for r in runs)


@pytest.mark.experiment
@pytest.mark.parametrize(
    ("digits", "pairs", "epochs", "batch", "gate", "seeds"),
    [(1, 3000, 20, 32, 0.935, 5), (2, 1500, 20, 32, 0.875, 5), (2, 15_000, 10, 32, 0.95, 1),
     (4, 7500, 10, 32, 0.91, 1), (15, 2000, 10, 10, 0.70, 1)],
)  # fmt: skip
def test_learns_mnist_from_sums(
    shared_data: Path, digits: int, pairs: int, epochs: int, batch: int, gate: float, seeds: int
) -> None:
    found = []
    for seed in range(seeds):
        task = mnist_add.load(shared_data / "mnist", digits, pairs, seed)
        settings = mnist_add.Settings(epochs=epochs, batch_size=batch, net="ltn", seed=seed)
        found.append(mnist_add.train(task, settings).sum_accuracy)
    assert statistics.fmean(found) >= gate, found

"""Class-balanced batches from tensors and loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sapwood.pruning import class_balanced_batch


def labelled(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Row i of X is [i, label]; the labels are skewed towards the first class."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(n, generator=generator).square() * classes).long()
    return torch.stack([torch.arange(n), y], dim=1), y


def loader(x: Tensor, y: Tensor, *, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle)


@pytest.mark.parametrize("kind", ["pair", "loader", "shuffled", "generator"])
@pytest.mark.parametrize("per_class", [1, 6, 7])
def test_every_class_equally_in_both_halves(kind: str, per_class: int) -> None:
    x, y = labelled(400, 5)
    data: Any = (x, y) if kind == "pair" else loader(x, y, shuffle=kind == "shuffled")
    data = iter(data) if kind == "generator" else data
    state = torch.random.get_rng_state()
    found_x, found_y = class_balanced_batch(data, per_class)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found_x.shape == (5 * per_class, 2)
    assert torch.equal(found_y, torch.arange(5).repeat(per_class))
    assert torch.equal(found_x[:, 1], found_y)
    assert len(found_x[:, 0].unique()) == len(found_x)
    halves = found_y.split([len(found_y) // 2, len(found_y) - len(found_y) // 2])
    first, second = (half.bincount(minlength=5) for half in halves)
    assert int((first - second).abs().max()) == per_class % 2


def test_the_seed_fixes_the_draw() -> None:
    x, y = labelled(400, 5)
    for data in ((x, y), loader(x, y, shuffle=True)):
        torch.manual_seed(1)
        first = class_balanced_batch(data, 4, seed=7)[0]
        torch.manual_seed(2)
        assert torch.equal(class_balanced_batch(data, 4, seed=7)[0], first)
        assert not torch.equal(class_balanced_batch(data, 4, seed=8)[0], first)


def test_a_loader_in_order_gives_the_first_of_every_class() -> None:
    x, y = labelled(400, 5)
    found = class_balanced_batch(loader(x, y), 3)[0]
    for label in range(5):
        expected = x[y == label][:3]
        assert torch.equal(found[found[:, 1] == label], expected)


def test_the_number_of_classes_ends_the_pass_early() -> None:
    x, y = labelled(400, 3)
    read = 0

    def batches() -> Iterator[list[Tensor]]:
        nonlocal read
        for item in loader(x, y):
            read += 1
            yield item

    early = class_balanced_batch(batches(), 2, num_classes=3)
    assert read < 5
    assert all(
        torch.equal(a, b) for a, b in zip(early, class_balanced_batch(loader(x, y), 2), strict=True)
    )


def test_every_sample_of_a_balanced_set() -> None:
    x, y = torch.randn(12, 3)[:, :2], torch.arange(12, dtype=torch.uint8) % 3 + 5
    found_x, found_y = class_balanced_batch((x, y), 4)
    assert found_y.dtype == torch.uint8
    assert torch.equal(found_y, torch.tensor([5, 6, 7], dtype=torch.uint8).repeat(4))
    assert torch.equal(found_x.sort(0).values, x.sort(0).values)


@pytest.mark.parametrize("as_loader", [False, True])
@pytest.mark.parametrize(
    ("y", "arguments", "error", "text"),
    [
        (
            [0, 0, 1, 2],
            {},
            ValueError,
            "data must hold 2 samples of every class, got 1 of class 1, 1 ",
        ),
        (
            [0, 0, 1, 1],
            {"num_classes": 3},
            ValueError,
            "2 samples of every class, got 0 of class 2",
        ),
        ([0, 0, 3, 3], {"num_classes": 3}, ValueError, r"y must be in \[0, 3\), got 0 to 3"),
        ([0, 0, -1, 1], {"num_classes": 3}, ValueError, r"y must be in \[0, 3\), got -1 to 1"),
        (
            [0.0, 0.0, 1.0, 1.0],
            {},
            TypeError,
            "y must hold integer class labels, got torch.float32",
        ),
        ([[0], [0], [1], [1]], {}, ValueError, "y must be one-dimensional, got 2 dimensions"),
    ],
)
def test_bad_labels(
    y: Any, arguments: dict[str, int], error: type[Exception], text: str, as_loader: bool
) -> None:
    x, labels = torch.randn(4, 2), torch.tensor(y)
    data = loader(x, labels) if as_loader else (x, labels)
    with pytest.raises(error, match=r"sapwood\.pruning\.class_balanced_batch: .*" + text):
        class_balanced_batch(data, 2, **arguments)


def test_bad_arguments() -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    for count in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="samples_per_class must be an integer of at least 1"):
            class_balanced_batch((x, y), count)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="num_classes must be an integer of at least 1"):
            class_balanced_batch((x, y), 1, num_classes=count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"data must be a pair .* or an iterable of pairs, got int"):
        class_balanced_batch(3, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data must hold at least one pair, got none"):
        class_balanced_batch([], 1)

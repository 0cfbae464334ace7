"""Learn a disc from points and a sentence: the label holds exactly if the classifier says so."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from sapwood import nesy


def points(seed: int) -> tuple[Tensor, Tensor]:
    """50 uniform points of the unit square and whether they lie in the disc."""
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x - 0.5).square().sum(1) < 0.09


def main() -> None:
    """Trains full batch and prints how well the disc is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1000)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 16), nn.ELU(), nn.Linear(16, 16), nn.ELU(), nn.Linear(16, 2)
    )  # fmt: skip
    inside = nesy.Categorical(net, support=[False, True], name="inside")

    @nesy.do(static=True)
    def agrees(x: Tensor, label: Any) -> Generator[Any, Any, Any]:
        found = yield inside(x)
        return found == label

    (x, labels), (test_x, test_labels) = points(0), points(1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for epoch in range(epochs):
        loss = nesy.loss(agrees(x, nesy.observed(labels)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 250 == 0:
            print(f"epoch {epoch:4d}  loss {float(loss.detach()):.4f}")
    with torch.no_grad():
        p = net(test_x).softmax(-1)
        confidence = agrees(test_x, nesy.observed(test_labels)).log_truth().exp().mean()
    said = p.argmax(-1).bool()
    hits = int((said & test_labels).sum())
    precision, recall = hits / max(int(said.sum()), 1), hits / max(int(test_labels.sum()), 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    accuracy = float((said == test_labels).double().mean())
    print(f"accuracy {accuracy:.2f}  F1 {f1:.2f}  precision {precision:.2f}")
    print(f"mean confidence in the truth {float(confidence):.3f}")


if __name__ == "__main__":
    main()

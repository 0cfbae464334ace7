"""Learn digits from d1 * d2 + d3 * d4 alone: a puzzle with 10 000 combinations per row."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from sapwood import nesy
from sapwood.nesy import mnist_add


def main() -> None:
    """Checks the elimination against the joint, then trains on the bundled digits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train", type=int, default=3000)
    options = parser.parse_args()
    task = mnist_add.load("digits", num_digits=2, num_train=options.train)
    digit = nesy.Categorical(mnist_add.network("small"), range(10), name="digit")

    @nesy.do(static=True)
    def dot(xs: Tensor, ys: Tensor, z: Any) -> Generator[Any, Any, Any]:
        p = (yield digit(xs[:, 0])) * (yield digit(ys[:, 0]))
        q = (yield digit(xs[:, 1])) * (yield digit(ys[:, 1]))
        return p + q == z

    def sentence(rows: Tensor) -> nesy.Program:
        xs, ys, _ = task.train[rows]
        return dot(xs, ys, nesy.observed(task.train.digits(rows).prod(1).sum(1)))

    few = sentence(torch.arange(8)).double()
    error = (few.log_truth() - few.log_truth(strict=True)).abs().max()
    print(few.explain())
    print(f"largest difference from the joint of all digits: {float(error.detach()):.1e}")
    assert error < 1e-10
    optimizer = torch.optim.Adam(digit.parameters(), 1e-3)
    for epoch in range(options.epochs):
        for rows in torch.randperm(len(task.train)).split(32):
            loss = nesy.loss(sentence(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _, right = mnist_add.accuracy(digit, task.test)
        print(f"epoch {epoch + 1}  loss {float(loss.detach()):.3f}  digits right {right:.1%}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

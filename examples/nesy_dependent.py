"""A program that branches on a bound value: two paths, one network call, exact gradients."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from sapwood import nesy

digit = nesy.Categorical(torch.nn.Linear(16, 10), support=range(10), name="digit")


@nesy.do
def maybe_add(x: Tensor, y: Tensor, n: Any) -> Generator[Any, Any, Any]:
    """Small digits are added to the second one, large ones to a random digit."""
    d = yield digit(x)
    e = (yield digit(y)) if d < 5 else (yield nesy.uniform(range(10)))
    return d + e == n


def main() -> None:
    """Explains the plan, and compares it with enumeration of all branches."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 16)
    program = maybe_add(x, y, nesy.observed(torch.tensor([3, 7, 18, 25])))
    print(program.explain())
    compiled, enumerated = program.log_truth().exp(), program.truth(nesy.Dist)
    print("compiled  ", compiled.detach().tolist())
    print("enumerated", enumerated.tolist())
    assert torch.allclose(compiled.double(), enumerated, atol=1e-6)


if __name__ == "__main__":
    main()

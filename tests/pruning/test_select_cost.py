"""What a selection costs: time against torch's ways, and no copy of the scores."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sapwood.pruning import MaskSet, _radix, select


def dense_like(scores: dict[str, Tensor]) -> MaskSet:
    return MaskSet({name: torch.ones(s.shape, dtype=torch.bool) for name, s in scores.items()})


class Allocations(TorchDispatchMode):
    """Notes the largest storage that an op makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in leaves}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("loops", ["compiled", "torch"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "half"])
@pytest.mark.parametrize("per_unit", [0, 3])
def test_scores_are_not_copied(
    loops: str, layout: str, per_unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loops == "torch":
        monkeypatch.setattr(_radix, "COMPILED", None)
    score = torch.randn(1500, 2000)
    score = {"contiguous": score, "transposed": score.t(), "half": score.half()}[layout]
    masks = dense_like({"w": score})
    with Allocations() as allocations:
        select({"w": score}, masks, 0.9, absolute=True, min_keep_per_unit=per_unit)
    assert score.numel() <= allocations.largest  # the result
    assert allocations.largest <= 2 * 4 * _radix.CHUNK


def test_faster_than_selection_and_sorting_in_torch() -> None:
    whole = torch.randn(10**7).abs()
    scores = {f"l{i}": part for i, part in enumerate(whole.chunk(8))}
    masks = dense_like(scores)
    ours, kth = math.inf, math.inf
    for _ in range(3):
        started = time.perf_counter()
        select(scores, masks, 0.9)
        ours = min(ours, time.perf_counter() - started)
        started = time.perf_counter()
        torch.kthvalue(whole, 9 * 10**6)
        kth = min(kth, time.perf_counter() - started)
    started = time.perf_counter()
    torch.sort(whole)
    sort = time.perf_counter() - started
    assert ours <= 0.7 * kth, f"{ours:.3f} s against kthvalue's {kth:.3f} s"
    assert ours <= 0.15 * sort, f"{ours:.3f} s against sort's {sort:.3f} s"

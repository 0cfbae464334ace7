"""Every op: within its bounds of the float64 reference, whatever the shape, type and layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.check_op import Sample, outputs
from tests.properties import copruned_conv, logsemiring, masked_matmul, similarity, splat2d
from tests.properties.strategies import (
    EXAMPLES,
    Arguments,
    Property,
    examples,
)

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "schema.cpp").read_text())
PROPERTIES = {
    **masked_matmul.PROPERTIES,
    **logsemiring.PROPERTIES,
    **similarity.PROPERTIES,
    **splat2d.PROPERTIES,
    **copruned_conv.PROPERTIES,
}


def test_every_op_has_a_property() -> None:
    assert sorted(PROPERTIES) == sorted(SCHEMA)
    assert all(p.battery.name == op for op, p in PROPERTIES.items())


def test_only_the_platforms_products_may_follow_the_threads() -> None:
    """Every other op gives the same bits for any number of them, as its battery shows."""
    exempt = {op for op, p in PROPERTIES.items() if not p.battery.bitwise}
    assert exempt == {"masked_matmul", "masked_matmul_backward"}


def copied(args: Arguments) -> Arguments:
    """The same values in tensors of their own, contiguous."""
    found: Arguments = tree_map(
        lambda a: a.clone(memory_format=torch.contiguous_format) if isinstance(a, Tensor) else a,
        args,
    )
    return found


def assert_layouts_agree(found: Property, args: Arguments) -> None:
    """The same values in other memory give the same results, and inputs are never written to."""
    battery = found.battery()
    before = copied(args)
    results = outputs(battery.op(*args))
    for given_, same in zip(args, before, strict=True):
        assert not isinstance(given_, Tensor) or torch.equal(given_, same), (
            "an input was written to"
        )
    for actual, expected in zip(results, outputs(battery.op(*before)), strict=True):
        if battery.bitwise:
            assert torch.equal(actual, expected)
        else:
            eps = torch.finfo(actual.dtype).eps
            torch.testing.assert_close(actual, expected, rtol=64 * eps, atol=64 * eps)


@pytest.mark.parametrize("op", SCHEMA)
def test_any_arguments(op: str) -> None:
    found = PROPERTIES[op]

    @EXAMPLES
    @given(examples(found.arguments))
    def check(example: tuple[Arguments, torch.dtype]) -> None:
        args, dtype = example
        if found.check is not None:
            found.check(args)
        else:
            found.battery().test_forward(Sample("drawn", args), dtype)
        assert_layouts_agree(found, args)

    check()

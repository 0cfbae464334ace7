"""Reports: counts by hand, both views, and the three formats."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from torch import nn

from sapwood.pruning import Linear, MaskMatchError, MaskSet, Pruner, SparsityReport, prune


def example() -> tuple[nn.Module, MaskSet]:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    conv = torch.ones(3, 2, 2, 2, dtype=torch.bool)
    conv[1] = False  # a dead output channel
    dense = torch.ones(2, 12, dtype=torch.bool)
    dense[:, :3] = False  # three dead inputs
    dense[0, 3] = False
    masks = MaskSet({"0.weight": conv, "2.weight": dense})
    masks.apply_(model)
    return model, masks


def test_counts() -> None:
    model, masks = example()
    report = SparsityReport.of(model, masks)
    conv, dense = report.tensors
    assert (conv.numel, conv.kept, conv.nonzero) == (24, 16, 16)
    assert (conv.dead_outputs, conv.dead_inputs) == (1, 0)
    assert (dense.numel, dense.kept, dense.nonzero) == (24, 17, 17)
    assert (dense.dead_outputs, dense.dead_inputs) == (0, 3)
    assert report.prunable == 48
    assert report.sparsity_by_mask == report.sparsity_by_weight == 15 / 48
    assert (report.parameters, report.parameter_zeros) == (53, 15)
    assert report.sparsity_of_model == 15 / 53
    assert report.digest == masks.digest()
    assert report.consistent
    assert report.headline() == "masks and weights agree: 31.2500% of 48 are zero"


def test_a_mismatch_stands_in_the_first_line() -> None:
    model, masks = example()
    model[0].weight.data[1, 0, 0, :] = 5.0  # type: ignore[index]
    model[2].weight.data[1, 11] = 0.0  # type: ignore[index]
    report = SparsityReport.of(model, masks)
    assert not report.consistent
    first = report.table().splitlines()[0]
    assert first == "MISMATCH: 2 masked weights are not zero, 1 kept weights are zero"
    assert (report.tensors[0].revived, report.tensors[1].idle) == (2, 1)


def test_equal_counts_in_different_places_are_a_mismatch() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.0, 1.0]])
    report = SparsityReport.of(layer, MaskSet({"weight": torch.tensor([[True, False]])}))
    assert report.sparsity_by_mask == report.sparsity_by_weight
    assert not report.consistent


def test_optimizer_state_is_counted() -> None:
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.Adam(layer.parameters())
    pruner = Pruner(layer, Linear(0.75, t1=1, every=1)).attach(optimizer)
    layer(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    report = pruner.report()
    assert report.state_elements == 2 * 64
    assert report.state_zeros == 2 * 48
    assert "optimizer state" in report.table()


def test_a_layer_at_its_minimum_is_marked() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 2))
    model[1].weight.data.mul_(1e-6)
    report = SparsityReport.of(model, prune(model, 0.95))
    assert [tensor.at_minimum for tensor in report.tensors] == [False, True]
    assert [line[0] for line in report.table().splitlines()[3:5]] == [" ", "*"]


def test_table_fits_eighty_columns() -> None:
    block: nn.Module = nn.Linear(3, 3)
    for _ in range(8):
        block = nn.Sequential(block)
    model = nn.ModuleDict({"a_rather_long_block_name": block, "wide": nn.Linear(10_000, 100)})
    table = SparsityReport.of(model, MaskSet.dense(model)).table()
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "0.0.weight" in table


def test_json_and_csv_hold_the_same() -> None:
    model, masks = example()
    report = SparsityReport.of(model, masks)
    data = json.loads(report.to_json())
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert data["sparsity_by_mask"] == 15 / 48
    assert [row["name"] for row in rows] == [t["name"] for t in data["tensors"]]
    assert [int(row["kept"]) for row in rows] == [t["kept"] for t in data["tensors"]]
    assert rows[0]["shape"] == "3x2x2x2"
    assert float(rows[1]["sparsity_by_weight"]) == pytest.approx(7 / 24)


def test_masks_of_another_model() -> None:
    _, masks = example()
    with pytest.raises(MaskMatchError, match=r"SparsityReport\.of: every mask must belong"):
        SparsityReport.of(nn.Linear(2, 2), masks)
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match=r"0\.weight must have the parameter's shape"):
        SparsityReport.of(other, masks)

"""Masked and packed modules, and the conversion of whole models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sapwood.nn import MaskedConv2d, MaskedLinear, SparseLinear, to_dense, to_sparse


def pruned(n: int = 48, k: int = 64, sparsity: float = 0.8) -> nn.Linear:
    layer = nn.Linear(k, n)
    with torch.no_grad():
        layer.weight[torch.rand(n, k) < sparsity] = 0.0
    return layer


def test_masked_linear_equals_linear_with_zeros() -> None:
    linear, mask = nn.Linear(64, 48), torch.rand(48, 64) > 0.6
    layer = MaskedLinear.from_linear(linear, mask)
    x = torch.randn(5, 64)
    expected = F.linear(x, linear.weight.where(mask, 0.0), linear.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_linear()(x), expected)
    assert layer.sparsity == pytest.approx(1 - mask.float().mean().item())
    assert layer.weight is linear.weight
    assert "mask" in layer.state_dict()


@pytest.mark.parametrize("change", ["weight", "mask", "load", "to"])
def test_cached_product_follows_every_change(change: str) -> None:
    layer = MaskedLinear.from_linear(nn.Linear(8, 4), torch.rand(4, 8) > 0.5).eval()
    other = MaskedLinear.from_linear(nn.Linear(8, 4), torch.rand(4, 8) > 0.5)
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = layer(x)
        assert layer._product is not None
        if change == "weight":
            layer.weight.mul_(2.0)
        elif change == "mask":
            layer.mask.logical_not_()
        elif change == "load":
            layer.load_state_dict(other.state_dict())
        else:
            layer, x = layer.double(), x.double()
        expected = F.linear(x, layer.weight.where(layer.mask, 0.0), layer.bias)
        torch.testing.assert_close(layer(x), expected)
        assert change == "to" or not torch.equal(layer(x), before)


def test_masked_conv_ignores_masked_nan() -> None:
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="reflect")
    mask = torch.rand(6, 3, 3, 3) > 0.5
    layer = MaskedConv2d.from_conv(conv, mask)
    x = torch.randn(2, 3, 9, 9)
    expected = copy.deepcopy(conv)
    with torch.no_grad():
        expected.weight.masked_fill_(~mask, 0.0)
        reference = expected(x)
        conv.weight.masked_fill_(~mask, float("nan"))
    torch.testing.assert_close(layer(x), reference)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[~mask].any()


def test_masks_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MaskedLinear: mask must have weight's shape \(4, 8\)"):
        MaskedLinear.from_linear(nn.Linear(8, 4), torch.ones(8, 4, dtype=torch.bool))


def test_sparse_linear_trains_like_the_masked_layer() -> None:
    linear = pruned()
    sparse, masked = SparseLinear.from_linear(linear), MaskedLinear.from_linear(linear)
    x, target = torch.randn(10, 64), torch.randn(10, 48)
    for layer in (sparse, masked):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), masked(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        sparse.to_linear().weight, masked.to_linear().weight, rtol=1e-4, atol=1e-5
    )


def test_sparse_linear_saves_and_loads(tmp_path: Path) -> None:
    a, b = SparseLinear.from_linear(pruned()), None
    save_file(a.state_dict(), tmp_path / "layer.safetensors")
    b = SparseLinear.from_linear(a.to_linear())
    with torch.no_grad():
        b.values.zero_()
    b.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


def test_sparse_linear_follows_changed_values_and_dtype() -> None:
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        layer.values.mul_(2.0)
        torch.testing.assert_close(
            layer(x) - layer.bias, 2.0 * (before - layer.bias), rtol=1e-5, atol=1e-5
        )
        wide = layer.double()
        assert wide(x.double()).dtype == torch.float64


def test_sparse_linear_compiles_and_exports() -> None:
    layer, x = SparseLinear.from_linear(pruned()).eval(), torch.randn(3, 64)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x), expected)


def test_to_sparse_reports_every_linear_layer() -> None:
    net = nn.Sequential(pruned(512, 512, 0.95), nn.ReLU(), nn.Linear(512, 8))
    x = torch.randn(64, 512)
    with torch.no_grad():
        expected = net(x)
        rows = to_sparse(net, example_batch=x)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert [r.name for r in rows] == ["0", "2"]
    assert rows[0].packed
    assert isinstance(net[0], SparseLinear)
    assert rows[0].bytes_after < rows[0].bytes_before
    assert set(rows[0].speedups) == {64}
    assert not rows[1].packed
    assert "below 30.0%" in rows[1].reason
    assert "left" in str(rows[1])
    to_dense(net)
    assert type(net[0]) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_to_sparse_leaves_shared_weights_alone() -> None:
    net = nn.ModuleDict({"a": pruned(512, 512, 0.95), "b": nn.Linear(512, 512)})
    net["b"].weight = net["a"].weight
    rows = to_sparse(net)
    assert not any(r.packed for r in rows)
    assert "shared" in rows[0].reason


def test_to_sparse_refuses_nonsense() -> None:
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"min_sparsity must lie in \[0, 1\]"):
            to_sparse(nn.Sequential(pruned()), min_sparsity=value)
    with pytest.raises(ValueError, match=r"use sapwood\.nn\.SparseLinear\.from_linear"):
        to_sparse(pruned())

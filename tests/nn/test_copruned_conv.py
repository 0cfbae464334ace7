"""CoPrunedConv2d and CoPrunedConvLSTMCell: values, packed weights that follow changes, states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sapwood.nn
from sapwood import ops

MASK = torch.tensor([[[True, False], [False, True]]])


def layer() -> sapwood.nn.CoPrunedConv2d:
    return sapwood.nn.CoPrunedConv2d(16, 32, 3, padding=1, filter_group=8)


def test_forward_is_that_of_the_op() -> None:
    conv, x = layer(), torch.randn(1, 16, 12, 12)
    filters = torch.tensor([[True, False, True, True]])
    expected = ops.copruned_conv2d(
        x, conv.weight, conv.bias, MASK, filters, padding=1, filter_group=8, activation="relu"
    )
    assert torch.equal(conv(x, MASK, filters, activation="relu"), expected)
    with torch.no_grad():
        assert torch.equal(conv(x, MASK, filters, activation="relu"), expected)
    dense = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), dense, rtol=1e-4, atol=1e-5)


def test_packed_weight_follows_every_change() -> None:
    conv, x = layer(), torch.randn(1, 16, 12, 12)

    def agree() -> None:
        with torch.no_grad():
            packed = conv(x, MASK)
        assert torch.equal(packed, conv(x, MASK))

    agree()
    optimizer = torch.optim.SGD(conv.parameters(), 0.1)
    conv(x, MASK).sum().backward()
    optimizer.step()
    agree()
    conv.load_state_dict(layer().state_dict())
    agree()
    with torch.no_grad():
        conv.weight.mul_(2)
    agree()
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))
    agree()
    conv.double()
    x = x.double()
    agree()


def test_packed_weight_is_made_once() -> None:
    conv, x = layer(), torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        conv(x, MASK)
        first = conv._packed(conv.weight)
        conv(x, MASK)
        assert conv._packed(conv.weight) is first
    assert torch.equal(first, conv.weight)


def test_from_conv_shares_parameters_and_state_dicts_match() -> None:
    conv = nn.Conv2d(16, 32, 3, stride=2, padding=1, dilation=2)
    shared = sapwood.nn.CoPrunedConv2d.from_conv(conv)
    assert shared.weight is conv.weight
    assert list(shared.state_dict()) == list(conv.state_dict())
    x = torch.randn(1, 16, 12, 12)
    torch.testing.assert_close(shared(x), conv(x), rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(shared)
    assert torch.equal(twin(x), shared(x))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(padding: str) -> None:
    conv = nn.Conv2d(16, 16, 5, padding=padding)
    shared, x = sapwood.nn.CoPrunedConv2d.from_conv(conv), torch.randn(1, 16, 12, 12)
    torch.testing.assert_close(shared(x), conv(x), rtol=1e-4, atol=1e-5)


def test_other_padding_is_refused() -> None:
    with pytest.raises(NotImplementedError) as raised:
        sapwood.nn.CoPrunedConv2d(16, 16, 3, padding=1, padding_mode="reflect")
    assert str(raised.value) == (
        "sapwood.CoPrunedConv2d: padding_mode must be 'zeros', got 'reflect'"
    )


def test_lstm_cell() -> None:
    cell = sapwood.nn.CoPrunedConvLSTMCell(4, 16, 3, filter_group=8)
    x, zeros = torch.randn(1, 4, 12, 12), torch.zeros(1, 16, 12, 12)
    weights = (cell.weight_x, cell.weight_h, cell.bias)
    expected = ops.copruned_conv_lstm_step(x, zeros, zeros, *weights, MASK, filter_group=8)
    found = cell(x, None, MASK)
    again = cell(x, (zeros, zeros), MASK)
    for a, b, e in zip(found, again, expected, strict=True):
        assert torch.equal(a, e)
        assert torch.equal(b, e)
    assert cell.bias is not None
    assert float(cell.bias[16:32].detach().mean()) > 0.8
    assert not bool(found[0][:, :, :8, 8:].any())
    with torch.no_grad():
        for a, e in zip(cell(x, None, MASK), expected, strict=True):
            assert torch.equal(a, e)
    assert sapwood.nn.CoPrunedConvLSTMCell(4, 16, 3, bias=False).bias is None
    with pytest.raises(ValueError) as raised:
        sapwood.nn.CoPrunedConvLSTMCell(4, 16, 4)
    message = "sapwood.CoPrunedConvLSTMCell: kernel_size must be odd, got 4"
    assert str(raised.value) == message

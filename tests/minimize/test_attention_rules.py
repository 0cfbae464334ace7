"""Dimensions of scores and values, heads, shared keys, and the layouts that are recognised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import AttentionCall, RaggedAttention, load, minimize, save
from tests.minimize.models import GroupedAttention
from tests.minimize.planting import dead, largest_difference, minimized, prepared, random

WIDTH, HEADS, DIM = 12, 3, 4


class Fused(nn.Module):
    """One projection, heads outermost in the order q, k, v."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias), nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.out(y.transpose(1, 2).reshape(n, t, WIDTH))
        return projected


class ByHand(nn.Module):
    """Softmax written out, a causal mask, the three projections interleaved per head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("hidden", torch.ones(9, 9).triu(1) == 1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, HEADS, 3, DIM).permute(3, 0, 2, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / DIM**0.5
        scores = scores.masked_fill(self.hidden[:t, :t], float("-inf"))
        y = scores.softmax(-1) @ v
        projected: Tensor = self.out(y.transpose(1, 2).contiguous().view(n, t, WIDTH))
        return projected


class Separate(nn.Module):
    """Three projections and a returned tuple, as in Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.out(y.transpose(1, 2).flatten(2)), None


class Holder(nn.Module):
    """A layer in front, so that the channels of the stream are known, and one behind."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.before, self.attention = nn.Linear(5, WIDTH), attention
        self.after = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.before(x))
        logits: Tensor = self.after(y[0] if isinstance(y, tuple) else y)
        return logits


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x, x, x)[0]
        return output


def fused() -> Holder:
    model = prepared(Holder(Fused()))
    assert isinstance(model, Holder)
    return model


def ragged(model: nn.Module) -> RaggedAttention:
    (found,) = [module for module in model.modules() if isinstance(module, RaggedAttention)]
    return found


def rows(role: str, head: int, *dims: int) -> list[int]:
    """Rows of the fused projection."""
    return ["qkv".index(role) * WIDTH + head * DIM + d for d in dims]


def silence(model: nn.Module, role: str, dims: list[int], bias: float = 0.0) -> None:
    """Makes dimensions of every head a constant."""
    for head in range(HEADS):
        dead(model.attention.qkv, rows(role, head, *dims), bias=bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [Fused, ByHand, Separate, Packed, lambda: Fused(bias=False)],
    ids=["fused", "by hand", "separate", "packed", "no bias"],
)
def test_layouts(make: Callable[[], nn.Module]) -> None:
    """A removed stream channel, on both sides, in every layout."""
    model = prepared(Holder(make()))
    dead(model.before, 3, bias=0.6)
    model.after.weight.data[:, 5] = 0.0
    small, report = minimized(model, random(3, 6, 5))
    found = ragged(small)
    assert found.q_proj.in_features == found.out_proj.out_features == WIDTH - 1
    assert not [r for r in report.refusals if r.channels]
    assert largest_difference(model, small, random(2, 9, 5)) <= 1e-9


@pytest.mark.parametrize("bias", [0.0, 0.8])
def test_constant_keys_go(bias: float) -> None:
    model = fused()
    silence(model, "k", [1, 2], bias)
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).qk_width == 2
    assert ragged(small).scale == DIM**-0.5


def test_zero_queries_go() -> None:
    model = fused()
    silence(model, "q", [0])
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).qk_width == 3


def test_constant_queries_become_one() -> None:
    model = fused()
    silence(model, "q", [0, 2, 3], bias=0.7)
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).qk_width == 2


def test_no_scores_left_is_the_average() -> None:
    model = fused()
    silence(model, "q", [0, 1, 2, 3])
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).qk_width == 1


@pytest.mark.parametrize("bias", [0.0, -0.9])
def test_constant_values_fold_into_the_output_bias(bias: float) -> None:
    model = fused()
    silence(model, "v", [3], bias)
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).v_width == 3


def test_values_that_nobody_reads_go() -> None:
    model = fused()
    for head in range(HEADS):
        model.attention.out.weight.data[:, head * DIM + 1] = 0.0
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).v_width == 3


def test_a_head_without_values_goes() -> None:
    model = fused()
    dead(model.attention.qkv, rows("v", 1, 0, 1), bias=0.4)  # type: ignore[arg-type]
    model.attention.out.weight.data[:, [DIM + 2, DIM + 3]] = 0.0
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).heads == 2


def test_heads_of_different_widths_are_padded() -> None:
    model = fused()
    dead(model.attention.qkv, rows("v", 0, 0, 1), bias=0.4)  # type: ignore[arg-type]
    dead(model.attention.qkv, rows("v", 1, 3), bias=0.4)  # type: ignore[arg-type]
    dead(model.attention.qkv, rows("v", 2, 3), bias=0.4)  # type: ignore[arg-type]
    small, _ = minimized(model, random(3, 6, 5))
    assert ragged(small).v_width == 3
    _, report = minimize(small, random(3, 6, 5))
    assert report.plan.edits == []


def test_widths_are_rounded_up_within_the_old_ones() -> None:
    model = fused()
    silence(model, "k", [1, 2, 3])
    silence(model, "v", [3])
    small, _ = minimized(model, random(3, 6, 5), round_to=2)
    assert (ragged(small).qk_width, ragged(small).v_width) == (2, 4)


def test_shared_keys_go_only_for_all_their_heads() -> None:
    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.Linear(5, 8), GroupedAttention(8, 4, 2), nn.Linear(8, 3)))
    attention = model[1]
    for head in range(4):
        dead(attention.q, head * 2)  # dimension 0 of every query
    dead(attention.v, 1)  # dimension 1 of the first shared value
    dead(attention.v, 3)
    small, _ = minimized(model, random(3, 6, 5))
    assert (ragged(small).qk_width, ragged(small).v_width) == (1, 1)
    assert (ragged(small).heads, ragged(small).kv_heads) == (4, 2)


def test_shared_keys_of_some_heads_stay() -> None:
    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.Linear(5, 8), GroupedAttention(8, 4, 2), nn.Linear(8, 3)))
    dead(model[1].q, 0)
    dead(model[1].q, 4)
    _, report = minimize(model, random(3, 6, 5))
    assert report.plan.edits == []


def test_masks_keep_constant_values() -> None:
    """A row whose keys are all hidden has no weights that add up to one."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            output: Tensor = self.inner(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
            return output

    model = prepared(Masked())
    rows_of_v = [2 * WIDTH + head * DIM for head in range(HEADS)]
    model.inner.in_proj_weight.data[rows_of_v] = 0.0
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[:, 4:] = True
    model.inner.in_proj_bias.data[rows_of_v] = 0.5
    _, report = minimize(model, (random(2, 5, WIDTH), hidden))
    assert report.plan.edits == []
    model.inner.in_proj_bias.data[rows_of_v] = 0.0
    small, _ = minimize(model, (random(2, 5, WIDTH), hidden))
    assert ragged(small).v_width == 3
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, 2:] = True
    a, b = model(random(2, 5, WIDTH), hidden), small(random(2, 5, WIDTH), hidden)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_cross_attention() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.a, self.b = nn.Linear(5, WIDTH), nn.Linear(6, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            context = self.b(y)
            output: Tensor = self.inner(self.a(x), context, context)[0]
            return output

    model = prepared(Cross())
    dead(model.a, 2, bias=0.4)
    dead(model.b, [1, 3], bias=-0.4)  # type: ignore[arg-type]
    small, _ = minimize(model, (random(2, 5, 5), random(2, 7, 6)))
    found = ragged(small)
    widths = found.q_proj.in_features, found.k_proj.in_features, found.v_proj.in_features
    assert widths == (WIDTH - 1, WIDTH - 2, WIDTH - 2)


def test_a_replaced_module_takes_no_new_masks() -> None:
    model = prepared(Holder(Separate()))
    dead(model.before, 3, bias=0.6)
    small, _ = minimize(model, random(3, 6, 5))
    call = small.attention
    assert isinstance(call, AttentionCall)
    y = random(2, 6, WIDTH - 1)
    assert call(y)[1] is None
    with pytest.raises(ValueError, match=r"sapwood.minimize.AttentionCall: module must be called"):
        call(y, torch.zeros(6, 6))


def test_files_hold_the_call(tmp_path: Path) -> None:
    model = prepared(Holder(ByHand()))
    dead(model.before, 3, bias=0.6)
    small, _ = minimize(model, random(3, 6, 5))
    save(small, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", lambda: Holder(ByHand()))
    assert torch.equal(again(random(2, 4, 5)), small(random(2, 4, 5)))

"""What must not be rewritten: refused with its reason, and not a bit of the output changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import minimize
from tests.minimize.planting import Net, chain, dead, kept, prepared, random, refusals, unread


def refuses(model: nn.Module, x: Tensor, reason: str) -> None:
    """Nothing is cut, the reason is given, and the outputs are the same bits."""
    small, report = minimize(model, x)
    assert report.plan.edits == []
    assert reason in refusals(report)
    assert torch.equal(model(x), small(x))
    assert report.parameters_after == report.parameters_before


def test_batch_norm_in_training_mode() -> None:
    model = chain(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    dead(model[0], 1)
    model[1].train()
    refuses(model, random(2, 2, 4, 4), "uses the statistics of the batch")


def test_dropout_in_training_mode() -> None:
    model = chain(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    dead(model[0], 1, bias=0.5)
    model[1].train()
    torch.manual_seed(0)
    _, report = minimize(model, random(5, 4), verify=False)
    assert report.plan.edits == []
    assert "0: 3 channels stay" in refusals(report)


def test_one_layer_called_twice() -> None:
    model = prepared(
        Net(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    )
    unread(model.b, 1)
    refuses(model, random(5, 4), "shared by 2 operations")


def test_tied_embeddings() -> None:
    model = prepared(
        Net(lambda m, x: m.head(m.table(x)), table=nn.Embedding(7, 4), head=nn.Linear(4, 7))
    )
    model.head.weight = model.table.weight
    model.table.weight.data[:, 1] = 0.0
    refuses(model, torch.randint(0, 7, (2, 3)), "shared by 2 operations")


def test_a_weight_that_is_computed() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    model.requires_grad_(True)
    unread(model[2], 1)
    refuses(model, random(5, 4), "the weight is computed, not a parameter")


def test_a_weight_that_is_not_finite() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[0, 0] = float("inf")
    unread(model[2], 1)
    small, report = minimize(model, random(5, 4))
    assert "is not finite" in refusals(report)
    assert kept(report, "2") == [0, 1]
    assert small[0].out_features == 3  # type: ignore[index]


def test_a_hard_coded_width() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x)).view(-1, 2 * 3)[:, :6])

    model = prepared(Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2)))
    unread(model.b, 1)
    refuses(model, random(5, 4), "code does not follow a smaller width")


def test_a_width_in_the_arithmetic() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(y * y.shape[-1] ** -0.5)

    model = prepared(Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2)))
    unread(model.b, 1)
    refuses(model, random(5, 4), "code depends on the width")


def test_only_the_group_with_the_hard_coded_width_stays() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(F.relu(m.b(F.relu(m.a(x)).view(-1, 6))))

    model = prepared(Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 5), c=nn.Linear(5, 2)))
    unread(model.b, 1)
    unread(model.c, 1)
    _, report = minimize(model, random(5, 4))
    assert kept(report, "a") == [0, 1, 2, 3, 4, 5]
    assert kept(report, "b") == [0, 2, 3, 4]


def test_channels_picked_by_number() -> None:
    model = prepared(
        Net(lambda m, x: m.b(F.relu(m.a(x))[:, :4]), a=nn.Linear(4, 6), b=nn.Linear(4, 2))
    )
    unread(model.b, 1)
    refuses(model, random(5, 4), "picks channels by fixed numbers")


def test_uneven_splits() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        left, right = F.relu(m.a(x)).split([4, 2], 1)
        return m.b(left) + m.c(right)

    model = prepared(Net(forward, a=nn.Linear(4, 6), b=nn.Linear(4, 2), c=nn.Linear(2, 2)))
    unread(model.b, 1)
    refuses(model, random(5, 4), "picks channels by fixed numbers")


@pytest.mark.parametrize("joint", ["softmax", "mean", "handmade norm", "sort"])
def test_joint_operations_over_channels(joint: str) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda y: y.softmax(-1),
        "mean": lambda y: y - y.mean(-1, keepdim=True),
        "handmade norm": lambda y: y / (y.var(-1, keepdim=True) + 1e-5).sqrt(),
        "sort": lambda y: y.sort(-1).values,
    }
    model = prepared(
        Net(lambda m, x: m.b(functions[joint](m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    )
    unread(model.b, 1)
    dead(model.a, 2, bias=0.3)
    small, report = minimize(model, random(5, 4))
    assert kept(report, "a") == list(range(6))
    assert torch.equal(model(random(5, 4)), small(random(5, 4)))


def test_a_hook_that_reads_activations() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    unread(model[2], 1)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda m, args, output: seen.append(output))
    refuses(model, random(5, 4), "1 is read by a hook")


def test_a_feature_that_the_caller_keeps() -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    unread(model[2], 1)
    _, report = minimize(model, random(5, 4), keep=["1"])
    assert kept(report, "0") == [0, 1, 2]
    assert "1 is kept as asked" in refusals(report)


def test_an_output_in_the_middle() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return {"features": y, "logits": m.b(y)}  # type: ignore[return-value]

    model = prepared(Net(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 2)))
    unread(model.b, 1)
    small, report = minimize(model, random(5, 4))
    assert report.plan.edits == []
    for key in ("features", "logits"):
        assert torch.equal(model(random(5, 4))[key], small(random(5, 4))[key])


class Rotary(nn.Module):
    """Attention with rotary positions on queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        angle = torch.arange(t, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        cos, sin = angle.cos(), angle.sin()

        def turned(y: Tensor) -> Tensor:
            a, b = y[..., :2], y[..., 2:]
            return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

        y = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return self.out(y.transpose(1, 2).reshape(n, t, 8))


class Normalised(nn.Module):
    """Attention whose queries and keys are normalised together over a head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return self.out(y.transpose(1, 2).reshape(n, t, 8))


class Packed(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Rotary(), "not straight from linear layers"),
        (Normalised(), "not straight from linear layers"),
        (Packed(add_zero_attn=True), "adds keys of its own"),
        (Packed(add_bias_kv=True), "adds keys of its own"),
    ],
    ids=["rotary", "normalised", "zero key", "bias key"],
)
def test_attention_that_is_more_than_attention(model: nn.Module, reason: str) -> None:
    """A constant key dimension shifts all scores alike only in plain attention."""
    model = prepared(model)
    if isinstance(model, Packed):
        model.attention.in_proj_weight.data[8:10] = 0.0
        model.attention.in_proj_bias.data[8:10] = 0.5
    else:
        dead(model.qkv, slice(8, 10), bias=0.5)  # type: ignore[arg-type]
    refuses(model, random(2, 5, 8), reason)


def test_attention_weights_that_are_used() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        output, weights = m.attention(x, x, x)
        return output * weights.mean()

    model = prepared(Net(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True)))
    model.attention.in_proj_weight.data[8:10] = 0.0
    refuses(model, random(2, 5, 8), "its weights are used")


def test_attention_inlined_in_a_larger_module() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + m.o(y.transpose(1, 2).reshape(n, t, 8))

    model = prepared(Net(forward, **{name: nn.Linear(8, 8) for name in "qkvo"}))
    dead(model.k, 1)
    refuses(model, random(2, 5, 8), "one module with the rest of the network")

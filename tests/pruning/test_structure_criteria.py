"""Activation and group scores: values by hand, what is followed through a network, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.minimize import InputSelect, OutputScatter
from sapwood.models import ResNet, build
from sapwood.models.vit import Attention
from sapwood.pruning import (
    ActivationMagnitude,
    Criterion,
    Cubic,
    GroupScore,
    Magnitude,
    MaskSet,
    Pruner,
    prune,
)
from sapwood.pruning._units import Observation, observe
from sapwood.pruning.structure_criteria import unit_strengths
from tests.minimize.models import CASES


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean(0).sqrt()


def seen(model: nn.Module, x: Tensor) -> Observation:
    weights = {n: p for n, p in model.named_parameters() if n in MaskSet.dense(model)}
    return observe(model.eval(), x, weights)


def test_activation_magnitude_of_a_perceptron() -> None:
    model, x = perceptron(), seeded(32, 6).double()
    scores = ActivationMagnitude(x).scores(model, MaskSet.dense(model))
    hidden = F.relu(model[0](x))
    for name, inputs in (("0.weight", x), ("2.weight", hidden)):
        weight = model.get_parameter(name).detach()
        torch.testing.assert_close(scores[name], weight.abs() * rms(inputs), rtol=1e-6, atol=0)
        assert scores[name].dtype == torch.float64


def test_activation_magnitude_of_a_grouped_convolution() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1, groups=2), seeded(8, 4, 5, 5)
    scores = ActivationMagnitude(x).scores(conv, MaskSet.dense(conv))["weight"]
    size = x.square().mean((0, 2, 3)).sqrt()
    expected = conv.weight.detach().abs()
    for row in range(6):
        for column in range(2):
            expected[row, column] *= size[2 * (row // 3) + column]
    torch.testing.assert_close(scores, expected)


def group_score_by_hand(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    first, second = (model.get_parameter(n).detach() for n in ("0.weight", "2.weight"))
    a = [first.abs() * rms(x), second.abs() * rms(F.relu(model[0](x)))]
    hidden = a[0].norm(dim=1) * a[1].norm(dim=0)
    inputs = a[0].norm(dim=0)
    hidden, inputs = hidden / hidden.max(), inputs / inputs.max()
    scale = [part.square().mean().sqrt() for part in a]
    return {
        "0.weight": a[0] / scale[0] * (hidden[:, None] * inputs[None]).sqrt(),
        "2.weight": a[1] / scale[1] * hidden[None].sqrt(),  # outputs count as strong
    }


def test_group_score_of_a_perceptron() -> None:
    model, x = perceptron(), seeded(32, 6).double()
    scores = GroupScore(x).scores(model, MaskSet.dense(model))
    for name, expected in group_score_by_hand(model, x).items():
        torch.testing.assert_close(scores[name], expected.detach(), rtol=1e-5, atol=0)


def test_a_unit_that_nobody_reads_scores_zero() -> None:
    model, x = perceptron(), seeded(32, 6).double()
    model[2].weight.data[:, 3] = 0.0
    scores = GroupScore(x).scores(model, MaskSet.dense(model))
    assert not scores["0.weight"][3].any()
    assert (scores["0.weight"][[0, 1, 2, 4]] > 0).any(1).all()


def test_groups_empty_units_where_magnitude_does_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.1)
    x = seeded(128, 64)

    def alive(criterion: Criterion) -> int:
        """Units that are written and read after cutting in steps, as a schedule does."""
        network = copy.deepcopy(model)
        masks = MaskSet.dense(network)
        for sparsity in (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9):
            masks = prune(network, sparsity, criterion, masks=masks)
        return int((masks["0.weight"].any(1) & masks["2.weight"].any(0)).sum())

    assert alive(GroupScore(x)) < 0.6 * alive(Magnitude())


class Stream(nn.Module):
    """Two branches write one stream; concatenation, a slice, flatten and a permutation read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.wide = nn.Conv2d(8, 6, 1)
        self.rows = nn.Linear(4, 5)
        self.flat = nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.stem(x)
        stream = stream + F.relu(self.norm(self.branch(stream)))
        both = torch.cat((F.max_pool2d(stream, 2), F.avg_pool2d(stream, 2)), 1)
        flat = self.flat(self.wide(both).flatten(1))
        return flat, self.rows(stream.permute(0, 2, 3, 1)[:, 0])


def test_units_are_followed_through_a_network() -> None:
    found = {layer.name: layer for layer in seen(Stream(), seeded(2, 3, 4, 4)).layers}
    stem, branch, wide, rows, flat = (
        found[f"{name}.weight"] for name in ("stem", "branch", "wide", "rows", "flat")
    )
    assert torch.equal(stem.writes, branch.reads)
    assert torch.equal(branch.writes, stem.writes)  # the addition joins them
    assert torch.equal(wide.reads, torch.cat((stem.writes, stem.writes)))
    assert torch.equal(rows.reads, stem.writes)
    assert torch.equal(flat.reads, wide.writes.repeat_interleave(4))
    assert len({*stem.writes.tolist()} & {*wide.writes.tolist()}) == 0


def test_attention_pairs_queries_with_keys_and_hands_on_values() -> None:
    model = build("vit_micro", (1, 16, 16), 10)
    observation = seen(model, seeded(2, 256))
    found = {layer.name: layer for layer in observation.layers}
    q, k, v = found["blocks.0.attention.qkv.weight"].writes.view(3, 64)
    assert len(observation.scores) == len(observation.values) == 4
    assert all(
        torch.equal(a, b.view(4, 16)) for a, b in zip(observation.scores[0], (q, k), strict=True)
    )
    assert torch.equal(observation.values[0], v.view(4, 16))
    assert torch.equal(found["blocks.0.attention.out.weight"].reads, v)
    stream = found["blocks.0.project.weight"].writes
    assert torch.equal(stream, found["blocks.3.project.weight"].writes)
    assert torch.equal(stream, found["embed.weight"].writes)
    assert torch.equal(stream, found["blocks.0.attention.qkv.weight"].reads)  # past the class token


def test_channels_are_not_joined_with_tokens() -> None:
    """In an MLP-Mixer a branch over tokens is added to the stream, whose channels stay apart."""
    case = CASES["mixer"]
    model, x = case.make(dtype=torch.float32), case.inputs(2).float()
    weights = {n: p for n, p in model.named_parameters() if n in MaskSet.dense(model)}
    found = {layer.name: layer for layer in observe(model, x, weights).layers}
    stream = found["embed.weight"].writes
    assert len(stream.unique()) == 10
    for name in ("blocks.0.channels.0.weight", "blocks.1.channels.0.weight", "head.weight"):
        assert torch.equal(found[name].reads, stream)
    assert bool((found["blocks.0.mix.0.weight"].reads == -1).all())  # every channel meets it


def test_embeddings_write_a_stream_and_shared_heads_are_followed() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.shared, self.back = nn.Linear(6, 2), nn.Linear(4, 6)

        def forward(self, ids: Tensor) -> Tensor:
            x: Tensor = self.embed(ids)
            y: Tensor = self.back(self.shared(x).repeat_interleave(2, 2))
            return x + y

    model = Tokens()
    ids = torch.randint(7, (3, 5))
    weights = {n: p for n, p in model.named_parameters() if n in MaskSet.dense(model)}
    found = {layer.name: layer for layer in observe(model, ids, weights).layers}
    shared, back = found["shared.weight"], found["back.weight"]
    assert torch.equal(shared.reads, back.writes)
    assert torch.equal(back.reads, shared.writes.repeat_interleave(2))


@pytest.mark.parametrize("bias", [True, False])
def test_narrow_layers_meet_the_channels_of_the_stream(bias: bool) -> None:
    """Layers that read or write few channels of a stream, as minimization leaves them."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
            select, layer = InputSelect(torch.tensor([1, 4])), nn.Linear(2, 3, bias=False)
            scatter = OutputScatter(torch.tensor([5, 0, 2]), 6, bias=bias)
            self.branch = nn.Sequential(select, layer, scatter)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            z: Tensor = self.head(y + self.branch(y))
            return z

    model = Narrow()
    found = {layer.name: layer for layer in seen(model, seeded(4, 3)).layers}
    stream = found["stem.weight"].writes
    assert len(stream.unique()) == 6
    assert torch.equal(found["branch.1.weight"].reads, stream[[1, 4]])
    assert torch.equal(found["branch.1.weight"].writes, stream[[5, 0, 2]])
    assert torch.equal(found["head.weight"].reads, stream)


def test_values_are_not_compared_with_queries() -> None:
    """Queries meet keys and have no reader; the strongest value of a layer still counts fully."""
    model, x = build("vit_micro", (1, 16, 16), 10), seeded(2, 256)
    masks = MaskSet.dense(model)
    name, out = "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"
    before = GroupScore(x).scores(model, masks)[name][128:].max()
    model.get_parameter(out).data *= 1e-3  # all values become weak readers' units alike
    after = GroupScore(x).scores(model, masks)[name][128:].max()
    torch.testing.assert_close(after, before, rtol=0.1, atol=0)  # 1e-3 to the half, if compared


def test_attention_of_torch_is_seen_too() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    masks = MaskSet.dense(model, include=["self_attn.in_proj_weight", *MaskSet.dense(model)])
    x = seeded(4, 5, 8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = GroupScore(x).scores(model, masks)
    assert set(scores) == set(masks)
    attended: list[Tensor] = []
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    plain.load_state_dict(model.self_attn.state_dict())
    plain.out_proj.weight.data, plain.out_proj.bias.data = torch.eye(8), torch.zeros(8)
    attended.append(plain(x, x, x)[0].detach().flatten(0, 1))
    expected = model.self_attn.out_proj.weight.detach().abs() * rms(attended[0]).float()
    found = ActivationMagnitude(x).scores(model, masks)["self_attn.out_proj.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


class HandWritten(nn.Module):
    """Softmax and products instead of the fused operation."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = attention.heads, attention.qkv, attention.out

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1)
        y: Tensor = self.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        return y


def of_torch(attention: Attention) -> nn.Module:
    """The same as a module of torch, behind a layer that makes it no first layer."""
    layer = nn.TransformerEncoderLayer(16, 4, 16, dropout=0.0, batch_first=True)
    layer.self_attn.in_proj_weight.data = attention.qkv.weight.data.clone()
    layer.self_attn.out_proj.weight.data = attention.out.weight.data.clone()
    return layer


@pytest.mark.parametrize(
    "form", [lambda a: a, HandWritten, of_torch], ids=["fused", "hand", "torch"]
)
def test_a_weak_head_empties_first(form: Callable[[Attention], nn.Module]) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 4)
    qkv = attention.qkv.weight.data.view(3, 4, 4, 16)
    qkv[:, 2] *= 0.6  # as a whole: every single dimension is about as strong as others
    model = form(attention)
    name = next(n for n, p in model.named_parameters() if p.shape == (48, 16))
    masks = prune(model, 0.7, GroupScore(seeded(8, 5, 16)), include=[name])
    left = masks[name].view(3, 4, 4, 16).flatten(2).float().mean(2)  # (q k v, heads)
    assert bool((left[:, 2] < 0.05).all())
    assert bool((left[:, [0, 1, 3]] > 0.1).all())


def test_a_query_is_as_strong_as_its_key() -> None:
    torch.manual_seed(0)
    model, x = Attention(8, 2).double(), seeded(4, 5, 8).double()
    weights = {"qkv.weight": model.qkv.weight, "out.weight": model.out.weight}
    found = observe(model, x, weights)
    ((q, k),), (values,) = found.scores, found.values
    rows = (model.qkv.weight * rms(x.flatten(0, 1))).norm(dim=1).view(3, 2, 4)
    met = rows[0] * rows[1]
    strength = unit_strengths(found, weights)
    for ids in (q, k):
        torch.testing.assert_close(
            strength[ids], met * met.mean(1, keepdim=True), rtol=1e-5, atol=0
        )
    assert values.shape == (2, 4)


def test_a_layer_scale_is_a_layer_of_its_own() -> None:
    model = build("convnext_micro", (1, 16, 16), 10)
    names = [*MaskSet.dense(model), "stages.0.0.scale"]
    masks = MaskSet.dense(model, include=names)
    scores = GroupScore(seeded(4, 256)).scores(model, masks)
    assert scores["stages.0.0.scale"].shape == (32,)
    assert (scores["stages.0.0.scale"] > 0).all()


@pytest.mark.parametrize("name", ["lenet300", "small_cnn", "resnet20", "vgg_like"])
def test_every_weight_of_the_networks_gets_a_score(name: str) -> None:
    model, x = build(name, (3, 16, 16), 10), seeded(4, 3, 16, 16)
    masks = MaskSet.dense(model)
    scores = GroupScore(x).scores(model, masks)
    assert {n: s.shape for n, s in scores.items()} == {n: m.shape for n, m in masks.items()}
    assert all(torch.isfinite(score).all() and (score > 0).any() for score in scores.values())


def test_the_model_is_left_as_it_was() -> None:
    model = ResNet((3, 8, 8), 10, widths=(4, 6), depths=(1, 1), option="B").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.bn1.eval()
    state = torch.get_rng_state()
    GroupScore(seeded(4, 3, 8, 8)).scores(model, MaskSet.dense(model))
    assert model.training
    assert not model.bn1.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_batches_are_joined_and_targets_ignored() -> None:
    model, x = perceptron(), seeded(32, 6).double()
    masks = MaskSet.dense(model)
    whole = GroupScore(x).scores(model, masks)
    pairs = [(x[:10], torch.zeros(10)), (x[10:], torch.zeros(22))]
    for batch in ((x, torch.zeros(32)), pairs):
        found = GroupScore().scores(model, masks, batch)
        assert all(torch.equal(found[name], whole[name]) for name in masks)


def test_with_inputs_a_pruner_may_be_attached() -> None:
    model, x = perceptron(), seeded(32, 6).double()
    assert GroupScore().needs_data
    assert not GroupScore(x).needs_data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, Cubic(0.5, t1=4, every=2), GroupScore(x)).attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert pruner.masks.check(model) == []
    kept = sum(kept for kept, _ in pruner.masks.counts().values())
    assert kept == 45 - 22


def test_by_name() -> None:
    model, x = perceptron(), seeded(8, 6).double()
    batch = x, torch.zeros(8)
    for name, cls in (("group", GroupScore), ("activation", ActivationMagnitude)):
        by_name = prune(copy.deepcopy(model), 0.5, name, batch=batch)
        assert by_name == prune(copy.deepcopy(model), 0.5, cls(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GroupScore().scores(perceptron(), MaskSet.dense(perceptron())),
            "GroupScore.scores: batch must be given, got None",
        ),
        (
            lambda: GroupScore(seeded(4, 6).double()).scores(
                model := nn.Sequential(perceptron(), nn.LayerNorm(3).double()),
                MaskSet.dense(model, include=["1.weight"]),
            ),
            "masks must name weights of layers that run, got 1.weight, which was not seen as one",
        ),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

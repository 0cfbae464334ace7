"""What a minimization holds while it runs, and that nothing it returns shares memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.profiler import ProfilerActivity, profile

from sapwood.minimize import Plan, RaggedAttention, analyze, minimize
from sapwood.minimize._masks import duplicate, materialised, separate
from sapwood.minimize.surgery import operate
from sapwood.models import ConvNeXt, ViT
from sapwood.nn import MaskedLinear
from tests.minimize.planting import Net, chain, dead, kept, random, unread


def peak(call: Callable[[], object]) -> int:
    """Bytes of tensors alive at once beyond those before, by torch's own count of allocations."""
    gc.collect()
    gc.disable()  # whatever a collection would free at some time or other counts as alive
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    finally:
        gc.enable()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((e.start_ns(), i) for i, e in enumerate(events) if e.name() == "[memory]")
    return max(accumulate((events[i].nbytes() for _, i in memory), initial=0))


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything that must not change in a model."""
    return {
        name: (t.data_ptr(), t._version, t.dtype, t.requires_grad, t.detach().clone())
        for name, t in tensors(model)
    }


def same(one: dict[str, tuple[Any, ...]], other: dict[str, tuple[Any, ...]]) -> bool:
    return one.keys() == other.keys() and all(
        a[:-1] == b[:-1] and torch.equal(a[-1], b[-1])
        for a, b in zip(one.values(), other.values(), strict=True)
    )


# The peak


def deep() -> nn.Module:
    """24 equal layers, so that what is held of one of them at a time is little."""
    layers = [m for _ in range(24) for m in (nn.Linear(192, 192), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(192, 4))


def convnext() -> nn.Module:
    return ConvNeXt((3, 16, 16), 10, widths=(64, 128), depths=(4, 4), patch=4)


def vit() -> nn.Module:
    return ViT((3, 8, 8), 10, width=128, depth=8, heads=4, patch=4)


MODELS = {"deep": (deep, (192,)), "convnext": (convnext, (3, 16, 16)), "vit": (vit, (3, 8, 8))}


def masked(name: str, dtype: torch.dtype, share: float) -> tuple[nn.Module, Tensor]:
    """Half of the weights zero, and a share of all rows dead; with an input."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= torch.rand(module.weight.shape) < 0.5
                module.weight[torch.rand(len(module.weight)) < share] = 0.0
    return model, torch.randn(1, *shape, dtype=dtype)


def test_the_count_sees_a_copy_and_forgets_what_is_freed() -> None:
    model = deep()
    size = sum(p.numel() * 4 for p in model.parameters())

    def twice() -> None:
        for _ in range(2):
            copy.deepcopy(model)

    assert size <= peak(twice) < 1.1 * size


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_one_float64_model(name: str, share: float) -> None:
    """3 times the float32 model: 2 of them its float64 copy, 1/4 the masks.

    The rest is for one layer at a time, activations and attention in both forms. Without dead rows
    nothing is cut, so that the result is as large as the model.
    """
    model, x = masked(name, torch.float32, share)
    size = sum(t.numel() * t.element_size() for _, t in tensors(model))
    minimize(model, x)  # what is loaded and kept at the first call
    assert peak(lambda: minimize(model, x)) <= 3 * size


def test_the_peak_with_masks_that_are_given() -> None:
    """As above: the masked copy is gone when the float64 one is there."""
    model, x = masked("deep", torch.float32, 0.4)
    masks = {n: p != 0 for n, p in model.named_parameters() if p.dim() > 1}
    size = sum(t.numel() * t.element_size() for _, t in tensors(model))
    minimize(model, x, masks=masks)
    assert peak(lambda: minimize(model, x, masks=masks)) <= 3 * size


def test_surgery_that_consumes_does_the_same_and_frees_the_source() -> None:
    model, x = masked("convnext", torch.float64, 0.4)
    edits = analyze(model, x).edits
    expected = bits(operate(model, edits))
    small = operate(model, edits, consume=True)
    found = bits(small)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name][-1], expected[name][-1]) for name in expected)
    assert sum(p.numel() for p in model.parameters()) == 0


# Nothing is shared


class Everything(nn.Module):
    """Tied and frozen parameters, buffers of every kind, layers that are cut and that are not."""

    ahead: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight
        self.a.requires_grad_(False)
        self.register_buffer("ahead", torch.ones(1).expand(5, 11))
        self.register_buffer("places", torch.arange(5))
        self.register_buffer("rest", torch.zeros(2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(self.table(ids)))).transpose(1, 2)
        logits: Tensor = self.out(self.norm(y).transpose(1, 2))
        return logits + self.ahead + self.places[:, None]


def everything(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Everything().to(dtype).eval()
    dead(model.a, 2, bias=0.5)  # type: ignore[arg-type]
    unread(model.b, 4)  # type: ignore[arg-type]
    return model


IDS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_share_nothing_with_the_model_nor_with_each_other(dtype: torch.dtype) -> None:
    model = everything(dtype)
    before = bits(model)
    small, report = minimize(model, IDS)
    plan = Plan.from_json(report.plan.to_json())
    results = [small, plan.apply(model), plan.apply(model), minimize(model, IDS)[0]]
    for i, result in enumerate(results):
        others = [bits(other) for j, other in enumerate(results) if j != i]
        with torch.no_grad():
            for _, t in tensors(result):
                t.untyped_storage().fill_(0x41)
        assert same(before, bits(model))
        assert all(
            same(kept, bits(other))
            for kept, other in zip(others, results[:i] + results[i + 1 :], strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dense_model_is_copied_whole(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()
    before = bits(model)
    small, report = minimize(model, random(5, 4).to(dtype))
    assert not report.plan.edits
    there = {t.data_ptr() for _, t in tensors(model)}
    assert not there & {t.data_ptr() for _, t in tensors(small)}
    assert same(before, bits(model))


def test_in_place_leaves_the_old_tensors_alone() -> None:
    model = everything(torch.float32)
    old = {name: (t, t.detach().clone()) for name, t in tensors(model)}
    minimize(model, IDS, inplace=True)
    with torch.no_grad():
        for _, t in tensors(model):
            t.untyped_storage().fill_(0)
    assert all(torch.equal(t, copied) for t, copied in old.values())


def test_pruned_and_masked_layers_keep_their_weights() -> None:
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[3] = False
    for wrap in (True, False):
        model = chain(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
        if wrap:
            model[0] = MaskedLinear.from_linear(model[0], mask)  # type: ignore[arg-type]
        else:
            torch_prune.custom_from_mask(model[0], "weight", mask)
        model.eval()
        before = bits(model)
        small, report = minimize(model, random(5, 4), masks={"2.weight": torch.ones(3, 5) > 0})
        assert kept(report, "0") == [0, 1, 2, 4]
        assert same(before, bits(model))
        torch.testing.assert_close(small(random(5, 4)), model(random(5, 4)))


# What is returned is what was given, cut


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_tensors_keep_type_tie_and_gradient(dtype: torch.dtype) -> None:
    model: Any = everything(dtype)
    small, report = minimize(model, IDS)
    result: Any = small
    assert result.out.weight is result.table.weight
    new = dict(small.named_parameters())
    for name, old in model.named_parameters():
        moved = report.param_map[name]
        found = new[moved.name]
        assert (found.dtype, found.requires_grad) == (old.dtype, old.requires_grad), name
        if name != "b.bias":  # the constant unit of ``a`` was folded into it
            assert torch.equal(found, moved.slice(old.detach())), name
    assert result.a.out_features == 5
    assert result.ahead.stride() == model.ahead.stride() == (0, 0)
    assert torch.equal(result.places, model.places)
    assert "rest" not in small.state_dict()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_folding_rounds_once(dtype: torch.dtype) -> None:
    model: Any = everything(dtype)
    constant = model.a.bias.detach()[2].double()
    expected = model.b.bias.detach().double() + model.b.weight.detach().double()[:, 2] * constant
    small: Any = minimize(model, IDS)[0]
    assert constant == 0.5
    assert torch.equal(small.b.bias, expected.to(dtype))


def test_mixed_types_stay_mixed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = m.a(x).relu().to(m.b.weight.dtype)  # type: ignore[union-attr,operator]
        return m.b(y)  # type: ignore[no-any-return,operator]

    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3).half()).eval()
    dead(model.a, 1)  # type: ignore[arg-type]
    small: Any = minimize(model, torch.randn(5, 4))[0]
    assert small.a.weight.dtype == torch.float32
    assert {small.b.weight.dtype, small.b.bias.dtype} == {torch.float16}
    assert small.b.in_features == 5


def test_unusual_tensors_are_copied() -> None:
    """Sparse buffers have no storage to share; inference tensors may not be changed."""
    with torch.inference_mode():
        layer = nn.Linear(4, 6)
    assert layer.weight.is_inference()
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 3)).eval()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    copied = duplicate(model, (*model.parameters(), *model.buffers()))
    separate(copied, model)
    assert copied[0].weight.data_ptr() != layer.weight.data_ptr()  # type: ignore[index]
    assert torch.equal(copied[0].weight, layer.weight)  # type: ignore[index]
    assert torch.equal(copied.graph.to_dense(), torch.eye(3))  # type: ignore[operator,union-attr]


def test_a_plain_copy_is_free_and_the_attention_that_is_rebuilt_is_not_shared() -> None:
    model, x = masked("vit", torch.float32, 0.4)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert peak(lambda: materialised(model, None)) < size / 100
    small, _ = minimize(model, x)
    assert any(isinstance(m, RaggedAttention) for m in small.modules())
    there = {t.data_ptr() for _, t in tensors(model)}
    assert not there & {t.data_ptr() for _, t in tensors(small)}

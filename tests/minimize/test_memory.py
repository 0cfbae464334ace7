"""What a minimization holds while it runs, and that nothing it returns shares memory."""

from __future__ import annotations

import copy
import gc
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune as torch_prune
from torch.profiler import ProfilerActivity, profile

from sapwood.minimize import Plan, RaggedAttention, analyze, minimize
from sapwood.minimize._masks import duplicate, materialised, separate
from sapwood.minimize._trace import Inputs, Outline, Traced, traced
from sapwood.minimize.surgery import operate
from sapwood.models import ConvNeXt, ViT
from sapwood.nn import MaskedLinear
from tests.minimize.planting import chain, dead, kept, random, unread


def peak(call: Callable[[], object]) -> int:
    """Bytes of tensors alive at once beyond those before, by torch's own count of allocations."""
    gc.collect()
    gc.disable()  # whatever a collection would free at some time or other counts as alive
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    finally:
        gc.enable()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    memory = sorted((e.start_ns(), i) for i, e in enumerate(events) if e.name() == "[memory]")
    sizes: list[int] = [events[i].nbytes() for _, i in memory]
    return max(accumulate(sizes, initial=0))


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def overwrite(model: nn.Module) -> None:
    """Fills the whole storages of all tensors."""
    for _, t in tensors(model):
        torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).fill_(1)


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
    assert peak(lambda: minimize(model, x)) <= 3 * size


def test_the_peak_with_masks_that_are_given() -> None:
    """As above: the masked copy is gone when the float64 one is there."""
    model, x = masked("deep", torch.float32, 0.4)
    masks = {n: p != 0 for n, p in model.named_parameters() if p.dim() > 1}
    size = sum(t.numel() * t.element_size() for _, t in tensors(model))
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


def test_an_outline_has_one_weight_at_a_time() -> None:
    model, x = masked("deep", torch.float32, 0.0)
    before = bits(model)
    outline = Outline(materialised(model, None))
    with traced(outline.model, Inputs.of(x.double())) as trace:
        late = outline.lazily(trace)
        assert all(p.numel() == 0 for p in outline.model.parameters() if p.dim() > 1)
        size = sum(p.numel() * 4 for p in model.parameters())
        assert peak(lambda: [late.values[name].sum() for name in late.values]) < size / 10
        for node, name in late.sources.items():
            assert torch.equal(late.values[node], model.get_parameter(name).double()), name
        places = [node.name for node in late.graph.nodes]
        for node in late.graph.nodes:
            assert all(places.index(n.name) < places.index(node.name) for n in node.all_input_nodes)
        weights = [i for i, node in enumerate(late.graph.nodes) if node.name in late.sources]
        assert weights[-1] > len(late.sources)  # not all of them come first
    assert same(before, bits(model))


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_outline_leaves_the_inside_of_leaves_alone(wrapped: bool) -> None:
    """Rules read the weights of a minimized attention from its modules."""
    attention = RaggedAttention(6, 6, heads=2, qk_width=2, v_width=2, scale=0.5)
    model = nn.Sequential(nn.Linear(6, 6), attention) if wrapped else attention
    outline = Outline(materialised(model, None))
    trace = Traced(fx.Graph(), {}, {}, Counter(), ())
    outline.lazily(trace)
    empty = [name for name, p in outline.model.named_parameters() if not p.numel()]
    assert empty == (["0.weight"] if wrapped else [])


def test_an_outline_that_is_filled_is_the_model() -> None:
    model, x = masked("vit", torch.float32, 0.4)
    outline = Outline(materialised(model, None))
    outline.fill()
    torch.testing.assert_close(outline.model(x.double()), model.double()(x.double()))
    outline.clear()
    assert not any(p.numel() for p in outline.model.parameters())
    assert all(p.numel() for p in model.parameters())


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


def everything(dtype: torch.dtype) -> Everything:
    torch.manual_seed(0)
    model = Everything().to(dtype).eval()
    dead(model.a, 2, bias=0.5)
    unread(model.b, 4)
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
        overwrite(result)
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
    overwrite(model)
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
    assert result.ahead.stride() == model.ahead.stride()  # (0, 0) where no type was changed
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
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3).bfloat16()).eval()
    dead(model[0], 1, bias=0.3)
    small: Any = minimize(model, torch.randn(5, 4))[0]
    assert small[0].weight.dtype == torch.float32
    assert {small[2].weight.dtype, small[2].bias.dtype} == {torch.bfloat16}
    assert small[2].in_features == 5


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
    assert torch.equal(copied.graph.to_dense(), torch.eye(3))  # type: ignore[operator]


def test_a_plain_copy_is_free_and_the_attention_that_is_rebuilt_is_not_shared() -> None:
    model, x = masked("vit", torch.float32, 0.4)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert peak(lambda: materialised(model, None)) < size / 100
    small, _ = minimize(model, x)
    assert any(isinstance(m, RaggedAttention) for m in small.modules())
    there = {t.data_ptr() for _, t in tensors(model)}
    assert not there & {t.data_ptr() for _, t in tensors(small)}


def test_the_benchmark_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "bench")
    bench = importlib.import_module("minimize_memory")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell its memory")
    setup = bench.Setup((8, 12), (1, 1), 10, 0.5, 0.5)
    row = bench.measure("first call", setup)
    assert row["parameters"][0] == sum(p.numel() for p in setup.build().parameters())
    assert row["parameters"][1] < row["parameters"][0]
    assert row["max_error"] <= 1e-9

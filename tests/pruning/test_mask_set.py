"""Mask sets: what they choose, what they compute, and how strictly they match."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sapwood.pruning import MaskMatchError, MaskSet


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


def masks_of(**values: list[int]) -> MaskSet:
    return MaskSet({name: torch.tensor(bits, dtype=torch.bool) for name, bits in values.items()})


def test_default_set_is_the_weights_of_linear_and_conv() -> None:
    assert list(MaskSet.dense(model())) == ["0.weight", "3.weight"]
    assert all(bool(mask.all()) for mask in MaskSet.dense(model()).values())


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["3.weight"], None, ["3.weight"]),
        (["3.bias"], None, ["3.bias"]),
        (["*"], None, ["0.weight", "3.weight"]),
        (None, ["0.*"], ["3.weight"]),
        ([lambda name, p: p.dim() == 4], None, ["0.weight"]),
        (["[03].weight"], [lambda name, p: p.dim() == 2], ["0.weight"]),
    ],
    ids=["exact", "exact-bias", "glob-skips-biases", "exclude", "callable", "both"],
)
def test_rules(include: list, exclude: list, names: list[str]) -> None:  # type: ignore[type-arg]
    assert list(MaskSet.dense(model(), include, exclude)) == names


def test_tied_parameters_appear_once_and_embeddings_never() -> None:
    masks = MaskSet.dense(Tied())
    assert list(masks) == ["first.weight"]
    assert masks.aliases == {"second.weight": "first.weight"}
    assert masks["second.weight"] is masks["first.weight"]
    explicit = MaskSet.dense(Tied(), include=["head.weight"])
    assert list(explicit) == ["embed.weight"]
    assert explicit.aliases == {"head.weight": "embed.weight"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: nn.DataParallel(m),
        lambda m: torch.compile(m, backend="eager"),
        lambda m: AveragedModel(m),
        lambda m: AveragedModel(torch.compile(m, backend="eager")),
    ],
    ids=["data-parallel", "compiled", "averaged", "averaged-compiled"],
)
def test_names_are_those_of_the_bare_model(wrap) -> None:  # type: ignore[no-untyped-def]
    bare = model()
    wrapped = wrap(bare)
    assert list(MaskSet.dense(wrapped)) == list(MaskSet.dense(bare))
    off = ~MaskSet.dense(bare)
    off.apply_(wrapped)
    assert off.check(wrapped) == []


def test_a_submodule_called_module_keeps_its_name() -> None:
    outer = nn.Module()
    outer.module = nn.Linear(2, 2)
    assert list(MaskSet.dense(outer)) == ["module.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_misspelt_rule_is_an_error_that_names_the_closest(argument: str) -> None:
    with pytest.raises(MaskMatchError) as caught:
        MaskSet.dense(model(), **{argument: ["0.wieght", "9.*"]})
    text = str(caught.value)
    assert text.startswith("sapwood.pruning.MaskSet.dense: every include and exclude rule must")
    assert "'0.wieght', '9.*'" in text
    assert text.index("'0.weight'") < text.index("'3.weight'")
    assert text.count("'") == 2 * (2 + 5)
    assert list(MaskSet.dense(model(), exclude=["9.*"], strict=False)) == ["0.weight", "3.weight"]


def test_an_empty_selection_is_an_error() -> None:
    with pytest.raises(MaskMatchError, match="must hold at least one parameter, got none"):
        MaskSet.dense(nn.Sequential(nn.BatchNorm1d(3)))
    assert len(MaskSet.dense(nn.Sequential(nn.BatchNorm1d(3)), strict=False)) == 0


@pytest.mark.parametrize(
    ("rules", "text"),
    [("0.weight", "include must be a list of rules"), ([3], "must hold strings or callables")],
)
def test_rules_of_another_type(rules: object, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        MaskSet.dense(model(), include=rules)  # type: ignore[arg-type]


def test_lazy_and_integer_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="weight must be initialised"):
        MaskSet.dense(nn.LazyLinear(3))
    integer = nn.Module()
    integer.table = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match=r"table must be floating point, got torch\.int64"):
        MaskSet.dense(integer, include=["table"])


def test_apply_writes_positive_zeros_over_anything() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[math.nan, -1.0], [math.inf, 2.0]])
    masks_of(weight=[[0, 0], [0, 1]]).apply_(layer)  # type: ignore[list-item]
    assert layer.weight.detach().view(torch.int32).flatten().tolist()[:3] == [0, 0, 0]
    assert layer.weight.grad_fn is None
    assert layer.weight.is_leaf


def test_check_finds_what_is_not_zero() -> None:
    layer = nn.Linear(2, 1, bias=False)
    masks = masks_of(weight=[[0, 1]])  # type: ignore[list-item]
    for value, found in ((0.0, []), (1e-45, ["weight"]), (math.nan, ["weight"])):
        layer.weight.data = torch.tensor([[value, 1.0]])
        assert masks.check(layer) == found


def test_masks_of_another_layer_change_nothing() -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    other = MaskSet(
        {"0.weight": torch.zeros(4, 2, 3, 3).bool(), "3.weight": torch.zeros(3, 5).bool()}
    )
    with pytest.raises(
        ValueError, match=r"apply_: 3\.weight must have the parameter's shape \(3, 4\), .*\(3, 5\)"
    ):
        other.apply_(net)
    unknown = MaskSet(
        {"0.weight": torch.zeros(4, 2, 3, 3).bool(), "4.weight": torch.ones(1).bool()}
    )
    with pytest.raises(MaskMatchError, match=r"no parameter for '4\.weight'; closest names: '"):
        unknown.apply_(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    unknown.apply_(net, strict=False)
    assert int(net[0].weight.count_nonzero()) == 0


def test_from_zeros_adopts_a_sparse_checkpoint() -> None:
    net = model()
    net[3].weight.data[0] = 0.0
    masks = MaskSet.from_zeros(net)
    assert masks.counts() == {"0.weight": (72, 72), "3.weight": (8, 12)}
    net[3].weight.data[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"from_zeros: 3\.weight must hold numbers, got 1 NaN"):
        MaskSet.from_zeros(net)


def test_counts_and_sparsity() -> None:
    masks = masks_of(a=[1, 0, 0, 1], b=[0, 1])
    assert masks.counts() == {"a": (2, 4), "b": (1, 2)}
    assert masks.sparsity() == 0.5
    assert MaskSet({}).sparsity() == 0.0
    assert repr(masks) == "MaskSet(2 tensors, 6 elements, sparsity 0.5000)"


def test_set_algebra_agrees_with_python_sets() -> None:
    bits = torch.rand(2, 50) < 0.5
    a, b = (MaskSet({"w": row}) for row in bits)
    left, right = (set(row.nonzero().flatten().tolist()) for row in bits)
    for result, expected in (
        (a & b, left & right),
        (a | b, left | right),
        (a ^ b, left ^ right),
        (~a, set(range(50)) - left),
    ):
        assert set(result["w"].nonzero().flatten().tolist()) == expected
    assert a == MaskSet({"w": bits[0].clone()})
    assert a != b


def test_overlap() -> None:
    a, b = masks_of(w=[1, 1, 1, 0, 0, 0, 0, 0]), masks_of(w=[1, 1, 0, 1, 0, 0, 0, 0])
    assert a.overlap(b) == 2 / 4
    assert a.overlap(b, "keep_share") == 2 / 3
    chance = 3 * 3 / 8
    assert a.overlap(b, "chance_corrected") == pytest.approx((2 - chance) / (3 - chance))
    assert a.overlap(a, "chance_corrected") == 1.0
    empty = ~MaskSet({"w": torch.ones(8).bool()})
    assert empty.overlap(empty) == empty.overlap(a, "keep_share") == 1.0
    with pytest.raises(ValueError, match="kind must be 'jaccard'"):
        a.overlap(b, "dice")  # type: ignore[arg-type]


def test_random_masks_overlap_by_chance() -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = (MaskSet({"w": torch.rand(200_000, generator=generator) < 0.1}) for _ in range(2))
    assert abs(a.overlap(b, "chance_corrected")) < 0.01


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (masks_of(v=[1, 0]), "other must have the same names, got a difference in 'v', 'w'"),
        (masks_of(w=[1, 0, 1]), r"w must have shape \(2,\), got \(3,\)"),
    ],
    ids=["names", "shapes"],
)
def test_set_operations_need_equal_names_and_shapes(other: MaskSet, text: str) -> None:
    mine = masks_of(w=[1, 0])
    for operation in (mine.__and__, mine.__or__, mine.__xor__, mine.overlap):
        with pytest.raises(ValueError, match=text):
            operation(other)
    with pytest.raises(TypeError, match="other must be a MaskSet, got dict"):
        mine.__and__({})  # type: ignore[arg-type]


def test_digest_sees_names_shapes_and_bits() -> None:
    digests = {
        masks.digest()
        for masks in (
            masks_of(w=[1, 0, 1, 1]),
            masks_of(v=[1, 0, 1, 1]),
            masks_of(w=[1, 0, 1, 0]),
            masks_of(w=[[1, 0], [1, 1]]),  # type: ignore[list-item]
            masks_of(w=[1, 0], v=[1, 1]),
        )
    }
    assert len(digests) == 5
    assert masks_of(w=[1, 0]).digest() == masks_of(w=[1, 0]).to("cpu").digest()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"masks": {"w": torch.ones(2)}},
            TypeError,
            r"w must be a bool tensor, got torch\.float32",
        ),
        ({"masks": {"w": [True]}}, TypeError, "w must be a bool tensor, got list"),
        ({"masks": {}, "aliases": {"a": "w"}}, ValueError, "aliases must map new names to masks"),
        ({"masks": {}, "metadata": {"digest": "x"}}, ValueError, "reserved key, got 'digest'"),
        ({"masks": {}, "metadata": {"run": 7}}, TypeError, "metadata must hold strings"),
    ],
    ids=["dtype", "list", "alias", "reserved", "metadata"],
)
def test_bad_arguments(arguments: dict, error: type[Exception], text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=text):
        MaskSet(**arguments)

"""Criteria that need data: values against finite differences and dense Hessians."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sapwood.pruning import SNIP, Criterion, GradientMagnitude, GraSP, MaskSet, Taylor, prune
from sapwood.pruning.criteria import master_copies

Batch = tuple[Tensor, Tensor]

FIRST_ORDER: dict[str, Criterion] = {
    "snip": SNIP(),
    "gradient": GradientMagnitude(),
    "taylor": Taylor(),
}
ALL: dict[str, Criterion] = {**FIRST_ORDER, "grasp": GraSP(samples_per_class=None)}
every_criterion = pytest.mark.parametrize("rule", ALL.values(), ids=ALL)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).to(dtype)


def conv_net(seed: int = 0, *, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(48, 4),
    ).double()


def rows(n: int, classes: int = 3, shape: tuple[int, ...] = (5,), seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % classes


def difference(
    net: nn.Module, name: str, index: int, loss: Callable[[], Tensor], relative: bool
) -> float:
    """Central difference of the loss by one weight, or by a factor of it."""
    flat = net.get_parameter(name).data.view(-1)
    before, losses = flat[index].clone(), []
    for sign in (1.0, -1.0):
        flat[index] = before * (1.0 + sign * 1e-5) if relative else before + sign * 1e-5
        losses.append(float(loss()))
    flat[index] = before
    return (losses[0] - losses[1]) / 2e-5


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_scores_equal_finite_differences(name: str) -> None:
    """The oracle has no dropout and normalises with the batch."""
    batch = rows(12, classes=4, shape=(1, 6, 6))
    net = conv_net(dropout=0.5).eval()
    oracle = conv_net().train()
    scores = FIRST_ORDER[name].scores(net, MaskSet.dense(net), batch)
    assert list(scores) == ["0.weight", "5.weight"]

    @torch.no_grad()
    def loss() -> Tensor:
        return F.cross_entropy(oracle(batch[0]), batch[1])

    for key, score in scores.items():
        weight = oracle.get_parameter(key).detach()
        slope = torch.tensor(
            [
                difference(oracle, key, i, loss, relative=name != "gradient")
                for i in range(weight.numel())
            ],
            dtype=torch.float64,
        ).view_as(weight)
        expected = slope.square() if name == "taylor" else slope.abs()
        torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-9)
        assert score.dtype == torch.float64
        assert not score.requires_grad


def flat_loss(
    net: nn.Module, names: list[str], half: Batch, temperature: float
) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the flattened weights; the rest of the model is constant."""
    shapes = [net.get_parameter(name).shape for name in names]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(net, {**weights, **fresh}, half[0])
        return F.cross_entropy(output / temperature, half[1])

    return loss


def dense_hessian_scores(
    net: nn.Module, names: list[str], batches: list[Batch], temperature: float
) -> Tensor:
    """w * sum_h c_h H_h (sum_h c_h g_h) with c_h = 2 n_h / n, Hessians written out."""
    total = sum(len(x) for x, _ in batches)
    halves = []
    for x, y in batches:
        cut = len(x) // 2
        halves += [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    vector = torch.cat([net.get_parameter(name).detach().flatten() for name in names])
    gradient = torch.zeros_like(vector)
    hessian = torch.zeros(len(vector), len(vector), dtype=vector.dtype)
    for half in halves:
        loss = flat_loss(net, names, half, temperature)
        gradient += 2 * len(half[0]) / total * torch.func.grad(loss)(vector)
        hessian += 2 * len(half[0]) / total * torch.autograd.functional.hessian(loss, vector)
    return (vector * (hessian @ gradient)).detach()


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("n", [8, 7])
def test_grasp_equals_the_dense_hessian(n: int, temperature: float) -> None:
    net, batch = mlp(), rows(n)
    masks = MaskSet.dense(net)
    rule = GraSP(temperature=temperature, samples_per_class=None)
    found = torch.cat([s.flatten() for s in rule.scores(net, masks, batch).values()])
    expected = dense_hessian_scores(net, list(masks), [batch], temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9 * float(expected.abs().max()))


def test_grasp_normalises_each_half_by_itself() -> None:
    net, batch = conv_net(dropout=0.5), rows(8, classes=4, shape=(1, 6, 6))
    masks = MaskSet.dense(net)
    rule = GraSP(temperature=2.0, samples_per_class=None)
    found = torch.cat([s.flatten() for s in rule.scores(net.eval(), masks, batch).values()])
    oracle = conv_net().train()
    expected = dense_hessian_scores(oracle, list(masks), [batch], 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9 * float(expected.abs().max()))


def test_grasp_draws_a_class_balanced_batch() -> None:
    net, (x, y) = mlp(), rows(30)
    masks = MaskSet.dense(net)
    x, y = torch.cat([x, x[:6] * 9.0]), torch.cat([y, torch.zeros(6, dtype=torch.int64)])
    found = GraSP(1.0, samples_per_class=10).scores(net, masks, (x, y))
    same = GraSP(1.0, samples_per_class=10).scores(net, masks, (x, y))
    other = GraSP(1.0, samples_per_class=10, seed=1).scores(net, masks, (x, y))
    assert all(torch.equal(found[name], same[name]) for name in masks)
    assert not torch.equal(found["0.weight"], other["0.weight"])
    with pytest.raises(
        ValueError,
        match=r"GraSP.scores: batch must hold 11 samples of every class, got 10 of class 1, 10",
    ):
        GraSP(samples_per_class=11).scores(net, masks, (x, y))


@pytest.mark.parametrize("seed", range(3))
def test_high_grasp_scores_carry_the_gradient_flow(seed: int) -> None:
    """Removing the lowest 20 % leaves a larger gradient norm than removing the highest."""
    batch, temperature = rows(60, seed=seed), 200.0
    net = mlp(seed)
    scores = GraSP(temperature).scores(net, MaskSet.dense(net), batch)
    scored = torch.cat([score.flatten() for score in scores.values()])
    count = len(scored) // 5

    def norm_without(indices: Tensor) -> float:
        pruned = copy.deepcopy(net)
        weights = [pruned.get_parameter(name) for name in scores]
        vector = nn.utils.parameters_to_vector(weights)
        vector = vector.detach().index_fill(0, indices, 0.0)
        nn.utils.vector_to_parameters(vector, weights)
        loss = F.cross_entropy(pruned(batch[0]) / temperature, batch[1])
        return float(sum(g.square().sum() for g in torch.autograd.grad(loss, weights)))

    kept_high = norm_without(scored.argsort()[:count])
    kept_low = norm_without(scored.argsort(descending=True)[:count])
    assert kept_high > kept_low


@every_criterion
def test_several_batches_equal_one_large_batch(rule: Criterion) -> None:
    net, (x, y) = mlp(), rows(21)
    masks = MaskSet.dense(net)
    parts = [(x[:10], y[:10]), [x[10:12], y[10:12]], (x[12:], y[12:])]
    whole = rule.scores(net, masks, (x, y))
    for batch in (parts, iter(parts)):
        found = rule.scores(net, masks, batch)
        for name in masks:
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(found[name], whole[name], rtol=1e-9, atol=1e-12 * scale)


def test_one_batch_gives_the_gradient_bit_for_bit() -> None:
    net, (x, y) = mlp(dtype=torch.float32), rows(21)
    found = GradientMagnitude().scores(net, MaskSet.dense(net), (x.float(), y))
    F.cross_entropy(net(x.float()), y).backward()
    assert all(torch.equal(s, net.get_parameter(n).grad.abs()) for n, s in found.items())


class Squared(nn.Linear):
    """A layer of our own, since dynamo does not compile those of torch by themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


@every_criterion
def test_wrappers_score_as_the_bare_model(rule: Criterion) -> None:
    """Compiled code has no second derivative and would be compiled again in another mode."""
    net, batch = mlp(), rows(12)
    net.append(Squared(3, 3).double())
    masks = MaskSet.dense(net)
    expected = rule.scores(net, masks, batch)
    inside = copy.deepcopy(net)
    inside[5].compile(backend="aot_eager")
    wrapped = [
        nn.DataParallel(net),
        torch.compile(net, backend="aot_eager"),
        torch.optim.swa_utils.AveragedModel(net),
        inside,
    ]
    for model in wrapped:
        found = rule.scores(model, MaskSet.dense(model), batch)
        assert all(torch.equal(found[name], expected[name]) for name in masks)


@every_criterion
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_give_float32(rule: Criterion, dtype: torch.dtype) -> None:
    net, (x, y) = mlp(dtype=dtype), rows(12)
    rule = GraSP(1.0, samples_per_class=None) if isinstance(rule, GraSP) else rule
    found = rule.scores(net, MaskSet.dense(net), (x.to(dtype), y))
    exact = rule.scores(net.double(), MaskSet.dense(net), (x.to(dtype).double(), y))
    for name, score in found.items():
        assert score.dtype == torch.float32
        scale = float(exact[name].abs().max())
        torch.testing.assert_close(score.double(), exact[name], rtol=0.1, atol=0.05 * scale)


def test_master_copies_are_ranked_and_the_model_runs_narrow() -> None:
    net, (x, y) = mlp(dtype=torch.bfloat16), rows(12)
    batch, masks = (x.bfloat16(), y), MaskSet.dense(net)
    gradient = GradientMagnitude().scores(net, masks, batch)
    before = {name: net.get_parameter(name).data for name in masks}
    masters = {name: data.float() * (1.0 + 2.0**-12) for name, data in before.items()}
    with master_copies([(net.get_parameter(name), masters[name]) for name in masks]):
        found = SNIP().scores(net, masks, batch)
        assert all(
            net.get_parameter(name).data_ptr() == m.data_ptr() for name, m in masters.items()
        )
    for name, data in before.items():
        assert torch.equal(found[name], (masters[name] * gradient[name]).abs())
        assert net.get_parameter(name).data_ptr() == data.data_ptr()
        net.get_parameter(name).data = data * 2.0
    doubled = SNIP().scores(net, masks, batch)
    same = SNIP().scores(copy.deepcopy(net), masks, batch)
    assert all(torch.equal(doubled[name], same[name]) for name in masks)


class Tied(nn.Module):
    """y = W tanh(W x), with one parameter or with two that share a storage."""

    def __init__(self, weight: Tensor, *, twice: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.first.weight = nn.Parameter(weight.clone())
        self.second.weight = nn.Parameter(self.first.weight.data) if twice else self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights_count_every_use(twice: bool) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    x, y = rows(8, classes=4, shape=(4,))
    tied = Tied(weight, twice=twice)
    masks = MaskSet.dense(tied)
    assert list(masks) == ["first.weight"]

    def loss(vector: Tensor, half: slice = slice(None)) -> Tensor:
        w = vector.view(4, 4)
        return F.cross_entropy((x[half] @ w.T).tanh() @ w.T, y[half])

    gradient = torch.func.grad(loss)(weight.flatten())
    found = GradientMagnitude().scores(tied, masks, (x, y))["first.weight"]
    torch.testing.assert_close(found.flatten(), gradient.abs())
    hessian = torch.autograd.functional.hessian(loss, weight.flatten())
    found = GraSP(1.0, samples_per_class=None).scores(tied, masks, (x, y))["first.weight"]
    torch.testing.assert_close(found.flatten(), 4 * weight.flatten() * (hessian @ gradient))


class Partly(nn.Module):
    """``unused`` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@every_criterion
def test_what_the_loss_does_not_depend_on_scores_zero(rule: Criterion) -> None:
    net, batch = Partly().double(), rows(8, classes=2, shape=(3,))
    found = rule.scores(net, MaskSet.dense(net), batch)
    assert int(found["unused.weight"].count_nonzero()) == 0
    assert found["unused.weight"].shape == (2, 3)
    assert int(found["used.weight"].count_nonzero()) == 6
    with pytest.raises(
        ValueError, match="loss must depend on a parameter to score, got one without"
    ):
        rule.scores(
            net, MaskSet.dense(net, ["unused.weight"]), batch, lambda o, y: o.detach().sum()
        )


def test_a_loss_without_curvature_has_grasp_scores_of_zero() -> None:
    layer, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.zeros(4))
    rule = GraSP(1.0, samples_per_class=None)
    found = rule.scores(layer, MaskSet.dense(layer), batch, lambda output, y: output.mean())
    assert int(found["weight"].count_nonzero()) == 0


@every_criterion
def test_frozen_parameters_and_switched_off_autograd(rule: Criterion) -> None:
    net, batch = mlp(), rows(12)
    masks = MaskSet.dense(net)
    expected = rule.scores(net, masks, batch)
    net.requires_grad_(False)
    with torch.no_grad():
        frozen = rule.scores(net, masks, batch)
    with torch.inference_mode():
        inferred = rule.scores(net, masks, batch)
    assert not any(p.requires_grad for p in net.parameters())
    for name in masks:
        assert torch.equal(frozen[name], expected[name])
        assert torch.equal(inferred[name], expected[name])


@every_criterion
def test_masked_weights_are_used_as_they_are(rule: Criterion) -> None:
    net, batch = mlp(), rows(12)
    masks = prune(net, 0.5)
    expected = rule.scores(net, MaskSet.dense(net), batch)
    found = rule.scores(net, masks, batch)
    assert all(torch.equal(found[name], expected[name]) for name in masks)
    if not isinstance(rule, GradientMagnitude):
        assert all(not found[name][~mask].any() for name, mask in masks.items())


def test_attention_and_recurrent_layers() -> None:
    """Fused attention has no second derivative; recurrent layers lose their dropout."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 2))
    x, y = torch.randn(6, 3, 8), torch.arange(6) % 2
    masks = MaskSet.dense(model, ["0.self_attn.in_proj_weight", "2.weight"])
    found = GraSP(1.0, samples_per_class=None).scores(model, masks, (x, y))
    assert all(bool(score.isfinite().all()) and bool(score.any()) for score in found.values())

    lstm = nn.LSTM(8, 4, num_layers=2, dropout=0.9)
    masks = MaskSet.dense(lstm, ["weight_ih_l0"])
    square = lambda output, y: output[0].square().mean()  # noqa: E731
    once, again = (SNIP().scores(lstm, masks, (x, y), square)["weight_ih_l0"] for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    assert lstm.dropout == 0.9
    lstm.eval()
    square(lstm(x), y).backward()
    torch.testing.assert_close(once, (lstm.weight_ih_l0 * lstm.weight_ih_l0.grad).abs())


@pytest.mark.gpu
@every_criterion
def test_scores_on_the_device_equal_those_of_the_cpu(rule: Criterion) -> None:
    net, batch = conv_net(dropout=0.5), rows(12, classes=4, shape=(1, 6, 6))
    expected = rule.scores(net, MaskSet.dense(net), batch)
    state = torch.cuda.get_rng_state()
    net.cuda()
    found = rule.scores(net, MaskSet.dense(net), batch)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for name, score in expected.items():
        torch.testing.assert_close(found[name].cpu(), score, rtol=1e-6, atol=1e-12)

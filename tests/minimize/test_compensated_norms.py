"""Norms over removed constants: against the full norm in float64, values, gradients, precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapwood.minimize import CompensatedGroupNorm, CompensatedLayerNorm, CompensatedRMSNorm

N, REMOVED = 24, (1, 2, 5, 9, 10, 17, 23)
KEEP = torch.tensor([j for j in range(N) if j not in REMOVED])
GONE = torch.tensor(REMOVED)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constants(scale: float = 3.0) -> Tensor:
    return scale * seeded(len(GONE), seed=1)


def stream(*leading: int, c: Tensor | None = None) -> Tensor:
    """(*leading, N) with constants in the removed channels."""
    x = seeded(*leading, N, seed=2)
    x[..., GONE] = constants() if c is None else c
    return x


def layer_norm(**kwargs: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(N, **kwargs).double()
    for seed, parameter in enumerate(norm.parameters(), 3):
        parameter.data = seeded(*parameter.shape, seed=seed)
    return norm


def rms_norm(**kwargs: Any) -> nn.RMSNorm:
    norm = nn.RMSNorm(N, **kwargs).double()
    if norm.weight is not None:
        norm.weight.data = seeded(N, seed=3)
    return norm


@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str
)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (0, 3), (1, 1, 1)], ids=str)
def test_layer_norm_equals_the_full_one(kwargs: dict[str, Any], leading: tuple[int, ...]) -> None:
    norm = layer_norm(**kwargs)
    x = stream(*leading)
    small = CompensatedLayerNorm.from_norm(norm, KEEP, constants())
    torch.testing.assert_close(small(x[..., KEEP]), norm(x)[..., KEEP], rtol=0, atol=1e-13)


def test_without_removed_channels_it_is_a_layer_norm() -> None:
    norm, x = layer_norm(), seeded(4, N)
    small = CompensatedLayerNorm.from_norm(norm, torch.arange(N), torch.empty(0).double())
    torch.testing.assert_close(small(x), norm(x), rtol=0, atol=1e-14)


def test_one_kept_channel() -> None:
    norm = layer_norm()
    c = seeded(N - 1, seed=4)
    x = torch.cat((seeded(6, 1), c.expand(6, -1)), 1)
    small = CompensatedLayerNorm.from_norm(norm, torch.tensor([0]), c)
    torch.testing.assert_close(small(x[:, :1]), norm(x)[:, :1], rtol=0, atol=1e-13)


def test_channels_first_and_strides() -> None:
    norm, x = layer_norm(), stream(2, 3, 4)
    small = CompensatedLayerNorm.from_norm(norm, KEEP, constants(), channels_first=True)
    images = x[..., KEEP].permute(0, 3, 1, 2)  # not contiguous
    torch.testing.assert_close(
        small(images), norm(x)[..., KEEP].permute(0, 3, 1, 2), rtol=0, atol=1e-13
    )
    again = CompensatedLayerNorm.from_norm(small, torch.arange(len(KEEP)), torch.empty(0).double())
    assert again.channels_first
    expanded = images[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(small(expanded), small(images[:1]).expand(4, -1, -1, -1))


def reader_of_tail(norm: nn.LayerNorm, weight: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The reader's columns (kept, u, v) and its bias, by the rank-two formula."""
    gamma, beta = norm.weight.detach()[GONE], norm.bias.detach()[GONE]
    w = weight[:, GONE]
    u, v = w @ (gamma * (constants() - mean)), w @ gamma
    return torch.cat((weight[:, KEEP], u[:, None], v[:, None]), 1), w @ beta


def test_the_tail_carries_removed_channels_to_a_linear_reader() -> None:
    norm, x, weight = layer_norm(), stream(3, 5), seeded(8, N, seed=5)
    small = CompensatedLayerNorm.from_norm(norm, KEEP, constants(), tail="both")
    columns, bias = reader_of_tail(norm, weight, small.removed_mean)
    found = small(x[..., KEEP]) @ columns.T + bias
    torch.testing.assert_close(found, norm(x) @ weight.T, rtol=0, atol=1e-12)
    only = CompensatedLayerNorm.from_norm(norm, KEEP, constants(), tail="mean")
    both = small(x[..., KEEP])
    kept = [*range(len(KEEP)), len(KEEP) + 1]
    assert torch.equal(only(x[..., KEEP]), both[..., kept])


def test_removing_in_two_steps_equals_removing_at_once() -> None:
    norm = layer_norm()
    once = CompensatedLayerNorm.from_norm(norm, KEEP, constants())
    first = [j for j in range(N) if j not in REMOVED[:3]]
    step = CompensatedLayerNorm.from_norm(norm, torch.tensor(first), constants()[:3])
    rest = torch.tensor([i for i, j in enumerate(first) if j not in REMOVED])
    twice = CompensatedLayerNorm.from_norm(step, rest, constants()[3:])
    assert (twice.kept, twice.total) == (once.kept, once.total) == (len(KEEP), N)
    torch.testing.assert_close(twice.removed_mean, once.removed_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(twice.removed_square, once.removed_square, rtol=1e-14, atol=0)


@pytest.mark.parametrize("tail", ["none", "mean", "both"])
def test_layer_norm_gradients(tail: str) -> None:
    small = CompensatedLayerNorm.from_norm(layer_norm(), KEEP[:4], seeded(N - 4), tail=tail)
    x = seeded(3, 4, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(small, (x,))
    assert torch.autograd.gradgradcheck(small, (x,))


def test_the_gradient_is_that_of_the_full_norm() -> None:
    norm, x = layer_norm(), stream(3, 5)
    small = CompensatedLayerNorm.from_norm(norm, KEEP, constants())
    direction = seeded(3, 5, len(KEEP), seed=7)
    full, kept = x.clone().requires_grad_(), x[..., KEEP].clone().requires_grad_()
    (norm(full)[..., KEEP] * direction).sum().backward()
    (small(kept) * direction).sum().backward()
    assert full.grad is not None
    assert kept.grad is not None
    torch.testing.assert_close(kept.grad, full.grad[..., KEEP], rtol=0, atol=1e-13)
    torch.testing.assert_close(small.weight.grad, norm.weight.grad[KEEP], rtol=0, atol=1e-12)


def test_float32_far_from_zero_is_as_precise_as_the_full_norm() -> None:
    """The shifted form: inputs and constants near 1000, read by 64 dense rows."""
    width, gone = 96, 41
    exact = nn.LayerNorm(width).double()
    c = 1000.0 + seeded(gone, seed=8)
    x = torch.cat((1000.0 + seeded(64, width - gone, seed=9), c.expand(64, -1)), 1)
    keep, weight = torch.arange(width - gone), seeded(64, width - gone, seed=10)
    single = copy.deepcopy(exact).float()
    small = CompensatedLayerNorm.from_norm(single, keep, c.float())
    rounded = x.float().double()  # what both are given
    truth = exact(rounded)[:, keep] @ weight.T
    ours = (small(rounded[:, keep].float()).double() @ weight.T - truth).abs().max()
    theirs = (single(rounded.float())[:, keep].double() @ weight.T - truth).abs().max()
    assert ours <= theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_once(dtype: torch.dtype) -> None:
    norm, x = layer_norm().to(dtype), stream(32).to(dtype)
    c = x[0, GONE]
    small = CompensatedLayerNorm.from_norm(norm, KEEP, c)
    full = copy.deepcopy(norm).double()(x.double())[:, KEEP]
    found = small(x[:, KEEP])
    assert found.dtype == dtype
    masked = (norm(x)[:, KEEP].double() - full).abs().max()
    ulp = torch.finfo(dtype).eps * full.abs().max()
    assert (found.double() - full).abs().max() <= 1.5 * masked + ulp


@pytest.mark.parametrize("kwargs", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
def test_rms_norm_equals_the_full_one(kwargs: dict[str, Any]) -> None:
    norm, x, weight = rms_norm(**kwargs), stream(3, 5), seeded(8, N, seed=5)
    small = CompensatedRMSNorm.from_norm(norm, KEEP, constants(), tail=True)
    gamma = torch.ones(N).double() if norm.weight is None else norm.weight.detach()
    u = weight[:, GONE] @ (gamma[GONE] * constants())
    found = small(x[..., KEEP]) @ torch.cat((weight[:, KEEP], u[:, None]), 1).T
    torch.testing.assert_close(found, norm(x) @ weight.T, rtol=0, atol=1e-12)
    plain = CompensatedRMSNorm.from_norm(norm, KEEP, constants())
    torch.testing.assert_close(plain(x[..., KEEP]), norm(x)[..., KEEP], rtol=0, atol=1e-13)


@pytest.mark.parametrize("tail", [False, True])
def test_rms_norm_gradients(tail: bool) -> None:
    small = CompensatedRMSNorm.from_norm(rms_norm(), KEEP[:4], seeded(N - 4), tail=tail)
    x = seeded(3, 4, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(small, (x,))
    assert torch.autograd.gradgradcheck(small, (x,))


def test_rms_norm_in_two_steps() -> None:
    norm, x = rms_norm(), stream(4)
    step = CompensatedRMSNorm.from_norm(
        norm, torch.tensor([j for j in range(N) if j != REMOVED[0]]), constants()[:1]
    )
    rest = torch.tensor([j - (j > REMOVED[0]) for j in KEEP.tolist()])
    twice = CompensatedRMSNorm.from_norm(step, rest, constants()[1:])
    torch.testing.assert_close(twice(x[:, KEEP]), norm(x)[:, KEEP], rtol=0, atol=1e-13)


GROUP_KEEP, GROUP_GONE = torch.tensor([0, 2, 4, 7, 9, 11]), torch.tensor([1, 3, 5, 6, 8, 10])


def grouped(affine: bool) -> tuple[nn.GroupNorm, Tensor, Tensor]:
    norm = nn.GroupNorm(3, 12, affine=affine).double()
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data = seeded(12, seed=seed)
    x, c = seeded(2, 12, 3, 5, seed=2), seeded(6, seed=3)
    x[:, GROUP_GONE] = c[:, None, None]
    return norm, x, c


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_equals_the_full_one(affine: bool) -> None:
    norm, x, c = grouped(affine)
    small = CompensatedGroupNorm.from_norm(norm, GROUP_KEEP, c)
    torch.testing.assert_close(small(x[:, GROUP_KEEP]), norm(x)[:, GROUP_KEEP], rtol=0, atol=1e-13)
    kept = x[:, GROUP_KEEP].clone().requires_grad_()
    assert torch.autograd.gradcheck(small, (kept[:1, :, :2, :2],))


def test_group_norm_in_two_steps() -> None:
    norm, x, c = grouped(True)
    first = [j for j in range(12) if j not in (1, 5, 8)]
    step = CompensatedGroupNorm.from_norm(norm, torch.tensor(first), c[[0, 2, 4]])
    rest = torch.tensor([first.index(j) for j in GROUP_KEEP.tolist()])
    twice = CompensatedGroupNorm.from_norm(step, rest, c[[1, 3, 5]])
    torch.testing.assert_close(twice(x[:, GROUP_KEEP]), norm(x)[:, GROUP_KEEP], rtol=0, atol=1e-13)


def modules() -> dict[str, tuple[nn.Module, Tensor]]:
    kept = stream(3, 5)[..., KEEP]
    norm, x, c = grouped(True)
    return {
        "layer": (CompensatedLayerNorm.from_norm(layer_norm(), KEEP, constants()), kept),
        "tail": (
            CompensatedLayerNorm.from_norm(layer_norm(), KEEP, constants(), tail="both"),
            kept,
        ),
        "rms": (CompensatedRMSNorm.from_norm(rms_norm(), KEEP, constants(), tail=True), kept),
        "group": (CompensatedGroupNorm.from_norm(norm, GROUP_KEEP, c), x[:, GROUP_KEEP]),
    }


@pytest.mark.parametrize("name", modules())
def test_export_compile_copy_vmap_and_state(name: str) -> None:
    module, x = modules()[name]
    expected = module(x)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-14)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-14)
    rows = x.clone().requires_grad_()
    (through,) = torch.autograd.grad(compiled(rows).square().sum(), rows)
    (eager,) = torch.autograd.grad(module(rows).square().sum(), rows)
    torch.testing.assert_close(through, eager, rtol=0, atol=1e-12)
    if name != "group":  # its batch axis is part of its shape
        mapped = torch.func.vmap(module)(x)
        torch.testing.assert_close(mapped, expected, rtol=0, atol=1e-14)
    copied = copy.deepcopy(module)
    state = {key: torch.zeros_like(value) for key, value in module.state_dict().items()}
    assert not copied.load_state_dict(state).missing_keys
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied(x), expected)


def test_infinities_and_nan_come_through_as_in_the_full_norm() -> None:
    norm, x = layer_norm(), stream(3)
    x[0, KEEP[0]], x[1, KEEP[1]] = torch.inf, torch.nan
    small = CompensatedLayerNorm.from_norm(norm, KEEP, constants())
    found, full = small(x[:, KEEP]), norm(x)[:, KEEP]
    assert torch.equal(found.isnan(), full.isnan())
    torch.testing.assert_close(found[2], full[2], rtol=0, atol=1e-13)


def test_modes_and_trainability_follow_the_original() -> None:
    norm = layer_norm().eval()
    norm.weight.requires_grad_(False)
    small = CompensatedLayerNorm.from_norm(norm, KEEP, constants())
    assert not small.training
    assert small.weight is not None
    assert not small.weight.requires_grad
    assert not small.removed_mean.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompensatedLayerNorm(0, 4), "CompensatedLayerNorm: kept must be at least 1"),
        (lambda: CompensatedLayerNorm(4, 3), "total must not be below kept 4, got 3"),
        (lambda: CompensatedLayerNorm(3, 4, tail="r"), "tail must be one of none, mean, both"),
        (lambda: CompensatedRMSNorm(4, 3), "CompensatedRMSNorm: total must not be below kept"),
        (lambda: CompensatedGroupNorm(3, 4, 6), "kept must be a multiple of groups 3, got 4"),
        (lambda: CompensatedLayerNorm(3, 4)(torch.ones(2, 4)), "input must have 3 channels"),
        (lambda: CompensatedRMSNorm(3, 4)(torch.ones(())), "input must have 3 channels"),
        (
            lambda: CompensatedGroupNorm(1, 3, 4)(torch.ones(2, 4, 2)),
            "CompensatedGroupNorm: input must have 3 channels on axis 1",
        ),
        (
            lambda: CompensatedLayerNorm.from_norm(nn.LayerNorm((2, 2)), KEEP, constants()),
            "norm must normalise one axis",
        ),
        (
            lambda: CompensatedLayerNorm.from_norm(layer_norm(), KEEP, constants()[:2]),
            "constants must have one entry for each of the 7 removed channels, got 2",
        ),
        (
            lambda: CompensatedRMSNorm.from_norm(rms_norm(), KEEP + 4, constants()),
            r"keep must lie in \[0, 24\)",
        ),
        (
            lambda: CompensatedGroupNorm.from_norm(
                nn.GroupNorm(2, 4), torch.tensor([0, 1]), torch.ones(2)
            ),
            "keep must take the same number of channels from every group, got",
        ),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

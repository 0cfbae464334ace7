"""The networks: published sizes, forward passes by hand, inputs of all shapes, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.data import Dataset, load_digits
from sapwood.models import (
    NAMES,
    ConvNeXt,
    ResNet,
    ViT,
    build,
    mlp,
    resnet18,
    resnet20,
    small_cnn,
    vgg19,
    vgg_like,
)
from sapwood.models.resnet import PaddedIdentity
from sapwood.pruning import MaskSet

CIFAR = (3, 32, 32)
#: These cut images into patches, which must fit.
PATCHED = ("convnext_micro", "vit_micro")
VGG16 = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
VGG19 = [64, 64, 128, 128, *[256] * 4, *[512] * 8]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def prunable(network: nn.Module) -> int:
    """Weights of convolutions and linear layers."""
    return sum(total for _, total in MaskSet.dense(network).counts().values())


def convolutions(widths: list[int]) -> int:
    """Weights of 3 x 3 convolutions one after the other."""
    return sum(9 * k * n for k, n in pairwise([3, *widths]))


def test_lenet300_has_the_size_of_the_papers() -> None:
    network = build("lenet300", (1, 28, 28), 10)
    assert prunable(network) == 784 * 300 + 300 * 100 + 100 * 10 == 266_200
    assert parameters(network) == 266_200 + 410  # Han et al.: 267 K


def test_resnet20_has_the_size_of_the_paper() -> None:
    weights = convolutions([16] * 7) + 9 * (16 * 32 + 5 * 32 * 32) + 9 * (32 * 64 + 5 * 64 * 64)
    network = build("resnet20", CIFAR, 10)
    assert prunable(network) == weights + 640
    assert parameters(network) == weights + 650 + 2 * 7 * 16 + 2 * 6 * 32 + 2 * 6 * 64
    assert round(parameters(network) / 1e6, 2) == 0.27  # table 6
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == 20


def test_resnet18_has_the_size_of_public_code() -> None:
    network = build("resnet18", CIFAR, 10)
    assert parameters(network) == 11_173_962
    projections = 64 * 128 + 128 * 256 + 256 * 512
    stages = sum(9 * (k * n + 3 * n * n) for k, n in pairwise([64, 128, 256, 512]))
    assert prunable(network) == convolutions([64] * 5) + stages + projections + 5120
    # 18 layers and three projections
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == 21


def test_vgg_like_has_the_size_of_snips_code() -> None:
    network = build("vgg_like", CIFAR, 10)
    weights = convolutions(VGG16) + 512 * 512 + 512 * 10
    assert prunable(network) == weights == 14_977_728
    biases = sum(VGG16) + 512 + 10  # SNIP's code has them in the convolutions too, and counts them
    assert weights + biases == 14_982_474
    assert parameters(network) == weights + 522 + 2 * (sum(VGG16) + 512)


def test_vgg19_has_the_size_of_public_code() -> None:
    network = build("vgg19", CIFAR, 10)
    assert prunable(network) == convolutions(VGG19) + 5120
    assert parameters(network) == 20_035_018
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == 17


def randomise(network: nn.Module) -> nn.Module:
    """Normalisations that do something, in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return network.double().eval()


class ByHand:
    """The layers of a network in the order of their use, as functions."""

    def __init__(self, network: nn.Module) -> None:
        kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
        self.layers: Iterator[Any] = iter([m for m in network.modules() if isinstance(m, kinds)])

    def conv(self, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        layer = next(self.layers)
        assert layer.bias is None
        return self.norm(F.conv2d(x, layer.weight, stride=stride, padding=padding))

    def norm(self, x: Tensor) -> Tensor:
        layer = next(self.layers)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        centred = x - layer.running_mean.view(shape)
        scaled = centred / torch.sqrt(layer.running_var + 1e-5).view(shape)
        found: Tensor = scaled * layer.weight.view(shape) + layer.bias.view(shape)
        return found

    def linear(self, x: Tensor) -> Tensor:
        layer = next(self.layers)
        found: Tensor = x @ layer.weight.T + layer.bias
        return found


def resnet_by_hand(network: nn.Module, x: Tensor, depth: int, option: str, stages: int) -> Tensor:
    hand = ByHand(network)
    x = hand.conv(x).relu()
    for stage in range(stages):
        for block in range(depth):
            change = stage > 0 and block == 0
            y = hand.conv(hand.conv(x, stride=2 if change else 1).relu())
            if change and option == "A":
                half = x[:, :, ::2, ::2]
                x = torch.cat([half, torch.zeros_like(half)], 1)
            elif change:
                x = hand.conv(x, stride=2, padding=0)
            x = (y + x).relu()
    return hand.linear(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "depth", "option", "stages"), [("resnet20", 3, "A", 3), ("resnet18", 2, "B", 4)]
)
def test_residual_networks_by_hand(name: str, depth: int, option: str, stages: int) -> None:
    network = randomise(build(name, CIFAR, 10))
    x = torch.randn(2, *CIFAR, dtype=torch.float64)
    with torch.no_grad():
        expected = resnet_by_hand(network, x, depth, option, stages)
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vgg_like", "vgg19"])
def test_vgg_by_hand(name: str) -> None:
    network = randomise(build(name, CIFAR, 10))
    x = torch.randn(2, *CIFAR, dtype=torch.float64)
    with torch.no_grad():
        hand, y = ByHand(network), x
        groups = [2, 2, 3, 3, 3] if name == "vgg_like" else [2, 2, 4, 4, 4]
        for number, group in enumerate(groups):
            for _ in range(group):
                y = hand.conv(y).relu()
            tiles = y.unfold(2, 2, 2).unfold(3, 2, 2)  # (n, c, h / 2, w / 2, 2, 2)
            is_averaged = name == "vgg19" and number == 4
            y = tiles.mean((4, 5)) if is_averaged else tiles.amax((4, 5))
        y = y.flatten(1)
        assert y.shape == (2, 512)
        if name == "vgg_like":
            y = hand.norm(hand.linear(y)).relu()
        torch.testing.assert_close(network(x), hand.linear(y), rtol=1e-9, atol=1e-9)


def test_padded_identity() -> None:
    x = torch.arange(1.0, 19.0).view(1, 2, 3, 3)
    y = PaddedIdentity(2, 5, stride=2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert y[0, :2].tolist() == [[[1.0, 3.0], [7.0, 9.0]], [[10.0, 12.0], [16.0, 18.0]]]
    assert not y[0, 2:].any()


@pytest.mark.parametrize("shape", [CIFAR, (1, 28, 28), (1, 8, 8), (3, 1, 1), (2, 5, 9)], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in PATCHED])
def test_any_image_shape_flat_or_not(name: str, shape: tuple[int, int, int]) -> None:
    network = build(name, shape, 7).eval()
    x = torch.randn(3, *shape)
    with torch.no_grad():
        y = network(x)
        assert y.shape == (3, 7)
        assert torch.equal(network(x.flatten(1)), y)
        assert network(x[:0]).shape == (0, 7)
        expanded = x[:1].expand(4, *shape)
        torch.testing.assert_close(network(expanded), y[:1].expand(4, 7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [CIFAR, (1, 28, 28), (2, 16, 20), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("name", PATCHED)
def test_patches_flat_or_not(name: str, shape: tuple[int, int, int]) -> None:
    network = build(name, shape, 7).eval()
    x = torch.randn(3, *shape)
    with torch.no_grad():
        y = network(x)
        assert y.shape == (3, 7)
        assert torch.equal(network(x.flatten(1)), y)
        assert network(x[:0]).shape == (0, 7)


def test_convnext_micro_has_the_size_of_its_layers() -> None:
    blocks = sum((49 + 8 * c + 4 + 1 + 1 + 2 + 1) * c for c in (32, 64, 128, 128, 256))
    between = sum(2 * k + 4 * k * n + n for k, n in pairwise([32, 64, 128, 256]))
    stem, head = 3 * 16 * 32 + 32 + 64, 512 + 2570
    assert parameters(build("convnext_micro", CIFAR, 10)) == stem + blocks + between + head


def test_vit_micro_has_the_size_of_its_layers() -> None:
    block = (3 * 64 + 64 + 2 * 256) * 64 + 3 * 64 + 64 + 256 + 64 + 4 * 64
    tokens = 48 * 64 + 64 + 64 + 65 * 64
    assert parameters(build("vit_micro", CIFAR, 10)) == tokens + 4 * block + 128 + 650


def test_vit_attends_as_the_attention_of_torch() -> None:
    network = ViT((3, 8, 8), 10, width=16, depth=1, heads=4, patch=4)
    attention = network.blocks[0].get_submodule("attention")
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    packed = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    packed |= {"out_proj.weight": "out.weight", "out_proj.bias": "out.bias"}
    theirs.load_state_dict({n: attention.get_parameter(m) for n, m in packed.items()})
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(attention(x), theirs(x, x, x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 8, 8)}, "widths and depths must have one entry per stage, got 3 and 2"),
        ({"widths": (8, 0)}, "every entry of widths and depths must be a positive integer, got 0"),
        ({"patch": 0}, "patch must be a positive integer, got 0"),
    ],
)
def test_convnext_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sapwood.models.ConvNeXt: {message}"):
        ConvNeXt((3, 8, 8), 10, **({"widths": (8, 12), "depths": (1, 1)} | change))
    with pytest.raises(ValueError, match="convnext_micro: image_shape must be at least 8 x 8"):
        build("convnext_micro", (1, 8, 7), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width must be a multiple of heads 3, got 16"),
        ({"patch": 3}, r"patch must divide height and width, got 3 of \(3, 8, 8\)"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
    ],
)
def test_vit_refuses(change: dict[str, Any], message: str) -> None:
    sizes = {"width": 16, "depth": 1, "heads": 4, "patch": 4}
    with pytest.raises(ValueError, match=f"sapwood.models.ViT: {message}"):
        ViT((3, 8, 8), 10, **(sizes | change))


@pytest.mark.parametrize("name", NAMES)
def test_memory_formats_agree(name: str) -> None:
    network = build(name, CIFAR, 10).eval()
    x = torch.randn(2, *CIFAR)
    with torch.no_grad():
        y = network(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(y, network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name: str) -> None:
    state = torch.get_rng_state()
    first, same, other = (build(name, (1, 8, 8), 10, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    names = [n for n, p in first.named_parameters() if p.dim() > 1]
    weights = dict(other.named_parameters())
    assert not any(torch.equal(first.get_parameter(n), weights[n]) for n in names)


def test_weights_do_not_depend_on_the_default_device() -> None:
    expected = build("small_cnn", (1, 8, 8), 10)
    with torch.device("meta"):
        found = build("small_cnn", (1, 8, 8), 10)
    pairs = zip(expected.parameters(), found.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", [resnet18, vgg19, vgg_like])
def test_convolutions_are_initialised_after_he(make: Callable[[], nn.Module]) -> None:
    for module in make().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1e5:
            fan_in = module.in_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
            assert abs(module.weight.mean().item()) < 0.01 * math.sqrt(2 / fan_in)


def trained_accuracy(network: nn.Module, data: Dataset, epochs: int) -> float:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(data.train_inputs[rows]), data.train_labels[rows]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        hits = network(data.test_inputs).argmax(1) == data.test_labels
    return float(hits.float().mean())


@pytest.mark.parametrize("name", ["lenet300", "small_cnn"])
def test_learns_the_digits(name: str, threads: None) -> None:
    torch.set_num_threads(1)
    data = load_digits()
    assert data.image_shape is not None
    network = build(name, data.image_shape, data.classes)
    assert trained_accuracy(network, data, epochs=4) > 0.9


def test_perceptron_layers() -> None:
    network = mlp(6, 3, (5, 4))
    assert [n for n, _ in network.named_parameters() if "weight" in n] == [
        "fc1.weight",
        "fc2.weight",
        "fc3.weight",
    ]
    x = torch.randn(2, 6)
    y = x
    for number in (1, 2, 3):
        y = y @ network.get_parameter(f"fc{number}.weight").T
        y = y + network.get_parameter(f"fc{number}.bias")
        y = y.relu() if number < 3 else y
    torch.testing.assert_close(network(x), y)
    assert torch.equal(network(x.view(2, 1, 2, 3)), network(x))
    assert [type(m) for m in mlp(6, 3, ())] == [nn.Flatten, nn.Linear]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"models\.build: name must be one of lenet300.*'alexnet'"):
        build("alexnet", CIFAR, 10)
    for shape in ((32, 32), (3, 0, 32), (3, 32.0, 32), (3, 32, 32, 1)):
        for make in (resnet20, vgg_like, vgg19, small_cnn):
            with pytest.raises(ValueError, match="image_shape must be three positive integers"):
                make(shape, 10)  # type: ignore[arg-type]
    for make in (resnet20, vgg_like, vgg19, small_cnn):
        with pytest.raises(ValueError, match="classes must be a positive integer, got 0"):
            make(CIFAR, 0)
    for sizes in ((0, 3, (5,)), (6, 0, (5,)), (6, 3, (5, 0)), (6, 3, (True,))):
        with pytest.raises(ValueError, match=r"models\.mlp: .* must be a positive integer"):
            mlp(*sizes)
    with pytest.raises(ValueError, match="option must be 'A' or 'B', got 'C'"):
        ResNet(CIFAR, 10, widths=(4,), depths=(1,), option="C")
    stages: list[tuple[list[int], list[int], str]] = [
        ([4], [1, 1], "widths and depths must have one entry per stage, got 1 and 2"),
        ([], [], "widths and depths must have one entry per stage, got 0 and 0"),
        ([8, 4], [1, 1], "widths must not fall from stage to stage"),
        ([4, 0], [1, 1], "every entry of widths and depths must be a positive integer, got 0"),
        ([4, 8], [1, 0], "every entry of widths and depths must be a positive integer, got 0"),
    ]
    for widths, depths, text in stages:
        with pytest.raises(ValueError, match=rf"models\.ResNet: {text}"):
            ResNet(CIFAR, 10, widths=widths, depths=depths, option="A")

"""Small networks of every kind that minimization must handle, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.models import ConvNeXt, ResNet, ViT, mlp
from sapwood.models.resnet import BasicBlock, projection


def lenet300() -> nn.Module:
    return mlp(784, 10, (300, 100))


def small_lenet() -> nn.Module:
    return mlp(64, 10, (30, 20))


def vgg_bn() -> nn.Module:
    """Padded convolutions, BatchNorm, max pooling, flatten, a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4, 20),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(20, 10),
    )


def resnet_projection() -> nn.Module:
    """Downsampling through 1 x 1 convolutions."""
    return ResNet((3, 8, 8), 10, widths=(6, 8, 12), depths=(2, 1, 1), option="B")


class AnySizeResNet(nn.Module):
    """As above without a fixed input size, so that two image sizes can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.block1 = BasicBlock(6, 6, 1, projection)
        self.block2 = BasicBlock(6, 10, 2, projection)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block2(self.block1(self.stem(x)))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return logits


class AnySizeConvNet(nn.Module):
    """Zero-padded, dilated, strided and depthwise convolutions for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(torch.sigmoid(self.conv1(x))))
        y = F.gelu(self.conv3(F.silu(self.depthwise(y))))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def convnext() -> nn.Module:
    return ConvNeXt((3, 16, 16), 10, widths=(8, 12), depths=(2, 1), patch=4)


def vit() -> nn.Module:
    return ViT((3, 8, 8), 10, width=16, depth=2, heads=4, patch=4)


class EncoderViT(nn.Module):
    """A transformer encoder of torch: ``nn.MultiheadAttention`` with its packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        layer = nn.TransformerEncoderLayer(
            16, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.encoder(self.embed(x))).mean(1))
        return logits


class GroupedAttention(nn.Module):
    """Causal attention whose query heads share keys and values in groups."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, heads * self.dim, bias=False)
        self.k = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.o = nn.Linear(heads * self.dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q = self.q(x).view(n, tokens, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(n, tokens, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v(x).view(n, tokens, self.kv_heads, self.dim).transpose(1, 2)
        shared = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o(y.transpose(1, 2).reshape(n, tokens, -1))
        return projected


class GatedBlock(nn.Module):
    """A block in the manner of Llama: RMSNorm, grouped-query attention, SwiGLU."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attention = GroupedAttention(width, heads, kv_heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        gated: Tensor = self.down(F.silu(self.gate(h)) * self.up(h))
        return x + gated


class SmallGPT(nn.Module):
    """Token and position embeddings, two blocks, a head that is not tied to the embedding."""

    def __init__(self, vocabulary: int = 23, width: int = 16, context: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(GatedBlock(width, 4, 2), GatedBlock(width, 4, 4))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        y = self.blocks(self.tokens(ids) + self.positions(places))
        logits: Tensor = self.head(self.norm(y))
        return logits


class MixerBlock(nn.Module):
    """A perceptron over tokens and one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.channels(self.norm2(x))
        return x + y


class Mixer(nn.Module):
    """An MLP-Mixer over 4 x 4 patches of 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 10, 2, stride=2)
        self.blocks = nn.Sequential(MixerBlock(16, 10), MixerBlock(16, 10))
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(y)).mean(1))
        return logits


def images(*shape: int) -> Callable[[int], Tensor]:
    """Random float64 inputs (n, *shape) under a fixed seed."""

    def make(n: int) -> Tensor:
        generator = torch.Generator().manual_seed(n)
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64)

    return make


def token_ids(n: int) -> Tensor:
    return torch.randint(0, 23, (n, 9), generator=torch.Generator().manual_seed(n))


@dataclass(frozen=True)
class Case:
    """A network, inputs of a batch size, and where there is one another image size."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    other_size: Callable[[int], Tensor] | None = None

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network in evaluation mode, with norms and buffers away from where they start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build()
            for module in network.modules():
                jitter(module)
        return network.to(dtype).eval()


def jitter(module: nn.Module) -> None:
    """Gives norms an affine part and running statistics, and biases values."""
    values: dict[str, Any] = dict(module.named_parameters(recurse=False))
    norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm))
    with torch.no_grad():
        if norm and values.get("weight") is not None:
            values["weight"].uniform_(0.5, 1.5)
        if values.get("bias") is not None:
            values["bias"].normal_(std=0.3)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]


CASES = {
    "lenet300": Case(lenet300, images(784)),
    "small_lenet": Case(small_lenet, images(64)),
    "vgg_bn": Case(vgg_bn, images(3, 8, 8), images(3, 12, 10)),
    "resnet_projection": Case(resnet_projection, images(3, 8, 8)),
    "any_size_resnet": Case(AnySizeResNet, images(3, 8, 8), images(3, 11, 7)),
    "any_size_convnet": Case(AnySizeConvNet, images(3, 8, 8), images(3, 5, 9)),
    "convnext": Case(convnext, images(3, 16, 16)),
    "vit": Case(vit, images(3, 8, 8)),
    "encoder_vit": Case(EncoderViT, images(6, 12), images(9, 12)),
    "small_gpt": Case(SmallGPT, token_ids),
    "mixer": Case(Mixer, images(3, 8, 8)),
}

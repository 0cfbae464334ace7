"""Vision transformers for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapwood.models._layers import ImageShape, require_image_shape, require_positive


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (n, heads, tokens, width per head)
        y = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.out(y.transpose(1, 2).reshape(n, tokens, width))
        return projected


class TransformerBlock(nn.Module):
    """Attention and a perceptron of four times the width, each behind a LayerNorm, each added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.project(self.act(self.expand(self.norm2(x))))
        return x + y


class ViT(nn.Module):
    """A vision transformer: patches, a class token, positions, pre-norm blocks, one linear layer.

    Example:
        >>> import torch
        >>> from sapwood.models import ViT
        >>> network = ViT((1, 8, 8), 10, width=16, depth=2, heads=2, patch=2)
        >>> network(torch.zeros(2, 64)).shape
        torch.Size([2, 10])

    Args:
        image_shape: (channels, height, width) of the inputs; patches must divide height and width.
        classes: outputs.
        width: channels of a token; ``heads`` must divide it.
        depth: blocks.
        heads: attention heads.
        patch: height and width of a patch.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929; sizes and the absence
        of dropout are ours.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int = 4,
    ) -> None:
        super().__init__()
        where = "sapwood.models.ViT"
        shape = require_image_shape(image_shape, where)
        sizes = {"classes": classes, "width": width, "depth": depth, "heads": heads}
        for name, size in {**sizes, "patch": patch}.items():
            require_positive(size, name, where)
        if width % heads:
            raise ValueError(f"{where}: width must be a multiple of heads {heads}, got {width}")
        if shape[1] % patch or shape[2] % patch:
            raise ValueError(f"{where}: patch must divide height and width, got {patch} of {shape}")
        self.shape, self.patch = shape, patch
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.embed = nn.Linear(shape[0] * patch * patch, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, tokens + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for parameter in (self.token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(n, features) or (n, channels, height, width) -> (n, classes)."""
        c, h, w = self.shape
        p = self.patch
        n, rows, columns = len(x), h // p, w // p
        patches = x.reshape(n, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        y = self.embed(patches.reshape(n, rows * columns, c * p * p))
        y = torch.cat((self.token.expand(n, -1, -1), y), 1) + self.positions
        y = self.norm(self.blocks(y))
        logits: Tensor = self.head(y[:, 0])
        return logits


def vit_micro(image_shape: ImageShape = (3, 32, 32), classes: int = 10) -> ViT:
    """A vision transformer that trains on a CPU: width 64, 4 heads, 4 blocks, patches of 4.

    Example:
        >>> import torch
        >>> from sapwood.models import vit_micro
        >>> vit_micro()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        image_shape: (channels, height, width) of the inputs; multiples of 4, or below 16 of 2.
        classes: outputs.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Dosovitskiy et al., arXiv:2010.11929, for the kind of network; the sizes are ours.
    """
    shape = require_image_shape(image_shape, "sapwood.models.vit_micro")
    patch = 4 if min(shape[1:]) >= 16 else 2
    return ViT(shape, classes, width=64, depth=4, heads=4, patch=patch)

"""The demo's data and model: a small vision transformer on scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Split(NamedTuple):
    """Images (n, 8, 8) in [0, 1] and labels (n,) from 0 on, for training and for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits_split(first: int, last: int) -> Split:
    """Return the digits `first` to `last`, labelled from 0, every fourth one kept for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    keep = (data.target >= first) & (data.target <= last)
    x = torch.from_numpy(data.images[keep]).float() / 16
    y = torch.from_numpy(data.target[keep]).long() - first
    test = torch.arange(len(y)) % 4 == 0
    return Split(x[~test], y[~test], x[test], y[test])


class Attention(nn.Module):
    """Multi-head self-attention with its four projections as separate linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, tokens, width) to the same shape."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.up, self.mlp.act, self.mlp.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, tokens, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class DigitsViT(nn.Module):
    """A vision transformer on 8 x 8 images cut into 16 patches of 2 x 2."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 8, 8) to logits (batch, classes)."""
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)
        x = self.patches(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))

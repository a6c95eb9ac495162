"""The query bridge: a few learnt queries look over the encoder's features, so that what is read has a fixed length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import merge_heads, split_heads


class QueryBridge(nn.Module):
    """Learnt queries attend to the features: [N, L, encoder dim] → [N, queries, dim], whatever L is.

    As BLIP-2's Q-Former (Li et al. 2023, arXiv:2301.12597) and the Perceiver resampler (Alayrac et al. 2022,
    arXiv:2204.14198): each layer is self-attention of the queries, cross-attention to the features and a feed-forward
    net of `ffn` units, with the norm in front (pre-LN). heads divides dim; dropout: share in [0, 1).
    """

    def __init__(
        self,
        encoder_dim: int,
        dim: int = 256,
        queries: int = 16,
        layers: int = 2,
        heads: int = 4,
        ffn: int = 1024,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads ({heads}) must divide dim ({dim})")
        self.dim = dim
        self.project = nn.Linear(encoder_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(QueryLayer(dim, heads, ffn, dropout) for _ in range(layers))
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        seen = self.dropout(self.norm(self.project(features)))  # [N, L, dim]
        x = self.queries.expand(features.shape[0], -1, -1)  # [N, K, dim]
        for layer in self.layers:
            x = layer(x, seen)
        return self.out_norm(x)


class QueryLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each added to x [N, K, dim]; seen: [N, L, dim]."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = Attention(dim, heads)
        self.cross_attention = Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.dropout(self.self_attention(y, y))
        x = x + self.dropout(self.cross_attention(self.norms[1](x), seen))
        y = nn.functional.gelu(self.up(self.norms[2](x)))
        return x + self.dropout(self.down(y))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762) from x [N, K, dim] to y [N, L, dim].

    Not `attention.CrossAttention`: in checkpoints keys and values are layers of their own, and it is written out.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        query = split_heads(self.query(x), self.heads)  # [N, heads, K, size]
        key, value = (split_heads(part(y), self.heads) for part in (self.key, self.value))  # [N, heads, L, size]
        # Written out: MatMul and Softmax quantize and export on every opset.
        weights = torch.softmax(query @ key.transpose(2, 3) * self.size**-0.5, dim=-1)  # [N, heads, K, L]
        return self.out(merge_heads(weights @ value))

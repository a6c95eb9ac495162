"""Pre-norm transformer layers (Vaswani et al. 2017, arXiv:1706.03762) of the parts that are not transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # [N, heads, length, size] each


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, T, heads · size] → [N, heads, T, size]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[N, heads, T, size] → [N, T, heads · size]."""
    return x.transpose(1, 2).flatten(2)


def stack_layers(present: Sequence[KeysValues]) -> dict[str, Tensor]:
    """Keys and values of each layer as a decoder's state: [N, layers, heads, length, size] each."""
    return {"k": torch.stack([k for k, _ in present], 1), "v": torch.stack([v for _, v in present], 1)}


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence over itself; head_dim: size of a head, 0 = dim / heads."""

    def __init__(self, dim: int, heads: int, head_dim: int = 0) -> None:
        super().__init__()
        self.heads, width = heads, heads * (head_dim or dim // heads)
        self.qkv = nn.Linear(dim, 3 * width)
        self.out = nn.Linear(width, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        remember: Callable[[Tensor, Tensor], KeysValues] | None = None,
    ) -> Tensor:
        """x [N, T, dim] → [N, T, dim]. mask: true (or added: 0) where a query [T] sees a key; causal: each sees what
        came before it. remember: given the new keys and values [N, heads, T, size], returns all there are."""
        q, k, v = (split_heads(each, self.heads) for each in self.qkv(x).chunk(3, dim=-1))
        if remember is not None:
            k, v = remember(k, v)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)))


class CrossAttention(nn.Module):
    """Multi-head attention over a memory [N, L, memory_dim], whose keys and values are computed once."""

    def __init__(self, dim: int, memory_dim: int, heads: int, head_dim: int = 0) -> None:
        super().__init__()
        self.heads, width = heads, heads * (head_dim or dim // heads)
        self.q = nn.Linear(dim, width)
        self.kv = nn.Linear(memory_dim, 2 * width)
        self.out = nn.Linear(width, dim)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """memory [N, L, memory_dim] → keys and values [N, heads, L, size]."""
        k, v = (split_heads(each, self.heads) for each in self.kv(memory).chunk(2, dim=-1))
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x [B, T, dim], B being N or, photo by photo, several rows for each memory → [B, T, dim]."""
        # The rows of one memory are one row of queries: nothing of the memory is copied for them.
        q = split_heads(self.q(x).reshape(k.shape[0], -1, self.heads * k.shape[-1]), self.heads)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)).reshape(x.shape[0], x.shape[1], -1))


class FeedForward(nn.Module):
    """Two linear layers and a GELU: [..., dim] → [..., ffn] → [..., dim]."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, ffn)
        self.down = nn.Linear(ffn, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each behind a LayerNorm and added to its input: [N, T, dim] → [N, T, dim]."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend, self.feed = SelfAttention(dim, heads), FeedForward(dim, ffn)
        self.attend_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.attend_norm(x)))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class DecoderBlock(nn.Module):
    """Self-attention, attention over a photo, and MLP, each behind a LayerNorm and added to its input."""

    def __init__(
        self, dim: int, memory_dim: int, heads: int, ffn: int, dropout: float = 0.0, head_dim: int = 0
    ) -> None:
        super().__init__()
        self.attend = SelfAttention(dim, heads, head_dim)
        self.look = CrossAttention(dim, memory_dim, heads, head_dim)
        self.feed = FeedForward(dim, ffn)
        self.attend_norm, self.look_norm, self.feed_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        photo: KeysValues,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        remember: Callable[[Tensor, Tensor], KeysValues] | None = None,
    ) -> Tensor:
        """x [B, T, dim] over the photos' keys and values; the rest as in SelfAttention and CrossAttention."""
        x = x + self.dropout(self.attend(self.attend_norm(x), mask, causal=causal, remember=remember))
        x = x + self.dropout(self.look(self.look_norm(x), *photo))
        return x + self.dropout(self.feed(self.feed_norm(x)))

"""Bridges: what lies between the encoder's features and the decoder's memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import UsageError
from .attention import EncoderBlock
from .hub import check_kind, read_tensor
from .query import QueryBridge
from .siglip import VLMS

PROJECTION = "model.connector.modality_projection.proj.weight"


class LinearBridge(nn.Module):
    """One projection: [N, L, encoder dim] → [N, L, dim], then dropout (share in [0, 1))."""

    def __init__(self, encoder_dim: int, dim: int = 320, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(encoder_dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(self.project(features))


class PixelShuffleBridge(nn.Module):
    """SmolVLM's connector (Marafioti et al. 2025, arXiv:2504.05299): scale × scale neighbouring features become one.

    [N, L, encoder dim] of `frames` square grids, one behind the other, → [N, L / scale², dim], by one projection
    without bias of the features side by side, then dropout (share in [0, 1)). source: hub id or directory of a SmolVLM
    whose projection it starts from, of this dim and scale.
    """

    def __init__(
        self,
        encoder_dim: int,
        dim: int = 192,
        scale: int = 2,
        dropout: float = 0.0,
        frames: int = 1,
        source: str = "",
    ) -> None:
        super().__init__()
        if scale < 2:
            raise ValueError(f"scale must be 2 or more, not {scale}")
        self.dim, self.scale, self.frames = dim, scale, _at_least_one("frames", frames)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(encoder_dim * scale**2, dim, bias=False)
        if source:
            check_kind(source, set(VLMS), "bridge")
            weight = read_tensor(source, PROJECTION, "bridge")
            if weight.shape != self.project.weight.shape:
                theirs, ours = (" × ".join(map(str, shape)) for shape in (weight.shape, self.project.weight.shape))
                raise UsageError(f"bridge {source}: its projection is {theirs}, not {ours}; take its encoder too")
            with torch.no_grad():
                self.project.weight.copy_(weight)

    def forward(self, features: Tensor) -> Tensor:
        n, all_cells, dim = features.shape
        cells = all_cells // self.frames
        side, scale = math.isqrt(cells), self.scale
        if side * side != cells or side % scale:
            raise UsageError(
                f"recipe [bridge]: scale = {scale} does not divide the sides of {cells} features in a square"
            )
        # [N, rows, scale, columns, scale, D] → [N, rows, columns, scale, scale, D], a row's neighbours inside.
        x = features.reshape(n * self.frames, side // scale, scale, side // scale, scale, dim).transpose(2, 3)
        return self.dropout(self.project(x.reshape(n, all_cells // scale**2, scale**2 * dim)))


class MLPBridge(nn.Module):
    """A projection that widens, then narrows, as in MODA and in ClipCap's MLP (Mokady et al. 2021, arXiv:2111.09734).

    [N, L, encoder dim] → linear to `hidden`, GELU, dropout (share in [0, 1)), linear → [N, L · tokens, dim]. tokens:
    how many embeddings each feature becomes; a pooled encoder's single one can so fill a longer prefix.
    """

    def __init__(
        self, encoder_dim: int, dim: int = 320, hidden: int = 1024, tokens: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dim, self.tokens = dim, _at_least_one("tokens", tokens)
        self.widen = nn.Linear(encoder_dim, hidden)
        self.narrow = nn.Linear(hidden, dim * tokens)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        wide = self.dropout(nn.functional.gelu(self.widen(features)))
        return _tokens(self.narrow(wide), self.dim)


class PrefixBridge(nn.Module):
    """ClipCap's transformer mapper (Mokady et al. 2021, arXiv:2111.09734): learnt constants read the features.

    Each feature of [N, L, encoder dim] becomes `tokens` embeddings by one projection; with `length` learnt constants
    behind them they go through `layers` pre-norm layers of `heads` heads and MLPs of `ffn` (0 = 2 · dim, as in
    ClipCap), and what becomes of the constants is the prefix [N, length, dim]. dropout: share in [0, 1).
    """

    def __init__(
        self,
        encoder_dim: int,
        dim: int = 320,
        length: int = 10,
        layers: int = 4,
        heads: int = 8,
        ffn: int = 0,
        tokens: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads ({heads}) must divide dim ({dim})")
        self.dim, self.tokens = dim, _at_least_one("tokens", tokens)
        self.project = nn.Linear(encoder_dim, dim * tokens)
        self.constants = nn.Parameter(torch.randn(_at_least_one("length", length), dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, ffn or 2 * dim, dropout) for _ in range(layers)))

    def forward(self, features: Tensor) -> Tensor:
        seen = _tokens(self.project(features), self.dim)  # [N, L · tokens, dim]
        constants = self.constants.expand(features.shape[0], -1, -1)  # [N, length, dim]
        return self.blocks(torch.cat((seen, constants), dim=1))[:, seen.shape[1] :]


def _tokens(x: Tensor, dim: int) -> Tensor:
    """[N, L, tokens · dim] → [N, L · tokens, dim]."""
    return x.reshape(x.shape[0], -1, dim)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")
    return value


BRIDGES: dict[str, Callable[..., Any]] = {
    "linear": LinearBridge,
    "mlp": MLPBridge,
    "pixel_shuffle": PixelShuffleBridge,
    "prefix": PrefixBridge,
    "query": QueryBridge,
}

"""Bridges: what lies between the encoder's features and the decoder's memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...runtime.errors import UsageError


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

    [N, L, encoder dim] of a square grid → [N, L / scale², dim], by one projection without bias of the features side by
    side, then dropout (share in [0, 1)).
    """

    def __init__(self, encoder_dim: int, dim: int = 192, scale: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        if scale < 2:
            raise ValueError(f"scale must be 2 or more, not {scale}")
        self.dim, self.scale = dim, scale
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(encoder_dim * scale**2, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        n, cells, dim = features.shape
        side, scale = math.isqrt(cells), self.scale
        if side * side != cells or side % scale:
            raise UsageError(
                f"recipe [bridge]: scale = {scale} does not divide the sides of {cells} features in a square"
            )
        # [N, rows, scale, columns, scale, D] → [N, rows, columns, scale, scale, D], a row's neighbours inside.
        x = features.view(n, side // scale, scale, side // scale, scale, dim).transpose(2, 3)
        return self.dropout(self.project(x.reshape(n, cells // scale**2, scale**2 * dim)))


BRIDGES: dict[str, Callable[..., Any]] = {"linear": LinearBridge, "pixel_shuffle": PixelShuffleBridge}

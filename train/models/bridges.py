"""Bridges: what lies between the encoder's features and the decoder's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class LinearBridge(nn.Module):
    """One projection: [N, L, encoder dim] → [N, L, dim], then dropout (share in [0, 1))."""

    def __init__(self, encoder_dim: int, dim: int = 320, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(encoder_dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(self.project(features))


BRIDGES: dict[str, Callable[..., Any]] = {"linear": LinearBridge}

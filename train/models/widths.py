"""How a decoder says which of its widths can be made smaller: what belongs to one unit, and what reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """A linear layer that reads a width: `index` [units, k] are the places of each unit in its input, which lies
    along dimension `dim` of its weight."""

    module: str
    index: Tensor
    dim: int = 1


@dataclass(frozen=True)
class Width:
    """A number of units of which some can go.

    key: the decoder's option that holds the number; where: its name for people; rows: parameter → (dimension,
    index [units, k]) of what goes with a unit; readers: what reads the units, the first also where they are observed;
    buckets: the units' buckets where each must keep as many as the others.
    """

    key: str
    where: str
    rows: dict[str, tuple[int, Tensor]]
    readers: tuple[Columns, ...]
    buckets: tuple[int, ...] = ()

    @property
    def units(self) -> int:
        return len(self.readers[0].index)

    def slices(self) -> dict[str, list[tuple[int, Tensor]]]:
        """Every parameter that the units cut through: (dimension, index [units, k])."""
        cuts: dict[str, list[tuple[int, Tensor]]] = {name: [cut] for name, cut in self.rows.items()}
        for reader in self.readers:
            cuts.setdefault(f"{reader.module}.weight", []).append((reader.dim, reader.index))
        return cuts


def units(count: int) -> Tensor:
    """Units of one row each: [count, 1]."""
    return torch.arange(count).unsqueeze(1)


def drop(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    """`tensor` without `rows` of dimension `dim`; the order of the others stays."""
    keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
    keep[rows.flatten()] = False
    return tensor.index_select(dim, keep.nonzero().squeeze(1))

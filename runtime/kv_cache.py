"""Keys and values of every layer and row in one buffer: written in place by the engine, grown by doubling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    SavedKV: TypeAlias = NDArray[Any]  # [tensors, heads, length, dim]: what one row has read

SPARE = 32  # positions that a new buffer has beyond those asked for


class KVCache:
    """The cache of one session. All rows hold the same number of positions, `length`; what lies behind is undefined.

    tensors: keys and values of all layers, each [rows, heads, capacity, dim]. limit: the model's positions.
    `version` changes whenever the tensors lie elsewhere or have other shapes, so that the engine must be told.
    """

    def __init__(self, tensors: int, heads: int, dim: int, limit: int, dtype: DTypeLike = np.float32) -> None:
        self.limit = limit
        self.rows = self.length = self.version = 0
        self._store: NDArray[Any] = np.empty((tensors, 0, heads, 0, dim), dtype)  # may have more rows than are in use

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self._store.shape[3]

    def tensors(self, start: int = 0, stop: int | None = None) -> list[NDArray[Any]]:
        """Rows start to stop (default: all) of each tensor, views [stop - start, heads, capacity, dim] in one piece."""
        stop = self.rows if stop is None else stop
        return [tensor[start:stop] for tensor in self._store]

    def clear(self, rows: int) -> None:
        """Begin with `rows` rows that hold nothing. The buffer is kept if it has as many."""
        if rows > self._store.shape[1]:
            self._store = self._store[:, :0, :, :0].copy()
        self._set(rows, 0)

    def reserve(self, more: int) -> None:
        """Make room for `more` positions in each row. Raises UsageError beyond the model's limit."""
        need = self.length + more
        if need > self.limit:
            raise UsageError(
                f"photo, prompt and caption need {need:,} positions and the model has {self.limit:,}: "
                "ask for a smaller max_length"
            )
        if need > self.capacity:
            self._move(range(self.rows), min(max(2 * self.capacity, need + SPARE), self.limit))

    def advance(self, count: int) -> None:
        """The engine has written `count` more positions in each row."""
        self.length += count

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes what row parents[i] is; rows may become fewer or more. A row that stays is not copied."""
        if len(parents) > self._store.shape[1]:
            self._move(parents, self.capacity)
            return
        filled = self._store[:, :, :, : self.length]
        moves = {row: parent for row, parent in enumerate(parents) if row != parent}
        asked = Counter(moves.values())
        free = [row for row in moves if not asked[row]]  # may be written: nobody asks for what they are
        held: dict[int, NDArray[Any]] = {}
        while moves:
            if free:
                row = free.pop()
            else:  # a circle: each of them is another's parent
                row = next(iter(moves))
                held[row] = filled[:, row].copy()
            parent = moves.pop(row)
            filled[:, row] = held[parent] if parent in held else filled[:, parent]
            asked[parent] -= 1
            if not asked[parent] and parent in moves:
                free.append(parent)
        self._set(len(parents), self.length)

    def save(self, row: int = 0) -> SavedKV:
        """A copy of what a row has read."""
        return self._store[:, row, :, : self.length].copy()

    def load(self, saved: SavedKV, rows: int) -> None:
        """Begin with `rows` rows that have all read what was saved."""
        self.clear(rows)
        self.reserve(saved.shape[2])
        self._store[:, :rows, :, : saved.shape[2]] = saved[:, None]
        self.length = saved.shape[2]

    def _move(self, parents: Sequence[int], capacity: int) -> None:
        """Into a new buffer with one row for each of `parents`."""
        tensors, _, heads, _, dim = self._store.shape
        store = np.empty((tensors, len(parents), heads, capacity, dim), self._store.dtype)
        if self.length:
            for row, parent in enumerate(parents):
                store[:, row, :, : self.length] = self._store[:, parent, :, : self.length]
        self._store = store
        self.version += 1
        self._set(len(parents), self.length)

    def _set(self, rows: int, length: int) -> None:
        self.version += rows != self.rows
        self.rows, self.length = rows, length

"""The cut through every captioner: `start` does what is done once per photo, `step` once per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels: TypeAlias = NDArray[np.uint8]  # [photos, height, width, 3], RGB
    Ids: TypeAlias = NDArray[np.int64]  # [rows]
    Logits: TypeAlias = NDArray[np.float32]  # [rows, vocab]


class Session(Protocol):
    """One batch of photos being captioned. The state (hidden states, KV cache) stays inside.

    After `start` the rows are the photos, in order. Every `step` names for each of its rows the row of the
    previous call that it continues, which is all that beams and dropped (finished) rows need.
    """

    def start(self, pixels: Pixels, prompt_ids: Ids | None = None) -> Logits:
        """Encode photos uint8 [N, H, W, 3], feed BOS and the prompt [P]; next-token logits [N, vocab]."""
        ...

    def step(self, ids: Ids, parents: Ids) -> Logits:
        """Feed one token per row: row i continues row `parents[i]` with `ids[i]`; logits [rows, vocab]."""
        ...


class Model(Protocol):
    """A loaded bundle in one engine: immutable and thread-safe, shared by any number of sessions."""

    def session(self) -> Session:
        """A new, empty session. One session belongs to one thread at a time."""
        ...

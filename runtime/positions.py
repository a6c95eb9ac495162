"""Which of a vision model's learnt positions the patches of a smaller photo get, in whole numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import UsageError

if TYPE_CHECKING:
    from .session import Ids


def position_ids(rows: int, columns: int, native: int) -> Ids:
    """The learnt position of each patch of a photo of rows × columns patches: int64 [rows · columns], row by row.

    native: patches a side of what the model learnt, native² positions. A photo of fewer patches is spread over all of
    them: patch j of n along a side gets native · j // n (`along`). UsageError outside 1 ≤ rows, columns ≤ native.
    """
    return (along(rows, native)[:, None] * native + along(columns, native)).reshape(-1)


def along(patches: int, native: int) -> Ids:
    """The row (or column) of the native grid for each of a side's patches: int64 [patches].

    transformers' Idefics3 and SmolVLM find it in float32: how many of the boundaries 1/native, 2/native, … are at most
    j · (1/patches) (NaViT's fractional positions, Dehghani et al. 2023, arXiv:2307.06304). That is
    native · j // patches, which needs no float and which a graph computes from its input's shape alone. Both are the
    same for every number of patches where native is 26, 27 or 32 (Idefics3's 364 px, SmolVLM's 384 and 512 px), or at
    most 18. Where the quotient is whole float32 may fall below it: transformers then puts single patches one place
    lower for a few other sides (19, 25, 29, 30, …).
    """
    for what, value in (("patches", patches), ("native", native)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UsageError(f"{what} a side must be a whole number from 1, not {value!r}")
    if patches > native:
        raise UsageError(f"a photo of {patches} patches a side is larger than the {native} that the model knows")
    return np.arange(patches, dtype=np.int64) * int(native) // int(patches)

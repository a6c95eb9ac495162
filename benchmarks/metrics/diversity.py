"""What the reference-based metrics do not see: captioners that say one thing for every photo, or stutter."""

from __future__ import annotations

from collections.abc import Sequence

from .cider import Tokens


def distinct_share(candidates: Sequence[Tokens]) -> float:
    """Distinct captions (after tokenisation) over all captions, 0 to 1."""
    return len({tuple(candidate) for candidate in candidates}) / len(candidates)


def repeats(tokens: Tokens) -> bool:
    """Whether a caption stutters: one or two tokens said twice in a row ("sitting sitting", "in the in the"), or any
    three tokens in a row that occur twice. A pair that merely comes back ("in a hat in a boat") is ordinary English."""
    for i in range(1, len(tokens)):
        if tokens[i] == tokens[i - 1]:
            return True
        if i >= 3 and tokens[i - 1] == tokens[i - 3] and tokens[i] == tokens[i - 2]:
            return True
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) < len(trigrams)


def repeated_share(candidates: Sequence[Tokens]) -> float:
    """Share of captions that stutter (see `repeats`), 0 to 1."""
    return sum(map(repeats, candidates)) / len(candidates)


def mean_length(candidates: Sequence[Tokens]) -> float:
    """Mean number of tokens in a caption."""
    return sum(map(len, candidates)) / len(candidates)

"""The golden pair: a photo and what the bundle must make of it, reproduced on whatever device this is."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .captioner import Captioner, Options
from .errors import BundleError


@dataclass(frozen=True)
class Verification:
    """What the golden photo gave. Cosines compare each position's logits with the fp32 reference's.

    tokens_differ_at: first position where greedy decoding leaves the reference's caption; None if none.
    max_difference: of any logit, absolute.
    """

    ok: bool
    caption: str
    same_tokens: bool
    tokens_differ_at: int | None
    min_cosine: float
    max_difference: float
    needs_same_tokens: bool
    needs_min_cosine: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def teacher_forced(captioner: Captioner, pixels: np.ndarray, token_ids: list[int]) -> np.ndarray:
    """Logits [T + 1, vocab] of one photo uint8 [H, W, 3] before each of T given tokens and before EOS."""
    session = captioner.session()
    rows = [session.start(pixels[None])]  # [1, vocab] each
    only = np.zeros(1, np.int64)
    rows += [session.step(np.array([token], np.int64), only) for token in token_ids]
    return np.concatenate(rows)


def verify_golden(captioner: Captioner) -> Verification:
    """Caption the bundle's golden photo greedily, and compare teacher-forced logits with those it recorded.

    Raises BundleError if the golden pair itself is broken.
    """
    bundle = captioner.bundle
    golden = bundle.manifest["golden"]
    expected = golden["token_ids"]
    pixels = captioner.preprocess.load(bundle.read(golden["image"]), name=str(bundle.path / golden["image"]))
    reference = _reference(captioner, golden, len(expected) + 1)

    # The reference's caption is plain greedy, whatever the bundle's own decoding. One token more than it has is asked
    # for, so that a missing EOS shows, unless the reference was itself cut off there.
    plain: Options = {
        "max_length": len(expected) + 1,
        "beam": 1,
        "min_length": 0,
        "length_penalty": 0.0,
        "no_repeat_ngram": 0,
    }
    (caption,) = captioner.caption_arrays(pixels[None], **plain)
    found = list(caption.token_ids)
    if reference[-1].argmax() != captioner.tokens["eos"]:
        found = found[: len(expected)]
    longest = max(len(found), len(expected))
    differ = next((i for i in range(longest) if found[i : i + 1] != expected[i : i + 1]), None)

    logits = teacher_forced(captioner, pixels, expected).astype(np.float64)  # [T + 1, vocab]
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(reference, axis=1)
    cosine = float(((logits * reference).sum(axis=1) / np.maximum(norms, 1e-30)).min())
    tolerance = golden["tolerance"]
    return Verification(
        ok=cosine >= tolerance["min_cosine"] and (differ is None or not tolerance["same_tokens"]),
        caption=caption.text,
        same_tokens=differ is None,
        tokens_differ_at=differ,
        min_cosine=cosine,
        max_difference=float(np.abs(logits - reference).max()),
        needs_same_tokens=tolerance["same_tokens"],
        needs_min_cosine=float(tolerance["min_cosine"]),
    )


def _reference(captioner: Captioner, golden: dict[str, Any], rows: int) -> np.ndarray:
    where = f"{captioner.bundle.path}: {golden['logits']}"
    try:
        # Never pickles: an array of objects would run code.
        reference = np.load(io.BytesIO(captioner.bundle.read(golden["logits"])), allow_pickle=False)
    except (ValueError, EOFError, MemoryError, OverflowError) as error:
        raise BundleError(f"{where} is not a NumPy array ({str(error)[:80]}); export the bundle again") from None
    shape = (rows, captioner.tokens["vocab_size"])
    if not isinstance(reference, np.ndarray) or reference.dtype.kind != "f" or reference.shape != shape:
        raise BundleError(f"{where} must be floats {list(shape)}; export the bundle again")
    return reference.astype(np.float64)

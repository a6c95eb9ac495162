"""The gate: score the artifact itself on the validation split and say whether it may pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..benchmarks.datasets import Example
from ..benchmarks.metrics import CaptionScores, Interval, caption_metrics, paired_bootstrap
from ..runtime import Captioner
from ..runtime.preprocess import Preprocess
from ..runtime.verify import teacher_forced
from ..train.data.cache import load_pixels
from ..train.validate import caption_rows
from .golden import reference_logits, torch_model

if TYPE_CHECKING:
    from ..train.checkpoint import Checkpoint

BATCH = 16
PARITY_PHOTOS = 8
WARM, TIMED_ROUNDS, TIMED_SECONDS = 3, 15, 30.0  # of large models fewer rounds, two at least
SLOWER = 0.95  # an artifact this much of fp32's speed or less is called slower

Verdict = Literal["pass", "fail", "inconclusive"]
CaptionBatch = Callable[[np.ndarray], list[str]]  # uint8 [N, H, W, 3] → captions


@dataclass(frozen=True)
class GateResult:
    """`drop`: CIDEr of the reference minus the artifact's, with its interval. `measured`: the manifest's "measured"."""

    verdict: Verdict
    drop: Interval
    limit: float
    measured: dict[str, Any]

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"

    @property
    def reason(self) -> str:
        """One line saying why, and what to do."""
        drop = f"CIDEr drop {self.drop.mean:+.4f} (95% interval {self.drop.low:+.4f} to {self.drop.high:+.4f})"
        if self.verdict == "pass":
            return f"{drop}, within the limit of {self.limit:g}"
        if self.verdict == "fail":
            return f"{drop} exceeds the limit of {self.limit:g}: use a more precise target, or raise --max-cider-drop"
        photos = self.measured["photos"]
        return (
            f"{drop} is inconclusive for the limit of {self.limit:g} on {photos:,} photos: "
            "use more validation photos, a more precise target, or raise --max-cider-drop"
        )


def judge(drop: Interval, limit: float) -> Verdict:
    """pass: even the interval's upper end is within the limit; fail: the drop itself is not; else inconclusive."""
    if drop.high <= limit:
        return "pass"
    return "fail" if drop.mean > limit else "inconclusive"


def caption_all(
    caption: CaptionBatch,
    examples: Sequence[Example],
    preprocess: Preprocess,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Caption `examples` in batches."""
    said: list[str] = []
    for start in range(0, len(examples), BATCH):
        said += caption(load_pixels(examples[start : start + BATCH], preprocess))
        progress(min(start + BATCH, len(examples)))
    return said


def compare(
    artifact: Sequence[str], reference: Sequence[str], examples: Sequence[Example], *, limit: float
) -> GateResult:
    """The verdict from both systems' captions of the same photos."""
    references = {example.id: example.captions for example in examples}
    scores, base = (
        caption_metrics({e.id: c for e, c in zip(examples, captions, strict=True)}, references)
        for captions in (artifact, reference)
    )
    drop = paired_bootstrap(base.per_photo_cider, scores.per_photo_cider)
    same = sum(a == b for a, b in zip(artifact, reference, strict=True))
    verdict = judge(drop, limit)
    measured = {
        "photos": len(examples),
        "identical_captions": same / len(examples),
        "cider": {**_cider(scores), "reference": base.cider, "drop": drop.to_dict(), "limit": limit},
        "distinct": scores.distinct,
        "repeated_ngrams": scores.repeated_ngrams,
        "gate": verdict,
    }
    return GateResult(verdict, drop, limit, measured)


def _cider(scores: CaptionScores) -> dict[str, Any]:
    interval = scores.to_dict()["cider_interval"]
    return {"value": scores.cider, "low": interval["low"], "high": interval["high"]}


def torch_captions(checkpoint: Checkpoint, artifact: Captioner) -> CaptionBatch:
    """The reference for fp32: the torch model with the bundle's decoding."""
    options, _ = artifact.settings()

    if checkpoint.preprocess.mode == "keep":
        captioner = Captioner(artifact.bundle, torch_model(checkpoint), artifact.tokenizer)
        return bundle_captions(captioner)

    def caption(pixels: np.ndarray) -> list[str]:
        model, tokenizer = checkpoint.model, checkpoint.tokenizer.inner
        ids = checkpoint.recipe.tokenizer.ids
        return caption_rows(model, tokenizer, pixels, len(pixels), options, ids=ids)

    return caption


def bundle_captions(captioner: Captioner) -> CaptionBatch:
    """The reference for everything else: the fp32 graphs in the same runtime."""
    return lambda pixels: [str(caption) for caption in captioner.caption_arrays(pixels)]


def parity(artifact: Captioner, checkpoint: Checkpoint, examples: Sequence[Example]) -> dict[str, Any]:
    """Teacher-forced logits of artifact and torch model on the artifact's own captions of a few photos."""
    cosines, worst, tops = [], 0.0, []
    chosen = examples[:PARITY_PHOTOS]
    for pixels in load_pixels(chosen, artifact.preprocess):
        (caption,) = artifact.caption_arrays(pixels[None], beam=1)
        ids = list(caption.token_ids)
        ours = teacher_forced(artifact, pixels, ids).astype(np.float64)  # [T + 1, vocab]
        theirs = reference_logits(checkpoint, pixels[None], ids).astype(np.float64)
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines += ((ours * theirs).sum(axis=1) / np.maximum(norms, 1e-30)).tolist()
        worst = max(worst, float(np.abs(ours - theirs).max()))
        tops += (ours.argmax(1) == theirs.argmax(1)).tolist()
    return {
        "against": "torch fp32",
        "photos": len(chosen),
        "positions": len(cosines),
        "max_abs_difference": worst,
        "mean_cosine": float(np.mean(cosines)),
        "min_cosine": float(np.min(cosines)),
        "same_top_token": float(np.mean(tops)),
    }


def speed(artifact: Captioner, reference: Captioner, pixels: np.ndarray) -> dict[str, Any]:
    """Median of fp32 time / artifact time, interleaved, for one photo uint8 [1, H, W, 3]: above 1 is faster."""
    times: dict[str, list[tuple[float, float]]] = {"artifact": [], "reference": []}
    start = time.perf_counter()
    for turn in range(TIMED_ROUNDS + WARM):
        if turn > WARM + 1 and time.perf_counter() - start > TIMED_SECONDS:
            break
        for name, captioner in (("artifact", artifact), ("reference", reference)):
            session: Any = captioner.session()
            began = time.perf_counter()
            session.encode(pixels)
            encoded = time.perf_counter()
            captioner.caption_arrays(pixels)
            if turn >= WARM:
                times[name].append((encoded - began, time.perf_counter() - encoded))
    ratios = np.array(times["reference"]) / np.array(times["artifact"])
    encoder, caption = (float(value) for value in np.median(ratios, axis=0))
    return {"against": "onnx-fp32", "threads": 1, "rounds": len(ratios), "encoder": encoder, "caption": caption}

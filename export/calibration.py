"""Calibration data: training photos for the encoder, and for the decoder the steps of their own captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from ..runtime.backends.onnx import OnnxModel
from .statistics import Feeds
from .trunk import OnnxPair

BATCH = 8


@dataclass(frozen=True)
class Calibration:
    """pixels uint8 [N, H, W, 3]; captions: token ids of one caption of each photo, without BOS and EOS."""

    pixels: np.ndarray
    captions: Sequence[Sequence[int]]
    tokens: dict[str, int]
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None

    def reporter(self, name: str, total: int) -> Callable[[int], None]:
        return lambda done: self.progress(f"calibrate {name}", done, total)

    def encoder_feeds(self) -> list[Feeds]:
        """One photo a run."""
        return [{"pixels": self.pixels[i : i + 1]} for i in range(len(self.pixels))]

    def decoder_feeds(self, pair: OnnxPair) -> list[Feeds]:
        """The decoder's inputs while it is fed the photos' own captions, several photos a run."""
        manifest = {"session": pair.session, "tokens": self.tokens, "graphs": pair.graphs()}
        recorder = _Recorder(pair.decoder)
        model = OnnxModel(manifest, _session(pair.encoder), recorder)  # type: ignore[arg-type]
        for start in range(0, len(self.pixels), BATCH):
            captions = [list(ids) for ids in self.captions[start : start + BATCH]]
            session = model.session()
            session.start(self.pixels[start : start + BATCH])
            alive = np.arange(len(captions))
            for step in range(max(map(len, captions))):
                going = np.flatnonzero([len(captions[row]) > step for row in alive])
                alive = alive[going]
                session.step(np.array([captions[row][step] for row in alive]), going)
        return recorder.feeds


class _Recorder:
    """Stands in for the decoder's engine session and keeps what it was fed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.inner = _session(model)
        self.feeds: list[Feeds] = []

    def run(self, names: list[str], feed: dict[str, Any]) -> list[np.ndarray]:
        self.feeds.append(dict(feed))
        return self.inner.run(names, feed)


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # the same sums in the same order every time
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

"""Calibration data: training photos for the encoder, and for the decoder the steps of their own captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image

from ..runtime.backends.onnx import OnnxModel
from ..runtime.framed import FramedModel, read_frames
from ..runtime.progress import Progress, silent
from .statistics import Feeds, Statistics, load
from .trunk import OnnxPair

if TYPE_CHECKING:
    from ..runtime.session import Model, Session

BATCH = 8


@dataclass(frozen=True)
class Calibration:
    """pixels uint8 [N, H, W, 3], or a list of photos that keep their sizes; captions: token ids of one caption of each
    photo, without BOS and EOS.

    frames: as of the Source.
    """

    pixels: np.ndarray
    captions: Sequence[Sequence[int]]
    tokens: dict[str, int]
    progress: Progress = silent
    frames: dict[str, Any] | None = None

    def first(self, count: int) -> Calibration:
        """The same of so many photos."""
        return replace(self, pixels=self.pixels[:count], captions=self.captions[:count])

    def reporter(self, name: str, total: int) -> Callable[[int], None]:
        return lambda done: self.progress(f"calibrate {name}", done, total)

    def encoder_feeds(self) -> list[Feeds]:
        """One photo a run, or all of its frames."""
        if self.frames is None:
            return [{"pixels": self.pixels[i : i + 1]} for i in range(len(self.pixels))]
        framing, _ = read_frames(self.frames)
        return [{"pixels": framing(Image.fromarray(photo)).pixels} for photo in self.pixels]

    def play_decoder(
        self, pair: OnnxPair, known: Statistics, report: Callable[[int], None] = lambda done: None
    ) -> None:
        """Feed the decoder the photos' own captions, several photos a run, in the engine of the statistics, which see
        each run. report is called with the photos done."""
        manifest = {"session": pair.session, "tokens": self.tokens, "graphs": pair.graphs()}
        model: Model = OnnxModel(manifest, engine(pair.encoder), known)  # type: ignore[arg-type]
        if self.frames is not None:
            model = FramedModel.of(model, self.frames)  # type: ignore[arg-type]
        count = BATCH if isinstance(self.pixels, np.ndarray) else 1  # photos of other sizes have other tiles
        for start in range(0, len(self.pixels), count):
            teacher_force(model.session(), self.pixels[start : start + count], self.captions[start : start + count])
            report(min(start + count, len(self.pixels)))


def teacher_force(session: Session, pixels: np.ndarray, captions: Sequence[Sequence[int]]) -> np.ndarray:
    """Feed photos uint8 [N, H, W, 3] their own captions: logits after BOS and each token, [positions, vocab]."""
    logits = [session.start(pixels)]
    alive = np.arange(len(captions))
    for step in range(max(map(len, captions))):
        going = np.flatnonzero([len(captions[row]) > step for row in alive])
        alive = alive[going]
        logits.append(session.step(np.array([captions[row][step] for row in alive]), going))
    return np.concatenate(logits)


def engine(model: onnx.ModelProto) -> ort.InferenceSession:
    """A graph in ONNX Runtime, one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # the same sums in the same order every time
    return load(model, options)

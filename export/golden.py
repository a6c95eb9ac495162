"""The golden pair: a picture drawn by code, and what the fp32 torch model says about it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.decode import DecodeOptions, decode, never_said
from .threads import one_thread

if TYPE_CHECKING:
    from ..runtime.session import Model
    from ..train.checkpoint import Checkpoint

IMAGE, LOGITS = "golden.png", "golden.npy"


@dataclass(frozen=True)
class Golden:
    """png: the picture; token_ids: torch's greedy caption; logits float32 [T + 1, vocab], teacher-forced on it."""

    png: bytes
    token_ids: list[int]
    logits: np.ndarray

    def files(self) -> dict[str, bytes]:
        buffer = io.BytesIO()
        np.save(buffer, self.logits.astype(np.float16), allow_pickle=False)
        return {IMAGE: self.png, LOGITS: buffer.getvalue()}


def draw() -> Image.Image:
    """A 192×160 scene of sky, ground, a red ball and a blue house."""
    image = Image.new("RGB", (192, 160))
    pen = ImageDraw.Draw(image)
    for row in range(160):
        shade = (90 + row // 2, 150 + row // 3, 235) if row < 96 else (70, 150 - (row - 96) // 2, 60)
        pen.line([(0, row), (191, row)], fill=shade)
    pen.ellipse([28, 66, 92, 130], fill=(208, 40, 36))
    pen.rectangle([112, 78, 166, 132], fill=(36, 60, 190))
    pen.polygon([(112, 78), (139, 48), (166, 78)], fill=(140, 90, 40))
    return image


def torch_model(checkpoint: Checkpoint) -> Model:
    """The torch model, for photos as the checkpoint preprocesses them."""
    if checkpoint.preprocess.mode != "keep":
        return checkpoint.model
    from ..runtime.framed import FramedModel
    from ..train.framing import frames_of
    from ..train.models.framed import TorchFrames

    frames = frames_of(checkpoint)
    assert frames is not None  # photos that keep their sizes are cut
    return FramedModel.of(TorchFrames(checkpoint.model), frames)


def make_golden(checkpoint: Checkpoint) -> Golden:
    """Caption the drawn picture greedily with the torch model and record its logits."""
    buffer = io.BytesIO()
    draw().save(buffer, format="PNG")
    image = Image.open(io.BytesIO(buffer.getvalue()))
    pixels = np.array(checkpoint.preprocess(image))[None]  # [1, H, W, 3]
    tokens = checkpoint.tokens
    options = DecodeOptions(max_length=checkpoint.recipe.decoding.max_length)
    suppress = never_said(tokens)
    with one_thread():
        ((best,),) = decode(torch_model(checkpoint).session(), pixels, options, eos_id=tokens["eos"], suppress=suppress)
    return Golden(buffer.getvalue(), list(best.token_ids), reference_logits(checkpoint, pixels, best.token_ids))


def reference_logits(checkpoint: Checkpoint, pixels: np.ndarray, token_ids: list[int] | tuple[int, ...]) -> np.ndarray:
    """torch's logits [T + 1, vocab] for one photo [1, H, W, 3] before each given token and after the last."""
    session = torch_model(checkpoint).session()
    with one_thread():
        rows = [session.start(pixels)]
        rows += [session.step(np.array([token]), np.zeros(1, np.int64)) for token in token_ids]
    return np.concatenate(rows)

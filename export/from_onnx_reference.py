"""The golden pair of an export of the ONNX community: its own three graphs, run as they are and as their users do."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..runtime.errors import EdgecapError
from ..runtime.frames import Framing
from ..runtime.prompt import IMAGE, Prompt
from .from_onnx_files import PARTS, Community
from .golden import Golden, draw

LENGTH = 24  # tokens of the golden caption
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}
TYPES |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


def golden_of(found: Community, framing: Framing, prompt: Prompt, *, eos: int, suppress: Sequence[int]) -> Golden:
    """What the export says of the drawn picture, greedily: all of the prompt in one run, then a token at a time.

    suppress: ids that are never said. Raises EdgecapError where one of its graphs does not run.
    """
    buffer = io.BytesIO()
    draw().save(buffer, format="PNG")
    frames = framing.load(buffer.getvalue(), name="the golden picture")
    segments = prompt.segments(frames.rows, frames.columns)
    image = found.tokenizer.inner.token_to_id(IMAGE)
    ids = np.array([segments.flat(image, framing.tokens)], np.int64)
    embed = _Graph(found.files[PARTS[1]])
    (embeds,) = embed.run({"input_ids": ids})
    embeds = np.array(embeds)
    embeds[ids == image] = _features(found, frames.pixels).reshape(-1, embeds.shape[-1])
    decoder = _Graph(found.files[PARTS[2]])
    cache = {
        name: np.zeros((1, shape[1], 0, shape[3]), kind)
        for name, (kind, shape) in decoder.inputs.items()
        if name.startswith("past_key_values.")
    }
    said: list[int] = []
    logits: list[np.ndarray] = []
    seen = 0
    while True:
        seen += embeds.shape[1]
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, seen)),
            "position_ids": np.arange(seen - embeds.shape[1], seen)[None],
            "num_logits_to_keep": np.ones([1] * len(decoder.inputs.get("num_logits_to_keep", (0, ()))[1])),
            **cache,
        }
        results = dict(zip(decoder.outputs, decoder.run(feed), strict=True))
        logits.append(results["logits"][0, -1].astype(np.float32))
        cache = {name: results[name.replace("past_key_values.", "present.")] for name in cache}
        scores = logits[-1].copy()
        scores[list(suppress)] = -np.inf
        token = int(scores.argmax())
        if token == eos or len(said) == LENGTH:
            return Golden(buffer.getvalue(), said, np.stack(logits))
        said.append(token)
        (embeds,) = embed.run({"input_ids": np.array([[token]])})


def _features(found: Community, pixels: np.ndarray) -> np.ndarray:
    """Frames uint8 [F, S, S, 3], scaled as the processor does → their embeddings, one frame's behind the other's."""
    vision = _Graph(found.files[PARTS[0]])
    scale, shift = found.scaling()
    images = (pixels * scale + shift).transpose(0, 3, 1, 2)  # [F, 3, S, S]
    shape = vision.inputs["pixel_values"][1]
    axis = 0 if len(shape) == 5 and shape[1] != 1 else 1
    if len(shape) == 5:
        images = np.expand_dims(images, axis)
    seen = np.ones((*images.shape[:-3], *images.shape[-2:]))
    (features,) = vision.run({"pixel_values": images, "pixel_attention_mask": seen})
    return features.astype(np.float32)


class _Graph:
    """A file in ONNX Runtime. inputs: name → its type and shape."""

    def __init__(self, path: Path) -> None:
        self.path = path
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it says reaches the user as an error
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise self._broken(error) from None
        self.inputs = {value.name: (TYPES[value.type], value.shape) for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, feed: dict[str, Any]) -> list[np.ndarray]:
        """feed: more than it takes, in any type."""
        try:
            return self.session.run(None, {name: feed[name].astype(kind) for name, (kind, _) in self.inputs.items()})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> EdgecapError:
        reason = " ".join(str(error).split())[:300]
        return EdgecapError(f"{self.path} does not run in ONNX Runtime {ort.__version__}: {reason}")

"""Captioners that read a photo as frames among a prompt's words: what SmolVLM's kind adds to a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from .errors import UsageError
from .frames import Framing
from .prompt import Prompt, Segments

if TYPE_CHECKING:
    from .session import Ids, Logits, Pixels, Session

TOGETHER = 512 * 512  # pixels of frames that go through the vision graph in one run


class FrameSession(Protocol):
    """What an engine's session offers for these captioners, beyond `step`."""

    def encode(self, pixels: Pixels) -> None:
        """The vision graph: frames uint8 [N, F, S, S, 3] of N photos."""
        ...

    def prefill(self, prompt_ids: Ids | None = None, segments: Segments | None = None) -> Logits:
        """The prompt's segments with the encoded frames between them, then prompt_ids; logits [N, vocab]."""
        ...

    def step(self, ids: Ids, parents: Ids) -> Logits: ...


class FrameModel(Protocol):
    """An engine's model of a bundle with "frames"."""

    def session(self) -> FrameSession: ...


class FramedModel:
    """A model whose sessions take photos: it cuts them into frames and says the prompt around them."""

    def __init__(self, inner: FrameModel, framing: Framing, prompt: Prompt) -> None:
        self.inner, self.framing, self.prompt = inner, framing, prompt

    @classmethod
    def of(cls, inner: FrameModel, frames: Mapping[str, Any]) -> FramedModel:
        """From the manifest's "frames". Raises UsageError for what is none."""
        return cls(inner, *read_frames(frames))

    def session(self, framing: Framing | None = None) -> Session:
        """A new session; framing: in the place of the bundle's own."""
        return FramedSession(self.inner.session(), framing or self.framing, self.prompt)


class FramedSession:
    """A `Session` for photos uint8 [H, W, 3] each, which all become as many frames."""

    def __init__(self, inner: FrameSession, framing: Framing, prompt: Prompt) -> None:
        self.inner, self.framing, self.prompt = inner, framing, prompt
        self._segments: Segments | None = None

    def start(self, pixels: Pixels | Sequence[Pixels], prompt_ids: Ids | None = None) -> Logits:
        """See `Session.start`."""
        self.encode(pixels)
        return self.prefill(prompt_ids)

    def encode(self, pixels: Pixels | Sequence[Pixels]) -> None:
        """The first half of `start`: cut the photos, and the vision graph. Raises UsageError where one has more frames
        than another."""
        side = self.framing.side
        if isinstance(pixels, np.ndarray) and pixels.shape[1:3] == (side, side) and not self.framing.longest_edge:
            self._segments, frames = self.prompt.segments(), pixels[:, None]  # there is nothing to cut
        else:
            cut = [self.framing(Image.fromarray(photo)) for photo in pixels]
            grids = {(each.rows, each.columns) for each in cut}
            if len(grids) != 1:
                raise UsageError("the photos of a session must all be cut into the same tiles")
            self._segments, frames = self.prompt.segments(*grids.pop()), np.stack([each.pixels for each in cut])
        self.inner.encode(frames)

    def prefill(self, prompt_ids: Ids | None = None) -> Logits:
        """The second half of `start`: the prompt and what was encoded; logits [N, vocab]."""
        return self.inner.prefill(prompt_ids, self._segments)

    def step(self, ids: Ids, parents: Ids) -> Logits:
        """See `Session.step`."""
        return self.inner.step(ids, parents)


def read_frames(frames: Mapping[str, Any], *, vocab_size: int | None = None) -> tuple[Framing, Prompt]:
    """The manifest's "frames". Raises UsageError for what is none, and for prompt ids outside the vocabulary."""
    if not isinstance(frames, Mapping) or "prompt" not in frames:
        raise UsageError("frames must be an object with a prompt")
    framing = Framing.from_dict(frames)
    prompt = Prompt.from_dict(frames["prompt"], vocab_size=vocab_size)
    if not prompt.after:
        raise UsageError("prompt after must have the id that captions follow")
    if framing.split and not prompt.tiles:
        raise UsageError("framing splits photos into tiles, which the prompt has no words for")
    return framing, prompt


def write_frames(framing: Framing, prompt: Prompt) -> dict[str, Any]:
    """As the manifest's "frames"."""
    return {**framing.to_dict(), "prompt": prompt.to_dict()}


def look(pixels: Pixels, encode: Callable[[Pixels], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What a vision graph, `encode`, gives for frames uint8 [N, F, S, S, 3]: each output [N, F, …].

    So few frames go through it together that a run's activations are not many times those of one large frame, and so
    many that small ones fill the kernels.
    """
    frames = np.ascontiguousarray(pixels).reshape(-1, *pixels.shape[-3:])
    count = max(1, TOGETHER // (frames.shape[1] * frames.shape[2]))
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(frames), count):
        for name, value in encode(frames[start : start + count]).items():
            parts.setdefault(name, []).append(np.array(value))  # its own: an engine may use the memory again
    return {
        name: np.concatenate(found).reshape(*pixels.shape[:2], *found[0].shape[1:]) for name, found in parts.items()
    }


def pieces(segments: Segments, prompt_ids: Ids | None) -> list[np.ndarray]:
    """The ids behind each frame, int64 [length]; behind the last one, what the caption is to continue, too."""
    found = [np.array(ids, np.int64) for ids in segments.after]
    if prompt_ids is not None:
        found[-1] = np.concatenate([found[-1], np.asarray(prompt_ids, np.int64)])
    return found

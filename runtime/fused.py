"""The one-file captioner of a bundle, fused.onnx: one call from a decoded picture to the caption."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .bundle import Bundle
from .decode import MAX_BEAM, MAX_LENGTH
from .errors import EdgecapError, UsageError
from .process import computing, mind

if TYPE_CHECKING:
    import onnxruntime as ort

    from .captioner import Captioner
    from .session import Pixels


class FusedCaption(NamedTuple):
    """ids without BOS and EOS; text: None where the graph leaves it to the tokenizer; logprob as in `Hypothesis`."""

    token_ids: tuple[int, ...]
    text: str | None
    logprob: float


class FusedCaptioner:
    """What an app does with fused.onnx, which needs no other file: one `run`. Calls may come from several threads."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        mind(self)

    @classmethod
    def load(cls, bundle: Bundle | str | os.PathLike[str], *, threads: int | None = None) -> FusedCaptioner:
        """Load the fused graph of a bundle (opened, or its path). Raises UsageError where it has none."""
        from .backends.onnx import load_graph, session_options

        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        graph = bundle.manifest.get("graphs", {}).get("fused")
        if graph is None:
            raise UsageError(f"{bundle.path} has no fused graph; export it with --fused")
        return cls(load_graph(bundle, graph, session_options(threads)))

    def __call__(self, image: Pixels, *, beam: int = 1, max_length: int | None = None) -> FusedCaption:
        """Caption a picture uint8 [H, W, 3], RGB of any size. beam 1 is greedy; max_length: default the bundle's.

        Raises UsageError for another array or number, EdgecapError where the engine fails.
        """
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise UsageError(f"a picture must be uint8 [height, width, 3], not {given}")
        if image.size == 0:
            raise UsageError(f"the picture is empty, {list(image.shape)}")
        feed = {"image": np.ascontiguousarray(image), "beam": _number("beam", beam, MAX_BEAM)}
        if max_length is not None:
            feed["max_length"] = _number("max_length", max_length, MAX_LENGTH)
        try:
            with computing():
                values = self._session.run(self._outputs, feed)
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = " ".join(str(error).split())[:300]
            raise EdgecapError(f"ONNX Runtime failed in the bundle's fused graph: {reason}") from None
        found = dict(zip(self._outputs, values, strict=True))
        text = str(found["text"][0]) if "text" in found else None
        return FusedCaption(tuple(found["ids"].tolist()), text, float(found["logprob"]))


def _number(name: str, value: int, high: int) -> np.ndarray:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= high:
        raise UsageError(f"{name} must be a whole number from 1 to {high}, not {value!r}")
    return np.array(value, np.int64)


def check_fused(captioner: Captioner, fused: FusedCaptioner, pixels: Sequence[Pixels], *, beam: int = 1) -> float:
    """Share of pictures uint8 [H, W, 3] for which the fused graph and the runtime's search give the same ids.

    The pictures should have the size that the encoder takes: then both see the same pixels.
    """
    if not len(pixels):
        raise UsageError("no pictures to compare the fused graph on")
    same = [captioner(image, beam=beam).token_ids == fused(image, beam=beam).token_ids for image in pixels]
    return sum(same) / len(same)

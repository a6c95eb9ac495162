"""A bundle and a photo in, a caption out: the object an app holds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from .backends import load_model
from .bundle import Bundle
from .decode import DecodeOptions, Hypothesis, decode, never_said
from .errors import UsageError
from .preprocess import Preprocess
from .tokenizer import Tokenizer, plain_words
from .view import View, whole_view

if TYPE_CHECKING:
    from .preprocess import ImageSource
    from .session import Ids, Model, Pixels, Session

BATCH = 8  # photos captioned together
ONE_PHOTO = (str, bytes, bytearray, memoryview, os.PathLike)


@dataclass(frozen=True)
class Caption:
    """One caption. `text` includes the prompt, `token_ids` do not; logprob and score as in `Hypothesis`.

    cut: the deadline ended it. alternatives: with a beam, the other hypotheses, best first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    score: float
    alternatives: tuple[Caption, ...] = ()
    cut: bool = False

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """For JSON; "cut" and "alternatives" only where there are some."""
        values = {
            "caption": self.text,
            "logprob": self.logprob,
            "score": self.score,
            "tokens": list(self.token_ids),
            **({"cut": True} if self.cut else {}),
        }
        others = [other.to_dict() for other in self.alternatives]
        return {**values, "alternatives": others} if others else values


class Captioner:
    """A loaded bundle. Calls may come from several threads at once; `close` (or `with`) frees the engine."""

    def __init__(self, bundle: Bundle, model: Model, tokenizer: Tokenizer) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.preprocess = Preprocess.from_dict(manifest["preprocess"])
        self.tokens: dict[str, int] = manifest["tokens"]
        self._suppress = never_said(self.tokens)
        self._model: Model | None = model
        self._view = whole_view(self.preprocess, manifest)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: Literal["hash", "sizes"] = "hash",
        model: Model | None = None,
    ) -> Captioner:
        """Open, check and load a bundle (see `Bundle.open`). threads: per operator; None: the engine chooses.

        model: computes in the place of the bundle's engine.
        Raises UsageError if there is no bundle, EdgecapError if it is broken or its engine is missing or too
        old.
        """
        bundle = Bundle.open(path, verify)
        tokenizer = Tokenizer.load(bundle.file("tokenizer.json"))
        return cls(bundle, model or load_model(bundle, threads=threads), tokenizer)

    def session(self) -> Session:
        """A new decoding session (for one thread), for callers who do their own search."""
        if self._model is None:
            raise UsageError(f"the captioner of {self.bundle.path} is closed")
        return self._model.session()

    def view(self, *, image_size: int | None = None, tiles: bool | None = None) -> View:
        """How photos are seen within a budget: frames of `image_size` pixels a side, split into tiles or not; None: as
        the bundle says. Raises UsageError for what its model does not take."""
        return self._view.within(image_size, tiles)

    @overload
    def __call__(self, image_or_images: ImageSource, **options: Any) -> Caption: ...
    @overload
    def __call__(self, image_or_images: Iterable[ImageSource], **options: Any) -> list[Caption]: ...
    def __call__(
        self,
        image_or_images: Any,
        *,
        prompt: str | None = None,
        beam: int | None = None,
        image_size: int | None = None,
        tiles: bool | None = None,
        **options: Any,
    ) -> Caption | list[Caption]:
        """Caption one photo, or each of a list of photos.

        A photo is a path, the bytes of an image file, a PIL image or an array uint8 [H, W, 3]; an array [N,
        H, W, 3] is N photos. prompt: text that the caption continues; its case and punctuation do not count. beam and
        the other `DecodeOptions` default to the bundle's; deadline_ms counts for each batch of photos, from before it
        is read. image_size, tiles: see `view`. Raises EdgecapError naming a photo that cannot be read, UsageError for
        a bad option.
        """
        began = time.monotonic()
        single = isinstance(image_or_images, ONE_PHOTO) or hasattr(image_or_images, "getexif")
        single = single or (isinstance(image_or_images, np.ndarray) and image_or_images.ndim != 4)
        images = [image_or_images] if single else image_or_images
        captions: list[Caption] = []
        batch: list[Pixels] = []
        settings = self.settings(prompt=prompt, beam=beam, **options)
        view = self.view(image_size=image_size, tiles=tiles)
        for image in images:
            batch.append(view.load(image))
            if len(batch) == BATCH:
                captions += self._caption(batch, view, *settings, began)
                batch, began = [], time.monotonic()
        if batch:
            captions += self._caption(batch, view, *settings, began)
        return captions[0] if single else captions

    def caption_arrays(
        self,
        pixels: Pixels | Sequence[Pixels],
        *,
        prompt: str | None = None,
        beam: int | None = None,
        image_size: int | None = None,
        tiles: bool | None = None,
        began: float | None = None,
        **options: Any,
    ) -> list[Caption]:
        """Caption photos preprocessed by the `view` of these options, uint8 [N, H, W, 3] or as many arrays, in one
        batch; options as in a call. began: the time.monotonic() from which a deadline counts, by default now."""
        view = self.view(image_size=image_size, tiles=tiles)
        view.check(pixels)
        settings = self.settings(prompt=prompt, beam=beam, **options)
        return self._caption(pixels, view, *settings, time.monotonic() if began is None else began)

    def settings(
        self, *, prompt: str | None = None, beam: int | None = None, **options: Any
    ) -> tuple[DecodeOptions, Ids | None]:
        """The decoding options and prompt ids of a call with these arguments. Raises UsageError if bad."""
        given = {name: value for name, value in {"beam": beam, **options}.items() if value is not None}
        chosen = DecodeOptions.from_dict({**self.bundle.manifest["decoding"], **given})
        words = plain_words(prompt or "")
        if not words:
            return chosen, None
        ids = self.tokenizer.encode(words)
        if self.tokens.get("unk") in ids:
            raise UsageError(f"the prompt {prompt!r} has words this model does not know; use others")
        return chosen, np.asarray(ids, np.int64)

    def _caption(
        self,
        pixels: Pixels | Sequence[Pixels],
        view: View,
        options: DecodeOptions,
        prompt_ids: Ids | None,
        began: float,
    ) -> list[Caption]:
        model = self._model  # closing meanwhile lets this call finish
        if model is None:
            raise UsageError(f"the captioner of {self.bundle.path} is closed")
        before = () if prompt_ids is None else tuple(prompt_ids.tolist())
        captions: list[Caption | None] = [None] * len(pixels)
        for places in view.alike(pixels):
            found = decode(
                view.session(model),
                np.stack([pixels[place] for place in places]) if view.stacks else [pixels[place] for place in places],
                options,
                eos_id=self.tokens["eos"],
                suppress=self._suppress,
                prompt_ids=prompt_ids,
                began=began,
            )
            for place, hypotheses in zip(places, found, strict=True):
                captions[place] = self._to_caption(hypotheses, before)
        return captions

    def _to_caption(self, hypotheses: list[Hypothesis], before: tuple[int, ...]) -> Caption:
        best, *others = [
            Caption(
                self.tokenizer.decode(before + each.token_ids), each.token_ids, each.logprob, each.score, cut=each.cut
            )
            for each in hypotheses
        ]
        return replace(best, alternatives=tuple(others))

    def close(self) -> None:
        """Free the engine; calls already running finish. Closing twice is fine."""
        self._model = None

    def __enter__(self) -> Captioner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""A bundle and a photo in, a caption out: the object an app holds."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np

from .backends import load_model
from .bundle import Bundle
from .decode import CancelToken, DecodeOptions, Hypothesis, decode, never_said, search
from .errors import UsageError
from .preprocess import Preprocess
from .tokenizer import Tokenizer, plain_words
from .view import View, whole_view

if TYPE_CHECKING:
    from .preprocess import ImageSource
    from .session import Ids, Model, Pixels, Session
    from .streaming import AsyncStream, Stream

BATCH = 8  # photos captioned together
ONE_PHOTO = (str, bytes, bytearray, memoryview, os.PathLike)


@dataclass(frozen=True)
class Caption:
    """One caption. `text` includes the prompt, `token_ids` do not; logprob and score as in `Hypothesis`.

    cut: the deadline or a cancellation ended it. alternatives: with a beam, the other hypotheses, best first.
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


class Options(TypedDict, total=False):
    """What every call takes by name; None is as good as left out, and `DecodeOptions` says what it does otherwise.

    prompt: text that the caption continues; its case and punctuation do not count. beam and the other decoding options
    default to the bundle's; deadline_ms counts for each batch of photos, from before it is read. image_size, tiles: see
    `Captioner.view`.
    """

    prompt: str | None
    beam: int | None
    max_length: int | None
    min_length: int | None
    length_penalty: float | None
    no_repeat_ngram: int | None
    deadline_ms: float | None
    image_size: int | None
    tiles: bool | None


@dataclass(frozen=True)
class _Call:
    """One call's options, made sense of, and the model as it was when the call began: closing lets it finish."""

    model: Model
    view: View
    options: DecodeOptions
    prompt_ids: Ids | None
    cancel: CancelToken | None

    @property
    def before(self) -> tuple[int, ...]:
        """The prompt's ids."""
        return () if self.prompt_ids is None else tuple(self.prompt_ids.tolist())


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
        return self._running().session()

    def view(self, *, image_size: int | None = None, tiles: bool | None = None) -> View:
        """How photos are seen within a budget: frames of `image_size` pixels a side, split into tiles or not; None: as
        the bundle says. Raises UsageError for what its model does not take."""
        return self._view.within(image_size, tiles)

    @overload  # a str is also an Iterable of them: what is one photo comes first
    def __call__(  # type: ignore[overload-overlap]
        self, image_or_images: ImageSource, *, cancel: CancelToken | None = None, **options: Unpack[Options]
    ) -> Caption: ...
    @overload
    def __call__(
        self, image_or_images: Iterable[ImageSource], *, cancel: CancelToken | None = None, **options: Unpack[Options]
    ) -> list[Caption]: ...
    def __call__(
        self, image_or_images: Any, *, cancel: CancelToken | None = None, **options: Unpack[Options]
    ) -> Caption | list[Caption]:
        """Caption one photo, or each of a list of photos.

        A photo is a path, the bytes of an image file, a PIL image or an array uint8 [H, W, 3]; an array [N,
        H, W, 3] is N photos. cancel: a threading.Event, say; once it is set, the search ends before its next step with
        what it has (`cut`), and of a list the photos behind that batch are left out: fewer captions than photos.
        Raises EdgecapError naming a photo that cannot be read, UsageError for a bad option.
        """
        began = time.monotonic()
        single = _is_one(image_or_images)
        images = [image_or_images] if single else image_or_images
        captions: list[Caption] = []
        batch: list[Pixels] = []
        call = self._call(options, cancel)
        for image in images:
            if captions and cancel is not None and cancel.is_set():
                return captions
            batch.append(call.view.load(image))
            if len(batch) == BATCH:
                captions += self._caption(batch, call, began)
                batch, began = [], time.monotonic()
        if batch:
            captions += self._caption(batch, call, began)
        return captions[0] if single else captions

    def caption_arrays(
        self,
        pixels: Pixels | Sequence[Pixels],
        *,
        began: float | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[Options],
    ) -> list[Caption]:
        """Caption photos preprocessed by the `view` of these options, uint8 [N, H, W, 3] or as many arrays, in one
        batch; options as in a call. began: the time.monotonic() from which a deadline counts, by default now."""
        call = self._call(options, cancel)
        call.view.check(pixels)
        return self._caption(pixels, call, time.monotonic() if began is None else began)

    def stream(self, image: ImageSource, *, cancel: CancelToken | None = None, **options: Unpack[Options]) -> Stream:
        """Caption one photo as a `Stream`: pieces of its text as they are said, which joined are the caption's text.

        With a beam there is one piece, at the end: its best caption may change with every step. Raises UsageError
        for a bad option or a list at once; what is wrong with the photo is raised by the first piece.
        """
        from .streaming import Either, Stream

        if not _is_one(image):
            raise UsageError("a stream is of one photo: caption a list by calling the captioner")
        call, ended = self._call(options, cancel), Either(cancel)
        return Stream(self._said(image, replace(call, cancel=ended), time.monotonic()), ended)

    @overload
    async def acaption(  # type: ignore[overload-overlap]
        self, image_or_images: ImageSource, *, cancel: CancelToken | None = None, **options: Unpack[Options]
    ) -> Caption: ...
    @overload
    async def acaption(
        self, image_or_images: Iterable[ImageSource], *, cancel: CancelToken | None = None, **options: Unpack[Options]
    ) -> list[Caption]: ...
    async def acaption(
        self, image_or_images: Any, *, cancel: CancelToken | None = None, **options: Unpack[Options]
    ) -> Caption | list[Caption]:
        """A call that does not block the event loop: it is made in a thread. Cancelling the task ends the search."""
        from .streaming import in_thread

        return await in_thread(lambda ended: self(image_or_images, cancel=ended, **options), cancel)

    def astream(
        self, image: ImageSource, *, cancel: CancelToken | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """`stream` for `async for`; every step is made in a thread. Cancelling the task ends the search."""
        from .streaming import AsyncStream

        return AsyncStream(self.stream(image, cancel=cancel, **options))

    def settings(
        self, *, prompt: str | None = None, beam: int | None = None, **options: Any
    ) -> tuple[DecodeOptions, Ids | None]:
        """The decoding options and prompt ids of a call with these arguments. Raises UsageError if bad."""
        given: dict[str, Any] = {name: value for name, value in {"beam": beam, **options}.items() if value is not None}
        chosen = DecodeOptions.from_dict({**self.bundle.manifest["decoding"], **given})
        words = plain_words(prompt or "")
        if not words:
            return chosen, None
        ids = self.tokenizer.encode(words)
        if self.tokens.get("unk") in ids:
            raise UsageError(f"the prompt {prompt!r} has words this model does not know; use others")
        return chosen, np.asarray(ids, np.int64)

    def _call(self, options: Options, cancel: CancelToken | None) -> _Call:
        rest: dict[str, Any] = dict(options)
        view = self.view(image_size=rest.pop("image_size", None), tiles=rest.pop("tiles", None))
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise UsageError(f"cancel must have is_set(), as a threading.Event has, not be {type(cancel).__name__}")
        return _Call(self._running(), view, *self.settings(**rest), cancel)

    def _running(self) -> Model:
        model = self._model  # read once: another thread may close
        if model is None:
            raise UsageError(f"the captioner of {self.bundle.path} is closed")
        return model

    def _search(self, call: _Call, began: float) -> dict[str, Any]:
        """Of `decode` and `search`, all but session, pixels and options."""
        return {
            "eos_id": self.tokens["eos"],
            "suppress": self._suppress,
            "prompt_ids": call.prompt_ids,
            "began": began,
            "cancel": call.cancel,
        }

    def _caption(self, pixels: Pixels | Sequence[Pixels], call: _Call, began: float) -> list[Caption]:
        model, view = call.model, call.view
        captions: dict[int, Caption] = {}
        for places in view.alike(pixels):
            photos: Any = [pixels[place] for place in places]
            photos = np.stack(photos) if view.stacks else photos
            found = decode(view.session(model), photos, call.options, **self._search(call, began))
            for place, hypotheses in zip(places, found, strict=True):
                captions[place] = self._to_caption(hypotheses, call.before)
        return [captions[place] for place in range(len(pixels))]

    def _said(self, image: ImageSource, call: _Call, began: float) -> Generator[str, None, Caption]:
        from .streaming import spoken

        photo = call.view.load(image)
        photos: Any = photo[None] if call.view.stacks else [photo]
        steps = search(call.view.session(call.model), photos, call.options, **self._search(call, began))
        (hypotheses,) = yield from spoken(self.tokenizer, call.before, steps)
        return self._to_caption(hypotheses, call.before)

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


def _is_one(image_or_images: Any) -> bool:
    """Whether this is one photo, and not several."""
    if isinstance(image_or_images, ONE_PHOTO) or hasattr(image_or_images, "getexif"):
        return True
    if isinstance(image_or_images, np.ndarray):
        return image_or_images.ndim != 4
    return not isinstance(image_or_images, Iterable)  # no photo: loading it says so

"""The process that runs one bundle for the bench; peers share `serve` and differ only in what they load.

Requests and answers are JSON lines on stdin and stdout:
  {"op": "load", "path", "threads", "decoding"}  → {"import_s", "load_s", "facts"}
  {"op": "time", "photos": [file, …]}            → {"runs": [{stage: seconds, "tokens": n}, …]}
  {"op": "time", "photos": …, "once": true}      → the same as without it, of one caption a photo; see time_once
  {"op": "caption", "photos": [file, …]}         → {"captions": [{"text", "logprob", "tokens", "ids"}, …]}
  {"op": "forced", "photo": file, "ids": [id, …] or null, "logits": file}  → {"ids", "text"}; see BundleEngine.forced
  {"op": "pass", "photo": file, "logits": file}  → {"run": {stage: seconds, "tokens": n, "ids"}}; see `with_logits`
  {"op": "profile", …}                           → {"files": [file, …]}; see profiler.profiled
logprob is null, and ids are absent, where an engine does not tell them. Each answer has "ok" (false comes with
"error", one line) and "peak_rss" in bytes. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from ..runtime.errors import EdgecapError
from .rss import peak_rss

if TYPE_CHECKING:
    import numpy as np


class Engine(Protocol):
    """A loaded captioner, cut where the bench holds its clock. One that searches by itself has, instead of session and
    decode, `run(pixels, marks)`, which marks what it can and returns the ids."""

    facts: dict[str, Any]  # what the record says about it: versions, and how it was loaded

    def pixels(self, photo: str) -> np.ndarray | None:
        """A JPEG file as uint8 [1, H, W, 3]; None where the graph itself resizes."""

    def picture(self, photo: str) -> Any:
        """A JPEG file decoded, at its own size: what `caption` takes besides a file."""

    def session(self) -> Any:
        """A new runtime Session."""

    def decode(self, session: Any, pixels: np.ndarray) -> Any:
        """Run the search; returns its best hypothesis."""

    def caption(self, photo: Any) -> dict[str, Any]:
        """JPEG file or decoded picture to {"text", "logprob", "tokens", "ids"}, by the call an app would make."""


Loader = Callable[[dict[str, Any]], Engine]


class Marks:
    """The stopwatch of one caption: when its picture was encoded and the logits of each token were there, and these
    logits where they are wanted and can be had."""

    def __init__(self, *, keep: bool = False) -> None:
        self.encoded: float | None = None
        self.tokens: list[float] = []
        self.keep = keep
        self.logits: list[np.ndarray] = []

    def encode(self) -> None:
        """The picture's embeddings are there. Some engines ask for them again at every step: only the first counts."""
        if not self.tokens:
            self.encoded = perf_counter()

    def token(self, logits: Any = None) -> None:
        """Logits [vocabulary] that the token is taken from."""
        self.tokens.append(perf_counter())
        if self.keep and logits is not None:
            import numpy as np

            self.logits.append(np.array(logits, np.float32).reshape(-1))


class Marking:
    """A Session that marks when each part of another one was done."""

    def __init__(self, session: Any, marks: Marks) -> None:
        self.session, self.marks = session, marks

    def start(self, pixels: np.ndarray, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        if hasattr(self.session, "encode"):  # start, where the session has its halves
            self.session.encode(pixels)
            self.marks.encode()
            logits = self.session.prefill(prompt_ids)
        else:
            logits = self.session.start(pixels, prompt_ids)
        self.marks.token(logits)
        return logits

    def step(self, ids: np.ndarray, parents: np.ndarray) -> np.ndarray:
        logits = self.session.step(ids, parents)
        self.marks.token(logits)
        return logits


def watched(engine: Any, photo: str, marks: Marks) -> tuple[dict[str, float], Sequence[int]]:
    """Caption one photo: the seconds of each part with the number of tokens, and their ids. Parts that nobody saw are
    left out, all of them where the graph itself resizes.
    """
    begin = perf_counter()
    pixels = engine.pixels(photo)
    ready = perf_counter()
    if pixels is None:
        return {}, ()
    if hasattr(engine, "run"):
        ids = engine.run(pixels, marks)
    else:
        ids = engine.decode(Marking(engine.session(), marks), pixels).token_ids
    end = perf_counter()
    if not marks.tokens:
        raise RuntimeError("nobody saw its tokens")
    first, further = marks.tokens[0], len(marks.tokens) - 1
    run = {"preprocess": ready - begin, "first_token": first - (marks.encoded or ready), "tokens": len(ids)}
    if marks.encoded is not None:
        run |= {"encode": marks.encoded - ready, "decode": end - marks.encoded}
    if further:
        run["next_token"] = (end - first) / further
    return with_ttft(run), ids


def time_stages(engine: Engine, photo: str) -> dict[str, float]:
    return watched(engine, photo, Marks())[0]


def with_ttft(run: dict[str, float]) -> dict[str, float]:
    """Times of one photo's parts and, where these are known, of all of them up to the first token."""
    if {"preprocess", "first_token"} <= run.keys():
        run["ttft"] = run["preprocess"] + run.get("encode", 0.0) + run["first_token"]
    return run


def time_whole(engine: Engine, photo: str) -> dict[str, float]:
    """Seconds from file to text, and the caption's tokens."""
    begin = perf_counter()
    caption = engine.caption(photo)
    return {"end_to_end": perf_counter() - begin, "tokens": caption["tokens"]}


def time_picture(engine: Engine, photo: str) -> dict[str, float]:
    """Seconds from a decoded picture of its own size to text."""
    picture = engine.picture(photo)
    begin = perf_counter()
    engine.caption(picture)
    return {"picture_to_text": perf_counter() - begin}


def time_photos(engine: Engine, photos: list[str]) -> list[dict[str, float]]:
    """Time each photo in parts and whole; they take turns at going first, as the last is preempted more."""
    engine.caption(photos[0])  # untimed: the caches still hold what ran before this turn
    runs = []
    parts = (time_stages, time_whole, time_picture)
    for i, photo in enumerate(photos):
        turn = [parts[(i + k) % len(parts)] for k in range(len(parts))]
        runs.append({key: value for part in turn for key, value in part(engine, photo).items()})
    return runs


def time_once(engine: Engine, photo: str) -> dict[str, float]:
    """The same by one caption, where it takes so long that its words' way from ids to text does not count, nor what
    the caches hold: JPEG → text is the sum of the parts. Nothing is timed from a decoded picture.
    """
    begin = perf_counter()
    run = time_stages(engine, photo)
    return run | {"end_to_end": perf_counter() - begin} if run else time_whole(engine, photo)


def with_logits(engine: Engine, photo: str, logits: str | None) -> dict[str, Any]:
    """What one caption's parts took, and its "ids".

    logits: an .npy file to write those of every token to, float32 [tokens, vocabulary]; nothing is written where the
    engine does not show them.
    """
    marks = Marks(keep=logits is not None)
    run, ids = watched(engine, photo, marks)
    if marks.logits:
        import numpy as np

        np.save(str(logits), np.stack(marks.logits))
    return run | {"ids": [int(i) for i in ids]}


def answer(state: dict[str, Engine], load: Loader, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks."""
    op = request.get("op")
    if op == "load":
        engine = state["engine"] = load(request)
        return {"facts": engine.facts}
    if op == "time" and request.get("once"):
        return {"runs": [time_once(state["engine"], photo) for photo in request["photos"]]}
    if op == "time":
        return {"runs": time_photos(state["engine"], request["photos"])}
    if op == "caption":
        return {"captions": [state["engine"].caption(photo) for photo in request["photos"]]}
    if op == "forced":
        return state["engine"].forced(request["photo"], request["ids"], request["logits"])
    if op == "profile":
        from .profiler import profiled

        return {"files": profiled(load, request)}
    if op == "pass":
        return {"run": with_logits(state["engine"], request["photo"], request.get("logits"))}
    raise ValueError(f"unknown request {op!r}")


def serve(load: Loader) -> None:
    """Answer requests until the input ends. What libraries print goes to stderr instead."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state: dict[str, Engine] = {}
    for line in sys.stdin:
        try:
            reply = {"ok": True} | answer(state, load, json.loads(line))
        except EdgecapError as error:
            reply = {"ok": False, "error": error.message}
        except Exception as error:  # whatever it is, the bench must hear the reason
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply | {"peak_rss": peak_rss()}) + "\n")
        out.flush()


class BundleEngine:
    """A bundle, through the runtime alone."""

    def __init__(self, request: dict[str, Any]) -> None:
        begin = perf_counter()
        from importlib import import_module

        from ..runtime.backends import BACKENDS
        from ..runtime.bundle import Bundle
        from ..runtime.captioner import Captioner
        from ..runtime.decode import DecodeOptions, decode

        backend = BACKENDS.get(Bundle.open(request["path"], verify="sizes").manifest["backend"])
        for package in ("tokenizers", *([backend.package] if backend else [])):
            import_module(package)  # so that load_s is the bundle's part alone
        imported = perf_counter()
        self._captioner = Captioner.load(request["path"], threads=request["threads"])
        loaded = perf_counter()
        self.facts = {"import_s": imported - begin, "load_s": loaded - imported, "versions": versions()}
        if framing := self._captioner.view().framing:
            self.facts["image_tokens"] = f"{framing.tokens} a tile" if framing.split else framing.tokens
        self._decoding = request["decoding"]
        self._decode = decode
        self._options = DecodeOptions.from_dict(self._decoding)
        self._eos, self._suppress = special_ids(self._captioner.tokens)

    def pixels(self, photo: str) -> np.ndarray | None:
        return self._captioner.view().load(photo)[None]  # [1, H, W, 3]

    def picture(self, photo: str) -> Any:
        return decoded(photo)

    def session(self) -> Any:
        return self._captioner.session()

    def decode(self, session: Any, pixels: np.ndarray) -> Any:
        return self._decode(session, pixels, self._options, eos_id=self._eos, suppress=self._suppress)[0][0]

    def caption(self, photo: Any) -> dict[str, Any]:
        caption = self._captioner(photo, **self._decoding)
        ids = [int(i) for i in caption.token_ids]
        return {"text": caption.text, "logprob": float(caption.logprob), "tokens": len(ids), "ids": ids}

    def forced(self, photo: str, ids: Sequence[int] | None, logits: str) -> dict[str, Any]:
        """The photo's caption; its logits [T + 1, vocabulary] where the T tokens given (by default its own) are said
        are written to the .npy file named.
        """
        import numpy as np

        from ..runtime.verify import teacher_forced

        caption = self._captioner(photo, **self._decoding)
        own = [int(i) for i in caption.token_ids]
        pixels = self._captioner.view().load(photo)
        np.save(logits, teacher_forced(self._captioner, pixels, own if ids is None else list(ids)))
        return {"ids": own, "text": caption.text}


class FusedEngine:
    """The same bundle by its one-graph form: it resizes and searches inside, so there are no parts to time."""

    def __init__(self, request: dict[str, Any]) -> None:
        begin = perf_counter()
        import numpy as np
        import onnxruntime  # noqa: F401  before the clock of load_s

        from ..runtime.bundle import Bundle
        from ..runtime.fused import FusedCaptioner
        from ..runtime.tokenizer import Tokenizer

        imported = perf_counter()
        bundle = Bundle.open(request["path"])
        self._captioner = FusedCaptioner.load(bundle, threads=request["threads"])
        if "text" not in bundle.manifest["graphs"]["fused"]["outputs"]:
            self._tokenizer = Tokenizer.load(bundle.read("tokenizer.json"))
        loaded = perf_counter()
        self.facts = {"import_s": imported - begin, "load_s": loaded - imported, "versions": versions()}
        self._array = np.asarray
        self._beam, self._longest = request["decoding"]["beam"], request["decoding"]["max_length"]

    def pixels(self, photo: str) -> None:
        return None

    def picture(self, photo: str) -> Any:
        return decoded(photo)

    def session(self) -> Any:
        raise NotImplementedError("a fused graph has no session")

    def decode(self, session: Any, pixels: np.ndarray) -> Any:
        raise NotImplementedError("a fused graph searches inside")

    def caption(self, photo: Any) -> dict[str, Any]:
        picture = decoded(photo) if isinstance(photo, str) else photo
        found = self._captioner(self._array(picture), beam=self._beam, max_length=self._longest)
        text = found.text if found.text is not None else self._tokenizer.decode(found.token_ids)
        ids = [int(i) for i in found.token_ids]
        return {"text": text, "logprob": found.logprob, "tokens": len(ids), "ids": ids}


def bundle_engine(request: dict[str, Any]) -> Engine:
    return FusedEngine(request) if request.get("fused") else BundleEngine(request)


def decoded(photo: str) -> Any:
    """A photo file as an RGB picture of its own size, all of it read."""
    from ..runtime.preprocess import load_image

    return load_image(photo)


def special_ids(tokens: dict[str, int]) -> tuple[int, tuple[int, ...]]:
    """A bundle's or checkpoint's "tokens" → (EOS, the ids never emitted)."""
    from ..runtime.decode import never_said

    return tokens["eos"], never_said(tokens)


def versions(*more: str) -> dict[str, str]:
    """Versions of what did the work in this process."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("edgecap", "numpy", "PIL", "onnxruntime", "tokenizers", *more):
        if name in sys.modules:
            found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return found


if __name__ == "__main__":
    serve(bundle_engine)

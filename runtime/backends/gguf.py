"""GGUF: the photo's embeddings go into llama.cpp as a prefix, then tokens; the encoder runs in ONNX Runtime."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import EdgecapError
from .llama import MAX_ROWS, Context, LlamaModel, Pool

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..prompt import Segments
    from ..session import Ids, Logits, Pixels

PHOTOS = 4  # of one context: with the widest beam, its rows are all that a context can have


class Encoder(Protocol):
    """Photos uint8 [N, H, W, 3] → prefix embeddings float32 [N, L, dim]; any threads at once."""

    def __call__(self, pixels: Pixels) -> np.ndarray: ...


class GgufModel:
    """Encoder and decoder, shared by all sessions; each session decodes in contexts of its own."""

    def __init__(self, encoder: Encoder, decoder: LlamaModel, manifest: dict[str, Any]) -> None:
        self.encoder, self.decoder, self.pool = encoder, decoder, Pool(decoder)
        self.bos: int = manifest["tokens"]["bos"]
        self.openings: dict[tuple[int, ...], bytes] = {}  # fixed texts → one row behind them
        defaults = manifest["decoding"]
        self.beam, self.length = defaults.get("beam", 1), defaults.get("max_length", 24)

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> GgufModel:
        """Load both. Raises EdgecapError if one cannot be loaded or is not what the manifest says."""
        manifest, where = bundle.manifest, f"{bundle.path}/bundle.json"
        settings = manifest.get("gguf")
        if not isinstance(settings, dict) or settings.get("encoder") not in ("onnx", "mmproj"):
            raise EdgecapError(f'{where}: gguf must say which "encoder" there is (onnx or mmproj); export it again')
        path = bundle.path / manifest["graphs"]["decoder"]["file"]
        decoder = LlamaModel(path, threads=threads)
        if decoder.vocab_size != manifest["tokens"]["vocab_size"]:
            raise EdgecapError(f"{path} has {decoder.vocab_size} words, not those of bundle.json; export it again")
        make = _mmproj_encoder if settings["encoder"] == "mmproj" else _onnx_encoder
        return cls(make(bundle, settings, decoder), decoder, manifest)

    def session(self) -> GgufSession:
        return GgufSession(self)

    def encode(self, pixels: Pixels) -> np.ndarray:
        """Photos uint8 [N, H, W, 3] → prefix float32 [N, L, dim]."""
        prefix = self.encoder(np.ascontiguousarray(pixels)).astype(np.float32, copy=False)
        if prefix.ndim != 3 or prefix.shape[2] != self.decoder.dim:
            size = f"{list(prefix.shape)}, not [photos, positions, {self.decoder.dim}]"
            raise EdgecapError(f"the encoder's output is {size}, which the decoder needs; export the bundle again")
        return prefix


def _mmproj_encoder(bundle: Bundle, settings: dict[str, Any], decoder: LlamaModel) -> Encoder:
    from .mtmd import MtmdEncoder

    bias = settings.get("bias")
    if not isinstance(bias, list) or len(bias) != decoder.dim or not all(type(value) is float for value in bias):
        raise EdgecapError(f"{bundle.path}/bundle.json: gguf.bias must be {decoder.dim} numbers; export it again")
    side = bundle.manifest["frames"]["native"] if "frames" in bundle.manifest else None
    return MtmdEncoder(bundle.path / bundle.manifest["graphs"]["encoder"]["file"], decoder, np.array(bias), side)


def _onnx_encoder(bundle: Bundle, settings: dict[str, Any], decoder: LlamaModel) -> Encoder:
    from .onnx import load_graph, run_graph, session_options

    graph = bundle.manifest["graphs"]["encoder"]
    output: Any = settings.get("prefix")
    if len(graph["inputs"]) != 1 or output not in graph["outputs"]:
        where = f"{bundle.path}/bundle.json"
        raise EdgecapError(f"{where}: gguf.prefix must name an output of the encoder, which has one input")
    (pixels_name,) = graph["inputs"]
    session = load_graph(bundle, graph, session_options(decoder.threads))
    return lambda pixels: run_graph(session, [output], {pixels_name: pixels})[0]


class Lane:
    """A few photos in one context: `rows` are llama.cpp's sequences, all at the same `position`.

    parts: what they read, one after the other: ids [length], the same for all of them, or embeddings [photos, length,
    dim]; ids come last. opening: ids in front of them, which a process reads once.
    """

    def __init__(
        self,
        model: GgufModel,
        photos: int,
        parts: list[np.ndarray],
        contexts: list[Context],
        opening: tuple[int, ...] = (),
    ) -> None:
        self.start = len(opening) + sum(part.shape[-2] if part.ndim == 3 else len(part) for part in parts)
        self.photos, self.position = photos, self.start
        cells = photos * (self.start + model.beam * model.length)
        context = model.pool.take(cells, photos * model.beam)
        self.contexts, self.index = contexts, len(contexts)
        contexts.append(context)
        self.rows = np.arange(photos, dtype=np.int32)
        position = self._open(model, context, opening)
        for part in parts:
            length = part.shape[-2] if part.ndim == 3 else len(part)
            places = np.tile(np.arange(position, position + length, dtype=np.int32), photos)
            rows = np.repeat(self.rows, length)
            position += length
            if part.ndim == 3:
                context.decode(np.ascontiguousarray(part.reshape(-1, part.shape[-1])), places, rows)
            elif position < self.start:
                context.decode(np.tile(part.astype(np.int32), photos), places, rows)
            else:
                wanted = (places == self.start - 1).astype(np.int8)
                ids = np.tile(part.astype(np.int32), photos)
                self.logits = context.logits(ids, places, rows, wanted)  # [photos, vocab]

    def _open(self, model: GgufModel, context: Context, opening: tuple[int, ...]) -> int:
        """Let the first row read the opening, or remember it, and the others continue that; the position behind it."""
        if not opening:
            return 0
        if opening not in model.openings:
            ids = np.array(opening, np.int32)
            context.decode(ids, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32))
            model.openings[opening] = context.saved(0)
        else:
            context.load(0, model.openings[opening])
        for row in self.rows[1:].tolist():
            context.copy(0, row)
        return len(opening)

    def step(self, ids: np.ndarray, parents: np.ndarray) -> Logits:
        """Each new row continues the sequence `parents` names. The first child of a sequence goes on in its place."""
        if len(parents) > MAX_ROWS:
            raise EdgecapError(f"llama.cpp decodes at most {MAX_ROWS} rows of {PHOTOS} photos; ask for a smaller beam")
        cells = self.photos * self.start + len(parents) * (self.position + 1 - self.start)
        context = self.contexts[self.index] = self.contexts[self.index].grown(cells, len(parents))
        if not np.array_equal(parents, self.rows):
            self.rows = self._follow(context, parents.tolist())
        places = np.full(len(parents), self.position, np.int32)
        self.position += 1
        return context.logits(ids.astype(np.int32), places, self.rows)

    def _follow(self, context: Context, parents: list[int]) -> np.ndarray:
        """Drop sequences without a child and copy those with several; the sequence of each new row."""
        kept, childless = frozenset(parents), set(parents)
        for row in set(self.rows.tolist()) - kept:
            context.drop(row)
        free = (row for row in range(context.rows) if row not in kept)
        rows: list[int] = []
        for parent in parents:
            if parent in childless:
                childless.remove(parent)
                rows.append(parent)
            else:
                rows.append(next(free))
                context.copy(parent, rows[-1])
        return np.array(rows, np.int32)


class GgufSession:
    """The state of one batch: lanes of a few photos, and for each row its lane and its sequence there."""

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self._contexts: list[Context] = []
        self._lanes: list[Lane] = []
        self._prefix = np.zeros((0, 0, 0), np.float32)  # between encode and prefill
        # Not at exit: the contexts are gone by then.
        weakref.finalize(self, model.pool.give_back, self._contexts).atexit = False

    def start(self, pixels: Pixels, prompt_ids: Ids | None = None) -> Logits:
        """See `Session.start`."""
        self.encode(pixels)
        return self.prefill(prompt_ids)

    def encode(self, pixels: Pixels) -> None:
        """The first half of `start`: what the encoder does. Photos in frames: uint8 [N, F, S, S, 3]."""
        if pixels.ndim == 4:
            self._prefix = self.model.encode(pixels)
            return
        from ..framed import look  # which few bundles need

        self._prefix = look(pixels, lambda part: {"prefix": self.model.encode(part)})["prefix"]

    def prefill(self, prompt_ids: Ids | None = None, segments: Segments | None = None) -> Logits:
        """The second half of `start`: feed prefix, BOS and prompt to the decoder; logits [N, vocab]. segments: the
        words around the frames, BOS the last of them."""
        model, prefix = self.model, self._prefix
        self._prefix = np.zeros((0, 0, 0), np.float32)
        model.pool.give_back(self._contexts)
        chunks = [prefix[at : at + PHOTOS] for at in range(0, len(prefix), PHOTOS)]
        self._lanes = [self._read(chunk, prompt_ids, segments) for chunk in chunks]
        self._lane = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        self._row = np.concatenate([lane.rows for lane in self._lanes])
        return np.concatenate([lane.logits for lane in self._lanes])

    def _read(self, chunk: np.ndarray, prompt_ids: Ids | None, segments: Segments | None) -> Lane:
        """The lane of a few photos, whose embeddings are [photos, places, dim] or [photos, F, places, dim]."""
        if segments is None:
            more = np.asarray(prompt_ids if prompt_ids is not None else [], np.int64)
            return Lane(self.model, len(chunk), [chunk, np.concatenate([[self.model.bos], more])], self._contexts)
        from ..framed import pieces  # which few bundles need

        parts = []
        for frame, ids in enumerate(pieces(segments, prompt_ids)):
            parts += [chunk[:, frame], ids]
        return Lane(self.model, len(chunk), parts, self._contexts, segments.before)

    def step(self, ids: Ids, parents: Ids) -> Logits:
        """See `Session.step`."""
        ids = np.asarray(ids)
        self._lane, sequences = self._lane[parents], self._row[parents]
        self._row = np.empty(len(parents), np.int32)
        logits = np.empty((len(parents), self.model.decoder.vocab_size), np.float32)
        for index, lane in enumerate(self._lanes):
            mine = np.flatnonzero(self._lane == index)
            if len(mine):
                logits[mine] = lane.step(ids[mine], sequences[mine])
                self._row[mine] = lane.rows
        return logits

"""ONNX Runtime: a session built from the manifest's roles, for recurrent and for KV-cache decoders alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ..errors import BundleError, EdgecapError, UsageError

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..kv_cache import SavedKV
    from ..prompt import Segments
    from ..session import Ids, Logits, Pixels


class OnnxModel:
    """Encoder and decoder graphs in ONNX Runtime, shared by all sessions (its `run` is thread-safe)."""

    def __init__(self, manifest: dict[str, Any], encoder: ort.InferenceSession, decoder: ort.InferenceSession) -> None:
        self.manifest = manifest
        self.encoder = encoder
        self.decoder = decoder
        self.roles = manifest["session"]
        self.bos: int = manifest["tokens"]["bos"]
        inputs = manifest["graphs"]["decoder"]["inputs"]
        self.dtypes = {name: np.dtype(spec["dtype"]) for name, spec in inputs.items()}
        (self.pixels,) = manifest["graphs"]["encoder"]["inputs"]
        self.photo: dict[str, str] = self.roles.get("photo", {})
        self.carried = [*self.roles.get("state", []), *self.roles.get("kv", [])]
        sources = [*self.photo.values(), *(state["init"] for state in self.roles.get("state", []))]
        if "prefix" in self.roles:
            sources.append(self.roles["prefix"]["from"])
        self.encoder_outputs = list(dict.fromkeys(sources))
        self.openings: dict[tuple[int, ...], SavedKV] = {}  # fixed texts → what one row holds behind them
        self.decoder_outputs = [self.roles["logits"], *(entry["output"] for entry in self.carried)]

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> OnnxModel:
        """Load both graphs, which `Bundle.open` has checked. Raises BundleError if one cannot be loaded."""
        manifest = bundle.manifest
        graphs = [manifest["graphs"][name] for name in ("encoder", "decoder")]
        return cls(manifest, *(load_graph(bundle, graph, _options(graph, threads)) for graph in graphs))

    def session(self) -> OnnxSession:
        if "cache" not in self.roles:
            return OnnxSession(self)
        from .onnx_cache import CachedSession

        return CachedSession(self)

    def encode(self, pixels: Pixels) -> dict[str, np.ndarray]:
        """Photos uint8 [N, H, W, 3] → the encoder outputs that the roles use."""
        return dict(
            zip(
                self.encoder_outputs,
                run_graph(self.encoder, self.encoder_outputs, {self.pixels: pixels}),
                strict=True,
            )
        )


class OnnxSession:
    """The state of one batch: photo tensors once per photo, hidden states and KV cache per row."""

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self._fixed: dict[str, np.ndarray] = {}  # decoder inputs that stay as they are
        self._rows: dict[str, np.ndarray] = {}  # decoder inputs whose axis 0 is the rows
        self._count = 0
        self._encoded: dict[str, np.ndarray] = {}  # between encode and prefill

    def start(self, pixels: Pixels, prompt_ids: Ids | None = None) -> Logits:
        """See `Session.start`."""
        self.encode(pixels)
        return self.prefill(prompt_ids)

    def encode(self, pixels: Pixels) -> None:
        """The first half of `start`, what the encoder graph does: apart, so that it can be timed apart. Photos in
        frames: uint8 [N, F, S, S, 3]."""
        self._count = len(pixels)
        if pixels.ndim == 4:
            self._encoded = self.model.encode(np.ascontiguousarray(pixels))
            return
        from ..framed import look  # which few bundles need

        self._encoded = look(pixels, self.model.encode)

    def prefill(self, prompt_ids: Ids | None = None, segments: Segments | None = None) -> Logits:
        """The second half of `start`: feed BOS and the prompt to the decoder; logits [N, vocab]. segments: the words
        around the frames, BOS the last of them."""
        if segments is not None:
            return self._between(segments, prompt_ids)
        prefix, ids = self._first(prompt_ids)
        self.begin(len(ids))
        if self.model.roles["ids"]["rank"] == 2:
            return self._run(ids, prefix)
        for column in ids.T:
            logits = self._run(np.ascontiguousarray(column), prefix)
            prefix = None
        return logits

    def begin(self, rows: int) -> None:
        """Begin with `rows` rows that have read nothing."""
        for kv in self.model.roles.get("kv", []):
            self._rows[kv["input"]] = np.zeros((rows, kv["heads"], 0, kv["dim"]), self.model.dtypes[kv["input"]])

    def open(self, ids: Ids, rows: int) -> None:
        """Begin with `rows` rows that have read the fixed text `ids` [length]."""
        self.begin(rows)
        if len(ids):
            self.read(np.tile(np.asarray(ids, np.int64), (rows, 1)))

    def read(self, ids: Ids, prefix: np.ndarray | None = None) -> Logits:
        """Read on: prefix [rows, places, dim] or None, then ids [rows, length] → next-token logits [rows, vocab]."""
        return self._run(ids, prefix)

    def _between(self, segments: Segments, prompt_ids: Ids | None) -> Logits:
        """The segments of a prompt, with the embeddings of the encoded frames between them."""
        from ..framed import pieces  # which few bundles need

        seen, photos = self._encoded[self.model.roles["prefix"]["from"]], self._count  # [N, F, places, dim]
        self._encoded = {}
        self.open(np.array(segments.before, np.int64), photos)
        for frame, ids in enumerate(pieces(segments, prompt_ids)):
            logits = self.read(np.tile(ids, (photos, 1)), seen[:, frame])
        return logits

    def _first(self, prompt_ids: Ids | None) -> tuple[np.ndarray | None, Ids]:
        """What was encoded, to where the decoder's inputs are kept: the prefix, if any, and BOS and prompt of each
        photo [photos, 1 + prompt]."""
        model, roles = self.model, self.model.roles
        encoded, photos = self._encoded, self._count
        self._encoded = {}
        self._fixed = {name: encoded[source] for name, source in model.photo.items()}
        self._rows = {state["input"]: encoded[state["init"]] for state in roles.get("state", [])}
        if "photo_index" in roles:
            self._rows[roles["photo_index"]] = np.arange(photos)
        first = np.concatenate([[model.bos], np.asarray(prompt_ids if prompt_ids is not None else [], np.int64)])
        prefix = encoded[roles["prefix"]["from"]] if "prefix" in roles else None
        return prefix, np.tile(first.astype(np.int64), (photos, 1))

    def step(self, ids: Ids, parents: Ids) -> Logits:
        """See `Session.step`."""
        same = len(parents) == self._count
        if not same or (self._count > 1 and list(parents) != list(range(self._count))):
            self._rows = {name: value[parents] for name, value in self._rows.items()}
            self._count = len(parents)
        ids = np.asarray(ids, np.int64)
        return self._run(ids[:, None] if self.model.roles["ids"]["rank"] == 2 else ids, None)

    def _run(self, ids: Ids, prefix: np.ndarray | None) -> Logits:
        model, roles = self.model, self.model.roles
        feed = {roles["ids"]["input"]: ids, **self._fixed, **self._rows}
        if "prefix" in roles:
            name, dim = roles["prefix"]["input"], roles["prefix"]["dim"]
            feed[name] = prefix if prefix is not None else np.zeros((len(ids), 0, dim), model.dtypes[name])
        logits, *carried = run_graph(model.decoder, model.decoder_outputs, feed)
        for entry, value in zip(model.carried, carried, strict=True):
            self._rows[entry["input"]] = value
        return logits.astype(np.float32, copy=False)  # [rows, vocab]


def run_graph(graph: ort.InferenceSession, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One run. Raises EdgecapError where the engine fails."""
    try:
        return graph.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise failed(error) from None


def failed(error: Exception) -> EdgecapError:
    """What to raise for an exception of the engine in a run."""
    reason = " ".join(str(error).split())[:300]
    return EdgecapError(f"ONNX Runtime {ort.__version__} failed in the bundle's graph: {reason}")


def session_options(threads: int | None) -> ort.SessionOptions:
    """How every graph of a bundle is run; threads: None leaves the number to the engine. Raises UsageError."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: they reach the user as exceptions
    options.inter_op_num_threads = 1
    # Idle threads spin this long before they sleep. ONNX Runtime's default is far longer and, on a shared CPU, takes
    # the core that the work needs; no spinning at all makes two threads hardly faster than one. (Until 1.2x: ignored.)
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    if threads is not None:
        if type(threads) is not int or not 1 <= threads <= 1024:
            raise UsageError(f"threads must be a whole number from 1 to 1024, not {threads!r}")
        options.intra_op_num_threads = threads
    return options


def _options(graph: dict[str, Any], threads: int | None) -> ort.SessionOptions:
    """Of a large graph, one whose weights are a file of their own, the plan of which tensors share memory would take
    half a second and 40 MB more: the arena does without."""
    options = session_options(threads)
    if "weights" in graph:
        options.enable_mem_pattern = options.enable_mem_reuse = False
    return options


def load_graph(bundle: Bundle, graph: dict[str, Any], options: ort.SessionOptions) -> ort.InferenceSession:
    """Load the file that an entry of the manifest's "graphs" names. Raises BundleError if the engine cannot."""
    where = f"{bundle.path}: {graph['file']}"
    try:
        # By its path: of bytes the engine keeps a copy beside the weights that it packs for its kernels.
        return ort.InferenceSession(str(bundle.file(graph["file"])), options, providers=["CPUExecutionProvider"])
    except BundleError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BundleError(f"{where} cannot be loaded by ONNX Runtime {ort.__version__}: {str(error)[:300]}") from None

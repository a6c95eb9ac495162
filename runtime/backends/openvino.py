"""OpenVINO: compiled graphs shared by all sessions; a KV cache stays in the engine, reordered there by `beam_idx`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov

from ..errors import EdgecapError, UsageError

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..prompt import Segments
    from ..session import Ids, Logits, Pixels

_DTYPES = {
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "f16": "float16",
    "f32": "float32",
    "boolean": "bool",
}


class OpenVinoModel:
    """Encoder and decoder compiled for this CPU. Requests, which hold inputs and state, belong to the sessions."""

    def __init__(self, manifest: dict[str, Any], encoder: ov.CompiledModel, decoder: ov.CompiledModel) -> None:
        self.manifest = manifest
        self.encoder, self.decoder = encoder, decoder
        self.roles = manifest["session"]
        self.bos: int = manifest["tokens"]["bos"]
        inputs = manifest["graphs"]["decoder"]["inputs"]
        self.dtypes = {name: np.dtype(spec["dtype"]) for name, spec in inputs.items()}
        (self.pixels,) = manifest["graphs"]["encoder"]["inputs"]
        self.photo: dict[str, str] = self.roles.get("photo", {})
        self.state: list[dict[str, str]] = self.roles.get("state", [])
        sources = [*self.photo.values(), *(state["init"] for state in self.state)]
        if "prefix" in self.roles:
            sources.append(self.roles["prefix"]["from"])
        self.encoder_outputs = list(dict.fromkeys(sources))
        self.openings: dict[tuple[int, ...], dict[str, np.ndarray]] = {}  # fixed texts → one row's state behind them

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> OpenVinoModel:
        """Compile both graphs. Raises EdgecapError if one is not what the manifest says or cannot be loaded."""
        manifest = bundle.manifest
        if "session" not in manifest or manifest["session"].get("kv"):
            raise EdgecapError(f"{bundle.path}/bundle.json: session is missing or not OpenVINO's; export it again")
        options: dict[str, Any] = {
            # The default, bf16 where the CPU has it, changes captions and has crashed at one thread.
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if threads is not None:
            if type(threads) is not int or not 1 <= threads <= 1024:
                raise UsageError(f"threads must be a whole number from 1 to 1024, not {threads!r}")
            options["INFERENCE_NUM_THREADS"] = threads
        core = ov.Core()
        graphs = manifest["graphs"]
        return cls(manifest, *(_load(core, bundle, graphs[name], options) for name in ("encoder", "decoder")))

    def session(self) -> OpenVinoSession:
        return OpenVinoSession(self)


class OpenVinoSession:
    """The state of one batch. Inputs are bound once and written in place while the rows stay the same."""

    def __init__(self, model: OpenVinoModel) -> None:
        self.model = model
        self._encoder = _Request(model.encoder)
        self._decoder = _Request(model.decoder)
        self._encoded: dict[str, np.ndarray] = {}
        self._index = np.zeros(0, np.int64)  # the photo of each row

    def start(self, pixels: Pixels, prompt_ids: Ids | None = None) -> Logits:
        """See `Session.start`."""
        self.encode(pixels)
        return self.prefill(prompt_ids)

    def encode(self, pixels: Pixels) -> None:
        """The first half of `start`, what the encoder graph does: apart, so that it can be timed apart."""
        self._index = np.arange(len(pixels))
        if pixels.ndim == 4:
            self._encoded = self._looked(np.asarray(pixels, np.uint8))
            return
        from ..framed import look  # photos in frames, [N, F, S, S, 3], which few bundles need

        self._encoded = look(pixels, self._looked)

    def _looked(self, pixels: Pixels) -> dict[str, np.ndarray]:
        """What the encoder graph makes of photos: views that hold until the next ones."""
        self._encoder.bind(self.model.pixels, pixels)
        self._encoder.run()
        return {name: self._encoder.output(name) for name in self.model.encoder_outputs}

    def prefill(self, prompt_ids: Ids | None = None, segments: Segments | None = None) -> Logits:
        """The second half of `start`: feed BOS and the prompt to the decoder; logits [N, vocab]. segments: the words
        around the frames, BOS the last of them."""
        if segments is not None:
            return self._between(segments, prompt_ids)
        model, roles, decoder = self.model, self.model.roles, self._decoder
        for name, source in model.photo.items():
            decoder.bind(name, self._encoded[source])
        for state in model.state:
            decoder.bind(state["input"], self._encoded[state["init"]])
        if "beam_idx" in roles:
            decoder.request.reset_state()
        prefix = self._encoded[roles["prefix"]["from"]] if "prefix" in roles else None

        first = np.concatenate([[model.bos], np.asarray(prompt_ids if prompt_ids is not None else [], np.int64)])
        ids = np.tile(first.astype(np.int64), (len(self._index), 1))  # [photos, 1 + prompt]
        same = np.arange(len(self._index))
        if roles["ids"]["rank"] == 2:
            return self._run(ids, same, prefix)
        for position, column in enumerate(ids.T):
            if position:
                self._carry(same)
            logits = self._run(column, same, prefix if not position else None)
        return logits

    def _between(self, segments: Segments, prompt_ids: Ids | None) -> Logits:
        """The segments of a prompt, with the embeddings of the encoded frames between them."""
        from ..framed import pieces  # which few bundles need

        seen = self._encoded[self.model.roles["prefix"]["from"]]  # [N, F, places, dim]
        self._open(segments.before)
        for frame, ids in enumerate(pieces(segments, prompt_ids)):
            logits = self._run(np.tile(ids, (len(self._index), 1)), np.arange(len(self._index)), seen[:, frame])
        return logits

    def _open(self, ids: tuple[int, ...]) -> None:
        """All rows have read the fixed text `ids`, which a process computes once."""
        request, openings = self._decoder.request, self.model.openings
        request.reset_state()
        if not ids:
            return
        if ids not in openings:
            self._run(np.array([ids], np.int64), np.zeros(1, np.int64), None)
            openings[ids] = {each.name: each.state.data.copy() for each in request.query_state()}
        for each in request.query_state():
            rows = np.repeat(openings[ids][each.name], len(self._index), axis=0)
            each.state = ov.Tensor(np.ascontiguousarray(rows))

    def step(self, ids: Ids, parents: Ids) -> Logits:
        """See `Session.step`."""
        parents = np.asarray(parents, np.int64)
        self._index = self._index[parents]
        self._carry(parents)
        ids = np.asarray(ids, np.int64)
        return self._run(ids[:, None] if self.model.roles["ids"]["rank"] == 2 else ids, parents, None)

    def _carry(self, parents: np.ndarray) -> None:
        """Each row's next input state is its parent's last output state."""
        for state in self.model.state:
            self._decoder.bind(state["input"], self._decoder.output(state["output"])[parents])

    def _run(self, ids: np.ndarray, parents: np.ndarray, prefix: np.ndarray | None) -> Logits:
        model, roles, decoder = self.model, self.model.roles, self._decoder
        decoder.bind(roles["ids"]["input"], ids)
        if "photo_index" in roles:
            decoder.bind(roles["photo_index"], self._index)
        if "beam_idx" in roles:
            decoder.bind(roles["beam_idx"], parents.astype(model.dtypes[roles["beam_idx"]]))
        if "prefix" in roles:
            name, dim = roles["prefix"]["input"], roles["prefix"]["dim"]
            decoder.bind(name, prefix if prefix is not None else np.zeros((len(ids), 0, dim), model.dtypes[name]))
        decoder.run()
        return decoder.output(roles["logits"]).astype(np.float32)  # [rows, vocab], a copy


class _Request:
    """An infer request over arrays of its own: rebinding a tensor costs more than a small step itself."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.request = compiled.create_infer_request()
        self.bound: dict[str, np.ndarray] = {}

    def bind(self, name: str, value: np.ndarray) -> None:
        old = self.bound.get(name)
        if old is not None and old.shape == value.shape:
            np.copyto(old, value)
            return
        self.bound[name] = np.array(value, order="C")  # its own: the caller may overwrite `value`
        self.request.set_tensor(name, ov.Tensor(self.bound[name], shared_memory=True))

    def run(self) -> None:
        try:
            self.request.infer(share_outputs=True)
        except Exception as error:  # OpenVINO's exceptions share no base class of their own
            raise EdgecapError(f"OpenVINO {_version()} failed in the bundle's graph: {_reason(error)}") from None

    def output(self, name: str) -> np.ndarray:
        """A view: it holds until the next run."""
        return self.request.get_tensor(name).data


def _load(core: ov.Core, bundle: Bundle, graph: dict[str, Any], options: dict[str, Any]) -> ov.CompiledModel:
    where = f"{bundle.path}: {graph['file']}"
    if not bundle.read(graph["file"]).lstrip().startswith(b"<"):  # the engine would guess at any other format
        raise EdgecapError(f"{where} is not an OpenVINO graph; export it again")
    try:
        # By its path: the weights are then mapped, not copied.
        model = core.read_model(*(str(bundle.file(graph[part])) for part in ("file", "weights") if part in graph))
        for role, ports in (("inputs", model.inputs), ("outputs", model.outputs)):
            _compare(where, role, graph[role], ports)
        return core.compile_model(model, "CPU", options)
    except EdgecapError:
        raise
    except Exception as error:
        raise EdgecapError(f"{where} cannot be loaded by OpenVINO {_version()}: {_reason(error)}") from None


def _compare(where: str, role: str, said: dict[str, Any], ports: list[Any]) -> None:
    """Names, types, ranks and fixed sizes of the manifest against the graph's own."""
    found = {name: port for port in ports for name in port.names if name in said}
    wrong = sorted(set(said) - set(found))
    wrong += [next(iter(port.names), "?") for port in ports if not port.names & set(said)]
    for name, port in found.items():
        shape, claimed = port.get_partial_shape(), said[name]["shape"]
        fits = shape.rank.is_static and len(shape) == len(claimed)
        # A graph may leave open what the manifest fixes, not the reverse.
        fits = fits and all(
            dim.is_dynamic or dim.get_length() == claim for dim, claim in zip(shape, claimed, strict=False)
        )
        if _DTYPES.get(port.get_element_type().get_type_name()) != said[name]["dtype"] or not fits:
            wrong.append(name)
    if wrong:
        raise EdgecapError(f"{where}: its {role} are not what bundle.json says ({', '.join(wrong)}); export it again")


def _version() -> str:
    return ov.__version__.partition("-")[0]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Core ML on a Mac: one photo at a time, with a recurrent state or with a KV cache of slots that beams share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from ..errors import EdgecapError, UsageError

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..session import Ids, Logits, Pixels

    Ids32: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int32]]  # what Core ML counts with

MASKED = -1e4  # added to the attention score of a slot that a token may not see; e to that power is 0 in fp16

Values = dict[str, Any]


class Graph(Protocol):
    """What is used of coremltools' MLModel."""

    def predict(self, data: Values, state: Any = None) -> dict[str, np.ndarray]: ...

    def make_state(self) -> Any: ...


class CoreMLModel:
    """Encoder and decoder in Core ML, shared by all sessions. `roles` is the manifest's "coreml"."""

    def __init__(self, roles: dict[str, Any], bos: int, encoder: Graph, decoder: Graph) -> None:
        self.roles, self.bos = roles, bos
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> CoreMLModel:
        """Load both programs; the first time, Core ML compiles them for this Mac's processors, which it also chooses:
        `threads` is checked and has no effect. Raises UsageError on other systems, EdgecapError for what cannot load.
        """
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise UsageError(f"threads must be a whole number from 1 to 1024, not {threads!r}")
        if sys.platform != "darwin":
            raise UsageError(
                f"{bundle.path} holds CoreML models, which run on macOS and iOS only: copy it to a Mac for edgecap "
                "verify; here edgecap inspect checks its files and shows what was measured"
            )
        manifest = bundle.manifest
        roles = check_roles(bundle)
        return cls(
            roles, manifest["tokens"]["bos"], *(_load(bundle, manifest["graphs"][n]) for n in ("encoder", "decoder"))
        )

    def session(self) -> CoreMLSession:
        return CoreMLSession(self)

    def encode(self, photo: Pixels) -> dict[str, np.ndarray]:
        """One photo uint8 [H, W, 3] → the photo tensors, with a first axis of 1."""
        from PIL import Image

        return _predict(self.encoder, {self.roles["image"]: Image.fromarray(photo)})


class CoreMLSession:
    """The photos of one batch, each with its own rows: a `step` runs the decoder once per photo."""

    def __init__(self, model: CoreMLModel) -> None:
        self.model = model
        self._encoded: list[dict[str, np.ndarray]] = []  # between encode and prefill
        self._photos: list[_Recurrent] | list[_Slots] = []
        self._photo: Ids = np.zeros(0, np.int64)  # [rows] which photo each row is of
        self._place: Ids = np.zeros(0, np.int64)  # [rows] and which of that photo's rows it is

    def start(self, pixels: Pixels, prompt_ids: Ids | None = None) -> Logits:
        """See `Session.start`."""
        self.encode(pixels)
        return self.prefill(prompt_ids)

    def encode(self, pixels: Pixels) -> None:
        """The first half of `start`, apart so that it can be timed apart."""
        self._encoded = [self.model.encode(photo) for photo in np.ascontiguousarray(pixels)]

    def prefill(self, prompt_ids: Ids | None = None) -> Logits:
        """The second half of `start`: feed BOS and the prompt to the decoder; logits [N, vocab]."""
        encoded, self._encoded = self._encoded, []
        kind: Any = {"recurrent": _Recurrent, "slots": _Slots}[self.model.roles["decoder"]]
        ids = np.concatenate([[self.model.bos], np.asarray([] if prompt_ids is None else prompt_ids)]).astype(np.int32)
        self._photos = [kind(self.model, photo) for photo in encoded]
        self._photo, self._place = np.arange(len(encoded)), np.zeros(len(encoded), np.int64)
        return np.concatenate([photo.prefill(ids) for photo in self._photos])

    def step(self, ids: Ids, parents: Ids) -> Logits:
        """See `Session.step`."""
        parents = np.asarray(parents)
        ids = np.asarray(ids).astype(np.int32)
        owner, continued = self._photo[parents], self._place[parents]
        place = np.zeros_like(continued)
        logits: list[Logits] = [np.zeros(0, np.float32)] * len(ids)
        for number in np.unique(owner):
            rows = np.flatnonzero(owner == number)
            place[rows] = np.arange(len(rows))
            for row, values in zip(rows, self._photos[number].step(ids[rows], continued[rows]), strict=True):
                logits[row] = values
        self._photo, self._place = owner, place
        return np.stack(logits)  # [rows, vocab]


class _Recurrent:
    """One photo's rows: the state goes in and out of every call."""

    def __init__(self, model: CoreMLModel, encoded: dict[str, np.ndarray]) -> None:
        self.model, roles = model, model.roles
        self.fixed = {name: encoded[source] for name, source in roles["photo"].items()}
        self.state = {state["input"]: encoded[state["init"]] for state in roles["state"]}  # [rows, ...] each

    def prefill(self, ids: Ids32) -> Logits:
        for token in ids:
            logits = self.step(np.array([token], np.int32), np.zeros(1, np.int64))
        return logits

    def step(self, ids: Ids32, parents: Ids) -> Logits:
        roles = self.model.roles
        rows = {name: value[parents] for name, value in self.state.items()}
        limit, parts = roles["rows"], []
        for start in range(0, len(ids), limit):
            part = slice(start, start + limit)
            some = {name: np.ascontiguousarray(value[part]) for name, value in rows.items()}
            parts.append(_predict(self.model.decoder, {"ids": ids[part], **self.fixed, **some}))
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.state = {state["input"]: found[state["output"]] for state in roles["state"]}
        return found[roles["logits"]].astype(np.float32, copy=False)  # [rows, vocab]


class _Slots:
    """One photo's rows over one KV cache: every token takes the next slot, and each row remembers which are its own.

    The photo is a prefix in front of the words, or tensors that every call is given.
    """

    def __init__(self, model: CoreMLModel, encoded: dict[str, np.ndarray]) -> None:
        self.model, roles = model, model.roles
        self.fixed = {name: encoded[source] for name, source in roles.get("photo", {}).items()}
        self.prefix = encoded[roles["prefix"]][0] if "prefix" in roles else np.zeros((0, 0), np.float16)  # [P, dim]
        self.cache = model.decoder.make_state()
        self.used = 0  # slots
        self.length = 0  # positions, of every row
        self.visible = np.zeros((1, 0), bool)  # [rows, used]

    def prefill(self, ids: Ids32) -> Logits:
        count, total = len(self.prefix), len(self.prefix) + len(ids)
        words = np.arange(total) >= count
        prefix = np.zeros((total, self.prefix.shape[1]), self.prefix.dtype)
        prefix[:count] = self.prefix
        tokens = np.zeros(total, np.int32)
        tokens[count:] = ids
        sees = np.tri(total, dtype=bool)  # [total, total] each what came before it, and itself
        logits = self._run(tokens, words, prefix, np.arange(total), sees, np.array([total - 1]))
        self.visible, self.length = sees[-1:], total
        return logits

    def step(self, ids: Ids32, parents: Ids) -> Logits:
        count = len(ids)
        sees = np.concatenate([self.visible[parents], np.eye(count, dtype=bool)], axis=1)  # [rows, used + rows]
        prefix = np.zeros((count, self.prefix.shape[1]), self.prefix.dtype)
        positions = np.full(count, self.length)
        logits = self._run(ids, np.ones(count, bool), prefix, positions, sees, np.arange(count))
        self.visible, self.length = sees, self.length + 1
        return logits

    def _run(self, ids: Ids32, words: Any, prefix: Any, positions: Any, sees: Any, wanted: Any) -> Logits:
        """ids, words, positions [R]; prefix [R, dim]; sees [R, used + R]; wanted [K] → logits [K, vocab]."""
        roles = self.model.roles
        end = self.used + len(ids)
        if end > roles["slots"] or positions[-1] >= roles["positions"]:
            raise UsageError(
                f"the captions need more than this KV cache of {roles['slots']} slots and {roles['positions']} "
                "positions: use a smaller beam or max_length, or a shorter prompt"
            )
        feed = {
            "ids": ids[None].astype(np.int32),
            "positions": positions[None].astype(np.int32),
            "mask": np.where(sees, 0.0, MASKED)[None, None].astype(np.float16),
            "wanted": wanted.astype(np.int32),
            **self.fixed,
        }
        if "prefix" in roles:
            feed["words"] = words[None, :, None].astype(np.float16)
            feed["prefix"] = prefix[None].astype(np.float16)
        found = _predict(self.model.decoder, feed, self.cache)
        self.used = end
        return found[roles["logits"]].astype(np.float32, copy=False)


def check_roles(bundle: Bundle) -> dict[str, Any]:
    """The manifest's "coreml", once it is known to say what a session needs. Raises EdgecapError."""
    roles = bundle.manifest.get("coreml")
    where = f"{bundle.path}/bundle.json: coreml"
    if not isinstance(roles, dict):
        raise EdgecapError(f"{where} is missing; export the bundle again")
    texts, wholes = ["image", "logits"], ["rows"]
    if roles.get("decoder") == "slots":
        wholes = ["slots", "positions"]
        if "photo" not in roles:
            texts = [*texts, "prefix"]
    elif roles.get("decoder") != "recurrent":
        raise EdgecapError(
            f'{where}.decoder must be "recurrent" or "slots"; upgrade edgecap or export the bundle again'
        )
    bad = [name for name in texts if not isinstance(roles.get(name), str)]
    bad += [name for name in wholes if type(roles.get(name)) is not int or roles[name] < 1]
    if "prefix" in roles and not isinstance(roles["prefix"], str):
        bad.append("prefix")
    if roles["decoder"] == "recurrent" or "photo" in roles:
        photo = roles.get("photo")
        if not isinstance(photo, dict) or not all(isinstance(source, str) for source in photo.values()):
            bad.append("photo")
    if roles["decoder"] == "recurrent":
        state = roles.get("state")
        keys = ("input", "output", "init")
        if not isinstance(state, list) or not all(
            isinstance(each, dict) and all(isinstance(each.get(key), str) for key in keys) for each in state
        ):
            bad.append("state")
    if bad:
        raise EdgecapError(f"{where}.{bad[0]} is missing or malformed; export the bundle again")
    return roles


def check_package(bundle: Bundle, folder: str) -> Any:
    """The specification (protobuf) of an .mlpackage of the bundle, once it is known to read only the bundle's files and
    to have the inputs and outputs that bundle.json says. Raises EdgecapError.
    """
    import coremltools as ct

    where = f"{bundle.path}: {folder}"
    listed = {name for name in bundle.manifest["files"] if name.startswith(f"{folder}/")}
    try:
        items = json.loads(bundle.read(f"{folder}/Manifest.json"))["itemInfoEntries"].values()
        places = [f"{folder}/Data/{item['path']}" for item in items]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EdgecapError(f"{where} has a Manifest.json that cannot be read; export the bundle again") from None
    for place in places:
        if place not in listed and not any(name.startswith(f"{place}/") for name in listed):
            raise EdgecapError(f"{where} names {place[:80]}, which is not a file of the bundle; export it again")
    try:
        spec = ct.utils.load_spec(str(bundle.path / folder))
    except Exception as error:  # protobuf's and coremltools' exceptions share no base class
        raise EdgecapError(f"{where} cannot be read ({str(error)[:200]}); export the bundle again") from None
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for op in block.operations:
                for name in _weight_files(op):
                    if name != "@model_path/weights/weight.bin":
                        raise EdgecapError(f"{where} keeps weights in {name[:80]}, which a bundle may not")
    graph = next(graph for graph in bundle.manifest["graphs"].values() if graph["file"] == folder)
    for role in ("input", "output"):
        found = {each.name for each in getattr(spec.description, role)}
        if found != set(graph[f"{role}s"]):
            raise EdgecapError(f"{where}: its {role}s are not what bundle.json says; export the bundle again")
    return spec


def _weight_files(op: Any) -> list[str]:
    """The files that an operation, or an operation in its blocks, reads weights from."""
    values = [*op.attributes.values()]
    values += [binding.value for argument in op.inputs.values() for binding in argument.arguments]
    names = [value.blobFileValue.fileName for value in values if value.WhichOneof("value") == "blobFileValue"]
    return names + [name for block in op.blocks for inner in block.operations for name in _weight_files(inner)]


def _load(bundle: Bundle, graph: dict[str, Any]) -> Graph:
    check_package(bundle, graph["file"])
    try:
        return open_package(bundle.path / graph["file"])
    except Exception as error:  # coremltools raises whatever Core ML's error became
        reason = " ".join(str(error).split())[:300]
        raise EdgecapError(f"{bundle.path}: {graph['file']} cannot be loaded by Core ML: {reason}") from None


def open_package(path: Path) -> Graph:
    """An .mlpackage folder as coremltools' MLModel."""
    from coremltools.models import MLModel

    return MLModel(str(path))


def _predict(graph: Graph, feed: Values, state: Any = None) -> dict[str, np.ndarray]:
    try:
        return graph.predict(feed) if state is None else graph.predict(feed, state)
    except EdgecapError:
        raise
    except Exception as error:  # coremltools raises whatever Core ML's error became
        reason = " ".join(str(error).split())[:300]
        raise EdgecapError(f"Core ML failed in the bundle's program: {reason}") from None

"""What bundle.json may say, checked so that a malformed one is a single clear line, never a trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from .decode import DecodeOptions
from .errors import BundleError, EdgecapError
from .preprocess import Preprocess

FORMAT, VERSION = "edgecap", 1
DTYPES = ("uint8", "int32", "int64", "float16", "float32", "bool")
WITH_ROLES = ("onnx", "openvino")  # backends that "session" describes; the others have an object of their own name
GRAPH_FILES = {"openvino": (".xml",), "gguf": (".gguf", ".onnx"), "coreml": (".mlpackage",)}  # what names end in
MAX_NESTING = 32
MAX_FOLDERS = 6  # a name's components

Check = Callable[[Any, str], None]


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """Decode and check a bundle.json. Raises BundleError, naming `where` and the key that is wrong."""
    try:
        manifest = json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_object_of)
        _check_json(manifest, 0)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise BundleError(f"{where} is not valid JSON ({reason}); export the bundle again") from None
    check_manifest(manifest, where)
    return manifest


def check_manifest(manifest: Any, where: str = "bundle.json") -> None:
    """Raise BundleError if `manifest` is not a version 1 manifest whose parts agree with each other."""
    try:
        if not isinstance(manifest, dict):
            raise _Bad(f"must be an object, not {_kind(manifest)}")
        if manifest.get("format") != FORMAT:
            raise _Bad(f'"format" must be "{FORMAT}"; this is not an edgecap bundle')
        version: Any = manifest.get("version")
        _integer(1)(version, '"version"')
        if version > VERSION:
            raise _Bad(f"has format version {version}; this edgecap reads up to {VERSION}: upgrade edgecap")
        _MANIFEST(manifest, "")
        _check_files(manifest)
        _check_values(manifest)
        _check_backend(manifest)
    except _Bad as error:
        raise BundleError(f"{where}: {error}") from None


def check_path(name: str, where: str) -> None:
    """Raise BundleError if `name` is no name that a file of a bundle may have."""
    try:
        _path(name, "files")
    except _Bad as error:
        raise BundleError(f"{where}: {error}") from None


class _Bad(Exception):
    """What is wrong, without the name of the file."""


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check_json(value: Any, depth: int) -> None:
    """ValueError for what can be read but neither printed nor computed with."""
    if depth > MAX_NESTING:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair: UnicodeEncodeError
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number is too large")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError("a number is too large")
    elif isinstance(value, dict):
        for key, each in value.items():
            key.encode()
            _check_json(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check_json(each, depth + 1)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true/false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


# --- the shape: small checks that combine -----------------------------------------------------------


def _text(value: Any, at: str) -> None:
    if not isinstance(value, str):
        raise _Bad(f"{at} must be a text, not {_kind(value)}")


def _boolean(value: Any, at: str) -> None:
    if not isinstance(value, bool):
        raise _Bad(f"{at} must be true or false, not {_kind(value)}")


def _number(value: Any, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Bad(f"{at} must be a finite number, not {_kind(value)}")


def _any(value: Any, at: str) -> None:
    pass


def _integer(low: int, high: int = 2**53) -> Check:
    def check(value: Any, at: str) -> None:
        if type(value) is not int:
            raise _Bad(f"{at} must be a whole number, not {_kind(value)}")
        if not low <= value <= high:
            raise _Bad(f"{at} must be from {low} to {high}, not {str(value)[:24]}")

    return check


def _one_of(*choices: str) -> Check:
    def check(value: Any, at: str) -> None:
        if value not in choices:
            raise _Bad(f"{at} must be one of {', '.join(choices)}, not {json.dumps(value)[:40]}")

    return check


def _list(item: Check) -> Check:
    def check(value: Any, at: str) -> None:
        if not isinstance(value, list):
            raise _Bad(f"{at} must be a list, not {_kind(value)}")
        for index, each in enumerate(value):
            item(each, f"{at}[{index}]")

    return check


def _mapping(item: Check) -> Check:
    def check(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _Bad(f"{at} must be an object, not {_kind(value)}")
        for key, each in value.items():
            item(each, f"{at}.{key}" if at else key)

    return check


def _object(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these keys; others are allowed, so that a later edgecap may add some."""

    def check(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _Bad(f"{at or 'it'} must be an object, not {_kind(value)}")
        prefix = f"{at}." if at else ""
        for key, each in required.items():
            if key not in value:
                raise _Bad(f"{prefix}{key} is missing; export the bundle again")
            each(value[key], prefix + key)
        for key, each in (optional or {}).items():
            if key in value:
                each(value[key], prefix + key)

    return check


def _name(value: Any, at: str) -> None:
    """A plain file name: it cannot leave the bundle on any system."""
    _text(value, at)
    bad = not value or value.startswith(".") or value != value.strip() or len(value) > 200
    if bad or any(character in '/\\:*?"<>|' or ord(character) < 32 for character in value):
        raise _Bad(f"{at}: {value[:80]!r} is not a plain file name inside the bundle")


def _path(value: Any, at: str) -> None:
    """Plain names joined by "/": a file inside the bundle, in folders of its own or in none."""
    _text(value, at)
    parts = value.split("/")
    if len(parts) > MAX_FOLDERS:
        raise _Bad(f"{at}: {value[:80]!r} lies deeper than {MAX_FOLDERS - 1} folders")
    for part in parts:
        _name(part, at)


def _sha256(value: Any, at: str) -> None:
    _text(value, at)
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise _Bad(f"{at} must be 64 hexadecimal digits")


def _dimension(value: Any, at: str) -> None:
    if not isinstance(value, str):
        _integer(0)(value, at)


def _graph(*dtypes: str) -> Check:
    tensors = _mapping(_object({"dtype": _one_of(*dtypes), "shape": _list(_dimension)}))
    return _object({"file": _path, "inputs": tensors, "outputs": tensors}, {"weights": _path})


_GRAPH, _OTHER = _graph(*DTYPES), _graph(*DTYPES, "string")  # a fused graph may give the text itself


def _graphs(value: Any, at: str) -> None:
    _object({"encoder": _GRAPH, "decoder": _GRAPH})(value, at)
    _mapping(_OTHER)(value, at)


_SIZE = _integer(1, 2**31 - 1)
_SESSION = _object(
    {"ids": _object({"input": _text, "rank": _integer(1, 2)}), "logits": _text},
    {
        "photo_index": _text,
        "beam_idx": _text,
        "photo": _mapping(_text),
        "state": _list(_object({"input": _text, "output": _text, "init": _text})),
        "prefix": _object({"input": _text, "from": _text, "dim": _SIZE}),
        "kv": _list(_object({"input": _text, "output": _text, "heads": _SIZE, "dim": _SIZE})),
        "positions": _SIZE,
        "cache": _object({"filled": _text}),
    },
)
_MANIFEST = _object(
    {
        "name": _text,
        "backend": _text,
        "target": _text,
        "precision": _text,
        "requires": _mapping(_text),
        "files": _mapping(_object({"bytes": _integer(0), "sha256": _sha256})),
        "preprocess": _object(
            {
                "size": _list(_integer(1)),
                "mode": _one_of("squash", "crop", "keep"),
                "resample": _one_of("bilinear", "bicubic"),
            }
        ),
        "tokens": _object(
            {name: _integer(0) for name in ("bos", "eos", "vocab_size")},
            {"pad": _integer(0), "unk": _integer(0)},
        ),
        "decoding": _mapping(_number),
        "golden": _object(
            {
                "image": _path,
                "token_ids": _list(_integer(0)),
                "logits": _path,
                "tolerance": _object({"same_tokens": _boolean, "min_cosine": _number}),
            }
        ),
    },
    {
        "created_with": _mapping(_text),
        "graphs": _graphs,
        "session": _SESSION,
        "frames": _mapping(_any),
        "lineage": _object(
            {},
            {
                "checkpoint": _object({}, {"recipe": _mapping(_any), "metrics": _mapping(_any)}),
                "passes": _list(_object({"name": _text}, {"params": _mapping(_any), "cost": _mapping(_any)})),
            },
        ),
        "measured": _mapping(_any),
        "gguf": _mapping(_any),
        "coreml": _mapping(_any),
    },
)


# --- that the parts agree ---------------------------------------------------------------------------


def _check_files(manifest: dict[str, Any]) -> None:
    files = manifest["files"]
    for name in files:
        _path(name, "files")
    used = {"the tokenizer": "tokenizer.json"}
    used |= {f"golden.{key}": manifest["golden"][key] for key in ("image", "logits")}
    graphs = manifest.get("graphs", {})
    used |= {f"graphs.{name}.weights": graph["weights"] for name, graph in graphs.items() if "weights" in graph}
    for name, graph in graphs.items():
        folder = graph["file"].lower().endswith(".mlpackage")
        if not folder or not any(file.startswith(graph["file"] + "/") for file in files):
            used[f"graphs.{name}.file"] = graph["file"]
    for at, name in used.items():
        if name not in files:
            raise _Bad(f"{at} names {name}, which is not among its files; export the bundle again")
    for name, graph in graphs.items():
        endings = GRAPH_FILES.get(manifest["backend"], ())
        if endings and not graph["file"].lower().endswith(endings):
            raise _Bad(f"graphs.{name}.file must end in {' or '.join(endings)}, not be {graph['file']}")


def _check_values(manifest: dict[str, Any]) -> None:
    try:
        Preprocess.from_dict(manifest["preprocess"])
        DecodeOptions.from_dict(manifest["decoding"])
        if "frames" in manifest:
            from .framed import read_frames  # which few bundles need

            read_frames(manifest["frames"], vocab_size=manifest["tokens"]["vocab_size"])
        elif manifest["preprocess"]["mode"] == "keep":
            raise _Bad("preprocess.mode keep needs frames, which say how photos are cut")
    except EdgecapError as error:
        raise _Bad(error.message) from None
    tokens = manifest["tokens"]
    vocab = tokens["vocab_size"]
    for name, value in tokens.items():
        if name != "vocab_size" and type(value) is int and value >= vocab:
            raise _Bad(f"tokens.{name} is {value}, outside the vocabulary of {vocab}")
    if any(token >= vocab for token in manifest["golden"]["token_ids"]):
        raise _Bad(f"golden.token_ids has an id outside the vocabulary of {vocab}")


def _check_backend(manifest: dict[str, Any]) -> None:
    """What the backend needs is there. One that this edgecap does not know is refused when it is loaded."""
    backend = manifest["backend"]
    if backend in WITH_ROLES and "session" not in manifest:
        raise _Bad("session is missing; export the bundle again")
    if backend in GRAPH_FILES and backend not in WITH_ROLES and backend not in manifest:
        raise _Bad(f"{backend} is missing; export the bundle again")
    if backend in WITH_ROLES:
        _check_session(manifest)


def _check_session(manifest: dict[str, Any]) -> None:
    """Every role names a tensor that its graph declares, and every declared input has exactly one role."""
    if "graphs" not in manifest:
        raise _Bad("graphs is missing; export the bundle again")
    session, encoder, decoder = (
        manifest["session"],
        manifest["graphs"]["encoder"],
        manifest["graphs"]["decoder"],
    )
    if len(encoder["inputs"]) != 1:
        raise _Bad("graphs.encoder must have one input, the pixels")
    (pixels,) = encoder["inputs"].values()
    if "frames" in manifest:
        _check_frames(manifest["frames"], session, pixels)
        shape = pixels["shape"][1:]
    else:
        shape = [*manifest["preprocess"]["size"], 3]
    if pixels["dtype"] != "uint8" or len(pixels["shape"]) != 4 or pixels["shape"][1:] != shape:
        raise _Bad(f"graphs.encoder must take uint8 pixels [batch, {', '.join(map(str, shape))}], as preprocess says")

    roles = decoder_inputs(session)
    _same_names(roles, decoder["inputs"], "session", "graphs.decoder.inputs")
    outputs = [
        session["logits"],
        *(entry["output"] for entry in [*session.get("state", []), *session.get("kv", [])]),
    ]
    sources = [*session.get("photo", {}).values(), *(entry["init"] for entry in session.get("state", []))]
    if "prefix" in session:
        sources.append(session["prefix"]["from"])
    for graph, names in (("decoder", outputs), ("encoder", sources)):
        for name in names:
            if name not in manifest["graphs"][graph]["outputs"]:
                raise _Bad(f"session names {name}, which is not among graphs.{graph}.outputs")
    if session.get("photo") and "photo_index" not in session:
        raise _Bad("session.photo needs session.photo_index, the input that says which photo a row belongs to")
    if "cache" in session:
        _check_cache(session, decoder)


def _check_frames(frames: dict[str, Any], session: dict[str, Any], pixels: dict[str, Any]) -> None:
    """The encoder takes square frames of the framing's side, or of any."""
    side, shape = frames["side"], pixels["shape"]
    if len(shape) != 4 or shape[3] != 3 or any(type(size) is int and size != side for size in shape[1:3]):
        raise _Bad(f"graphs.encoder must take frames [frames, {side}, {side}, 3], as frames says")
    if "prefix" not in session or session["ids"]["rank"] != 2:
        raise _Bad("frames needs session.prefix, and ids of rank 2")


def _check_cache(session: dict[str, Any], decoder: dict[str, Any]) -> None:
    """What a cache that is written in place needs: keys and values of one shape, and that sizes are known."""
    kv = session.get("kv", [])
    if not kv or "positions" not in session or session["ids"]["rank"] != 2 or session.get("state"):
        raise _Bad("session.cache needs kv, positions and ids of rank 2, and no state")
    shape = decoder["outputs"][session["logits"]]["shape"]
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise _Bad(f"session.cache needs the size of the vocabulary in graphs.decoder.outputs.{session['logits']}")
    size, dtype = (kv[0]["heads"], kv[0]["dim"]), decoder["inputs"][kv[0]["input"]]["dtype"]
    for entry in kv:
        for role in ("input", "output"):
            tensor = decoder[f"{role}s"][entry[role]]
            shape = tensor["shape"]
            said = (entry["heads"], entry["dim"])
            if len(shape) != 4 or (shape[1], shape[3]) != size or said != size or tensor["dtype"] != dtype:
                raise _Bad(f"session.kv and graphs.decoder.{role}s disagree about {entry[role]}")


def decoder_inputs(session: dict[str, Any]) -> list[str]:
    """The decoder inputs that the session's roles feed, in no particular order."""
    names = [session["ids"]["input"], *session.get("photo", {})]
    names += [entry["input"] for entry in [*session.get("state", []), *session.get("kv", [])]]
    names += [session[key] for key in ("photo_index", "beam_idx") if key in session]
    names += [session["cache"]["filled"]] if "cache" in session else []
    return names + ([session["prefix"]["input"]] if "prefix" in session else [])


def _same_names(left: list[str], right: Mapping[str, Any], a: str, b: str) -> None:
    if len(set(left)) != len(left):
        raise _Bad(f"{a} gives one input two roles")
    only = sorted(set(left) ^ set(right))
    if only:
        raise _Bad(f"{a} and {b} disagree about {', '.join(only)}")

"""`edgecap export --from DIR`: what optimum or the hub's ONNX community exported of a SmolVLM → a bundle.

Their graphs are kept; what their users compute around them moves into two graphs as the runtime takes them
(from_onnx_graphs.py). The golden pair comes of their own graphs, run as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from .. import __version__
from ..runtime import Captioner, write_bundle
from ..runtime.bundle import check_place, folder_beside
from ..runtime.decode import never_said
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.framed import write_frames
from ..runtime.frames import Framing
from ..runtime.progress import Progress, silent
from ..runtime.prompt import Prompt
from ..runtime.tokenizer import Tokenizer
from ..runtime.verify import Verification, verify_golden
from .artifact import size_of
from .from_onnx_card import card
from .from_onnx_files import CHAT, PARTS, Community, find
from .from_onnx_graphs import PIXELS, framed_decoder, framed_vision
from .from_onnx_reference import golden_of
from .golden import IMAGE, LOGITS, Golden
from .graph import PassResult, save
from .onnx_target import written
from .targets import TARGETS
from .trunk import OnnxPair

MAX_LENGTH = 64  # of captions: such models answer in sentences
# ONNX Runtime: the first whose GroupQueryAttention computes halves on CPUs, or that knows the graphs' opset
MIN_ENGINE, MIN_ENGINES = "1.20", {23: "1.23", 24: "1.24"}
BATCH = 8


@dataclass(frozen=True)
class Wrapped:
    """A bundle made of an export. files: part → the file that was taken. notes: lines the user should read."""

    path: Path
    target: str
    files: dict[str, str]
    measured: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "target": self.target,
            "from": self.files,
            "gate": {"verdict": "none", "reason": self.measured["gate"]},
            "measured": self.measured,
            "notes": list(self.notes),
        }


def wrap(
    folder: Path,
    *,
    variants: Sequence[str] = (),
    chat: str | None = None,
    image_size: int | None = None,
    tiles: bool | None = None,
    data: str | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> Wrapped:
    """Make a bundle of an export in `folder` (see from_onnx_files.py) and check it against the export's own graphs.

    variants: see `find`. chat: what is asked of each photo, by default CHAT. image_size, tiles: pixels a side of a
    frame, and whether photos are split into such, unless told otherwise, where not as the processor says. data: spec of
    photos whose val split is captioned, to say what CIDEr the bundle has; limit: so many of them. out: by default named
    after the folder.
    Raises UsageError for a folder that is none, EdgecapError where a graph does not run or gives something else.
    """
    found = find(folder.expanduser(), variants)
    chat = chat or CHAT
    name = found.folder.resolve().name
    out = out or Path("runs") / f"{name}-{_label(found)}.edgecap"
    check_place(out)
    photos: Sequence[Any] = ()
    if data:
        photos, spec, fingerprint = _val(data, skip_bad, limit)
    progress("graphs", 0, 2)
    encoder, framing, notes = _vision(found, image_size, tiles)
    progress("graphs", 1, 2)
    decoder = framed_decoder(
        found.load(PARTS[1]), found.load(PARTS[2]), dim=found.dim, vocab=found.vocab, positions=found.positions
    )
    progress("graphs", 2, 2)
    prompt = found.prompt(chat, framing)
    _check_length(prompt, framing, decoder.session["positions"])
    passes = [PassResult("scale_pixels").on("encoder"), *(each.on("decoder") for each in decoder.passes)]
    pair = OnnxPair(encoder, decoder.model, decoder.session, passes)
    tokenizer, tokens = _tokens(found, prompt)
    progress("golden", 0, 1)
    golden = golden_of(found, framing, prompt, eos=found.end, suppress=never_said(tokens))
    progress("golden", 1, 1)
    if found.others:
        notes.append(
            f"captions end with token {found.end} alone; generation_config.json also names {_some(found.others)}"
        )
    manifest, files = _assemble(
        found, out.name.removesuffix(".edgecap"), chat, pair, framing, prompt, tokenizer, tokens, golden
    )
    with folder_beside(out) as scratch:
        write_bundle(scratch / "bundle", manifest, files)
        with Captioner.load(scratch / "bundle", verify="sizes") as captioner:
            check = _check(captioner, manifest["golden"]["tolerance"])
            measured: dict[str, Any] = {
                "gate": "none: there is no other captioner to compare with",
                "golden": {
                    "against": "the export's own graphs",
                    "min_cosine": check.min_cosine,
                    "same_tokens": check.same_tokens,
                },
                "graph_bytes": sum(size_of(files[f"{part}.onnx"]) for part in ("encoder", "decoder")),
            }
            if data:
                measured |= _score(captioner, photos, progress)
                measured |= {"data": spec, "data_fingerprint": fingerprint, "split": "val"}
            else:
                measured["quality"] = "not measured: no --data was given"
    manifest["measured"] = measured
    files["MODEL_CARD.md"] = card(manifest).encode()
    write_bundle(out, manifest, files)
    taken = {part: str(path.relative_to(found.folder)) for part, path in found.files.items()}
    return Wrapped(out, manifest["target"], taken, measured, tuple(notes))


def _label(found: Community) -> str:
    variants = set(found.variants.values())
    return f"onnx-{variants.pop()}" if len(variants) == 1 else f"onnx-{found.variants[PARTS[2]]}-mixed"


def _vision(found: Community, side: int | None, tiles: bool | None) -> tuple[onnx.ModelProto, Framing, list[str]]:
    """The vision graph, the frames that it takes, and what is to be said of them."""
    framing = found.framing()
    framing = framing.at(side or framing.side, split=framing.split if tiles is None else tiles)
    model, fixed = framed_vision(found.load(PARTS[0]), *found.scaling(), found.dim)
    notes = []
    if not fixed:  # it names no side; whether it has one shows when it is run
        fixed = _only_side(model, framing, found.files[PARTS[0]])
    if fixed:
        if side not in (None, fixed):
            raise UsageError(f"the vision graph takes frames of {fixed} px alone: leave --image-size out")
        if fixed != framing.side:
            notes.append(f"the vision graph takes frames of {fixed} px alone, not the processor's {framing.side}")
            framing = dataclasses.replace(framing, side=fixed)
        for axis in (1, 2):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = fixed
        notes.append(f"image sizes: {fixed} px, the only one that the vision graph takes")
    else:
        step = framing.patch * framing.scale
        notes.append(f"image sizes: multiples of {step} px up to {framing.native // step * step}")
    return model, framing, notes


def _only_side(model: onnx.ModelProto, framing: Framing, path: Path) -> int:
    """The side of the frames that a vision graph takes, 0: any. Shapes of an export are often open in name alone."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(save(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _broken(path, error) from None
    step = framing.patch * framing.scale
    other = max(framing.native // 2 // step, 1) * step
    takes, last = {}, None
    for side in (framing.side, other if other != framing.side else step, framing.native):
        cells = side // framing.patch // framing.scale
        try:
            (seen,) = session.run(None, {PIXELS: np.full((1, side, side, 3), 100, np.uint8)})
            takes[side] = seen.shape[1] == cells * cells
        except Exception as error:  # onnxruntime's exceptions share no base class
            takes[side], last = False, error
    if all(takes.values()) and len(takes) > 1:
        return 0
    for side in (framing.side, framing.native):
        if takes[side]:
            return side
    raise _broken(path, last or ValueError("it gives another number of embeddings than config.json says"))


def _broken(path: Path, error: Exception) -> EdgecapError:
    return EdgecapError(f"{path} does not run in ONNX Runtime {ort.__version__}: {' '.join(str(error).split())[:300]}")


def _check_length(prompt: Prompt, framing: Framing, positions: int) -> None:
    segments = [prompt.segments(), *([prompt.segments(*prompt.most)] if framing.split and all(prompt.most) else [])]
    longest = max(each.length(framing.tokens) for each in segments)
    if longest + 2 > positions:
        raise UsageError(f"a photo and its prompt are up to {longest:,} positions, and the model has {positions:,}")


def _tokens(found: Community, prompt: Prompt) -> tuple[Tokenizer, dict[str, int]]:
    """The bundle's tokenizer, whose texts follow the prompt, and its "tokens": nothing is suppressed that
    transformers would say."""
    import json

    last = prompt.after[-1]
    inner = found.tokenizer.inner
    tokens = {"bos": last, "eos": found.end, "vocab_size": found.vocab}
    if last in inner.get_added_tokens_decoder():
        return found.tokenizer, tokens
    text = inner.decode([last], skip_special_tokens=False)
    tokens["bos_is_word"] = 1
    if text[-1:].isspace() or found.tokenizer.encode("a b") == found.tokenizer.encode(" a b"):
        return found.tokenizer, tokens
    tree = json.loads(inner.to_str())  # words behind a word begin with a space
    steps = [step for step in (tree["normalizer"], {"type": "Prepend", "prepend": " "}) if step]
    tree["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.load(json.dumps(tree, ensure_ascii=False).encode()), tokens


def _assemble(
    found: Community,
    name: str,
    chat: str,
    pair: OnnxPair,
    framing: Framing,
    prompt: Prompt,
    tokenizer: Tokenizer,
    tokens: dict[str, int],
    golden: Golden,
) -> tuple[dict[str, Any], dict[str, bytes | Path]]:
    """The manifest, but for what is measured, and the files."""
    target = TARGETS[f"onnx-{found.precision}"]
    models = (pair.encoder, pair.decoder)
    opset = max(entry.version for model in models for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graphs, files = written(pair)
    files |= {
        "tokenizer.json": tokenizer.inner.to_str(pretty=False).encode(),
        **golden.files(),
    }
    manifest = {
        "format": "edgecap",
        "version": 1,
        "name": name,
        "created_with": {"edgecap": __version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__},
        "backend": "onnx",
        "target": f"onnx-{found.precision}",
        "precision": found.precision,
        "requires": {"onnxruntime": MIN_ENGINES.get(opset, MIN_ENGINE)},
        "preprocess": {"size": [framing.side, framing.side], "mode": "keep", "resample": "bicubic"},
        "tokens": tokens,
        "decoding": {"beam": 1, "max_length": MAX_LENGTH},
        "graphs": graphs,
        "session": pair.session,
        "frames": write_frames(framing, prompt),
        "golden": {
            "image": IMAGE,
            "token_ids": golden.token_ids,
            "logits": LOGITS,
            "tolerance": {"same_tokens": target.same_tokens, "min_cosine": target.min_cosine},
        },
        "lineage": {
            "export": {
                "name": found.folder.resolve().name,
                "model_type": found.config["model_type"],
                "chat": chat,
                "variants": dict(found.variants),
                "files": {path.name: _sha256(path) for path in found.files.values()},
            },
            "passes": [each.to_dict() for each in pair.passes],
        },
    }
    return manifest, files


def _check(captioner: Captioner, tolerance: dict[str, Any]) -> Verification:
    """The bundle must say what the export's own graphs say, or the surgery went wrong."""
    check = verify_golden(captioner)
    if not check.ok:
        raise EdgecapError(
            "the bundle does not reproduce the export's own graphs on the golden picture (logit cosine "
            f"{check.min_cosine:.5f}, needed {tolerance['min_cosine']:g}; same tokens: "
            f"{'yes' if check.same_tokens else 'no'}): report this export"
        )
    return check


def _val(data: str, skip_bad: bool, limit: int | None) -> tuple[Sequence[Any], str, str]:
    """Photos to score on, the data's public name and fingerprint."""
    from ..benchmarks.datasets import open_dataset
    from ..benchmarks.datasets.checks import require_decodable

    dataset = open_dataset(data, skip_bad=skip_bad)
    photos = dataset.splits.get("val", ())[:limit]
    if not len(photos):
        raise UsageError(f"{dataset.spec} has no photos in split 'val'")
    require_decodable(photos, dataset.spec)
    reader = dataset.spec.partition(":")[0]
    return photos, dataset.spec if reader == "scenes" else reader, dataset.fingerprint


def _score(captioner: Captioner, photos: Sequence[Any], progress: Progress) -> dict[str, Any]:
    """What the bundle says of the photos, scored."""
    from ..benchmarks.metrics import caption_metrics

    said: list[str] = []
    view = captioner.view()
    progress("captions", 0, len(photos))
    for start in range(0, len(photos), BATCH):
        batch = [view.load(example.load()) for example in photos[start : start + BATCH]]
        said += [str(caption) for caption in captioner.caption_arrays(batch)]
        progress("captions", len(said), len(photos))
    ids = [example.id for example in photos]
    scores = caption_metrics(dict(zip(ids, said, strict=True)), {example.id: example.captions for example in photos})
    interval = scores.to_dict()["cider_interval"]
    return {
        "photos": len(photos),
        "cider": {"value": scores.cider, "low": interval["low"], "high": interval["high"]},
        "distinct": scores.distinct,
        "repeated_ngrams": scores.repeated_ngrams,
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8]))

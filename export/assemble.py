"""From an artifact to the files and the manifest of a bundle, all but what is measured on it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..runtime.backends import BACKENDS
from .golden import IMAGE, LOGITS

if TYPE_CHECKING:
    from ..train.checkpoint import Checkpoint
    from .artifact import Artifact
    from .golden import Golden
    from .graph import PassResult
    from .targets import Target


def assemble(
    loaded: Checkpoint,
    target: tuple[str, Target],
    name: str,
    artifact: Artifact,
    golden: Golden,
    before: list[PassResult],
    frames: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, bytes | Path]]:
    """The manifest (without "files" and "measured") and files of a bundle.

    before: passes of the checkpoint itself. frames: as of the Source.
    """
    recipe = loaded.recipe.to_dict()
    # What a user's folders are called is nobody's business on another machine.
    recipe["data"]["spec"] = public_spec(recipe["data"]["spec"])
    for table in ("tokenizer", "encoder", "bridge", "decoder", "text"):
        source = recipe[table].get("source") or ""
        if source.startswith(("/", ".", "~")) or (source and Path(source).exists()):
            recipe[table]["source"] = Path(source).name
    tokenizer = loaded.tokenizer.inner.to_str(pretty=False).encode()
    files = {**artifact.files, "tokenizer.json": tokenizer, **golden.files()}
    label, chosen = target
    manifest = {
        "format": "edgecap",
        "version": 1,
        "name": name,
        "created_with": {"edgecap": __version__, **_versions(chosen)},
        "backend": chosen.backend,
        "target": label,
        "precision": chosen.precision,
        "requires": artifact.requires,
        "preprocess": loaded.preprocess.to_dict(),
        "tokens": dict(loaded.tokens),
        "decoding": recipe["decoding"],
        "graphs": artifact.graphs,
        **({} if artifact.session is None else {"session": artifact.session}),
        **({} if frames is None else {"frames": frames}),
        **artifact.more,
        "golden": {
            "image": IMAGE,
            "token_ids": golden.token_ids,
            "logits": LOGITS,
            "tolerance": {"same_tokens": chosen.same_tokens, "min_cosine": chosen.min_cosine},
        },
        "lineage": {
            "checkpoint": {"sha256": loaded.sha256, "recipe": recipe, "metrics": _scores(loaded.metrics)},
            "data": recipe["data"]["spec"],
            "passes": [result.to_dict() for result in (*before, *artifact.passes)],
        },
    }
    return manifest, files


def _versions(target: Target) -> dict[str, str]:
    names = dict.fromkeys(("torch", "onnxruntime", BACKENDS[target.backend].package, *target.packages))
    return {name: str(getattr(import_module(name), "__version__", "unknown")) for name in names}


def public_spec(spec: str) -> str:
    """The data spec without the user's folder."""
    reader = spec.partition(":")[0]
    return spec if reader == "scenes" else reader


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint scored and how large it is; not how long it took."""
    best = {key: value for key, value in (metrics.get("best") or {}).items() if "seconds" not in key}
    return {"best": best} | {key: metrics[key] for key in ("train_photos", "parameters", "merged") if key in metrics}

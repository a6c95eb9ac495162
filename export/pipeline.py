"""`edgecap export`: checkpoint → graphs → target → gate → bundle, in that order and all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from .. import __version__
from ..benchmarks.datasets import Dataset, Example, open_dataset
from ..benchmarks.datasets.checks import require_decodable
from ..runtime import Captioner, write_bundle
from ..runtime.bundle import folder_beside
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.verify import verify_golden
from ..train.cache import load_pixels
from ..train.checkpoint import Checkpoint, load_checkpoint
from ..train.run import RUNS, latest_run
from ..train.tokenizer import caption_text
from .calibration import Calibration
from .card import model_card
from .gate import SLOWER, GateResult, bundle_captions, parity, run_gate, speed, torch_captions
from .golden import IMAGE, LOGITS, Golden, make_golden
from .graph import save
from .targets import Target, pick_target
from .trunk import OPSET_ATTENTION, OnnxPair, to_onnx

Progress = Callable[[str, int, int], None]
MIN_ENGINE = {18: "1.18", OPSET_ATTENTION: "1.23"}  # ONNX Runtime; 1.18 reads IR version 10
SEED = 0


@dataclass(frozen=True)
class Exported:
    """`path` is None where the gate refused. `notes`: lines the user should read."""

    path: Path | None
    name: str
    target: str
    gate: GateResult
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": None if self.path is None else str(self.path),
            "name": self.name,
            "target": self.target,
            "gate": {"verdict": self.gate.verdict, "reason": self.gate.reason},
            "measured": self.gate.measured,
            "notes": list(self.notes),
        }


def export(
    checkpoint: Path | None,
    *,
    target: str,
    data: str | None = None,
    skip_bad: bool = False,
    max_cider_drop: float = 0.02,
    limit: int | None = None,
    calibration: int = 128,
    out: Path | None = None,
    force: bool = False,
    unfinished_ok: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Exported:
    """Export a checkpoint (default: the newest finished run) and let the gate judge the artifact.

    data: spec for calibration (train split) and gate (val split), by default the recipe's. skip_bad: leave bad examples
    out; always so where the recipe did. limit: validation photos for the gate. calibration: training photos. A bundle
    that fails is written only with `force`, and then says so.
    Raises UsageError for what cannot be exported as asked, EdgecapError where the export itself goes wrong.
    """
    chosen = pick_target(target)
    loaded = load_checkpoint(_find(checkpoint, unfinished_ok), unfinished_ok=unfinished_ok)
    out = out or RUNS / f"{loaded.path.resolve().name}-{target}.edgecap"
    name = out.name.removesuffix(".edgecap")
    learnt = loaded.recipe.data
    dataset = open_dataset(data or learnt.spec, skip_bad=skip_bad or learnt.skip_bad)
    photos = _split(dataset, "val")[:limit]
    require_decodable(photos, dataset.spec)
    calibrator = _calibration(loaded, dataset, calibration if chosen.calibrated else 1, progress)

    progress("graphs", 0, 2)
    trunk = to_onnx(loaded.model, report=lambda done: progress("graphs", done, 2))
    golden = make_golden(loaded)
    with folder_beside(out) as scratch:
        pair = chosen.build(trunk.copy(), calibrator)
        manifest, files = _bundle(loaded, target, chosen, name, pair, golden)
        artifact = _candidate(scratch / "artifact", manifest, files)
        exact = chosen.precision == "fp32"
        if exact:
            fp32, reference = artifact, torch_captions(loaded, artifact)
        else:
            base = _bundle(loaded, "onnx-fp32", pick_target("onnx-fp32"), name, trunk, golden)
            fp32 = _candidate(scratch / "fp32", *base)
            reference = bundle_captions(fp32)
        progress("gate", 0, len(photos))
        result = run_gate(
            artifact,
            reference,
            photos,
            limit=max_cider_drop,
            progress=lambda done: progress("gate", done, len(photos)),
        )
        measured = result.measured
        measured |= {
            "data": _public_spec(dataset.spec),
            "data_fingerprint": dataset.fingerprint,
            "split": "val",
            "chose_checkpoint": dataset.spec == learnt.spec,  # whether training looked at these photos, too
            "reference": "torch" if exact else "onnx-fp32",
            "parity": parity(artifact, loaded, photos),
            "golden": _golden_check(artifact, chosen),
            "graph_bytes": sum(len(content) for file, content in files.items() if file.endswith(".onnx")),
        }
        notes = []
        if not exact:
            pixels = load_pixels(photos[:1], artifact.preprocess)
            measured["speed"] = _speed(scratch, pixels)
            notes += _slower(target, measured["speed"])
        for captioner in {id(c): c for c in (artifact, fp32)}.values():
            captioner.close()
        if not result.passed and not force:
            return Exported(None, name, target, result, tuple(notes))
        if not result.passed:
            measured["forced"] = True
        manifest["measured"] = measured
        files["MODEL_CARD.md"] = model_card(manifest).encode()
        measured["bytes"] = sum(map(len, files.values()))
        write_bundle(out, manifest, files)
        return Exported(out, name, target, result, tuple(notes))


def _find(checkpoint: Path | None, unfinished_ok: bool) -> Path:
    if checkpoint is not None:
        return checkpoint
    found = latest_run(finished=None if unfinished_ok else True)
    if found is not None:
        return found
    unfinished = latest_run()
    if unfinished is not None:
        raise UsageError(
            f"the training of {unfinished} has not finished; continue it with: "
            f"edgecap train --resume --out {unfinished} (or export it as it is with --unfinished-ok)"
        )
    raise UsageError(f"no finished run under {RUNS}/: train one with edgecap train, or name a checkpoint")


def _split(dataset: Dataset, split: str) -> Sequence[Example]:
    examples = dataset.splits.get(split, ())
    if not len(examples):
        raise UsageError(f"{dataset.spec} has no photos in split {split!r}, which export needs")
    return examples


def _calibration(loaded: Checkpoint, dataset: Dataset, count: int, progress: Progress) -> Calibration:
    """Photos of the training split, chosen by a fixed seed, each with its first caption."""
    train = _split(dataset, "train")
    picks = sorted(np.random.default_rng(SEED).permutation(len(train))[:count].tolist())
    examples = [train[index] for index in picks]
    longest = loaded.recipe.tokenizer.max_length
    captions = [loaded.tokenizer.encode(caption_text(example.captions[0]))[:longest] for example in examples]
    return Calibration(load_pixels(examples, loaded.preprocess), captions, loaded.tokens, progress)


def _bundle(
    loaded: Checkpoint, target: str, chosen: Target, name: str, pair: OnnxPair, golden: Golden
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and files of a bundle that has not been measured yet."""
    recipe = loaded.recipe.to_dict()
    # What a user's folders are called is nobody's business on another machine.
    recipe["data"]["spec"] = _public_spec(recipe["data"]["spec"])
    source = recipe["encoder"].get("source") or ""
    if source.startswith(("/", ".", "~")) or Path(source).exists():
        recipe["encoder"]["source"] = Path(source).name
    files = {f"{part}.onnx": save(getattr(pair, part)) for part in ("encoder", "decoder")}
    files |= {"tokenizer.json": loaded.tokenizer.inner.to_str(pretty=False).encode(), **golden.files()}
    opset = max(
        entry.version for model in (pair.encoder, pair.decoder) for entry in model.opset_import if not entry.domain
    )
    manifest = {
        "format": "edgecap",
        "version": 1,
        "name": name,
        "created_with": {"edgecap": __version__, "torch": torch.__version__, "onnxruntime": ort.__version__},
        "backend": "onnx",
        "target": target,
        "precision": chosen.precision,
        "requires": {"onnxruntime": MIN_ENGINE[opset]},
        "preprocess": loaded.preprocess.to_dict(),
        "tokens": dict(loaded.tokens),
        "decoding": recipe["decoding"],
        "graphs": pair.graphs(),
        "session": pair.session,
        "golden": {
            "image": IMAGE,
            "token_ids": golden.token_ids,
            "logits": LOGITS,
            "tolerance": {"same_tokens": chosen.same_tokens, "min_cosine": chosen.min_cosine},
        },
        "lineage": {
            "checkpoint": {"sha256": loaded.sha256, "recipe": recipe, "metrics": _scores(loaded.metrics)},
            "data": recipe["data"]["spec"],
            "passes": [result.to_dict() for result in pair.passes],
        },
    }
    return manifest, files


def _candidate(folder: Path, manifest: dict[str, Any], files: dict[str, bytes]) -> Captioner:
    write_bundle(folder, manifest, files)
    return Captioner.load(folder, verify="sizes")


def _golden_check(artifact: Captioner, chosen: Target) -> dict[str, Any]:
    """The golden pair must hold where the bundle is made, or it will hold nowhere."""
    check = verify_golden(artifact)
    if not check.ok:
        raise EdgecapError(
            "the exported graphs do not reproduce the torch model on the golden picture "
            f"(logit cosine {check.min_cosine:.5f}, needed {chosen.min_cosine:g}; same tokens: "
            f"{'yes' if check.same_tokens else 'no'}): use a more precise target"
        )
    return {"min_cosine": check.min_cosine, "same_tokens": check.same_tokens}


def _speed(scratch: Path, pixels: np.ndarray) -> dict[str, Any]:
    """Both bundles loaded once more with one thread each."""
    with (
        Captioner.load(scratch / "artifact", threads=1, verify="sizes") as artifact,
        Captioner.load(scratch / "fp32", threads=1, verify="sizes") as fp32,
    ):
        return speed(artifact, fp32, pixels)


def _slower(target: str, ratios: dict[str, Any]) -> list[str]:
    slow = {part: ratios[part] for part in ("encoder", "caption") if ratios[part] < SLOWER}
    if not slow:
        return []
    parts = ", ".join(f"{part} at {ratio:.2f}× its speed" for part, ratio in slow.items())
    return [f"{target} is slower than onnx-fp32 on this CPU: {parts} (1 thread)"]


def _public_spec(spec: str) -> str:
    """The spec without the user's folder."""
    reader = spec.partition(":")[0]
    return spec if reader == "scenes" else reader


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint scored and how large it is; not how long it took."""
    best = {key: value for key, value in (metrics.get("best") or {}).items() if "seconds" not in key}
    return {"best": best} | {key: metrics[key] for key in ("train_photos", "parameters") if key in metrics}

"""`edgecap export`: checkpoint → graphs → target → gate → bundle, in that order and all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..benchmarks.datasets import Dataset, Example, open_dataset
from ..benchmarks.datasets.checks import require_decodable
from ..runtime.bundle import check_place, folder_beside
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from ..train.adopt import Published, adopt
from ..train.checkpoint import Checkpoint, load_checkpoint, require_captioner
from ..train.data.cache import load_pixels
from ..train.framing import frames_of
from ..train.lora import refuse_adapter
from ..train.models.keep_16bit import is_large, keep_16bit
from ..train.run import RUNS, latest_run
from ..train.smolvlm import CHAT
from ..train.tokenizer import caption_text
from .artifact import BuildOptions, Source
from .assemble import public_spec
from .calibration import Calibration
from .gate import SLOWER, GateResult
from .job import REFERENCE, Job
from .prune import prune_passes
from .recover import layer_bits, recover
from .recover import note as recovery_note
from .smaller import Smaller, make_smaller
from .targets import Target, as_tuned, pick_target
from .tuning import FILE as TUNING
from .tuning import Tuning, timeable
from .tuning import autotune as run_autotune

SEED = 0
DRAWN = "scenes"  # what a published captioner is calibrated on and compared by where no photos are named
PRUNING_PHOTOS = 512  # with 128, what is refitted after pruning is visibly worse


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
    source: str | None = None,
    image_size: int | None = None,
    tiles: bool | None = None,
    chat: str | None = None,
    data: str | None = None,
    skip_bad: bool = False,
    max_cider_drop: float = 0.02,
    limit: int | None = None,
    calibration: int = 128,
    out: Path | None = None,
    force: bool = False,
    unfinished_ok: bool = False,
    options: BuildOptions | None = None,
    raise_layers: bool = False,
    autotune: str | None = None,
    tuning: Path | None = None,
    smaller: Smaller | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Export a checkpoint (default: the newest finished run) and let the gate judge the artifact.

    source: instead of a checkpoint a published SmolVLM, by hub id or directory, whose weights are taken as they are.
    image_size, tiles: how its bundle sees photos unless told otherwise, where not as published; chat: what the user
    says.
    data: spec for calibration (train split) and gate (val split), by default the recipe's. skip_bad: leave bad examples
    out; always so where the recipe did. limit: validation photos for the gate. calibration: training photos. A bundle
    that fails, or misses the golden pair, is written only with `force`, and then says so. raise_layers: where the gate
    fails, raise the precision of single layers until it holds (recover.py). autotune: name of the device on which each
    graph's fastest precision is measured; tuning: a tuning.json that says it already (tuning.py). smaller: prune before
    all else; the gate then compares with the unpruned captioner.
    Raises UsageError for what cannot be exported as asked, EdgecapError where the export itself goes wrong.
    """
    options, smaller = options or BuildOptions(), smaller or Smaller()
    smaller.check()
    chosen = pick_target(target)
    known = Tuning.load(tuning) if tuning else None
    if known:
        options = replace(options, graphs=known.graphs)
    _check_request(target, chosen, autotune, known, raise_layers)
    if source is None:
        loaded = _load(checkpoint, unfinished_ok)
    else:
        loaded, data = adopt(source, chat=chat or CHAT, side=image_size, tiles=tiles), data or DRAWN
    _check_captioner(target, chosen, loaded, options, smaller, autotune)
    label = f"pruned-{target}" if smaller.items else target
    out = out or RUNS / f"{loaded.path.resolve().name}-{label}.edgecap"
    check_place(out)
    learnt = loaded.recipe.data
    dataset = open_dataset(data or learnt.spec, skip_bad=skip_bad or learnt.skip_bad)
    photos = _split(dataset, "val")[:limit]
    require_decodable(photos, dataset.spec)
    whole = loaded
    if smaller.items:
        published = whole if isinstance(whole, Published) else None
        seen = published.squashed if published else whole
        looked_at = _calibration(seen, dataset, max(calibration, PRUNING_PHOTOS), progress)
        loaded = make_smaller(seen, smaller, dataset, looked_at, progress, say, skip_bad=skip_bad)
        loaded = published.pruned_to(loaded) if published else loaded
    if is_large(loaded.model):
        keep_16bit(loaded.model)
    before = prune_passes(loaded.metrics)
    frames = frames_of(loaded) if chosen.frames and not options.fused else None
    calibrator = _calibration(loaded, dataset, calibration if chosen.calibrated else 1, progress, frames)
    with folder_beside(out) as scratch:
        (scratch / "build").mkdir()
        begun = Source(loaded, calibrator, scratch / "build", options, frames, progress)
        name = out.name.removesuffix(".edgecap")
        entry = as_tuned(chosen, known.graphs) if known else chosen
        job = Job(begun, whole, target, entry, name, photos, max_cider_drop, scratch, progress, before, force=force)
        try:
            notes: list[str] = []
            if autotune:
                known, artifact, result = run_autotune(begun, chosen.build, autotune, job.gate, progress=progress)
                job.chosen = as_tuned(chosen, known.graphs)
                if result.passed:
                    kept = " and ".join(f"the {part} in {precision}" for part, precision in known.graphs.items())
                    notes.append(f"--autotune keeps {kept}: the fastest on {autotune} that the gate passes")
            else:
                artifact = chosen.build(begun)
                result = job.gate(artifact)
            if raise_layers:
                first = (artifact, result)
                artifact, result, done = recover(begun, target, chosen.build, job.gate, first=first)
                artifact.passes.append(done)
                notes.append(recovery_note(done))
            if known:
                job.beside[TUNING] = known.to_json().encode()
            if options.fused and (result.passed or force):
                result.measured["fused"] = job.add_fused(artifact)
            result.measured.update(
                job.evidence(artifact),
                data=public_spec(dataset.spec),
                data_fingerprint=dataset.fingerprint,
                split="val",
                chose_checkpoint=dataset.spec == learnt.spec,  # whether training looked at these photos, too
            )
        finally:
            job.close()
        notes += _notes(target, result.measured)
        if not result.passed and not force:
            return Exported(None, job.name, target, result, tuple(notes))
        if not (result.passed and result.measured["golden"]["reproduced"]):
            result.measured["forced"] = True
        job.write(artifact, result.measured, out)
        return Exported(out, job.name, target, result, tuple(notes))


def _check_request(target: str, chosen: Target, autotune: str | None, known: Tuning | None, raise_layers: bool) -> None:
    """Refuse what does not go together, before anything is read."""
    if autotune:
        timeable(autotune)
    if raise_layers:
        layer_bits(target)
        if autotune or known:
            raise UsageError("--autotune and --tuning keep only what passes the gate: leave --recover out")
    if (autotune or known) and not (chosen.backend == "onnx" and chosen.calibrated):
        raise UsageError(f"--autotune and --tuning go with onnx-int8 and onnx-int4, not with {target}")


def _check_captioner(
    target: str, chosen: Target, loaded: Checkpoint, options: BuildOptions, smaller: Smaller, autotune: str | None
) -> None:
    """Refuse what this captioner cannot become, before hours of pruning, whatever these would leave."""
    if reason := chosen.refusal(recipe_parts(loaded), options):
        raise UsageError(f"{target} cannot be made of {loaded.path}: {reason}")
    if (options.fused or autotune) and is_large(loaded.model):
        option = "--fused" if options.fused else "--autotune"
        raise UsageError(
            f"{option} is for captioners of up to 2 GB a part in fp32, and this one is larger: leave it out"
        )
    if smaller.epochs and isinstance(loaded, Published):
        raise UsageError("--finetune is taught by a checkpoint, which --from does not name; leave it out")


def prune(
    checkpoint: Path | None,
    smaller: Smaller,
    *,
    data: str | None = None,
    skip_bad: bool = False,
    calibration: int = PRUNING_PHOTOS,
    unfinished_ok: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """The pruned checkpoint of a checkpoint (default: the newest finished run), as `export` would make it first."""
    smaller.check()
    whole = _load(checkpoint, unfinished_ok)
    learnt = whole.recipe.data
    dataset = open_dataset(data or learnt.spec, skip_bad=skip_bad or learnt.skip_bad)
    looked_at = _calibration(whole, dataset, calibration, progress)
    return make_smaller(whole, smaller, dataset, looked_at, progress, say, skip_bad=skip_bad)


def recipe_parts(loaded: Checkpoint) -> dict[str, str]:
    """The kinds of encoder, bridge and decoder."""
    recipe = loaded.recipe
    return {"encoder": recipe.encoder.kind, "bridge": recipe.bridge["kind"], "decoder": recipe.decoder["kind"]}


def _load(checkpoint: Path | None, unfinished_ok: bool) -> Checkpoint:
    run = _find(checkpoint, unfinished_ok)
    refuse_adapter(run)
    return require_captioner(load_checkpoint(run, unfinished_ok=unfinished_ok))


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


def _calibration(
    loaded: Checkpoint, dataset: Dataset, count: int, progress: Progress, frames: dict[str, Any] | None = None
) -> Calibration:
    """Photos of the training split, chosen by a fixed seed, each with its first caption."""
    train = _split(dataset, "train")
    picks = sorted(np.random.default_rng(SEED).permutation(len(train))[:count].tolist())
    examples = [train[index] for index in picks]
    longest = loaded.recipe.tokenizer.max_length
    captions = [loaded.tokenizer.encode(caption_text(example.captions[0]))[:longest] for example in examples]
    return Calibration(load_pixels(examples, loaded.preprocess), captions, loaded.tokens, progress, frames)


def _notes(target: str, measured: dict[str, Any]) -> list[str]:
    notes = []
    if not measured["golden"]["reproduced"]:
        found = f"the golden picture's logits have a cosine of {measured['golden']['min_cosine']:.5f} with torch's"
        notes.append(f"{found}, less than {target} asks: written with --force, and edgecap verify refuses the bundle")
    if "simulated" in measured:
        notes.append(f"{target} was not run: what is measured is {measured['simulated']}")
    ratios = measured.get("speed", {})
    slow = {part: ratios[part] for part in ("encoder", "caption") if ratios.get(part, SLOWER) < SLOWER}
    if slow:
        parts = ", ".join(f"{part} at {ratio:.2f}× its speed" for part, ratio in slow.items())
        notes.append(f"{target} is slower than {REFERENCE} on this CPU: {parts} (1 thread)")
    return notes

"""One export under way: its artifacts loaded as a device would, captioned with, compared, and written as a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..benchmarks.datasets import Example
from ..runtime import Captioner, write_bundle
from ..runtime.errors import EdgecapError
from ..runtime.fused import FusedCaptioner, check_fused
from ..runtime.progress import Progress
from ..runtime.verify import verify_golden
from ..train.checkpoint import Checkpoint
from ..train.data.cache import load_pixels
from ..train.framing import frames_of
from ..train.models.keep_16bit import is_large
from .artifact import Artifact, BuildOptions, Source, size_of
from .assemble import assemble
from .card import model_card
from .fused import FILE as FUSED
from .fused import add_fused
from .gate import GateResult, bundle_captions, caption_all, compare, parity, speed, torch_captions
from .golden import Golden, make_golden
from .graph import PassResult
from .targets import TARGETS, Target

REFERENCE = "onnx-fp32"
FUSED_PHOTOS, FUSED_SAME = 64, 0.95  # photos the fused graph is compared on; share that must be the same


@dataclass
class Job:
    """One export under way: what is built is written to `scratch`, loaded as a device would, and compared.

    whole: the checkpoint that the gate compares with: the source's own, or what that was pruned from. force: a missed
    golden pair is noted, and no error.
    """

    source: Source
    whole: Checkpoint
    target: str
    chosen: Target
    name: str
    photos: Sequence[Example]
    limit: float
    scratch: Path
    progress: Progress
    before: list[PassResult] = field(default_factory=list)
    force: bool = False
    beside: dict[str, bytes] = field(default_factory=dict)  # further files of the bundle that is written
    opened: dict[int, tuple[Artifact, Captioner]] = field(default_factory=dict)  # kept: an id is of a living object

    def __post_init__(self) -> None:
        self.golden: Golden = make_golden(self.source.checkpoint)
        self.said: list[str] | None = None
        self.fp32: Captioner | None = None

    @property
    def exact(self) -> bool:
        """Whether torch itself is the reference: for fp32, and for what is so large that its fp32 graphs would hardly
        run here beside the torch model."""
        return (self.target == REFERENCE and not self.pruned) or is_large(self.whole.model)

    @property
    def pruned(self) -> bool:
        return self.whole is not self.source.checkpoint

    def captioner(self, artifact: Artifact) -> Captioner:
        """The artifact as a loaded bundle; simulated where its engine cannot run."""
        if id(artifact) not in self.opened:
            place = self.scratch / f"artifact{len(self.opened)}"
            write_bundle(place, *self._assembled(artifact))
            simulated = artifact.simulate() if artifact.simulate and not self.chosen.runs_here else None
            self.opened[id(artifact)] = artifact, Captioner.load(place, verify="sizes", model=simulated)
        return self.opened[id(artifact)][1]

    def _reference(self, artifact: Artifact) -> list[str]:
        """What the reference says of the photos: torch for fp32, the fp32 graphs for everything else; once."""
        if self.said is None:
            ours = self.captioner(artifact)
            if self.exact:
                batch = torch_captions(self.whole, ours)
            else:
                self.fp32 = self._fp32()
                batch = bundle_captions(self.fp32)
            self.said = caption_all(batch, self.photos, ours.preprocess, self._counting("reference"))
        return self.said

    def _fp32(self) -> Captioner:
        """The fp32 graphs of the whole captioner as a loaded bundle."""
        entry, place = TARGETS[REFERENCE], self.scratch / REFERENCE
        if self.pruned:
            calibration, frames = self.source.calibration, frames_of(self.whole) if self.source.frames else None
            source, golden = Source(self.whole, calibration, self.scratch, frames=frames), make_golden(self.whole)
        else:
            source, golden = replace(self.source, options=BuildOptions()), self.golden
        label = (REFERENCE, entry)
        written = assemble(self.whole, label, self.name, entry.build(source), golden, [], source.frames)
        write_bundle(place, *written)
        return Captioner.load(place, verify="sizes")

    def _counting(self, phase: str) -> Callable[[int], None]:
        self.progress(phase, 0, len(self.photos))
        return lambda done: self.progress(phase, done, len(self.photos))

    def gate(self, artifact: Artifact) -> GateResult:
        """Caption the validation photos with the artifact and compare."""
        ours = self.captioner(artifact)
        reference = self._reference(artifact)
        said = caption_all(bundle_captions(ours), self.photos, ours.preprocess, self._counting("gate"))
        return compare(said, reference, self.photos, limit=self.limit)

    def evidence(self, artifact: Artifact) -> dict[str, Any]:
        """Everything else that is measured on the artifact that is to be written."""
        ours = self.captioner(artifact)
        measured = {
            "reference": "torch" if self.exact else f"{REFERENCE}, unpruned" if self.pruned else REFERENCE,
            "parity": parity(ours, self.source.checkpoint, self.photos),
            "golden": self._golden_check(ours),
            "graph_bytes": sum(size_of(file) for name, file in artifact.files.items() if name != FUSED),
        }
        if artifact.simulate and not self.chosen.runs_here:
            measured["simulated"] = "the artifact's programs computed op by op in torch: their engine does not run here"
        elif not self.exact:
            measured["speed"] = self._speed(artifact, load_pixels(self.photos[:1], ours.preprocess))
        return measured

    def _golden_check(self, ours: Captioner) -> dict[str, Any]:
        """The golden pair must hold where the bundle is made, or it will hold nowhere."""
        check, asked = verify_golden(ours), self.chosen
        holds = check.min_cosine >= asked.min_cosine and (check.same_tokens or not asked.same_tokens)
        if not holds and not self.force:
            raise EdgecapError(
                "the exported graphs do not reproduce the torch model on the golden picture "
                f"(logit cosine {check.min_cosine:.5f}, needed {asked.min_cosine:g}; same tokens: "
                f"{'yes' if check.same_tokens else 'no'}): use a more precise target (or --force)"
            )
        return {"min_cosine": check.min_cosine, "same_tokens": check.same_tokens, "reproduced": holds}

    def _speed(self, artifact: Artifact, pixels: np.ndarray) -> dict[str, Any]:
        """The artifact and the fp32 graphs loaded once more with one thread each."""
        ours = self.captioner(artifact).bundle.path
        with (
            Captioner.load(ours, threads=1, verify="sizes") as one,
            Captioner.load(self.scratch / REFERENCE, threads=1, verify="sizes") as other,
        ):
            return speed(one, other, pixels)

    def add_fused(self, artifact: Artifact) -> dict[str, Any]:
        """Add the whole captioner as one graph; it must say what the two graphs and the runtime's search say."""
        ours = self.captioner(artifact)
        add_fused(artifact, self.source.checkpoint)
        place = self.scratch / "fused"
        write_bundle(place, *self._assembled(artifact))
        one = FusedCaptioner.load(place)
        pixels = load_pixels(self.photos[:FUSED_PHOTOS], ours.preprocess)
        same = {f"beam {beam}": check_fused(ours, one, pixels, beam=beam) for beam in (1, 3)}
        if min(same.values()) < FUSED_SAME:
            raise EdgecapError(
                f"the fused graph says what the runtime says for only {min(same.values()):.0%} of the photos: "
                "leave --fused out and report this"
            )
        return {"photos": len(pixels), "same_tokens": same, "bytes": size_of(artifact.files[FUSED])}

    def _assembled(self, artifact: Artifact) -> tuple[dict[str, Any], dict[str, bytes | Path]]:
        target = (self.target, self.chosen)
        source = self.source
        return assemble(source.checkpoint, target, self.name, artifact, self.golden, self.before, source.frames)

    def write(self, artifact: Artifact, measured: dict[str, Any], out: Path) -> None:
        manifest, files = self._assembled(artifact)
        manifest["measured"] = measured
        files |= self.beside
        files["MODEL_CARD.md"] = model_card(manifest).encode()
        measured["bytes"] = sum(map(size_of, files.values()))
        write_bundle(out, manifest, files)

    def close(self) -> None:
        for captioner in (*(captioner for _, captioner in self.opened.values()), self.fp32):
            if captioner is not None:
                captioner.close()

"""Every kind of peer beside every bundle: finds the bundle's weights by its lineage, prepares what a peer reads, once,
in the cache; a peer that cannot run it is a subject that says why."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..devices.local import cache_folder
from ..runtime.bundle import Bundle
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.progress import Progress, silent
from .peers import CHECKPOINT, PEERS, PUBLISHED, Model
from .runner import python_module, run_script
from .subjects import Subject, peer_python

BITS = {"fp16": 16, "f16": 16, "int8": 8, "q8_0": 8, "mixed": 8, "int4": 4, "q4_0": 4}  # of a manifest's precision
RECIPE, WEIGHTS = "recipe.toml", "model.safetensors"  # of a checkpoint
GRAPHS = "onnxruntime"  # whose float32 folder has the graphs that others are made of
ASKED = 120.0  # s for a script to say whether its engine is installed
PREPARED = 2 * 3600.0  # s for one to make its folder: compilers and conversions of large models take long
FORMAT = 1  # of what is in the cache: another one is made anew


def prepare_peers(
    bundles: Sequence[Subject],
    *,
    checkpoints: Sequence[Path] = (),
    runs: Path = Path("runs"),
    threads: int = 1,
    progress: Progress = silent,
) -> list[Subject]:
    """Every kind of peer for each bundle, with its weights and decoding; one for several bundles where it is the same.
    A bundle pruned from the weights of another one here has that one's peers, which run the whole model.

    checkpoints: directories of weights, each of the bundles that were made from it; others are looked for under `runs`
    and beside the bundle. Raises UsageError for a directory that belongs to none of the bundles.
    """
    sources = {bundle.path: Provenance.of(bundle.path) for bundle in bundles}
    find_weights(list(sources.values()), checkpoints, runs)
    preparer = Preparer(progress, threads)
    found: dict[tuple[Any, ...], Subject] = {}
    wholes = {(sources[bundle.path].sha256, _search(bundle)): bundle.name for bundle in bundles}
    pruned = {bundle.name: wholes.get((bundle.facts.get("pruned_from"), _search(bundle))) for bundle in bundles}
    for bundle in bundles:
        for kind in PEERS if pruned[bundle.name] is None else ():
            subject = preparer.subject(kind, bundle, sources[bundle.path])
            same = (kind, subject.path, _search(subject), subject.refused)
            known = found.get(same)
            of = [*known.peer_of, *subject.peer_of] if known else subject.peer_of
            found[same] = replace(known or subject, peer_of=tuple(dict.fromkeys(of)))
    return [
        replace(peer, peer_of=(*peer.peer_of, *(name for name, whole in pruned.items() if whole in peer.peer_of)))
        for peer in found.values()
    ]


def _search(subject: Subject) -> str:
    return json.dumps(dict(subject.decoding), sort_keys=True)


@dataclass
class Provenance:
    """Where a bundle comes from. sha256: of its weights, "" where the lineage names none; weights: their directory."""

    bundle: Path
    manifest: Mapping[str, Any]
    recipe: Mapping[str, Any]
    sha256: str
    weights: Path | None = None
    source: str = ""

    @classmethod
    def of(cls, bundle: Path) -> Provenance:
        manifest = Bundle.open(bundle, verify="sizes").manifest
        checkpoint = manifest.get("lineage", {}).get("checkpoint", {})
        return cls(bundle, manifest, checkpoint.get("recipe", {}), checkpoint.get("sha256", ""))

    def part(self, name: str) -> str:
        return str(self.recipe.get(name, {}).get("kind", "unknown"))

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.bundle.name.removesuffix(".edgecap"))

    @property
    def side(self) -> int:
        frames = self.manifest.get("frames") or {}
        return int(frames.get("side") or self.manifest["preprocess"]["size"][0])

    @property
    def chat(self) -> str:
        return str(self.recipe.get("prompt", {}).get("chat", ""))

    def model(self, decoding: Mapping[str, Any]) -> Model:
        frames = self.manifest.get("frames") or {}
        parts = {name: self.part(name) for name in ("encoder", "bridge", "decoder")}
        return Model(
            **parts,
            bits=BITS.get(str(self.manifest.get("precision")), 32),
            beam=decoding.get("beam", 1),
            no_repeat_ngram=decoding.get("no_repeat_ngram", 0),
            tiles=bool(frames.get("split")),
            smaller=self.side < frames.get("native", 0),
            source=self.source,
        )


def find_weights(sources: Sequence[Provenance], given: Sequence[Path], runs: Path) -> None:
    """Fill in the sources' weights. A published directory is taken by its name, or where nothing else is found; whether
    it holds these weights is checked when it is opened."""
    hashes: dict[Path, str] = {}

    def sha256(folder: Path) -> str:
        if folder not in hashes:
            with open(folder / WEIGHTS, "rb") as file:
                hashes[folder] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashes[folder]

    published, used = [], set()
    for folder in given:
        if (folder / RECIPE).is_file() and (folder / WEIGHTS).is_file():
            sha256(folder)
        elif (folder / "config.json").is_file():
            published.append(folder)
        else:
            raise UsageError(
                f"--checkpoint {folder} holds no weights: neither a checkpoint nor a Hugging Face directory"
            )
    for origin in sources:
        if not origin.sha256:
            continue
        mine = [folder for folder, digest in hashes.items() if folder in given and digest == origin.sha256]
        theirs = [] if mine else _published(origin, published)
        if not (mine or theirs):
            mine = [folder for folder in _around(origin.bundle, runs) if sha256(folder) == origin.sha256][:1]
            theirs = published if not mine and origin.model({}).smolvlm else []
        origin.weights = next(iter([*mine, *theirs]), None)
        origin.source = CHECKPOINT if mine else PUBLISHED if theirs else ""
        used.add(origin.weights)
    if left := [folder for folder in given if folder not in used]:
        raise UsageError(f"--checkpoint {left[0]} belongs to no bundle here: their lineage names other weights")


def _published(origin: Provenance, given: Sequence[Path]) -> list[Path]:
    """The directories, given or beside the bundle, with the name of what a SmolVLM was made from."""
    name = str(origin.recipe.get("encoder", {}).get("source", "")).rpartition("/")[2]
    if not name or not origin.model({}).smolvlm:
        return []
    near = origin.bundle.resolve().parent / name
    beside = [near] if (near / "config.json").is_file() and not (near / RECIPE).is_file() else []
    return [*(folder for folder in given if folder.resolve().name == name), *beside]


def _around(bundle: Path, runs: Path) -> Iterator[Path]:
    """Checkpoints under `runs` and beside the bundle."""
    for folder in dict.fromkeys((runs, bundle.resolve().parent)):
        for recipe in sorted(folder.glob(f"*/{RECIPE}")):
            if (recipe.parent / WEIGHTS).is_file():
                yield recipe.parent


@dataclass
class Preparer:
    """Prepares peers, each once."""

    progress: Progress
    threads: int = 1  # that the peers will have
    missing: dict[str, str | None] = field(default_factory=dict)  # why a kind does not run at all, by kind

    def subject(self, kind: str, bundle: Subject, origin: Provenance) -> Subject:
        """The peer of this kind beside a bundle; `refused` where it cannot be."""
        peer = PEERS[kind]
        model = origin.model(bundle.decoding)
        bits = peer.bits(model.bits)
        precision = peer.precisions[bits]
        found = Subject(
            f"{kind} {precision} {origin.name}" + (f" beam {model.beam}" if model.beam > 1 else ""),
            kind,
            Path(),
            (),
            dict(bundle.decoding),
            {"precision": precision},
            peer_of=(bundle.name,),
        )
        try:
            python = peer_python(kind)
            reason = self.reason(kind, model, origin) or self.absent(kind, python)
            if reason:
                return replace(found, name=f"{kind} {origin.name}", facts={}, refused=reason)
            path = self.prepared(kind, model, bits, origin)
        except EdgecapError as error:
            return replace(found, refused=error.message)
        return replace(found, path=path, command=tuple(python_module(peer.module, python)))

    def reason(self, kind: str, model: Model, origin: Provenance) -> str | None:
        if not origin.sha256:
            return "the bundle's lineage names no checkpoint: it was not exported from one"
        if reason := PEERS[kind].refuses(model):
            return reason
        return None if origin.weights else "needs its checkpoint: --checkpoint DIR"

    def absent(self, kind: str, python: str) -> str | None:
        """Why the kind cannot run on this machine at all."""
        if kind not in self.missing:
            done = run_script([*python_module(PEERS[kind].module, python), "--installed"], timeout=ASKED)
            self.missing[kind] = done
        return self.missing[kind]

    def prepared(self, kind: str, model: Model, bits: int, origin: Provenance) -> Path:
        """What the peer is to load: made now, or found. Raises EdgecapError where it cannot be made."""
        peer, weights = PEERS[kind], origin.weights
        assert weights is not None
        if peer.reads_checkpoint and origin.source == CHECKPOINT:
            return weights
        if origin.source == PUBLISHED and kind != "torch":
            self.prepared("torch", model, 32, origin)  # which checks that these are the bundle's weights
        source = self.prepared(peer.source, model, bits, origin) if peer.source else weights
        precision = peer.precisions[bits]
        folder = cache_folder() / "peers" / f"{kind}-{precision}-{self.key(kind, precision, origin)}"
        if folder.is_dir():
            return folder
        command = [*python_module(peer.module, peer_python(peer.source or kind)), os.path.abspath(source)]
        scratch = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        more = [] if peer.source else ["--precision", precision]
        if peer.vlm and model.smolvlm and origin.source == PUBLISHED:
            more += ["--size", str(origin.side), "--chat", origin.chat]
        else:
            more += ["--bundle", os.path.abspath(origin.bundle), "--threads", str(self.threads)]
            if peer.graphs and (kind, bits) != (GRAPHS, 32):
                more += ["--graphs", str(self.prepared(GRAPHS, model, 32, origin))]
        label = f"prepare {kind} {precision} of {origin.name}"
        self.progress(label, 0, 1)
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            if reason := run_script([*command, str(scratch), *more], timeout=PREPARED):
                raise EdgecapError(f"could not be prepared: {reason}")
            scratch.replace(folder)
        except OSError as error:
            if not folder.is_dir():  # else another process was faster
                raise EdgecapError(f"the cache {folder.parent} cannot be written: {error.strerror}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self.progress(label, 1, 1)
        return folder

    def key(self, kind: str, precision: str, origin: Provenance) -> str:
        """Of all that a prepared folder depends on."""
        manifest = origin.manifest
        threads = self.threads if kind == "torch_compile" else None
        parts = {
            "format": (FORMAT, __version__, kind, precision, threads),
            "weights": (origin.sha256, os.path.abspath(origin.weights or "")),
            "sees": (manifest["preprocess"], manifest.get("frames"), origin.chat),
            "tokens": (manifest["tokens"], manifest["files"]["tokenizer.json"]["sha256"]),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

"""What can be put on the bench, a bundle or a peer, and which bundle is meant when none is named."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from .peers import PEERS
from .runner import python_module

MANIFEST = "bundle.json"


@dataclass(frozen=True)
class Subject:
    """One system under test: how its worker is started, what it loads, and what the record says about it."""

    name: str
    kind: str  # "bundle", or the peer's kind
    path: Path
    command: tuple[str, ...]  # argv of the worker
    decoding: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # sha256, bytes, target, precision, …
    fused: bool = False  # run by the one graph that holds the whole captioner
    peer_of: tuple[str, ...] = ()  # of a peer: the names of the bundles it is put beside
    refused: str | None = None  # why it cannot run at all, and nothing is asked of it

    def load_request(self, threads: int) -> dict[str, Any]:
        return {"path": str(self.path), "threads": threads, "decoding": dict(self.decoding), "fused": self.fused}


def newest_bundle(folder: Path = Path("runs")) -> Path:
    """The bundle written last under `folder`. Raises UsageError when there is none."""
    found = [*folder.glob(f"*.edgecap/{MANIFEST}"), *folder.glob(f"*/*.edgecap/{MANIFEST}")]
    if not found:
        raise UsageError(f"no bundle under {folder}/ to measure: run edgecap export first, or name a bundle")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, str(path))).parent


@dataclass(frozen=True)
class Origin:
    """What a bundle's lineage says of the data it was learnt from."""

    spec: str
    skip_bad: bool


def bundle_subject(path: Path, *, beam: int | None = None) -> tuple[Subject, Origin | None]:
    """The bundle at `path` as a subject, and the data in its lineage (None when there is none).

    `beam` replaces the bundle's own. Raises EdgecapError where there is no sound bundle.
    """
    from ..runtime.bundle import Bundle

    bundle = Bundle.open(path)  # a broken one is refused now, and is no row that failed
    manifest = bundle.manifest
    lineage = manifest.get("lineage", {})
    prunings = [step.get("params", {}).get("from") for step in lineage.get("passes", ()) if step["name"] == "prune"]
    facts = {
        "sha256": bundle.sha256,
        "bytes": {"total": bundle.bytes, "graphs": graph_bytes(manifest)},
        "target": manifest.get("target"),
        "precision": manifest.get("precision"),
        "created_with": dict(manifest.get("created_with", {})),
        "graphs": sorted(manifest.get("graphs", {})),
        "run_by": "graphs",
        "model": lineage.get("checkpoint", {}).get("recipe", {}).get("name"),
        "checkpoint_sha256": lineage.get("checkpoint", {}).get("sha256"),
        "pruned_from": next(iter(prunings), None),
    }
    decoding = dict(manifest["decoding"]) | ({} if beam is None else {"beam": beam})
    command = tuple(python_module("edgecap.benchmarks.worker"))
    subject = Subject(path.resolve().name.removesuffix(".edgecap"), "bundle", path, command, decoding, facts)
    data = lineage.get("checkpoint", {}).get("recipe", {}).get("data", {})
    skip_bad = isinstance(data, Mapping) and data.get("skip_bad") is True
    return subject, Origin(lineage["data"], skip_bad) if lineage.get("data") else None


def ways(subject: Subject) -> list[Subject]:
    """The subject, and the same run by its one-graph form where it has one: "of" the subject's name."""
    if "fused" not in subject.facts.get("graphs", ()):
        return [subject]
    facts = {**subject.facts, "run_by": "fused", "of": subject.name}
    return [subject, replace(subject, name=f"{subject.name} fused", facts=facts, fused=True)]


def graph_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of a bundle's encoder and decoder; a graph may be one file, two, or a folder of files."""
    graphs = [graph for name, graph in manifest.get("graphs", {}).items() if name in ("encoder", "decoder")]
    places = {place for graph in graphs for place in (graph["file"], graph.get("weights")) if place}
    return sum(
        entry["bytes"]
        for name, entry in manifest["files"].items()
        if name in places or any(name.startswith(f"{place}/") for place in places)
    )


def peer_subject(spec: str, decoding: Mapping[str, Any]) -> Subject:
    """The peer that `KIND:PATH` names, decoding as told. Raises UsageError for a kind that is unknown, a missing path
    or a missing interpreter.
    """
    kind, colon, where = spec.partition(":")
    if not colon or not where or kind not in PEERS:
        usage = "; ".join(f"{name}:{peer.argument} ({peer.help})" for name, peer in PEERS.items())
        raise UsageError(f"unknown peer {spec!r}; there are {usage}")
    path = Path(where)
    if not path.exists():
        raise UsageError(f"peer {spec}: there is nothing at {path}")
    command = tuple(python_module(PEERS[kind].module, peer_python(kind)))
    return Subject(f"{kind} {path.resolve().name}", kind, path, command, dict(decoding))


def peer_python(kind: str) -> str:
    """The interpreter of a kind of peer: EDGECAP_PEER_<KIND>_PYTHON, or this one."""
    name = f"EDGECAP_PEER_{kind.upper()}_PYTHON"
    wanted = os.environ.get(name)
    if wanted and shutil.which(wanted) is None:
        raise UsageError(f"{name}={wanted}: there is no such interpreter; edgecap must be installed with it, too")
    return wanted or sys.executable


def groups(subjects: Sequence[Subject]) -> list[int]:
    """The number of every subject's group, of those that are measured side by side: bundles of the same weights, or
    pruned from them, and their peers; peers of no bundle are in the first. Without peers, all are one group.
    """
    if not any(subject.peer_of for subject in subjects):
        return [0] * len(subjects)
    weights: dict[str, int] = {}
    bundles: dict[str, int] = {}  # by their names
    for subject in subjects:
        if subject.kind == "bundle":
            known = (subject.facts.get(name) for name in ("pruned_from", "checkpoint_sha256"))
            key = next(filter(None, known), str(subject.path))
            bundles[subject.name] = weights.setdefault(key, len(weights))
    return [bundles.get(next(iter(subject.peer_of), subject.name), 0) for subject in subjects]


def unique_names(subjects: Sequence[Subject]) -> list[Subject]:
    """The same subjects; names that occur twice are told apart by the folders of their paths, of peers by their bundle,
    and by a number where that is not enough.
    """
    names = [subject.name for subject in subjects]
    for depth in (1, 2, 3):
        places: dict[str, set[Any]] = {}
        for subject, name in zip(subjects, names, strict=True):
            places.setdefault(name, set()).add((subject.path.resolve(), subject.peer_of))
        names = [
            _longer(subject, depth) if len(places[name]) > 1 else name
            for subject, name in zip(subjects, names, strict=True)
        ]
    taken: set[str] = set()
    result = []
    for subject, name in zip(subjects, names, strict=True):
        again = (name if n == 1 else f"{name} #{n}" for n in range(1, len(names) + 1))
        name = next(one for one in again if one not in taken)
        taken.add(name)
        result.append(subject if name == subject.name else replace(subject, name=name))
    return result


def _longer(subject: Subject, depth: int) -> str:
    if subject.peer_of:
        return f"{subject.name} of {subject.peer_of[0]}"
    return "/".join((*subject.path.resolve().parts[-1 - depth : -1], subject.name))

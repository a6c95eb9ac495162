"""SmolVLM side by side: bundles and peers on one picture with one number of new tokens, interleaved in one run.

    python -m edgecap.benchmarks.vlm make MODEL DIR                # every peer's folder, from a Hugging Face directory
    python -m edgecap.benchmarks.vlm run a.edgecap DIR/* --threads 1 --json record.json

`edgecap bench` times each part of many captions and judges them; here one caption takes seconds, and one pass of each
row a round has all that is asked: the first token, the further ones, and from file to text.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..devices import cpu_facts
from ..runtime.errors import EdgecapError, UsageError
from .latency import speedup, stats
from .limits import larger, limits
from .memory import caption_process
from .peers import PEERS
from .peers.vlm import TASK, Peer, Task, new_task
from .record import check_writable, machine_load, write
from .report import limits_line
from .runner import Worker, WorkerFailed, python_module
from .subjects import Subject, bundle_subject, peer_subject
from .work import add_near

FORMAT = "edgecap-vlm-bench"
KINDS = tuple(kind for kind, peer in PEERS.items() if peer.vlm)
SOURCE = {kind: peer.source for kind, peer in PEERS.items() if peer.source}  # made from that one's, by its interpreter
TIMEOUT = 900.0  # seconds for one answer
PARTS = ("first", "next", "whole")


def peer_class(kind: str) -> type[Peer]:
    """The class of a kind of peer; its engine is not imported."""
    module = import_module(PEERS[kind].module)
    return next(v for v in vars(module).values() if isinstance(v, type) and v.__dict__.get("kind") == kind)


def make(model: Path, folder: Path, *, size: int = 512, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Folders `KIND-PRECISION` of every peer, each by its own interpreter; one that fails says why, and is kept.

    Raises UsageError where model is no SmolVLM's directory, or has no pictures of that size.
    """
    made = []
    for kind in kinds:
        source = SOURCE.get(kind)
        for precision in peer_class(source or kind).precisions:
            task = new_task(kind, model, precision, size)
            place = folder / f"{kind}-{precision}"
            place.mkdir(parents=True, exist_ok=True)
            start = folder / f"{source}-{precision}" if source else model
            python = peer_subject(f"{source or kind}:{folder}", {}).command[0]
            command = [*python_module(PEERS[kind].module, python), str(start), str(place), "--size", str(size)]
            done = subprocess.run(
                [*command, *([] if source else ["--precision", precision])], stderr=subprocess.PIPE, text=True
            )
            if done.returncode:
                said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
                replace(task, failed=said[-1][:300] if said else f"exit code {done.returncode}").write(place)
            made.append(place)
    return made


def subject(path: Path, tokens: int) -> Subject:
    """The bundle or peer's folder at a path, searching greedily for exactly so many tokens. Raises EdgecapError."""
    decoding = {"beam": 1, "max_length": tokens, "min_length": tokens, "no_repeat_ngram": 0}
    if (path / TASK).exists():
        found = peer_subject(f"{Task.read(path).kind}:{path}", decoding)
        return replace(found, name=path.resolve().name)
    found, _ = bundle_subject(path)
    return replace(found, decoding={**found.decoding, **decoding})


@dataclass
class Row:
    """What was found out about one subject. After an error nothing more is asked of it."""

    subject: Subject
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)  # by round
    logits: np.ndarray | None = None  # [tokens, vocabulary] of the warm-up's caption

    def attempt(self, what: str, call: Any) -> Any:
        """What the call returns; None, and the row's reason, where its worker fails."""
        if self.error is None:
            try:
                return call()
            except WorkerFailed as failure:
                self.error = f"{what}: {failure}"
        return None


def run(
    subjects: Sequence[Subject], photo: Path, *, threads: int = 1, rounds: int = 10, starts: int = 3
) -> list[dict[str, Any]]:
    """A row of the record for each subject, all compared with the first. Raises UsageError without subjects, or for
    fewer than two rounds.

    starts: fresh processes after a first one, whose time does not count: it may still read from disk.
    """
    if not subjects or rounds < 2:
        raise UsageError("side by side takes a bundle or peer, and two rounds")
    rows = [Row(each) for each in subjects]
    for _ in range(starts + 1):
        for row in rows:
            found = row.attempt("cold start", lambda row=row: fresh(row.subject, photo, threads))
            row.starts += [found] if found else []
    with ExitStack() as stack, TemporaryDirectory(prefix="edgecap-vlm-") as scratch:
        workers = {}
        for i, row in enumerate(rows):
            workers[i] = row.attempt("load", lambda row=row: stack.enter_context(loaded(row, threads)))
            file = Path(scratch) / f"{i}.npy"
            row.attempt("warm-up", lambda i=i, file=file: one(workers[i], photo, logits=str(file)))
            row.logits = np.load(file) if file.exists() else None
        for _ in range(rounds):
            for i, row in enumerate(rows):
                found = row.attempt("latency", lambda i=i: one(workers[i], photo))
                row.passes += [found] if found else []
    return [summary(row, rows[0]) for row in rows]


def fresh(subject: Subject, photo: Path, threads: int) -> dict[str, Any]:
    """One caption by a process of its own; see `caption_process`."""
    load = subject.load_request(threads)
    return caption_process(Worker(subject.command, threads=threads), load, [str(photo)], timeout=TIMEOUT)


def loaded(row: Row, threads: int) -> Worker:
    worker = Worker(row.subject.command, threads=threads)
    try:
        row.facts = worker.ask("load", timeout=TIMEOUT, **row.subject.load_request(threads))["facts"]
    except WorkerFailed:
        worker.close()
        raise
    return worker


def one(worker: Worker, photo: Path, **more: Any) -> dict[str, Any]:
    return dict(worker.ask("pass", timeout=TIMEOUT, photo=str(photo), **more)["run"])


def summary(row: Row, first: Row) -> dict[str, Any]:
    """Seconds, bytes and ratios of a row; with the first one paired by round."""
    facts = {**row.subject.facts, **row.facts}
    found: dict[str, Any] = {"name": row.subject.name, "kind": row.subject.kind, "error": row.error, "facts": facts}
    if row.error is not None:
        return found
    timed = row.starts[1:] or row.starts
    found |= {
        "bytes": facts.get("bytes"),
        "cold_start": {key: median(s[key] for s in timed) for key in ("seconds", "import_s", "load_s")},
        "peak_rss": max((s["peak_rss"] for s in row.starts if s["peak_rss"]), default=None),
        "ids": row.passes[0]["ids"],
        "tokens": len(row.passes[0]["ids"]),
    }
    for part in PARTS:
        found[part] = stats([p[part] for p in row.passes]).to_dict() if part in row.passes[0] else None
    if first.error is None:
        pairs = list(zip(row.passes[0]["ids"], first.passes[0]["ids"], strict=False))
        found["same_tokens"] = sum(a == b for a, b in pairs)
        reached = next((i + 1 for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        found["logits"] = agreement(row.logits, first.logits, reached)
        found["speedup"] = {
            part: speedup([p[part] for p in first.passes], [p[part] for p in row.passes]).to_dict()
            for part in PARTS
            if row is not first and found[part] and part in first.passes[0]
        }
    return found


def agreement(a: np.ndarray | None, b: np.ndarray | None, reached: int) -> dict[str, float] | None:
    """Two rows' logits [tokens, vocabulary] at the first `reached` positions, where both came by the same tokens, and
    where both are finite (some engines hide the end of sentence): the largest difference, the smallest and the first
    cosine. None without both."""
    if a is None or b is None or a.shape[1] != b.shape[1]:
        return None
    x, y = (each[:reached].astype(np.float64) for each in (a, b))
    both = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(both, x, 0), np.where(both, y, 0)
    cosines = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return {
        "positions": len(x),
        "max_abs_difference": float(np.abs(x - y).max()),
        "min_cosine": float(cosines.min()),
        "first_cosine": float(cosines[0]),
    }


def draw(file: Path, size: int, seed: int = 0) -> Path:
    """A picture of smooth noise."""
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(file)
    return file


def show(record: dict[str, Any]) -> None:
    """The record as a Markdown table on stdout."""
    cpu, settings = record["device"]["cpu"], record["settings"]
    print(f"{cpu['model']}; threads: {settings['threads']}; rounds: {settings['rounds']}; medians\n")
    if line := limits_line(record):
        print(f"{line}\n")
    print(
        "| | image tokens | MB | cold start s | peak MB | TTFT ms | tok/s | of limit | end to end ms | × first | "
        "same | logits: cosine | of positions | largest difference |"
    )
    print("|" + " --- |" * 14)
    for row in record["rows"]:
        if row["error"]:
            print(f"| {row['name']} | {row['error']} |" + " |" * 12)
            continue
        speed = row.get("speedup", {}).get("whole")
        cells = [
            row["name"],
            row["facts"].get("image_tokens", "–"),
            f"{row['bytes']['total'] / 1e6:.0f}" if row["bytes"] else "–",
            f"{row['cold_start']['seconds']:.2f}",
            f"{row['peak_rss'] / 1e6:.0f}" if row["peak_rss"] else "–",
            f"{row['first']['p50'] * 1e3:.0f}",
            f"{1 / row['next']['p50']:.1f}" if row["next"] else "–",
            f"{row['near']['decoder']['share']:.0%}" if row.get("near") else "–",
            f"{row['whole']['p50'] * 1e3:.0f}",
            f"{speed['ratio']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]" if speed else "",
            f"{row['same_tokens']}/{row['tokens']}" if "same_tokens" in row else "–",
            *agreed(row.get("logits")),
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def agreed(logits: dict[str, float] | None) -> tuple[str, ...]:
    if logits is None:
        return ("–",) * 3
    cosines = f"{logits['first_cosine']:.5f}, all ≥ {logits['min_cosine']:.5f}"
    return cosines, str(logits["positions"]), f"{logits['max_abs_difference']:.2g}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m edgecap.benchmarks.vlm", description="SmolVLM side by side.")
    ways = top.add_subparsers(dest="way", required=True)
    making = ways.add_parser("make", help="Make every peer's folder.")
    making.add_argument("model", type=Path, help="A SmolVLM as a Hugging Face directory.")
    making.add_argument("folder", type=Path)
    making.add_argument("--size", type=int, default=512, help="Pixels a side.")
    making.add_argument("--kind", action="append", choices=KINDS, help="Only this one; may be given again.")
    running = ways.add_parser("run", help="Measure bundles and peers' folders; all are compared with the first.")
    running.add_argument("rows", type=Path, nargs="+", metavar="BUNDLE|FOLDER")
    running.add_argument("--picture", type=Path, help="Instead of one of noise, 512 pixels a side.")
    running.add_argument("--tokens", type=int, default=24, help="New ones, no fewer and no more.")
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--rounds", type=int, default=10)
    running.add_argument("--starts", type=int, default=3, help="Cold starts of each.")
    running.add_argument("--json", type=Path, metavar="FILE", help="Write the whole record here.")
    return top


def main() -> None:
    given = parser().parse_args()
    try:
        if given.way == "make":
            for place in make(given.model, given.folder, size=given.size, kinds=given.kind or KINDS):
                failed = Task.read(place).failed
                print(place, f"failed: {failed}" if failed else "")
            return
        if given.json:
            check_writable(given.json)
        subjects = [subject(path, given.tokens) for path in given.rows]
        settings = {name: getattr(given, name) for name in ("threads", "rounds", "starts", "tokens")}
        device = {"cpu": cpu_facts().to_dict(), "load": machine_load()}
        with TemporaryDirectory(prefix="edgecap-vlm-") as scratch:
            photo = given.picture or draw(Path(scratch) / "picture.png", 512)
            before = limits(given.threads)
            rows = run(subjects, photo, threads=given.threads, rounds=given.rounds, starts=given.starts)
            most = larger(before, limits(given.threads))
            add_near(subjects, rows, most, str(photo), lambda row: (None, row["next"] and row["next"]["p50"]))
        record: dict[str, Any] = {"format": FORMAT, "version": 1, "device": device, "settings": settings}
        record |= {"limits": most, "rows": rows}
        if given.json:
            write(record, given.json)
        show(record)
    except EdgecapError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()

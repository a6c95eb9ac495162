"""SmolVLM side by side: bundles and peers on one picture with one number of new tokens, interleaved in one run.

    python -m edgecap.benchmarks.vlm make MODEL DIR                # every peer's folder, from a Hugging Face directory
    python -m edgecap.benchmarks.vlm run a.edgecap DIR/* --threads 1 --json record.json

The bench's own suite measures, as it does what is slow, and its record is written. Its own are the forced number of
tokens and the comparison of logits instead of captions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..runtime.errors import EdgecapError, UsageError
from .bench import measure
from .device import Device, Local
from .peers import PEERS
from .peers.vlm import TASK, Task, new_task
from .prepare_peers import PREPARED
from .quality import Photo
from .record import check_writable, write
from .runner import WorkerFailed, python_module, run_script
from .subjects import Subject, bundle_subject, peer_python, peer_subject, unique_names
from .suite import INTERRUPTED, Settings, noting
from .wording import limits_line, megabytes, problem_lines, rate_text, ratio_text

KINDS = tuple(kind for kind, peer in PEERS.items() if peer.vlm)
SOURCE = {kind: peer.source for kind, peer in PEERS.items() if peer.source}  # made from that one's, by its interpreter
TIMEOUT = 900.0  # seconds for one answer


def make(model: Path, folder: Path, *, size: int = 512, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Folders `KIND-PRECISION` of every peer, each by its own interpreter; one that fails says why, and is kept.

    Raises UsageError where model is no SmolVLM's directory, or has no pictures of that size.
    """
    made = []
    for kind in kinds:
        source = SOURCE.get(kind)
        for precision in PEERS[source or kind].names:
            task = new_task(kind, model, precision, size)
            place = folder / f"{kind}-{precision}"
            place.mkdir(parents=True, exist_ok=True)
            start = folder / f"{source}-{precision}" if source else model
            python = peer_python(source or kind)
            command = [*python_module(PEERS[kind].module, python), str(start), str(place), "--size", str(size)]
            command += [] if source else ["--precision", precision]
            if reason := run_script(command, timeout=PREPARED):
                replace(task, failed=reason).write(place)
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


def run(
    subjects: Sequence[Subject], photo: Path, *, threads: int = 1, rounds: int = 10, starts: int = 3
) -> dict[str, Any]:
    """The record of `edgecap bench` for one photo; all rows are compared with the first, token by token: "tokens",
    "same_tokens" and "logits" (see agreement). Raises UsageError without subjects or picture, or for fewer than two
    rounds.

    starts: fresh processes after a first one, whose time does not count: it may still read from disk.
    """
    if not subjects or rounds < 2:
        raise UsageError("side by side takes a bundle or peer, and two rounds")
    settings = Settings(
        threads=threads,
        rounds=rounds,
        min_runs=rounds,
        min_seconds=0.0,
        warmup=1,
        cold_starts=starts,
        start_seconds=3600.0,
        slow_seconds=0.0,  # however quick a caption is, one a round tells all of its times
        memory_photos=1,
        timeout=TIMEOUT,
    )
    try:
        fingerprint = sha256(photo.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"the picture {photo} cannot be read: {error.strerror}") from None
    about = {"spec": f"picture:{photo.name}", "fingerprint": fingerprint}
    with Local() as device:
        photos = [Photo(photo.name, str(photo), ())]
        record = measure(device, unique_names(subjects), photos, settings, about | {"split": "picture", "photos": 1})
        if not record["stopped"]:
            try:
                add_agreement(device, subjects, record, photo, threads)
            except KeyboardInterrupt:  # what was measured is kept
                record["stopped"] = INTERRUPTED
    return record


def add_agreement(
    device: Device, subjects: Sequence[Subject], record: dict[str, Any], photo: Path, threads: int
) -> None:
    """Caption once more with every row that ran, for its tokens and logits, and hold them against the first row's. What
    fails now is one of the record's problems.
    """
    first: tuple[list[int], np.ndarray | None] | None = None
    for i, (subject, row) in enumerate(zip(subjects, record["rows"], strict=True)):
        if row["status"] != "ok":
            continue
        with noting(record["problems"], f"{row['name']}, its tokens and logits"):
            ids, logits = said(device, subject, photo, threads)
            row["tokens"] = len(ids)
            if i == 0:
                first = ids, logits
            if first:
                pairs = list(zip(ids, first[0], strict=False))
                row["same_tokens"] = sum(a == b for a, b in pairs)
                reached = next((k + 1 for k, (a, b) in enumerate(pairs) if a != b), len(pairs))
                row["logits"] = agreement(logits, first[1], reached)


def said(device: Device, subject: Subject, photo: Path, threads: int) -> tuple[list[int], np.ndarray | None]:
    """The ids of one caption, and the logits [tokens, vocabulary] where the engine shows them. EdgecapError where it
    fails now."""
    with TemporaryDirectory(prefix="edgecap-vlm-") as scratch:
        file = Path(scratch) / "logits.npy"
        try:
            with device.start(subject, threads) as worker:
                worker.ask("load", timeout=TIMEOUT, **subject.load_request(threads))
                found = worker.ask("pass", timeout=TIMEOUT, photo=str(photo), logits=str(file))["run"]
        except WorkerFailed as failure:
            raise EdgecapError(f"{subject.name} captioned, and did not again: {failure}") from None
        return found["ids"], np.load(file, allow_pickle=False) if file.exists() else None


def agreement(a: np.ndarray | None, b: np.ndarray | None, reached: int) -> dict[str, float | None] | None:
    """Two rows' logits [tokens, vocabulary] at the first `reached` positions, where both came by the same tokens, and
    where both are finite (some engines hide the end of sentence): the largest difference, the smallest and the first
    cosine, None where that is no number (logits of zeros or NaN alone). None without both."""
    if a is None or b is None or a.shape[1] != b.shape[1]:
        return None
    shown = min(reached, len(a), len(b))
    if not shown:
        return None
    x, y = (each[:shown].astype(np.float64) for each in (a, b))
    both = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(both, x, 0), np.where(both, y, 0)
    with np.errstate(invalid="ignore"):
        cosines = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    least, begin = float(cosines.min()), float(cosines[0])
    return {
        "positions": len(x),
        "max_abs_difference": float(np.abs(x - y).max()),
        "min_cosine": least if np.isfinite(least) else None,
        "first_cosine": begin if np.isfinite(begin) else None,
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
    first = record["rows"][0]["name"]
    for row in record["rows"]:
        if row["status"] != "ok":
            print(f"| {row['name']} | {row['error']} |" + " |" * 12)
            continue
        times, near = row["latency"], (row.get("near") or {}).get("decoder")
        cells = [
            row["name"],
            row["facts"].get("image_tokens", "–"),
            megabytes((row["bytes"] or {}).get("total"), 0),
            f"{row['cold_start']['seconds']:.2f}" if row["cold_start"] else "–",
            megabytes(row["memory"]["peak_rss"], 0),
            f"{times['ttft']['p50'] * 1e3:.0f}",
            rate_text(times["tokens_per_s"]),
            f"{near['share']:.0%}" if near else "–",
            f"{times['end_to_end']['p50'] * 1e3:.0f}",
            ratio_text(row["speedup"].get(first, {}).get("end_to_end")),
            f"{row['same_tokens']}/{row['tokens']}" if "same_tokens" in row else "–",
            *agreed(row.get("logits")),
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
    for line in problem_lines(record):
        print(f"\n{line}")


def agreed(logits: dict[str, Any] | None) -> tuple[str, ...]:
    if logits is None:
        return ("–",) * 3
    begin, least = ("–" if logits[key] is None else f"{logits[key]:.5f}" for key in ("first_cosine", "min_cosine"))
    cosines = f"{begin}, all ≥ {least}"
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
        with TemporaryDirectory(prefix="edgecap-vlm-") as scratch:
            photo = given.picture or draw(Path(scratch) / "picture.png", 512)
            record = run(subjects, photo, threads=given.threads, rounds=given.rounds, starts=given.starts)
        if given.json:
            write(record, given.json)
        show(record)
    except KeyboardInterrupt:
        print("stopped before anything was finished: nothing is written", file=sys.stderr)
        sys.exit(130)
    except EdgecapError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # as `edgecap` does
        sys.exit(" ".join(str(error).split()))
    if record["stopped"]:
        sys.exit(130)
    if record["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    main()

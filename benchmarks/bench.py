"""`edgecap bench` as one function: choose what to measure and on which photos, measure, and return the
record.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import get_profile, require_reachable
from ..devices.confine import parse_size
from ..devices.throttle import fell, slowed
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from .device import Device
from .limits import larger, limits
from .operators import add_operators
from .prepare_peers import prepare_peers
from .quality import Photo, split_photos
from .reach import reach
from .record import build
from .report_html import thumbnail
from .roofline import add_roofline
from .subjects import Origin, Subject, bundle_subject, groups, newest_bundle, peer_subject, unique_names, ways
from .suite import INTERRUPTED, Settings, noting, run

if TYPE_CHECKING:
    from .browser import Options


def choose(
    bundles: Sequence[Path], peers: Sequence[str], *, beams: Sequence[int] = (), runs: Path = Path("runs")
) -> tuple[list[Subject], Origin | None]:
    """The subjects in the order given, bundles first, and the data of the first lineage that names some.

    Without bundles, the newest one under `runs`. beams: every bundle once with each of them. A bundle that also holds
    the whole captioner as one graph is a second subject run that way. Peers decode with the first bundle's options.
    Raises EdgecapError.
    """
    found = [bundle_subject(path, beam=beam) for path in bundles or [newest_bundle(runs)] for beam in beams or [None]]
    subjects = [subject for subject, _ in found]
    if len(set(beams)) > 1:
        subjects = [replace(each, name=f"{each.name} beam {each.decoding['beam']}") for each in subjects]
    subjects += [peer_subject(spec, subjects[0].decoding) for spec in peers]
    both = [way for subject in unique_names(subjects) for way in ways(subject)]
    return unique_names(both), next((origin for _, origin in found if origin), None)


def bench(
    bundles: Sequence[Path] = (),
    *,
    device: str = "cpu",
    host: str | None = None,
    memory_limit: str | None = None,
    browser: Options | None = None,
    data: str | None = None,
    skip_bad: bool = False,
    split: str = "test",
    limit: int | None = None,
    beams: Sequence[int] = (),
    peers: Sequence[str] = (),
    all_peers: bool = False,
    checkpoints: Sequence[Path] = (),
    settings: Settings | None = None,
    runs: Path = Path("runs"),
    pictures: dict[str, str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure bundles and peers on a device and return the record (see record.build).

    device: a profile's name or TOML file; host: replaces the profile's. memory_limit: of each worker, as in 512M.
    browser: how one is measured, for devices of that kind alone. data: a data spec, by default the one in the lineage
    of the first bundle. skip_bad: leave bad examples out; always so where the bundle's recipe did. limit: photos, by
    default the whole split (20 under emulation). beams: replace what the bundles say, each bundle once with each.
    pictures: filled with every photo, small, as a data: URI by its id.
    all_peers: put one of every kind beside each bundle, made from its weights, which `checkpoints` may name (see
    prepare_peers.py).
    Raises EdgecapError for anything that cannot be measured as asked; a subject that fails while it is measured is a
    row that says so. A KeyboardInterrupt after the first group is finished gives the record so far ("stopped").
    """
    from .datasets import open_dataset
    from .datasets.checks import require_decodable

    profile = get_profile(device)
    if host:
        if profile.kind != "ssh":
            raise UsageError(f"--host names a device that is reached over ssh, and {profile.name} is not: add --device")
        profile = replace(profile, host=host)
    limited = parse_size(memory_limit) if memory_limit else None
    require_reachable(profile)
    how: dict[str, Any] = {"options": browser} if browser else {}
    if how and profile.kind != "browser":
        raise UsageError(f"{device} is no browser: --wait, --http, --webgpu, --open and --native are for those")
    subjects, origin = choose(bundles, peers, beams=beams, runs=runs)
    if checkpoints and not all_peers:
        raise UsageError("--checkpoint says where --peers finds a bundle's weights: add --peers")
    if all_peers and profile.kind != "local":
        raise UsageError(f"--peers puts them beside bundles on this machine; {profile.name} is another one")
    spec = data or (origin and origin.spec)
    if not spec:
        raise UsageError(f"{subjects[0].path} does not say what data it was trained on: name some with --data")
    try:
        dataset = open_dataset(spec, skip_bad=skip_bad or (origin is not None and origin.skip_bad))
    except UsageError as error:
        if data:
            raise
        # Lineage names the kind of data, never a folder of whoever trained.
        where = subjects[0].path
        raise UsageError(f"{where} was trained on {spec}; name the data with --data ({error.message})") from None
    settings = settings or Settings()
    with (
        tempfile.TemporaryDirectory(prefix="edgecap-bench-") as folder,
        reach(profile, memory_limit=limited, **how) as reached,
    ):
        if settings.slow_photos and not reached.timed:
            raise UsageError(f"--slow-limit goes by times, and {profile.name}'s mean nothing: use --limit")
        subjects, progress = reached.subjects(subjects), reached.watching(progress)
        photos: list[Photo] = []
        limit = limit or reached.photos
        total = min(len(dataset.splits.get(split, ())), limit or 10**9)
        for photo in split_photos(dataset, split, limit, Path(folder)):
            photos.append(photo)
            progress("photos", len(photos), total)
        # Now, and not as a failed row after all else was measured.
        require_decodable(dataset.splits[split][: len(photos)], spec)
        if pictures is not None:
            pictures |= {photo.id: thumbnail(photo) for photo in photos}
        if all_peers:
            mine = [subject for subject in subjects if subject.kind == "bundle" and not subject.fused]
            places = {"checkpoints": checkpoints, "runs": runs}
            others = prepare_peers(mine, **places, threads=settings.threads, progress=progress)
            subjects = unique_names([*subjects, *others])
            order = dict(zip((subject.name for subject in subjects), groups(subjects), strict=True))
            subjects.sort(key=lambda subject: order[subject.name])
        reached.prepare(subjects, photos, progress)
        about = {
            "spec": dataset.spec,
            "fingerprint": dataset.fingerprint,
            "split": split,
            "photos": len(photos),
        }
        record = measure(reached, subjects, photos, settings, about, progress)
        with noting(record["problems"], "the device was not told"):
            reached.done(record)
    return record


def measure(
    device: Device,
    subjects: Sequence[Subject],
    photos: Sequence[Photo],
    settings: Settings,
    data: Mapping[str, Any],
    progress: Progress = silent,
) -> dict[str, Any]:
    """The record of subjects on a device that is prepared for them: its limits before and after all rounds, what the
    device has to show besides, and how near each row comes to the limits. data: what the record says of the photos.
    """
    facts = device.facts(settings.threads)
    clock, hot = device.clock(settings.threads), None
    before = own_limits(device, settings, progress, 1)
    measured = run(subjects, photos, settings, progress, device)
    both, after = before, None
    problems: list[str] = []
    try:
        with noting(problems, "the clock's reading"):
            hot = device.clock(settings.threads)
        if not measured["stopped"]:
            with noting(problems, "the limits after the rounds"):
                after = own_limits(device, settings, progress, 2)
                both = larger(before, after) if before and after else before or after
            with noting(problems, "the check against this machine"):
                checked = device.check(subjects, photos, settings.threads, settings.timeout, progress)
                for row in measured["rows"]:
                    if row["name"] in checked:
                        row["against_native"] = checked[row["name"]]
            if both:
                with noting(problems, "how near the rows come to the limits"):
                    add_roofline(subjects, measured["rows"], both, photos[0].path, stage_times, settings.timeout)
            if device.profile.kind == "local":
                with noting(problems, "where the time goes, by operator"):
                    add_operators(subjects, measured["rows"], photos[0].path, settings)
    except KeyboardInterrupt:  # the rows are kept
        measured["stopped"] = INTERRUPTED
    given = settings.to_dict()
    facts = facts | {"clock": clock_record(clock, hot, before, after)}
    measured["problems"] = problems
    return build(profile=device.profile, settings=given, data=data, measured=measured, facts=facts, limits=both)


def clock_record(
    first: Mapping[str, Any] | None,
    last: Mapping[str, Any] | None,
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
) -> dict[str, Any]:
    """Readings of the clock before and after the rounds, None where there is none, and the signs that it fell (also by
    the limits' own)."""
    signs = [*(fell(first, last) if first and last else ()), *slowed(before, after)]
    return {"before": first, "after": last, "fell": signs}


def stage_times(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """A row's medians (s) of the encoder and of a further token; None for a part that is not timed."""
    encode, token = ((row["latency"] or {}).get(stage) for stage in ("encode", "next_token"))
    return encode and encode["p50"], token and token["p50"]


def own_limits(device: Device, settings: Settings, progress: Progress, turn: int) -> dict[str, float | None] | None:
    """What the device can do at most; None where the settings leave that out."""
    if not settings.limit_seconds or not device.timed:
        return None
    found = limits(settings.threads, seconds=settings.limit_seconds, start=device.limits)
    progress("limits", turn, 2)
    return found if any(value is not None for value in found.values()) else None

"""A soak: thousands of captions from several threads, every answer compared with the one a single thread gave.

`python -m edgecap.benchmarks.soak BUNDLE --captions 10000 --threads 4`. It fails on a wrong or swapped caption, on a
broken photo that gives anything but its one clear line, and on memory that grows.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw

from ..runtime import Caption, Captioner, EdgecapError, UsageError

PHOTOS = 32
BROKEN_SHARE = 10  # one job in so many has a broken photo
BLOCKS = 20  # of whose mean memory the slope is drawn
T_95 = 2.101  # Student's t, two-sided, for BLOCKS - 2 degrees of freedom
MAX_GROWTH = 64.0  # KB per 1,000 captions: 64 bytes a caption

Photo = bytes | Path
Answer = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """What one thread asks at once. kind: greedy, beam, stream, batch or left, a stream that nobody asks on."""

    kind: str
    photos: tuple[Photo, ...]

    @property
    def captions(self) -> int:
        return 0 if self.kind == "left" else len(self.photos)


@dataclass
class Soaked:
    """What a soak found. wrong: answers that were another than the single thread's; unclear: errors that were none of
    ours, one line each. distinct: answers of the single thread that no other job has, by tokens and log-probability, of
    jobs: two of these cannot be swapped unseen. slope: KB per 1,000 captions after the warm-up, interval: 95% of it;
    None where too few captions were made to tell.
    """

    bundle: str
    backend: str
    threads: int
    seconds: float = 0.0
    captions: int = 0
    refused: int = 0
    wrong: int = 0
    unclear: tuple[str, ...] = ()
    jobs: int = 0
    distinct: int = 0
    warm_up: int = 0
    rss_mb: tuple[float, ...] = ()  # of each block, after the warm-up
    slope: float | None = None
    interval: tuple[float, float] | None = None

    def problems(self, max_growth: float) -> list[str]:
        """What must not be, one line each."""
        found = list(self.unclear[:5])
        if self.wrong:
            found.append(f"{self.wrong} answers differ from the single thread's")
        if self.slope is None or self.interval is None:
            found.append("too few captions to tell whether memory grows")
        elif self.interval[1] > max_growth:
            found.append(
                f"memory grows by {self.slope:.1f} KB per 1,000 captions, {self.interval[1]:.1f} at the interval's "
                f"upper end: more than {max_growth:g}"
            )
        return found


def rss() -> int:
    """Bytes of memory that this process holds now. Raises UsageError where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        raise UsageError("a soak reads its memory from /proc, which only Linux has") from None


def draw_photos(count: int = PHOTOS, seed: int = 0) -> list[bytes]:
    """Pictures of shapes on shaded ground, as JPEG and PNG files, all different."""
    draw = random.Random(seed)
    files = []
    for number in range(count):
        width, height = draw.randrange(96, 640), draw.randrange(96, 480)
        corners = np.array([[draw.randrange(256) for _ in range(3)] for _ in range(4)], np.uint8).reshape(2, 2, 3)
        image = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
        brush = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, side = draw.randrange(width), draw.randrange(height), draw.randrange(10, 160)
            shape = draw.choice((brush.ellipse, brush.rectangle))
            shape((x, y, x + side, y + draw.randrange(10, 160)), fill=tuple(draw.randrange(256) for _ in range(3)))
        file = io.BytesIO()
        image.save(file, "PNG" if number % 4 == 0 else "JPEG")
        files.append(file.getvalue())
    return files


def break_photos(whole: bytes) -> list[Photo]:
    """What users also have: half a file, an empty one, text, one that is not there, a header without a picture."""
    return [whole[: len(whole) // 2], b"", b"not a photo", Path("no such photo.jpg"), whole[:40]]


def make_jobs(photos: Sequence[Photo], broken: Sequence[Photo]) -> tuple[list[Job], list[Job]]:
    """Jobs that are answered, and jobs that are refused."""
    good = [Job(kind, (photo,)) for photo in photos for kind in ("greedy", "beam", "stream", "left")]
    good += [Job("batch", (photos[i - 2], photos[i - 1], photos[i])) for i in range(len(photos))]
    bad = [Job(kind, (photo,)) for photo in broken for kind in ("greedy", "stream")]
    return good, bad + [Job("batch", (photos[0], photo)) for photo in broken]


def answer(captioner: Captioner, job: Job) -> Answer:
    """What a job gives, to be compared: tokens, log-probability and text of each caption, or an error's line."""

    def told(caption: Caption) -> Answer:
        return (caption.token_ids, caption.logprob, caption.text, *map(told, caption.alternatives))

    try:
        if job.kind == "batch":
            return tuple(map(told, captioner(list(job.photos))))
        if job.kind in ("stream", "left"):
            stream = captioner.stream(job.photos[0], beam=1)
            if job.kind == "left":
                return ("left", next(stream, None))  # none of an empty caption
            return ("".join(stream), told(stream.caption))
        return told(captioner(job.photos[0], beam=3 if job.kind == "beam" else 1))
    except EdgecapError as error:
        return ("refused", error.message)


def soak(
    captioner: Captioner,
    photos: Sequence[Photo],
    broken: Sequence[Photo],
    *,
    captions: int,
    threads: int,
    warm_up: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Soaked:
    """Caption until `captions` more than the `warm_up` are made. Jobs come in an order drawn at random, the same each
    time, so that every thread has all kinds of them at once."""
    good, bad = make_jobs(photos, broken)
    expected = {job: answer(captioner, job) for job in good + bad}
    wrong_kind = [job for job in good if expected[job][0] == "refused"] + [
        job for job in bad if expected[job][0] != "refused"
    ]
    if wrong_kind:
        raise UsageError(f"the soak's own photos are not as they should be: {expected[wrong_kind[0]]}"[:300])
    answers = [expected[job] for job in good if job.kind not in ("left", "stream")]
    found = Soaked(str(captioner.bundle.path), captioner.bundle.manifest["backend"], threads, warm_up=warm_up)
    found.jobs, found.distinct = len(answers), sum(count == 1 for count in Counter(answers).values())

    draw, lock, total = random.Random(1), threading.Lock(), warm_up + captions
    samples: list[tuple[int, int]] = []  # captions done after the warm-up, bytes
    every = max(1, captions // (BLOCKS * 10))
    begun = done = 0
    unclear: list[str] = []

    def ask(job: Job) -> bool:
        """Whether an answer came that can be compared; a wrong one is counted."""
        try:
            same = answer(captioner, job) == expected[job]
        except Exception as error:  # what must not come
            with lock:
                unclear.append(f"{job.kind}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return False
        with lock:
            found.wrong += not same
        return True

    together = threading.Barrier(threads)

    def work() -> None:
        nonlocal begun, done
        # The most memory is held when all threads are in the largest job at once. Left to chance, that comes late, and
        # looks like growth.
        for job in good:
            if job.kind == "batch":
                together.wait()
                ask(job)
        while True:
            with lock:
                if begun >= total or len(unclear) >= 20:
                    return
                refused = draw.randrange(BROKEN_SHARE) == 0
                job = draw.choice(bad if refused else good)
                begun += 0 if refused else job.captions
            if not ask(job):
                continue
            with lock:
                before = done
                done += 0 if refused else job.captions
                found.refused += refused
                if done > warm_up and (before <= warm_up or done // every > before // every):
                    samples.append((done - warm_up, rss()))
                    progress(done)

    start = time.monotonic()
    crowd = [threading.Thread(target=work) for _ in range(threads)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()
    found.seconds = round(time.monotonic() - start, 1)
    found.captions, found.unclear = done, tuple(unclear)
    if len(samples) >= BLOCKS:
        found.rss_mb = tuple(round(float(block.mean(axis=0)[1]) / 1e6, 3) for block in np.array_split(samples, BLOCKS))
        found.slope, found.interval = slope(samples)
    return found


def slope(samples: Sequence[tuple[int, int]]) -> tuple[float, tuple[float, float]]:
    """(captions, bytes) in order → KB per 1,000 captions and its 95% interval.

    Least squares through the means of BLOCKS blocks: samples that follow each other are not independent, and an
    interval drawn from all of them would be far too narrow.
    """
    blocks = np.array_split(np.asarray(samples, np.float64), BLOCKS)
    x, y = np.array([block.mean(axis=0) for block in blocks]).T
    x, y = x / 1000, y / 1000
    spread = ((x - x.mean()) ** 2).sum()
    rise = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    rest = y - y.mean() - rise * (x - x.mean())
    half = T_95 * float(np.sqrt((rest**2).sum() / (BLOCKS - 2) / spread))
    return round(rise, 2), (round(rise - half, 2), round(rise + half, 2))


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--captions", type=click.IntRange(1), default=10_000, show_default=True, help="After the warm-up.")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="That ask at once.")
@click.option("--engine-threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Of each operator.")
@click.option("--warm-up", type=click.IntRange(0), help="Captions before memory counts.  [default: half as many]")
@click.option("--photos", type=click.Path(exists=True, file_okay=False, path_type=Path), help="JPEG files of a folder.")
@click.option("--max-growth", type=float, default=MAX_GROWTH, show_default=True, help="KB per 1,000 captions.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def main(
    bundle: str,
    captions: int,
    threads: int,
    engine_threads: int,
    warm_up: int | None,
    photos: Path | None,
    max_growth: float,
    as_json: bool,
) -> None:
    """Caption drawn photos (or those of --photos) from several threads at once, some of them broken.

    Exit code 1 when an answer is not the single thread's, a broken photo gives anything but its one line, or memory
    grows: when the 95% interval of its slope ends above --max-growth.

    \b
    Examples:
      python -m edgecap.benchmarks.soak runs/a-int8.edgecap
      python -m edgecap.benchmarks.soak runs/a-int8.edgecap --captions 100000 --json
    """
    files: list[Photo] = list(sorted(photos.glob("*.jp*g"))[:PHOTOS]) if photos else list(draw_photos())
    if len(files) < 3:
        raise click.ClickException(f"{photos} has fewer than 3 JPEG files")
    whole = files[1].read_bytes() if isinstance(files[1], Path) else files[1]

    def show(done: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{done:,} captions, {rss() / 1e6:.1f} MB", nl=False, err=True)

    warm = max(captions // 2, 1) if warm_up is None else warm_up
    try:
        rss()  # refused before anything is loaded
        with Captioner.load(bundle, threads=engine_threads) as captioner:
            broken = break_photos(whole)
            found = soak(captioner, files, broken, captions=captions, threads=threads, warm_up=warm, progress=show)
    except EdgecapError as error:
        click.echo(f"Error: {error.message}", err=True)
        sys.exit(error.exit_code)
    problems = found.problems(max_growth)
    if as_json:
        click.echo(json.dumps({**asdict(found), "problems": problems}, ensure_ascii=False))
    else:
        click.echo(f"\r{found.captions:,} captions from {threads} threads ({found.backend}), {found.refused:,} refused")
        click.echo(f"wrong    {found.wrong}; {found.distinct} of {found.jobs} answers are like no other")
        if found.rss_mb:
            click.echo(f"memory   {found.rss_mb[0]} MB after {warm:,} captions, {found.rss_mb[-1]} MB at the end")
        if found.slope is not None and found.interval is not None:
            low, high = found.interval
            click.echo(f"slope    {found.slope:+.2f} KB per 1,000 captions, 95% interval [{low:+.2f}, {high:+.2f}]")
        for problem in problems:
            click.echo(f"Error: {problem}", err=True)
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`edgecap caption`, `inspect` and `verify`. Not part of `import edgecap.runtime`: apps need no command line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import click

from .errors import EdgecapError

T = TypeVar("T")


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--beam", type=click.IntRange(1, 64), help="Beam size; 1 is greedy.  [default: the bundle's]")
@click.option("--prompt", help="Text that the caption continues.")
@click.option("--max-tokens", type=click.IntRange(1, 4096), help="Longest caption.  [default: the bundle's]")
@click.option(
    "--deadline-ms",
    type=click.FloatRange(1),
    metavar="MS",
    help="Say the best that is there after so many milliseconds.",
)
@click.option(
    "--image-size", type=click.IntRange(1, 4096), metavar="PX", help="SmolVLM: pixels a side of what it sees."
)
@click.option("--tiles/--no-tiles", default=None, help="SmolVLM: look at a photo in tiles, or as a whole only.")
@click.option(
    "--batch", type=click.IntRange(1, 1024), help="Photos captioned together.  [default: 8; 1 with --deadline-ms]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per photo, one per line.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: its own choice]")
def caption(
    bundle: str,
    photos: tuple[str, ...],
    beam: int | None,
    prompt: str | None,
    max_tokens: int | None,
    deadline_ms: float | None,
    image_size: int | None,
    tiles: bool | None,
    batch: int | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Caption photos with a bundle.

    PHOTO is a file, a folder (searched recursively), an http(s) address, or - for a stream of paths on
    standard input, captioned as they come. A photo that cannot be read is told on standard error, the rest
    still get their captions, and the exit code is 1. Of a folder, standard error says how many photos a second.

    \b
    Examples:
      edgecap caption runs/x.edgecap photo.jpg
      edgecap caption runs/x.edgecap photos/ https://example.org/cat.jpg --beam 3 --json
      find / -name '*.jpg' | edgecap caption runs/x.edgecap -
      edgecap caption smolvlm.edgecap photo.jpg --image-size 256 --deadline-ms 800
    """
    import warnings

    from .captioner import BATCH, Captioner
    from .sources import caption_sources, find_photos

    warnings.simplefilter("ignore")  # Pillow's, about odd files: whether a photo can be read is told below

    folders = any(os.path.isdir(photo) for photo in photos)
    alone = len(photos) == 1 and photos[0] != "-" and not folders
    failed: list[str] = []
    with Captioner.load(bundle, threads=threads) as captioner:
        sources = find_photos(photos, sys.stdin.buffer)
        results = caption_sources(
            captioner,
            sources,
            batch=batch or (1 if deadline_ms else BATCH),
            beam=beam,
            prompt=prompt,
            max_length=max_tokens,
            deadline_ms=deadline_ms,
            image_size=image_size,
            tiles=tiles,
        )
        began, count = time.monotonic(), 0
        for source, result in _with_progress(results, show=folders):
            count += not isinstance(result, EdgecapError)
            if isinstance(result, EdgecapError):
                failed.append(result.message)
                click.echo(f"Error: {result.message}", err=True)
                if as_json:
                    click.echo(json.dumps({"source": source.name, "error": result.message}, ensure_ascii=False))
            elif as_json:
                line = {"source": source.name, **result.to_dict()}
                click.echo(json.dumps(line, ensure_ascii=False))
            else:
                text = result.text + (" … (cut by the deadline)" if result.cut else "")
                click.echo(text if alone else f"{source.name}\t{text}")
        if folders:
            click.echo(f"{count} photos, {count / max(time.monotonic() - began, 1e-6):.1f} photos/s", err=True)
    if failed:
        if not alone:
            click.echo(f"{len(failed)} could not be captioned:", err=True)
            for message in failed:
                click.echo(f"  {message}", err=True)
        sys.exit(1)


def _with_progress(results: Iterable[T], *, show: bool) -> Iterator[T]:
    """A counter on standard error, where that is a terminal and the captions themselves go elsewhere."""
    if not (show and sys.stderr.isatty() and not sys.stdout.isatty()):
        yield from results
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed} photos"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("", total=None)
        for result in results:
            yield result
            progress.advance(task)


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def inspect(bundle: str, as_json: bool) -> None:
    """Say what a bundle is: target, sizes, preprocessing, what each pass cost, and what was measured on it.

    \b
    Examples:
      edgecap inspect runs/x.edgecap
      edgecap inspect runs/x.edgecap --json | jq .manifest.measured
    """
    from .bundle import Bundle
    from .describe import describe, print_description

    opened = Bundle.open(bundle)
    if as_json:
        click.echo(json.dumps(describe(opened), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    # In a pipe there is no width to keep to; wide enough that nothing is cut.
    print_description(opened, Console() if sys.stdout.isatty() else Console(width=160))


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: its own choice]")
def verify(bundle: str, as_json: bool, threads: int | None) -> None:
    """Check a bundle on this device: every file's hash, and that its golden photo gives what it must.

    The exit code is 1 if it does not. How near is near enough is written in the bundle: the same tokens for
    fp32, a cosine between logits for lower precisions.

    \b
    Examples:
      edgecap verify runs/x.edgecap
      edgecap verify runs/x.edgecap --json
    """
    from .captioner import Captioner
    from .verify import verify_golden

    with Captioner.load(bundle, threads=threads) as captioner:
        result = verify_golden(captioner)
        count = len(captioner.bundle.manifest["files"])
    if as_json:
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        tokens = "as in the reference" if result.same_tokens else f"differ at position {result.tokens_differ_at}"
        need = "must be the same" if result.needs_same_tokens else "may differ"
        click.echo(f"files    {count} with the sizes and hashes that were exported")
        click.echo(f"golden   {result.caption}")
        click.echo(f"tokens   {tokens} ({need})")
        click.echo(f"cosine   {result.min_cosine:.6f} (at least {result.needs_min_cosine:g})")
        click.echo(f"verified {'yes' if result.ok else 'NO: do not ship this bundle for this device'}")
    if not result.ok:
        sys.exit(1)

"""The command line: each command imports its room when it is called, so `edgecap --help` stays instant."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import click

from . import __version__
from .runtime.errors import EdgecapError

T = TypeVar("T")

# command → (module of its room, name there, line in the list of commands)
ROOMS = {
    "train": ("train.commands", "train", "Train a captioner into a checkpoint folder."),
    "eval": ("train.commands", "evaluate", "Score a checkpoint in torch."),
    "export": ("export.commands", "export", "Turn a checkpoint into a bundle, and measure what that cost."),
}


class Rooms(click.Group):
    """A group whose commands lie in their rooms and are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *ROOMS})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in ROOMS:
            return super().get_command(ctx, name)
        from importlib import import_module

        module, attribute, _ = ROOMS[name]
        return getattr(import_module(f".{module}", __package__), attribute)


@click.group(cls=Rooms, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgecap")
def cli() -> None:
    """Train small image captioners, export them for the device, run them there, and measure every step.

    \b
    The whole chain on built-in data, in an empty folder:
      edgecap train
      edgecap export --target onnx-int8
      edgecap bench --device cpu
    """


# --- commands -------------------------------------------------------------------------------------


@cli.command()
@click.argument("bundle", type=click.Path())
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--beam", type=click.IntRange(1, 64), help="Beam size; 1 is greedy.  [default: the bundle's]")
@click.option("--prompt", help="Text that the caption continues.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per photo, one per line.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: its own choice]"
)
def caption(
    bundle: str,
    photos: tuple[str, ...],
    beam: int | None,
    prompt: str | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Caption photos with a bundle.

    PHOTO is a file, a folder (searched recursively), an http(s) address, or - for a stream of paths on
    standard input, captioned as they come. A photo that cannot be read is told on standard error, the rest
    still get their captions, and the exit code is 1.

    \b
    Examples:
      edgecap caption runs/x.edgecap photo.jpg
      edgecap caption runs/x.edgecap photos/ https://example.org/cat.jpg --beam 3 --json
      find / -name '*.jpg' | edgecap caption runs/x.edgecap -
    """
    import json
    import warnings

    from .runtime.captioner import Captioner
    from .runtime.sources import caption_sources, find_photos

    warnings.simplefilter("ignore")  # Pillow's, about odd files: whether a photo can be read is told below

    alone = len(photos) == 1 and photos[0] != "-" and not os.path.isdir(photos[0])
    failed: list[str] = []
    with Captioner.load(bundle, threads=threads) as captioner:
        sources = find_photos(photos, click.get_binary_stream("stdin"))
        results = caption_sources(captioner, sources, beam=beam, prompt=prompt)
        for source, result in _with_progress(results, show=any(os.path.isdir(photo) for photo in photos)):
            if isinstance(result, EdgecapError):
                failed.append(result.message)
                click.echo(f"Error: {result.message}", err=True)
                if as_json:
                    click.echo(
                        json.dumps({"source": source.name, "error": result.message}, ensure_ascii=False)
                    )
            elif as_json:
                line = {"source": source.name, **result.to_dict()}
                click.echo(json.dumps(line, ensure_ascii=False))
            else:
                click.echo(result.text if alone else f"{source.name}\t{result.text}")
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


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def inspect(bundle: str, as_json: bool) -> None:
    """Say what a bundle is: target, sizes, preprocessing, what each pass cost, and what was measured on it.

    \b
    Examples:
      edgecap inspect runs/x.edgecap
      edgecap inspect runs/x.edgecap --json | jq .manifest.measured
    """
    import json

    from .runtime.bundle import Bundle
    from .runtime.describe import describe, print_description

    opened = Bundle.open(bundle)
    if as_json:
        click.echo(json.dumps(describe(opened), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    # In a pipe there is no width to keep to; wide enough that nothing is cut.
    print_description(opened, Console() if sys.stdout.isatty() else Console(width=160))


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: its own choice]"
)
def verify(bundle: str, as_json: bool, threads: int | None) -> None:
    """Check a bundle on this device: every file's hash, and that its golden photo gives what it must.

    The exit code is 1 if it does not. How near is near enough is written in the bundle: the same tokens for
    fp32, a cosine between logits for lower precisions.

    \b
    Examples:
      edgecap verify runs/x.edgecap
      edgecap verify runs/x.edgecap --json
    """
    import json

    from .runtime.captioner import Captioner
    from .runtime.verify import verify_golden

    with Captioner.load(bundle, threads=threads) as captioner:
        result = verify_golden(captioner)
        count = len(captioner.bundle.manifest["files"])
    if as_json:
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        tokens = (
            "as in the reference" if result.same_tokens else f"differ at position {result.tokens_differ_at}"
        )
        need = "must be the same" if result.needs_same_tokens else "may differ"
        click.echo(f"files    {count} with the sizes and hashes that were exported")
        click.echo(f"golden   {result.caption}")
        click.echo(f"tokens   {tokens} ({need})")
        click.echo(f"cosine   {result.min_cosine:.6f} (at least {result.needs_min_cosine:g})")
        click.echo(f"verified {'yes' if result.ok else 'NO: do not ship this bundle for this device'}")
    if not result.ok:
        sys.exit(1)


@cli.command()
@click.argument("spec", default="scenes")
@click.option("--skip-bad", is_flag=True, help="Leave bad examples out (and list them) instead of failing.")
@click.option("--verify", is_flag=True, help="Decode every photo now.")
@click.option(
    "--sample", type=click.IntRange(1), metavar="N", help="Write N photos of each split to look at."
)
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="Where --sample writes.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def data(
    spec: str, skip_bad: bool, verify: bool, sample: int | None, out: Path | None, as_json: bool
) -> None:
    """Check a data set and say what is in it.

    SPEC is scenes[:train=N,val=N,test=N,size=PX,seed=N], flickr8k:DIR, folder:DIR (captions.csv or
    captions.jsonl) or coco:DIR.

    \b
    Examples:
      edgecap data scenes
      edgecap data scenes:size=96 --sample 8 -o look
      edgecap data folder:photos --verify
      edgecap data flickr8k:flickr8k --skip-bad --json
    """
    from .benchmarks.datasets import open_dataset
    from .benchmarks.datasets.summary import summarize, write_sample

    if (sample is None) != (out is None):
        raise click.UsageError("--sample N and -o DIR go together")
    dataset = open_dataset(spec, skip_bad=skip_bad, verify=verify or skip_bad)
    summary = summarize(dataset)
    if sample is not None and out is not None:
        paths = write_sample(dataset, sample, out)
        click.echo(f"{len(paths)} photos and captions.jsonl written to {out}", err=True)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("split", title=spec)
    for column in ("photos", "captions", "words", "mean length", "new words"):
        table.add_column(column, justify="right")
    for split, row in summary["splits"].items():
        new = f"{row['new_words']:.2%}" if "new_words" in row else ""
        figures = (row["photos"], row["captions"], row["words"], row["mean_length"], new)
        table.add_row(split, *map(str, figures))
    console = Console()
    console.print(table)
    console.print(f"fingerprint {dataset.fingerprint[:16]}", highlight=False)
    for id, reason in dataset.skipped:
        console.print(f"skipped {id}: {reason}", highlight=False, markup=False)


@cli.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path), metavar="[BUNDLE]...")
@click.option("--device", default="cpu", show_default=True, help="Where to measure; see edgecap devices.")
@click.option("--data", metavar="SPEC", help="Photos and captions; default: what the bundle was trained on.")
@click.option("--split", default="test", show_default=True, help="The split to caption.")
@click.option("--limit", type=click.IntRange(1), help="Caption only the first N photos of the split.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Of each subject."
)
@click.option("--beam", type=click.IntRange(1, 64), help="Replace the bundles' own; 1 is greedy.")
@click.option(
    "--rounds", type=click.IntRange(10), default=20, show_default=True, help="Interleaved rounds, A B A B …"
)
@click.option(
    "--peer", "peers", multiple=True, metavar="KIND:PATH", help="Measure this too: torch:CHECKPOINT."
)
@click.option("--json", "json_file", metavar="FILE", help="Write the whole record here; - is stdout.")
@click.option(
    "--history", type=click.Path(path_type=Path), help="Add the record to this file, one line each."
)
def bench(
    bundles: tuple[Path, ...],
    device: str,
    data: str | None,
    split: str,
    limit: int | None,
    threads: int,
    beam: int | None,
    rounds: int,
    peers: tuple[str, ...],
    json_file: str | None,
    history: Path | None,
) -> None:
    """Measure bundles: time per stage, memory, cold start, size, and what the captions are worth.

    Without BUNDLE, the newest one under runs/. Every bundle and peer runs in a process of its own, their
    rounds interleaved. Exit code 1 when a bundle could not be measured.

    \b
    Examples:
      edgecap bench --device cpu
      edgecap bench runs/a-fp32.edgecap runs/a-int8.edgecap --json bench.json
      edgecap bench runs/a-int8.edgecap --data flickr8k:DIR --beam 3 --peer torch:runs/a
    """
    from .benchmarks import record as records
    from .benchmarks.bench import bench as run_bench
    from .benchmarks.progress import PhaseBars
    from .benchmarks.report import show
    from .benchmarks.suite import Settings

    files = [history] if history else []
    if json_file and json_file != "-":
        files.append(Path(json_file))
    for file in files:
        records.check_writable(file)
    with PhaseBars() as bars:
        record = run_bench(
            bundles,
            device=device,
            data=data,
            split=split,
            limit=limit,
            beam=beam,
            peers=peers,
            settings=Settings(threads=threads, rounds=rounds),
            progress=bars,
        )
    if history:
        records.append(record, history)
    if json_file == "-":
        click.echo(records.dumps(record))
    else:
        if json_file:
            records.write(record, Path(json_file))
        show(record)
    if any(row["status"] != "ok" for row in record["rows"] if row["kind"] == "bundle"):
        sys.exit(1)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the profiles as JSON.")
def devices(as_json: bool) -> None:
    """List the devices that edgecap knows, and which of them can be measured from here.

    \b
    Examples:
      edgecap devices
      edgecap devices --json
    """
    from .devices import cpu_facts, profiles

    facts = cpu_facts()
    if as_json:
        import json

        listed = [p.to_dict() | {"reachable": p.reachable} for p in profiles().values()]
        click.echo(json.dumps({"devices": listed, "this_machine": facts.to_dict()}, indent=1))
        return
    from .devices.listing import show

    show(profiles().values(), facts)


@cli.command()
@click.option("--results", required=True, type=click.Path(), help='Captions: [{"image_id": 1, "caption": "..."}, ...].')
@click.option("--references", required=True, type=click.Path(), help="COCO annotations, or {id: [caption, ...]}.")
@click.option("--meteor", is_flag=True, help="METEOR too (needs Java and the extra `metrics`).")
@click.option("--spice", is_flag=True, help="SPICE too (needs Java, the extra `metrics`, and a download of its own).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def score(results: str, references: str, meteor: bool, spice: bool, as_json: bool) -> None:
    """Compute the caption metrics of any system, as the COCO caption evaluation does.

    Every photo with references needs one caption. CIDEr comes with a 95% bootstrap interval over photos. Equal to
    pycocoevalcap's CIDEr, BLEU and ROUGE-L, without Java.

    \b
    Examples:
      edgecap score --results captions.json --references captions_val2014.json
      edgecap score --results captions.json --references references.json --meteor --json
    """
    import json

    from .benchmarks.metrics import caption_metrics
    from .benchmarks.metrics.coco import read_references, read_results
    from .benchmarks.metrics.external import java_metric, require_java

    extras = [name for name, wanted in (("meteor", meteor), ("spice", spice)) if wanted]
    for name in extras:
        require_java(name)
    captions, wanted = read_results(results), read_references(references)
    figures = caption_metrics(captions, wanted).to_dict()
    figures |= {name: java_metric(name, captions, wanted) for name in extras}
    if as_json:
        click.echo(json.dumps(figures))
        return
    from .benchmarks.metrics.table import show

    show(figures)


def main() -> None:
    """Run the command line; an EdgecapError is one line on stderr and its exit code."""
    try:
        cli.main(prog_name="edgecap", standalone_mode=True)
    except EdgecapError as error:
        click.echo(f"Error: {error.message}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`edgecap data`, `bench` and `score`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..runtime.errors import UsageError


@click.command()
@click.argument("spec", default="scenes")
@click.option("--skip-bad", is_flag=True, help="Leave bad examples out (and list them) instead of failing.")
@click.option("--verify", is_flag=True, help="Decode every photo now.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Write N photos of each split to look at.")
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="Where --sample writes.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def data(spec: str, skip_bad: bool, verify: bool, sample: int | None, out: Path | None, as_json: bool) -> None:
    """Check a data set and say what is in it.

    SPEC is scenes[:train=N,val=N,test=N,size=PX,seed=N,style=plain|telegram], flickr8k:DIR, flickr30k:DIR,
    folder:DIR (captions.csv or captions.jsonl), coco:DIR, fashion:DIR, hf:ID[:SPLIT] or openimages:[DIR].
    Options of the last three stand behind a question mark: fashion:DIR?caption=columns.

    \b
    Examples:
      edgecap data scenes
      edgecap data scenes:size=96 --sample 8 -o look
      edgecap data folder:photos --verify
      edgecap data flickr8k:flickr8k --skip-bad --json
    """
    from .datasets import open_dataset
    from .datasets.summary import summarize, write_sample

    if (sample is None) != (out is None):
        raise click.UsageError("--sample N and -o DIR go together")
    dataset = open_dataset(spec, skip_bad=skip_bad, verify=verify or skip_bad, photos_alone=True)
    summary = summarize(dataset)
    if sample is not None and out is not None:
        paths = write_sample(dataset, sample, out)
        what = "photos and captions.jsonl" if dataset.captioned else "photos"
        click.echo(f"{len(paths)} {what} written to {out}", err=True)
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
    for note in dataset.notes:
        console.print(note, highlight=False, markup=False)
    for id, reason in dataset.skipped:
        console.print(f"skipped {id}: {reason}", highlight=False, markup=False)


class Percent(click.ParamType):
    """5% → 0.05"""

    name = "PERCENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            number = float(value.removesuffix("%"))
        except ValueError:
            number = -1.0
        if not value.endswith("%") or not 0 <= number < 1000:
            self.fail(f"{value!r} is not a percentage such as 5%", param, ctx)
        return number / 100


def given_besides(*names: str) -> list[str]:
    """What stands on the command line, but for the parameters of these names, as it is written there."""
    context = click.get_current_context()
    found = []
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE and parameter.name not in names:
            found.append(parameter.opts[0] if isinstance(parameter, click.Option) else parameter.name.upper())
    return found


def compare_records(before: Path, after: Path, slower: float | None, force: bool, json_file: str | None) -> None:
    """`edgecap bench --compare`: what the second record changed. Exit code 1 where a bundle became too slow."""
    from . import changes
    from . import record as records
    from .compare import compare

    found = compare(records.read(before), records.read(after), limit=slower or 0.0, force=force)
    if json_file == "-":
        click.echo(records.dumps(found))
    else:
        if json_file:
            records.write(found, Path(json_file))
        changes.show(found)
    if slower is not None and found["failed"]:
        sys.exit(1)


def show_record(path: Path, report: Path | None, markdown: str | None) -> None:
    """`edgecap bench --show`: a record's tables again, or what it is to be written as."""
    from . import record as records
    from .report import show
    from .report_html import html, require_jinja
    from .wording import write_text

    if report:
        require_jinja()
    record = records.read(path)
    try:
        if report:
            write_text(html(record), report, "report")
        if markdown:
            put_markdown(record, markdown)
        if not report and not markdown:
            show(record)
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # read() saw to what comparing needs alone
        raise UsageError(f"{path} is not a whole record: {type(error).__name__} {error}") from None


def put_markdown(record: Mapping[str, Any], file: str) -> None:
    """The small table of a record to a file, or to stdout."""
    from .report_markdown import markdown
    from .wording import write_text

    if file == "-":
        click.echo(markdown(record), nl=False)
    else:
        write_text(markdown(record), Path(file), "table")


SECTIONS = {  # of the bench's help: the parameters' names
    "Where": ("device", "host", "memory_limit", "threads"),
    "What": ("data", "skip_bad", "split", "limit", "slow_limit", "beams", "rounds", "timeout"),
    "Peers": ("peers", "all_peers", "checkpoints"),
    "Browser": ("wait", "program", "http", "webgpu", "native"),
    "Output": ("json_file", "history", "report", "embed_photos", "markdown"),
    "Records": ("shown", "compare", "slower", "force"),
}


class InSections(click.Command):
    """A command whose help has its options by section; those of none come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        lines = {each.name: line for each in options if (line := each.get_help_record(ctx))}
        named = [(title, [lines.pop(name) for name in names if name in lines]) for title, names in SECTIONS.items()]
        for title, found in [*named, ("Other", list(lines.values()))]:
            with formatter.section(title):
                formatter.write_dl(found)


@click.command(cls=InSections)
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path), metavar="[BUNDLE]...")
@click.option("--device", default="cpu", show_default=True, help="Where to measure; see edgecap devices.")
@click.option("--host", metavar="USER@ADDRESS", help="Of a device that is reached over ssh (--device raspberry-pi-5).")
@click.option(
    "--memory-limit", metavar="SIZE", help="Here or over ssh, of each worker: one that holds more is ended; 512M."
)
@click.option("--data", metavar="SPEC", help="Photos and captions; default: what the bundle was trained on.")
@click.option("--skip-bad", is_flag=True, help="Leave bad examples out; always so where the bundle's recipe did.")
@click.option("--split", default="test", show_default=True, help="The split to caption.")
@click.option("--limit", type=click.IntRange(1), help="Caption only the first N photos of the split.")
@click.option(
    "--slow-limit",
    type=click.IntRange(1),
    metavar="N",
    help="In a group whose median row takes over half a second for a caption, caption only N photos.",
)
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Of each subject.")
@click.option(
    "--beam", "beams", multiple=True, type=click.IntRange(1, 64), help="Replace the bundles' own; may be given twice."
)
@click.option("--rounds", type=click.IntRange(10), default=20, show_default=True, help="Interleaved rounds, A B A B …")
@click.option(
    "--timeout",
    type=click.FloatRange(1, 7 * 24 * 3600),
    metavar="SECONDS",
    default=300.0,
    help="Give up what does not load, or not caption a photo, in this time; 300.",
)
@click.option("--peer", "peers", multiple=True, metavar="KIND:PATH", help="Measure this peer, too: torch:CHECKPOINT.")
@click.option("--peers", "all_peers", is_flag=True, help="Put every kind of peer beside each bundle.")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --peers: the weights of a bundle, where they lie neither under runs/ nor beside it.",
)
@click.option(
    "--wait", type=click.FloatRange(1), metavar="SECONDS", help="Until a browser must have opened the page; 600."
)
@click.option("--open", "program", metavar="CHROMIUM", help="A browser here that opens the page, without a window.")
@click.option("--http", is_flag=True, help="Serve browsers without a certificate: 1 thread, no WebGPU.")
@click.option("--webgpu", is_flag=True, help="Browsers compute with WebGPU instead of WebAssembly.")
@click.option("--native", is_flag=True, help="Beside a browser, measure each bundle on this machine, too.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the record (or what --compare found) here; - is stdout."
)
@click.option("--history", type=click.Path(path_type=Path), help="Add the record here; tell what it changed.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write all of it as one HTML file.")
@click.option("--embed-photos", is_flag=True, help="With --report: put the photos into it, small.")
@click.option("--markdown", metavar="FILE", help="Write a small table in Markdown, for a README; - is stdout.")
@click.option(
    "--show", "shown", type=click.Path(path_type=Path), metavar="A.json", help="Measure nothing: show a record again."
)
@click.option(
    "--compare", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json", help="Measure nothing: B over A."
)
@click.option("--fail-if-slower", "slower", type=Percent(), help="With --compare: exit code 1 if a bundle became so.")
@click.option("--force", is_flag=True, help="With --compare: also records of different devices, threads or data.")
def bench(
    bundles: tuple[Path, ...],
    device: str,
    host: str | None,
    memory_limit: str | None,
    data: str | None,
    skip_bad: bool,
    split: str,
    limit: int | None,
    slow_limit: int | None,
    threads: int,
    beams: tuple[int, ...],
    rounds: int,
    timeout: float,
    peers: tuple[str, ...],
    all_peers: bool,
    checkpoints: tuple[Path, ...],
    wait: float | None,
    program: str | None,
    http: bool,
    webgpu: bool,
    native: bool,
    json_file: str | None,
    history: Path | None,
    report: Path | None,
    embed_photos: bool,
    markdown: str | None,
    shown: Path | None,
    compare: tuple[Path, Path] | None,
    slower: float | None,
    force: bool,
) -> None:
    """Measure bundles: time per stage, memory, cold start, size, and what the captions are worth.

    Without BUNDLE, the newest one under runs/. Every bundle and peer runs in a process of its own, their
    rounds interleaved; with --peers a bundle and its peers, then the next. Exit code 1 when a bundle could not
    be measured, or something failed afterwards; 130 after Ctrl-C: with --peers, the bundles that were
    finished with their peers are kept, without it nothing is.

    \b
    Examples:
      edgecap bench --device cpu
      edgecap bench runs/a-fp32.edgecap runs/a-int8.edgecap --json bench.json
      edgecap bench runs/a-int8.edgecap --data flickr8k:DIR --beam 3 --peer torch:runs/a
      edgecap bench runs/a-int8.edgecap smolvlm-int8.edgecap --peers --checkpoint SmolVLM-256M-Instruct
      edgecap bench runs/a-fp32.edgecap --device android-mid --limit 20
      edgecap bench runs/a-fp32.edgecap --device browser --open chromium --native
      edgecap bench runs/*.edgecap --report bench.html --history runs/bench.jsonl
      edgecap bench --show bench.json --markdown - --report bench.html
      edgecap bench --compare before.json after.json --fail-if-slower 5%
    """
    if compare:
        if others := given_besides("compare", "slower", "force", "json_file"):
            raise click.UsageError(f"--compare takes two records and measures nothing: leave out {', '.join(others)}")
        compare_records(*compare, slower, force, json_file)
        return
    if force or slower is not None:
        raise click.UsageError("--fail-if-slower and --force go with --compare")
    if shown:
        if others := given_besides("shown", "report", "markdown"):
            raise click.UsageError(f"--show takes a record and measures nothing: leave out {', '.join(others)}")
        show_record(shown, report, markdown)
        return
    from ..runtime.progress import PhaseBars
    from . import record as records
    from .bench import bench as run_bench
    from .changes import show_since
    from .compare import since_last, why_none
    from .report import show
    from .report_html import html, require_jinja
    from .suite import Settings
    from .wording import write_text

    if embed_photos and not report:
        raise click.UsageError("--embed-photos goes with --report")
    if report:
        require_jinja()
    pictures: dict[str, str] | None = {} if embed_photos else None
    if json_file == markdown == "-":
        raise click.UsageError("--json and --markdown cannot both write to stdout")
    named = [Path(file) for file in (json_file, markdown) if file and file != "-"]
    for file in [*(file for file in (history, report) if file), *named]:
        records.check_writable(file)
    past = records.history(history) if history else []
    browser = None
    if wait or program or http or webgpu or native:
        from .browser import Options

        browser = Options(wait=wait or Options.wait, open=program, http=http, webgpu=webgpu, native=native)
    try:
        with PhaseBars() as bars:
            record = run_bench(
                bundles,
                device=device,
                host=host,
                memory_limit=memory_limit,
                browser=browser,
                data=data,
                skip_bad=skip_bad,
                split=split,
                limit=limit,
                beams=beams,
                peers=peers,
                all_peers=all_peers,
                checkpoints=checkpoints,
                settings=Settings(threads=threads, rounds=rounds, timeout=timeout, slow_photos=slow_limit),
                pictures=pictures,
                progress=bars,
            )
    except KeyboardInterrupt:
        click.echo("stopped before anything was finished: nothing is written", err=True)
        sys.exit(130)
    # What cannot be measured again first: nothing is lost when showing it fails.
    if json_file == "-":
        click.echo(records.dumps(record))
    elif json_file:
        records.write(record, Path(json_file))
    changed = alone = None
    if history:
        records.append(record, history)
        changed = since_last(past, record)
        alone = None if changed else why_none(past, record)
    if "-" not in (json_file, markdown):
        show(record)
        if changed:
            show_since(changed)
        elif alone:
            click.echo(f"\nNothing to compare with: {alone}")
    if markdown:
        put_markdown(record, markdown)
    if report:
        write_text(html(record, changes=changed, alone=alone, photos=pictures), report, "report")
    if record["stopped"]:
        sys.exit(130)
    rows = [row for row in record["rows"] if row["kind"] == "bundle"]
    bad = any(row["status"] != "ok" or row.get("against_native", {}).get("ok") is False for row in rows)
    if bad or record["problems"]:
        sys.exit(1)


@click.command()
@click.option("--results", required=True, type=click.Path(), help='Captions: [{"image_id": 1, "caption": "..."}, ...].')
@click.option("--references", required=True, type=click.Path(), help="COCO annotations, or {id: [caption, ...]}.")
@click.option("--meteor", is_flag=True, help="METEOR too (needs Java and the extra `bench`).")
@click.option("--spice", is_flag=True, help="SPICE too (needs Java, the extra `bench`, and a download of its own).")
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
    from .metrics import caption_metrics
    from .metrics.coco import read_references, read_results
    from .metrics.external import java_metric, require_java

    extras = [name for name, wanted in (("meteor", meteor), ("spice", spice)) if wanted]
    for name in extras:
        require_java(name)
    captions, wanted = read_results(results), read_references(references)
    figures = caption_metrics(captions, wanted).to_dict()
    figures |= {name: java_metric(name, captions, wanted) for name in extras}
    if as_json:
        click.echo(json.dumps(figures))
        return
    from .metrics.table import show

    show(figures)

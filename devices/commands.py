"""`edgecap devices`, `edgecap site` and `edgecap cache`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Profiles, how each is reached and what that lacks, as JSON.")
def devices(as_json: bool) -> None:
    """List the devices that edgecap knows, how each is reached, and what that lacks here.

    \b
    Examples:
      edgecap devices
      edgecap devices --json
    """
    from . import KINDS, cpu_facts, profiles

    facts, known = cpu_facts(), profiles()
    if as_json:
        more = {
            name: {"how": KINDS[p.kind].how.replace("NAME", name), "missing": p.missing} for name, p in known.items()
        }
        listed = [p.to_dict() | {"reachable": more[name]["missing"] is None} | more[name] for name, p in known.items()]
        click.echo(json.dumps({"devices": listed, "this_machine": facts.to_dict()}, indent=1))
        return
    from .listing import show

    show(known.values(), facts)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("site"), show_default=True, help="Folder to write."
)
@click.option("--serve", is_flag=True, help="Then serve it on http://localhost, this machine alone, until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), help="With --serve; 0: any that is free.  [default: 8000]")
@click.option("--json", "as_json", is_flag=True, help="What it weighs, as one JSON object.")
def site(bundle: Path, out: Path, serve: bool, port: int | None, as_json: bool) -> None:
    """Write a captioner as a web page: a folder of plain files for any server, which works offline after one visit.

    The folder holds page, JavaScript runtime, ONNX Runtime's WebAssembly and the bundle (backend onnx: fp32 is
    mostly the quickest there). An earlier site is replaced, a folder that holds anything else never. It needs
    onnxruntime-web: npm install --prefix DIR onnxruntime-web, then EDGECAP_ORT_WEB=DIR/node_modules/onnxruntime-web.

    Exit code 2 for a bundle, folder or installation that will not do, 1 where the site cannot be written or served.

    \b
    Examples:
      edgecap site runs/a-fp32.edgecap
      edgecap site runs/a-fp32.edgecap -o public/caption --json
      edgecap site runs/a-fp32.edgecap --serve --port 8080
    """
    from ..runtime.bundle import Bundle
    from ..runtime.errors import EdgecapError
    from .site import server, show, write_site

    if port is not None and not serve:
        raise click.UsageError("--port goes with --serve")
    opened = Bundle.open(bundle)
    try:
        weights = write_site(opened, out)
    except OSError as error:
        raise EdgecapError(f"{out} cannot be written ({error.strerror or error})") from None
    show(out, weights, as_json)
    if not serve:
        return
    with server(out, 8000 if port is None else port) as serving:
        click.echo(f"http://localhost:{serving.server_address[1]}/ until Ctrl-C", err=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            pass


@click.command()
@click.option("--clear", is_flag=True, help="Delete what is listed. Not while edgecap trains or measures.")
@click.option(
    "--older-than", "days", type=click.FloatRange(0), metavar="DAYS", help="Only what no run used for so long."
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def cache(names: tuple[str, ...], clear: bool, days: float | None, as_json: bool) -> None:
    """Say what edgecap keeps in its cache ($EDGECAP_CACHE, default ~/.cache/edgecap), and delete it.

    Prepared peers, wheels for devices, an emulated arm64 Python, streamed data sets, photos and features for
    training: all of it is made again when it is needed, and nothing goes away by itself. NAME is an entry or a
    folder of them (peers). What was shipped to a device behind ssh is deleted there after 30 days without use.

    \b
    Examples:
      edgecap cache
      edgecap cache --clear --older-than 30
      edgecap cache --clear peers
    """
    import time

    from ..runtime.errors import EdgecapError, UsageError
    from .cache import DAY, KINDS, entries, remove
    from .listing import show_cache
    from .local import cache_folder

    found = entries()
    for name in names:
        if not any(_within(entry.name, name) for entry in found):
            raise UsageError(f"there is no {name} in the cache {cache_folder()}")
    if names:
        found = [entry for entry in found if any(_within(entry.name, name) for name in names)]
    now = time.time()
    if days is not None:
        found = [entry for entry in found if now - entry.used >= days * DAY]
    if clear:
        try:
            remove(found)
        except OSError as error:
            raise EdgecapError(f"{error.filename} cannot be deleted: {error.strerror}") from None
    if as_json:
        listed = [
            {"name": e.name, "what": KINDS[e.kind], "bytes": e.bytes, "days": round((now - e.used) / DAY, 1)}
            for e in found
        ]
        click.echo(json.dumps({"folder": str(cache_folder()), "entries": listed, "deleted": clear}))
        return
    show_cache(found, now, clear)


def _within(entry: str, name: str) -> bool:
    return entry == name or entry.startswith(name.rstrip("/") + "/")

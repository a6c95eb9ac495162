"""`edgecap devices`."""

from __future__ import annotations

import json

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

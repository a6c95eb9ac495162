"""`edgecap devices`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the profiles as JSON.")
def devices(as_json: bool) -> None:
    """List the devices that edgecap knows, and which of them can be measured from here.

    \b
    Examples:
      edgecap devices
      edgecap devices --json
    """
    from . import cpu_facts, profiles

    facts = cpu_facts()
    if as_json:
        listed = [p.to_dict() | {"reachable": p.reachable} for p in profiles().values()]
        click.echo(json.dumps({"devices": listed, "this_machine": facts.to_dict()}, indent=1))
        return
    from .listing import show

    show(profiles().values(), facts)

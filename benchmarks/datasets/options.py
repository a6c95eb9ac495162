"""The part of a spec behind its place, `READER:PLACE?key=value,key=value`: one way to write it for every reader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...runtime.errors import UsageError


def parse_place(argument: str, usage: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """`DIR?caption=both,limit=9` → ("DIR", {"caption": "both", "limit": "9"}); UsageError for options not in `names`.

    An argument that is itself a folder has no options: its name may hold a question mark.
    """
    place, mark, text = argument.rpartition("?")
    if not mark or Path(argument).expanduser().is_dir():
        return argument, {}
    reader, names = usage.partition(":")[0], list(names)
    options: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or key not in names:
            choices = ", ".join(f"{name}=" for name in names)
            raise UsageError(f"{reader} has no option {part!r}: choose from {choices} as in {usage}")
        options[key] = value
    return place, options


def choice(options: dict[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The option's value, by default the first choice; UsageError naming the choices for any other."""
    value = options.get(name, choices[0])
    if value not in choices:
        raise UsageError(f"{name}={value!r} is none of {', '.join(choices)}")
    return value


def whole_number(options: dict[str, str], name: str) -> int | None:
    """The option as a number ≥ 1, None where it is not given; UsageError otherwise."""
    value = options.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"{name}={value!r} must be a whole number from 1")
    return int(value)

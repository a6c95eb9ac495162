"""The errors a user can cause: one line saying what is wrong, where, and what to do."""

from __future__ import annotations


class EdgecapError(Exception):
    """A failure that is told in one line. `exit_code` is what the command line exits with."""

    exit_code = 1

    @property
    def message(self) -> str:
        """One line that a terminal prints as it is: a broken file may put anything into it."""
        text = " ".join(str(self).split())
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(EdgecapError):
    """What was asked for cannot be done as asked (a bad argument, file, recipe or bundle)."""

    exit_code = 2


class BundleError(UsageError):
    """A bundle that the loader refuses: incomplete, changed, unsafe or from a newer edgecap."""


class MissingExtra(UsageError):
    """A command needs an optional dependency that is not installed."""

    def __init__(self, command: str, module: str, extra: str) -> None:
        super().__init__(f"{command} needs {module}, which is not installed: pip install 'edgecap[{extra}]'")


def need(module: str, *, extra: str, command: str) -> None:
    """Raise MissingExtra if `module` cannot be found (without importing it)."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise MissingExtra(command, module, extra)

"""The command line: each command imports its room when it is called, so `edgecap --help` stays instant."""

from __future__ import annotations

import sys

import click

from . import __version__
from .runtime.errors import EdgecapError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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

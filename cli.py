"""The command line: each command imports its room when it is called, so `edgecap --help` stays instant."""

from __future__ import annotations

import sys

import click

from . import __version__
from .runtime.errors import EdgecapError

# command → (module of its room, name there, its line in the list of commands), in the order of the chain
ROOMS = {
    "train": ("train.commands", "train", "Train a captioner into a checkpoint folder."),
    "eval": ("train.commands", "evaluate", "Score a checkpoint in torch."),
    "merge": ("train.commands", "merge", "Bake an adapter into its base, with proof."),
    "prune": ("export.commands", "prune", "Make a smaller checkpoint: widths, layers, vocabulary."),
    "export": ("export.commands", "export", "Turn a checkpoint into a bundle, and measure what that cost."),
    "targets": ("export.commands", "targets", "List what can be exported to, and which captioners fit."),
    "caption": ("runtime.commands", "caption", "Caption photos with a bundle."),
    "inspect": ("runtime.commands", "inspect", "Say what a bundle is and what it cost."),
    "verify": ("runtime.commands", "verify", "Check a bundle on this device."),
    "bench": ("benchmarks.commands", "bench", "Measure bundles: time, memory, size and CIDEr."),
    "score": ("benchmarks.commands", "score", "Caption metrics of any system, in the COCO format."),
    "data": ("benchmarks.commands", "data", "Check a data set and say what is in it."),
    "cache": ("devices.commands", "cache", "Say what the cache holds, and delete it."),
    "site": ("devices.commands", "site", "Write a captioner as a web page that works offline."),
    "devices": ("devices.commands", "devices", "List the devices that can be measured."),
}


class Rooms(click.Group):
    """A group whose commands lie in their rooms and are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(ROOMS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in ROOMS:
            return None
        from importlib import import_module

        module, attribute, _ = ROOMS[name]
        return getattr(import_module(f".{module}", __package__), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in ROOMS.items()])


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


def main() -> None:
    """Run the command line; an EdgecapError is one line on stderr and its exit code."""
    try:
        cli.main(prog_name="edgecap", standalone_mode=True)
    except EdgecapError as error:
        click.echo(f"Error: {error.message}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that cannot be written: no room foresaw it
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

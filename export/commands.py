"""`edgecap export`, `prune` and `targets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..runtime.errors import EdgecapError, need


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--target", metavar="TARGET", help="What to make: see edgecap targets. Needed, but with --from's graphs.")
@click.option(
    "--from",
    "source",
    metavar="SOURCE",
    help="Instead of CHECKPOINT: a published SmolVLM or Idefics3, by hub id or directory, as it is. Without --target: "
    "a directory with the ONNX graphs of optimum or of the hub's community, which are taken as they are.",
)
@click.option("--image-size", type=click.IntRange(1, 4096), metavar="PX", help="With --from: pixels a side of a frame.")
@click.option("--tiles/--no-tiles", default=None, help="With --from: whether photos are split into such frames.")
@click.option(
    "--variant",
    multiple=True,
    metavar="NAME",
    help="Which of these graphs: fp32, fp16, int8, uint8, quantized, q4, q4f16, bnb4, or vision=, embed=, decoder=NAME "
    "for one of them.  [default: fp32, or the first that all have]",
)
@click.option("--chat", metavar="TEXT", help="With --from: what is asked of a photo.")
@click.option("--data", metavar="SPEC", help="Photos for calibration and gate; default: what it was trained on.")
@click.option("--skip-bad", is_flag=True, help="Leave bad examples out; always so where the recipe did.")
@click.option(
    "--max-cider-drop",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    help="CIDEr against fp32 that the export may cost; the 95% interval must lie within it.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use only N validation photos for the gate.")
@click.option(
    "--calibration", type=click.IntRange(1), default=128, show_default=True, help="Training photos to calibrate on."
)
@click.option(
    "--prune",
    multiple=True,
    metavar="KEY=VALUE",
    help="Make it smaller first: channels=0.3 (a share; or only encoder=, features=, decoder=, hidden=, ffn=, heads=), "
    "layers=1, vocab=used or vocab=N (words used N times). May be given several times.",
)
@click.option(
    "--finetune",
    type=click.IntRange(0),
    default=0,
    metavar="EPOCHS",
    help="After --prune, taught by the unpruned model.",
)
@click.option(
    "--encoder-lr",
    type=click.FloatRange(0),
    default=0.0,
    help="While fine-tuning; 0 keeps the encoder as it is pruned.",
)
@click.option("--fused", is_flag=True, help="Also the whole captioner as one graph, fused.onnx (onnx targets).")
@click.option("--mmproj", type=click.Choice(["f16", "q8_0"]), help="The encoder for llama.cpp, too (gguf targets).")
@click.option("--recover", is_flag=True, help="Where the gate fails, raise the precision of layers until it holds.")
@click.option("--autotune", is_flag=True, help="Time each graph as fp32, int8, int4 on --device; keep the fastest.")
@click.option("--device", help="For --autotune; see edgecap devices.  [default: cpu]")
@click.option("--tuning", type=click.Path(path_type=Path), help="Use the choices of this tuning.json.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The bundle; default: runs/RUN-TARGET.edgecap.")
@click.option(
    "--force", is_flag=True, help="Write a bundle that misses the gate or the golden pair (it says so inside)."
)
@click.option("--unfinished-ok", is_flag=True, help="Take a run whose training has not finished.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict and what was measured as JSON.")
def export(
    checkpoint: Path | None,
    target: str | None,
    source: str | None,
    image_size: int | None,
    tiles: bool | None,
    variant: tuple[str, ...],
    chat: str | None,
    data: str | None,
    skip_bad: bool,
    max_cider_drop: float,
    limit: int | None,
    calibration: int,
    prune: tuple[str, ...],
    finetune: int,
    encoder_lr: float,
    fused: bool,
    mmproj: str | None,
    recover: bool,
    autotune: bool,
    device: str | None,
    tuning: Path | None,
    out: Path | None,
    force: bool,
    unfinished_ok: bool,
    as_json: bool,
) -> None:
    """Turn a checkpoint into a bundle for the device, and measure what that cost.

    Without CHECKPOINT, the newest finished run under runs/. The gate captions the validation split with the
    finished graphs: if CIDEr drops by more than allowed, or may have, no bundle is written and the exit code
    is 1.

    \b
    Examples:
      edgecap export --target onnx-int8
      edgecap export runs/a --target onnx-int8 --max-cider-drop 0.01 -o a.edgecap
      edgecap export runs/a --target openvino-int4 --data flickr8k:DIR --json
      edgecap export runs/a --target onnx-int4 --prune channels=0.2 --prune vocab=5 --finetune 4
      edgecap export runs/a --target onnx-int8 --autotune --device cpu --fused
      edgecap export --from HuggingFaceTB/SmolVLM-256M-Instruct --target onnx-int8 --data coco:DIR
      edgecap export --from ./SmolVLM-256M-Instruct --variant q4 -o smolvlm.edgecap
    """
    if source is not None and target is None:
        place = Path(source)
        _wrap(
            place,
            as_json=as_json,
            variants=variant,
            chat=chat,
            image_size=image_size,
            tiles=tiles,
            data=data,
            skip_bad=skip_bad,
            limit=limit,
            out=out,
        )
        return
    if variant:
        raise click.UsageError("--variant goes with --from and without --target")
    if chat and not source:
        raise click.UsageError("--chat goes with --from: a checkpoint has its own prompt")
    if target is None:
        raise click.UsageError("Missing option '--target'.")
    for module in ("torch", "transformers", "accelerate", "onnx", "onnxscript"):
        need(module, extra="export", command="edgecap export")
    from ..runtime.progress import PhaseBars
    from .artifact import BuildOptions
    from .listing import show
    from .pipeline import export as run_export
    from .smaller import Smaller

    if autotune and tuning:
        raise click.UsageError("--autotune makes a tuning.json and --tuning uses one: give one of them")
    if not source and (image_size or tiles is not None):
        raise click.UsageError("--image-size and --tiles go with --from; a checkpoint's photos are as it was trained")
    if source and checkpoint:
        raise click.UsageError("--from takes the place of CHECKPOINT: give one of them")
    if device and not autotune:
        raise click.UsageError("--device says where --autotune measures: give both")

    with PhaseBars() as bars:
        result = run_export(
            checkpoint,
            target=target,
            source=source,
            image_size=image_size,
            tiles=tiles,
            chat=chat,
            data=data,
            skip_bad=skip_bad,
            max_cider_drop=max_cider_drop,
            limit=limit,
            calibration=calibration,
            out=out,
            force=force,
            unfinished_ok=unfinished_ok,
            options=BuildOptions(fused=fused, mmproj=mmproj or ""),
            raise_layers=recover,
            autotune=(device or "cpu") if autotune else None,
            tuning=tuning,
            smaller=Smaller(prune, finetune, encoder_lr),
            progress=bars,
            say=lambda line: click.echo(line, err=True),
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
    else:
        show(result)
    if result.path is None:
        raise EdgecapError(f"no bundle written: {result.gate.reason} (or --force)")


# What --from understands of the options of `export` where it takes graphs as they are
WITH_FROM = ("source", "variant", "chat", "image_size", "tiles", "data", "skip_bad", "limit", "out", "as_json")


def _wrap(source: Path, *, as_json: bool, **options: Any) -> None:
    """`edgecap export --from` without a target."""
    from click.core import ParameterSource

    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") not in (ParameterSource.DEFAULT, None)
        if given and option.name not in WITH_FROM:
            what = option.opts[0] if option.opts[0].startswith("-") else "CHECKPOINT"
            raise click.UsageError(f"{what} needs --target: without it, --from takes graphs as they are")
    for module in ("onnx", "jinja2"):
        need(module, extra="export", command="edgecap export")
    from ..runtime.progress import PhaseBars
    from .from_onnx import wrap
    from .listing import show_wrapped

    with PhaseBars() as bars:
        result = wrap(source, **options, progress=bars)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
    else:
        show_wrapped(result)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("items", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.option("--data", metavar="SPEC", help="Photos and captions to judge by; default: what it was trained on.")
@click.option("--skip-bad", is_flag=True, help="Leave bad examples out; always so where the recipe did.")
@click.option(
    "--calibration", type=click.IntRange(1), default=512, show_default=True, help="Training photos to judge by."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Its folder; default: under CHECKPOINT/pruned.")
@click.option("--unfinished-ok", is_flag=True, help="Take a run whose training has not finished.")
@click.option("--json", "as_json", is_flag=True, help="Print what was taken out as JSON.")
def prune(
    checkpoint: Path,
    items: tuple[str, ...],
    data: str | None,
    skip_bad: bool,
    calibration: int,
    out: Path | None,
    unfinished_ok: bool,
    as_json: bool,
) -> None:
    """Make a smaller checkpoint of a checkpoint, to train on or to export.

    Items as for edgecap export --prune, which takes the one in CHECKPOINT/pruned again.

    \b
    Examples:
      edgecap prune runs/a vocab=used
      edgecap prune runs/a vocab=5 layers=1 -o runs/small && edgecap train --init runs/small --teacher runs/a
    """
    for module in ("torch", "transformers", "accelerate", "onnx", "onnxscript"):
        need(module, extra="export", command="edgecap prune")
    from ..runtime.progress import PhaseBars
    from .pipeline import prune as run_prune
    from .smaller import Smaller

    with PhaseBars() as bars:
        made = run_prune(
            checkpoint,
            Smaller(items, out=out),
            data=data,
            skip_bad=skip_bad,
            calibration=calibration,
            unfinished_ok=unfinished_ok,
            progress=bars,
            say=lambda line: click.echo(line, err=True),
        )
    record = made.metrics["pruned"][-1]
    if as_json:
        click.echo(json.dumps({"path": str(made.path), **record}, indent=1))
        return
    before, after = record["before"], record["after"]
    sizes = [sum(cost["parameters"].values()) / 1e6 for cost in (before, after)]
    click.echo(
        f"{made.path}: {sizes[0]:,.2f} → {sizes[1]:,.2f} M parameters, "
        f"{before['bytes'] / 1e6:,.1f} → {after['bytes'] / 1e6:,.1f} MB"
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
@click.option("--markdown", is_flag=True, help="The table as Markdown, as in the docs.")
def targets(as_json: bool, markdown: bool) -> None:
    """List the export targets: what each is, whether it runs here, and which captioners it can hold.

    \b
    Examples:
      edgecap targets
      edgecap targets --json
    """
    need("torch", extra="export", command="edgecap targets")
    from .support import as_markdown, show_targets, support

    rows = support()
    if as_json:
        click.echo(json.dumps({"targets": [row.to_dict() for row in rows]}, indent=1))
    elif markdown:
        click.echo(as_markdown(rows))
    else:
        show_targets(rows)

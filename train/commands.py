"""`edgecap train`, `edgecap eval` and `edgecap merge`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..runtime.errors import EdgecapError, UsageError, need

MODEL_PARTS = ("encoder", "bridge", "decoder", "tokenizer", "text", "prompt")  # tables that --init brings


def _need_train(command: str) -> None:
    for module in (
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "tensorboard",
        "matplotlib",
        "tomli_w",
        "filelock",
    ):
        need(module, extra="train", command=command)


@click.command()
@click.argument("recipe", required=False)
@click.option("--data", metavar="SPEC", help="scenes, flickr8k:DIR, folder:DIR, …; default: the recipe's.")
@click.option("--encoder", metavar="HUB_ID_OR_DIR", help="Pretrained encoder; default: the recipe's.")
@click.option("--decoder", metavar="HUB_ID_OR_DIR", help="Pretrained language model; default: the recipe's.")
@click.option("--text", metavar="HUB_ID_OR_DIR", help="Pretrained text encoder of a retrieval recipe.")
@click.option("--vlm", metavar="HUB_ID_OR_DIR", help="A SmolVLM: encoder, bridge, decoder and tokenizer at once.")
@click.option("--from-scratch", is_flag=True, help="No pretrained weights: every part from its configuration.")
@click.option(
    "--image-longest-edge", type=click.IntRange(32), metavar="PX", help="Side of the photos the encoder sees."
)
@click.option(
    "--split-image/--no-split-image", default=None, help="SmolVLM: see photos in tiles and an overview, or whole."
)
@click.option("--max-seq-len", type=click.IntRange(8), metavar="N", help="Positions of prompt, photo and caption.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Checkpoint folder.  [default: runs/RECIPE]")
@click.option("--init", metavar="CHECKPOINT", type=click.Path(path_type=Path), help="Start from its model and weights.")
@click.option(
    "--teacher",
    "teachers",
    metavar="CHECKPOINT_OR_CAPTIONER",
    multiple=True,
    help="For stages that distill, or learn captions: a run, a bundle, SmolVLM, BLIP, GIT; repeatable.",
)
@click.option(
    "--critic", metavar="CHECKPOINT_OR_CLIP", help="Judges how captions fit their photos: a retrieval run, CLIP."
)
@click.option(
    "--check",
    is_flag=True,
    help="Train nothing: take 3 steps of each stage (none that distills), tell memory and speed; 1 if it does not fit.",
)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a recipe key; repeatable.")
@click.option("--seed", type=click.IntRange(0), help="Seed of weights and order; default: the recipe's.")
@click.option("--resume", is_flag=True, help="Continue the run in --out, or the newest under runs/.")
@click.option("--skip-bad", is_flag=True, help="Leave broken photos out (and name them) instead of failing.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--list", "list_recipes", is_flag=True, help="List the recipes and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print the final metrics as JSON.")
def train(
    recipe: str | None,
    data: str | None,
    encoder: str | None,
    decoder: str | None,
    text: str | None,
    vlm: str | None,
    from_scratch: bool,
    image_longest_edge: int | None,
    split_image: bool | None,
    max_seq_len: int | None,
    out: Path | None,
    init: Path | None,
    teachers: tuple[str, ...],
    critic: str | None,
    check: bool,
    overrides: tuple[str, ...],
    seed: int | None,
    resume: bool,
    skip_bad: bool,
    threads: int | None,
    list_recipes: bool,
    as_json: bool,
) -> None:
    """Train a captioner from RECIPE (a name or a TOML file) into a checkpoint folder.

    Without arguments: the small default recipe on the built-in scenes, about three and a half minutes on two cores.
    A killed run goes on with --resume, exactly where its last save left it. On several processes or GPUs:
    accelerate launch -m edgecap train ...

    \b
    Examples:
      edgecap train
      edgecap train mobilenetv2-gru --data flickr8k:DIR --encoder google/mobilenet_v2_1.0_224
      edgecap train --data folder:my-photos --set stages.0.epochs=20
      edgecap train --init runs/mobilenetv2-gru --data folder:my-photos
      edgecap train smolvlm-lora --vlm HuggingFaceTB/SmolVLM-256M-Instruct --data coco:DIR
      edgecap train mobilenetv2-gru --teacher Salesforce/blip-image-captioning-base --set stages.0.teacher_captions=3
      edgecap train moda --from-scratch --check
      edgecap train --resume
    """
    from ..runtime.progress import PhaseBars
    from .recipe import recipe_names
    from .settings import DEFAULT_RECIPE

    if list_recipes:
        for name in recipe_names():
            click.echo(name + (" (default)" if name == DEFAULT_RECIPE else ""))
        return
    parts = encoder or decoder or text or vlm or from_scratch
    sizes = image_longest_edge or max_seq_len or split_image is not None
    helpers = teachers or critic
    plan_given = recipe or data or parts or sizes or init or helpers or overrides or seed is not None or skip_bad
    if resume and (plan_given or check):
        raise click.UsageError(
            "--resume continues a run by its own recipe; only --out, --threads and --json go with it"
        )
    if init and (parts or sizes or any(item.partition(".")[0].partition("=")[0] in MODEL_PARTS for item in overrides)):
        raise click.UsageError("--init brings its own model and tokenizer: leave out options and --set of theirs")
    if check and (teachers or out):
        raise click.UsageError("--check keeps nothing, and takes no step that distills: leave out --out and --teacher")
    _need_train("edgecap train")
    import torch
    from rich.console import Console

    from .opening import this_process
    from .prepare import prepare_recipe
    from .report import tell
    from .run import train as run_train

    if threads:
        torch.set_num_threads(threads)
    main = this_process().is_main_process  # of several processes only the first says anything
    plan = None
    try:
        with PhaseBars(Console(stderr=True, quiet=not main)) as bars:
            say = lambda line: bars.console.print(line, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
            if not resume:
                if init and not (init / "recipe.toml").is_file():
                    raise UsageError(f"--init {init} is not a checkpoint: recipe.toml is missing")
                plan = prepare_recipe(
                    recipe or (str(init / "recipe.toml") if init else DEFAULT_RECIPE),
                    data=data,
                    encoder=encoder,
                    overrides=overrides,
                    skip_bad=skip_bad,
                    seed=seed,
                    decoder=decoder,
                    text=text,
                    vlm=vlm,
                    from_scratch=from_scratch,
                    image_size=image_longest_edge,
                    split=split_image,
                    max_positions=max_seq_len,
                    say=(lambda line: None) if init else say,  # of the recipe's encoder, which does not count then
                )
            if check:
                from .fit import check_fit

                told = check_fit(plan, init=init, critic=critic, progress=bars)
            else:
                folder, metrics = run_train(
                    plan, out, resume=resume, init=init, teachers=teachers, critic=critic, progress=bars, say=say
                )
    except EdgecapError as error:
        if main:
            raise
        raise SystemExit(error.exit_code) from None
    if not main:
        return
    if check:
        click.echo(json.dumps(told.to_dict(), indent=2) if as_json else told.text())
        raise SystemExit(0 if told.fits else 1)
    if as_json:
        click.echo(json.dumps({"checkpoint": str(folder), **metrics}, indent=2))
        return
    best, metric = metrics["best"], metrics["metric"]
    after = {"retrieval": "eval", "adapter": f"merge {folder}"}.get(metrics["kind"], "export --target onnx-int8")
    click.echo(
        f"{folder}: validation {tell(metric, best[metric])} ({best['stage']}, epoch {best['epoch']}) after "
        f"{metrics['seconds']:.0f} s; next: edgecap {after}"
    )


@click.command("eval")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--data", metavar="SPEC", help="Photos and captions; default: what the checkpoint was trained on.")
@click.option("--split", default="test", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first N photos of the split.")
@click.option("--beam", type=click.IntRange(1, 64), help="Beam size; 1 is greedy.  [default: the recipe's]")
@click.option("--length-penalty", type=click.FloatRange(0, 10), help="[default: the recipe's]")
@click.option(
    "--adapter",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Put this run's adapter on CHECKPOINT, or the base it learnt on; none: take its own off.",
)
@click.option("--critic", metavar="CHECKPOINT_OR_CLIP", help="Also tell how captions fit their photos, by this judge.")
@click.option("--unfinished-ok", is_flag=True, help="Take a run whose training has not finished.")
@click.option("--json", "json_file", metavar="FILE", help="Write scores and captions here; - is stdout.")
def evaluate(
    checkpoint: Path | None,
    data: str | None,
    split: str,
    limit: int | None,
    beam: int | None,
    length_penalty: float | None,
    adapter: Path | None,
    critic: str | None,
    unfinished_ok: bool,
    json_file: str | None,
) -> None:
    """Score CHECKPOINT in torch with the metrics `edgecap bench` gives for a bundle; default: the newest finished run.

    A retrieval checkpoint is scored by recall, both ways.

    \b
    Examples:
      edgecap eval
      edgecap eval runs/mobilenetv2-gru --data flickr8k:DIR --beam 3 --json scores.json
      edgecap eval runs/smolvlm --adapter runs/smolvlm-lora
      edgecap eval runs/a --critic runs/query-bridge
    """
    _need_train("edgecap eval")
    from ..runtime.progress import PhaseBars
    from .evaluate import evaluate as run_evaluate
    from .evaluate import score_lines
    from .state import write_json

    with PhaseBars() as bars:
        record = run_evaluate(
            checkpoint,
            spec=data,
            split=split,
            limit=limit,
            decoding={"beam": beam, "length_penalty": length_penalty},
            adapter=adapter,
            critic=critic,
            unfinished_ok=unfinished_ok,
            progress=bars,
        )
    if json_file == "-":
        click.echo(json.dumps(record, indent=2))
        return
    if json_file:
        write_json(Path(json_file), record)
    click.echo("\n".join(score_lines(record)))


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Checkpoint folder.  [default: CHECKPOINT-merged]")
@click.option(
    "--base",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Its base, checkpoint or weights, where that has moved.",
)
@click.option("--data", metavar="SPEC", help="Photos of the proof; default: what the adapter was trained on.")
@click.option("--photos", type=click.IntRange(1), default=64, show_default=True, help="Validation photos of the proof.")
@click.option("--json", "as_json", is_flag=True, help="Print the proof as JSON.")
def merge(checkpoint: Path, out: Path | None, base: Path | None, data: str | None, photos: int, as_json: bool) -> None:
    """Bake the adapter of CHECKPOINT into its base, and prove that the merged model gives the adapter's logits.

    What is written is read again and compared on validation photos with their captions given; if the logits differ by
    more than rounding, nothing is kept and the exit code is 1. Of a 4-bit run the base's full-precision weights are
    taken; how far that is from what was trained is told, too.

    \b
    Examples:
      edgecap merge runs/smolvlm-lora
      edgecap export runs/smolvlm-lora-merged --target onnx-int8
    """
    _need_train("edgecap merge")
    from ..runtime.progress import PhaseBars
    from .merge import merge_adapter, merge_line

    with PhaseBars() as bars:
        folder, merged = merge_adapter(checkpoint, out, base=base, data=data, photos=photos, progress=bars)
    if as_json:
        click.echo(json.dumps({"checkpoint": str(folder), **merged}, indent=2))
    else:
        click.echo(f"{folder}: {merge_line(merged)}; next: edgecap export {folder} --target onnx-int8")

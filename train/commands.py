"""`edgecap train` and `edgecap eval`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..runtime.errors import EdgecapError, UsageError, need

MODEL_PARTS = ("encoder", "bridge", "decoder", "tokenizer")


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
@click.option("--data", metavar="SPEC", help="scenes, flickr8k:DIR, folder:DIR or coco:DIR; default: the recipe's.")
@click.option("--encoder", metavar="HUB_ID_OR_DIR", help="Pretrained encoder; default: from scratch.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Checkpoint folder.  [default: runs/RECIPE]")
@click.option("--init", metavar="CHECKPOINT", type=click.Path(path_type=Path), help="Start from its model and weights.")
@click.option("--teacher", metavar="CHECKPOINT", type=click.Path(path_type=Path), help="For stages that distill.")
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
    out: Path | None,
    init: Path | None,
    teacher: Path | None,
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
      edgecap train --resume
    """
    from ..benchmarks.progress import PhaseBars
    from .recipe import recipe_names
    from .settings import DEFAULT_RECIPE

    if list_recipes:
        for name in recipe_names():
            click.echo(name + (" (default)" if name == DEFAULT_RECIPE else ""))
        return
    if resume and (recipe or data or encoder or init or teacher or overrides or seed is not None or skip_bad):
        raise click.UsageError(
            "--resume continues a run by its own recipe; only --out, --threads and --json go with it"
        )
    if init and (encoder or any(item.startswith(MODEL_PARTS) for item in overrides)):
        raise click.UsageError("--init brings its own model and tokenizer: leave out --encoder and --set of theirs")
    _need_train("edgecap train")
    import torch
    from accelerate import PartialState
    from rich.console import Console

    from .run import prepare_recipe
    from .run import train as run_train

    if threads:
        torch.set_num_threads(threads)
    main = PartialState().is_main_process  # of several processes only the first says anything
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
                    say=(lambda line: None) if init else say,  # of the recipe's encoder, which does not count then
                )
            folder, metrics = run_train(plan, out, resume=resume, init=init, teacher=teacher, progress=bars, say=say)
    except EdgecapError as error:
        if main:
            raise
        raise SystemExit(error.exit_code) from None
    if not main:
        return
    if as_json:
        click.echo(json.dumps({"checkpoint": str(folder), **metrics}, indent=2))
    else:
        best = metrics["best"]
        click.echo(
            f"{folder}: validation CIDEr {best['cider']:.4f} ({best['stage']}, epoch {best['epoch']}) after "
            f"{metrics['seconds']:.0f} s; next: edgecap export --target onnx-int8"
        )


@click.command("eval")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--data", metavar="SPEC", help="Photos and captions; default: what the checkpoint was trained on.")
@click.option("--split", default="test", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first N photos of the split.")
@click.option("--beam", type=click.IntRange(1, 64), help="Beam size; 1 is greedy.  [default: the recipe's]")
@click.option("--length-penalty", type=click.FloatRange(0, 10), help="[default: the recipe's]")
@click.option("--unfinished-ok", is_flag=True, help="Take a run whose training has not finished.")
@click.option("--json", "json_file", metavar="FILE", help="Write scores and captions here; - is stdout.")
def evaluate(
    checkpoint: Path | None,
    data: str | None,
    split: str,
    limit: int | None,
    beam: int | None,
    length_penalty: float | None,
    unfinished_ok: bool,
    json_file: str | None,
) -> None:
    """Score CHECKPOINT in torch with the metrics `edgecap bench` gives for a bundle; default: the newest finished run.

    \b
    Examples:
      edgecap eval
      edgecap eval runs/mobilenetv2-gru --data flickr8k:DIR --beam 3 --json scores.json
    """
    _need_train("edgecap eval")
    from ..benchmarks.progress import PhaseBars
    from .run import evaluate as run_evaluate
    from .state import write_json

    with PhaseBars() as bars:
        record = run_evaluate(
            checkpoint,
            spec=data,
            split=split,
            limit=limit,
            decoding={"beam": beam, "length_penalty": length_penalty},
            unfinished_ok=unfinished_ok,
            progress=bars,
        )
    if json_file == "-":
        click.echo(json.dumps(record, indent=2))
        return
    if json_file:
        write_json(Path(json_file), record)
    scores = record["scores"]
    low, high = scores["cider_interval"]["low"], scores["cider_interval"]["high"]
    click.echo(f"{record['checkpoint']} on {record['data']}, {record['split']}, {record['photos']:,} photos:")
    click.echo(f"  CIDEr    {scores['cider']:.4f}  (95% {low:.4f} to {high:.4f})")
    click.echo(f"  BLEU-4   {scores['bleu_4']:.4f}    ROUGE-L {scores['rouge_l']:.4f}")
    click.echo(f"  distinct {scores['distinct']:.1%}   repeated n-grams {scores['repeated_ngrams']:.1%}")

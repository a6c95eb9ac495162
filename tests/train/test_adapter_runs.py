"""Runs of adapters: what merging and exporting keep, what goes on, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgecap.benchmarks.datasets import open_dataset
from edgecap.export.pipeline import export
from edgecap.runtime import Captioner
from edgecap.runtime.errors import EdgecapError, UsageError
from edgecap.train import checkpoint, commands, loop, lora, merge
from edgecap.train.checkpoint import METRICS, PROGRESS, identity, load_checkpoint, preprocess_for, read_checkpoint
from edgecap.train.data.batches import Photos, encode_captions
from edgecap.train.data.cache import load_pixels
from edgecap.train.evaluate import evaluate
from edgecap.train.fit import check_fit
from edgecap.train.merge import merge_adapter
from edgecap.train.models import CaptionModel
from edgecap.train.run import train
from edgecap.train.smolvlm import with_vlm
from edgecap.train.state import ADAPTER, load_progress, model_tensors
from edgecap.train.teachers.base import CPU, lazy_checkpoint
from edgecap.train.teachers.captioners import of_checkpoint
from edgecap.train.teachers.captions import generate
from edgecap.train.teachers.words import WordTeacher

from .adapter_parts import KINDS, LORA, adapter_recipe, base_recipe, needs_4_bits, save_base
from .tiny import DECODERS, tiny_recipe
from .vlms import save_vlm


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Runs(dict[str, tuple[Path, Path]]):
    """Of each kind a base and an adapter run, trained when a test asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, kind: str) -> tuple[Path, Path]:
        base = save_base(self.folder / kind, kind)
        self[kind] = base, train(adapter_recipe(kind), self.folder / f"{kind}-lora", init=base)[0]
        return self[kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def captions(run: Path | None, adapter: Path | None = None) -> list[str]:
    record = evaluate(run, spec=None, split="test", limit=None, decoding={}, adapter=adapter)
    return [line["caption"] for line in record["captions"]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_what_is_said_and_merging_and_exporting_keep_it(
    kind: str, runs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, run = runs[kind]
    metrics = json.loads((run / METRICS).read_text())
    losses = [record["loss"] for record in metrics["history"]]
    assert losses[-1] < losses[1] and losses[0] is None  # the first validation is the base's
    loaded = load_checkpoint(run)
    stored = sum(tensor.numel() for tensor in model_tensors(loaded.model).values())
    assert metrics["adapter_parameters"] == stored < sum(metrics["parameters"].values()) / 10
    assert (run / ADAPTER).stat().st_size < 4 * stored + 8000 and not (run / "model.safetensors").exists()

    plain, said = captions(base), captions(run)
    assert said != plain and captions(base, run) == said and captions(run, Path("none")) == plain
    assert captions(None, run) == said  # not on the newest run, which it is itself
    out, told = merge_adapter(run, tmp_path / "merged")
    proof = told["proof"]
    assert proof["photos"] == 16 and proof["words"] > 200 and proof["same_argmax"] == 1.0
    assert proof["max_difference"] <= 1e-5 * proof["largest_logit"]
    assert json.loads((out / METRICS).read_text())["merged"] == told
    assert told["base"]["sha256"] == load_checkpoint(base).sha256 and told["adapter"]["sha256"] == loaded.sha256
    assert captions(out) == said
    assert lora.count_parameters(load_checkpoint(out).model) == lora.count_parameters(load_checkpoint(base).model)

    if kind != "llama":
        return  # exporting takes seconds, and knows nothing of adapters
    exported = export(out, target="onnx-fp32", out=tmp_path / "a.edgecap", limit=8)
    assert exported.path is not None
    lineage = json.loads((exported.path / "bundle.json").read_text())["lineage"]["checkpoint"]
    assert lineage["metrics"]["merged"] == told
    examples = list(open_dataset(loaded.recipe.data.spec).splits["test"])
    results = Captioner.load(exported.path).caption_arrays(load_pixels(examples, loaded.preprocess))
    assert [result.text for result in results] == said


def test_an_adapter_run_teaches_as_what_is_merged_of_it(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, run = runs["llama"]
    out, _ = merge_adapter(run, tmp_path / "merged")
    recipe = tiny_recipe({"epochs": 1, "objective": "distill", "batch_size": 24, "teacher_captions": 2})
    for teacher in (run, out):
        _, metrics = train(recipe, tmp_path / f"by {teacher.name}", teachers=[teacher])
        assert metrics["teachers"][0]["captions"][0]["of"] > 0
    data = open_dataset(recipe.data.spec)
    photos, beams, rows = Photos(data, "train", recipe, preprocess_for(recipe)), [], []
    for path in (run, out, base):
        info = read_checkpoint(path)
        model, words = lazy_checkpoint(info), info.tokenizer.inner
        quiet = {"device": CPU, "progress": lambda phase, done, total: None}
        beams.append([[text for text, _ in beam] for beam in generate(of_checkpoint(info, model), photos, 3, **quiet)])
        ids = encode_captions(photos.examples, words, max_length=12, captions=2, ids=info.recipe.tokenizer.ids)
        teacher = WordTeacher(info, model, words, info.recipe.tokenizer.ids)
        rows.append(teacher.rows(photos, ids, mirrored=False, temperature=1.0, top_k=4, **quiet))
    assert beams[0] == beams[1] != beams[2]
    np.testing.assert_allclose(rows[0]["logp"], rows[1]["logp"], atol=2e-2)
    assert not np.allclose(rows[0]["logp"], rows[2]["logp"], atol=0.5)
    # The adapter's weights are not all that it says depends on.
    info = read_checkpoint(run)
    elsewhere = {**info.metrics, "base": {**info.metrics["base"], "sha256": "0"}}
    stronger = dataclasses.replace(info.recipe, lora=dataclasses.replace(info.recipe.lora, alpha=1.0))
    others = [dataclasses.replace(info, metrics=elsewhere), dataclasses.replace(info, recipe=stronger)]
    assert len({json.dumps(identity(each), sort_keys=True) for each in (info, *others)}) == 3


def test_an_adapter_run_goes_on_bit_by_bit(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = runs["gpt2"]
    recipe = adapter_recipe("gpt2", dropout=0.2)
    whole, _ = train(recipe, tmp_path / "whole", init=base)
    left, step = [3], loop.Trainer._step

    class Killed(BaseException):
        pass

    def mortal(self: loop.Trainer, *args: object) -> tuple[float, int, dict[str, float]]:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return step(self, *args)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", mortal)
        with pytest.raises(Killed):
            train(recipe, out, init=base)
    tensors, _ = load_progress(out / PROGRESS)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"model", "optimizer"}
    assert all(lora.is_adapter(name) for name in tensors if name.startswith("model."))
    train(None, out, resume=True)
    assert (out / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_a_base_that_is_gone_or_another_is_one_line(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, run = runs["opt"]
    moved = base.rename(base.with_name("moved"))
    try:
        gone = f"the base of the adapter of {run} is gone: put it back at {base}"
        for use, ends in (
            (lambda: load_checkpoint(run), "$"),
            (lambda: merge_adapter(run, tmp_path / "out"), ", or say where it is with --base$"),
            (lambda: captions(run), f", or name where it is: edgecap eval BASE --adapter {run}$"),
        ):
            with pytest.raises(UsageError, match=gone + ends):
                use()
        with pytest.raises(UsageError, match=f"{base} is not a checkpoint: .*give the base of the adapter of {run}"):
            merge_adapter(run, tmp_path / "out", base=base)
        assert captions(moved, run) and merge_adapter(run, tmp_path / "merged", base=moved)
    finally:
        moved.rename(base)
    other = save_base(tmp_path / "other", "opt", seed=1)
    with pytest.raises(UsageError, match=f"{other} is not the base of the adapter of {run}"):
        captions(other, run)
    with pytest.raises(UsageError, match="has no adapter"):
        captions(base, other)
    with pytest.raises(UsageError, match="has no adapter"):
        captions(base, Path("none"))


def test_an_adapter_on_pretrained_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint under it, the base is what the recipe's sources give, by its own hash."""
    source = save_vlm(tmp_path / "vlm")
    stage = {"epochs": 1, "batch_size": 16, "lr": 0.01}
    plain = tiny_recipe(stage, decoder="llama", spec="scenes:train=16,val=4,test=4,size=48", image_size=48)
    recipe = dataclasses.replace(with_vlm(plain, str(source)), lora=LORA)
    built, build = [], checkpoint.model_for
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "model_for", lambda *args, **options: built.append(1) or build(*args, **options))
        run, metrics = train(recipe, tmp_path / "run")
    assert built == [1]  # sources are read once
    assert metrics["base"]["checkpoint"] == "" and len(metrics["base"]["sha256"]) == 64
    assert [record["loss"] is None for record in metrics["history"]] == [True, False]
    said = captions(run)
    out, told = merge_adapter(run)
    assert captions(out) == said and told["base"]["name"] == "vlm"
    source.rename(tmp_path / "gone")
    with pytest.raises(UsageError, match="no config.json"):
        load_checkpoint(run)
    assert captions(out) == said  # needs nothing but itself
    assert captions(tmp_path / "gone", run) == said  # or where it is now
    assert merge_adapter(run, tmp_path / "again", base=tmp_path / "gone", photos=2)
    with pytest.raises(UsageError, match="no config.json there"):
        merge_adapter(run, tmp_path / "third", base=tmp_path / "nowhere")
    save_vlm(source, seed=1)
    with pytest.raises(UsageError, match=f"what the recipe's sources give is not the base of the adapter of {run}"):
        load_checkpoint(run)


def test_a_kept_adapter_is_a_checkpoint(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, _ = runs["llama"]
    stage = dataclasses.replace(base_recipe("llama").stages[0], epochs=2, keep_every=1, validate_every=2)
    run, metrics = train(dataclasses.replace(adapter_recipe("llama"), stages=(stage,)), tmp_path / "run", init=base)
    first, last = sorted((run / "kept").iterdir())
    assert metrics["best"]["epoch"] == 2 and (last / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()
    kept = load_checkpoint(first)
    assert kept.metrics["base"] == metrics["base"] and kept.metrics["kept"] == 1 and kept.metrics["best"] is None
    assert load_checkpoint(last).metrics["best"] == metrics["best"]
    assert kept.sha256 != load_checkpoint(last).sha256 and captions(first) != captions(base)
    assert merge_adapter(first, photos=2)[0] == run / "kept" / f"{first.name}-merged"


def test_merging_in_the_runs_own_folder(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs["opt"][1], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert merge_adapter(Path("."), photos=2)[0] == tmp_path / "run-merged"


def test_what_cannot_be_trained_is_one_line(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, run = runs["llama"]
    recipe = adapter_recipe("llama")
    with pytest.raises(UsageError, match=f"{run} is an adapter: .*edgecap merge {run}"):
        train(recipe, tmp_path / "a", init=run)
    with pytest.raises(UsageError, match="--init CHECKPOINT, or --vlm"):
        train(recipe, tmp_path / "a")
    learning = dataclasses.replace(recipe, stages=(dataclasses.replace(recipe.stages[0], encoder_lr=1e-4),))
    with pytest.raises(UsageError, match="--set stages.0.encoder_lr=0"):
        train(learning, tmp_path / "a", init=base)
    assert not list(tmp_path.iterdir())
    told = check_fit(recipe)  # what it would take is known without
    assert told.fits and told.stages[0]["trained"] == json.loads((run / METRICS).read_text())["adapter_parameters"]


def test_what_cannot_be_merged_or_exported_is_one_line(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, run = runs["llama"]
    out, _ = merge_adapter(run, tmp_path / "merged", photos=2)
    with pytest.raises(UsageError, match="merged is merged already"):
        merge_adapter(out, tmp_path / "again")
    with pytest.raises(UsageError, match="no adapter to merge"):
        merge_adapter(base, tmp_path / "again")
    with pytest.raises(UsageError, match="merged is not an empty folder"):
        merge_adapter(run, out)
    with pytest.raises(UsageError, match="nowhere is not a checkpoint"):
        merge_adapter(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"{run} is an adapter: .*edgecap merge {run}"):
        export(run, target="onnx-fp32", out=tmp_path / "a.edgecap")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_merge_that_says_something_else_is_refused(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = runs["llama"]
    right = lora.merged_tensors

    def slightly_wrong(model: CaptionModel) -> dict[str, torch.Tensor]:
        return {name: tensor * 1.001 if "down_proj" in name else tensor for name, tensor in right(model).items()}

    monkeypatch.setattr(merge, "merged_tensors", slightly_wrong)
    with pytest.raises(EdgecapError, match="nothing written: merged logits differ by") as caught:
        merge_adapter(run, tmp_path / "merged")
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())


def test_the_commands(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, run = (str(path) for path in runs["opt"])
    runner = CliRunner()
    out = str(tmp_path / "merged")
    told = runner.invoke(commands.merge, [run, "-o", out, "--photos", "3", "--json"], catch_exceptions=False)
    assert json.loads(told.stdout)["proof"]["photos"] == 3 and json.loads(told.stdout)["checkpoint"] == out
    said = runner.invoke(commands.merge, [run, "-o", out + "2"], catch_exceptions=False)
    assert "gives the adapter's logits within" in said.stdout and f"edgecap export {out}2" in said.stdout
    with_it = runner.invoke(commands.evaluate, [base, "--adapter", run, "--limit", "4"], catch_exceptions=False)
    assert f"{base} with the adapter of {run}" in with_it.stdout
    without = runner.invoke(commands.evaluate, [run, "--adapter", "none", "--limit", "4"], catch_exceptions=False)
    assert f"{run} without its adapter" in without.stdout
    assert np.isfinite(json.loads((Path(out) / METRICS).read_text())["merged"]["proof"]["max_difference"])


@needs_4_bits
def test_a_4_bit_run_merges_into_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECODERS, "llama", {**DECODERS["llama"], "dim": 64, "ffn": 128})  # whole blocks
    base = save_base(tmp_path / "base", "llama")
    run, metrics = train(adapter_recipe("llama", bits=4), tmp_path / "qlora", init=base)
    assert metrics["history"][-1]["loss"] < metrics["history"][1]["loss"]
    out, told = merge_adapter(run)
    assert told["proof"]["same_argmax"] == 1.0 and told["adapter"]["bits"] == 4
    assert told["from_4_bits"]["max_difference"] > 100 * told["proof"]["max_difference"]
    assert "not the 4-bit ones it learnt on" in merge.merge_line(told)
    assert load_checkpoint(out).metrics["best"] is None  # nobody has scored this model yet

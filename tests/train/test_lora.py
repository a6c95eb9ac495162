"""Adapters: what learns, what is stored, what peft makes of it, and what merging and exporting keep."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgecap.benchmarks.datasets import open_dataset
from edgecap.export.pipeline import export
from edgecap.runtime import Captioner
from edgecap.runtime.errors import EdgecapError, MissingExtra, UsageError
from edgecap.train import commands, loop, lora, merge
from edgecap.train.cache import load_pixels
from edgecap.train.checkpoint import METRICS, PROGRESS, RECIPE, TOKENIZER, load_checkpoint, model_for
from edgecap.train.evaluate import evaluate
from edgecap.train.fit import check_fit
from edgecap.train.merge import merge_adapter
from edgecap.train.models import CaptionModel
from edgecap.train.optim import make_optimizer, set_modes
from edgecap.train.run import train
from edgecap.train.settings import EncoderSettings, Lora, Recipe, Stage
from edgecap.train.smolvlm import with_vlm
from edgecap.train.state import ADAPTER, load_progress, model_tensors, write_bytes, write_json, write_weights
from edgecap.train.tokenizer import caption_text, token_ids, train_tokenizer

from .tiny import SIGLIP, SIZE, tiny_model, tiny_recipe
from .vlms import save_vlm

KINDS = ("llama", "gpt2", "opt")
LORA = Lora(rank=4, alpha=8.0)
STAGE = {"epochs": 3, "batch_size": 24, "lr": 0.03, "schedule": "constant", "label_smoothing": 0.0}
needs_4_bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def views(seed: int = 0) -> dict[str, torch.Tensor]:
    """Photos and captions: pixels [3, H, W, 3], ids [3, 2, 7]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    return {"ids": torch.randint(4, 40, (3, 2, 7), generator=generator), "pixels": pixels}


@torch.no_grad()
def logits(model: CaptionModel, seed: int = 0) -> torch.Tensor:
    return model.eval()(**views(seed))


def adapted(kind: str, **settings: Any) -> tuple[CaptionModel, CaptionModel]:
    """A captioner with an adapter that has learnt something, and the captioner without it."""
    base = tiny_model(kind)
    model = copy.deepcopy(base)
    lora.add_adapters(model, dataclasses.replace(LORA, **settings))
    teach(model)
    return model, base


@torch.no_grad()
def teach(model: CaptionModel) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(0, 0.2)


def base_recipe(kind: str) -> Recipe:
    recipe = tiny_recipe(STAGE, decoder=kind)
    return dataclasses.replace(recipe, encoder=EncoderSettings(**SIGLIP))  # quick to export


def save_base(folder: Path, kind: str, seed: int = 0) -> Path:
    """A captioner with random weights as a finished checkpoint."""
    recipe = base_recipe(kind)
    captions = [caption_text(c) for e in open_dataset(recipe.data.spec).splits["train"] for c in e.captions]
    tokenizer = train_tokenizer(captions, recipe.tokenizer)
    torch.manual_seed(seed)
    model = model_for(recipe, token_ids(tokenizer), load_weights=False)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    write_weights(folder, model)
    write_bytes(folder / TOKENIZER, tokenizer.to_str().encode())
    write_bytes(folder / RECIPE, recipe.to_toml().encode())
    write_json(folder / METRICS, {"finished": True, "best": None})
    return folder


def adapter_recipe(kind: str, **settings: Any) -> Recipe:
    return dataclasses.replace(base_recipe(kind), lora=dataclasses.replace(LORA, **settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of each kind a base and an adapter run."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for kind in KINDS:
        base = save_base(folder / kind, kind)
        found[kind] = (base, train(adapter_recipe(kind), folder / f"{kind}-lora", init=base)[0])
    return found


def captions(run: Path, adapter: Path | None = None) -> list[str]:
    record = evaluate(run, spec=None, split="test", limit=None, decoding={}, adapter=adapter)
    return [line["caption"] for line in record["captions"]]


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_learn(kind: str) -> None:
    base = tiny_model(kind)
    model = copy.deepcopy(base)
    lora.add_adapters(model, dataclasses.replace(LORA, dropout=0.5))
    assert torch.equal(logits(model), logits(base))  # until they have learnt something
    stage = Stage(lr=0.1)
    optimizer = make_optimizer(model, stage)
    seen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in seen}
    assert names == set(model_tensors(model)) and names and all(lora.is_adapter(name) for name in names)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_modes(model, stage, from_scratch=True)
    for _ in range(2):  # A moves once B is no longer zero
        optimizer.zero_grad()
        model(**views()).logsumexp(-1).sum().backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == names
    torch.manual_seed(0)
    one = model(**views())
    assert not torch.equal(one, model(**views()))  # dropout
    model.eval()
    assert torch.equal(model(**views()), model(**views()))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    """The same language model under peft's own loader gives our logits, and peft's own merge our merged weights."""
    peft = pytest.importorskip("peft")
    model, base = adapted(kind)
    write_weights(tmp_path, model)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base.decoder.lm), str((tmp_path / ADAPTER).parent))
    assert type(wrapped).__name__ == "PeftModelForCausalLM"
    theirs = copy.deepcopy(base)
    theirs.decoder.lm = wrapped.base_model.model
    ours = logits(model)
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-6)
    assert (ours - logits(base)).abs().max() > 0.1
    merged = lora.merged_tensors(model)
    theirs.decoder.lm = wrapped.merge_and_unload()
    expected = model_tensors(theirs)
    assert list(merged) == list(expected) == list(model_tensors(base))
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_which_layers_get_an_adapter() -> None:
    model, _ = adapted("gpt2", targets="c_attn, c_fc")
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in model_tensors(model)}
    assert layers == {"c_attn", "c_fc"}
    rank = {tensor.shape[0] for name, tensor in model_tensors(model).items() if ".lora_A." in name}
    assert rank == {LORA.rank}
    with pytest.raises(UsageError, match=r"no layer 'q_proj'; choices: all-linear, c_attn, c_fc, c_proj"):
        adapted("gpt2", targets="q_proj")
    with pytest.raises(UsageError, match="no layer is named"):
        adapted("gpt2", targets=" , ")
    with pytest.raises(UsageError, match="decoder.kind must be llama, gpt2 or opt"):
        adapted("gru")


def test_missing_extras_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    present = importlib.util.find_spec
    for gone, bits, extra in (("peft", 0, "lora"), ("bitsandbytes", 4, "qlora")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, gone=gone: None if name == gone else present(name))
            with pytest.raises(MissingExtra, match=rf"{gone}, which is not installed.*edgecap\[{extra}\]"):
                adapted("llama", bits=bits)


# --- 4 bits --------------------------------------------------------------------------------------------------------


@needs_4_bits
@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_weights_lie_in_4_bits(kind: str) -> None:
    """Against NF4's own definition (arXiv:2305.14314): blocks of 64, scaled by their largest, 16 levels."""
    import bitsandbytes as bnb

    model, base = adapted(kind, bits=4)
    layers = {name: m for name, m in model.decoder.lm.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == len(lora.linear_layers(base.decoder.lm))
    levels = next(iter(layers.values())).weight.quant_state.code
    assert len(levels) == 16
    for name, layer in layers.items():
        plain = base.decoder.lm.get_submodule(name.removesuffix(".base_layer"))
        weight = plain.weight if isinstance(plain, torch.nn.Linear) else plain.weight.T
        found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        blocks = weight.detach().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = levels[(blocks.div(scale).unsqueeze(-1) - levels).abs().argmin(-1)] * scale
        # The scales are quantized, too, to 8 bits.
        torch.testing.assert_close(found, nearest.view_as(weight), rtol=0, atol=0.02 * float(scale.max()))
        assert layer.weight.numel() == weight.numel() // 2
    assert lora.count_parameters(model.decoder) == lora.count_parameters(base.decoder) + sum(
        tensor.numel() for tensor in model_tensors(model).values()
    )


@needs_4_bits
def test_adapters_on_4_bits_learn_after_a_validation() -> None:
    """Captioning must not turn the weights into a form that gradients do not pass."""
    model, _ = adapted("llama", bits=4)
    before = logits(model)
    for _ in range(2):
        set_modes(model, Stage(), from_scratch=True)
        model.zero_grad()
        model(**views()).logsumexp(-1).sum().backward()
        first = [p.grad for name, p in model.named_parameters() if ".layers.0." in name and lora.is_adapter(name)]
        assert first and all(gradient is not None and gradient.abs().sum() > 0 for gradient in first)
        assert torch.equal(logits(model), before)


@needs_4_bits
def test_a_4_bit_run_merges_into_full_precision(tmp_path: Path, runs: dict[str, tuple[Path, Path]]) -> None:
    base, _ = runs["llama"]
    run, metrics = train(adapter_recipe("llama", bits=4), tmp_path / "qlora", init=base)
    assert metrics["history"][-1]["loss"] < metrics["history"][1]["loss"]
    out, told = merge_adapter(run)
    assert told["proof"]["same_argmax"] == 1.0 and told["adapter"]["bits"] == 4
    assert told["from_4_bits"]["max_difference"] > 100 * told["proof"]["max_difference"]
    assert "not the 4-bit ones it learnt on" in merge.merge_line(told)
    assert load_checkpoint(out).metrics["best"] is None  # nobody has scored this model yet


# --- runs ----------------------------------------------------------------------------------------------------------


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
        for use in (lambda: load_checkpoint(run), lambda: merge_adapter(run, tmp_path / "out")):
            with pytest.raises(UsageError, match=f"the base of the adapter of {run} is gone: put it back at {base}"):
                use()
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


def test_an_adapter_on_pretrained_parts(tmp_path: Path) -> None:
    """Without a checkpoint under it, the base is what the recipe's sources give, by its own hash."""
    source = save_vlm(tmp_path / "vlm")
    stage = {"epochs": 1, "batch_size": 16, "lr": 0.01}
    plain = tiny_recipe(stage, decoder="llama", spec="scenes:train=16,val=4,test=4,size=48", image_size=48)
    recipe = dataclasses.replace(with_vlm(plain, str(source)), lora=LORA)
    run, metrics = train(recipe, tmp_path / "run")
    assert metrics["base"]["checkpoint"] == "" and len(metrics["base"]["sha256"]) == 64
    assert [record["loss"] is None for record in metrics["history"]] == [True, False]
    said = captions(run)
    out, told = merge_adapter(run)
    assert captions(out) == said and told["base"]["name"] == "vlm"
    source.rename(tmp_path / "gone")
    with pytest.raises(UsageError, match="no config.json"):
        load_checkpoint(run)
    assert captions(out) == said  # needs nothing but itself
    save_vlm(source, seed=1)
    with pytest.raises(UsageError, match=f"what the recipe's sources give is not the base of the adapter of {run}"):
        load_checkpoint(run)


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

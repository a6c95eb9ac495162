"""Every recipe that comes with edgecap, with small real parts in place of its own: trained, killed, resumed, exported.

What is small is the sizes; kinds, stages, objectives and everything else are the recipe's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel

from edgecap.benchmarks.datasets import open_dataset
from edgecap.export.pipeline import export
from edgecap.runtime import Captioner
from edgecap.runtime.errors import UsageError
from edgecap.train import loop
from edgecap.train.checkpoint import load_checkpoint
from edgecap.train.evaluate import evaluate
from edgecap.train.merge import merge_adapter
from edgecap.train.recipe import load_recipe, recipe_names
from edgecap.train.run import train
from edgecap.train.settings import Recipe
from edgecap.train.weights import read_weights

from ..train.encoder_parts import STAGES
from ..train.parts import save_gpt2, save_opt
from ..train.vlms import save_vlm

SCENES = "scenes:train=64,val=12,test=6,size=64"
SIZE = 64
MOBILENET = {"depth_multiplier": 0.35, "finegrained_output": False}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
RECURRENT = {"hidden": 24, "embed": 16, "heads": 2}
TRANSFORMER = {"dim": 32, "layers": 2, "heads": 4, "ffn": 48}
GRID = {"bridge": {"dim": 16}}

# Recipe → what of its tables is smaller.
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "mobilenetv2-gru-small": {**GRID, "encoder": {"config": MOBILENET}, "decoder": RECURRENT},
    "mobilenetv2-gru": {**GRID, "encoder": {"config": MOBILENET}, "decoder": RECURRENT},
    "mobilenetv2-gru-slim": {**GRID, "encoder": {"config": MOBILENET}, "decoder": RECURRENT},
    "mobilenetv2-gru-tuned": {**GRID, "encoder": {"config": MOBILENET}, "decoder": RECURRENT},
    "mobilenetv2-transformer": {**GRID, "encoder": {"config": MOBILENET}, "decoder": TRANSFORMER},
    "mobilenetv2-gpt2-small": {
        "encoder": {"config": MOBILENET},
        "bridge": {"dim": 32, "length": 3, "heads": 2},
        "decoder": TRANSFORMER,
    },
    "mobilenetv2-distilgpt2": {
        "encoder": {"config": MOBILENET},
        "bridge": {"dim": 32, "length": 3, "heads": 2, "layers": 1},
        "decoder": {"source": "gpt2"},
    },
    "efficientnet-lstm": {
        **GRID,
        "encoder": {"config": STAGES},
        "decoder": RECURRENT,
    },
    "vit-mini-gru": {**GRID, "encoder": {"config": {**VIT, "image_size": SIZE}}, "decoder": RECURRENT},
    "clip-transformer": {
        **GRID,
        "encoder": {"config": {**VIT, "image_size": SIZE, "projection_dim": 24}},
        "decoder": TRANSFORMER,
    },
    "moda": {
        "encoder": {"config": {**VIT, "image_size": SIZE, "projection_dim": 24}},
        "bridge": {"hidden": 48, "dim": 32},
        "decoder": {"source": "opt"},
    },
    "moda-small": {
        "encoder": {"config": MOBILENET},
        "bridge": {"hidden": 48, "dim": 32},
        "decoder": TRANSFORMER,
    },
    "query-bridge": {
        "encoder": {"config": {**VIT, "image_size": SIZE}},
        "bridge": {"dim": 32, "queries": 4, "heads": 2, "layers": 1, "ffn": 48},
        "text": {"source": "bert", "config": {}, "dim": 24},
    },
    "query-bridge-small": {
        "encoder": {"config": MOBILENET},
        "bridge": {"dim": 32, "queries": 4, "heads": 2, "layers": 1, "ffn": 48},
        "text": {"source": "bert", "config": {}, "dim": 24, "hidden": 32},
    },
    "smolvlm-small": {
        "encoder": {"config": {**VIT, "image_size": SIZE}},
        "bridge": {"dim": 32},
        "decoder": {**TRANSFORMER, "kv_heads": 2, "layers": 1},
        "tokenizer": {"vocab_size": 340},
    },
    "smolvlm-lora": {"vlm": {}, "lora": {"rank": 4}},
    "smolvlm-qlora": {"vlm": {}, "lora": {"rank": 4}},
}
# Of recipes that have the same parts, the last is exported: what differs is how they learn.
EXPORTED = {
    (recipe.encoder.kind, recipe.bridge["kind"], recipe.decoder["kind"], "source" in SMALL[name].get("decoder", {}),
     recipe.lora.rank, recipe.lora.bits): name
    for name, recipe in ((name, load_recipe(name)) for name in sorted(SMALL))
}.values()  # fmt: skip
DROPPED = (
    "source",
    "dim",
    "layers",
    "heads",
    "ffn",
    "max_positions",
    "config",
    "head_dim",
    "kv_heads",
)  # a source's own
STAGE = {"batch_size": 8, "warmup": 2, "lr": 4e-3, "keep_every": 2}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models as a hub has them, by what they stand in for."""
    folder = tmp_path_factory.mktemp("parts")
    return {
        "opt": save_opt(folder / "opt"),
        "gpt2": save_gpt2(folder / "gpt2"),
        "vlm": save_vlm(folder / "vlm"),
        "bert": save_bert(folder / "bert"),
    }


def save_bert(folder: Path) -> Path:
    """A DistilBERT whose words are those of the scenes."""
    words = sorted({w for e in open_dataset(SCENES).splits["train"] for c in e.captions for w in c.lower().split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(words) + 5, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    DistilBertModel(config).save_pretrained(folder)
    return folder


def small(name: str, parts: dict[str, Path]) -> Recipe:
    """The recipe with the sizes of SMALL, few epochs and few photos."""
    whole, changes = load_recipe(name), dict(SMALL[name])
    from_vlm = changes.pop("vlm", None) is not None
    for table, values in changes.items():
        own = getattr(whole, table)
        values = {key: str(parts[value]) if key == "source" else value for key, value in values.items()}
        if isinstance(own, dict):
            kept = {k: v for k, v in own.items() if not ("source" in values and k in DROPPED)}
            whole = dataclasses.replace(whole, **{table: {**kept, **values}})
        else:
            values = {"source": "", **values} if table == "encoder" else values
            whole = dataclasses.replace(whole, **{table: dataclasses.replace(own, **values)})
    if from_vlm:
        from edgecap.train.smolvlm import with_vlm

        whole = with_vlm(whole, str(parts["vlm"]))
    side = whole.data.image_size if from_vlm else SIZE
    data = dataclasses.replace(whole.data, spec=SCENES, image_size=side, val_photos=0)
    first = [dataclasses.replace(whole.stages[0], **STAGE, epochs=3, accumulate=min(whole.stages[0].accumulate, 2))]
    later = [dataclasses.replace(stage, **STAGE, epochs=1, accumulate=1) for stage in whole.stages[1:]]
    fitted = dataclasses.replace(whole.tokenizer, min_count=1, max_length=12)
    decoding = dataclasses.replace(whole.decoding, max_length=12)
    return dataclasses.replace(whole, data=data, tokenizer=fitted, decoding=decoding, stages=tuple(first + later))


@pytest.fixture(scope="module")
def critic(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers that have learnt the training scenes by heart: a critic must know the photos it judges."""
    out, recipe = tmp_path_factory.mktemp("critic") / "towers", small("query-bridge", parts)
    settings = {"epochs": 60, "validate_every": 60, "keep_every": 0, "batch_size": 16, "lr": 3e-3}
    stage = dataclasses.replace(recipe.stages[0], **settings, accumulate=1, schedule="constant")
    text = dataclasses.replace(recipe.text, pool="mean")  # says more than [CLS] where nothing is pretrained
    train(dataclasses.replace(recipe, text=text, stages=(stage,)), out)
    return out


def killed_and_resumed(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch, critic: str | None) -> Any:
    """Train with a kill behind the second epoch of the first stage; returns the metrics of the run that went on."""
    save = loop.Trainer._save

    def mortal(self: loop.Trainer) -> None:
        save(self)
        if self.state["stage"] == 0 and self.state["epoch"] == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_save", mortal)
        train(recipe, out, critic=critic)
    return train(None, out, resume=True)[1]


def test_every_recipe_is_here() -> None:
    assert sorted(SMALL) == recipe_names()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_recipe_from_training_to_captions(
    name: str, parts: dict[str, Path], critic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(name, parts)
    if recipe.lora.bits:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: pip install 'edgecap[qlora]'")
    judged = recipe.watch == "alignment" or any(stage.objective == "guided" for stage in recipe.stages)
    judge = str(critic) if judged else None
    whole, _ = train(recipe, tmp_path / "whole", critic=judge)
    metrics = killed_and_resumed(recipe, tmp_path / "run", monkeypatch, judge)
    assert metrics["finished"] and [record["stage"] for record in metrics["history"]][-1] == recipe.stages[-1].name
    history = [record for record in metrics["history"] if record["loss"] is not None]  # None: before the first step
    losses = [record["loss"] for record in history if record["stage"] == recipe.stages[0].name]
    assert losses[-1] < losses[0] * 0.97, losses
    ours, theirs = read_weights(tmp_path / "run"), read_weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) and set(ours) == set(theirs)
    run = tmp_path / "run"
    kept = load_checkpoint(run / "kept" / f"1-{recipe.stages[0].name}-002")
    assert kept.metrics["kept"] == 2
    if recipe.task == "retrieval":
        scores = evaluate(run, spec=None, split="val", limit=None, decoding={})["scores"]
        assert scores["image_to_text"]["recall_10"]["value"] > 0
        with pytest.raises(UsageError, match="no captions"):
            export(run, target="onnx-fp32", out=tmp_path / "x.edgecap")
        return
    if recipe.lora.rank:
        with pytest.raises(UsageError, match="edgecap merge"):
            export(run, target="onnx-fp32", out=tmp_path / "x.edgecap")
        run, _ = merge_adapter(run, tmp_path / "merged", photos=4)
    photos = [example.load() for example in open_dataset(SCENES).splits["test"]]
    said = evaluate(run, spec=None, split="test", limit=None, decoding={})["captions"]
    assert len(said) == len(photos)
    if name not in EXPORTED:
        return
    for target in ("onnx-fp32", "onnx-int8"):
        result = export(run, target=target, out=tmp_path / f"{target}.edgecap", max_cider_drop=10, calibration=8)
        assert result.gate.passed
        with Captioner.load(result.path) as captioner:
            captions = [captioner(photo).text for photo in photos]
        if target == "onnx-fp32":
            assert captions == [line["caption"] for line in said]

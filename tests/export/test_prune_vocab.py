"""A language model without the tokens that captions do not use gives the very same logits for those that are left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgecap.benchmarks.datasets import open_dataset
from edgecap.cli import cli
from edgecap.export.prune import prune_checkpoint
from edgecap.train.checkpoint import METRICS, RECIPE, TOKENIZER, WEIGHTS, Checkpoint, load_checkpoint, model_for
from edgecap.train.pretrained import open_captions
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.state import model_tensors, write_bytes, write_json, write_tensors
from edgecap.train.tokenizer import caption_text, token_ids

from ..train.parts import save_gpt2, save_llama, save_opt, save_tinyllama
from .nets import SCENES, SIZE, photos

PROMPT = {"prompt": {"text": "A photo of"}}
MODELS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", save_gpt2, {}, PROMPT),
    "gpt2-untied": ("gpt2", save_gpt2, {"tie_word_embeddings": False}, {}),
    "opt": ("opt", save_opt, {}, PROMPT),
    "opt-untied": ("opt", save_opt, {"tie_word_embeddings": False}, {}),
    "llama": ("llama", save_llama, {}, {"prompt": {"chat": "describe this picture"}}),
    "llama-untied": ("llama", save_llama, {"tied": False}, {}),
    "tinyllama": ("llama", save_tinyllama, {}, {}),  # its own pieces, and bytes where they do not serve
}
FOREIGN = ["a zebra's hat", "ünïcode 🦓 日本", "two  spaces", "x" * 30]


def corpus() -> list[str]:
    return [caption_text(c) for example in open_dataset(SCENES).splits["train"] for c in example.captions]


def save_untrained(folder: Path, name: str) -> Checkpoint:
    kind, save, config, more = MODELS[name]
    recipe = recipe_from_dict(
        {
            "name": name,
            "data": {"spec": SCENES, "image_size": SIZE},
            "tokenizer": {"kind": "pretrained", "max_length": 30},
            "encoder": {"kind": "small"},
            "bridge": {"kind": "linear", "dim": 16},
            "decoder": {"kind": kind, "source": str(save(folder / "model", **config))},
            "decoding": {"max_length": 12},
            **more,
        }
    )
    tokenizer, recipe = open_captions(recipe, corpus())
    torch.manual_seed(0)
    model = model_for(recipe, token_ids(tokenizer, recipe.tokenizer.ids), load_weights=True)
    out = folder / "run"
    write_bytes(out / TOKENIZER, tokenizer.to_str().encode())
    write_bytes(out / RECIPE, recipe.to_toml().encode())
    write_tensors(out / WEIGHTS, model_tensors(model), {"format": "pt"})
    write_json(out / METRICS, {"finished": True, "best": {"cider": 0.1}})
    return load_checkpoint(out)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_kept_tokens_are_the_same_bits(small: None, tmp_path: Path, name: str) -> None:
    whole = save_untrained(tmp_path, name)
    prune_checkpoint(whole, ["vocab=used"], pixels=photos(2), captions=[[5], [6]], corpus=corpus(), out=tmp_path / "p")
    few = load_checkpoint(tmp_path / "p")
    ours, theirs = (c.tokenizer.inner.get_vocab(with_added_tokens=True) for c in (few, whole))
    assert len(ours) < len(theirs) and few.tokens["vocab_size"] == len(ours)
    heads = [(c.model.decoder.embedding.weight, c.model.decoder.lm.lm_head.weight) for c in (whole, few)]
    tied = [embedding.data_ptr() == head.data_ptr() for embedding, head in heads]
    assert tied == [not name.endswith("untied") and name != "tinyllama"] * 2
    assert sum(p.numel() for p in few.model.parameters()) < sum(p.numel() for p in whole.model.parameters())

    old = torch.tensor([theirs[token] for token, _ in sorted(ours.items(), key=lambda entry: entry[1])])
    text = corpus()[0]
    words = few.tokenizer.encode(text)
    assert old[words].tolist() == whole.tokenizer.encode(text)  # the same tokens
    ids = torch.tensor([[[few.tokens["bos"], *words]]] * 2)
    pixels = torch.from_numpy(photos(2))
    with torch.no_grad():
        now, before = few.model(ids, pixels=pixels), whole.model(old[ids], pixels=pixels)
    assert torch.equal(now, before[..., old])
    sessions = [(c.model.session(), rows) for c, rows in ((few, np.arange(len(old))), (whole, old.numpy()))]
    starts = [session.start(pixels.numpy())[:, rows] for session, rows in sessions]
    steps = [session.step(rows[[words[0]] * 2], np.arange(2))[:, rows] for session, rows in sessions]
    # Of a few rows alone: a product with fewer columns may be added up in another order.
    for pair in (starts, steps):
        np.testing.assert_allclose(*pair, rtol=0, atol=2e-6 * np.abs(pair[0]).max())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "tinyllama"])
def test_any_text_can_still_be_said(small: None, tmp_path: Path, name: str) -> None:
    whole = save_untrained(tmp_path, name)
    prune_checkpoint(whole, ["vocab=9999"], pixels=photos(1), captions=[[5]], corpus=corpus(), out=tmp_path / "p")
    few = load_checkpoint(tmp_path / "p")
    assert few.tokens["vocab_size"] < whole.tokens["vocab_size"]
    for text in [*FOREIGN, *corpus()[:5]]:
        assert few.tokenizer.decode(few.tokenizer.encode(text)).strip() == text


def test_the_command_makes_a_checkpoint_to_train_on(small: None, tmp_path: Path) -> None:
    whole = save_untrained(tmp_path, "gpt2")
    out = tmp_path / "small"
    done = CliRunner().invoke(cli, ["prune", str(whole.path), "vocab=used", "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["path"] == str(out) and told["from"] == whole.sha256 and told["items"] == ["vocab=used"]
    assert told["after"]["bytes"] < told["before"]["bytes"]
    first = load_checkpoint(out).sha256
    line = CliRunner().invoke(cli, ["prune", str(whole.path), "vocab=used"])
    assert line.exit_code == 0 and "M parameters" in line.stdout
    assert load_checkpoint(whole.path / "pruned" / "vocabused").sha256 == first
    again = CliRunner().invoke(cli, ["prune", str(whole.path), "vocab=3", "-o", str(out)])
    assert again.exception is not None and "holds what vocab=used left" in str(again.exception)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / TOKENIZER).write_text("mine")
    kept = CliRunner().invoke(cli, ["prune", str(whole.path), "vocab=3", "-o", str(tmp_path / "other")])
    assert "not an empty folder" in str(kept.exception) and (tmp_path / "other" / TOKENIZER).read_text() == "mine"

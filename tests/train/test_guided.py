"""The guided losses act on what the model says, and a run keeps its critic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors

from edgecap.benchmarks.datasets import open_dataset
from edgecap.runtime.errors import UsageError
from edgecap.train import loop
from edgecap.train.checkpoint import load_checkpoint
from edgecap.train.critic import Critic
from edgecap.train.data.batches import Batch, encode_captions
from edgecap.train.evaluate import evaluate, score_lines
from edgecap.train.objectives.guided import Guided, alignment_loss, contrast_loss, diversity_loss
from edgecap.train.prepare import prepare_recipe
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.settings import Stage
from edgecap.train.start import START, Helpers
from edgecap.train.state import WEIGHTS
from edgecap.train.tokenizer import caption_text, train_tokenizer

from .critic_parts import DATA, LOSSES, QUIET, Knowing, captions_of, clip_folder, towers_critic, wordpiece
from .parts import save_gpt2
from .tiny import ENCODER, SIZE, tiny_model, tiny_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def world(**weights: float) -> tuple[Guided, Any, Batch]:
    """A guided objective of towers over a small GPT-2, and a fixed batch."""
    recipe = tiny_recipe(decoder="gpt2")
    examples = list(open_dataset(DATA).splits["train"])[:8]
    tokenizer = train_tokenizer(captions_of(), recipe.tokenizer)
    ids = encode_captions(examples, tokenizer, max_length=12, captions=3)
    model = tiny_model("gpt2", vocab_size=tokenizer.get_vocab_size()).train()
    pixels = torch.from_numpy(np.stack([np.asarray(e.load().resize((SIZE, SIZE))) for e in examples]))
    batch = Batch(torch.from_numpy(ids), np.arange(8), features=model.encoder(pixels).detach())
    stage = Stage(objective="guided", label_smoothing=0.0, **weights)
    critic = towers_critic(kind=Knowing)
    return Guided(recipe, stage, tokenizer, examples, Helpers(critic=critic)), model, batch


def guided_part(objective: Guided, model: Any, batch: Batch, *, seed: int = 0) -> torch.Tensor:
    """The critic's share of the loss alone, with the same captions drawn."""
    torch.manual_seed(seed)
    whole, _ = objective.loss(model, model, batch)
    logits = model(batch.inputs, batch.keep, **batch.view)
    return (whole - F.cross_entropy(logits, batch.targets, reduction="sum")) / len(logits)


# --- the losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_moves_the_decoder_and_never_the_critic(name: str) -> None:
    objective, model, batch = world(**{name: 1.0})
    model.eval()
    guided_part(objective, model, batch).backward()
    gradients = {key: p.grad for key, p in model.decoder.named_parameters() if p.grad is not None}
    assert len(gradients) > 20 and all(bool(torch.isfinite(g).all()) for g in gradients.values())
    touched = [key for key, g in gradients.items() if float(g.abs().max()) > 1e-6]
    assert any("attn" in key for key in touched) and any("mlp" in key for key in touched)
    assert model.bridge.project.weight.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in objective.critic.judge.model.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone_falls_when_it_is_optimised(name: str) -> None:
    objective, model, batch = world(**{name: 1.0})
    model.eval()
    optimizer = torch.optim.Adam([*model.bridge.parameters(), *model.decoder.parameters()], lr=2e-3)
    values = []
    for step in range(32):
        loss = guided_part(objective, model, batch, seed=step % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert np.mean(values[-6:]) < np.mean(values[:6]) - 0.05


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_the_mixture_are_finite_differences(name: str) -> None:
    objective, _, batch = world(**{name: 1.0})
    objective.hard = False
    judge = objective.critic.judge.model.double()
    objective.critic.vocabulary = objective.critic.vocabulary.double()
    seen = objective.photos[batch.photos].double()
    torch.manual_seed(1)
    logits = torch.randn(len(batch.targets), objective.special["vocab_size"], dtype=torch.double, requires_grad=True)
    scale = objective.critic.scale
    losses = {
        "alignment": lambda said: alignment_loss(said, seen),
        "contrast": lambda said: contrast_loss(said, seen, scale),
        "diversity": diversity_loss,
    }

    # The towers give float32 at the end: steps as long as that needs.
    def value(at: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return losses[name](objective.say(at, batch).double())

    value(logits).backward()
    direction = logits.grad / logits.grad.norm()
    step = 0.02
    with torch.no_grad():
        slope = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    assert judge.training is False
    torch.testing.assert_close(slope.double(), logits.grad.norm(), rtol=0.02, atol=1e-5)


def test_straight_through_says_the_likeliest_words_and_learns_as_the_mixture_does() -> None:
    objective, _, _ = world(alignment=1.0)
    logits = torch.randn(5, objective.special["vocab_size"], requires_grad=True)
    logits.data[:, objective.special["pad"]] = 50.0  # never said, however likely
    words = objective.speak(logits)
    said = logits.detach().clone()
    said[:, [objective.special[name] for name in ("pad", "bos", "unk")]] = -1e9
    torch.testing.assert_close(words, objective.critic.vocabulary[said.argmax(1)])
    weight = torch.randn_like(words)
    (hard,) = torch.autograd.grad((words * weight).sum(), logits)
    objective.hard = False
    (soft,) = torch.autograd.grad((objective.speak(logits) * weight).sum(), logits)
    torch.testing.assert_close(hard, soft)


def test_the_critic_hears_the_words_of_one_caption_without_its_end() -> None:
    objective, _, batch = world(alignment=1.0)
    certain = torch.full((len(batch.targets), objective.special["vocab_size"]), -30.0)
    certain[torch.arange(len(certain)), batch.targets] = 30.0
    torch.manual_seed(0)
    said = objective.say(certain, batch)
    texts = [[caption_text(c) for c in e.captions[:3]] for e in open_dataset(DATA).splits["train"][:8]]
    for row, captions in zip(said, texts, strict=True):
        short = [" ".join(caption.split()[:12]) for caption in captions]
        assert (torch.from_numpy(objective.critic.texts(short)) @ row).max() > 0.99


def test_losses_are_what_their_papers_say() -> None:
    said, seen = F.normalize(torch.randn(5, 7), dim=1), F.normalize(torch.randn(5, 7), dim=1)
    torch.testing.assert_close(alignment_loss(said, seen), 1 - F.cosine_similarity(said, seen).mean())
    logits = 10 * said @ seen.T
    rows, columns = logits.log_softmax(1).diag().mean(), logits.log_softmax(0).diag().mean()
    torch.testing.assert_close(contrast_loss(said, seen, 10.0), -(rows + columns) / 2)
    pairs = [(said[i] - said[j]).square().sum() for i in range(5) for j in range(i)]
    torch.testing.assert_close(diversity_loss(said), torch.stack([(-2 * d).exp() for d in pairs]).mean().log())
    assert float(diversity_loss(said[:1].expand(4, -1))) == pytest.approx(0.0, abs=1e-5)
    # Two camps of the same caption are less diverse than as many different ones, though both sum to zero.
    camps = torch.eye(4)[[0, 0]].repeat(2, 1) * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    corners = torch.cat((torch.eye(4)[:2], -torch.eye(4)[:2]))
    assert diversity_loss(camps) > diversity_loss(corners) + 0.2


def test_half_precision_leaves_the_contrast_alone() -> None:
    """Cosines times 100 in bfloat16 would be off by a tenth."""
    said, seen = (F.normalize(torch.randn(12, 16), dim=1) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        halved = contrast_loss(said, seen, 100.0)
    torch.testing.assert_close(halved, contrast_loss(said, seen, 100.0))


def test_a_weight_of_zero_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgecap.train.objectives.guided as guided

    objective, model, batch = world(contrast=0.5)
    for name in ("alignment_loss", "diversity_loss"):
        monkeypatch.setattr(guided, name, None)  # a call would raise
    _, figures = objective.loss(model, model, batch)
    assert set(figures) == {"cosine", "contrast"}
    with pytest.raises(UsageError, match="stages.0: .* a weight above 0"):
        tiny_recipe({"objective": "guided"})


# --- the run -------------------------------------------------------------------------------------------------------


def retrieval_run(folder: Path) -> Path:
    """Two small towers, trained a little by their own recipe."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    inner = wordpiece(300)
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder / "text")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=inner.get_vocab_size(), max_position_embeddings=40, **sizes)).save_pretrained(
        folder / "text"
    )
    recipe = recipe_from_dict(
        {
            "name": "towers",
            "task": "retrieval",
            "data": {"spec": DATA, "image_size": SIZE, "captions_per_photo": 1},
            "encoder": ENCODER,
            "bridge": {"kind": "linear", "dim": 16},
            "text": {"source": str(folder / "text"), "max_length": 16, "dim": 24},
            "stages": [{"objective": "infonce", "epochs": 1, "batch_size": 12, "lr": 1e-3}],
        }
    )
    return train(recipe, folder / "towers")[0]


def test_a_guided_run_keeps_its_critic_and_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = retrieval_run(tmp_path)
    texts, ours = captions_of("val"), load_checkpoint(judge)
    with torch.inference_mode():
        expected = ours.model.read_with(ours.tokenizer.inner).embed_texts(texts).numpy()
    np.testing.assert_allclose(Critic.load(judge).texts(texts), expected, atol=1e-5)
    monkeypatch.setattr(Critic, "check_knows", QUIET)  # it learnt for two steps
    guided = {"objective": "guided", "alignment": 1.0, "contrast": 0.1, "diversity": 0.1}
    stage = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "keep_every": 1, **guided}
    recipe = dataclasses.replace(tiny_recipe(stage, decoder="gpt2", spec=DATA), watch="alignment")
    with pytest.raises(UsageError, match="needs --critic"):
        train(recipe, tmp_path / "none")
    loads, load = [], Critic.load
    with monkeypatch.context() as patch:
        patch.setattr(Critic, "load", lambda source: loads.append(source) or load(source))
        whole, metrics = train(recipe, tmp_path / "whole", critic=str(judge))
    assert loads == [str(judge)]
    assert metrics["metric"] == "alignment"
    assert metrics["best"]["alignment"] == max(record["alignment"] for record in metrics["history"])
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    assert len(list((whole / "kept").iterdir())) == 2

    step, steps = loop.Trainer._step, []

    def killed(self: Any, *args: Any) -> Any:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(step(self, *args))
        return steps[-1]

    monkeypatch.setattr(loop.Trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", critic=str(judge))
    monkeypatch.setattr(loop.Trainer, "_step", step)
    start = json.loads((tmp_path / "killed" / START).read_text())
    assert start["critic"] == str(judge.resolve()) and start["critic_sha256"] == Critic.load(judge).sha256
    (tmp_path / "killed" / START).write_text(json.dumps({**start, "critic_sha256": "0" * 64}))
    with pytest.raises(UsageError, match="has changed"):
        train(None, tmp_path / "killed", resume=True)
    (tmp_path / "killed" / START).write_text(json.dumps(start))
    train(None, tmp_path / "killed", resume=True)
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()

    record = evaluate(whole, spec=None, split="test", limit=None, decoding={}, critic=str(judge))
    assert -1 <= record["scores"]["alignment"]["captions"] <= 1
    assert any("alignment" in line for line in score_lines(record))
    with pytest.raises(UsageError, match="is a captioner"):
        Critic.load(whole)


def test_the_distilgpt2_recipe_learns_words_and_is_then_guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small GPT-2 of transformers, whose BOS is its EOS, and a small CLIP as critic."""
    monkeypatch.setattr(Critic, "check_knows", QUIET)  # its weights are random
    small = ("data.image_size=64", "bridge.dim=32", "bridge.layers=1", "bridge.heads=2", "bridge.length=4")
    brief = [f"stages.{i}.{key}" for i in range(2) for key in ("epochs=3", "batch_size=12", "lr=1e-3", "keep_every=0")]
    recipe = prepare_recipe(
        "mobilenetv2-distilgpt2", data=DATA, encoder=None, decoder=str(save_gpt2(tmp_path / "gpt2")), seed=None,
        overrides=(*small, *brief, "stages.0.warmup=0", "stages.1.warmup=0"), skip_bad=False,
    )  # fmt: skip
    recipe = dataclasses.replace(
        recipe, encoder=dataclasses.replace(recipe.encoder, source="", config=ENCODER["config"])
    )
    out, metrics = train(recipe, tmp_path / "run", critic=str(clip_folder(tmp_path / "clip")))
    history = {(r["stage"], r["epoch"]): r for r in metrics["history"]}
    assert history["words", 3]["loss"] < history["words", 1]["loss"]
    # That the losses fall is tested above; with a random critic, whose merges of pieces come in any order, it is luck
    # here. That they are added is none: an alignment near 0 costs its weight of 4 a word.
    assert history["guided", 1]["loss"] > history["words", 3]["loss"] + 2
    assert all(-1 <= r["alignment"] <= 1 for r in metrics["history"])
    loaded = load_checkpoint(out)  # without its sources
    assert loaded.tokens["bos"] == loaded.tokens["eos"]
    critic = Critic.load(tmp_path / "clip").read_with(loaded.tokenizer.inner, loaded.tokens)
    weight = critic.judge.embedding.weight
    torch.testing.assert_close(critic.vocabulary[loaded.tokens["eos"]], weight[critic.judge.eos])

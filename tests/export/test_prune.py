"""Pruning takes out what does nothing without a trace, keeps the rest right, and gives checkpoints like any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecap.benchmarks.datasets import open_dataset
from edgecap.export.prune import cost, parse_items, prune_checkpoint, prune_passes
from edgecap.export.prune_decoder import Captioned, drop_layers, narrow
from edgecap.export.prune_encoder import prune_encoder
from edgecap.export.prune_reconstruct import elimination, kept, refit
from edgecap.export.prune_recover import recover, recovery_stages
from edgecap.export.prune_vocab import shrink_vocab
from edgecap.export.trunk import to_onnx
from edgecap.runtime.errors import UsageError
from edgecap.train import loop
from edgecap.train.checkpoint import METRICS, WEIGHTS, Checkpoint, load_checkpoint
from edgecap.train.data.batches import Batch
from edgecap.train.models import build_model
from edgecap.train.models.encoders import Encoder
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.settings import TokenizerSettings
from edgecap.train.state import write_json
from edgecap.train.tokenizer import caption_text, token_ids, train_tokenizer

from ..train.tiny import SIZE, tiny_model, tiny_recipe
from .nets import SCENES, engine, photos, save_run

TOKENS = {"bos": 1, "eos": 2}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def corpus() -> list[str]:
    return [caption_text(c) for example in open_dataset(SCENES).splits["train"] for c in example.captions]


def pruned(loaded: Checkpoint, out: Path, *items: str) -> Checkpoint:
    random = np.random.default_rng(2)
    words = [random.integers(4, loaded.tokens["vocab_size"], 6).tolist() for _ in range(24)]
    size = loaded.preprocess.size[0]
    prune_checkpoint(loaded, items, pixels=photos(24, size), captions=words, corpus=corpus(), out=out)
    return load_checkpoint(out)


def seen(model: torch.nn.Module, count: int = 12, vocab: int = 40) -> Captioned:
    """Random memories and captions in the place of photos."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, vocab, (count, 2, 7), generator=generator)
    ids[:, :, 0] = 1
    captioned = Captioned(model, iter(()))
    captioned.rows = [(torch.randn(count, 5, 16, generator=generator), Batch(ids, np.arange(count)))]
    return captioned


def logits(model: torch.nn.Module, captioned: Captioned) -> torch.Tensor:
    memory, batch = captioned.rows[0]
    with torch.no_grad():
        return model.decoder(memory, batch.inputs)


def smaller(model: torch.nn.Module, kind: str, options: dict, tensors: dict, vocab: int = 40) -> torch.nn.Module:
    from ..train.tiny import DECODERS

    small = tiny_model(kind, vocab_size=vocab)
    other = build_model(
        encoder={"kind": "small", "config": {}},
        bridge={"kind": "linear", "dim": 16},
        decoder={**DECODERS[kind], **options},
        vocab_size=vocab,
        bos_id=1,
        size=(32, 32),
    )
    other.decoder.load_state_dict(tensors)
    small.decoder = other.decoder
    return small


# --- decoders: what does nothing can go without a trace --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("gru", "hidden"),
        ("lstm", "hidden"),
        ("transformer", "ffn"),
        ("transformer", "heads"),
        ("llama", "ffn"),
        ("llama", "heads"),
        ("gpt2", "ffn"),
        ("opt", "ffn"),
    ],
)
def test_units_that_nothing_reads_go_without_a_trace(kind: str, key: str) -> None:
    """Silences units by the decoder's own description, then checks against the unchanged forward pass."""
    model = tiny_model(kind)
    widths = [width for width in model.decoder.widths() if width.key == key]
    with torch.no_grad():
        for width in widths:
            # Of heads one in each group of a key-value head: as many of each have to go.
            silent = [0, 3] if key == "heads" else [1, 4, 5, 11][: width.units // 4]
            for reader in width.readers:
                weight = model.decoder.get_submodule(reader.module).weight
                places = reader.index[silent].flatten()
                weight[(slice(None), places) if reader.dim == 1 else places] = 0.0
    share = (2 if key == "heads" else len(silent)) / widths[0].units
    captioned = seen(model)
    before = logits(model, captioned)
    options, tensors = narrow(model, {key: share + 1e-6}, captioned)
    assert options[key] == widths[0].units - round(share * widths[0].units)
    small = smaller(model, kind, options, tensors)
    assert sum(p.numel() for p in small.decoder.parameters()) < sum(p.numel() for p in model.decoder.parameters())
    torch.testing.assert_close(logits(small, captioned), before, rtol=1e-4, atol=2e-4)
    # A step with state agrees with teacher forcing, so the sizes that the session uses are right, too.
    memory, batch = captioned.rows[0]
    with torch.no_grad():
        photo = small.decoder.photo(memory)
        first, state = small.decoder.begin(photo, batch.ids[:, 0, :1])
        second, _ = small.decoder.advance(batch.ids[:, 0, 1], torch.arange(len(memory)), photo, state)
    whole = logits(small, captioned)[:, 0]
    torch.testing.assert_close(torch.stack([first, second], 1), whole[:, :2], rtol=1e-4, atol=2e-4)


def test_the_layer_that_matters_least_goes() -> None:
    for kind in ("llama", "gpt2", "opt", "transformer"):
        model = tiny_model(kind)
        with torch.no_grad():
            for name, parameter in model.decoder.get_submodule(f"{model.decoder.stack}.0").named_parameters():
                if name.split(".")[-2] in ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "out", "down"):
                    parameter.zero_()  # adds nothing to the residual stream
        captioned = seen(model)
        whole = logits(model, captioned)
        skipped, losses = [], []
        for layer in range(2):
            with model.decoder.without(layer):
                skipped.append(logits(model, captioned))
                losses.append(captioned.loss())
        assert torch.equal(skipped[0], whole) and not torch.allclose(skipped[1], whole, atol=0.1)
        gone, tensors = drop_layers(model, 1, captioned, lambda *told: None)
        assert gone == [int(np.argmin(losses))]
        assert torch.equal(logits(model, captioned), whole)  # the model itself is left as it was
        small = smaller(model, kind, {"layers": 1}, tensors)
        torch.testing.assert_close(logits(small, captioned), skipped[gone[0]], rtol=1e-5, atol=1e-5)
        with pytest.raises(UsageError, match="2 layers and keeps at least one"):
            drop_layers(model, 2, captioned, lambda *told: None)


# --- least squares ---------------------------------------------------------------------------------------------------


def test_refit_reproduces_outputs_of_dependent_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=generator, dtype=torch.float64)
    x[:, 5] = x[:, 1] - 2 * x[:, 2]  # says nothing new
    x[:, 7] *= 1e-3  # says little
    weight = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    order, errors = elimination(weight, gram, torch.arange(8).unsqueeze(1), 5)
    assert set(order[:2]) & {1, 2, 5} and 7 in order[:2]
    assert errors == sorted(errors) and errors[1] < 1e-3 < errors[-1] < 1
    keep = torch.tensor(kept(8, order, 2))
    torch.testing.assert_close(x[:, keep] @ refit(weight, gram, keep).T, x @ weight.T, rtol=0, atol=0.05)
    plain = x[:, keep] @ weight[:, keep].T
    assert (plain - x @ weight.T).abs().max() > 1.0  # dropping alone does not do it
    assert kept(6, [4, 5, 3, 0, 1, 2], 2, (0, 0, 0, 1, 1, 1)) == [1, 2, 3, 5]


# --- encoder ---------------------------------------------------------------------------------------------------------


def test_encoder_channels_that_are_silent_go_without_a_trace() -> None:
    torch.manual_seed(0)
    model = build_model(
        encoder={"kind": "mobilenet_v2", "config": {"depth_multiplier": 0.35, "finegrained_output": False}},
        bridge={"kind": "linear", "dim": 16},
        decoder={"kind": "gru", "hidden": 8, "embed": 8, "heads": 2},
        vocab_size=10,
        bos_id=1,
        size=(SIZE, SIZE),
    )
    body, silent = model.encoder.body, 0
    with torch.no_grad():
        for layer in body.layer:
            width = layer.reduce_1x1.convolution.in_channels
            layer.reduce_1x1.convolution.weight[:, : width // 2] = 0.0
            silent += width // 2
        model.bridge.project.weight[:, ::2] = 0.0
    total = sum(layer.reduce_1x1.convolution.in_channels for layer in body.layer)
    pixels = torch.from_numpy(photos(16, SIZE))
    with torch.no_grad():
        before = model.memory(pixels=pixels)
    size = cost(model)["parameters"]["encoder"]
    prune_encoder(model, {"encoder": 0.2, "features": 0.5}, pixels.numpy(), lambda *told: None)
    with torch.no_grad():
        torch.testing.assert_close(model.memory(pixels=pixels), before, rtol=1e-3, atol=1e-3)
    assert model.bridge.project.in_features == model.encoder.dim == body.conv_1x1.convolution.out_channels == 224
    left = sum(layer.reduce_1x1.convolution.in_channels for layer in body.layer)
    assert total - silent <= left < total * 0.85 and cost(model)["parameters"]["encoder"] < 0.8 * size
    for layer in body.layer:  # depthwise convolutions follow, the residual stream stays
        depthwise = layer.conv_3x3.convolution
        assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == len(depthwise.weight)


# --- recovery ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_recovery_learns_from_the_teacher_and_survives_kills(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Encoder, "settings", lambda self: {})  # the small body is not transformers'
    teacher = save_run(tmp_path / "run")
    start = tmp_path / "run-pruned"
    pruned(load_checkpoint(teacher), start, "features=0.5,hidden=0.5,vocab=12")
    settings = {"epochs": 5, "teacher": teacher, "encoder_lr": 1e-4}
    whole = recover(start, out=tmp_path / "whole", **settings)
    history = whole.metrics["history"]
    assert history[0]["epoch"] == 0 and history[0]["loss"] is None  # the pruned weights are judged first
    assert history[-1]["loss"] < history[1]["loss"]
    assert whole.metrics["pruned"] == load_checkpoint(start).metrics["pruned"]
    assert whole.model.encoder.dim == 12 and whole.recipe.decoder["hidden"] == 12

    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    step, left = loop.Trainer._step, [0]

    def mortal(self: loop.Trainer, *args: object) -> tuple[float, int, dict[str, float]]:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", mortal)
        for left[0] in (0, 2, 1):
            with pytest.raises(Killed):
                recover(start, **settings)
    out = tmp_path / "run-pruned-recovered"
    with pytest.raises(UsageError, match="training .* has not finished"):
        load_checkpoint(out)
    resumed, _ = train(None, out, resume=True)  # as edgecap train --resume does
    assert load_checkpoint(resumed).sha256 == whole.sha256
    assert recover(start, **settings).sha256 == whole.sha256  # finished: nothing is trained again
    with pytest.raises(UsageError, match="holds another run"):
        recover(start, epochs=2, teacher=teacher)


def test_recovery_learns_the_teachers_words_or_does_what_the_recipe_did() -> None:
    recipe = tiny_recipe({"epochs": 3, "lr": 2e-3, "teacher_captions": 2}, {"objective": "scst", "lr": 1e-4})
    words, critic = recovery_stages(recipe, 5, taught=False)
    assert (words.objective, words.epochs, words.lr) == ("xe", 3, 1e-3)
    assert not words.teacher_captions
    assert (critic.objective, critic.epochs, critic.lr) == ("scst", 2, 1e-4)
    (only,) = recovery_stages(recipe, 5, taught=True)
    assert (only.objective, only.epochs, only.encoder_lr, only.match) == ("distill", 5, 0.0, 0.0)
    (only,) = recovery_stages(recipe, 5, taught=True, encoder_lr=1e-4)
    assert (only.encoder_lr, only.match, only.batchnorm) == (1e-4, 1.0, "frozen")
    (only,) = recovery_stages(tiny_recipe(), 5, taught=False, encoder_lr=1e-4)
    assert (only.objective, only.epochs, only.encoder_lr, only.match) == ("xe", 5, 1e-4, 0.0)
    # What the first training was given to learn from, and which blocks, is not there any more.
    more = {"keep_every": 1, "encoder_lr": 1e-4, "unfreeze_blocks": 2}
    taught = {**more, "teacher_captions": 2, "curriculum": 2}
    stages = recovery_stages(tiny_recipe(taught, {**more, "objective": "scst", "match": 1.0}), 5, taught=False)
    for stage in stages:
        assert (stage.keep_every, stage.unfreeze_blocks, stage.teacher_captions, stage.curriculum) == (0, 0, 0, 0)
    recipe_from_dict(dataclasses.replace(recipe, stages=stages).to_dict())  # as a resumed run reads it


# --- vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gru", "llama"])
def test_vocabulary_keeps_logits_and_words(small: None, tmp_path: Path, kind: str) -> None:
    loaded = load_checkpoint(save_run(tmp_path / "run", kind))
    after = pruned(loaded, tmp_path / "out", "vocab=12")
    ours, theirs = (c.tokenizer.inner.get_vocab(with_added_tokens=True) for c in (after, loaded))
    assert 8 < len(ours) < len(theirs) and after.recipe.tokenizer.min_count == 12
    assert {name: i for name, i in after.tokens.items() if name != "vocab_size"} == {
        name: i for name, i in loaded.tokens.items() if name != "vocab_size"
    }
    counts = np.unique(" ".join(corpus()).split(), return_counts=True)
    often = {word for word, count in zip(*counts, strict=True) if count >= 12}
    assert set(ours) == often | {"<pad>", "<bos>", "<eos>", "<unk>"}
    text = " ".join(sorted(often))
    assert after.tokenizer.decode(after.tokenizer.encode(text)) == text
    columns = torch.tensor([theirs[word] for word, _ in sorted(ours.items(), key=lambda entry: entry[1])])
    ids = torch.tensor([[[1, *after.tokenizer.encode(text)[:6]]]] * 2)
    pixels = torch.from_numpy(photos(2))
    with torch.no_grad():
        one, whole = after.model(ids, pixels=pixels), loaded.model(columns[ids], pixels=pixels)
    assert torch.equal(one, whole[..., columns])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subword_vocabularies_still_encode_everything(kind: str) -> None:
    captions = corpus()
    tokenizer = train_tokenizer(captions, TokenizerSettings(kind=kind, vocab_size=600))
    used, old = shrink_vocab(tokenizer, captions[:20], 1)
    assert len(old) < tokenizer.get_vocab_size() and old[:4] == [0, 1, 2, 3] == list(token_ids(used).values())[:4]
    assert [e.tokens for e in used.encode_batch(captions[:20])] == [
        e.tokens for e in tokenizer.encode_batch(captions[:20])
    ]
    few, _ = shrink_vocab(tokenizer, captions, 10**6)  # only what everything is spelt with
    for text in ("a zebra's hat", captions[0]):
        if kind == "bpe" or set(text) <= set("".join(captions)):
            assert few.decode(few.encode(text).ids).strip() == text
    assert few.get_vocab_size() < used.get_vocab_size()


def test_tokenizers_that_cannot_be_shrunk_are_one_line() -> None:
    from tokenizers import Tokenizer, models

    piece = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    piece.add_special_tokens(["<pad>", "<bos>", "<eos>", "<unk>"])
    with pytest.raises(UsageError, match="WordPiece, and only WordLevel, BPE and Unigram"):
        shrink_vocab(piece, ["a"], 1)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_pruned_checkpoint_loads_exports_and_says_what_it_cost(small: None, tmp_path: Path) -> None:
    loaded = load_checkpoint(save_run(tmp_path / "run"))
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    after = pruned(loaded, tmp_path / "out", "features=0.5,hidden=0.25", "vocab=used")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    assert after.finished and after.model.encoder.dim == 12 and after.recipe.decoder["hidden"] == 18
    record = after.metrics["pruned"][0]
    assert record["from"] == loaded.sha256 and record["before"] == cost(loaded.model)
    assert record["after"] == cost(after.model)
    assert record["after"]["macs"]["photo"] < record["before"]["macs"]["photo"]
    assert record["after"]["bytes"] < record["before"]["bytes"]
    (told,) = prune_passes(after.metrics)
    assert json.loads(json.dumps(told.to_dict()))["cost"]["after"] == record["after"]

    pair = to_onnx(after.model)
    pixels, ids, rows = photos(3, seed=5), np.array([1, 5, 6]), np.array([0, 1, 2])
    names = [value.name for value in pair.encoder.graph.output]
    photo = dict(zip(names, engine(pair.encoder).run(names, {"pixels": pixels}), strict=True))
    feeds = {"ids": ids, "photo": rows, "grid": photo["grid"], "h": photo["h0"]}
    ours = engine(pair.decoder).run(["logits"], feeds)[0]
    with torch.no_grad():
        torch_photo = after.model.photo(pixels=torch.from_numpy(pixels))
        state = {"h": torch_photo["h0"]}
        theirs, _ = after.model.decoder.advance(torch.tensor(ids), torch.tensor(rows), torch_photo, state)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)

    again = pruned(loaded, tmp_path / "again", "features=0.5,hidden=0.25", "vocab=used")
    assert again.sha256 == after.sha256  # the same command, the same bytes
    twice = pruned(after, tmp_path / "twice", "hidden=0.5")
    assert [r["items"] for r in twice.metrics["pruned"]] == [record["items"], ["hidden=0.5"]]
    assert twice.model.encoder.dim == 12 and twice.recipe.decoder["hidden"] == 9

    # Without the word that it was pruned, other shapes are what they always were: a damaged checkpoint.
    write_json(tmp_path / "out" / METRICS, {"finished": True})
    with pytest.raises(UsageError, match=f"{WEIGHTS} does not fit its recipe"):
        load_checkpoint(tmp_path / "out")


def test_refusals_are_one_line(small: None, tmp_path: Path) -> None:
    loaded = load_checkpoint(save_run(tmp_path / "run"))
    for item, match in (
        ("width=0.3", "write KEY=VALUE with one of channels"),
        ("channels", "write KEY=VALUE"),
        ("channels=0", "share to take out, between 0 and 1"),
        ("channels=1.0", "between 0 and 1"),
        ("hidden=x", "between 0 and 1"),
        ("layers=0.5", "a whole number of 1 or more"),
        ("vocab=none", "give used, or a whole number"),
        ("hidden=0.3,hidden=0.2", "given twice"),
        ("", "KEY=VALUE"),
        ("layers=1", "a single recurrent layer"),
        ("ffn=0.3", "a gru decoder has hidden to prune"),
        ("hidden=0.3,heads=0.2", "a gru decoder has hidden to prune"),
        ("hidden=0.001", "takes nothing out"),
        ("encoder=0.3", None),
    ):
        out = tmp_path / "out"
        if match is None:
            assert pruned(loaded, out, item).model.encoder.dim < 24  # the one group that there is
            with pytest.raises(UsageError, match="not an empty folder"):
                pruned(loaded, out, "vocab=used")
            continue
        with pytest.raises(UsageError, match=match) as caught:
            pruned(loaded, out, item)
        assert "\n" not in caught.value.message and not out.exists()


def test_finer_keys_go_before_coarser_ones() -> None:
    plan = parse_items(["channels=0.3,heads=0.5", "features=0.6"])
    assert plan.encoder == {"encoder": 0.3, "features": 0.6}
    assert plan.decoder == {"hidden": 0.3, "ffn": 0.3, "heads": 0.5}
    assert parse_items(["vocab=used"]).vocab == 1 and parse_items(["vocab=8,layers=2"]).layers == 2
    assert parse_items(["decoder=0.2"]).encoder == {} == parse_items(["layers=1"]).decoder

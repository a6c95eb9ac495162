"""Runs that start from a checkpoint, and learn from a teacher: the loss, the weights, the folders, the refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from edgecap.benchmarks.datasets import open_dataset
from edgecap.runtime.errors import UsageError
from edgecap.runtime.tokenizer import Tokenizer
from edgecap.train import loop
from edgecap.train.batches import Batch, encode_captions
from edgecap.train.checkpoint import PROGRESS, RECIPE, TOKENIZER, Checkpoint, load_checkpoint, preprocess_for
from edgecap.train.commands import train as train_command
from edgecap.train.objectives import Distillation
from edgecap.train.run import train
from edgecap.train.settings import Stage
from edgecap.train.shapes import shrink_to
from edgecap.train.start import START, Helpers, Teacher
from edgecap.train.state import load_model_tensors, model_tensors
from edgecap.train.tokenizer import caption_text, token_ids, train_tokenizer

from .tiny import SIZE, tiny_model, tiny_recipe

ONE = {"epochs": 1, "batch_size": 16, "lr": 1e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def as_checkpoint(model: torch.nn.Module, tokenizer: object) -> Checkpoint:
    recipe = tiny_recipe()
    return Checkpoint(
        Path("teacher"), recipe, model, Tokenizer(tokenizer), token_ids(tokenizer), preprocess_for(recipe), {}, ""
    )


def test_distillation_is_its_formula_over_our_words() -> None:
    """Against plain PyTorch, with a teacher of more words in another order, and with what its encoder sees."""
    examples = list(open_dataset("scenes:train=6,val=2,test=2,size=64").splits["train"])
    captions = [caption_text(c) for e in examples for c in e.captions]
    settings = tiny_recipe().tokenizer
    theirs, ours = (train_tokenizer(captions, dataclasses.replace(settings, min_count=count)) for count in (1, 6))
    large, small = theirs.get_vocab_size(), ours.get_vocab_size()
    assert small < large
    teacher = Teacher(as_checkpoint(tiny_model("llama", vocab_size=large, seed=1), theirs), ours)
    assert [theirs.id_to_token(i) for i in teacher.ids.tolist()] == [ours.id_to_token(i) for i in range(small)]
    model = tiny_model("gru", vocab_size=small)
    ids = torch.from_numpy(encode_captions(examples, ours, max_length=8, captions=2))
    pixels = torch.randint(0, 256, (6, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.no_grad():
        features = teacher.model.encoder(pixels)
    batch = Batch(ids, np.arange(6), pixels=pixels, teacher=features)
    stage = Stage(objective="distill", teacher_share=0.6, temperature=3.0, match=0.5, label_smoothing=0.1)
    objective = Distillation(tiny_recipe(), stage, ours, examples, Helpers(teacher))
    loss, figures = objective.loss(model, model, batch)

    keep = ids[:, :, 1:] >= 0
    logits = model(ids[:, :, :-1].clamp(min=0), pixels=pixels)[keep]
    with torch.no_grad():
        wanted = teacher.model(teacher.ids[ids[:, :, :-1].clamp(min=0)], pixels=pixels)[keep][:, teacher.ids]
    captions_loss = F.cross_entropy(logits, ids[:, :, 1:][keep], label_smoothing=0.1)
    p, q = F.softmax(wanted / 3, -1), F.softmax(logits / 3, -1)
    apart = (p * (p.log() - q.log())).sum(-1).mean() * 9
    memory = teacher.model.memory(pixels=pixels)
    seen = F.mse_loss(model.memory(pixels=pixels), memory) / memory.var()
    assert objective.count(ids) == int(keep.sum())
    torch.testing.assert_close(loss / keep.sum(), 0.4 * captions_loss + 0.6 * apart + 0.5 * seen, rtol=1e-4, atol=1e-5)
    assert figures["divergence"] == pytest.approx(float(apart.detach()), rel=1e-4)
    loss.backward()
    assert model.encoder.body.conv_1x1.convolution.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.model.parameters())

    other = train_tokenizer(["a zebra"], dataclasses.replace(settings, min_count=1))
    with pytest.raises(UsageError, match="does not know '(a|zebra)'"):
        Teacher(as_checkpoint(tiny_model("gru", vocab_size=small), ours), other)


def test_a_run_starts_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = train(tiny_recipe(ONE), tmp_path / "first")
    start = load_checkpoint(first)
    recipe = tiny_recipe({**ONE, "lr": 0.0}, spec="scenes:train=40,val=8,test=4,size=64", decoder="llama")
    out, metrics = train(recipe, tmp_path / "out", init=first)
    # Model and tokenizer are the checkpoint's whatever the recipe says; nothing was learnt at a rate of 0.
    again = load_checkpoint(out)
    assert again.recipe.decoder == start.recipe.decoder and again.recipe.data.spec == recipe.data.spec
    assert again.sha256 == start.sha256
    assert (out / TOKENIZER).read_bytes() == (first / TOKENIZER).read_bytes()
    assert [record["epoch"] for record in metrics["history"]] == [0, 1] and metrics["history"][0]["loss"] is None

    # Killed before anything is learnt, it resumes from the same weights, unless they have changed since.
    class Killed(BaseException):
        pass

    def dies(*args: object, **options: object) -> None:
        raise Killed

    out = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "run", dies)
        train(recipe, out, init=first)
    assert (out / RECIPE).is_file() and not (out / PROGRESS).exists()
    note = json.loads((out / START).read_text())
    (out / START).write_text(json.dumps({**note, "sha256": "0" * 64}))
    with pytest.raises(UsageError, match="first has changed since this run began"):
        train(None, out, resume=True)
    (out / START).write_text(json.dumps(note))
    train(None, out, resume=True)
    assert load_checkpoint(out).sha256 == start.sha256


def test_refusals_are_one_line(tmp_path: Path) -> None:
    first, _ = train(tiny_recipe(ONE), tmp_path / "first")
    distill = tiny_recipe({**ONE, "objective": "distill"})
    for recipe, options, match in (
        (distill, {}, "objective = distill needs --teacher"),
        (tiny_recipe(ONE), {"teacher": first}, "no stage learns from it"),
        (tiny_recipe(ONE), {"init": tmp_path / "none"}, "is not a checkpoint"),
        (tiny_recipe(ONE, image_size=96), {"init": first}, "sees photos of 64 px"),
        (tiny_recipe({**ONE, "objective": "distill"}, image_size=96), {"teacher": first}, "cannot teach"),
    ):
        with pytest.raises(UsageError, match=match) as caught:
            train(recipe, tmp_path / "out", **options)
        assert "\n" not in caught.value.message and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="teacher_share = 1.5 is out of range"):
        tiny_recipe({**ONE, "teacher_share": 1.5})
    with pytest.raises(UsageError, match="temperature = 0"):
        tiny_recipe({**ONE, "temperature": 0.0})
    for arguments, text in (
        (["--init", str(first), "--encoder", "x"], "--init brings its own model"),
        (["--init", str(first), "--set", "decoder.hidden=8"], "--init brings its own model"),
        (["--init", str(first), "--set", "prompt.text=a"], "--init brings its own model"),
        (["--init", str(first), "--set", "text={}"], "--init brings its own model"),
        (["--init", str(first), "--no-split-image"], "--init brings its own model"),
        (["--resume", "--split-image"], "--resume continues a run by its own recipe"),
        (["--check", "--teacher", str(first)], "--check keeps nothing"),
        (["--check", "--out", str(tmp_path)], "--check keeps nothing"),
        (["--resume", "--init", str(first)], "--resume continues a run by its own recipe"),
    ):
        result = CliRunner().invoke(train_command, arguments)
        assert result.exit_code == 2 and text in result.output


def test_shapes_shrink_only_to_what_fits() -> None:
    model, whole = (tiny_model("gru") for _ in range(2))
    tensors = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    for name in ("convolution.weight", "normalization.weight", "normalization.bias"):
        tensors[f"encoder.body.conv_1x1.{name}"] = tensors[f"encoder.body.conv_1x1.{name}"][:100]
    for name in ("running_mean", "running_var"):
        name = f"encoder.body.conv_1x1.normalization.{name}"
        tensors[name] = tensors[name][:100]
    tensors["bridge.project.weight"] = tensors["bridge.project.weight"][:, :100]
    shrink_to(model, tensors)
    load_model_tensors(model, tensors, "here")
    conv, linear = model.encoder.body.conv_1x1.convolution, model.bridge.project
    assert conv.out_channels == linear.in_features == model.encoder.dim == 100
    with torch.no_grad():
        pixels = torch.randint(0, 256, (1, SIZE, SIZE, 3), dtype=torch.uint8)
        torch.testing.assert_close(model.encoder(pixels), whole.encoder(pixels)[..., :100], rtol=1e-5, atol=1e-5)

    for name, wrong in (
        ("encoder.body.conv_1x1.convolution.weight", torch.zeros(5000, 1, 1, 1)),
        ("decoder.start.weight", torch.zeros(3, 16)),
        ("bridge.project.weight", torch.zeros(3)),
    ):
        broken = {**tensors, name: wrong}
        other = tiny_model("gru")
        shrink_to(other, broken)
        with pytest.raises(UsageError, match="here does not fit its recipe"):
            load_model_tensors(other, broken, "here")

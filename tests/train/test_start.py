"""Runs that start from a checkpoint: the weights, the folders, the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edgecap.runtime.errors import UsageError
from edgecap.train import loop
from edgecap.train.checkpoint import PROGRESS, RECIPE, TOKENIZER, load_checkpoint
from edgecap.train.commands import train as train_command
from edgecap.train.run import train
from edgecap.train.shapes import shrink_to
from edgecap.train.start import START
from edgecap.train.state import load_model_tensors, model_tensors

from .tiny import SIZE, tiny_model, tiny_recipe

ONE = {"epochs": 1, "batch_size": 16, "lr": 1e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


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
        (tiny_recipe(ONE), {"teachers": [first]}, "no stage learns from it"),
        (tiny_recipe(ONE), {"init": tmp_path / "none"}, "is not a checkpoint"),
        (tiny_recipe(ONE, image_size=96), {"init": first}, "sees photos of 64 px"),
        (
            tiny_recipe({**ONE, "objective": "distill", "match": 1.0, "encoder_lr": 1e-3}),
            {"teachers": [first, first]},
            "match is of one",
        ),
    ):
        with pytest.raises(UsageError, match=match) as caught:
            train(recipe, tmp_path / "out", **options)
        assert "\n" not in caught.value.message and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="teacher_share = 1.5 is out of range"):
        tiny_recipe({**ONE, "teacher_share": 1.5})
    for key, value in (("temperature", 0.0), ("top_k", 0)):
        with pytest.raises(UsageError, match=f"{key} = 0"):
            tiny_recipe({**ONE, key: value})
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

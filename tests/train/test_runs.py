"""Where runs begin, go on and are refused: folders, data, encoders, broken photos and full disks, each in one line."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgecap.runtime.errors import EdgecapError, UsageError
from edgecap.train import loop, opening, run
from edgecap.train.checkpoint import PROGRESS, RECIPE, TOKENIZER, WEIGHTS, load_checkpoint
from edgecap.train.data.cache import cached_rows
from edgecap.train.data.material import Material
from edgecap.train.models import build_model
from edgecap.train.prepare import prepare_recipe
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.state import load_progress, write_bytes, write_tensors

from .encoder_parts import PARTS
from .tiny import ENCODER, tiny_recipe

ONE_EPOCH = {"epochs": 1, "batch_size": 48, "validate_every": 1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk with room for `size` bytes a file, as far as writers can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- files and disks -----------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    text, tensors = tmp_path / "a.json", tmp_path / "a.safetensors"
    write_bytes(text, b"old")
    write_tensors(tensors, {"x": torch.zeros(3)}, {})
    assert text.stat().st_mode == tensors.stat().st_mode
    old = tensors.read_bytes()
    with files_of_at_most(1000):
        for write in (
            lambda: write_bytes(text, bytes(5000)),
            lambda: write_tensors(tensors, {"x": torch.zeros(5000)}, {}),
            lambda: cached_rows("key", 100, (50,), np.float32, lambda part: np.zeros((16, 50))),
        ):
            with pytest.raises(EdgecapError, match="cannot be written") as caught:
                write()
            assert str(tmp_path) in caught.value.message
    assert text.read_bytes() == b"old" and tensors.read_bytes() == old
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.json", "a.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    recipe = tiny_recipe(ONE_EPOCH)
    with pytest.raises(EdgecapError, match="file/run cannot be written"):
        train(recipe, tmp_path / "file" / "run")
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EdgecapError, match="set EDGECAP_CACHE"):
        train(recipe, tmp_path / "run")


def test_what_no_room_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from edgecap import cli

    def full(**options: object) -> None:
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(cli.cli, "main", full)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "Error: [Errno 28] No space left on device: 'some/file'\n"


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_run_that_never_learnt_frees_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was written before the first step, the same command begins again."""
    recipe, out = tiny_recipe(ONE_EPOCH), tmp_path / "run"
    write = opening.write_bytes

    def dies_before(name: str):
        def mortal(path: Path, data: bytes) -> None:
            if path.name == name:
                (out / f".{name}.tmp").write_bytes(data[:10])
                raise Killed
            write(path, data)

        return mortal

    for name in (TOKENIZER, RECIPE):
        monkeypatch.setattr(opening, "write_bytes", dies_before(name))
        with pytest.raises(Killed):
            train(recipe, out)
    monkeypatch.setattr(opening, "write_bytes", write)
    (out / ".lock").touch()  # as a kill leaves it
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Material, "open_photos", lambda self, stage: (_ for _ in ()).throw(Killed()))
        train(recipe, out)
    assert {RECIPE, TOKENIZER, "log"} <= {path.name for path in out.iterdir()}
    train(recipe, out)
    assert not [path.name for path in out.rglob(".*")]

    for name in ("notes.txt", RECIPE):
        (tmp_path / name[:3]).mkdir()
        (tmp_path / name[:3] / name).write_text("the user's own")
        with pytest.raises(UsageError, match="another --out"):
            train(recipe, tmp_path / name[:3])
        assert (tmp_path / name[:3] / name).read_text() == "the user's own"


def test_one_run_in_a_folder_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = tiny_recipe(ONE_EPOCH), tmp_path / "run"

    def meanwhile(self: Material, stage: object) -> None:
        command = [sys.executable, "-m", "edgecap", "train", "--resume", "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "another process trains in" in done.stderr
        raise Killed

    monkeypatch.setattr(Material, "open_photos", meanwhile)
    with pytest.raises(Killed):
        train(recipe, out)


# --- resuming ------------------------------------------------------------------------------------------------------


def test_killed_behind_every_write_the_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states between a save and what follows it: early stopping, the next stage, the best weights."""
    stages = (
        {"name": "still", "epochs": 9, "batch_size": 48, "lr": 0.0, "patience": 1, "weight_decay": 0.0},
        {"name": "moving", "epochs": 2, "batch_size": 24, "lr": 5e-3},
    )
    recipe = tiny_recipe(*stages)
    first, metrics = train(recipe, tmp_path / "first")
    assert [record["stage"] for record in metrics["history"]] == ["still"] * 3 + ["moving"] * 2
    assert metrics["best"]["stage"] == "moving", "or the test sees no best weights of the second stage"

    out, lives, seen = tmp_path / "killed", 0, set()
    save, write = loop.Trainer._save, loop.Trainer._write_weights

    def mortal(action):
        def act(self: loop.Trainer) -> None:
            action(self)
            place = (action.__name__, self.state["stage"], self.state["epoch"])
            if place not in seen:
                seen.add(place)
                raise Killed

        return act

    monkeypatch.setattr(loop.Trainer, "_save", mortal(save))
    monkeypatch.setattr(loop.Trainer, "_write_weights", mortal(write))
    while True:
        lives += 1
        try:
            _, again = train(None if lives > 1 else recipe, out, resume=lives > 1)
            break
        except Killed:
            continue
    assert lives >= 9
    timeless = {"seconds": 0, "step_seconds": 0}
    plain = [record | timeless for record in metrics["history"]]
    assert [record | timeless for record in again["history"]] == plain
    assert (out / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


def half_a_run(out: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """A run that was killed after its first epoch."""

    def mortal(self: loop.Trainer) -> None:
        save(self)
        if self.state["epoch"]:
            raise Killed

    save = loop.Trainer._save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_save", mortal)
        train(tiny_recipe({**ONE_EPOCH, "epochs": 2}, **options), out)


def test_resuming_refuses_other_data_and_takes_runs_that_do_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    half_a_run(out, monkeypatch)
    text = (out / RECIPE).read_text()
    (out / RECIPE).write_text(text.replace("train=48", "train=40"))
    with pytest.raises(UsageError, match="begun on other data"):
        train(None, out, resume=True)
    (out / RECIPE).write_text(text)
    tensors, state = load_progress(out / PROGRESS)
    del state["data"], state["plateau_waits"]  # as earlier versions wrote it
    write_tensors(out / PROGRESS, tensors, {"state": json.dumps(state)})
    _, metrics = train(None, out, resume=True)
    assert metrics["finished"] and len(metrics["history"]) == 2


def test_resuming_reads_the_precision_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    half_a_run(out, monkeypatch)
    (out / RECIPE).write_text(
        (out / RECIPE).read_text().replace('mixed_precision = "auto"', 'mixed_precision = "bf16"')
    )
    asked = []

    def accelerator(mixed_precision: str) -> None:
        asked.append(mixed_precision)
        raise Killed

    monkeypatch.setattr(run, "Accelerator", accelerator)
    with pytest.raises(Killed):
        train(None, out, resume=True)
    assert asked == ["bf16"]


def test_resuming_needs_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pretrained(tmp_path / "source"), tmp_path / "run"
    recipe = prepare_recipe(
        str(recipe_file(tmp_path)), data=None, encoder=str(source), overrides=(), skip_bad=False, seed=None
    )
    save, saves = loop.Trainer._save, []

    def mortal(self: loop.Trainer) -> None:
        save(self)
        saves.append(1)
        if len(saves) == 1:
            raise Killed

    monkeypatch.setattr(loop.Trainer, "_save", mortal)
    with pytest.raises(Killed):
        train(recipe, out)
    first, _ = train(recipe, tmp_path / "first")
    shutil.rmtree(source)
    train(None, out, resume=True)
    assert (out / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


# --- encoders and photos -------------------------------------------------------------------------------------------


def pretrained(folder: Path) -> Path:
    """A directory as transformers writes it, with random weights."""
    body = build_model(
        encoder=ENCODER, bridge={"kind": "linear"}, decoder={"kind": "gru"}, vocab_size=9, bos_id=1, size=(64, 64)
    ).encoder.body
    body.save_pretrained(folder)
    return folder


def recipe_file(folder: Path) -> Path:
    (folder / "tiny.toml").write_text(tiny_recipe(ONE_EPOCH).to_toml())
    return folder / "tiny.toml"


def test_a_source_brings_its_own_configuration(tmp_path: Path) -> None:
    said: list[str] = []
    options = {"data": None, "skip_bad": False, "seed": None, "say": said.append}
    recipe = prepare_recipe(str(recipe_file(tmp_path)), encoder="some/source", overrides=(), **options)
    assert recipe.encoder.config == {} and len(said) == 1 and "own configuration" in said[0]
    with pytest.raises(UsageError, match="leave out --set encoder.config"):
        overrides = ("encoder.config.depth_multiplier=0.5",)
        prepare_recipe(str(recipe_file(tmp_path)), encoder="some/source", overrides=overrides, **options)


def test_a_source_takes_another_photo_size(tmp_path: Path) -> None:
    PARTS["clip"].source().save_pretrained(tmp_path / "clip")
    file, stage = tmp_path / "clip.toml", {**ONE_EPOCH, "epochs": 1}
    whole = tiny_recipe(stage, image_size=48, spec="scenes:train=8,val=4,test=4,size=48").to_dict()
    encoder = {"kind": "clip", "source": str(tmp_path / "clip"), "config": PARTS["clip"].config}
    file.write_text(recipe_from_dict({**whole, "encoder": encoder}).to_toml())
    options: dict[str, Any] = {"data": None, "encoder": None, "skip_bad": False, "seed": None}
    side = "encoder.config.image_size=48"
    for more in ({"overrides": (side,)}, {"overrides": (), "image_size": 48}):
        recipe = prepare_recipe(str(file), **options, **more)
        assert recipe.encoder.config == {"image_size": 48}
    assert prepare_recipe(str(file), **options, overrides=()).encoder.config == {}  # 32 would not fit the photos
    encoder = {**encoder, "config": {**PARTS["clip"].config, "image_size": 48}}
    file.write_text(recipe_from_dict({**whole, "encoder": encoder}).to_toml())
    recipe = prepare_recipe(str(file), **options, overrides=())
    assert recipe.encoder.config == {"image_size": 48}
    out, _ = train(recipe, tmp_path / "run")
    assert load_checkpoint(out).recipe.encoder.config["image_size"] == 48
    with pytest.raises(UsageError, match="leave out --set encoder.config"):
        prepare_recipe(str(file), **options, overrides=(side, "encoder.config.hidden_size=8"))


def test_directories_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/a", "b"):
        (tmp_path / name).mkdir(parents=True)
    overrides = ("text.source=b", "bridge.source=./b", "tokenizer.source=hub/name")
    options: dict[str, Any] = {"data": None, "skip_bad": False, "seed": None, "overrides": overrides}
    recipe = prepare_recipe(str(recipe_file(tmp_path)), **options, encoder="models/a", decoder="../" + tmp_path.name)
    assert recipe.encoder.source == str(tmp_path / "models" / "a") and recipe.decoder["source"] == str(tmp_path)
    assert recipe.text.source == recipe.bridge["source"] == str(tmp_path / "b")
    assert recipe.tokenizer.source == "hub/name"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"encoder": "x", "from_scratch": True}, "--from-scratch starts without .*: leave out --encoder"),
        ({"decoder": "x", "vlm": "y"}, "--vlm brings every part: leave out --decoder"),
        ({"text": "x"}, "--text: a recipe with task = caption has no text tower"),
        ({"name": "query-bridge", "max_positions": 64}, "--max-seq-len: a recipe with task = retrieval has no decoder"),
        ({"name": "mobilenetv2-distilgpt2", "max_positions": 64}, "a pretrained gpt2 are learnt"),
    ],
)
def test_options_that_would_not_count_are_refused(more: dict[str, Any], match: str) -> None:
    options: dict[str, Any] = {"data": None, "encoder": None, "skip_bad": False, "seed": None, "overrides": ()}
    with pytest.raises(UsageError, match=match) as caught:
        prepare_recipe(**{"name": "mobilenetv2-gru-small", **options, **more})
    assert "\n" not in caught.value.message


def test_a_source_that_is_not_the_encoder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    parts = {"bridge": {"kind": "linear"}, "decoder": {"kind": "gru"}, "vocab_size": 9, "bos_id": 1, "size": (64, 64)}
    source = pretrained(tmp_path / "source")
    encoder = {"kind": "mobilenet_v2", "source": str(source), "config": {}}
    build_model(encoder=encoder, **parts)
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "classifier.weight": torch.zeros(2)}, source / "model.safetensors", {"format": "pt"})
    build_model(encoder=encoder, **parts)  # what is beyond the encoder does not matter
    lost = sorted(name for name in weights if name.endswith("weight"))[3]
    save_file({k: v for k, v in weights.items() if k != lost}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=f"lacks 1 of .*{lost}"):
        build_model(encoder=encoder, **parts)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "resnet"}))
    with pytest.raises(UsageError, match="is a resnet model"):
        build_model(encoder=encoder, **parts)


def test_a_broken_photo_says_what_to_do_and_the_folder_stays_free(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    rng, lines = np.random.default_rng(0), ["image,caption,split"]
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(photos / f"{i}.jpg")
        lines.append(f"{i}.jpg,a photo of noise,{'val' if i == 10 else 'test' if i == 11 else 'train'}")
    (photos / "captions.csv").write_text("\n".join(lines))
    (photos / "3.jpg").write_bytes((photos / "3.jpg").read_bytes()[:200])
    spec = f"folder:{photos}"
    with pytest.raises(EdgecapError, match=f"3.jpg.*; edgecap data {spec} --verify lists .*--skip-bad leaves them out"):
        train(tiny_recipe(ONE_EPOCH, spec=spec), out)
    _, metrics = train(tiny_recipe(ONE_EPOCH, spec=spec, skip_bad=True), out)
    assert metrics["finished"] and metrics["train_photos"] == 9

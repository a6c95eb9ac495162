"""The loop learns, repeats itself bit by bit, resumes as if nothing had happened, and shares work between processes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from edgecap.runtime.errors import UsageError
from edgecap.train import loop, run
from edgecap.train.checkpoint import PROGRESS, WEIGHTS, load_checkpoint
from edgecap.train.data.material import Material
from edgecap.train.evaluate import evaluate
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import latest_run, new_run, train
from edgecap.train.settings import Recipe, Stage

from .tiny import ENCODER, SCENES, SIZE, Killed, tiny_recipe, with_kills

TWO_STAGES = (
    {"name": "frozen", "epochs": 2, "batch_size": 16, "lr": 5e-3, "ema": 0.9, "schedule": "step", "step_epochs": 1},
    {"name": "all", "epochs": 2, "batch_size": 16, "lr": 1e-3, "encoder_lr": 1e-3, "accumulate": 2},
    {"name": "critic", "objective": "scst", "epochs": 1, "batch_size": 16, "lr": 1e-3, "samples": 2, "dropout": False},
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def test_learns_repeats_and_resumes_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(*TWO_STAGES, flip=True)
    first, metrics = train(recipe, tmp_path / "first")
    losses = [record["loss"] for record in metrics["history"]]
    assert metrics["finished"] and losses[1] < losses[0]
    assert {record["stage"] for record in metrics["history"]} == {"frozen", "all", "critic"}
    assert (first / "chart.png").read_bytes()[:4] == b"\x89PNG" and any((first / "log").iterdir())
    # Die after every fourth step, anywhere in an epoch, and go on until it is done.
    out = tmp_path / "killed"
    lives = with_kills(monkeypatch, lambda begun: train(None if begun else recipe, out, resume=begun), repeat(4))
    assert lives == 4
    assert (out / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    assert json.loads((out / "metrics.json").read_text())["finished"]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    recipe = tiny_recipe({"epochs": 1, "batch_size": 16})
    one, _ = train(recipe, tmp_path / "one")
    two, _ = train(dataclasses.replace(recipe, seed=1), tmp_path / "two")
    assert (one / WEIGHTS).read_bytes() != (two / WEIGHTS).read_bytes()


def test_llama_trains_and_evaluates(tmp_path: Path) -> None:
    recipe = tiny_recipe({"epochs": 3, "batch_size": 8, "lr": 3e-3, "schedule": "constant"}, decoder="llama")
    out, metrics = train(recipe, tmp_path / "run")
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    record = evaluate(out, spec=None, split="test", limit=None, decoding={"beam": 2})
    assert record["photos"] == 16 and len(record["captions"]) == 16
    assert load_checkpoint(out).finished


def test_early_stopping_and_plateau(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of nothing, no validation is better than the first."""
    factors, validate = [], loop.Trainer._validate

    def watched(self: loop.Trainer, stage: Stage) -> None:
        validate(self, stage)
        factors.append(self.state["plateau"])

    monkeypatch.setattr(loop.Trainer, "_validate", watched)
    stage = {"epochs": 9, "batch_size": 48, "lr": 0.0, "patience": 4, "schedule": "plateau", "weight_decay": 0.0}
    _, metrics = train(tiny_recipe(stage), tmp_path / "run")
    assert len(metrics["history"]) == 6 and metrics["best"]["epoch"] == 1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=1)
    expected = []
    for record in metrics["history"]:
        theirs.step(record["cider"])
        expected.append(optimizer.param_groups[0]["lr"])
    assert factors == expected == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_captions_are_drawn_anew_in_each_step() -> None:
    """Of four, three and one captions, three at most: as many as there are, others in another step."""
    recipe = tiny_recipe()
    ids = np.full((3, 4, 5), -1)
    for photo, captions in enumerate((4, 3, 1)):
        ids[photo, :captions] = 10 * (photo + 1) + np.arange(captions)[:, None]
    material = SimpleNamespace(recipe=recipe, number=0)
    drawn = [Material.draw_captions(material, ids, step) for step in range(40)]
    assert all(one.shape == (3, 3, 5) for one in drawn)
    sets = [[sorted(set(row[:, 0].tolist()) - {-1}) for row in one] for one in drawn]
    assert all(len(of[0]) == 3 and of[1] == [20, 21, 22] and of[2] == [30] for of in sets)
    assert all((one[2, 0] == 30).all() and (one[2, 1:] == -1).all() for one in drawn)
    assert {tuple(of[0]) for of in sets} == {(10, 11, 12), (10, 11, 13), (10, 12, 13), (11, 12, 13)}
    assert (Material.draw_captions(material, ids, 7) == drawn[7]).all()
    assert (Material.draw_captions(material, ids[:, :3], 7) == ids[:, :3]).all()


def test_runs_are_named_found_and_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe({"epochs": 1, "batch_size": 48})
    runs = tmp_path / "runs"
    assert new_run("tiny", runs) == runs / "tiny"
    assert latest_run(runs) is None
    with pytest.raises(UsageError, match="nothing to resume"):
        train(None, runs / "tiny", resume=True)
    out, _ = train(recipe, runs / "tiny")
    assert new_run("tiny", runs) == runs / "tiny-2"
    assert latest_run(runs, finished=True) == out
    with pytest.raises(UsageError, match="has finished"):
        train(None, out, resume=True)
    with pytest.raises(UsageError, match="--resume"):
        train(recipe, out)
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps({**metrics, "finished": False}))
    with pytest.raises(UsageError, match="has not finished"):
        load_checkpoint(out)
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(Exception, match="damaged"):
        load_checkpoint(out, unfinished_ok=True)
    (out / PROGRESS).write_bytes(b"nothing")
    with pytest.raises(Exception, match="damaged"):
        train(None, out, resume=True)


def captioner(accumulate: int) -> Recipe:
    stage = {"epochs": 2, "batch_size": 20, "lr": 3e-3, "encoder_lr": 1e-3, "batchnorm": "frozen"}
    return tiny_recipe({**stage, "accumulate": accumulate})


def towers(accumulate: int) -> Recipe:
    """A photo's negatives are its piece's: those of one process in two pieces are those of two processes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    stage = {"objective": "infonce", "epochs": 2, "batch_size": 24, "lr": 0.1, "accumulate": accumulate}
    data = {"spec": SCENES, "image_size": SIZE, "captions_per_photo": 1}
    text = {"config": {"model_type": "bert", "vocab_size": 600, **sizes}, "dim": 24}
    whole = {"name": "towers", "task": "retrieval", "data": data, "encoder": ENCODER, "text": text, "stages": [stage]}
    return recipe_from_dict({**whole, "tokenizer": {"min_count": 1}, "bridge": {"kind": "linear", "dim": 16}})


@pytest.mark.parametrize("make", [captioner, towers])
def test_two_processes_give_one_process_loss(make: Callable[[int], Recipe], tmp_path: Path) -> None:
    """The same run by torchrun: equal batch, no dropout, equal losses within 1e-5."""
    _, alone = train(make(2), tmp_path / "alone")
    (tmp_path / "recipe.toml").write_text(make(1).to_toml())
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "EDGECAP_CACHE": str(tmp_path / "cache")}
    # `accelerate launch --cpu` starts a single process, whatever it is told.
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "edgecap"]
    recipe, out = str(tmp_path / "recipe.toml"), str(tmp_path / "run")
    command = [sys.executable, "-m", *launch, "train", recipe, "-o", out, "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads(done.stdout)["history"]  # from one process alone
    assert done.stderr.count(" epoch 1: loss") == 1
    losses = [[record["loss"] for record in records] for records in (alone["history"], history)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][1] < losses[0][0]


def test_the_first_process_opens_the_data_before_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that download write what the other processes then find."""
    alone: list[str] = []

    @contextmanager
    def first(self: Accelerator) -> Iterator[None]:
        alone.append("in")
        yield
        alone.append("out")

    def opened(*args: object, **options: object) -> None:
        alone.append("data")
        raise Killed

    monkeypatch.setattr(Accelerator, "main_process_first", first)
    monkeypatch.setattr(run, "open_dataset", opened)
    with pytest.raises(Killed):
        train(tiny_recipe(), tmp_path / "run")
    assert alone == ["in", "data"]


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for pieces in (1, 4):
        stage = {"epochs": 2, "batch_size": 16, "lr": 3e-3, "accumulate": pieces}
        _, metrics = train(tiny_recipe(stage), tmp_path / f"run-{pieces}")
        losses.append([record["loss"] for record in metrics["history"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_small_last_batch_is_split_into_no_more_pieces_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 photos in batches of 40, four pieces of 10: the last 8 are one."""
    sizes: list[int] = []
    batch = Material.batch
    monkeypatch.setattr(
        Material, "batch", lambda self, ids, places, mirrored: (
            sizes.append(len(places)), batch(self, ids, places, mirrored)
        )[1]
    )  # fmt: skip
    train(tiny_recipe({"epochs": 1, "batch_size": 40, "accumulate": 4}), tmp_path / "run")
    assert sizes == [10, 10, 10, 10, 8]


def test_stages_share_no_optimizer_and_keep_their_own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of one name, validated every second epoch, kept after each."""
    prepared: list[int] = []
    epoch = loop.Trainer._epoch

    def counted(self: loop.Trainer, *args: object) -> None:
        prepared.append(len(self.accelerator._optimizers))
        epoch(self, *args)

    monkeypatch.setattr(loop.Trainer, "_epoch", counted)
    stage = {"epochs": 2, "batch_size": 24, "lr": 1e-3, "validate_every": 2, "keep_every": 1}
    out, metrics = train(tiny_recipe(stage, {**stage, "lr": 0.0}), tmp_path / "run")
    assert prepared == [1] * 4
    kept = {path.name: json.loads((path / "metrics.json").read_text())["best"] for path in (out / "kept").iterdir()}
    first, second = metrics["history"]
    assert kept == {"1-words-001": None, "1-words-002": first, "2-words-001": None, "2-words-002": second}
    assert load_checkpoint(out / "kept" / "2-words-001").finished


def test_schedules() -> None:
    from edgecap.train.optim import lr_factor

    stage = Stage(schedule="cosine", epochs=2, warmup=4)
    assert [lr_factor(stage, s, 10) for s in (0, 3, 10, 20)] == pytest.approx([0.25, 0.945, 0.5, 0.0], abs=0.01)
    stage = Stage(schedule="step", step_epochs=2, gamma=0.1)
    assert [lr_factor(stage, s, 10) for s in (0, 19, 20, 45)] == pytest.approx([1, 1, 0.1, 0.01])
    assert lr_factor(Stage(schedule="plateau"), 99, 10, plateau=0.25) == 0.25


def test_weight_average_follows_the_formula() -> None:
    from edgecap.train.optim import WeightAverage

    model = torch.nn.Linear(2, 1)
    average = WeightAverage(model, 0.5)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update(model)  # first update: decay 1 / 10
    with average.applied(model):
        torch.testing.assert_close(model.weight.detach(), 0.1 * start + 0.9 * (start + 1))
    torch.testing.assert_close(model.weight.detach(), start + 1)

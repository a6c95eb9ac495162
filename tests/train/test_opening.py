"""What a run cannot do is told before anything of it is written, however late its stage comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgecap.benchmarks.datasets import Example
from edgecap.runtime.errors import MissingExtra, UsageError
from edgecap.train import opening
from edgecap.train.critic import Critic
from edgecap.train.run import train
from edgecap.train.settings import Lora
from edgecap.train.start import START, Start
from edgecap.train.state import write_json

from .tiny import tiny_recipe

ONE = {"epochs": 1, "batch_size": 16, "lr": 1e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


class Blind(Critic):
    """Sees the same in every photo."""

    def __init__(self) -> None:
        self.name, self.sha256 = "blind", "0" * 64
        self.judge: Any = SimpleNamespace(model=torch.nn.Linear(1, 1))
        self.vocabulary = None

    def photos(self, examples: Sequence[Example], progress: Any = None) -> np.ndarray:
        return np.tile(np.eye(4, dtype=np.float32)[0], (len(examples), 1))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[[i % 4 for i in range(len(texts))]]


def test_processes_wait_for_the_first_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(opening, "PartialState", lambda **settings: given.update(settings))
    opening.this_process()
    assert given["timeout"] >= timedelta(days=1)


def test_a_critic_that_will_not_do_is_refused_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Critic, "load", lambda source: Blind())
    recipe = tiny_recipe(ONE, {**ONE, "objective": "guided", "alignment": 1.0})
    with pytest.raises(UsageError, match="critic blind does not know these photos"):
        train(recipe, tmp_path / "run", critic="blind")
    assert not (tmp_path / "run").exists()


def test_adapters_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    base, _ = train(tiny_recipe(ONE, decoder="llama"), tmp_path / "base")
    recipe = tiny_recipe(ONE, decoder="llama")
    wrong = dataclasses.replace(recipe, lora=Lora(rank=2, targets="no_such"))
    with pytest.raises(UsageError, match="the decoder has no layer 'no_such'"):
        train(wrong, tmp_path / "run", init=base)
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else present(name))
    with pytest.raises(MissingExtra, match="peft, which is not installed"):
        train(dataclasses.replace(recipe, lora=Lora(rank=2)), tmp_path / "run", init=base)
    assert not (tmp_path / "run").exists()


def test_a_start_alone_leaves_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "run"
    write_json(out / START, dataclasses.asdict(Start(critic="gone")))  # killed behind it
    _, metrics = train(tiny_recipe(ONE), out)
    assert metrics["finished"] and not (out / START).exists()


def test_the_critic_is_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(Critic, "load", lambda source: Blind())
    monkeypatch.setattr(Blind, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(opening, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda")))
    start = Start(critic="blind", critic_sha256="0" * 64)
    helpers = opening.open_helpers(tiny_recipe(ONE), start, None)
    assert moved == [torch.device("cuda")] and helpers.critic is not None

"""What does not fit is told before hours are spent: by --check, and by a run on a GPU before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edgecap.runtime.errors import EdgecapError
from edgecap.train import fit, loop, opening
from edgecap.train.commands import train as train_command
from edgecap.train.fit import check_fit
from edgecap.train.memory import least_memory, too_large
from edgecap.train.run import train
from edgecap.train.settings import Stage

from .tiny import tiny_model, tiny_recipe

STAGE = {"epochs": 1, "batch_size": 8, "lr": 1e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def test_weights_gradients_and_moments_are_counted() -> None:
    model = tiny_model("gru")
    whole = 4 * sum(p.numel() for p in model.parameters())
    learnt = 4 * sum(p.numel() for name, part in model.parts().items() if name != "encoder" for p in part.parameters())
    assert least_memory(model, Stage(encoder_lr=1e-3)) == 4 * whole
    assert least_memory(model, Stage(encoder_lr=1e-3, ema=0.9)) == 5 * whole
    assert least_memory(model, Stage()) == whole + 3 * learnt
    assert not too_large(model, Stage(), None) and not too_large(model, Stage(), 10 * whole)
    assert "stage words alone take" in too_large(model, Stage(), whole)


def test_too_little_memory_is_told_without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda device: 1000)
    monkeypatch.setattr(loop.Trainer, "_step", None)  # a call would raise
    told = check_fit(tiny_recipe(STAGE))
    assert not told.fits and "it does not fit" in told.text() and "0.0 GB are free" in told.refusal


def test_running_out_of_memory_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Trainer, "_step", full)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tiny_recipe({**STAGE, "accumulate": 2}).to_toml())
    told = CliRunner().invoke(train_command, [str(recipe), "--check", "--json"])
    assert told.exit_code == 1
    fitted = json.loads(told.stdout)
    assert not fitted["fits"] and "--set stages.0.accumulate=4 or more" in fitted["refusal"]
    monkeypatch.undo()
    told = CliRunner().invoke(train_command, [str(recipe), "--check"], env={"EDGECAP_CACHE": str(tmp_path / "cache")})
    assert told.exit_code == 0 and "it fits" in told.stdout


def test_a_run_that_a_gpu_cannot_hold_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device, is_main_process, num_processes = torch.device("cuda"), True, 1

        def __init__(self, **settings: bool) -> None:
            pass

    monkeypatch.setattr(opening, "PartialState", OnGpu)
    monkeypatch.setattr(opening, "free_memory", lambda device: 1000)
    with pytest.raises(EdgecapError, match="it does not fit: .* stage words alone take") as caught:
        train(tiny_recipe(STAGE), tmp_path / "run")
    assert caught.value.exit_code == 1 and not (tmp_path / "run").exists()

"""Nothing lost: kill -9 at random moments of feature caching, training and export, once their work has begun.

EDGECAP_KILLS sets how many kills each test lands (3 by default; EDGECAP_KILLS=20 is the long form).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgecap.runtime import Bundle, EdgecapError, verify_golden
from edgecap.runtime.captioner import Captioner

from .train.tiny import tiny_recipe

KILLS = int(os.environ.get("EDGECAP_KILLS", "3"))

# Forks a child for every command, so that the kills meet work and not the import of torch. An order: arguments,
# folder, and constants to set (many small saves, for a kill to fall into).
SERVER = """
import importlib, json, os, sys, traceback
import accelerate, matplotlib.figure, onnx, onnxscript, torch.utils.tensorboard, transformers
import edgecap.runtime.progress, edgecap.cli, edgecap.export.commands, edgecap.export.pipeline
import edgecap.train.commands, edgecap.train.run
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(order["folder"])
            os.environ["EDGECAP_CACHE"] = os.path.join(order["folder"], "cache")
            for file in (1, 2):
                os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), file)
            for place, value in order["constants"].items():
                module, name = place.rsplit(".", 1)
                setattr(importlib.import_module(module), name, value)
            sys.argv = ["edgecap", *order["arguments"]]
            edgecap.cli.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Shell:
    """Runs edgecap commands in children of a process that has imported everything."""

    def __init__(self, temporary: Path) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        command = [sys.executable, "-c", SERVER]
        self.server = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(
        self,
        arguments: list[str],
        folder: Path,
        *,
        kill: tuple[Callable[[str], bool], float] | None = None,
        constants: dict[str, float] | None = None,
    ) -> tuple[int, str, float]:
        """(exit code, what was said, seconds since the work began). kill: (has the work begun, by what was said so
        far?, seconds from then on); -9 is the exit code of a kill that landed."""
        said = folder / "said"
        said.write_text("")
        order = {"arguments": arguments, "folder": str(folder), "constants": constants or {}}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        started = time.monotonic()
        if kill:
            begun, moment = kill
            # A child that has ended is reaped by the server at once: then there is nothing to kill.
            while _alive(child) and not begun(said.read_text()):
                time.sleep(0.003)
            started = time.monotonic()
            while _alive(child) and time.monotonic() < started + moment:
                time.sleep(0.003)
            if _alive(child):
                os.kill(child, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        assert "Traceback" not in said.read_text(), said.read_text()[-3000:]
        return code, said.read_text(), time.monotonic() - started


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(tmp_path_factory.mktemp("temporary"))
    yield shell
    shell.server.stdin.close()
    shell.server.kill()
    shell.server.wait()


def saying(words: str) -> Callable[[str], bool]:
    return lambda said: words in said


def finished(run: Path) -> bool:
    metrics = run / "metrics.json"
    return metrics.exists() and json.loads(metrics.read_text())["finished"]


# --- feature caching -----------------------------------------------------------------------------------------------


def cached(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in sorted((folder / "cache").glob("*.npy"))}


def rows_done(folder: Path) -> int:
    return sum(json.loads(path.read_text())["rows"] for path in (folder / "cache").glob("*.json"))


def test_a_killed_cache_goes_on_and_holds_every_row(shell: Shell, tmp_path: Path) -> None:
    scenes = "scenes:train=640,val=16,test=16,size=64"
    recipe = tiny_recipe({"epochs": 1, "batch_size": 64}, spec=scenes, flip=True).to_toml()
    # Without the faster engine, which every life would load anew: tests/train/test_augment.py kills a run with it.
    small = {"edgecap.train.data.cache.FLUSH": 16, "edgecap.train.data.batches.MANY": 10**6}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.toml").write_text(recipe)
    command = ["train", "tiny.toml", "-o", "run"]
    code, said, _ = shell.run(command, tmp_path / "whole", constants=small)
    assert code == 0, said

    folder, moments, kills, done = tmp_path / "killed", random.Random(1), 0, [0]
    while kills < KILLS:
        before = rows_done(folder)
        # From the first rows that this life has added.
        begun = lambda said, before=before: rows_done(folder) > before  # noqa: E731
        code, said, _ = shell.run(command, folder, kill=(begun, moments.uniform(0, 0.1)), constants=small)
        assert code == -9 and "stage 1" not in said, f"not killed while caching: {said}"
        kills += 1
        done.append(rows_done(folder))
    assert done == sorted(set(done)), "rows that were done are not done again"
    code, said, _ = shell.run(command, folder, constants=small)
    assert code == 0, said
    ours, theirs = cached(folder), cached(tmp_path / "whole")
    assert list(ours) == list(theirs) and all((ours[name] == theirs[name]).all() for name in theirs)
    assert not list((folder / "cache").glob("*.tmp"))
    weights = [(tmp_path / name / "run/model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, float]:
    """A run that nobody disturbed: its folder, its weights and how long it trained."""
    folder = tmp_path_factory.mktemp("undisturbed")
    stages = (
        {"name": "frozen", "epochs": 3, "batch_size": 8, "lr": 5e-3, "ema": 0.9},
        {"name": "all", "epochs": 3, "batch_size": 8, "lr": 2e-3, "encoder_lr": 2e-3},
    )
    (folder / "tiny.toml").write_text(tiny_recipe(*stages).to_toml())
    code, said, _ = shell.run(["train", "tiny.toml", "-o", "runs/tiny"], folder)
    assert code == 0, said
    seconds = json.loads((folder / "runs/tiny/metrics.json").read_text())["seconds"]
    return folder, (folder / "runs/tiny/model.safetensors").read_bytes(), seconds


def test_killed_training_ends_with_the_same_weights(
    shell: Shell, trained: tuple[Path, bytes, float], tmp_path: Path
) -> None:
    whole, weights, seconds = trained
    moments, kills, early = random.Random(2), 0, 0
    often = {"edgecap.train.loop.SAVE_EVERY_S": 0.05}
    while kills < KILLS:
        folder = tmp_path / f"after-{kills}"
        folder.mkdir()
        (folder / "tiny.toml").write_text((whole / "tiny.toml").read_text())
        run, first = folder / "runs/tiny", True
        while not finished(run):
            on = (run / "last/progress.safetensors").exists() or ((run / "recipe.toml").exists() and kills % 2)
            command = ["train", "--resume"] if on else ["train", "tiny.toml", "-o", "runs/tiny"]
            # The first life of each run ends before or about its first step, the others within training.
            kill = (lambda said: True, moments.uniform(0, 1)) if first else None
            if not first and kills < KILLS:
                kill = saying(" of 2: "), moments.uniform(0, seconds / 2)
            code, said, _ = shell.run(command, folder, kill=kill, constants=often)
            assert code == (0 if finished(run) and code != -9 else -9), said
            early += code == -9 and first
            kills += code == -9 and not first
            if code == -9 and kills == 1 and not first:
                code, said, _ = shell.run(["export", "runs/tiny", "--target", "onnx-fp32"], folder)
                assert code == 2 and "edgecap train --resume" in said  # not taken for a whole one
            first = False
        assert (run / "model.safetensors").read_bytes() == weights
        # A kill behind the last write leaves the lock's empty file, which locks nobody out; nothing else may be left.
        assert {path.name for path in run.rglob(".*")} <= {".lock"}
    assert kills >= KILLS and early


# --- export --------------------------------------------------------------------------------------------------------


def test_killed_export_leaves_a_whole_bundle_or_none(shell: Shell, trained: tuple[Path, bytes, float]) -> None:
    folder = trained[0]
    bundle, moments = folder / "runs/tiny-onnx-fp32.edgecap", random.Random(3)
    command = ["export", "--target", "onnx-fp32", "--max-cider-drop", "9"]
    began: dict[str, float] = {}

    def watch(said: str) -> bool:
        for words in ("graphs: ", "gate: "):
            if words in said:
                began.setdefault(words, time.monotonic())
        return False

    code, said, _ = shell.run(command, folder, kill=(watch, 0))
    assert code == 0, said
    lengths = {words: time.monotonic() - moment for words, moment in began.items()}  # from there to the end
    kills = tries = in_gate = 0
    while kills < KILLS and tries < 3 * KILLS:
        words = "gate: " if tries % 2 else "graphs: "
        share = (tries % KILLS + moments.random()) / KILLS  # spread over the whole length
        kill = saying(words), share * lengths[words]
        code, said, _ = shell.run(command, folder, kill=kill)
        assert code in (0, -9), said
        tries, kills, in_gate = tries + 1, kills + (code == -9), in_gate + (code == -9 and "gate: " in said)
        if bundle.exists():
            Bundle.open(bundle)  # every file with its hash
    assert kills == KILLS and in_gate
    code, said, _ = shell.run(command, folder)
    assert code == 0, said
    with Captioner.load(bundle) as captioner:
        assert verify_golden(captioner).ok
    assert [path.name for path in (folder / "runs").iterdir() if ".edgecap" in path.name] == [bundle.name]


def test_a_half_written_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.edgecap").mkdir()
    (tmp_path / "x.edgecap" / "encoder.onnx").write_bytes(b"half")
    with pytest.raises(EdgecapError, match="bundle.json"):
        Bundle.open(tmp_path / "x.edgecap")

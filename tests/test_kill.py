"""Nothing lost: kill -9 at random moments of feature caching, training and export.

EDGECAP_KILLS sets how many kills each test makes (5 by default; EDGECAP_KILLS=20 is the long form).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgecap.runtime import Bundle, EdgecapError, verify_golden
from edgecap.runtime.captioner import Captioner
from edgecap.train.cache import cached_rows

from .train.tiny import tiny_recipe

KILLS = int(os.environ.get("EDGECAP_KILLS", "5"))


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "EDGECAP_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "edgecap", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(arguments: list[str], folder: Path) -> tuple[int, str]:
    process = start(arguments, folder)
    output, _ = process.communicate(timeout=300)
    assert "Traceback" not in output, output[-3000:]
    return process.returncode, output


def kill_when(process: subprocess.Popen[str], moment: float, begun: Path) -> bool:
    """SIGKILL `moment` seconds after `begun` appears; False if the process ended by itself first."""
    while process.poll() is None and not begun.exists():
        time.sleep(0.01)
    deadline = time.monotonic() + moment
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is not None:
        process.communicate()
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def test_a_killed_cache_goes_on_and_holds_every_row(tmp_path: Path) -> None:
    script = tmp_path / "fill.py"
    script.write_text(
        "import sys, time, numpy as np\n"
        "from edgecap.train.cache import cached_rows\n"
        "def compute(part):\n"
        "    time.sleep(0.004)\n"
        "    return np.arange(part.start, part.stop, dtype=np.float32)[:, None] * np.ones((1, 50), np.float32)\n"
        "cached_rows('key', 6000, (50,), np.float32, compute)\n"
    )
    env = {**os.environ, "EDGECAP_CACHE": str(tmp_path)}
    moments = random.Random(1)
    progress, done = tmp_path / "key.json", []
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, str(script)], env=env, text=True, stdout=subprocess.PIPE, start_new_session=True
        )
        kill_when(process, moments.uniform(0.0, 0.6), tmp_path / "key.npy")
        done.append(json.loads(progress.read_text())["rows"] if progress.exists() else 0)
    assert done == sorted(done), "rows that were done are not done again"
    os.environ["EDGECAP_CACHE"], before = str(tmp_path), os.environ.get("EDGECAP_CACHE")
    try:
        rest = lambda part: np.arange(part.start, part.stop)[:, None] + np.zeros((1, 50))  # noqa: E731
        rows = cached_rows("key", 6000, (50,), np.float32, rest)
    finally:
        os.environ.pop("EDGECAP_CACHE") if before is None else os.environ.update(EDGECAP_CACHE=before)
    assert (rows == np.arange(6000, dtype=np.float32)[:, None]).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run that nobody disturbed: its folder and its weights."""
    folder = tmp_path_factory.mktemp("undisturbed")
    stages = (
        {"name": "frozen", "epochs": 3, "batch_size": 8, "lr": 5e-3, "ema": 0.9},
        {"name": "all", "epochs": 3, "batch_size": 8, "lr": 2e-3, "encoder_lr": 2e-3},
    )
    (folder / "recipe.toml").write_text(tiny_recipe(*stages).to_toml())
    code, output = run(["train", "recipe.toml", "-o", "runs/tiny"], folder)
    assert code == 0, output
    return folder, (folder / "runs/tiny/model.safetensors").read_bytes()


def test_killed_training_ends_with_the_same_weights(trained: tuple[Path, bytes], tmp_path: Path) -> None:
    folder, weights = trained
    (tmp_path / "recipe.toml").write_text((folder / "recipe.toml").read_text())
    out, moments, kills = tmp_path / "runs/tiny", random.Random(2), 0
    for _ in range(KILLS):
        begun = (out / "recipe.toml").exists()
        process = start(["train", "--resume"] if begun else ["train", "recipe.toml", "-o", "runs/tiny"], tmp_path)
        # Counted from the run's first file in the first life, from a fresh TensorBoard log in the later ones.
        first_file = out / "log" if (out / "log").exists() else out / "recipe.toml"
        kills += kill_when(process, moments.uniform(0.0, 6.0), first_file)
        code, output = run(["export", "runs/tiny", "--target", "onnx-fp32"], tmp_path) if kills == 1 else (2, "")
        assert code in (0, 2), output  # an unfinished run is never taken for a whole one
    if not (out / "metrics.json").exists() or not json.loads((out / "metrics.json").read_text())["finished"]:
        code, output = run(["train", "--resume"], tmp_path)
        assert code == 0, output
    assert kills and (out / "model.safetensors").read_bytes() == weights


def test_killed_export_leaves_a_whole_bundle_or_none(trained: tuple[Path, bytes]) -> None:
    folder, _ = trained
    bundle, moments = folder / "runs/tiny-onnx-fp32.edgecap", random.Random(3)
    command = ["export", "--target", "onnx-fp32", "--max-cider-drop", "9"]
    for _ in range(KILLS):
        process = start(command, folder)
        kill_when(process, moments.uniform(2.0, 16.0), folder)
        if bundle.exists():
            Bundle.open(bundle)  # every file with its hash
    code, output = run(command, folder)
    assert code == 0, output
    with Captioner.load(bundle) as captioner:
        assert verify_golden(captioner).ok
    assert [path.name for path in (folder / "runs").iterdir() if ".edgecap" in path.name] == [bundle.name]


def test_a_half_written_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.edgecap").mkdir()
    (tmp_path / "x.edgecap" / "encoder.onnx").write_bytes(b"half")
    with pytest.raises(EdgecapError, match="bundle.json"):
        Bundle.open(tmp_path / "x.edgecap")

"""The soak finds what it looks for: swapped captions, errors that are none of ours, memory that grows."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgecap.benchmarks import soak as module
from edgecap.benchmarks.soak import break_photos, draw_photos, main, slope, soak
from edgecap.runtime import Bundle, Captioner, load_model

from ..runtime.graphs import write_gru_bundle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the soak reads its memory from /proc")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gru_bundle(tmp_path_factory.mktemp("soak") / "tiny.edgecap", seed=3).path


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return draw_photos(6)


def run(captioner: Captioner, photos: list[bytes], **options: int) -> module.Soaked:
    settings = {"captions": 200, "threads": 4, "warm_up": 40, **options}
    return soak(captioner, photos, break_photos(photos[1]), **settings)


def test_a_sound_captioner(bundle: Path, photos: list[bytes]) -> None:
    with Captioner.load(bundle, threads=1) as captioner:
        found = run(captioner, photos)
    assert found.captions >= 240 and found.refused > 5 and found.backend == "onnx"
    assert (found.wrong, found.unclear) == (0, ()) and found.distinct == found.jobs == 18
    assert len(found.rss_mb) == 20 and min(found.rss_mb) > 5 and found.interval[0] <= found.slope <= found.interval[1]


class Shared:
    """A model that keeps what it is doing in one place for all of its sessions."""

    def __init__(self, model: object) -> None:
        self.model = model

    def session(self) -> Shared:
        return self

    def start(self, pixels, prompt_ids=None):
        self.inner = self.model.session()
        return self.inner.start(pixels, prompt_ids)

    def step(self, ids, parents):
        return self.inner.step(ids, np.minimum(parents, len(ids) - 1))


def test_swapped_state_is_found(bundle: Path, photos: list[bytes]) -> None:
    """By captions that differ, or by what an engine says to rows that another call has dropped."""
    model = Shared(load_model(Bundle.open(bundle), threads=1))
    found = run(Captioner.load(bundle, model=model), photos)
    assert found.wrong + len(found.unclear) > 0 and found.problems(1e9)


def test_errors_that_are_none_of_ours_are_told(bundle: Path, photos: list[bytes], monkeypatch) -> None:
    real = module.answer

    def fails(captioner: Captioner, job: module.Job) -> tuple:
        if threading.current_thread() is not threading.main_thread() and job.kind == "stream":
            raise IndexError("list index out of range")
        return real(captioner, job)

    monkeypatch.setattr(module, "answer", fails)
    with Captioner.load(bundle, threads=1) as captioner:
        found = run(captioner, photos)
    assert found.unclear and found.problems(1e9)[0] == "stream: IndexError: list index out of range"


def test_slope() -> None:
    random = np.random.default_rng(0)
    done = np.arange(0, 10_000, 50)
    for growth in (0.0, 300.0):  # KB per 1,000 captions
        values = 100e6 + growth * done + random.normal(0, 50_000, len(done))
        rise, (low, high) = slope(list(zip(done.tolist(), values.astype(int).tolist(), strict=True)))
        assert low <= rise <= high and abs(rise - growth) < 15 and high - low < 40
    steady, growing = (module.Soaked("x", "onnx", 4, slope=rise, interval=(rise - 9, rise + 9)) for rise in (0, 300))
    few = module.Soaked("x", "onnx", 4)
    assert few.slope is None and few.problems(64) == ["too few captions to tell whether memory grows"]
    assert steady.problems(64) == [] and "memory grows by 300.0 KB" in growing.problems(64)[0]


def test_command(bundle: Path, tmp_path: Path) -> None:
    options = ["--captions", "100", "--threads", "2", "--max-growth"]
    done = CliRunner().invoke(main, [str(bundle), *options, "1e9", "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["wrong"] == 0 and record["warm_up"] == 50 and record["problems"] == []
    done = CliRunner().invoke(main, [str(bundle), *options, "-1e9"])
    assert done.exit_code == 1 and "KB per 1,000 captions, 95% interval" in done.stdout
    assert "Error: memory grows" in done.stderr
    done = CliRunner().invoke(main, [str(tmp_path / "none")])
    assert done.exit_code == 2 and done.stderr.startswith("Error: ")

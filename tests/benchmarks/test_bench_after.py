"""What comes after the rounds of a bench: when it fails, the record says so, and nothing that was measured is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgecap.benchmarks import bench as module
from edgecap.benchmarks import record as records
from edgecap.benchmarks.bench import bench, clock_record, measure
from edgecap.benchmarks.device import Local
from edgecap.benchmarks.suite import Settings
from edgecap.runtime.errors import UsageError

from .lineage import QUICK
from .test_bench_runner import PHOTOS, fake

DATA = {"spec": "x", "fingerprint": "f", "split": "test", "photos": len(PHOTOS)}
LEAST = Settings(rounds=2, min_runs=2, min_seconds=0, warmup=1, cold_starts=0, memory_photos=2, timeout=60)
CLOCK = {"cap": 1.0, "cooling": 0, "events": 0, "flags": None, "celsius": 50.0}
FOUND = {"read_gb_s": 10.0, "fp32_gflops": 50.0, "int8_gops": None}


class Failing(Local):
    """This machine; what is asked of it after the rounds fails."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self.failure, self.clocks = failure, 0

    def clock(self, threads: int) -> dict[str, Any]:
        self.clocks += 1
        if self.clocks > 1:
            raise OSError("gone")
        return CLOCK

    def check(self, *_: Any) -> dict[str, Any]:
        raise self.failure


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the machine's limits are found to be, in turn."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "limits", lambda *_, **__: found.pop(0))
    return found


def test_what_fails_after_the_rounds_is_a_line_of_the_record(
    own: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def roofline(*_: Any) -> None:
        raise KeyError("near")

    monkeypatch.setattr(module, "add_roofline", roofline)
    own[:] = [FOUND, dict.fromkeys(FOUND)]  # nothing the second time
    record = measure(Failing(UsageError("nobody there")), [fake("one")], PHOTOS, LEAST, DATA)
    assert [row["status"] for row in record["rows"]] == ["ok"] and record["stopped"] is None
    assert record["problems"] == [
        "the clock's reading: OSError: gone",
        "the check against this machine: nobody there",
        "how near the rows come to the limits: KeyError: 'near'",
    ]
    assert record["limits"] == FOUND, "those before the rounds"
    assert record["device"]["clock"] == {"before": CLOCK, "after": None, "fell": []}
    assert records.parse(records.dumps(record)) == json.loads(records.dumps(record))


def test_ctrl_c_after_the_rounds_keeps_the_rows(own: list[dict[str, Any]]) -> None:
    own[:] = [dict.fromkeys(FOUND), FOUND]
    record = measure(Failing(KeyboardInterrupt()), [fake("one")], PHOTOS, LEAST, DATA)
    assert record["rows"][0]["status"] == "ok" and record["stopped"] == "interrupted"
    assert record["limits"] == FOUND, "those after the rounds"


def test_a_clock_that_was_read_once_did_not_fall() -> None:
    assert clock_record(None, CLOCK, None, None) == {"before": None, "after": CLOCK, "fell": []}
    assert clock_record(CLOCK, CLOCK | {"cap": 0.5}, None, None)["fell"]


def test_a_device_that_is_not_told_keeps_the_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(*_: Any) -> Iterator[None]:
        raise RuntimeError("deaf")

    monkeypatch.setattr(Local, "done", deaf)
    record = bench([folder / "runs/first.edgecap"], limit=2, settings=QUICK)
    assert record["rows"][0]["status"] == "ok" and record["problems"] == ["the device was not told: RuntimeError: deaf"]
    monkeypatch.setattr(Local, "timed", False)
    with pytest.raises(UsageError, match="--slow-limit goes by times, and cpu's mean nothing: use --limit"):
        bench([folder / "runs/first.edgecap"], settings=Settings(slow_photos=2))

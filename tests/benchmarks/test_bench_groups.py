"""Groups of a run: which subjects are measured side by side, and what is kept of them where it is stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgecap.benchmarks.row import Row
from edgecap.benchmarks.subjects import Subject, groups
from edgecap.benchmarks.suite import _give_up, run
from edgecap.runtime.errors import UsageError

from .test_bench_runner import PHOTOS, QUICK, fake


def bundle(name: str, weights: str, mode: str = "ok") -> Subject:
    return replace(fake(name, mode), kind="bundle", facts={"checkpoint_sha256": weights})


def test_bundles_of_the_same_weights_and_their_peers_are_a_group() -> None:
    a, a8, b = bundle("a", "x"), bundle("a8", "x"), bundle("b", "y")
    peers = [replace(fake("p"), peer_of=("b",)), replace(fake("q"), peer_of=("a8",)), fake("by hand")]
    assert groups([a, a8, b, *peers]) == [0, 0, 1, 1, 0, 0]
    assert groups([a, a8, b]) == [0, 0, 0]
    less = replace(bundle("less", "z"), facts={"checkpoint_sha256": "z", "pruned_from": "y"})
    assert groups([a, b, less, peers[0]]) == [0, 1, 1, 1]
    unknown = [replace(bundle(name, ""), path=Path(name)) for name in "cd"]  # their lineage names no weights
    assert groups([*unknown, peers[0]]) == [0, 1, 0]


def two_groups(mode: str = "ok") -> list[Subject]:
    first = [bundle("a", "x"), replace(fake("a's"), peer_of=("a",))]
    return [*first, bundle("b", "y", mode), replace(fake("b's"), peer_of=("b",)), bundle("c", "z")]


def test_only_one_group_has_workers_and_rows_are_compared_within_it() -> None:
    alive: list[int] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase.startswith("latency"):
            alive.append(len([p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]))

    rows = run(two_groups(), PHOTOS, QUICK, progress)["rows"]
    assert max(alive) == 2 and alive[-1] == 1
    assert [(row["group"], list(row["speedup"])) for row in rows] == [
        (0, ["a's"]), (0, ["a"]), (1, ["b's"]), (1, ["b"]), (2, []),
    ]  # fmt: skip
    assert ["identical_to_first" in row["quality"] for row in rows] == [False, True, False, True, False]


def stop_in(group: str, failure: BaseException) -> Any:
    def progress(phase: str, done: int, total: int) -> None:
        if phase == f"latency {group}":
            raise failure

    return progress


def test_stopping_keeps_the_groups_that_are_finished() -> None:
    found = run(two_groups(), PHOTOS, QUICK, stop_in("2/3", KeyboardInterrupt()))
    assert found["stopped"] == "interrupted" and found["reference"]["seconds"] > 0
    assert [row["status"] for row in found["rows"]] == ["ok", "ok", "missing", "missing", "missing"]
    for row in found["rows"][2:]:
        assert row["error"] == "not measured: interrupted"
        assert row["latency"] is row["memory"] is row["cold_start"] is row["captions"] is None
    failed, whole = Row(fake("failed"), error="cold start: broken"), Row(fake("whole"), captions=[{}])
    _give_up([failed, whole], "interrupted")  # a reason of its own is better
    assert (failed.error, failed.missing) == ("cold start: broken", False)
    assert (whole.error, whole.missing, whole.captions) == ("not measured: interrupted", True, [])
    with pytest.raises(KeyboardInterrupt):  # there is nothing to keep
        run(two_groups(), PHOTOS, QUICK, stop_in("1/3", KeyboardInterrupt()))


def test_a_group_that_cannot_be_measured_leaves_the_others_alone() -> None:
    found = run(two_groups(), PHOTOS, QUICK, stop_in("1/3", UsageError("no more")))
    assert found["stopped"] is None
    assert [row["status"] for row in found["rows"]] == ["missing", "missing", "ok", "ok", "ok"]
    assert found["rows"][0]["error"] == "not measured: no more"
    with pytest.raises(OSError, match="disk"):  # one group, and so nothing else
        run([fake("alone")], PHOTOS, QUICK, lambda *_: (_ for _ in ()).throw(OSError("disk")))

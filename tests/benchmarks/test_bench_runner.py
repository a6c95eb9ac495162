"""Workers that misbehave: each becomes a reason in one line, soon, and leaves no process behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from edgecap.benchmarks.device import Local
from edgecap.benchmarks.latency import STAGES
from edgecap.benchmarks.parity import _summary
from edgecap.benchmarks.quality import Photo
from edgecap.benchmarks.row import Row
from edgecap.benchmarks.runner import Running, Worker, WorkerFailed, no_answer, worker_environment
from edgecap.benchmarks.subjects import Subject, peer_subject
from edgecap.benchmarks.suite import Settings, _captions, _rounds, run
from edgecap.runtime.errors import UsageError

FAKE = Path(__file__).with_name("fake_worker.py")
PHOTOS = [Photo(f"p{k}", f"p{k}.jpg", ("a dog runs fast", "a cat")) for k in range(6)]
QUICK = Settings(rounds=3, min_runs=6, min_seconds=0.01, warmup=2, cold_starts=1, timeout=60)


def fake(name: str, mode: str = "ok") -> Subject:
    return Subject(name, "fake", Path("nowhere"), (sys.executable, str(FAKE), mode), {"beam": 1}, {"sha256": "f" * 64})


def python(code: str, **options: Any) -> Worker:
    return Worker([sys.executable, "-c", code], **options)


def bench(*subjects: Subject, settings: Settings = QUICK) -> list[dict[str, Any]]:
    return run(subjects, PHOTOS, settings, lambda phase, done, total: None)["rows"]


def test_questions_and_answers() -> None:
    with Worker([sys.executable, str(FAKE), "ok"]) as worker:
        facts = worker.ask("load", timeout=60)["facts"]
        assert facts["versions"] == {"fake": "1"}
        runs = worker.ask("time", photos=["a", "b", "c"], timeout=60)["runs"]
        assert len(runs) == 3
        for found in runs:
            assert set(found) == {*STAGES, "tokens"}
            assert all(value > 0 for value in found.values())
        answer = worker.ask("caption", photos=["a"], timeout=60)
        assert answer["captions"] == [{"text": "a dog runs", "logprob": -1.0, "tokens": 3}]
        if sys.platform == "linux":
            assert answer["peak_rss"] > 2**20


def test_a_request_nobody_knows_is_answered_and_the_worker_goes_on() -> None:
    with Worker([sys.executable, str(FAKE), "ok"]) as worker:
        with pytest.raises(WorkerFailed, match="unknown request 'dance'"):
            worker.ask("dance", timeout=60)
        assert worker.ask("load", timeout=60)["ok"]


def test_what_a_library_prints_does_not_get_between_the_answers() -> None:
    code = (
        "import os, ctypes\n"
        "from edgecap.benchmarks.worker import serve\n"
        "class E:\n"
        "    facts = {}\n"
        "    def __init__(self, request): print('hello from python'); os.system('echo hello from a child')\n"
        "serve(E)\n"
    )
    with python(code) as worker:
        assert worker.ask("load", timeout=60)["facts"] == {}


def test_threads_and_waiting_policy_reach_the_worker() -> None:
    code = "import json, os; print(json.dumps({'ok': True} | dict(os.environ)), flush=True)"
    with python(code, threads=3) as worker:
        found = worker.receive(60)
    assert found["OMP_NUM_THREADS"] == "3" and found["OMP_WAIT_POLICY"] == "passive"
    assert set(os.environ) - {"PYTHONDONTWRITEBYTECODE"} <= set(worker_environment(1))


def test_workers_keep_compiled_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    code = "import json, sys; print(json.dumps({'ok': True, 'kept': not sys.dont_write_bytecode}), flush=True)"
    with python(code) as worker:
        assert worker.receive(60)["kept"]


@pytest.mark.skipif(os.name != "posix", reason="a shell script as interpreter")
def test_a_peer_may_have_an_interpreter_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho "$0 $*" >> "$0.log"\nexec {sys.executable} {FAKE} ok\n')
    other.chmod(0o755)
    monkeypatch.setenv("EDGECAP_PEER_TORCH_PYTHON", str(other))
    (row,) = bench(peer_subject(f"torch:{tmp_path}", {"beam": 1}))
    assert row["status"] == "ok" and row["facts"]["versions"] == {"fake": "1"}
    assert f"{other} -m edgecap.benchmarks.peers.torch_eager" in Path(f"{other}.log").read_text()

    monkeypatch.setenv("EDGECAP_PEER_TORCH_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="EDGECAP_PEER_TORCH_PYTHON=.*none: there is no such interpreter"):
        peer_subject(f"torch:{tmp_path}", {})
    monkeypatch.delenv("EDGECAP_PEER_TORCH_PYTHON")
    assert peer_subject(f"torch:{tmp_path}", {}).command[0] == sys.executable


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(7)", "exit code 7"),
        ("import sys; print('no such engine', file=sys.stderr); sys.exit(2)", "exit code 2: no such engine"),
        ("import os; os.kill(os.getpid(), 9)", r"SIGKILL \(out of memory\?\)"),
        ("print('hi there', flush=True); import time; time.sleep(600)", "not a JSON object: 'hi there'"),
        ("print('[1, 2]', flush=True)", "not a JSON object"),
        ("print('[' * 100000, flush=True)", "not a JSON object"),
        ("import os; os.write(1, b'\\xff\\xfe\\n')", "not a JSON object"),
        ("import json; print(json.dumps({'ok': False, 'error': 'a\\nb'}), flush=True)", "^a b$"),
        ("import json; print(json.dumps({'ok': False}), flush=True)", "failed without a reason"),
        ("import os, time; os.close(1); time.sleep(600)", "closed its output"),
    ],
)
def test_a_worker_that_misbehaves_gives_a_reason(code: str, said: str) -> None:
    with python(code) as worker, pytest.raises(WorkerFailed, match=said):
        worker.receive(60)


def test_what_is_no_number_in_an_answer_is_none() -> None:
    with python('print(\'{"ok": true, "logprob": NaN, "x": [-Infinity]}\', flush=True)') as worker:
        found = worker.receive(60)
    assert found["logprob"] is None and found["x"] == [None]
    bad, good = np.array([1.0, np.nan]), np.array([1.0, 0.995])
    found = _summary([(True, True, good), (True, True, bad)], "fp32")
    assert found["min_cosine"] is None and found["ok"] is False
    assert _summary([(False, True, good)], "int8")["ok"] is True


def test_a_silent_worker_is_given_up_and_ended() -> None:
    with python("import time; time.sleep(600)") as worker:
        with pytest.raises(WorkerFailed, match="no answer within 0.3 s"):
            worker.receive(0.3)
        with pytest.raises(WorkerFailed):
            worker.receive(60)  # it is dead by now: no second wait for the time limit


def test_times_are_said_in_plain_figures() -> None:
    said = [no_answer(seconds).split(" s ")[0].rpartition(" ")[2] for seconds in (0.3, 4.0, 1200.0, 96000.0)]
    assert said == ["0.3", "4", "1,200", "96,000"]


@pytest.mark.parametrize("count", [0, 3])
def test_answers_that_are_not_one_a_photo_are_a_reason(count: int) -> None:
    class Answers(Running):
        def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
            return {"captions": [{"text": "a dog"}] * count, "runs": [{"end_to_end": 0.1}] * count}

    row, other = Row(fake("one")), Row(fake("other"))
    _captions([row], {0: Answers()}, PHOTOS, QUICK, lambda *_: None)
    assert row.error == "captions: answered with captions that are not a list of 1" and not row.captions
    _rounds([other], {0: Answers()}, PHOTOS, QUICK, lambda *_: None)
    assert other.error == "warm-up: answered with runs that are not a list of 2"


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(WorkerFailed, match="could not be started"):
        Worker(["/no/such/program"])


def test_workers_that_do_not_want_to_end_are_ended() -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('{\"ok\": 1}', flush=True)\ntime.sleep(600)"
    )
    with python(code) as worker:
        worker.receive(60)
        process = psutil.Process(worker._process.pid)
    assert not process.is_running()


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_nothing_a_worker_started_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CHILD_FILE", str(tmp_path / "children"))
    with Worker([sys.executable, str(FAKE), "load:child"]) as worker:
        worker.ask("load", timeout=60)
    child = int((tmp_path / "children").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker's child is still running"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("mode", "phase", "said"),
    [
        ("load:die", "cold start", "exit code 3: the engine fell over"),
        ("load:error", "cold start", "RuntimeError: two lines of reason"),
        ("pixels:die", "warm-up", "exit code 3: the engine fell over"),
        ("pixels:oom", "warm-up", "SIGKILL"),
        ("pixels:garbage", "warm-up", "not a JSON object"),
        ("caption:error", "cold start", "RuntimeError: two lines of reason"),
        ("caption:flood", "cold start", "not a JSON object"),
    ],
)
def test_one_that_fails_is_a_row_with_the_reason_and_the_bench_goes_on(mode: str, phase: str, said: str) -> None:
    bad, good = bench(fake("bad", mode), fake("good"))
    assert bad["status"] == "failed" and bad["quality"] is None and bad["speedup"] is None
    assert bad["error"].startswith(f"{phase}: ") and said in bad["error"] and "\n" not in bad["error"]
    assert good["status"] == "ok" and good["error"] is None
    assert good["quality"]["photos"] == len(PHOTOS) and good["speedup"] == {}


def test_one_that_hangs_costs_one_time_limit(tmp_path: Path) -> None:
    settings = Settings(rounds=2, min_runs=2, min_seconds=0, warmup=1, cold_starts=1, timeout=4)
    bad, good = bench(fake("bad", "load:hang"), fake("good"), settings=settings)
    assert bad["error"] == "cold start: gave no answer within 4 s (--timeout gives it more)"
    assert good["status"] == "ok"


def test_an_answer_may_take_as_long_as_its_captions_need() -> None:
    """Ten times what a caption took so far, each; at least the settings' time."""

    class Slow(Running):
        asked: ClassVar[list[tuple[str, int, float]]] = []

        def ask(self, op: str, *, timeout: float, photos: Sequence[str]) -> dict[str, Any]:
            self.asked.append((op, len(photos), timeout))
            time.sleep(0.01 * (op == "caption"))
            found = {"text": "a dog", "logprob": -1.0, "tokens": 2}
            return {"captions": [found] * len(photos), "runs": [{"end_to_end": 0.1}] * len(photos)}

    settings = Settings(rounds=2, min_runs=6, min_seconds=0.0, warmup=5, timeout=0.05)
    row = Row(fake("slow"), slowest=2.0)
    _rounds([row], {0: Slow()}, PHOTOS, settings, lambda *_: None)
    assert Slow.asked == [("time", 5, 320.0), ("time", 3, 200.0), ("time", 3, 200.0)]
    Slow.asked.clear()
    row = Row(fake("unknown"))  # where times mean nothing
    _captions([row], {0: Slow()}, PHOTOS, settings, lambda *_: None)
    (_, first, least), (_, others, more) = Slow.asked
    assert (first, least, others) == (1, 0.05, 5) and more >= 10 * 0.01 * 5


def test_rounds_are_interleaved_and_complete() -> None:
    """Two equal subjects: as many rounds as asked for, ratios both ways, the runs the protocol promises."""
    one, two = bench(fake("one"), fake("two"))
    for row, other in ((one, two), (two, one)):
        assert row["latency"]["end_to_end"]["runs"] >= QUICK.min_runs
        ratios = row["speedup"][other["name"]]
        assert set(ratios) == set(STAGES)
        assert all(r["rounds"] == QUICK.rounds and r["low"] <= r["ratio"] <= r["high"] for r in ratios.values())
    a, b = one["speedup"]["two"]["end_to_end"], two["speedup"]["one"]["end_to_end"]
    assert a["ratio"] * b["ratio"] == pytest.approx(1)
    assert two["quality"]["identical_to_first"] == 1.0
    assert two["quality"]["cider_over_first"]["mean"] == 0.0


def test_the_order_of_turns_is_a_b_a_b(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    ask = Worker.ask

    def noted(self: Worker, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "time":
            turns.append(self)
        return ask(self, op, **arguments)

    monkeypatch.setattr(Worker, "ask", noted)
    bench(fake("one"), fake("two"))
    first, second = turns[:2]
    assert first is not second
    assert turns[2:] == [first, second] * QUICK.rounds  # the first two are the warm-up


def test_memory_is_read_from_the_process_itself_not_its_parent() -> None:
    """A process that a big one started must not be charged for it (getrusage would)."""
    code = (
        "import subprocess, sys\nfrom edgecap.benchmarks import rss\nballast = bytearray(300 * 2**20)\n"
        "ballast[::4096] = b'x' * len(ballast[::4096])\n"
        "print(rss.peak_rss(), flush=True)\nsubprocess.run([sys.executable, rss.__file__], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    big, small = done.stdout.splitlines()
    if big == "None":
        pytest.skip("this system tells no process the most memory that it has held")
    assert int(big) > 300 * 2**20
    if sys.platform == "linux":
        assert json.loads(small)["peak_rss"] < 100 * 2**20


def test_the_rows_of_a_round_see_the_same_photos_and_all_photos_are_seen() -> None:
    """Also where one row is so slow that it has time for two photos a round, and the other takes many more."""

    class Answers(Running):
        def __init__(self, seconds: float) -> None:
            self.seconds, self.asked = seconds, []

        def ask(self, op: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
            self.asked.append(arguments["photos"])
            return {"runs": [{"end_to_end": self.seconds}] * len(arguments["photos"])}

    slow, fast = Answers(1.0), Answers(0.1)
    rows = [Row(fake("slow")), Row(fake("fast"))]
    settings = Settings(rounds=3, min_runs=6, min_seconds=2.0, warmup=1)
    _rounds(rows, {0: slow, 1: fast}, PHOTOS, settings, lambda phase, done, total: None)
    for a, b in zip(slow.asked[1:], fast.asked[1:], strict=True):
        assert len(a) == 2 and len(b) == 7 and set(a) == set(b)
    assert {file for files in slow.asked[1:] for file in files} == {photo.path for photo in PHOTOS}


# --- slow captioners ----------------------------------------------------------------------------------


def test_one_caption_tells_all_times_but_those_from_a_picture() -> None:
    with Worker([sys.executable, str(FAKE), "ok"]) as worker:
        worker.ask("load", timeout=60)
        (once,) = worker.ask("time", photos=["a"], once=True, timeout=60)["runs"]
        (usual,) = worker.ask("time", photos=["a"], timeout=60)["runs"]
    assert once.keys() == usual.keys() - {"picture_to_text"} and once["tokens"] == usual["tokens"] == 3
    parts = once["preprocess"] + once["encode"] + once["decode"]
    assert parts <= once["end_to_end"] < parts + 0.01


def test_a_group_of_slow_captioners_is_timed_by_one_photo_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, bool]] = []
    ask = Worker.ask

    def noted(self: Worker, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "time":
            asked.append((op, len(arguments["photos"]), arguments.get("once", False)))
        return ask(self, op, **arguments)

    monkeypatch.setattr(Worker, "ask", noted)
    slow = replace(QUICK, slow_seconds=0.0001, start_seconds=0.001, cold_starts=4, memory_photos=2)
    one, two = bench(fake("one"), fake("two"), settings=slow)
    assert asked == [("time", 1, True)] * 2 * (1 + slow.rounds)
    assert one["latency"]["end_to_end"]["runs"] == slow.rounds and "picture_to_text" not in one["latency"]
    assert one["timed_by"] == two["timed_by"] == "once"
    assert one["speedup"]["two"]["end_to_end"]["rounds"] == slow.rounds
    assert len(one["cold_start"]["runs"]) == 1  # one took longer than they all may
    assert len(two["captions"]) == two["quality"]["photos"] == len(PHOTOS)
    for few in (1, 3):  # fewer than the memory's process made, and more
        found = bench(fake("one"), fake("two"), settings=replace(slow, slow_photos=few))
        assert [(len(row["captions"]), row["quality"]["photos"]) for row in found] == [(few, few)] * 2
    asked.clear()
    usual = bench(fake("one"), fake("two"), settings=QUICK)
    assert {once for _, _, once in asked} == {False} and [row["timed_by"] for row in usual] == ["parts"] * 2


HALVES = replace(QUICK, rounds=2, min_runs=2, warmup=1, cold_starts=0, slow_seconds=0.07)  # what is slow takes 0.1 s


@pytest.mark.parametrize(
    ("modes", "timed_by"),
    [
        (("ok", "caption:slow", "caption:slow"), "once"),
        (("ok", "ok", "caption:slow"), "parts"),
        (("load:error", "load:error", "caption:slow"), "once"),  # those that failed do not count
    ],
)
def test_a_group_is_slow_by_its_median_row(modes: tuple[str, ...], timed_by: str) -> None:
    rows = bench(*(fake(str(k), mode) for k, mode in enumerate(modes)), settings=HALVES)
    assert {row["timed_by"] for row in rows if row["status"] == "ok"} == {timed_by}


def test_whether_a_group_is_slow_is_decided_once() -> None:
    """The one fast row fails at load, after the group's photos were settled: the others are timed as it was settled."""

    class Breaks(Local):
        started: ClassVar[list[str]] = []

        def start(self, subject: Subject, threads: int) -> Running:
            again = subject.name in self.started
            self.started.append(subject.name)
            return super().start(fake("fast", "load:error") if again and subject.name == "fast" else subject, threads)

    subjects, settings = [fake("fast"), fake("slow", "caption:slow")], replace(HALVES, slow_photos=2)
    bad, good = run(subjects, PHOTOS, settings, lambda *_: None, Breaks())["rows"]
    assert bad["error"].startswith("load: ")
    assert good["timed_by"] == "parts" and len(good["captions"]) == len(PHOTOS)

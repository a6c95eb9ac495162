"""Cores and memory of a worker: chosen, kept, and told when they are not."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from edgecap.benchmarks.quality import Photo
from edgecap.benchmarks.reach import reach
from edgecap.benchmarks.runner import Worker, WorkerFailed
from edgecap.benchmarks.subjects import Subject
from edgecap.benchmarks.suite import Settings, run
from edgecap.devices import Profile, get_profile
from edgecap.devices.confine import (
    Cgroup,
    MemoryLimit,
    Watchdog,
    _cgroup_parent,
    choose_cores,
    memory_limits,
    parse_size,
    pinned,
)
from edgecap.runtime.errors import UsageError

FAKE = Path(__file__).parent.parent / "benchmarks" / "fake_worker.py"
MIB = 2**20
SAY = "import json; print(json.dumps({'ok': True, 'peak_rss': %s}), flush=True)\n"
GROW = (
    "import mmap, time\nfrom edgecap.benchmarks.rss import peak_rss\nimport json\n"
    "print(json.dumps({'ok': True, 'peak_rss': peak_rss()}), flush=True)\n"
    "input()\nkept = bytearray(400 * 2**20)\nkept[::4096] = b'x' * len(kept[::4096])\ntime.sleep(600)"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc, affinity")


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 * MIB), ("512MiB", 512 * MIB), ("1.5g", 1536 * MIB), ("67108864", 64 * MIB)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1M", "512", "0", "512X", "1K"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="a memory limit is 16M or more"):
        parse_size(text)


@linux
def test_cores_are_chosen_of_those_there_are() -> None:
    allowed = os.sched_getaffinity(0)
    (one,) = choose_cores(1)
    assert one in allowed and set(choose_cores(10_000)) == allowed
    with pinned([one]):
        assert os.sched_getaffinity(0) == {one} and choose_cores(2) == (one,)
        others: list[set[int]] = []
        thread = threading.Thread(target=lambda: others.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert others == [{one}]  # inherited, as a process is
    assert os.sched_getaffinity(0) == allowed


@linux
def test_a_worker_runs_on_its_cores_alone() -> None:
    code = "import json, os; print(json.dumps({'ok': True, 'cores': list(os.sched_getaffinity(0))}), flush=True)"
    cores = choose_cores(1)
    with Worker([sys.executable, "-c", code], cores=cores) as worker:
        assert tuple(worker.receive(60)["cores"]) == cores


@linux
def test_a_worker_that_grows_beyond_its_limit_is_ended() -> None:
    limit = memory_limits(200 * MIB)()
    with Worker([sys.executable, "-c", GROW], limit=limit) as worker:
        assert worker.receive(60)["ok"]
        worker._process.stdin.write(b"go\n")
        worker._process.stdin.flush()
        with pytest.raises(WorkerFailed, match="was ended: over its memory limit of 200 MiB"):
            worker.receive(60)


def test_a_peak_over_the_limit_is_not_survived_by_luck() -> None:
    """Held between two looks and given back: the process's own peak tells."""
    with Worker([sys.executable, "-c", SAY % (300 * MIB)], limit=MemoryLimit(200 * MIB)) as worker:
        with pytest.raises(WorkerFailed, match=r"over its memory limit of 200 MiB \(it held 300 MiB\)"):
            worker.receive(60)


def test_within_the_limit_nothing_happens() -> None:
    with Worker([sys.executable, "-c", SAY % (30 * MIB)], limit=Watchdog(200 * MIB)) as worker:
        assert worker.receive(60)["peak_rss"] == 30 * MIB


@linux
def test_time_runs_from_the_process_itself_and_not_from_what_wraps_it() -> None:
    limit = MemoryLimit(200 * MIB)
    limit.wrapper = ("sh", "-c", 'sleep 1 && echo && exec "$@"', "sh")
    with Worker([sys.executable, "-c", SAY % 1], limit=limit) as worker:
        assert worker.receive(60)["since_start"] < 0.9
    limit.wrapper = ("sh", "-c", "echo no such scope >&2; exit 4", "sh")
    with pytest.raises(WorkerFailed, match="could not be started: ended with exit code 4: no such scope"):
        Worker([sys.executable, "-c", SAY % 1], limit=limit)


@linux
def test_a_cgroup_is_made_and_read(tmp_path: Path) -> None:
    """On a folder in place of the kernel's: which files are written, and how its count of kills is read."""
    limit = Cgroup(200 * MIB, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert (folder / "memory.max").read_text() == str(200 * MIB)
    with Worker([sys.executable, "-c", SAY % 1], limit=limit) as worker:
        assert (folder / "cgroup.procs").read_text() == f"{worker._process.pid}\n"
        assert worker.receive(60)["ok"]
        assert not limit.ended(-9)
        (folder / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
        assert limit.ended(-9)


@pytest.mark.skipif(sys.platform != "linux" or _cgroup_parent() is None, reason="no cgroup v2 that we may write to")
def test_the_kernel_ends_what_is_over_its_limit_where_we_may_ask_it() -> None:
    assert memory_limits(200 * MIB)().enforced_by == "cgroup v2"


@linux
def test_one_over_its_limit_is_a_row_that_says_so_and_the_bench_goes_on() -> None:
    device = reach(get_profile("cpu"), memory_limit=120 * MIB)
    big = f"import runpy, sys; sys.argv = ['x', 'ok']; kept = b'x' * {300 * MIB}\n"
    big += f"runpy.run_path({str(FAKE)!r}, None, '__main__')"
    subjects = [
        Subject("big", "fake", Path("x"), (sys.executable, "-c", big), {}, {}),
        Subject("small", "fake", Path("x"), (sys.executable, str(FAKE), "ok"), {}, {}),
    ]
    photos = [Photo(f"p{k}", f"p{k}.jpg", ("a dog", "a cat")) for k in range(2)]
    quick = Settings(rounds=2, min_runs=2, min_seconds=0, warmup=1, cold_starts=1, timeout=60)
    one, two = run(subjects, photos, quick, lambda *phase: None, device)["rows"]
    assert "over its memory limit of 120 MiB" in one["error"] and one["status"] == "failed"
    assert two["status"] == "ok"
    told = device.facts(1)
    assert told["memory_limit"]["bytes"] == 120 * MIB and told["memory_limit"]["enforced_by"]
    assert told["pinned"] == list(choose_cores(1))


def test_a_local_profile_s_memory_is_its_limit_and_a_page_has_none() -> None:
    small = Profile("small", "local", "native", ("onnx-int8",), memory_mb=256)
    assert reach(small).memory_limit == 256 * MIB
    assert reach(small, memory_limit=64 * MIB).memory_limit == 64 * MIB
    assert reach(get_profile("cpu")).memory_limit is None
    with pytest.raises(UsageError, match="memory cannot be limited there"):
        reach(get_profile("iphone"), memory_limit=64 * MIB)

"""The bench in a real browser: headless Chromium opens the page over HTTPS, through loopback and from a network
namespace of its own, which sees this machine as a phone does.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgecap.benchmarks import browser as browsers
from edgecap.benchmarks.browser import Browser, Options
from edgecap.benchmarks.quality import Photo
from edgecap.benchmarks.runner import WorkerFailed
from edgecap.benchmarks.subjects import bundle_subject
from edgecap.devices import cpu_facts, get_profile, webfiles
from edgecap.devices.channel import Channel
from edgecap.runtime import Captioner

from ..runtime.graphs import photo, write_gru_bundle

CHROMIUM = os.environ.get("EDGECAP_CHROMIUM", "chromium")
LACKING = webfiles.lacking() if shutil.which(CHROMIUM) else f"there is no {CHROMIUM} (EDGECAP_CHROMIUM names another)"
pytestmark = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))

# Two network namespaces and a cable between them: the bench runs in one, the browser in the other.
NAMESPACES = """
set -e
ip link set lo up
unshare -n sleep 120 & other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add bench type veth peer name phone
ip link set phone netns $other
ip addr add 10.77.0.1/24 dev bench
ip link set bench up
nsenter -t $other -n ip addr add 10.77.0.2/24 dev phone
nsenter -t $other -n ip link set phone up
ip route add default via 10.77.0.2
printf '#!/bin/sh\\nexec nsenter -t %s -n %s "$@"\\n' $other "$EDGECAP_CHROMIUM" > browser
chmod +x browser
"$@"
"""
BENCH = """
import json, sys
from dataclasses import replace
from pathlib import Path
from edgecap.benchmarks.bench import bench
from edgecap.benchmarks.browser import Options
from edgecap.benchmarks.suite import Settings
how = json.loads(sys.argv[1])
quick = Settings(rounds=2, min_runs=2, min_seconds=0, warmup=1, cold_starts=1, limit_seconds=0, timeout=60)
quick = replace(quick, threads=how.pop("threads"))
options = Options(open="./browser", lan=True, native=True, wait=60, **how)
record = bench([Path("tiny.edgecap")], device="browser", settings=quick, browser=options)
Path("record.json").write_text(json.dumps(record))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def test_tokens_are_python_s_through_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_gru_bundle(tmp_path / "tiny.edgecap").path
    photos = []
    for i, size in enumerate([(16, 16), (40, 60), (123, 77)]):
        photo(i, size).save(tmp_path / f"{i}.png")
        photos.append(Photo(str(i), str(tmp_path / f"{i}.png"), ("a red circle",)))
    monkeypatch.setattr(browsers, "lan_addresses", list)
    monkeypatch.setattr(browsers, "Channel", lambda: Channel(gone_after=2))
    (subject, _), files = bundle_subject(bundle), [each.path for each in photos]
    with Browser(get_profile("browser"), Options(open=CHROMIUM, wait=60)) as device:
        device.prepare([subject], photos, lambda *_: None)
        assert device.url.startswith("https://127.0.0.1:")
        assert device._hello["secure"] and device._hello["isolated"]
        for beam in (1, 3):
            worker = device.start(replace(subject, decoding={**subject.decoding, "beam": beam}), 2)
            decoding = {"beam": beam, "max_length": 5, "deadline_ms": 1e8}
            facts = worker.ask("load", timeout=60, **subject.load_request(2) | {"decoding": decoding})["facts"]
            assert facts["threads"] == min(2, cpu_facts().cores) and facts["engine"] == "wasm"
            assert facts["page_weight"]["bundle"] > 1000 and facts["page_weight"]["runtime"] > 10**6
            found = worker.ask("caption", photos=files, timeout=60)
            with Captioner.load(bundle) as captioner:
                expected = captioner(files, **decoding)
            assert [c["ids"] for c in found["captions"]] == [list(c.token_ids) for c in expected]
            assert [c["text"] for c in found["captions"]] == [c.text for c in expected]
            assert [c["logprob"] for c in found["captions"]] == pytest.approx([c.logprob for c in expected], abs=1e-4)
            assert found["since_start"] > facts["load_s"] > 0
            peak = worker.peak_memory(found, 60)
            assert (peak is None) == (facts["threads"] > 1), "threads that wait cannot be asked"
            worker.close()
        with pytest.raises(WorkerFailed, match="in the page: .*404"):
            device._bundles[bundle][1]["bundles/0/nothing"] = 1
            device.start(subject, 1).ask("load", timeout=60, **subject.load_request(1))
        last = device.start(subject, 1)
        assert device._headless is not None
        device._headless.close()
        with pytest.raises(WorkerFailed, match="the device went away"):
            last.ask("load", timeout=60, **subject.load_request(1))


def bench_from_another_host(tmp_path: Path, **how: Any) -> dict[str, Any]:
    """The record of a bench in one namespace whose page Chromium opens in the other."""
    lineage = {"data": "scenes:train=1,val=1,test=2,size=32", "passes": []}
    write_gru_bundle(tmp_path / "tiny.edgecap", lineage=lineage)
    root = ["unshare", "-n"] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["unshare", "-rn"]
    may = shutil.which("unshare") and shutil.which("ip") and shutil.which("nsenter")
    cable = [*root, "ip", "link", "add", "bench", "type", "veth", "peer", "name", "phone"]
    if not may or subprocess.run(cable, capture_output=True).returncode:
        pytest.skip("no network namespace may be made here (unshare -n, ip link add … type veth)")
    command = [*root, "sh", "-c", NAMESPACES, "sh", sys.executable, "-c", BENCH, json.dumps(how)]
    given = os.environ | {"EDGECAP_CHROMIUM": CHROMIUM}
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    for row in record["rows"]:
        assert row["status"] == "ok", row["error"]
    return record


def test_a_whole_bench_from_another_host(tmp_path: Path) -> None:
    record = bench_from_another_host(tmp_path, threads=1)
    there, here = record["rows"]
    assert record["device"]["browser"]["secure"] and record["device"]["browser"]["isolated"]
    assert record["device"]["cpu"]["model"].startswith("headless Chromium")
    assert here["quality"]["identical_to_first"] == 1.0
    assert there["against_native"]["same_tokens"] == 2 and there["against_native"]["ok"]
    assert {"preprocess", "encode", "first_token", "decode", "end_to_end"} <= set(there["latency"])
    assert there["memory"]["peak_rss"] > 10**6 and there["cold_start"]["seconds"] > 0


def test_plain_http_from_another_host_has_one_thread_and_the_same_tokens(tmp_path: Path) -> None:
    record = bench_from_another_host(tmp_path, threads=2, http=True)
    there, _ = record["rows"]
    found = record["device"]["browser"]
    assert not found["secure"] and not found["isolated"] and found["webgpu"] is None
    assert record["settings"]["threads"] == 2 and there["facts"]["threads"] == 1 and there["facts"]["engine"] == "wasm"
    assert there["against_native"]["same_tokens"] == 2 and there["against_native"]["ok"]
    assert there["memory"]["peak_rss"] is None and there["cold_start"]["seconds"] > 0


def test_webgpu_gives_the_tokens_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Chromium's adapter in software, which has to be asked for: of speed it says nothing."""
    bundle = write_gru_bundle(tmp_path / "tiny.edgecap").path
    files = []
    for i, size in enumerate([(16, 16), (40, 60), (123, 77)]):
        photo(i, size).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    program = tmp_path / "browser"
    flags = "--enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --enable-features=Vulkan"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(CHROMIUM)} {flags} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(browsers, "lan_addresses", list)
    (subject, _) = bundle_subject(bundle)
    with Browser(get_profile("browser"), Options(open=str(program), webgpu=True, wait=60)) as device:
        device.prepare([subject], [Photo(file, file, ()) for file in files], lambda *_: None)
        assert device._hello["webgpu"], "no adapter"
        worker = device.start(subject, 1)
        facts = worker.ask("load", timeout=120, **subject.load_request(1))["facts"]
        assert facts["engine"] == "webgpu" and device.facts(1)["browser"]["engine"] == "webgpu"
        found = worker.ask("caption", photos=files, timeout=120)["captions"]
    with Captioner.load(bundle) as captioner:
        expected = captioner(files)
    assert [c["ids"] for c in found] == [list(c.token_ids) for c in expected]
    assert [c["logprob"] for c in found] == pytest.approx([c.logprob for c in expected], abs=1e-3)

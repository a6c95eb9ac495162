"""A browser as a device of the bench, its page played by a thread: what is asked, believed, and put into a row."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgecap.benchmarks import browser as browsers
from edgecap.benchmarks.bench import bench
from edgecap.benchmarks.browser import Browser, Options, png
from edgecap.benchmarks.browser_answers import browser_name, checked, device_facts
from edgecap.benchmarks.device import Device
from edgecap.benchmarks.report import render, weight_lines
from edgecap.benchmarks.runner import WorkerFailed
from edgecap.benchmarks.subjects import bundle_subject
from edgecap.benchmarks.suite import Settings
from edgecap.cli import cli
from edgecap.devices import browser as servers
from edgecap.devices import get_profile, webfiles
from edgecap.runtime import Bundle
from edgecap.runtime.errors import EdgecapError, UsageError

from ..runtime.graphs import photo, write_fused_bundle, write_gru_bundle

DATA = "scenes:train=1,val=1,test=3,size=32"
QUICK = Settings(rounds=3, min_runs=3, min_seconds=0, warmup=1, cold_starts=1, limit_seconds=0, timeout=20)
HELLO = {"user_agent": "Mozilla/5.0 (Linux; Android 15) Chrome/150.0.0.0 Mobile Safari/537.36", "cores": 8}
HELLO |= {"memory_gb": 8, "secure": True, "isolated": True, "webgpu": None}
RUN = {"end_to_end": 0.02, "picture_to_text": 0.01, "encode": 0.005, "decode": 0.004, "tokens": 2, "madness": 7}
RUN |= {"preprocess": 0}  # by a coarse clock
CAPTION = {"text": "a red\n circle", "logprob": -1.5, "tokens": 2, "ids": [4, 5]}


def good(command: dict[str, Any]) -> Any:
    """What a sound page answers."""
    since = {"ok": True, "since_start": 0.25}
    if command["op"] == "load":
        versions = {"onnxruntime-web": "1.30.0"}
        facts = {"import_s": 0.1, "load_s": 0.05, "threads": command["threads"], "engine": "wasm", "versions": versions}
        return since | {"facts": facts}
    if command["op"] == "memory":
        return {"ok": True, "bytes": 50_000_000}
    found = {"time": ("runs", RUN), "caption": ("captions", CAPTION), "close": ("nothing", None)}[command["op"]]
    return since | {found[0]: [found[1]] * len(command.get("photos", ()))}


class Page(threading.Thread):
    """Opens the page of a server and plays it; `answer` gives what is posted, None to go away without a word."""

    def __init__(self, url: str, answer: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.answer_to, self.end, self.files = url, answer, None, {}

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with urllib.request.urlopen(self.url + path, data, timeout=20) as reply:
            return reply.status, reply.read()

    def run(self) -> None:
        try:
            self.play()
        except urllib.error.URLError:
            pass  # the bench has ended

    def play(self) -> None:
        me = "page=0123456789abcdef"
        self.ask(f"hello?{me}", HELLO)
        last = 0
        while True:
            status, body = self.ask(f"next?{me}&after={last}")
            if status == 204:
                continue
            command = json.loads(body)
            if command["op"] == "end":
                self.end = command
                return
            last = command["id"]
            for path in [*command.get("files", ()), *command.get("photos", ())]:
                self.files[path] = self.ask(path)[1]
            answer = self.answer_to(command)
            if answer is None:
                self.ask(f"bye?{me}", b"")
                return
            self.ask(f"answer?{me}&id={command['id']}", answer)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files where the server looks for them; nothing runs them here."""
    script, (engine, *_) = webfiles.WASM
    for name in ("package/index.js", f"ort/{script}", f"ort/{engine}.mjs", f"ort/{engine}.wasm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("// nothing")
    monkeypatch.setattr(webfiles, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("EDGECAP_ORT_WEB", str(tmp_path / "ort"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_gru_bundle(tmp_path / "tiny.edgecap", lineage={"data": DATA, "passes": []})
    return tmp_path / "tiny.edgecap"


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], Any]], list[Page]]:
    """Has a page open as soon as a server starts."""

    def begin(answer: Callable[[dict[str, Any]], Any]) -> list[Page]:
        pages: list[Page] = []

        class Opened(servers.Server):
            def start(self) -> None:
                super().start()
                pages.append(Page(self.url("127.0.0.1"), answer))
                pages[-1].start()

        monkeypatch.setattr(browsers, "Server", Opened)
        return pages

    return begin


def test_a_page_s_figures_become_a_record(web: None, bundle: Path, play: Any, capsys: Any) -> None:
    pages = play(good)
    options = Options(http=True, wait=20, native=True)
    record = bench([bundle], device="android-mid", settings=QUICK, browser=options)
    there, here = record["rows"]
    assert [row["status"] for row in record["rows"]] == ["ok", "ok"], (there["error"], here["error"])
    assert record["device"]["name"] == "android-mid" and record["device"]["kind"] == "browser"
    assert record["device"]["cpu"]["model"] == "Chrome 150 on Android 15" and record["device"]["cpu"]["cores"] == 8
    assert record["versions"]["onnxruntime-web"] == "unknown"
    assert there["latency"]["end_to_end"]["p50"] == 0.02 and "madness" not in there["latency"]
    assert there["cold_start"]["seconds"] == 0.25 and there["memory"]["peak_rss"] == 50_000_000
    assert {c["text"] for c in there["captions"].values()} == {"a red circle"}
    assert there["facts"]["threads"] == 1
    weight = there["facts"]["page_weight"]
    assert weight["bundle"] == sum(len(data) for path, data in pages[0].files.items() if path.startswith("bundles/"))
    assert weight["as_is"] == weight["bundle"] + weight["runtime"], "urllib takes no gzip"
    assert "MB of it as it is, the rest compressed by gzip" in "".join(weight_lines([there]))
    packed = there | {"facts": {"page_weight": {"runtime": 3_000_000, "bundle": 5_000_000, "as_is": 0}}}
    assert list(weight_lines([packed])) == ["tiny: a page of 3.0 MB and 5.0 MB of bundle, compressed by gzip"]
    assert here["name"] == "tiny native" and here["speedup"]["tiny"]["end_to_end"]["ratio"] > 0
    assert there["against_native"]["photos"] == 3 and not there["against_native"]["ok"], "it says the same of each"
    json.dumps(record, allow_nan=False)
    if find_spec("jinja2"):
        from edgecap.benchmarks.report_html import html

        assert "Chrome 150 on Android 15" in html(record) and "threads were allowed" in html(record)
    assert "Chrome 150 on Android 15" in str(render(record).renderables[0])
    pages[0].join(5)
    assert pages[0].end["text"].startswith("Done.") and [row["name"] for row in pages[0].end["rows"]] == [
        "tiny",
        "tiny native",
    ]
    said = capsys.readouterr().err
    assert "Plain HTTP: 1 thread, no WebGPU" in said and "Waiting up to 20 s" in said


def test_rows_that_the_profile_s_memory_cannot_hold_are_told(capsys: Any) -> None:
    held = {"large": {"peak_rss": 1025 * 2**20}, "small": {"peak_rss": 1024 * 2**20}, "odd": {"peak_rss": None}}
    rows = [{"name": name, "memory": memory} for name, memory in [*held.items(), ("failed", None)]]
    Device(get_profile("browser")).done({"rows": rows})
    assert capsys.readouterr().err == "large held 1,025 MiB at its peak, and browser has 1,024 MiB by its profile\n"
    Device(get_profile("cpu")).done({"rows": rows})
    assert capsys.readouterr().err == "", "this machine is asked, and has no such number"


def test_a_fused_graph_is_not_sent(web: None, bundle: Path, play: Any, tmp_path: Path) -> None:
    """Before, a phone fetched it, too, and the page's weight had it."""
    both = write_fused_bundle(tmp_path / "both" / "tiny.edgecap", lineage={"data": DATA, "passes": []})
    pages = play(good)
    (row,) = bench([both.path], device="browser", settings=QUICK, browser=Options(http=True, wait=20))["rows"]
    assert row["status"] == "ok", row["error"]
    sent = {Path(path).name: data for path, data in pages[0].files.items() if path.startswith("bundles/")}
    assert set(sent) == {"bundle.json", *both.manifest["files"]} - {"fused.onnx"}
    assert row["facts"]["page_weight"]["bundle"] == sum(map(len, sent.values()))
    (tmp_path / "sent").mkdir()
    for name, data in sent.items():
        (tmp_path / "sent" / name).write_bytes(data)
    assert Bundle.open(tmp_path / "sent").manifest == Bundle.open(bundle).manifest, "nothing is missing that it lists"


def test_slow_captioners_are_timed_there_by_one_caption_a_photo(web: None, bundle: Path, play: Any) -> None:
    asked: list[bool] = []

    def page(command: dict[str, Any]) -> Any:
        if command["op"] != "time":
            return good(command)
        asked.append(command.get("once"))
        return good(command) | {"runs": [{k: v for k, v in RUN.items() if k != "picture_to_text"}]}

    play(page)
    settings = replace(QUICK, slow_seconds=0.0)
    (row,) = bench([bundle], device="browser", settings=settings, browser=Options(http=True, wait=20))["rows"]
    assert row["status"] == "ok" and row["timed_by"] == "once" and asked == [True] * 4, row["error"]
    assert "once: command.once" in (Path(webfiles.__file__).parent / "page/page.js").read_text()
    with pytest.raises(WorkerFailed, match="no time above 0 for picture_to_text"):
        checked({"op": "time", "photos": ["p"]}, {"ok": True, "since_start": 1, "runs": [{"end_to_end": 1}]})


def test_photos_without_references_have_a_last_page_too() -> None:
    row = {"name": "x", "status": "ok", "latency": {"end_to_end": {"p50": 0.1, "p90": 0.2}}}
    row |= {"cold_start": {"seconds": 1.0}, "quality": None}
    assert browsers.result({"rows": [row]})["rows"][0]["values"] == ["1,000 ms", "100 ms", "200 ms", "–"]


def test_photos_reach_the_page_pixel_by_pixel(web: None, bundle: Path, play: Any, tmp_path: Path) -> None:
    photo(3, (40, 60)).save(tmp_path / "a.jpg", quality=70)
    with Image.open(tmp_path / "a.jpg") as jpeg, Image.open(io.BytesIO(png(str(tmp_path / "a.jpg")))) as sent:
        assert sent.format == "PNG" and (np.asarray(jpeg) == np.asarray(sent)).all()


@pytest.mark.parametrize(
    ("op", "answer", "said"),
    [
        ("load", b"{not json", "something that is not a JSON object"),
        ("load", {"ok": False, "error": "no\nmemory"}, "in the page: no memory"),
        ("load", {"ok": True, "since_start": 1, "facts": {"import_s": -1}}, "no import_s in seconds"),
        ("caption", {"ok": True, "since_start": 1, "captions": []}, "captions are not a list of 1"),
        ("caption", {"ok": True, "since_start": 1, "captions": [{"text": "x" * 9999}]}, "at most 4000 characters"),
        ("time", {"ok": True, "since_start": 1, "runs": [RUN | {"encode": 1e99}]}, "no encode in seconds"),
        ("time", {"ok": True, "since_start": 1, "runs": [{"end_to_end": 0, "tokens": 1}]}, "no time above 0"),
        ("time", None, "the device went away: its page was closed"),
    ],
)
def test_what_is_not_believed_is_a_row_that_says_so(
    web: None, bundle: Path, play: Any, op: str, answer: Any, said: str
) -> None:
    play(lambda command: answer if command["op"] == op else good(command))
    record = bench([bundle], device="browser", settings=QUICK, browser=Options(http=True, wait=20))
    (row,) = record["rows"]
    assert row["status"] == "failed" and said in row["error"], row["error"]


def test_a_page_that_hangs_is_a_row_that_says_so(web: None, bundle: Path, play: Any) -> None:
    wait = threading.Event()
    play(lambda command: wait.wait(10) and None)
    with Browser(get_profile("browser"), Options(http=True)) as device:
        assert device.url.startswith("http://")
        assert device.channel.wait(10) == HELLO
        device._bundles[bundle] = device._serve_bundle(bundle, "bundles/0/")
        worker = device.start(bundle_subject(bundle)[0], 1)
        with pytest.raises(WorkerFailed, match="gave no answer within 0.2 s"):
            worker.ask("load", threads=1, decoding={}, timeout=0.2)
        wait.set()


def test_waiting_has_an_end(web: None, bundle: Path) -> None:
    with pytest.raises(EdgecapError, match="no device opened http.* within 0.1 s"):
        bench([bundle], device="iphone", settings=QUICK, browser=Options(http=True, wait=0.1))
    with pytest.raises(EdgecapError, match="false ended with exit code 1 before it opened the page"):
        bench([bundle], device="iphone", settings=QUICK, browser=Options(http=True, wait=60, open="false"))
    with pytest.raises(UsageError, match="no program nosuchbrowser"):
        bench([bundle], device="iphone", settings=QUICK, browser=Options(http=True, open="nosuchbrowser"))


def test_peers_and_fused_graphs_do_not_run_there(web: None, bundle: Path, play: Any, capsys: Any) -> None:
    with Browser(get_profile("browser"), Options(http=True)) as device:
        subject = bundle_subject(bundle)[0]
        assert device.subjects([subject, replace(subject, fused=True)]) == [subject]
    assert "one-graph forms are left out" in capsys.readouterr().err
    play(good)
    record = bench([bundle], peers=[f"torch:{bundle}"], device="browser", settings=QUICK, browser=Options(http=True))
    assert [row["status"] for row in record["rows"]] == ["ok", "failed"]
    assert "peers do not run in a browser" in record["rows"][1]["error"]


def test_the_command_says_what_is_for_browsers_alone(web: None, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli, ["bench", str(bundle), "--webgpu"])
    assert result.exit_code != 0 and "cpu is no browser" in str(result.exception)
    result = CliRunner().invoke(cli, ["bench", str(bundle), "--host", "pi@pi5.local"])
    assert "--host names a device that is reached over ssh, and cpu is not" in str(result.exception)
    monkeypatch.setenv("EDGECAP_ORT_WEB", "/nowhere")
    result = CliRunner().invoke(cli, ["bench", str(bundle), "--device", "browser"])
    assert "npm install --prefix DIR onnxruntime-web" in str(result.exception)


def test_what_a_page_says_of_itself() -> None:
    assert device_facts("nonsense")["cores"] is None and device_facts({"cores": True})["cores"] is None
    facts = device_facts({"webgpu": {"vendor": "arm", "architecture": "valhall\x1b[2J"}, "memory_gb": float("inf")})
    assert facts["webgpu"] == "arm valhall [2J" and facts["memory_gb"] is None
    assert device_facts({"webgpu": "x"})["webgpu"] is None
    for odd in (10**400, float("nan"), "-1", True):
        said = {"ok": True, "since_start": 0, "captions": [CAPTION | {"logprob": odd}]}
        assert checked({"op": "caption", "photos": ["p"]}, said)["captions"][0]["logprob"] is None
    assert checked({"op": "memory"}, {"ok": True, "since_start": 0, "bytes": "many"}) == {"bytes": None}
    phone = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_1 like Mac OS X) Version/18.1 Mobile/15E148 Safari/604.1"
    assert browser_name(phone) == ("Safari 18", "iOS 18.1")
    assert browser_name("Mozilla/5.0 (Windows NT 10.0) Chrome/150.0 Edg/150.0") == ("Edge 150", "Windows NT 10.0")
    assert browser_name("") == ("unknown browser", "unknown system")

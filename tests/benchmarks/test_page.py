"""The HTML report: whole and self-contained, safe against what captions may hold, and true to the record."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgecap.benchmarks import page as module
from edgecap.benchmarks import record as records
from edgecap.benchmarks.compare import compare, since_last
from edgecap.benchmarks.latency import speedup
from edgecap.benchmarks.page import captions, grouped, headline, page, pieces, plots, stage_bars, thumbnail, write_page
from edgecap.benchmarks.plots import Point, frontier, pareto
from edgecap.benchmarks.quality import Photo
from edgecap.benchmarks.report import limits_line
from edgecap.cli import cli
from edgecap.runtime.errors import MissingExtra, UsageError

from .records import made_up_record, made_up_row

pytest.importorskip("jinja2", reason="the report needs the extra `bench`")
EVIL = '<script>alert(1)</script> "x" & {{ 7*7 }} \u202e'


class Reader(HTMLParser):
    """Tags in order, what is open, and all text."""

    VOID = {"meta", "img", "line", "circle", "polyline", "br"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def with_speedups(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    for row in rows:
        row["speedup"] = {
            other["name"]: {"end_to_end": speedup(other["rounds"]["end_to_end"], row["rounds"]["end_to_end"]).to_dict()}
            for other in rows
            if other is not row
        }
    return list(rows)


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """Two bundles with a peer each, one peer for both, one that was refused, and one fused row."""
    rows = with_speedups(
        made_up_row("small", seed=1),
        made_up_row("big", seed=2, factor=40),
        made_up_row("torch small", kind="torch", seed=3, factor=2, peer_of=["small"], near=None),
        made_up_row("torch big", kind="torch", seed=4, factor=30, peer_of=["big"], near=None),
    )
    fused = made_up_row("small fused", seed=1, near=None)
    fused["latency"] = {k: fused["latency"][k] for k in ("load", "end_to_end", "tokens_per_caption")}
    nothing = dict.fromkeys(("latency", "rounds", "near", "speedup", "memory", "cold_start", "quality", "captions"))
    refused = made_up_row("gguf small", kind="llama_cpp", status="refused", error="no such <architecture>", **nothing)
    return made_up_record(*rows, fused, refused)


def html_of(record: dict[str, Any], **more: Any) -> tuple[str, Reader]:
    text = page(record, **more)
    reader = Reader(text)
    assert not reader.open
    return text, reader


# --- the page ---


def test_it_needs_nothing_from_anywhere(full: dict[str, Any]) -> None:
    text, reader = html_of(full, photos={"photo 1": "data:image/jpeg;base64,AAAA"})
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_it_shows_what_was_measured(full: dict[str, Any]) -> None:
    _, reader = html_of(full)
    shown = " ".join(reader.text.split())
    for row in full["rows"][:4]:
        assert row["name"] in shown and f"{row['quality']['cider']:.3f}" in shown
    assert "no such <architecture>" in shown and "Not measured" in shown
    assert "25.0 GB/s" in shown and "12%" in shown and "2.8 MB a token" in shown
    assert "in one graph: its parts are not timed" in shown
    assert "Bundles and their peers share a scale" in shown
    assert "Test CPU" in shown and "scenes:test=12" in shown and "OMP_WAIT_POLICY=passive" in shown


@pytest.mark.parametrize("where", ["caption", "name", "error", "photo", "device", "version"])
def test_whatever_a_record_holds_is_text(where: str, full: dict[str, Any]) -> None:
    record = json.loads(json.dumps(full))
    row = record["rows"][0]
    if where == "caption":
        row["captions"]["photo 3"]["text"] = EVIL
    elif where == "name":
        row["name"] = EVIL
    elif where == "error":
        record["rows"][-1]["error"] = EVIL
    elif where == "photo":
        for each in record["rows"][:5]:
            each["captions"][EVIL] = each["captions"].pop("photo 1")
    elif where == "device":
        record["device"]["cpu"]["model"] = EVIL
    else:
        record["versions"]["onnxruntime"] = EVIL
    text, reader = html_of(record, changes=compare(record, record))
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "49" not in reader.text.partition("{{ 7*7")[2][:8] and "{{ 7*7 }}" in reader.text


def test_tables_have_heads_plots_have_words_and_regions_names(full: dict[str, Any]) -> None:
    _, reader = html_of(full)
    tags = reader.tags
    assert ("html", {"lang": "en"}) in tags and any(tag == "main" for tag, _ in tags)
    assert sum(tag == "h1" for tag, _ in tags) == 1
    for tag, attributes in tags:
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
        if tag == "svg":
            assert attributes["role"] == "img" and "CIDEr against milliseconds" in (attributes["aria-label"] or "")
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") == "region":
            assert "tabindex" in attributes and ({"aria-label", "aria-labelledby"} & set(attributes))
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_light_dark_phones_and_paper_are_thought_of(full: dict[str, Any]) -> None:
    text, _ = html_of(full)
    for rule in ("prefers-color-scheme: dark", "max-width: 640px", "@media print", "overflow-x: auto", "viewport"):
        assert rule in text


def test_a_run_of_one_bundle_has_no_plot_and_one_of_failures_still_a_page(full: dict[str, Any]) -> None:
    text, _ = html_of(made_up_record(made_up_row()))
    assert "<svg" not in text and "turns a JPEG into text in" in " ".join(text.split())
    text, reader = html_of(full | {"rows": full["rows"][-1:]})
    assert "no such <architecture>" in reader.text and "Results" not in reader.text


def test_an_emulated_device_has_captions_and_no_times() -> None:
    row = made_up_row("small", latency=None, rounds=None, speedup=None, cold_start=None, memory=None, near=None)
    row["against_native"] = {"error": None, "photos": 12, "same_tokens": 12, "same_captions": 12, "min_cosine": 0.999}
    row["against_native"]["ok"] = True
    record = made_up_record(row)
    record["device"] |= {"name": "emulated-arm64", "kind": "emulated-arm64", "times": "emulated", "load": 9.0}
    text, reader = html_of(record | {"limits": None}, changes=compare(record, record))
    shown = " ".join(reader.text.split())
    assert "its times would mean nothing" in shown and "trust the ratios" not in shown
    assert "same tokens for 12 of 12 photos" in shown and "a dog 3" in shown and "Where the time goes" not in shown
    assert not compare(record, record)["failed"]


def test_a_busy_machine_is_told_at_the_top(full: dict[str, Any]) -> None:
    busy = full | {"device": full["device"] | {"load": 9.0}}
    assert "trust the ratios" in page(busy) and "trust the ratios" not in page(full)


def test_what_changed_is_shown(full: dict[str, Any]) -> None:
    slower = made_up_record(made_up_row("small", seed=5, factor=1.3), made_up_row("other"))
    _, reader = html_of(slower, changes=compare(full, slower))
    shown = " ".join(reader.text.split())
    assert "Since the last record" in shown and "slower" in shown and "is not in the second record" in shown
    assert "new: other" in shown
    assert "holds no earlier record" in page(full, first_record=True)
    assert "Since the last record" not in page(full)


def test_photos_are_there_only_when_given(full: dict[str, Any], tmp_path: Path) -> None:
    Image.fromarray(np.zeros((600, 900, 3), np.uint8)).save(tmp_path / "x.png")
    uri = thumbnail(Photo("photo 1", str(tmp_path / "x.png"), ("a dog",)))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 5000
    assert "<img" not in page(full) and page(full, photos={"photo 1": uri}).count("<img") == 1


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="cannot write the report"):
        write_page("", tmp_path / "x" / "r.html")


def test_without_jinja_the_report_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **more: str) -> None:
        raise MissingExtra(more["command"], name, more["extra"])

    monkeypatch.setattr(module, "need", missing)
    result = CliRunner().invoke(cli, ["bench", "nowhere.edgecap", "--report", "x.html"])
    assert isinstance(result.exception, MissingExtra) and "edgecap[bench]" in result.exception.message


# --- its parts ---


def test_rows_that_share_peers_are_a_group_and_bundles_come_first() -> None:
    rows = [
        made_up_row("a"),
        made_up_row("b"),
        made_up_row("c"),
        made_up_row("p", kind="torch", peer_of=["c"]),
        made_up_row("q", kind="torch", peer_of=["a", "b"]),
    ]
    names = [[row["name"] for row in group] for group in grouped(rows)]
    assert names == [["a", "b", "q"], ["c", "p"]]
    assert [len(group) for group in grouped(rows[:3])] == [3]  # no peers: one table
    assert grouped([]) == []


def test_the_stages_of_a_bar_are_its_medians() -> None:
    row = made_up_row()
    found = stage_bars([[row]])
    ((parts,), own) = ([bar["parts"] for bar in found["bars"]], found["own"])
    latency = row["latency"]
    assert parts["encode"] == latency["encode"]["p50"] and not own
    assert parts["further_tokens"] == pytest.approx(latency["decode"]["p50"] - latency["first_token"]["p50"])
    assert max(sum(bar["widths"].values()) for bar in found["bars"]) <= 100.001
    assert (
        stage_bars([[row, made_up_row(factor=40)]])["own"] and not stage_bars([[row], [made_up_row(factor=40)]])["own"]
    )


def test_equal_captions_are_said_once_with_every_log_probability() -> None:
    one, two, three = (made_up_row(name) for name in "abc")
    for row, text, logprob in ((one, "a dog runs", -1.0), (two, "a dog runs", None), (three, "a cat runs", -3.0)):
        row["captions"] = {"photo": {"text": text, "logprob": logprob, "cider": 0.5}}
    ((photo),) = captions([one, two, three], {})
    assert [said["by"] for said in photo["said"]] == [[("a", -1.0), ("b", None)], [("c", -3.0)]]
    assert photo["said"][1]["pieces"] == [("a", False), ("cat", True), ("runs", False)]
    assert list(pieces("", "a dog")) == [] and list(pieces("a dog", "")) == [("a dog", True)]


def points(*places: tuple[float, float]) -> list[Point]:
    return [Point(f"p{i}", x, y, max(0, y - 0.05), y + 0.05, 1e6 * (i + 1), False) for i, (x, y) in enumerate(places)]


def test_the_frontier_is_of_those_that_none_beats_in_both() -> None:
    assert frontier(points((1, 0.5), (2, 0.4), (3, 0.6), (0.5, 0.1), (4, 0.6))) == [3, 0, 2]


@pytest.mark.parametrize("count", [2, 9, 30])
@pytest.mark.parametrize("span", [1.0, 1.5, 1000.0])
def test_the_plot_stays_in_its_frame(count: int, span: float) -> None:
    random = np.random.default_rng(count)
    places = points(*((0.01 * span ** random.uniform(), random.uniform(0, 1)) for _ in range(count)))
    found = pareto(places, [str(i) for i in range(count)], width=340, height=340, largest=14)
    for dot in found["dots"]:
        assert found["left"] <= dot["x"] <= found["right"] and found["top"] <= dot["y"] <= found["bottom"]
        assert 4 <= dot["r"] <= 14 and 0 < dot["label_x"] < 340 and 0 < dot["label_y"] < 340
    assert found["logarithmic"] == (span == 1000.0) and 2 <= len(found["y_ticks"]) <= 8
    assert found["x_ticks"]
    assert [dot["r"] for dot in found["dots"]] == sorted((dot["r"] for dot in found["dots"]), reverse=True)


def test_a_plot_of_equal_points_and_of_none_with_a_size_is_drawn() -> None:
    same = [Point(name, 0.01, 0.0, 0.0, 0.0, None, True) for name in "ab"]
    assert len(pareto(same, ["a", "b"], width=340, height=340, largest=14)["dots"]) == 2


# --- since the last record ---


def test_the_last_record_of_the_same_conditions_is_the_one_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    assert records.history(path) == []
    old, newer = (
        made_up_record(created="2026-01-01T00:00:00+00:00"),
        made_up_record(created="2026-01-02T00:00:00+00:00"),
    )
    two_threads = made_up_record(created="2026-01-03T00:00:00+00:00")
    two_threads["settings"] = two_threads["settings"] | {"threads": 2}
    others = made_up_record(made_up_row("another"), created="2026-01-04T00:00:00+00:00")
    for record in (old, newer, two_threads, others):
        records.append(record, path)
    with path.open("a") as file:
        file.write('{"half a li\n')
    history = records.history(path)
    assert len(history) == 4
    found = since_last(history, made_up_record())
    assert found is not None and found["created"][0] == newer["created"] and not found["failed"]
    assert since_last(history[2:], made_up_record()) is None
    with pytest.raises(UsageError, match="cannot be read"):
        records.history(tmp_path)


def test_a_report_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr("edgecap.benchmarks.bench.bench", lambda *_, **__: made_up_record())
    monkeypatch.setattr("edgecap.benchmarks.page.page", fails)
    files = [tmp_path / name for name in ("r.json", "h.jsonl", "r.html")]
    options = [word for pair in zip(("--json", "--history", "--report"), map(str, files), strict=True) for word in pair]
    result = CliRunner().invoke(cli, ["bench", *options])
    assert str(result.exception) == "a defect" and "JPEG → text" in result.output
    assert [file.exists() for file in files] == [True, True, False]


def test_rows_of_this_machine_beside_a_browser_are_not_at_the_top() -> None:
    here = made_up_row("tiny native", factor=0.1, facts={"on": "native"})
    record = made_up_record(made_up_row("tiny"), here, made_up_row("other", factor=2))
    assert headline(record)["fastest"]["name"] == "tiny"
    assert plots(record["rows"])["names"] == ["tiny", "other"]


def test_limits_are_of_the_device() -> None:
    record = made_up_record()
    assert limits_line(record).startswith("this machine's limits with 1 thread: ")
    record["device"] |= {"name": "raspberry-pi-5", "kind": "ssh"}
    assert limits_line(record).startswith("raspberry-pi-5's limits with 1 thread: ")

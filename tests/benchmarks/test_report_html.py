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

from edgecap.benchmarks import record as records
from edgecap.benchmarks import report
from edgecap.benchmarks import report_html as module
from edgecap.benchmarks.compare import compare, since_last, why_none
from edgecap.benchmarks.latency import speedup
from edgecap.benchmarks.plots import Point, frontier, pareto
from edgecap.benchmarks.quality import Photo
from edgecap.benchmarks.report_html import (
    against_peers,
    captions,
    headline,
    html,
    pieces,
    plots,
    protocol,
    short,
    stage_bars,
    thumbnail,
)
from edgecap.benchmarks.report_markdown import markdown
from edgecap.benchmarks.wording import grouped, rate_text, write_text
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
        made_up_row("big", seed=2, factor=40, group=1),
        made_up_row("torch small", kind="torch", seed=3, factor=2, peer_of=["small"], near=None),
        made_up_row("torch big", kind="torch", seed=4, factor=30, peer_of=["big"], near=None, group=1),
    )
    fused = made_up_row("small fused", seed=1, near=None)
    fused["latency"] = {k: fused["latency"][k] for k in ("load", "end_to_end", "tokens_per_caption", "tokens_per_s")}
    nothing = dict.fromkeys(("latency", "rounds", "near", "speedup", "memory", "cold_start", "quality", "captions"))
    refused = made_up_row("gguf small", kind="llama_cpp", status="refused", error="no such <architecture>", **nothing)
    return made_up_record(*rows, fused, refused)


def html_of(record: dict[str, Any], **more: Any) -> tuple[str, Reader]:
    text = html(record, **more)
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
    assert "TTFT ms" in shown and rate_text(full["rows"][0]["latency"]["tokens_per_s"]) in shown
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
            assert attributes.get("scope") in ("row", "col", "rowgroup")
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
    assert "trust the ratios" in html(busy) and "trust the ratios" not in html(full)
    clock = {"before": None, "after": None, "fell": ["its cores were throttled 4 times"]}
    hot = full | {"device": full["device"] | {"clock": clock}}
    for told in (html(hot), markdown(hot)):
        assert "he machine slowed down: its cores were throttled 4 times" in told
    assert any("in the second record the machine slowed" in note for note in compare(full, hot)["notes"])


def test_what_changed_is_shown(full: dict[str, Any]) -> None:
    slower = made_up_record(made_up_row("small", seed=5, factor=1.3), made_up_row("other"))
    _, reader = html_of(slower, changes=compare(full, slower))
    shown = " ".join(reader.text.split())
    assert "Since the last record" in shown and "slower" in shown and "is not in the second record" in shown
    assert "new: other" in shown
    assert "Nothing to compare with: no record yet." in html(full, alone="no record yet")
    assert "Since the last record" not in html(full)


def test_photos_are_there_only_when_given(full: dict[str, Any], tmp_path: Path) -> None:
    Image.fromarray(np.zeros((600, 900, 3), np.uint8)).save(tmp_path / "x.png")
    uri = thumbnail(Photo("photo 1", str(tmp_path / "x.png"), ("a dog",)))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 5000
    assert "<img" not in html(full) and html(full, photos={"photo 1": uri}).count("<img") == 1


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="cannot write the report"):
        write_text("", tmp_path / "x" / "r.html", "report")


def test_without_jinja_the_report_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **more: str) -> None:
        raise MissingExtra(more["command"], name, more["extra"])

    monkeypatch.setattr(module, "need", missing)
    result = CliRunner().invoke(cli, ["bench", "nowhere.edgecap", "--report", "x.html"])
    assert isinstance(result.exception, MissingExtra) and "edgecap[bench]" in result.exception.message


# --- its parts ---


def test_rows_are_shown_by_group_and_bundles_come_first() -> None:
    rows = [
        made_up_row("a", group=0),
        made_up_row("q", kind="torch", peer_of=["a", "b"], group=0),
        made_up_row("b", group=0),
        made_up_row("c", group=1),
        made_up_row("p", kind="torch", peer_of=["c"], group=1),
    ]
    names = [[row["name"] for row in group] for group in grouped(rows)]
    assert names == [["a", "b", "q"], ["c", "p"]]
    assert [len(group) for group in grouped([made_up_row("a"), made_up_row("b")])] == [2]  # an older record's
    assert grouped([]) == []


def test_bundles_of_several_groups_stand_in_one_table_against_their_peers() -> None:
    peers = [
        made_up_row(f"torch {x}", kind="torch", factor=f, group=i, facts={"precision": "fp32"})
        for i, (x, f) in enumerate((("a", 2.0), ("b", 3.0)))
    ]
    only = made_up_row("ort b", kind="onnxruntime", factor=1.2, group=1, facts={"precision": "int8"})
    a, b = made_up_row("a", group=0), made_up_row("b", group=1)
    with_speedups(a, peers[0])
    with_speedups(b, peers[1], only)
    groups = grouped([a, b, *peers, only])
    assert [[short(row, group) for row in group] for group in groups] == [
        ["a", "torch fp32"],
        ["b", "onnxruntime int8", "torch fp32"],  # the fastest peer first
    ]
    table = against_peers(groups)
    assert table is not None and table["ours"] == ["a", "b"] and table["peers"]["onnxruntime int8"][0] is None
    assert [cell["least"] for cell in table["peers"]["torch fp32"]] == [True, False]
    assert against_peers([[a]]) is None
    twice = [a, peers[0], made_up_row("torch c", kind="torch", facts={"precision": "fp32"})]
    assert [short(row, twice) for row in twice] == ["a", "torch a", "torch c"]
    shown = " ".join(html_of(made_up_record(a, b, *peers, only))[1].text.split())
    assert "times as fast as its best peer: a 2.0" in shown or "times as fast as its best peer: a 1.9" in shown


def test_a_bundle_is_held_against_its_own_peers_alone() -> None:
    """One bundle with two beams: the peer of beam 1 is faster than all, and no peer of beam 3."""
    facts = {"precision": "fp32"}
    rows = with_speedups(
        made_up_row("a beam 1"),
        made_up_row("a beam 3", factor=2.0),
        made_up_row("torch a", kind="torch", factor=0.5, peer_of=["a beam 1"], facts=facts),
        made_up_row("torch a beam 3", kind="torch", factor=4.0, peer_of=["a beam 3"], facts=facts),
        made_up_row("by hand", kind="openvino", factor=8.0, peer_of=[], facts=facts),
        made_up_row("a, in one", factor=2.0, facts={"run_by": "fused", "of": "a beam 3"}),
    )
    table = against_peers(grouped(rows))
    assert table is not None and table["ours"] == ["a beam 1", "a beam 3", "a, in one"]
    ratios = {name: [cell and round(cell["ratio"], 1) for cell in cells] for name, cells in table["peers"].items()}
    assert ratios == {"torch fp32": [0.5, 2.0, 2.0], "openvino fp32": [8.0, 4.0, 4.0]}
    other = made_up_row("other", group=1)
    (name, ratio), *more = headline(made_up_record(*rows, other), grouped([*rows, other]))["leads"]
    assert name == "a beam 1" and round(ratio["ratio"], 1) == 0.5 and not more
    rows[3]["status"] = "failed"
    rows[4]["status"] = "failed"
    found = against_peers(grouped(rows))
    assert found is not None and [bool(cell) for cell in found["peers"]["torch fp32"]] == [True, False, False]


def test_fewer_photos_and_runs_of_slow_rows_are_told() -> None:
    slow = [
        made_up_row("big", group=1, timed_by="once"),
        made_up_row("torch big", kind="torch", group=1, timed_by="once", peer_of=["big"]),
    ]
    for row in slow:
        row["quality"]["photos"] = 3
        row["captions"] = dict(list(row["captions"].items())[:3])
        row["cold_start"]["runs"] = [12.5]
    record = made_up_record(*slow, made_up_row("small"))  # the slow group first
    text = " ".join(html_of(record)[1].text.split())
    assert "test split, 3 to 12 photos" in text and "big and peers: 3 of the 12 photos" in text
    assert "at least 30 photos and 2 s each; where every caption of a group takes long, one caption a photo" in text
    assert "the median of 1 to 5" in text and "9 more photos" not in text
    assert "**" in markdown(record) and "3 to 12 photos of scenes" in markdown(record)
    assert "big and peers: 3 of the 12 photos" in markdown(record)
    shown = captions(grouped(record["rows"]), {})
    assert len(shown) == 12 and [len(photo["groups"]) for photo in shown[2:4]] == [2, 1]
    assert shown[3]["groups"][0]["model"] == "small"
    alone = made_up_record(slow[0])
    assert "3 of 12 photos" in html_of(alone)[1].text and "at least" not in protocol(alone)
    assert "first caption, once." in protocol(alone)
    assert "to 12 photos" not in html_of(made_up_record())[1].text


def test_what_failed_after_the_rounds_is_told() -> None:
    record = made_up_record() | {"problems": ["the check against this machine: KeyError: 'x'"]}
    said = "fter the rounds: the check against this machine: KeyError: 'x'"
    assert said in html_of(record)[1].text and said in markdown(record)
    assert "after the rounds: the check" in str(report.render(record).renderables[-1])


def test_rows_of_untrained_weights_are_no_dots() -> None:
    rows = [made_up_row(name) for name in "abc"]
    rows[0]["quality"] |= {"cider": 0.0, "cider_interval": {"mean": 0.0, "low": 0.0, "high": 0.001, "level": 0.95}}
    found = plots(rows)
    assert found is not None and found["names"] == ["b", "c"] and found["left_out"]


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
    peer = made_up_row("torch a", kind="torch", facts={"precision": "fp32"}, captions=two["captions"])
    (photo,) = captions([[one, two, three, peer]], {})
    said = photo["groups"][0]["said"]
    assert [each["bundles"] for each in said] == [[("a", -1.0), ("b", None)], [("c", -3.0)]]
    assert [each["peers"] for each in said] == [["torch fp32"], []]
    assert said[1]["pieces"] == [("a", False), ("cat", True), ("runs", False)]
    assert len(captions([[one], [two]], {})[0]["groups"]) == 2 and captions([], {}) == []
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
    assert "has none of these rows: another" in why_none(history[2:], made_up_record())
    assert "of something else (threads: 2 and 1)" in why_none(history[2:3], made_up_record())
    assert "held no record" in why_none([], made_up_record())
    with pytest.raises(UsageError, match="cannot be read"):
        records.history(tmp_path)


def test_a_report_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr("edgecap.benchmarks.bench.bench", lambda *_, **__: made_up_record())
    monkeypatch.setattr("edgecap.benchmarks.report_html.html", fails)
    files = [tmp_path / name for name in ("r.json", "h.jsonl", "r.html")]
    options = [word for pair in zip(("--json", "--history", "--report"), map(str, files), strict=True) for word in pair]
    result = CliRunner().invoke(cli, ["bench", *options])
    assert str(result.exception) == "a defect" and "JPEG → text" in result.output
    assert [file.exists() for file in files] == [True, True, False]


def test_rows_of_this_machine_beside_a_browser_are_not_at_the_top() -> None:
    here = made_up_row("tiny native", factor=0.1, facts={"on": "native"})
    record = made_up_record(made_up_row("tiny"), here, made_up_row("other", factor=2))
    assert headline(record, grouped(record["rows"]))["fastest"]["name"] == "tiny"
    assert plots(record["rows"])["names"] == ["tiny", "other"]

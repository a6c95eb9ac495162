"""`edgecap bench --compare`: what counts as slower, what is refused, and what CI sees."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgecap.benchmarks import record as records
from edgecap.benchmarks.compare import compare, mann_whitney, slowdown
from edgecap.cli import cli
from edgecap.runtime.errors import UsageError

from .records import made_up_record, made_up_row


def against(factor: float, *, limit: float = 0.05, **more: Any) -> dict[str, Any]:
    before, after = made_up_row(seed=1), made_up_row(seed=2, factor=factor, **more)
    return compare(made_up_record(before), made_up_record(after), limit=limit)


# --- statistics ---


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3, 4, 5], [3, 4, 5, 6, 7], 0.056923149003),
        ([1, 1, 2, 2, 3, 9], [1, 2, 2, 4, 4, 4, 8, 8], 0.161302713342),  # with ties
        (range(20), [x + 3.5 for x in range(20)], 0.042927439975),
    ],
)
def test_mann_and_whitney_s_test_is_scipy_s(a: list[float], b: list[float], wanted: float) -> None:
    """scipy 1.17, mannwhitneyu(b, a, alternative="greater", method="asymptotic")"""
    assert mann_whitney(np.array(a, float), np.array(b, float)) == pytest.approx(wanted)


def test_the_test_needs_no_difference_to_stay_calm() -> None:
    assert mann_whitney([1.0] * 6, [1.0] * 6) == 1.0
    assert mann_whitney([2.0] * 6, [1.0] * 6) > 0.99
    assert mann_whitney(range(10), range(10, 20)) < 0.001


def test_equal_runs_are_rarely_called_slower_and_clearly_slower_ones_always() -> None:
    random = np.random.default_rng(0)

    def alarms(factor: float, limit: float) -> int:
        count = 0
        for _ in range(100):
            a, b = random.lognormal(0, 0.03, 20), factor * random.lognormal(0, 0.03, 20)
            found = slowdown(a, b, resamples=400)
            count += found["low"] > 1 + limit and found["p"] < 0.05
        return count

    assert alarms(1.0, 0.0) <= 8  # 2 or 3 are promised by one side of a 95% interval
    assert alarms(1.05, 0.05) <= 8
    assert alarms(1.12, 0.05) >= 95


def test_the_ratio_is_that_of_the_medians() -> None:
    found = slowdown([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0])
    assert found["ratio"] == 2 and found["low"] < 2 < found["high"]


# --- rows ---


def test_a_slower_row_fails_and_an_equal_or_faster_one_does_not() -> None:
    assert not against(1.0)["failed"] and not against(0.8)["failed"]
    found = against(1.2)
    assert found["failed"] and found["rows"][0]["reason"].startswith("end_to_end +")
    assert found["rows"][0]["stages"]["encode"]["slower"]


def test_a_row_that_may_be_within_the_limit_passes() -> None:
    """The better end decides: 20% is more than 18%, but not surely so."""
    assert against(1.2, limit=0.05)["failed"] and not against(1.2, limit=0.2)["failed"]


def test_other_stages_are_shown_but_judged_only_when_asked_for() -> None:
    before, after = made_up_row(seed=1), made_up_row(seed=2)
    after["rounds"]["encode"] = [2 * t for t in after["rounds"]["encode"]]
    a, b = made_up_record(before), made_up_record(after)
    shown = compare(a, b, limit=0.05)
    assert shown["rows"][0]["stages"]["encode"]["slower"] and not shown["failed"]
    assert compare(a, b, limit=0.05, stages=["end_to_end", "encode"])["failed"]


def test_what_is_gone_failed_or_decodes_otherwise_fails() -> None:
    a = made_up_record(made_up_row("one"), made_up_row("two"))
    gone = compare(a, made_up_record(made_up_row("one"), made_up_row("three")))
    assert [row["reason"] for row in gone["rows"]] == [None, "is not in the second record"]
    assert gone["failed"] and gone["new"] == ["three"]
    failed = made_up_row("two", status="failed", error="load: no such engine", latency=None, rounds=None)
    assert "failed in the second record: load: no" in compare(a, made_up_record(failed))["rows"][1]["reason"]
    other = made_up_row("two", decoding={"beam": 3, "max_length": 20})
    assert compare(a, made_up_record(other))["rows"][1]["reason"] == "decodes otherwise: beam 1 → 3"


def test_peers_are_shown_and_not_judged() -> None:
    a = made_up_record(made_up_row("tiny", seed=1), made_up_row("torch", kind="torch", seed=1))
    b = made_up_record(made_up_row("tiny", seed=2), made_up_row("torch", kind="torch", seed=2, factor=2))
    found = compare(a, b)
    assert found["rows"][1]["reason"] and not found["failed"]


def test_records_without_medians_of_rounds_cannot_pass() -> None:
    old = made_up_row()
    del old["rounds"]
    found = compare(made_up_record(old), made_up_record())
    assert found["failed"] and "no times of end_to_end" in found["rows"][0]["reason"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(4, 4, "end_to_end has 4 rounds, 5 are needed"), (20, 4, "end_to_end has 20 rounds → 4, 5 are needed")],
)
def test_too_few_rounds_are_the_reason(before: int, after: int, said: str) -> None:
    rows = [made_up_row(seed=seed) for seed in (1, 2)]
    for row, count in zip(rows, (before, after), strict=True):
        row["rounds"] = {stage: times[:count] for stage, times in row["rounds"].items()}
    found = compare(*map(made_up_record, rows))
    assert found["failed"] and found["rows"][0]["reason"] == said


def test_bytes_memory_and_cider_are_compared_too() -> None:
    row = against(1.0, bytes={"total": 6_000_000, "graphs": 1})["rows"][0]
    assert row["bytes"]["ratio"] == 1.2 and row["peak_rss"]["ratio"] == 1 and row["same_bundle"] is False
    a, b = made_up_row(seed=1), made_up_row(seed=2)
    difference = row["cider"]["difference"]
    assert difference["mean"] == pytest.approx(b["quality"]["cider"] - a["quality"]["cider"])
    assert difference["low"] < difference["mean"] < difference["high"]
    without = compare(made_up_record(a), made_up_record({k: v for k, v in b.items() if k != "captions"}))
    assert without["rows"][0]["cider"]["difference"] is None


# --- records ---


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("device", "name"), "raspberry-pi-5", "device: cpu and raspberry-pi-5"),
        (("device", "cpu", "model"), "Other", "CPU: Test CPU and Other"),
        (("settings", "threads"), 2, "threads: 1 and 2"),
        (("data", "fingerprint"), "e" * 64, "data: ffffffffffff and eeeeeeeeeeee"),
        (("data", "photos"), 8, "photos: 12 and 8"),
        (("device", "memory_limit"), {"bytes": 2**29}, "memory limit: None and 536870912"),
    ],
)
def test_records_of_different_conditions_are_refused_unless_forced(where: tuple, value: Any, said: str) -> None:
    a, b = made_up_record(), made_up_record()
    place = b
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(UsageError) as refused:
        compare(a, b)
    assert said in refused.value.message and "--force" in refused.value.message
    found = compare(a, b, force=True)
    assert said in found["notes"]
    assert (found["rows"][0]["cider"]["difference"] is None) == (where[0] == "data")


def test_records_without_a_common_row_are_refused() -> None:
    with pytest.raises(UsageError, match="no row is in both records: one in the first, two in the second"):
        compare(made_up_record(made_up_row("one")), made_up_record(made_up_row("two")))


def test_a_machine_that_changed_is_told() -> None:
    slow = made_up_record()
    slow["limits"] = slow["limits"] | {"read_gb_s": 20.0}
    slow["versions"] = slow["versions"] | {"onnxruntime": "1.32.0"}
    notes = compare(made_up_record(), slow)["notes"]
    assert notes == [
        "the machine's own limit of reading memory changed by -20% between the records",
        "onnxruntime 1.31.0 → 1.32.0",
    ]


def browser_record(model: str, **facts: Any) -> dict[str, Any]:
    record = made_up_record()
    record["device"] |= {"kind": "browser", "browser": {"engine": "wasm", "isolated": True} | facts}
    record["device"]["cpu"] |= {"model": model}
    return record


def test_a_browser_s_version_is_a_note_and_its_engine_is_not() -> None:
    before = browser_record("Chrome 150 on Android 15")
    notes = compare(before, browser_record("Chrome 151 on Android 15"))["notes"]
    assert notes == ["Chrome 150 on Android 15 → Chrome 151 on Android 15"]
    for model, facts, said in (
        ("Firefox 150 on Android 15", {}, "CPU: Chrome on Android and Firefox on Android"),
        ("Chrome 150 on Android 15", {"engine": "webgpu"}, "browser's engine: wasm and webgpu"),
        ("Chrome 150 on Android 15", {"isolated": False}, "browser's page isolated: True and False"),
    ):
        with pytest.raises(UsageError, match=said):
            compare(before, browser_record(model, **facts))


# --- the command ---


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A record, and one that is 30% slower."""
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, seed, factor in zip(paths, (1, 2), (1.0, 1.3), strict=True):
        records.write(made_up_record(made_up_row("a [b]", seed=seed, factor=factor)), path)
    return paths


def test_ci_gets_a_line_and_an_exit_code(files: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = files
    failed = invoke("--compare", a, b, "--fail-if-slower", "5%", "--json", tmp_path / "c.json")
    assert failed.exit_code == 1 and failed.output.splitlines()[-1].startswith("a [b]: end_to_end +")
    assert max(map(len, failed.output.splitlines())) <= 100
    assert json.loads((tmp_path / "c.json").read_text())["rows"][0]["reason"]
    assert invoke("--compare", a, b).exit_code == 0
    assert invoke("--compare", a, b, "--fail-if-slower", "50%").exit_code == 0
    assert invoke("--compare", b, a, "--fail-if-slower", "5%").exit_code == 0


def test_a_history_stands_for_its_last_record(files: tuple[Path, Path], tmp_path: Path) -> None:
    history = tmp_path / "h.jsonl"
    for file in files:
        records.append(records.read(file), history)
    assert records.read(history)["rows"][0]["rounds"] == records.read(files[1])["rows"][0]["rounds"]
    assert invoke("--compare", files[0], history, "--fail-if-slower", "5%").exit_code == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "edgecap-bench"}', "null\n1", '{"format": "x"}'])
def test_what_is_no_record_is_one_line(content: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    result = invoke("--compare", files[0], tmp_path / "x.json")
    assert isinstance(result.exception, UsageError) and "is not a record of edgecap bench" in result.exception.message
    assert isinstance(invoke("--compare", files[0], tmp_path / "no.json").exception, UsageError)


def test_a_record_of_broken_rows_is_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    broken = copy.deepcopy(records.read(files[0]))
    del broken["rows"][0]["decoding"]
    (tmp_path / "x.json").write_text(json.dumps(broken))
    assert isinstance(invoke("--compare", files[0], tmp_path / "x.json").exception, UsageError)


@pytest.mark.parametrize("arguments", [["--fail-if-slower", "5"], ["--fail-if-slower", "x%"], ["--fail-if-slower"]])
def test_a_limit_is_a_percentage(arguments: list[str], files: tuple[Path, Path]) -> None:
    assert invoke("--compare", *files, *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("decoding",), []),
        (("name",), ["a"]),
        (("latency",), "fast"),
        (("rounds",), {"end_to_end": [1, "2"]}),
        (("cold_start", "runs"), 5),
        (("quality", "cider"), None),
        (("quality", "cider"), float("nan")),
        (("captions",), {"photo": "a dog"}),
        (("memory", "peak_rss"), "much"),
        (("bytes", "total"), 10**400),
    ],
)
def test_an_odd_line_of_a_history_is_passed_over(where: tuple, value: Any, tmp_path: Path) -> None:
    odd = made_up_record()
    place = odd["rows"][0]
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    (tmp_path / "h.jsonl").write_text(f"{json.dumps(odd)}\n{json.dumps(made_up_record())}\n" + '{"x": ' + "1" * 9999)
    assert records.history(tmp_path / "h.jsonl") == [made_up_record()]


def test_every_option_of_the_bench_has_its_section_in_the_help() -> None:
    from edgecap.benchmarks.commands import SECTIONS, bench

    named = [name for names in SECTIONS.values() for name in names]
    assert sorted(named) == sorted(parameter.name for parameter in bench.params if parameter.name != "bundles")
    said = invoke("--help").output
    titles = [line.strip() for line in said.splitlines() if line.strip().endswith(":") and not line.startswith("   ")]
    assert [title for title in titles if title.rstrip(":") in SECTIONS] == [f"{title}:" for title in SECTIONS]


def test_options_that_do_not_go_together_are_refused(files: tuple[Path, Path]) -> None:
    odd = invoke("--compare", *files, "--report", "r.html", "--device", "cpu", "--peers", "x.edgecap")
    assert odd.exit_code == 2 and "leave out BUNDLES, --device, --peers, --report" in odd.output
    assert invoke("x.edgecap", "--compare", *files).exit_code == 2
    assert invoke("--force").exit_code == 2
    assert invoke("--fail-if-slower", "5%").exit_code == 2


def test_rows_that_were_timed_otherwise_or_captioned_other_photos_are_told() -> None:
    usual, slow = made_up_row("big"), made_up_row("big", timed_by="once")
    slow["quality"]["photos"] = 3
    slow["captions"] = dict(list(slow["captions"].items())[:3])
    notes = compare(made_up_record(usual), made_up_record(slow))["notes"]
    assert notes == ["big was timed otherwise: parts → once", "big: CIDEr of 12 photos → of 3 photos"]
    assert not compare(made_up_record(usual), made_up_record(usual))["notes"]

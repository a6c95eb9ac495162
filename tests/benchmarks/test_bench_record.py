"""What `edgecap bench` keeps and shows: the record of a run over two tiny bundles and a broken peer, and its tables."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from edgecap.benchmarks import record as records
from edgecap.benchmarks.bench import bench
from edgecap.benchmarks.operators import shares
from edgecap.benchmarks.report import render
from edgecap.benchmarks.suite import Settings
from edgecap.benchmarks.wording import interval_text, milliseconds, ratio_text
from edgecap.cli import cli

from .lineage import DATA, QUICK

STATS = {"runs": int, "p50": float, "p90": float, "p99": float, "min": float, "mean": float}
RATIO = {"ratio": float, "low": float, "high": float, "rounds": int, "level": float}
INTERVAL = {"mean": float, "low": float, "high": float, "level": float}
STAGES = ("preprocess", "encode", "first_token", "ttft", "next_token", "decode", "picture_to_text", "end_to_end")
MAYBE = (int, float, type(None))
QUALITY = {
    "photos": int,
    "cider": float,
    "cider_interval": INTERVAL,
    "cider_d": float,
    **{f"bleu_{n}": float for n in range(1, 5)},
    "rouge_l": float,
    "distinct": float,
    "repeated_ngrams": float,
    "mean_length": float,
}
ROW = {
    "name": str,
    "kind": str,
    "status": str,
    "error": type(None),
    "group": int,
    "peer_of": list,
    "sha256": str,
    "bytes": {"total": int, "graphs": int},
    "decoding": dict,
    "facts": dict,
    "timed_by": str,
    "rounds": dict.fromkeys(STAGES, list),
    "near": {
        "decoder": {"bytes": int, "gb_s": float, "share": float},
        "encoder": {"fp32_gop": float, "int8_gop": float, "share": float},
    },
    "operators": {"encoder": dict, "decoder": dict},
    "latency": {"load": STATS, **dict.fromkeys(STAGES, STATS), "tokens_per_caption": float, "tokens_per_s": float},
    "speedup": dict,
    "times_encode": {"decode": RATIO, "picture_to_text": RATIO},
    "memory": {"peak_rss": MAYBE, "over_idle": MAYBE},
    "cold_start": {
        "seconds": float,
        "runs": list,
        "import_s": float,
        "load_s": float,
        "peak_rss": MAYBE,
        "times_reference": float,
        "rss_over_reference": MAYBE,
    },
    "quality": QUALITY,
    "captions": dict,
}
RECORD = {
    "format": str,
    "version": int,
    "created": str,
    "device": {
        "name": str,
        "kind": str,
        "load": MAYBE,
        "pinned": list,
        "memory_limit": type(None),
        "clock": {"before": dict, "after": dict, "fell": list},
        "cpu": {"model": str, "isa": str, "flags": list, "cores": int, "memory_mb": MAYBE, "system": str},
    },
    "versions": {"python": str, "edgecap": str, "numpy": str, "pillow": str, "onnxruntime": str, "tokenizers": str},
    "settings": {
        "threads": int,
        "rounds": int,
        "min_runs": int,
        "min_seconds": float,
        "warmup": int,
        "cold_starts": int,
        "start_seconds": float,
        "slow_seconds": float,
        "slow_photos": (int, type(None)),
        "memory_photos": int,
        "limit_seconds": float,
        "timeout": (int, float),
        "omp_wait_policy": str,
    },
    "data": {"spec": str, "fingerprint": str, "split": str, "photos": int},
    "limits": {"read_gb_s": float, "fp32_gflops": float, "int8_gops": float},
    "stopped": type(None),
    "problems": list,
    "reference": {"imports": list, "error": type(None), "seconds": float, "peak_rss": MAYBE, "idle_rss": MAYBE},
    "rows": list,
}


def check(value: Any, schema: Any, at: str = "record") -> None:
    """Exactly these keys, of these types, all the way down."""
    if isinstance(schema, dict):
        assert isinstance(value, dict) and set(value) == set(schema), f"{at}: {sorted(set(value) ^ set(schema))}"
        for key, inner in schema.items():
            check(value[key], inner, f"{at}.{key}")
    else:
        assert isinstance(value, schema), f"{at} is {value!r}"


@pytest.fixture(scope="module")
def record(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run over both bundles and a peer whose checkpoint is none."""
    nothing = tmp_path_factory.mktemp("no-checkpoint")
    bundles = [folder / "runs" / "first.edgecap", folder / "runs" / "second.edgecap"]
    return bench(bundles, beams=[2], peers=[f"torch:{nothing}"], settings=QUICK)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def text(found: dict[str, Any]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(render(found), highlight=False)
    return stream.getvalue()


# --- the record ---------------------------------------------------------------------------------------


def test_the_record_has_the_promised_shape(record: dict[str, Any], folder: Path) -> None:
    record = json.loads(records.dumps(record))
    check(record, RECORD)
    first, second, peer = record["rows"]
    check(first, ROW)
    check(second, ROW | {"quality": QUALITY | {"cider_over_first": INTERVAL, "identical_to_first": float}})
    check(second["speedup"], {"first": dict.fromkeys(STAGES, RATIO)})
    check(first["speedup"], {"second": dict.fromkeys(STAGES, RATIO)})
    assert record["settings"]["omp_wait_policy"] == "passive"
    assert record["data"]["spec"] == DATA and record["data"]["photos"] == 12 == len(first["captions"])
    assert first["decoding"]["beam"] == 2
    for row in (first, second):
        manifest = (folder / "runs" / f"{row['name']}.edgecap" / "bundle.json").read_bytes()
        files = json.loads(manifest)["files"]
        assert row["sha256"] == hashlib.sha256(manifest).hexdigest()
        assert row["bytes"]["total"] == sum(f["bytes"] for f in files.values()) + len(manifest)
        assert row["bytes"]["graphs"] == files["encoder.onnx"]["bytes"] + files["decoder.onnx"]["bytes"]
        assert row["facts"]["versions"]["onnxruntime"] == record["versions"]["onnxruntime"]


def test_a_peer_that_cannot_run_is_a_row_that_says_so(record: dict[str, Any]) -> None:
    peer = record["rows"][2]
    assert peer["status"] == "failed" and peer["kind"] == "torch"
    assert peer["error"].startswith("cold start: ") and "not a checkpoint" in peer["error"]
    assert peer["quality"] is peer["captions"] is peer["latency"] is None


def test_captions_are_the_runtime_s_own(record: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    from edgecap.benchmarks.datasets import open_dataset
    from edgecap.benchmarks.metrics import caption_metrics
    from edgecap.runtime import Captioner

    captioner = Captioner.load(folder / "runs" / "second.edgecap")
    examples = open_dataset(DATA).splits["test"]
    row = record["rows"][1]
    for example in examples:
        caption = captioner(example.jpeg_path(tmp_path), beam=2)
        assert row["captions"][example.id] == {
            "text": caption.text,
            "logprob": pytest.approx(caption.logprob),
            "cider": row["captions"][example.id]["cider"],
        }
    said = {i: caption["text"] for i, caption in row["captions"].items()}
    scores = caption_metrics(said, {e.id: e.captions for e in examples})
    assert [c["cider"] for c in row["captions"].values()] == scores.per_photo_cider.tolist()
    assert row["quality"]["cider"] == scores.cider and row["quality"]["bleu_4"] == scores.bleu[3]


def test_every_round_s_medians_are_kept(record: dict[str, Any]) -> None:
    rounds = record["rows"][0]["rounds"]
    assert all(len(medians) == QUICK.rounds for medians in rounds.values())
    latency = record["rows"][0]["latency"]["encode"]
    assert all(latency["min"] <= median <= latency["p99"] * 2 for median in rounds["encode"])
    assert record["rows"][2]["rounds"] is record["rows"][2]["near"] is None


def test_a_row_s_operators_add_up_to_less_than_it_takes(record: dict[str, Any]) -> None:
    operators, latency = record["rows"][0]["operators"], record["rows"][0]["latency"]
    assert {"MatMul", "Gemm", "FusedMatMul"} & operators["decoder"].keys() and operators["encoder"]
    assert 0 < sum(operators["decoder"].values()) < 5 * latency["next_token"]["p50"]
    assert record["rows"][2]["operators"] is None
    assert shares({"MatMul": 0.7, "Add": 0.29, "Cast": 0.01}) == "MatMul 70%, Add 29%"


def test_a_row_is_held_against_the_machine_s_limits(record: dict[str, Any]) -> None:
    near, latency = record["rows"][0]["near"], record["rows"][0]["latency"]
    rate = near["decoder"]["bytes"] / latency["next_token"]["p50"] / 1e9
    assert near["decoder"]["gb_s"] == pytest.approx(rate)
    assert near["decoder"]["share"] == pytest.approx(rate / record["limits"]["read_gb_s"])
    least = near["encoder"]["fp32_gop"] / record["limits"]["fp32_gflops"]
    assert near["encoder"]["share"] == pytest.approx(least / latency["encode"]["p50"])
    assert "a token reads" in text(record)


def test_the_stages_are_parts_of_the_whole(record: dict[str, Any]) -> None:
    for row in record["rows"][:2]:
        steps = 1 / row["latency"]["next_token"]["p50"]
        assert row["latency"]["tokens_per_s"] == pytest.approx(steps)
        minimum = {stage: row["latency"][stage]["min"] for stage in STAGES}
        assert all(value > 0 for value in minimum.values())
        parts = minimum["preprocess"] + minimum["encode"] + minimum["first_token"]
        assert parts <= minimum["ttft"] < row["latency"]["end_to_end"]["p99"]
    assert "TTFT" in text(record) and "tokens/s" in text(record)


def test_memory_and_cold_start_stand_over_their_references(record: dict[str, Any]) -> None:
    reference, row = record["reference"], record["rows"][0]
    cold = row["cold_start"]
    assert cold["times_reference"] == pytest.approx(cold["seconds"] / reference["seconds"])
    assert cold["import_s"] + cold["load_s"] < cold["seconds"]
    if reference["idle_rss"] is not None:
        assert reference["idle_rss"] < reference["peak_rss"] < row["memory"]["peak_rss"]
        assert row["memory"]["over_idle"] == row["memory"]["peak_rss"] - reference["idle_rss"]


def test_a_record_is_written_whole_or_not_at_all(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.json"
    records.write(record, path)
    assert json.loads(path.read_text()) == json.loads(records.dumps(record))
    broken = dict(record) | {"rows": [{"time": float("nan")}]}
    with pytest.raises(ValueError):
        records.write(broken, path)
    assert json.loads(path.read_text()) == json.loads(records.dumps(record))
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_a_history_grows_by_a_line_without_captions(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "runs" / "bench.jsonl"
    records.append(record, path)
    records.append(record, path)
    one, two = map(json.loads, path.read_text().splitlines())
    assert one == two and all("captions" not in row for row in one["rows"])
    assert one["rows"][0]["quality"] == json.loads(records.dumps(record))["rows"][0]["quality"]


# --- the tables ---------------------------------------------------------------------------------------


def test_the_tables_fit_100_columns_and_show_what_was_measured(record: dict[str, Any]) -> None:
    shown = text(record)
    assert max(map(len, shown.splitlines())) <= 100
    for stage in ("load", "preprocess", "encode", "first token", "per further token", "JPEG → text"):
        assert len(re.findall(rf"^.*{stage} +[\d.,]+ ", shown, re.M)) >= 2, stage
    assert f"{record['rows'][1]['quality']['cider']:.3f}" in shown
    assert re.search(r"limits with 1 thread: reads [\d.]+ GB/s, fp32 \d+ GFLOP/s, int8 \d+ GOP/s", shown)
    assert "than first" in shown and "1 thread" in shown and record["device"]["cpu"]["model"] in shown
    assert "not a checkpoint" in " ".join(shown.split())


def test_one_subject_alone_is_compared_with_nothing(record: dict[str, Any]) -> None:
    alone = copy.deepcopy(record) | {"rows": [copy.deepcopy(record["rows"][0]) | {"speedup": {}}]}
    shown = text(alone)
    assert "faster" not in shown and "− first" not in shown


def test_a_record_of_failures_alone_can_be_shown(record: dict[str, Any]) -> None:
    shown = text(dict(record) | {"rows": [record["rows"][2]]})
    assert "not a checkpoint" in " ".join(shown.split()) and "Time" not in shown


def test_other_work_on_the_machine_is_told(record: dict[str, Any]) -> None:
    device = record["device"]
    quiet = text(dict(record) | {"device": device | {"load": 0.0}})
    busy = text(dict(record) | {"device": device | {"load": device["cpu"]["cores"] * 2.0}})
    assert "other work was running" in busy and "other work was running" not in quiet


def test_figures_of_any_size_are_shown_right() -> None:
    bounds = {"mean": 0.5, "low": -0.0254, "high": 10.0234}
    assert interval_text(bounds) == "0.500 [-.025, 10.023]"
    assert interval_text(bounds, "+").startswith("+0.500 ")
    assert ratio_text({"ratio": 0.00412, "low": 0.61, "high": 1234.5}) == "0.0041 [0.61, 1,234]"
    shown = [milliseconds(t) for t in (0.00001234, 0.0123, 0.1239, 12.3, None)]
    assert shown == ["0.0123", "12.3", "124", "12,300", "–"]


def test_names_that_look_like_markup_are_shown_as_they_are(record: dict[str, Any]) -> None:
    odd = copy.deepcopy(record)
    odd["rows"][0]["name"] = "[red]x[/]"
    odd["rows"][2]["error"] = "no [bold]such[/bold] thing"
    shown = text(odd)
    assert "[red]x[/]" in shown and "no [bold]such[/bold] thing" in shown


def test_what_was_finished_before_ctrl_c_is_written_and_shown(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = dict.fromkeys(
        ("latency", "rounds", "speedup", "memory", "cold_start", "quality", "captions", "times_encode")
    )
    row = record["rows"][1] | nothing | {"status": "missing", "error": "not measured: interrupted", "group": 1}
    partial = record | {"rows": [record["rows"][0], row], "stopped": "interrupted"}
    asked: list[Settings] = []
    monkeypatch.setattr("edgecap.benchmarks.bench.bench", lambda *_, settings, **__: asked.append(settings) or partial)
    result = invoke("--json", tmp_path / "r.json", "--report", tmp_path / "r.html", "--timeout", "900")
    assert result.exit_code == 130 and asked[0].timeout == 900.0
    assert "second: not measured: interrupted" in result.output
    assert records.read(tmp_path / "r.json")["rows"][1]["status"] == "missing"
    assert "not measured: interrupted" in (tmp_path / "r.html").read_text()

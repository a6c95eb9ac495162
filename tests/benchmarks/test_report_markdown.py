"""The small table for a README: true to the record, and whole whatever rows are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecap.benchmarks.report_markdown import markdown
from edgecap.cli import cli
from edgecap.runtime.errors import UsageError

from .records import made_up_record, made_up_row

NOTHING = dict.fromkeys(("latency", "rounds", "near", "speedup", "memory", "cold_start", "quality", "captions"))


def ahead(ratio: float) -> dict[str, Any]:
    return {"end_to_end": {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "rounds": 20, "level": 0.95}}


@pytest.fixture
def record() -> dict[str, Any]:
    speed = {"torch big": ahead(4.0), "ort big": ahead(1.25)}
    bundle = made_up_row("big|int8", speedup=speed, facts={"model": "moda", "target": "onnx-int8"})
    slow = made_up_row("torch big", kind="torch", factor=4, peer_of=["big|int8"], facts={"precision": "fp32"})
    fast = made_up_row("ort big", kind="onnxruntime", factor=1.25, peer_of=["big|int8"], facts={"precision": "int8"})
    other = made_up_row("alone", group=1)
    refused = made_up_row("gguf big", kind="llama_cpp", status="refused", error="none", peer_of=["big|int8"], **NOTHING)
    worthless = {"mean": 0.001, "low": 0.0, "high": 0.002, "level": 0.95}
    slow["quality"] |= {"cider": 0.001, "cider_interval": worthless}
    kind = {"kind": "onnxruntime_genai", "status": "refused", "error": "none", "peer_of": ["big|int8"]}
    many = (made_up_row(f"onnxruntime_genai {name}", **kind, **NOTHING) for name in ("big", "small"))
    return made_up_record(bundle, slow, fast, other, refused, *many)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]


def test_bundles_stand_beside_the_peer_that_they_are_least_ahead_of(record: dict[str, Any]) -> None:
    lines = markdown(record).splitlines()
    head, rows = cells(lines[0]), [cells(line) for line in lines[2:6]]
    assert head[:4] == ["model", "run by", "MB", "peak MB"] and len({len(row) for row in [head, *rows]}) == 1
    assert [row[:2] for row in rows] == [
        ["moda", "**edgecap** onnx-int8"],
        ["", "`onnxruntime` int8"],
        ["", "`torch` fp32"],
        ["alone", "**edgecap** onnx-int8"],
    ]
    assert [row[-1] for row in rows] == ["**1.25** (1.15 to 1.35)", "", "", "–"]
    first = record["rows"][0]
    assert rows[0][head.index("tokens/s")] == f"{first['latency']['tokens_per_s']:.0f}"
    assert rows[0][head.index("CIDEr (95%)")].startswith(f"{first['quality']['cider']:.3f} (")
    assert rows[2][head.index("CIDEr (95%)")] == "–"
    below = "\n".join(lines[6:])
    assert "Test CPU (avx2), 1 thread, 12 photos of scenes (test)" in below and "nobody trained" in below
    assert "its row of the record: gguf big; onnxruntime\\_genai (big, small)." in below


def test_a_bundle_behind_its_peer_says_where_its_time_goes(record: dict[str, Any]) -> None:
    bundle, _, peer = record["rows"][:3]
    assert "is behind" not in markdown(record)
    bundle["speedup"]["ort big"] = ahead(0.9)
    peer["operators"] = {"encoder": {}, "decoder": {"MatMulInteger": 9.0, "Reshape": 1.0}}
    said = (
        "is behind ort big; a step of its decoder is MatMul 80%, Gemm 20%; of the peer's MatMulInteger 90%, Reshape 10%"
    )
    assert said in markdown(record)


def test_bundles_of_one_group_are_told_apart(record: dict[str, Any]) -> None:
    whole = record["rows"][0]
    pruned = made_up_row("words", facts={"model": "moda", "target": "onnx-int8", "pruned_from": "f" * 64})
    beams = [made_up_row(f"other beam {n}", group=1, facts={"model": "gru", "target": "onnx-int4"}) for n in (1, 3)]
    names = [cells(line)[1] for line in markdown(made_up_record(whole, pruned, *beams)).splitlines()[2:6]]
    assert names[:2] == ["**edgecap** onnx-int8", "**edgecap** onnx-int8, pruned"]
    assert names[2:] == [f"**edgecap** onnx-int4 (other beam {n})" for n in (1, 3)]


def test_without_peers_or_times_there_are_no_columns_of_them(record: dict[str, Any]) -> None:
    lines = markdown(made_up_record(made_up_row() | {"latency": None, "memory": None})).splitlines()
    assert cells(lines[0]) == ["model", "run by", "MB", "CIDEr (95%)"] and cells(lines[2])[0] == "tiny"


def test_a_record_is_shown_again(record: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(record))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["bench", "--show", str(file), *arguments])

    assert "TTFT" in run().output
    assert run("--markdown", "-").output == markdown(record)
    assert not run("--markdown", str(tmp_path / "t.md")).output
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == markdown(record)
    done = run("--limit", "3")
    assert done.exit_code == 2 and "leave out --limit" in done.output
    del record["rows"][0]["latency"]["end_to_end"]["p50"]
    file.write_text(json.dumps(record))
    assert isinstance(run().exception, UsageError) and "not a whole record" in str(run().exception)

"""`edgecap data`: what it prints of a data set, and the sample it writes."""

from __future__ import annotations

import json

from edgecap.benchmarks.datasets import SPLITS, open_dataset
from edgecap.runtime.errors import UsageError

from .small_data import data_command, photo


def test_command_summarises_as_json(any_folder):
    spec, folder = any_folder
    photo(folder, "b.jpg").unlink()
    assert isinstance(data_command(spec, "--json").exception, UsageError)
    result = data_command(spec, "--json", "--skip-bad")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["splits"]["train"] == {
        "photos": 1, "captions": 2, "fewest_captions": 2, "most_captions": 2, "words": 4, "mean_length": 3.0,
    }  # fmt: skip
    # 'the sea', 'a wave breaks': of five words only 'a' is in train
    assert summary["splits"]["test"]["new_words"] == 0.8
    assert [entry["reason"] for entry in summary["skipped"]] == ["missing image file"]


def test_command_writes_a_sample_that_reads_back(tmp_path):
    result = data_command("scenes:train=7,val=3,test=4,size=32", "--sample", "3", "-o", str(tmp_path / "look"))
    assert result.exit_code == 0, result.output
    original, again = (
        open_dataset("scenes:train=7,val=3,test=4,size=32"),
        open_dataset(f"folder:{tmp_path / 'look'}"),
    )
    for split in SPLITS:
        captions = {example.captions for example in original.splits[split]}
        assert len(again.splits[split]) == 3 and {e.captions for e in again.splits[split]} <= captions


def test_command_wants_sample_and_out_together():
    assert data_command("scenes", "--sample", "3").exit_code == 2

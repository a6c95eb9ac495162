"""The gate's verdict, on captions and scores made up so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from edgecap.benchmarks.datasets import Example
from edgecap.benchmarks.metrics import Interval, paired_bootstrap
from edgecap.export.gate import compare, judge


@pytest.mark.parametrize(
    ("drop", "verdict"),
    [
        ((0.0, 0.0, 0.0), "pass"),
        ((0.005, -0.01, 0.02), "pass"),
        ((-0.03, -0.05, -0.01), "pass"),  # better than the reference
        ((0.005, -0.02, 0.03), "inconclusive"),
        ((0.02, 0.0, 0.04), "inconclusive"),
        ((0.03, 0.01, 0.05), "fail"),
        ((0.03, 0.025, 0.035), "fail"),
    ],
)
def test_judge(drop: tuple[float, float, float], verdict: str) -> None:
    assert judge(Interval(*drop), 0.02) == verdict


def test_more_photos_settle_an_inconclusive_drop() -> None:
    reference = np.full(20_000, 0.5)
    artifact = reference - 0.01 + np.tile([0.25, -0.25], 10_000)  # 0.01 worse on average, each photo by ± 0.25
    assert judge(paired_bootstrap(reference[:60], artifact[:60]), 0.02) == "inconclusive"
    assert judge(paired_bootstrap(reference, artifact), 0.02) == "pass"
    assert judge(paired_bootstrap(reference, artifact), 0.005) == "fail"


NOUNS = ("dog", "cat", "red car", "man in a hat", "small boat", "tall tree", "white house", "brown horse")


def examples(count: int) -> list[Example]:
    names = [f"{NOUNS[i % 8]} number {i}" for i in range(count)]
    return [Example(str(i), (f"a {name}", f"one {name} outside")) for i, name in enumerate(names)]


def test_equal_captions_pass_with_no_drop() -> None:
    photos = examples(24)
    said = [example.captions[0] for example in photos]
    result = compare(said, said, photos, limit=0.0)
    assert result.verdict == "pass" and result.drop.mean == result.drop.high == 0
    assert result.measured["identical_captions"] == 1 and result.measured["photos"] == 24
    assert result.measured["cider"]["value"] == result.measured["cider"]["reference"] > 1


def test_ruined_captions_fail_and_the_reason_says_by_how_much() -> None:
    photos = examples(24)
    said = [example.captions[0] for example in photos]
    result = compare(["a thing"] * 24, said, photos, limit=0.02)
    assert result.verdict == "fail" and not result.passed
    assert result.drop.mean == pytest.approx(result.measured["cider"]["reference"] - result.measured["cider"]["value"])
    assert "exceeds the limit of 0.02" in result.reason and "\n" not in result.reason
    assert result.measured["identical_captions"] == 0 and result.measured["distinct"] == pytest.approx(1 / 24)


def test_one_odd_caption_among_few_is_inconclusive() -> None:
    photos = examples(24)
    said = [example.captions[0] for example in photos]
    other = [*said[:-1], "one " + said[-1].removeprefix("a ")]
    result = compare(other, said, photos, limit=0.01)
    assert result.verdict == "inconclusive" and not result.passed
    assert "is inconclusive for the limit of 0.01 on 24 photos: use more validation photos" in result.reason

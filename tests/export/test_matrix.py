"""Every small model × every target, greedy and beam 3, on the real engines against torch; and the support table."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgecap import cli
from edgecap.export.artifact import BuildOptions, Source
from edgecap.export.job import Job
from edgecap.export.pipeline import export, recipe_parts
from edgecap.export.support import as_markdown, support
from edgecap.export.targets import TARGETS
from edgecap.runtime import Captioner, UsageError
from edgecap.runtime.backends import BACKENDS
from edgecap.runtime.decode import DecodeOptions, decode

from .nets import DECODERS, photos

EXACT = ("fp32", "fp16", "f16")  # precisions whose captions are torch's
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(params=DECODERS)
def source(request: pytest.FixtureRequest, sources: Callable[[str], Source], tmp_path: Path) -> Source:
    found = sources(request.param)
    found.scratch = tmp_path / "build"
    found.scratch.mkdir()
    return found


def torch_says(source: Source, pixels: np.ndarray, beam: int) -> list[tuple[int, ...]]:
    loaded = source.checkpoint
    tokens = loaded.tokens
    suppress = [tokens[name] for name in ("bos", "pad", "unk")]
    options = DecodeOptions(beam=beam, max_length=8)
    found = decode(loaded.model.session(), pixels, options, eos_id=tokens["eos"], suppress=suppress)
    return [hypotheses[0].token_ids for hypotheses in found]


def forced(session, pixels: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities [T + 1, vocab] of one photo before each given token and after the last."""
    rows = [session.start(pixels[None])] + [session.step(np.array([i]), np.zeros(1, np.int64)) for i in ids]
    logits = np.concatenate(rows).astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1)[:, None]


def logprob(rows: np.ndarray, ids: tuple[int, ...], eos: int, finished: bool) -> float:
    return sum(rows[t, i] for t, i in enumerate(ids)) + (rows[len(ids), eos] if finished else 0.0)


def test_engines_that_must_be_here_are_here() -> None:
    """Where EDGECAP_ALL_ENGINES is set (as in CI), nothing below is skipped for want of a package."""
    if not os.environ.get("EDGECAP_ALL_ENGINES"):
        pytest.skip("EDGECAP_ALL_ENGINES is not set: targets whose packages are missing are skipped")
    assert {row.target: row.missing for row in support() if row.missing} == {}


@pytest.mark.parametrize("name", TARGETS)
def test_greedy_and_beam_as_torch(source: Source, name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    if reason := target.refusal(recipe_parts(source.checkpoint), BuildOptions()):
        assert reason in {text for row in support() if row.target == name for text in row.refused.values()}
        with pytest.raises(UsageError, match="cannot be made of") as caught:
            export(source.checkpoint.path, target=name, out=tmp_path / "x.edgecap")
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
        return
    for package in (*target.packages, BACKENDS[target.backend].package):
        if find_spec(package) is None:
            pytest.skip(f"{name} needs {package}: pip install 'edgecap[{target.extra}]'")
    job = Job(source, source.checkpoint, name, target, "small", [], 0.02, tmp_path, lambda *_: None)
    captioner: Captioner = job.captioner(target.build(source))
    pixels, eos = photos(5, seed=3), source.checkpoint.tokens["eos"]
    greedy = torch_says(source, pixels, 1)
    for beam, theirs in ((1, greedy), (3, torch_says(source, pixels, 3))):
        ours = captioner.caption_arrays(pixels, beam=beam, max_length=8)
        if target.precision in EXACT:
            assert [caption.token_ids for caption in ours] == theirs
        for photo, caption in zip(pixels, ours, strict=True):  # whatever the engine's numbers, the search is sound
            rows = forced(captioner.session(), photo, caption.token_ids)
            finished = len(caption.token_ids) < 8
            assert caption.logprob == pytest.approx(logprob(rows, caption.token_ids, eos, finished), abs=2e-3)
    ours, theirs = (
        np.concatenate([forced(make(), photo, ids) for photo, ids in zip(pixels, greedy, strict=True)])
        for make in (captioner.session, source.checkpoint.model.session)
    )
    difference = np.abs(ours - theirs).max()
    assert difference < {"fp32": 1e-3, "fp16": 0.1, "f16": 0.1}.get(target.precision, 8.0)
    ours, theirs = (rows - rows.mean(1, keepdims=True) for rows in (ours, theirs))
    cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    assert cosine.mean() >= target.min_cosine, cosine
    job.close()


def test_the_docs_hold_the_table_that_the_command_prints() -> None:
    rows = support()
    assert (DOCS / "targets.md").read_text(encoding="utf-8") == as_markdown(rows) + "\n"
    shown = CliRunner().invoke(cli.cli, ["targets"]).output
    assert all(row.target in shown for row in rows)
    assert {reason for row in rows for reason in row.refused.values()} <= {
        line.split(": ", 1)[-1] for line in shown.splitlines()
    }

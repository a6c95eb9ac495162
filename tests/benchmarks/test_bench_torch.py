"""The torch peer: cut in halves for the clock it must still compute, and caption, as the torch session does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the train extra")

from edgecap.benchmarks.latency import STAGES
from edgecap.benchmarks.peers.torch_eager import SplitSession, TorchEngine
from edgecap.benchmarks.worker import time_photos
from edgecap.runtime.decode import DecodeOptions, decode
from edgecap.runtime.preprocess import Preprocess
from edgecap.runtime.tokenizer import Tokenizer

from ..runtime.graphs import TOKENS, photo, tokenizer_json
from ..train.tiny import SIZE, tiny_model

DECODING = {"beam": 2, "max_length": 6}


@pytest.mark.parametrize("decoder", ["gru", "llama"])
@pytest.mark.parametrize("prompt", [None, np.array([5, 6])])
def test_encode_and_prefill_are_start(decoder: str, prompt: np.ndarray | None) -> None:
    model = tiny_model(decoder)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    split, whole = SplitSession(model.session()), model.session()
    split.encode(pixels)
    np.testing.assert_array_equal(split.prefill(prompt), whole.start(pixels, prompt))
    ids, parents = np.array([7, 8, 9]), np.array([0, 2, 1])
    np.testing.assert_array_equal(split.step(ids, parents), whole.step(ids, parents))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    checkpoint = SimpleNamespace(
        model=tiny_model("gru", vocab_size=TOKENS["vocab_size"]),
        tokenizer=Tokenizer.load(tokenizer_json()),
        tokens=TOKENS,
        preprocess=Preprocess((SIZE, SIZE), "squash", "bilinear"),
        sha256="0" * 64,
        recipe=SimpleNamespace(task="caption"),
    )
    monkeypatch.setattr("edgecap.train.checkpoint.load_checkpoint", lambda path: checkpoint)
    return TorchEngine({"path": "x", "threads": 1, "decoding": DECODING})


def test_it_captions_as_the_runtime_s_search_over_the_torch_session_does(engine: TorchEngine, tmp_path: Path) -> None:
    checkpoint: Any = engine._checkpoint
    for seed in range(3):
        image = photo(seed, (80, 100))
        image.save(path := tmp_path / f"{seed}.png")
        pixels = checkpoint.preprocess(image)[None]
        options = DecodeOptions(**DECODING)
        found = decode(checkpoint.model.session(), pixels, options, eos_id=TOKENS["eos"], suppress=(0, 1, 3))[0][0]
        text = checkpoint.tokenizer.decode(found.token_ids)
        assert engine.caption(str(path)) == {"text": text, "logprob": found.logprob, "tokens": len(found.token_ids)}


def test_every_stage_is_timed(engine: TorchEngine, tmp_path: Path) -> None:
    photo(0, (80, 100)).save(path := tmp_path / "x.png")
    for run in time_photos(engine, [str(path)] * 2):
        assert set(run) == {*STAGES, "tokens"} and all(run[stage] > 0 for stage in STAGES)
    assert set(engine.facts["versions"]) >= {"torch", "transformers", "numpy"}

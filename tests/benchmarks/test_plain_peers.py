"""Peers of any captioner give its own tokens in float32, and captions at all in fewer bits."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch

from edgecap.benchmarks.latency import STAGES
from edgecap.benchmarks.peers import captioner
from edgecap.benchmarks.peers.captioner import CaptionerPeer, Preparation, about
from edgecap.benchmarks.peers.llama_prefix import LlamaPrefixPeer
from edgecap.benchmarks.peers.onnxruntime_plain import OnnxRuntimePeer
from edgecap.benchmarks.peers.openvino_plain import OpenVinoPeer
from edgecap.benchmarks.peers.torch_compile import CompiledEngine
from edgecap.benchmarks.worker import time_photos
from edgecap.runtime.decode import DecodeOptions, decode, never_said
from edgecap.runtime.errors import UsageError
from edgecap.train.checkpoint import WEIGHTS, Checkpoint, load_checkpoint
from edgecap.train.models.encoders import ENCODERS
from edgecap.train.state import model_tensors, write_tensors

from ..export.nets import save_run, small_encoder
from ..runtime.graphs import photo
from .lineage import RECIPE, write_bundle_of

DECODING = {"beam": 1, "max_length": 8}
KINDS = ("gru", "gpt2")


class World:
    """A checkpoint, what a bundle of it says, photos, and the folders prepared so far."""

    def __init__(self, folder: Path, decoder: str) -> None:
        self.folder = folder
        self.run = save_run(folder / "run", decoder)
        model = load_checkpoint(self.run).model
        with torch.no_grad():  # so that captions differ from photo to photo
            getattr(model.decoder, "project", torch.nn.Linear(1, 1)).weight.mul_(30)
        write_tensors(self.run / WEIGHTS, model_tensors(model), {"format": "pt"})
        self.loaded: Checkpoint = load_checkpoint(self.run)
        self.photos = []
        for seed in range(3):
            photo(seed, (60, 80)).save(path := folder / f"{seed}.png")
            self.photos.append(str(path))
        self.plain: Path | None = None
        self.plain = self.prepared(OnnxRuntimePeer, "fp32")

    def prepared(self, peer: type[CaptionerPeer], precision: str) -> Path:
        if peer is OnnxRuntimePeer and precision == "fp32" and self.plain:
            return self.plain
        folder = self.folder / f"{peer.kind}-{precision}"
        given = argparse.Namespace(weights=self.run, folder=folder, precision=precision, bundle=self.run)  # its words
        captioner.prepare(peer, Preparation(self.run, self.about(peer.kind, precision), self.plain), given)
        return folder

    def about(self, kind: str, precision: str) -> dict[str, Any]:
        loaded = self.loaded
        return {
            "kind": kind,
            "precision": precision,
            "sha256": loaded.sha256,
            "chat": "",
            "tokens": loaded.tokens,
            "preprocess": loaded.preprocess.to_dict(),
            "frames": None,
        }

    def expected(self, **decoding: Any) -> list[Any]:
        """The best hypothesis for each photo, of torch."""
        pixels = np.stack([self.loaded.preprocess.load(path) for path in self.photos])
        options = DecodeOptions.from_dict(DECODING | decoding)
        tokens = self.loaded.tokens
        found = decode(self.loaded.model.session(), pixels, options, eos_id=tokens["eos"], suppress=never_said(tokens))
        return [best[0] for best in found]


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = ENCODERS.get("small")
    ENCODERS["small"] = small_encoder
    yield World(tmp_path_factory.mktemp(request.param), request.param)
    if before is None:
        del ENCODERS["small"]


def said(engine: Any, photos: list[str]) -> list[tuple[int, ...]]:
    return [tuple(engine.caption(path)["ids"]) for path in photos]


def load(folder: Path, **decoding: Any) -> dict[str, Any]:
    return {"path": str(folder), "threads": 1, "decoding": DECODING | decoding}


@pytest.mark.parametrize(
    ("peer", "precision"),
    [
        (OnnxRuntimePeer, "fp32"),
        (OnnxRuntimePeer, "int8"),
        (OnnxRuntimePeer, "int4"),
        (OpenVinoPeer, "fp32"),
        (OpenVinoPeer, "int8"),
        (LlamaPrefixPeer, "f16"),
        (LlamaPrefixPeer, "q8_0"),
    ],
)
def test_it_captions(world: World, peer: type[CaptionerPeer], precision: str, request: pytest.FixtureRequest) -> None:
    for name in (*peer.needs, *peer.making):
        pytest.importorskip(name, reason=f"the peer {peer.kind} needs {name}")
    if peer is LlamaPrefixPeer and "gru" in request.node.name:
        pytest.skip("llama.cpp runs language models")
    engine = peer(load(world.prepared(peer, precision)))
    found = said(engine, world.photos)
    if precision in ("fp32", "f16"):
        best = world.expected()
        assert found == [each.token_ids for each in best]
        close = {"fp32": 1e-4, "f16": 2e-2}[precision]
        sure = [engine.caption(path)["logprob"] for path in world.photos]
        assert sure == pytest.approx([each.logprob for each in best], abs=close)
        assert max(sure) - min(sure) > 3 * close, "the photos must matter"
    assert all(found) and engine.caption(engine.picture(world.photos[0]))["ids"] == list(found[0])
    facts = engine.facts
    assert facts["precision"] == precision and facts["sha256"] == world.loaded.sha256 and facts["weights"]
    assert 0 < facts["bytes"]["graphs"] < facts["bytes"]["total"]
    assert ("CPU : " in facts.get("build", "")) == (peer is LlamaPrefixPeer)
    for run in time_photos(engine, world.photos[:1]):
        assert set(run) == {*STAGES, "tokens"}


def test_plain_graphs_search_with_beams(world: World) -> None:
    engine = OnnxRuntimePeer(load(world.prepared(OnnxRuntimePeer, "fp32"), beam=3))
    assert said(engine, world.photos) == [best.token_ids for best in world.expected(beam=3)]


def test_compiled_captions_are_the_same(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is compiled, by torch's capture alone: generating and building C++ takes minutes."""
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path))
    monkeypatch.setattr(CompiledEngine, "require", classmethod(lambda cls: None))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # it sets these
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    engine: Any = CompiledEngine(load(world.run))
    texts = [engine.caption(path)["text"] for path in world.photos]
    assert texts == [world.loaded.tokenizer.decode(best.token_ids) for best in world.expected()]


def test_without_a_compiler_the_compiled_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler: none of no-such-compiler"):
        CompiledEngine.require()


def test_other_weights_are_refused(world: World, tmp_path: Path) -> None:
    recipe = RECIPE | {"prompt": {"chat": "What?"}}
    known = about(write_bundle_of(tmp_path / "other.edgecap", "0" * 64, recipe=recipe), "onnxruntime", "int8")
    assert (known["sha256"], known["chat"], known["precision"]) == ("0" * 64, "What?", "int8")
    task = Preparation(world.run, known, world.plain)
    with pytest.raises(UsageError, match="other weights than those that the bundle was made from"):
        task.loaded()
    with pytest.raises(UsageError, match="needs --graphs"):
        task.plain()


def test_llama_cpp_searches_greedily(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs with beam 1 only, not 3"):
        LlamaPrefixPeer(load(tmp_path, beam=3))

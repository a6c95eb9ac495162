"""Captioners of pretrained parts as bundles: prompts, and special tokens that are all one id, give torch's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgecap.benchmarks.datasets import open_dataset
from edgecap.export.artifact import BuildOptions
from edgecap.export.pipeline import export
from edgecap.export.smaller import Smaller
from edgecap.runtime import Captioner, verify_golden
from edgecap.runtime.decode import DecodeOptions, decode, never_said
from edgecap.runtime.errors import UsageError
from edgecap.runtime.fused import FusedCaptioner
from edgecap.train.checkpoint import WEIGHTS, Checkpoint, load_checkpoint
from edgecap.train.data.cache import load_pixels
from edgecap.train.models.language_model import PHOTO
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.state import model_tensors, write_tensors

from ..train.parts import save_gpt2, save_llama, save_opt
from .nets import SCENES, SIZE

STAGE = {"epochs": 1, "batch_size": 4, "lr": 2e-3, "schedule": "constant"}
SYSTEMS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gpt2": ("gpt2", save_gpt2, {}),  # BOS = EOS = pad = unk
    "opt": ("opt", save_opt, {"prompt": {"text": "A photo of"}}),
    "llama": ("llama", lambda folder: save_llama(folder, tied=False), {"prompt": {"chat": "describe this picture"}}),
}


@pytest.fixture(scope="module", params=SYSTEMS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small: None) -> Checkpoint:
    """A pretrained decoder after a few steps on scenes."""
    folder, (kind, save, more) = tmp_path_factory.mktemp(request.param), SYSTEMS[request.param]
    recipe = recipe_from_dict(
        {
            "name": request.param,
            "data": {"spec": SCENES, "image_size": SIZE, "captions_per_photo": 2},
            "tokenizer": {"kind": "pretrained", "max_length": 30},
            "encoder": {"kind": "small"},
            "bridge": {"kind": "linear", "dim": 16},
            "decoder": {"kind": kind, "source": str(save(folder / "model"))},
            "decoding": {"max_length": 12},
            "stages": [STAGE],
            **more,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECAP_CACHE", str(folder / "cache"))
        out, _ = train(recipe, folder / "run")
    model = load_checkpoint(out).model
    with torch.no_grad():  # so that captions differ from photo to photo
        model.decoder.project.weight.mul_(30)
    write_tensors(out / WEIGHTS, model_tensors(model), {"format": "pt"})
    return load_checkpoint(out)


def said_by_torch(loaded: Checkpoint, photos: np.ndarray, beam: int) -> list[tuple[int, ...]]:
    options = DecodeOptions(beam=beam, max_length=12)
    found = decode(
        loaded.model.session(), photos, options, eos_id=loaded.tokens["eos"], suppress=never_said(loaded.tokens)
    )
    return [best[0].token_ids for best in found]


def validation(loaded: Checkpoint) -> np.ndarray:
    return load_pixels(list(open_dataset(SCENES).splits["val"]), loaded.preprocess)


def test_a_bundle_says_what_torch_says_and_so_does_the_fused_graph(loaded: Checkpoint, tmp_path: Path) -> None:
    options = BuildOptions(fused=True)
    result = export(loaded.path, target="onnx-fp32", out=tmp_path / "a.edgecap", options=options, max_cider_drop=10)
    assert result.path and result.gate.measured["identical_captions"] == 1.0
    photos = validation(loaded)
    fused = FusedCaptioner.load(result.path)
    with Captioner.load(result.path) as captioner:
        assert verify_golden(captioner).ok
        assert captioner.tokens == loaded.tokens
        distinct: set[tuple[int, ...]] = set()
        for beam in (1, 3):
            expected = said_by_torch(loaded, photos, beam)
            assert [caption.token_ids for caption in captioner.caption_arrays(photos, beam=beam)] == expected
            assert [fused(photo, beam=beam).token_ids for photo in photos] == expected
            distinct |= set(expected)
        assert len(distinct) > 1  # some may end at once, where the end is BOS, too
        assert captioner.caption_arrays(photos[:1], prompt="a red")[0].text.startswith("a red")
    # The prompt's words are a few rows of the embedding, not all of it.
    manifest = json.loads((result.path / "bundle.json").read_text())
    assert manifest["graphs"]["encoder"]["outputs"]["prefix"]["shape"][2] == 32
    assert manifest["files"]["encoder.onnx"]["bytes"] < 40_000 + 4 * 32 * len(loaded.recipe.decoder.get("prompt", ()))


def test_int8_passes_the_gate(loaded: Checkpoint, tmp_path: Path) -> None:
    result = export(loaded.path, target="onnx-int8", out=tmp_path / "a.edgecap", max_cider_drop=10, calibration=6)
    assert result.gate.passed
    with Captioner.load(result.path) as captioner:
        assert verify_golden(captioner).ok


def test_llama_cpp_says_what_torch_says(loaded: Checkpoint, tmp_path: Path) -> None:
    for module in ("gguf", "llama_cpp"):
        pytest.importorskip(module, reason=f"needs {module}: pip install 'edgecap[gguf]'")
    if loaded.recipe.decoder["kind"] == "opt":
        with pytest.raises(UsageError, match="OPT is not an architecture llama.cpp knows"):
            export(loaded.path, target="gguf-f16", out=tmp_path / "a.edgecap")
        return
    result = export(loaded.path, target="gguf-f16", out=tmp_path / "a.edgecap", max_cider_drop=10, calibration=6)
    photos = validation(loaded)
    with Captioner.load(result.path) as captioner:
        assert verify_golden(captioner).ok
        said = [caption.token_ids for caption in captioner.caption_arrays(photos)]
    same = np.mean([a == b for a, b in zip(said, said_by_torch(loaded, photos, 1), strict=True)])
    assert same >= 0.9  # its image encoder is int8


def test_a_pruned_vocabulary_keeps_the_prompt_and_the_special_tokens(loaded: Checkpoint, tmp_path: Path) -> None:
    result = export(
        loaded.path, target="onnx-fp32", out=tmp_path / "a.edgecap", max_cider_drop=10, smaller=Smaller(("vocab=used",))
    )
    with Captioner.load(result.path) as captioner:
        tokens, manifest = captioner.tokens, captioner.bundle.manifest
        assert tokens["vocab_size"] < loaded.tokens["vocab_size"]
        new, old = captioner.tokenizer.inner, loaded.tokenizer.inner
        for name in ("bos", "eos", "pad", "unk"):
            assert new.id_to_token(tokens[name]) == old.id_to_token(loaded.tokens[name])
        now = manifest["lineage"]["checkpoint"]["recipe"]["decoder"].get("prompt", [])
        names = [None if i == PHOTO else new.id_to_token(i) for i in now]
        before = loaded.recipe.decoder.get("prompt", [])
        assert names == [None if i == PHOTO else old.id_to_token(i) for i in before]

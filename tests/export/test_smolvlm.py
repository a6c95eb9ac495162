"""A small SmolVLM from its files through training, export and the runtime, with photos in tiles."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgecap.export import artifact
from edgecap.export.pipeline import export
from edgecap.runtime import Captioner, verify_golden
from edgecap.runtime.decode import DecodeOptions, decode, never_said
from edgecap.train.checkpoint import load_checkpoint
from edgecap.train.run import train
from edgecap.train.smolvlm import with_vlm

from ..train.tiny import tiny_recipe
from ..train.vlms import pictures, save_vlm

SCENES = "scenes:train=8,val=4,test=2,size=64"


def test_a_smolvlm_with_photos_in_tiles_trains_exports_and_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, tile = 64, 32
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    stage = {"epochs": 1, "batch_size": 8, "lr": 1e-3}  # a frozen encoder: its features are cached
    recipe = tiny_recipe(stage, image_size=side, spec=SCENES)
    recipe = dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, tile=tile))
    run, metrics = train(with_vlm(recipe, str(save_vlm(tmp_path / "vlm", layers=1))), tmp_path / "run")
    assert metrics["finished"]
    loaded = load_checkpoint(run)
    assert loaded.recipe.bridge["frames"] == 5

    photos = pictures(4, side)
    options = DecodeOptions(max_length=6)
    said = decode(
        loaded.model.session(), photos, options, eos_id=loaded.tokens["eos"], suppress=never_said(loaded.tokens)
    )
    wanted = [loaded.tokenizer.decode(best[0].token_ids) for best in said]
    traced = artifact.to_onnx(loaded.model, framed=True)  # once: most of an export's time
    monkeypatch.setattr(artifact, "to_onnx", lambda *_, **options: traced.copy())
    for target in ("onnx-fp32", "onnx-int8"):
        result = export(run, target=target, out=tmp_path / f"{target}.edgecap", max_cider_drop=10, calibration=2)
        with Captioner.load(result.path) as captioner:
            assert verify_golden(captioner).ok
            captions = [caption.text for caption in captioner.caption_arrays(photos, max_length=6)]
            seen = captioner.view(image_size=16, tiles=False)
            assert seen.preprocess.size == (16, 16) and captioner(photos, image_size=16, tiles=False, max_length=2)
            whole = captioner.view(image_size=tile, tiles=False)
            assert whole.preprocess.size == (tile, tile) and captioner.view(
                image_size=16, tiles=True
            ).preprocess.size == (32, 32)
        if target == "onnx-fp32":
            assert captions == wanted
        assert all(captions)

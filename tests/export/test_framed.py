"""A published SmolVLM in three engines: photos of any shape against the processor and the model of transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgecap.export.artifact import BuildOptions, Source
from edgecap.export.assemble import assemble
from edgecap.export.calibration import Calibration
from edgecap.export.golden import make_golden, torch_model
from edgecap.export.prune import prune_checkpoint
from edgecap.export.targets import TARGETS
from edgecap.runtime import Captioner, EdgecapError, UsageError, verify_golden, write_bundle
from edgecap.runtime.decode import never_said
from edgecap.runtime.frames import Framing
from edgecap.runtime.prompt import Prompt
from edgecap.train.adopt import Published, adopt
from edgecap.train.checkpoint import load_checkpoint
from edgecap.train.framing import frames_of
from edgecap.train.smolvlm import CHAT

from ..train.vlms import NATIVE, image_processor, load_vlm, pictures, processor, save_vlm

EDGE, LENGTH = 96, 6
# (height, width) → (rows, columns) of tiles of NATIVE px once the longer side has EDGE.
SHAPES = {(96, 96): (2, 2), (50, 90): (2, 2), (40, 130): (1, 2), (70, 30): (2, 1), (20, 20): (2, 2)}
ENGINES = {"onnx-fp32": "onnxruntime", "openvino-fp16": "nncf", "gguf-f16": "llama_cpp"}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_vlm(tmp_path_factory.mktemp("smolvlm"))
    image_processor(EDGE, NATIVE, split=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(vlm: Path) -> Published:
    return adopt(str(vlm))


@pytest.fixture(scope="module")
def source(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Source:
    frames = frames_of(published)
    photos = [np.asarray(image) for image in drawn()]
    calibration = Calibration(photos, [[60, 61, 62]] * len(photos), published.tokens, frames=frames)
    source = Source(published, calibration, tmp_path_factory.mktemp("build"), frames=frames)
    source.trunk()  # once: most of an export's time
    return source


@pytest.fixture(scope="module", params=ENGINES)
def captioner(request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip(ENGINES[request.param], reason=f"{request.param} needs {ENGINES[request.param]}")
    graphs = {"encoder": "fp32"} if request.param.startswith("gguf") else {}
    place = bundle(source, request.param, tmp_path_factory.mktemp("bundle") / "x.edgecap", graphs=graphs)
    with Captioner.load(place, threads=1) as captioner:
        yield captioner


def bundle(source: Source, name: str, place: Path, **options: Any) -> Path:
    target = TARGETS[name]
    source = dataclasses.replace(source, options=BuildOptions(**options))
    golden = make_golden(source.checkpoint)
    manifest, files = assemble(source.checkpoint, (name, target), "x", target.build(source), golden, [], source.frames)
    write_bundle(place, {**manifest, "measured": {}}, files)
    return place


def drawn() -> list[Image.Image]:
    """A picture of each shape."""
    return [
        Image.fromarray(pictures(1, max(shape), seed)[0][: shape[0], : shape[1]]) for seed, shape in enumerate(SHAPES)
    ]


def generated(folder: Path, published: Published, image: Image.Image, *, side: int, split: bool) -> list[int]:
    """What transformers' model says of a picture, greedily, through transformers' processor."""
    theirs, tokens = load_vlm(folder), published.tokens
    reader = processor(folder, EDGE, side, split=split)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CHAT}]}]
    text = reader.apply_chat_template(said, add_generation_prompt=True)
    fed = reader(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = theirs.generate(
            **fed,
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=tokens["eos"],
            suppress_tokens=list(never_said(tokens)),
        )
    row = out[0, fed["input_ids"].shape[1] :].tolist()
    return row[: row.index(tokens["eos"])] if tokens["eos"] in row else row


@pytest.mark.parametrize("side, tiles", [(NATIVE, True), (NATIVE, False), (32, False), (16, False)])
def test_captions_are_those_of_transformers(
    captioner: Captioner, vlm: Path, published: Published, side: int, tiles: bool
) -> None:
    pictures = drawn() if tiles else drawn()[:3]
    wanted = [generated(vlm, published, image, side=side, split=tiles) for image in pictures]
    assert tiles is False or len({tuple(ids) for ids in wanted}) > 1
    options = {"max_length": LENGTH, "beam": 1, "image_size": side, "tiles": tiles}
    found = captioner(pictures, **options)
    assert [list(each.token_ids) for each in found] == wanted
    alone = [captioner(image, **options) for image in pictures]
    assert [each.token_ids for each in alone] == [each.token_ids for each in found]
    np.testing.assert_allclose([each.logprob for each in alone], [each.logprob for each in found], atol=2e-3)


def test_photos_are_cut_and_the_golden_pair_holds(captioner: Captioner) -> None:
    framing = captioner.view().framing
    assert {shape: framing.grid(shape[1], shape[0]) for shape in SHAPES} == SHAPES
    assert verify_golden(captioner).ok


def test_beams_continue_a_prompt_as_torch_does(captioner: Captioner, published: Published) -> None:
    pictures = drawn()[:2]
    reference = Captioner(captioner.bundle, torch_model(published), captioner.tokenizer)
    for options in ({"beam": 3}, {"beam": 2, "prompt": "a cat"}):
        ours, theirs = (each(pictures, max_length=LENGTH, **options) for each in (captioner, reference))
        assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
        np.testing.assert_allclose([o.logprob for o in ours], [t.logprob for t in theirs], atol=5e-3)


def test_the_text_in_front_of_a_photo_is_read_once(captioner: Captioner) -> None:
    openings = captioner._model.inner.openings
    captioner(drawn()[:2], max_length=2)
    held = dict(openings)
    captioner(drawn()[:2], max_length=2)
    assert held and all(openings[key] is value for key, value in held.items()) and openings.keys() == held.keys()


def test_budgets_that_the_model_does_not_take(captioner: Captioner) -> None:
    with pytest.raises(UsageError, match="a multiple of 16 px up to 48"):
        captioner(drawn()[0], image_size=20)
    with pytest.raises(UsageError, match="multiple of 16 px up to 48"):
        captioner(drawn()[0], image_size=64)


def test_a_smaller_size_means_no_tiles_and_a_photo_that_cannot_be_cut_is_told_by_name(captioner: Captioner) -> None:
    assert captioner.view(image_size=16).framing.split is False and captioner.view().framing.split is True
    with pytest.raises(UsageError, match="6 tiles a side, more than"):
        captioner.view(image_size=16, tiles=True)
    wide = Image.new("RGB", (5000, 4))
    long = dataclasses.replace(captioner._view, framing=dataclasses.replace(captioner._view.framing, longest_edge=0))
    with pytest.raises(EdgecapError, match=r"the image: a photo in 1 × 105 tiles"):
        long.load(wide)


def test_int8_and_the_projector_of_llama_cpp(source: Source, tmp_path: Path) -> None:
    few = source.calibration
    few = dataclasses.replace(few, pixels=few.pixels[:2], captions=few.captions[:2])
    source = dataclasses.replace(source, calibration=few, statistics={}, peaks={})
    with Captioner.load(bundle(source, "onnx-int8", tmp_path / "a.edgecap")) as captioner:
        assert verify_golden(captioner).min_cosine > 0.95
        one, all_ = captioner(drawn()[1], max_length=4), captioner(drawn(), max_length=4)
        assert one.token_ids == all_[1].token_ids
    pytest.importorskip("llama_cpp", reason="the projector needs llama-cpp-python: pip install 'edgecap[gguf]'")
    with Captioner.load(bundle(source, "gguf-f16", tmp_path / "b.edgecap", mmproj="f16")) as captioner:
        assert verify_golden(captioner).ok
        with pytest.raises(UsageError, match="48 px only: leave image_size out"):
            captioner(drawn()[0], image_size=32, tiles=False)


def test_what_is_published_must_be_all_there(vlm: Path, published: Published, tmp_path: Path) -> None:
    assert isinstance(published.framing, Framing) and published.preprocess.mode == "keep"
    import shutil

    shutil.copytree(vlm, tmp_path / "vlm")
    (tmp_path / "vlm" / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"preprocessor_config\.json"):
        adopt(str(tmp_path / "vlm"))
    with pytest.raises(UsageError, match=r"no config\.json there"):
        adopt(str(tmp_path / "nowhere/at/all"))
    assert adopt(str(vlm), side=32, tiles=False).framing == published.framing.at(32)
    wide = dataclasses.replace(published, framing=dataclasses.replace(published.framing, longest_edge=48 * 5))
    with pytest.raises(UsageError, match="5 tiles a side, which the tokenizer has no names for"):
        frames_of(wide)


def test_a_pruned_vocabulary_says_the_same_of_what_it_kept(
    source: Source, published: Published, vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the tokens that stay, through graphs and runtime; tiles and prompt stay as they are."""
    monkeypatch.chdir(tmp_path)
    corpus = ["a red circle above a blue square"]
    out = prune_checkpoint(
        published.squashed,
        ["vocab=used"],
        pixels=pictures(1, NATIVE),
        captions=[[60]],
        corpus=corpus,
        out=Path("small"),
    )
    small = published.pruned_to(load_checkpoint(out))
    names = {published.tokenizer.inner.id_to_token(i): i for i in range(published.tokens["vocab_size"])}
    old = [names[small.tokenizer.inner.id_to_token(i)] for i in range(small.tokens["vocab_size"])]
    assert len(old) < len(names)
    for image in drawn()[:2]:
        wanted, found = (torch_model(each).session().start([np.asarray(image)]) for each in (published, small))
        np.testing.assert_allclose(wanted[:, old], found, atol=1e-6)  # one row: summed in another order
    prompts = [Prompt.from_dict(frames_of(each)["prompt"]) for each in (small, published)]
    for grid in ((0, 0), (2, 1), (3, 3)):
        ours, theirs = (prompt.segments(*grid).flat(0, 0) for prompt in prompts)
        assert [old[i] for i in ours] == theirs


def test_large_graphs_keep_their_weights_beside_them(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = bundle(source, "onnx-fp32", tmp_path / "a.edgecap")
    monkeypatch.setattr("edgecap.export.onnx_target.LARGE", 10_000)
    apart = bundle(source, "onnx-fp32", tmp_path / "b.edgecap")
    assert {"encoder.bin", "decoder.bin"} <= {file.name for file in apart.iterdir()}
    with Captioner.load(plain, threads=1) as one, Captioner.load(apart, threads=1) as other:
        said, again = (each(drawn(), max_length=LENGTH, beam=2) for each in (one, other))
    assert [each.token_ids for each in said] == [each.token_ids for each in again]
    (apart / "decoder.bin").unlink()
    with pytest.raises(EdgecapError, match=r"decoder\.bin"):
        Captioner.load(apart)

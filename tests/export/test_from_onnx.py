"""`edgecap export --from`: what the hub's ONNX community exports of a SmolVLM, against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgecap.cli import cli
from edgecap.export.from_onnx import wrap
from edgecap.export.from_onnx_files import CHAT
from edgecap.export.from_onnx_graphs import framed_decoder
from edgecap.runtime import Captioner, verify_golden
from edgecap.runtime.errors import UsageError

from ..train.vlms import NATIVE, load_vlm, pictures, processor
from .community import FORMS, TILE, add_blocks, add_half, add_quantized, save_community

LENGTH = 8
OPEN = "grouped"  # the one whose vision graph takes photos of any size


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exports")
    kinds = {"concat": "smolvlm", "grouped": "idefics3", "multihead": "smolvlm"}
    return {
        form: save_community(place / form, kind=kinds[form], form=form, open_sides=form == OPEN, split=form != "concat")
        for form in FORMS
    }


@pytest.fixture(scope="module")
def bundles(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bundles")
    return {form: wrap(folder, out=place / f"{form}.edgecap").path for form, folder in exports.items()}


def said_by_transformers(folder: Path, photo: np.ndarray, side: int, tile: int, split: bool, end: int) -> list[int]:
    theirs = processor(folder, side, tile, split=split)
    dialogue = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CHAT}]}]
    text = theirs.apply_chat_template(dialogue, add_generation_prompt=True)
    inputs = theirs(text=text, images=[Image.fromarray(photo)], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = load_vlm(folder).generate(**inputs, do_sample=False, max_new_tokens=LENGTH, eos_token_id=end)
    found = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return found[: found.index(end)] if end in found else found


def photos() -> list[np.ndarray]:
    """Of several shapes, two of one."""
    wide, high = pictures(2, 70, seed=1)[:, :40], pictures(1, 60, seed=2)[0][:, :33]
    return [pictures(1, NATIVE)[0], *wide, high]


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_says_what_transformers_says_in_one_frame_and_in_tiles(
    form: str, exports: dict[str, Path], bundles: dict[str, Path]
) -> None:
    with Captioner.load(bundles[form]) as captioner:
        manifest = captioner.bundle.manifest
        assert ("cache" in manifest["session"]) == (form == "grouped")
        end, frames = manifest["tokens"]["eos"], manifest["frames"]
        side, tile, split = frames["longest_edge"], frames["side"], frames["split"]
        assert split == (form != "concat")
        captions = captioner(photos(), max_length=LENGTH)
        once = captioner(photos(), max_length=LENGTH, tiles=False)
        alone = [captioner(photo, max_length=LENGTH) for photo in photos()]
        beams = captioner(photos(), max_length=LENGTH, beam=3)
    wanted = [said_by_transformers(exports[form], photo, side, tile, split, end) for photo in photos()]
    assert [list(caption.token_ids) for caption in captions] == wanted
    assert len({tuple(ids) for ids in wanted}) > 1
    assert [list(caption.token_ids) for caption in once] == [
        said_by_transformers(exports[form], photo, side, tile, False, end) for photo in photos()
    ]
    assert [caption.token_ids for caption in alone] == [caption.token_ids for caption in captions]
    assert [len(caption.alternatives) for caption in beams] == [2] * len(photos())


def test_only_an_open_vision_graph_takes_other_sizes(
    exports: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    photo = photos()[1]
    with Captioner.load(bundles[OPEN]) as captioner:
        end, side = captioner.tokens["eos"], captioner.bundle.manifest["frames"]["longest_edge"]
        other = 16 if captioner.bundle.manifest["frames"]["side"] == TILE else TILE
        small = captioner(photo, max_length=LENGTH, image_size=other, tiles=False)
    assert list(small.token_ids) == said_by_transformers(exports[OPEN], photo, side, other, False, end)
    made = wrap(exports[OPEN], image_size=other, tiles=False, out=tmp_path / "small.edgecap")
    with Captioner.load(made.path) as captioner:
        assert captioner(photo, max_length=LENGTH).token_ids == small.token_ids
        assert captioner(photo, max_length=LENGTH, image_size=TILE, tiles=True).text
    with pytest.raises(UsageError, match=f"takes frames of {NATIVE} px alone"):
        wrap(exports["multihead"], image_size=TILE, out=tmp_path / "other.edgecap")
    with Captioner.load(bundles["multihead"]) as captioner:
        with pytest.raises(UsageError, match=f"sees frames of {NATIVE} px alone"):
            captioner(photo, image_size=TILE)


def test_the_other_variants(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exports["concat"], tmp_path / "hub")
    add_half(folder)
    add_quantized(folder)
    add_blocks(folder)
    cases = {"fp16": ["fp16"], "int8": ["int8"], "int4": ["int8", "decoder=q4"]}
    for precision, variants in cases.items():
        result = wrap(folder, variants=variants, out=tmp_path / f"{precision}.edgecap")
        ends = variants[-1].removeprefix("decoder=")
        assert result.target == f"onnx-{precision}"
        assert result.files["vision_encoder"] == f"onnx/vision_encoder_{variants[0]}.onnx"
        assert result.files["decoder_model_merged"] == f"onnx/decoder_model_merged_{ends}.onnx"
        with Captioner.load(result.path) as captioner:
            done = {each["name"]: each["cost"] for each in captioner.bundle.manifest["lineage"]["passes"]}
            assert verify_golden(captioner).min_cosine > (0.99 if precision == "fp16" else 0.9)
        layer = {"fp16": "MatMul", "int8": "MatMulInteger", "int4": "MatMulNBits"}[precision]
        assert done["last_position"] == {"in front of": layer}


def test_the_command_says_what_it_took_and_what_was_measured(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "made.edgecap"
    command = ["export", "--from", str(exports["concat"]), "-o", str(out)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    for text in ("decoder_model_merged: onnx/decoder_model_merged.onnx", "not measured", f"{NATIVE} px", str(out)):
        assert text in result.output.replace("\n", "")
    for other in ("verify", "inspect"):
        result = CliRunner().invoke(cli, [other, str(out)])
        assert result.exit_code == 0, result.output
    assert "from the ONNX export concat" in result.output
    result = CliRunner().invoke(cli, [*command, "--data", "scenes:train=2,val=4,test=2,size=64", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output[result.output.index("{\n") :])
    assert found["measured"]["photos"] == 4 and "value" in found["measured"]["cider"]
    assert found["gate"]["verdict"] == "none" and "CIDEr" in (out / "MODEL_CARD.md").read_text()


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    kept = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))


REFUSALS = {
    "no such folder": lambda folder: shutil.rmtree(folder),
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "holds a llava model; --from takes smolvlm and idefics3": lambda folder: edit(
        folder, "config.json", model_type="llava"
    ),
    "config.json is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "says no vision_config.image_size": lambda folder: edit(folder, "config.json", vision_config={"patch_size": 8}),
    "has no onnx/decoder_model_merged.onnx": lambda folder: (folder / "onnx/decoder_model_merged.onnx").unlink(),
    "has no preprocessor_config.json": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "has no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "has no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "the chat template fails": lambda folder: (folder / "chat_template.jinja").write_text("{{ nothing.at.all }}"),
    "puts 0 photos into the prompt": lambda folder: (folder / "chat_template.jinja").write_text("hello"),
    "cannot be read": lambda folder: (folder / "onnx/vision_encoder.onnx").write_bytes(b"no graph"),
    "the vision encoder takes input_ids": lambda folder: shutil.copy(
        folder / "onnx/embed_tokens.onnx", folder / "onnx/vision_encoder.onnx"
    ),
    "the decoder takes input_ids": lambda folder: shutil.copy(
        folder / "onnx/embed_tokens.onnx", folder / "onnx/decoder_model_merged.onnx"
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_missing_or_another_model_is_one_line(reason: str, exports: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exports["multihead"], tmp_path / "hub")
    REFUSALS[reason](folder)
    out = tmp_path / "out.edgecap"
    result = CliRunner().invoke(cli, ["export", "--from", str(folder), "-o", str(out)])
    assert isinstance(result.exception, UsageError) and not out.exists(), result.output
    message = str(result.exception)
    assert reason in message and "\n" not in message


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--variant", "q4"], "has no vision_encoder of variant q4"),
        (["--variant", "q5"], "--variant q5: take fp32, fp16"),
        (["--finetune", "2"], "--finetune needs --target"),
        (["some/run"], "CHECKPOINT needs --target"),
        (["--variant", "q4", "--target", "onnx-int8"], "goes with --from and without --target"),
    ],
)
def test_options_that_it_does_not_take(more: list[str], reason: str, exports: dict[str, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["export", "--from", str(exports["concat"]), *more, "-o", str(tmp_path / "out")])
    assert reason in result.output + str(result.exception)


def test_options_that_need_it() -> None:
    assert "--variant goes with" in CliRunner().invoke(cli, ["export", "--variant", "q4"]).output
    assert "Missing option '--target'" in CliRunner().invoke(cli, ["export", "some/run"]).output


def test_decoders_of_other_inputs(exports: dict[str, Path]) -> None:
    def parts() -> tuple[onnx.ModelProto, onnx.ModelProto]:
        names = ("embed_tokens", "decoder_model_merged")
        embed, decoder = (onnx.load(exports["grouped"] / f"onnx/{name}.onnx") for name in names)
        return embed, decoder

    sizes = {"dim": 32, "vocab": 360, "positions": 512}
    embed, decoder = parts()
    decoder.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    with pytest.raises(UsageError, match="merged by an optimum before 1.14"):
        framed_decoder(embed, decoder, **sizes)
    embed, decoder = parts()
    decoder.graph.input.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1]))
    with pytest.raises(UsageError, match="the decoder takes inputs_embeds, .* where inputs_embeds"):
        framed_decoder(embed, decoder, **sizes)
    embed, decoder = parts()
    decoder.graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []))
    made = framed_decoder(embed, decoder, **sizes)
    assert made.session["positions"] == 256  # the rows of its table of cosines
    assert "num_logits_to_keep" not in [value.name for value in made.model.graph.input]
    embed, decoder = parts()
    decoder.opset_import[0].version = 11
    with pytest.raises(UsageError, match="the decoder is of ONNX opset 11"):
        framed_decoder(embed, decoder, **sizes)
    embed, decoder = parts()
    head = next(tensor for tensor in decoder.graph.initializer if tensor.name == "head")
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(embed.graph.initializer[0]).T.copy(), "head"))
    made = framed_decoder(embed, decoder, **sizes)
    assert made.passes[-1].cost["changed"]  # an output layer that is the embedding's is stored once
    embed, decoder = parts()
    embed.opset_import[0].version = 21
    assert framed_decoder(embed, decoder, **sizes).model.opset_import[0].version == 14

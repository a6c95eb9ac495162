"""The decoders against slower or independent ways to the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgecap.runtime.decode import DecodeOptions, decode
from edgecap.runtime.errors import UsageError
from edgecap.train.models import BRIDGES, DECODERS, ENCODERS, build_model

from .tiny import DECODERS as TINY
from .tiny import ENCODER, SIGLIP, SIZE, tiny_model

LANGUAGE_MODELS = ("llama", "gpt2", "opt")


def photos(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def test_every_decoder_of_the_table_is_tested() -> None:
    assert set(TINY) == set(DECODERS)


@pytest.mark.parametrize("kind", TINY)
def test_stepping_gives_the_logits_of_teacher_forcing(kind: str) -> None:
    model, pixels = tiny_model(kind), photos(2)
    ids = torch.randint(4, 40, (2, 1, 6))
    ids[:, :, 0] = 1
    with torch.no_grad():
        whole = model(ids, pixels=torch.from_numpy(pixels)).numpy()  # [2, 1, 6, V]
    session = model.session()
    rows = [session.start(pixels)]
    for t in range(1, 6):
        rows.append(session.step(ids[:, 0, t].numpy(), np.arange(2)))
    np.testing.assert_allclose(np.stack(rows, 1), whole[:, 0], atol=2e-5)


@pytest.mark.parametrize("kind", TINY)
def test_keep_selects_positions_and_changes_nothing(kind: str) -> None:
    model = tiny_model(kind)
    ids = torch.randint(4, 40, (3, 4, 7))
    lengths = torch.randint(1, 8, (3, 4, 1))
    lengths[1, 2] = 0  # a photo with fewer captions than the others
    keep = torch.arange(7) < lengths
    pixels = torch.from_numpy(photos(3))
    with torch.no_grad():
        whole, kept = model(ids, pixels=pixels), model(ids, keep, pixels=pixels)
    torch.testing.assert_close(kept, whole[keep], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TINY)
def test_rows_follow_their_parents(kind: str) -> None:
    """Reordering and dropping rows gives what each history alone gives."""
    model, pixels = tiny_model(kind), photos(2)
    session = model.session()
    session.start(pixels)
    session.step(np.array([5, 6, 7]), np.array([0, 1, 1]))
    got = session.step(np.array([8, 9]), np.array([2, 0]))
    for row, (photo, history) in enumerate([(1, [7, 8]), (0, [5, 9])]):
        alone = model.session()
        alone.start(pixels[photo : photo + 1])
        for token in history:
            expected = alone.step(np.array([token]), np.array([0]))
        np.testing.assert_allclose(got[row], expected[0], atol=2e-5)


@pytest.mark.parametrize("kind", TINY)
def test_a_prompt_is_as_good_as_words_said(kind: str) -> None:
    model, pixels = tiny_model(kind), photos(2)
    prompted = model.session().start(pixels, np.array([5, 9]))
    session = model.session()
    session.start(pixels)
    for token in (5, 9):
        said = session.step(np.full(2, token), np.arange(2))
    np.testing.assert_allclose(prompted, said, atol=2e-5)


@pytest.mark.parametrize("kind", TINY)
def test_graphs_are_the_session(kind: str) -> None:
    """The modules that are exported give the reference's first logits, and name what they take and give."""
    model, pixels = tiny_model(kind), photos(2)
    graphs = model.graphs()
    with torch.no_grad():
        photo = dict(zip(graphs.encoder_outputs, graphs.encoder(torch.from_numpy(pixels)), strict=True))
        outputs = graphs.decoder(*(tensor for tensor, _ in graphs.decoder_inputs.values()))
    assert len(outputs) == len(graphs.decoder_outputs)
    reference = model.session().start(pixels)
    roles = graphs.session
    feeds = {roles["ids"]["input"]: torch.ones(2, *[1] * (roles["ids"]["rank"] - 1), dtype=torch.long)}
    if "photo_index" in roles:
        feeds[roles["photo_index"]] = torch.arange(2)
    feeds |= {name: photo[source] for name, source in roles.get("photo", {}).items()}
    feeds |= {state["input"]: photo[state["init"]] for state in roles.get("state", [])}
    if "prefix" in roles:
        feeds[roles["prefix"]["input"]] = photo[roles["prefix"]["from"]]
    feeds |= {kv["input"]: torch.zeros(2, kv["heads"], 0, kv["dim"]) for kv in roles.get("kv", [])}
    with torch.no_grad():
        outputs = graphs.decoder(*(feeds[name] for name in graphs.decoder_inputs))
    np.testing.assert_allclose(outputs[0].numpy(), reference, atol=2e-5)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_greedy_is_what_transformers_generates(kind: str) -> None:
    model, pixels = tiny_model(kind), photos(3)
    options = DecodeOptions(max_length=8)
    ours = decode(model.session(), pixels, options, eos_id=39)
    with torch.no_grad():
        prefix = model.photo(pixels=torch.from_numpy(pixels))["prefix"]
        start = model.decoder.lm.get_input_embeddings()(torch.ones(3, 1, dtype=torch.long))
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 39, "pad_token_id": 0}
        theirs = model.decoder.lm.generate(inputs_embeds=torch.cat((prefix, start), 1), **settings)
    for mine, line in zip(ours, theirs.tolist(), strict=True):
        line = line[: line.index(39)] if 39 in line else line
        assert list(mine[0].token_ids) == line[: len(mine[0].token_ids)]
        assert len(mine[0].token_ids) == min(8, len(line))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_more_positions_than_the_decoder_has_are_one_line(kind: str) -> None:
    model = tiny_model(kind)
    with pytest.raises(UsageError, match=r"max_positions = 256 is too few for 4 photo and 253 caption positions"):
        model(torch.ones(1, 1, 253, dtype=torch.long), pixels=torch.from_numpy(photos(1)))


def test_siglip_through_the_pixel_shuffle_steps_as_it_is_taught() -> None:
    model, pixels = tiny_model("llama", siglip=True), photos(2)
    ids = torch.randint(4, 40, (2, 1, 4))
    ids[:, :, 0] = 1
    with torch.no_grad():
        whole = model(ids, pixels=torch.from_numpy(pixels)).numpy()  # [2, 1, 4, V]
    session = model.session()
    rows = [session.start(pixels)] + [session.step(ids[:, 0, t].numpy(), np.arange(2)) for t in range(1, 4)]
    np.testing.assert_allclose(np.stack(rows, 1), whole[:, 0], atol=2e-5)
    with pytest.raises(UsageError, match="photos of 64 × 64, not 32 × 32: --set data.image_size=64"):
        model.session().start(photos(1)[:, :32, :32])


def test_pixel_shuffle_is_smolvlm_s() -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    bridge, features = BRIDGES["pixel_shuffle"](8, dim=5, scale=3), torch.randn(2, 36, 8)
    theirs = bridge.project(Idefics3Connector.pixel_shuffle(bridge, features, 3))  # [2, 4, 5]
    torch.testing.assert_close(bridge(features), theirs)
    for cells in (35, 16):
        with pytest.raises(UsageError, match=f"scale = 3 does not divide the sides of {cells} features"):
            bridge(features[:, :cells])


@pytest.mark.parametrize("whole", [False, True])
def test_siglip_loads_from_its_own_or_the_whole_model_s_directory(whole: bool, tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if whole:
        saved = SiglipModel(SiglipConfig(vision_config=SIGLIP["config"], text_config=text | {"vocab_size": 9}))
    else:
        saved = SiglipVisionModel(SiglipVisionConfig(**SIGLIP["config"]))
    saved.save_pretrained(tmp_path)
    encoder = ENCODERS["siglip"](str(tmp_path), {})
    pixels = torch.from_numpy(photos(1))
    normal = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        theirs = (saved.vision_model if whole else saved)(normal).last_hidden_state
        torch.testing.assert_close(encoder(pixels), theirs, atol=1e-5, rtol=1e-4)
        again = ENCODERS["siglip"](None, encoder.settings())
        again.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(again(pixels), encoder(pixels))


def test_wrong_parts_are_one_line() -> None:
    parts = {"encoder": ENCODER, "bridge": {"kind": "linear"}, "decoder": {"kind": "gru"}}
    for part, options, message in [
        ("decoder", {"kind": "gru", "layers": 3}, "layers"),
        ("decoder", {"kind": "lstm9"}, "choices: gpt2, gru, llama, lstm, opt, transformer"),
        ("decoder", {"kind": "gru", "heads": 7}, "must divide"),
        ("decoder", {"kind": "gru", "heads": 0}, "recipe .decoder."),
        ("decoder", {"kind": "gru", "hidden": -3}, "recipe .decoder."),
        ("decoder", {"kind": "gpt2", "dim": 32, "heads": 5}, "heads must divide dim"),
        ("decoder", {"kind": "gpt2", "dim": 32, "heads": 4, "kv_heads": 2}, "kv_heads"),
        ("decoder", {"kind": "gru", "heads": 2.0}, "heads = 2.0 must be a whole number"),
        ("encoder", {"kind": "mobilenet_v2", "config": {"wings": 2}}, "wings"),
        ("encoder", {"kind": "mobilenet_v2", "config": {"depth_multiplier": "x"}}, "encoder.config.*depth_multiplier"),
        ("encoder", {"kind": "mobilenet_v2", "config": {"depth_multiplier": -1.0}}, "encoder"),
        ("encoder", {"kind": "mobilenet_v2", "source": "./nowhere", "config": {}}, "config.json"),
    ]:
        with pytest.raises(UsageError, match=f"(?s){message}"):
            build_model(**{**parts, part: options}, vocab_size=9, bos_id=1, size=(64, 64))

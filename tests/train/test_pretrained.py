"""Pretrained language models and tokenizers against transformers itself: logits, ids, texts, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgecap.runtime.errors import UsageError
from edgecap.runtime.tokenizer import Tokenizer
from edgecap.train import loop
from edgecap.train.checkpoint import TOKENIZER, WEIGHTS, load_checkpoint, model_for
from edgecap.train.data.batches import Batch, encode_captions
from edgecap.train.models import DECODERS, build_model
from edgecap.train.models.language_model import PHOTO
from edgecap.train.objectives.scst import SelfCritical
from edgecap.train.pretrained import open_tokenizer, resolve
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.settings import Recipe, Stage
from edgecap.train.tokenizer import token_ids

from .parts import SAVE, save_gpt2, save_llama, save_opt, save_tinyllama
from .tiny import ENCODER, SIZE

FEW = "scenes:train=24,val=4,test=4,size=64"
CAPTIONS = ["a red ball on the table", "two dogs and 15 cats", "it does n't move", "ünïcode zebra", "a"]
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "opt": ("opt", save_opt, {}),
    "opt-gelu": ("opt", save_opt, {"activation_function": "gelu", "enable_bias": False, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", save_gpt2, {}),
    "gpt2-other": (
        "gpt2",
        save_gpt2,
        {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "n_inner": 40},
    ),
    "llama": ("llama", save_llama, {}),
    "llama-untied": ("llama", save_llama, {"tied": False, "attention_bias": True, "head_dim": 12}),
    "tinyllama": ("llama", save_tinyllama, {}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def recipe_of(kind: str, source: Path | str, *stages: dict[str, Any], **more: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "small",
            "data": {"spec": FEW, "image_size": SIZE, "captions_per_photo": 2},
            "tokenizer": {"kind": "pretrained", "max_length": 24},
            "encoder": ENCODER,
            "bridge": {"kind": "linear", "dim": 16},
            "decoder": {"kind": kind, "source": str(source)},
            "decoding": {"max_length": 6},
            "stages": list(stages) or [{"epochs": 1}],
            **more,
        }
    )


def opened(recipe: Recipe) -> tuple[Any, Recipe, dict[str, int]]:
    tokenizer, recipe = open_tokenizer(resolve(recipe), CAPTIONS)
    return tokenizer, recipe, token_ids(tokenizer, recipe.tokenizer.ids)


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers_own_with_and_without_a_prompt(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kind, save, settings = MODELS[name]
    source = save(tmp_path / "model", **settings)
    _, recipe, tokens = opened(recipe_of(kind, source))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    look_up, vocab = theirs.get_input_embeddings(), tokens["vocab_size"]
    memory, ids = torch.randn(2, 3, 16), torch.randint(0, vocab, (2, 2, 5))
    for prompt in ([], [7, PHOTO, PHOTO, 8, 9, PHOTO, 5], [6, PHOTO, 4]):
        decoder = DECODERS[kind](16, vocab, **{k: v for k, v in recipe.decoder.items() if k != "kind"}, prompt=prompt)
        with torch.no_grad():
            seen = decoder.eval().project(memory)  # [2, 3, dim]
            places, prefix = iter(range(3)), []
            for i in prompt or [PHOTO]:
                if i != PHOTO:
                    prefix.append(look_up(torch.tensor([[i], [i]])))
                else:
                    prefix.append(seen[:, [next(places)]] if prompt.count(PHOTO) == 3 else seen)
            for caption in range(2):
                embeds = torch.cat((*prefix, look_up(ids[:, caption])), 1)
                expected = theirs(inputs_embeds=embeds).logits[:, -5:, :vocab]
                torch.testing.assert_close(decoder(memory, ids)[:, caption], expected, atol=2e-4, rtol=1e-4)
    assert theirs.config.tie_word_embeddings == recipe.decoder["tied"]


def test_a_vlm_gives_its_language_model(tmp_path: Path) -> None:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 360,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 2,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    for tied in (False, True):
        config = SmolVLMConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, scale_factor=2)
        whole = SmolVLMForConditionalGeneration(config).eval()
        whole.save_pretrained(tmp_path / f"vlm-{tied}")
        recipe = resolve(recipe_of("llama", tmp_path / f"vlm-{tied}"))
        assert recipe.decoder["tied"] is tied
        decoder = DECODERS["llama"](16, 360, **{k: v for k, v in recipe.decoder.items() if k != "kind"}).eval()
        ids = torch.randint(0, 360, (1, 4))
        with torch.no_grad():
            states = whole.model.text_model(input_ids=ids).last_hidden_state
            ours = decoder.lm(input_ids=ids).logits
            torch.testing.assert_close(ours, whole.lm_head(states), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "tinyllama"])
def test_ids_and_texts_are_transformers_own(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    kind, save, _ = MODELS[name]
    source = save(tmp_path / "model")
    tokenizer, recipe, tokens = opened(recipe_of(kind, source))
    theirs, ours = AutoTokenizer.from_pretrained(source), Tokenizer.load(tokenizer.to_str().encode())
    for text in [*CAPTIONS, " a red ball", "a red  ball ", "a</s>b<|endoftext|>", "狗 \n", ""]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True).strip()
        assert tokenizer.encode(text).ids == ids  # nothing adds a BOS
    assert tokens["bos"] == theirs.bos_token_id and tokens["eos"] == theirs.eos_token_id
    assert tokens["pad"] == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert tokens["vocab_size"] == len(theirs)
    # Read from the recipe of a checkpoint again.
    again = recipe_from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert token_ids(tokenizer, again.tokenizer.ids) == tokens


# --- prompts -------------------------------------------------------------------------------------------------------


def test_a_chat_is_the_template_s_text_with_the_photo_in_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = save_llama(tmp_path / "model")
    tokenizer, recipe, tokens = opened(recipe_of("llama", source, prompt={"chat": "describe this {image} picture"}))
    theirs = AutoTokenizer.from_pretrained(source)
    message = [{"role": "user", "content": "describe this {image} picture"}]
    text = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, after = (theirs.encode(part, add_special_tokens=False) for part in text.split("{image}"))
    assert recipe.decoder["prompt"] == [*before, PHOTO, *after[:-1]] and tokens["bos"] == after[-1]
    assert tokenizer.encode("a ball").ids == theirs.encode("a ball", add_special_tokens=False)  # behind a line's end


def test_a_caption_behind_a_word_begins_with_a_space_and_may_say_that_word(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from edgecap.runtime.decode import never_said

    source = save_gpt2(tmp_path / "model")
    tokenizer, recipe, tokens = opened(recipe_of("gpt2", source, prompt={"text": "{image}A photo of"}))
    theirs = AutoTokenizer.from_pretrained(source)
    whole = theirs.encode("A photo of a red ball", add_special_tokens=False)
    ours = [*recipe.decoder["prompt"][1:], tokens["bos"], *tokenizer.encode("a red ball").ids]
    assert ours == whole and recipe.decoder["prompt"][0] == PHOTO
    assert never_said(tokens) == ()  # its last word is no special token, all others are EOS
    _, plain, tokens = opened(recipe_of("gpt2", source, prompt={"text": "the photo <|endoftext|>{image}"}))
    assert plain.decoder["prompt"][-1] == PHOTO and tokens["bos"] == theirs.bos_token_id


def test_a_learnt_tokenizer_has_the_tokens_that_the_prompt_names() -> None:
    parts = {
        "decoder": {"kind": "llama", "dim": 16, "heads": 2, "layers": 1},
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
    }
    for prompt, names in [
        ({"text": "<|user|>a ball {image} <end>"}, ["<|user|>", "<end>"]),
        ({"chat": "a ball"}, ["<|im_start|>", "<end_of_utterance>"]),
    ]:
        tokenizer, recipe, tokens = opened(recipe_from_dict({**parts, "prompt": prompt}))
        special = tokenizer.get_added_tokens_decoder()
        said = [*recipe.decoder["prompt"], tokens["bos"]]
        for name in names:
            assert tokenizer.token_to_id(name) in said and special[tokenizer.token_to_id(name)].special
        assert [tokens[name] for name in ("pad", "eos", "unk")] == [0, 2, 3] and said.count(PHOTO) == 1
        assert tokenizer.encode("a red ball").ids == tokenizer.encode(" a red ball").ids
    with pytest.raises(UsageError, match="does not know 'giraffe'.*tokenizer.kind = bpe"):
        opened(recipe_from_dict({**parts, "tokenizer": {"min_count": 1}, "prompt": {"text": "a red giraffe"}}))
    tokenizer, _, tokens = opened(
        recipe_from_dict({**parts, "tokenizer": {"kind": "bpe", "vocab_size": 900, "fill": True}})
    )
    assert tokens["vocab_size"] == 900 and max(tokenizer.encode("a red ball <unused899>").ids) < 400


@pytest.mark.parametrize("kind", SAVE)
def test_gradients_reach_the_bridge_through_the_prompt_and_the_prompt_s_words(kind: str, tmp_path: Path) -> None:
    source = SAVE[kind](tmp_path / "model")
    _, recipe, tokens = opened(recipe_of(kind, source, prompt={"text": "a photo {image} of a"}))
    model = model_for(recipe, tokens, load_weights=True)
    pixels = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    model(torch.tensor([[[tokens["bos"], 40]]] * 2), pixels=pixels).logsumexp(-1).sum().backward()
    assert model.bridge.project.weight.grad.abs().max() > 0
    words = [i for i in recipe.decoder["prompt"] if i != PHOTO]
    assert (model.decoder.embedding.weight.grad[words].abs().amax(1) > 0).all()
    graphs = model.graphs()
    with torch.no_grad():
        (prefix,) = graphs.encoder(pixels)
        torch.testing.assert_close(prefix, model.photo(pixels=pixels)["prefix"])
    assert prefix.shape[1] == len(words) + model.memory(pixels=pixels).shape[1]


def test_a_decoder_without_a_projection_takes_the_bridge_s_vectors(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model")
    wide = {
        "bridge": {"kind": "linear", "dim": 32},
        "decoder": {"kind": "llama", "source": str(source), "project": False},
    }
    _, recipe, tokens = opened(dataclasses.replace(recipe_of("llama", source), **wide))
    model = model_for(recipe, tokens, load_weights=True)
    memory = torch.randn(1, 4, 32)
    assert model.decoder.photo(memory)["prefix"] is memory
    with pytest.raises(UsageError, match="project = false needs a bridge of dim = 32, the decoder's; it has 16"):
        model_for(dataclasses.replace(recipe, bridge={"kind": "linear", "dim": 16}), tokens, load_weights=False)


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVE)
def test_a_run_begins_with_the_weights_moves_them_and_goes_on_and_rebuilds_without_the_source(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SAVE[kind](tmp_path / "model")
    stage = {"epochs": 3, "batch_size": 12, "lr": 2e-3, "schedule": "constant"}
    recipe = recipe_of(kind, source, stage, prompt={"text": "A photo of"})
    before = model_for(*opened(recipe)[1:], load_weights=True).decoder.embedding.weight.clone()
    begun = []
    monkeypatch.setattr(loop.Trainer, "run", watched(loop.Trainer.run, begun))
    epochs, end = [0], loop.Trainer._save

    def mortal(self: loop.Trainer) -> None:
        end(self)
        epochs[0] += 1
        if epochs[0] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "_save", mortal)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    torch.testing.assert_close(begun[0], before)
    shutil.rmtree(source)
    out, metrics = train(None, tmp_path / "run", resume=True)
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    loaded = load_checkpoint(out)
    after = loaded.model.decoder.embedding.weight
    assert after.shape == before.shape and (after - before).abs().max() > 1e-4
    assert (out / WEIGHTS).stat().st_size < 8e6 and (out / TOKENIZER).is_file()


def watched(run: Any, seen: list[torch.Tensor]) -> Any:
    def wrapped(self: loop.Trainer, begun: bool) -> Any:
        seen.append(self.model.decoder.embedding.weight.detach().clone())
        return run(self, begun)

    return wrapped


def test_self_critical_training_lets_captions_end_where_all_special_tokens_are_one(tmp_path: Path) -> None:
    from edgecap.benchmarks.datasets import open_dataset

    tokenizer, recipe, tokens = opened(recipe_of("gpt2", save_gpt2(tmp_path / "model")))
    assert len({tokens[name] for name in ("bos", "eos", "pad", "unk")}) == 1
    examples = list(open_dataset(FEW).splits["train"])[:2]
    objective = SelfCritical(recipe, Stage(samples=4), tokenizer, examples)
    model = model_for(recipe, tokens, load_weights=True)
    with torch.no_grad():  # the end is all that is likely
        model.decoder.lm.transformer.ln_f.weight.zero_()
        model.decoder.lm.transformer.ln_f.bias.copy_(model.decoder.embedding.weight[tokens["eos"]] * 100)
    ids = encode_captions(examples, tokenizer, max_length=8, captions=2, ids=recipe.tokenizer.ids)
    pixels = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    sampled, words, _ = objective.sample(model, Batch(torch.from_numpy(ids), np.arange(2), pixels=pixels))
    assert (sampled[:, :, 1] == tokens["eos"]).all() and (sampled[:, :, 2:] == -1).all()
    assert words == [["</s>"]] * 8


# --- refusals ------------------------------------------------------------------------------------------------------


def test_wrong_sources_are_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    gpt2 = save_gpt2(tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    post = save_opt(tmp_path / "post", do_layer_norm_before=False)
    narrow = save_opt(tmp_path / "narrow", word_embed_proj_dim=16)
    pickled, lacking = tmp_path / "pickled", tmp_path / "lacking"
    for copy in (pickled, lacking):
        shutil.copytree(gpt2, copy)
    tensors = load_file(gpt2 / "model.safetensors")
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    for kind, source, message in [
        ("gpt2", tmp_path / "nowhere", "decoder .*nowhere: no config.json there"),
        ("gpt2", tmp_path / "empty", "decoder .*empty: no config.json there"),
        ("opt", gpt2, "decoder .*gpt2 is a gpt2 model; decoder.kind needs a opt model"),
        ("opt", post, "normalises behind its layers"),
        ("opt", narrow, "word_embed_proj_dim = 16 is not its hidden size of 32"),
        ("gpt2", pickled, "decoder .*pickled cannot be loaded: .*safetensors"),
        ("gpt2", lacking, "decoder .*lacking lacks 1 of the decoder's weights, transformer.h.1.mlp.c_fc.weight"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            _, recipe, tokens = opened(recipe_of(kind, source))
            model_for(recipe, tokens, load_weights=True)
        assert "\n" not in caught.value.message, caught.value.message
    _, recipe, tokens = opened(recipe_of("gpt2", gpt2))
    with pytest.raises(UsageError, match="knows 361 tokens and the tokenizer has 400: take the tokenizer"):
        model_for(recipe, {**tokens, "vocab_size": 400}, load_weights=True)


def test_wrong_settings_and_tokenizers_are_one_line(tmp_path: Path) -> None:
    llama, gpt2 = save_llama(tmp_path / "llama"), save_gpt2(tmp_path / "gpt2")
    broken = tmp_path / "broken"
    shutil.copytree(gpt2, broken)
    (broken / "tokenizer.json").write_text('{"version": "1.0"')
    gru = {"decoder": {"kind": "gru"}, "tokenizer": {"kind": "word", "min_count": 1}}
    for recipe, message in [
        (recipe_from_dict({**gru, "prompt": {"text": "a"}}), "a gru decoder reads no prompt"),
        (recipe_from_dict({**gru, "tokenizer": {"kind": "pretrained"}}), "kind = pretrained needs a source"),
        (recipe_of("gpt2", gpt2, prompt={"chat": "say"}), "tokenizer of .*gpt2 has no chat template"),
        (recipe_of("gpt2", broken), "tokenizer .*broken cannot be loaded"),
        (recipe_of("gpt2", gpt2, tokenizer={"kind": "pretrained", "source": "./no"}), "tokenizer ./no: no tokenizer"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            opened(recipe)
        assert "\n" not in caught.value.message
    assert llama
    parts = {"encoder": ENCODER, "bridge": {"kind": "linear", "dim": 16}}
    for decoder, message in [
        ({"kind": "gpt2", "config": {"wings": 2}}, "recipe .decoder. config: GPT2Config has no wings"),
        ({"kind": "opt", "head_dim": 8}, "this kind of decoder has no head_dim"),
        ({"kind": "opt", "config": {"do_layer_norm_before": False}}, "normalises behind"),
        ({"kind": "llama", "prompt": [3, 4]}, "no place for the photo"),
        ({"kind": "llama", "prompt": [3, -1, 99]}, "outside the vocabulary of 40"),
    ]:
        with pytest.raises(UsageError, match=message):
            build_model(**parts, decoder=decoder, vocab_size=40, bos_id=1, size=(SIZE, SIZE))
    three = {"kind": "llama", "dim": 32, "heads": 4, "layers": 1, "prompt": [PHOTO, 4, PHOTO, 5, PHOTO]}
    model = build_model(**parts, decoder=three, vocab_size=40, bos_id=1, size=(SIZE, SIZE))
    with pytest.raises(UsageError, match="places for 3 photo embeddings; the bridge gives 4"):
        model.photo(pixels=torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8))

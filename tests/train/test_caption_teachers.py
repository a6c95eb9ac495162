"""Teachers of captions: what they say is what their own code says, through their own photos and words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgecap.benchmarks.datasets import Example, open_dataset
from edgecap.runtime import Captioner
from edgecap.runtime.decode import never_said
from edgecap.runtime.errors import UsageError
from edgecap.runtime.tokenizer import Tokenizer
from edgecap.train.checkpoint import Checkpoint, preprocess_for
from edgecap.train.data.cache import load_pixels
from edgecap.train.settings import Decoding
from edgecap.train.teachers import captioners
from edgecap.train.teachers.base import Lazy
from edgecap.train.teachers.captioners import CHAT, HUB, check_captions, of_checkpoint, open_caption_teacher
from edgecap.train.tokenizer import caption_text, token_ids, train_tokenizer
from edgecap.train.validate import caption_rows

from ..runtime.graphs import write_gru_bundle
from .captioners import let_end, pixels, save_captioner
from .tiny import tiny_model, tiny_recipe
from .vlms import NATIVE, SPECIAL, expected, load_vlm, pictures, save_vlm


def photos(folder: Path, drawn: np.ndarray) -> list[Example]:
    folder.mkdir()
    for i, photo in enumerate(drawn):
        Image.fromarray(photo).save(folder / f"{i}.png")
    return [Example(str(i), ("a photo",), folder / f"{i}.png") for i in range(len(drawn))]


@pytest.mark.parametrize("kind", HUB)
def test_a_captioner_of_transformers_says_what_it_says_there(tmp_path: Path, kind: str) -> None:
    folder = save_captioner(tmp_path / kind, kind)
    teacher = open_caption_teacher(folder)
    examples = photos(tmp_path / "photos", pictures(4, 60))
    said = {beam: teacher.captions(examples, beam) for beam in (1, 3)}
    model, tokenizer, shown = teacher.model.get(), teacher.tokenizer, pixels(folder)
    assert teacher.parameters == sum(p.numel() for p in model.parameters())

    assert all(len(said[3][i]) <= 3 for i in range(4)) and 0 < sum(map(len, said[3])) <= 12
    assert len({text for captions in said[3] for text, _ in captions}) > 1, "or photos do not count"
    with torch.no_grad():
        plain = model.generate(pixel_values=shown, max_new_tokens=captioners.MAX_TOKENS, do_sample=False)
    whole = [row[1:][: row[1:].tolist().index(2)] if 2 in row[1:] else None for row in plain]
    texts = [[] if row is None else [tokenizer.decode(row, skip_special_tokens=True)] for row in whole]
    assert [[text for text, _ in captions] for captions in said[1]] == texts

    # Log-probabilities: of the whole caption given at once, its end included.
    start = int(plain[0, 0])
    for photo, captions in zip(shown, said[3], strict=True):
        for text, logprob in captions:
            words = [start, *tokenizer.convert_tokens_to_ids(text.split()), 2]
            assert logprob == pytest.approx(given(model, photo[None], torch.tensor([words])), abs=1e-3)


def given(model: Any, photo: torch.Tensor, ids: torch.Tensor) -> float:
    """Log-probability of ids behind the first one."""
    with torch.no_grad():
        if hasattr(model, "vision_model"):  # BLIP's own forward takes labels for granted
            seen = model.vision_model(photo)[0]
            logits = model.text_decoder(input_ids=ids, encoder_hidden_states=seen).logits
        elif hasattr(model, "decoder"):
            logits = model(pixel_values=photo, decoder_input_ids=ids).logits
        else:
            logits = model(pixel_values=photo, input_ids=ids).logits[:, -ids.shape[1] :]
    return float(logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum())


def test_smolvlm_says_what_it_says_in_transformers(tmp_path: Path) -> None:
    folder = save_vlm(tmp_path / "vlm", seed=1)
    drawn = pictures(3, NATIVE)
    fed, theirs = expected(folder, drawn, 0, CHAT), load_vlm(folder)
    eos = SPECIAL.index("<end_of_utterance>")
    let_end(theirs, eos, **fed)
    theirs.save_pretrained(folder)
    teacher = open_caption_teacher(folder)
    assert teacher.preprocess.size == (NATIVE, NATIVE)
    said = teacher.captions(photos(tmp_path / "photos", drawn), 1)
    assert any(said)
    with torch.no_grad():
        plain = theirs.generate(
            **fed, max_new_tokens=captioners.MAX_TOKENS, do_sample=False, eos_token_id=eos,
            suppress_tokens=list(never_said(teacher.tokens)),
        )[:, fed["input_ids"].shape[1] :]  # fmt: skip
    for captions, row in zip(said, plain.tolist(), strict=True):
        texts = [teacher.tokenizer.decode(row[: row.index(eos)])] if eos in row else []
        assert [text for text, _ in captions] == texts
    again = open_caption_teacher(folder)
    assert again.sha256 == teacher.sha256 and again.settings == teacher.settings


def test_a_checkpoint_says_what_it_says_elsewhere() -> None:
    examples = list(open_dataset("scenes:train=20,val=2,test=2,size=64").splits["train"])
    recipe = dataclasses.replace(tiny_recipe(), decoding=Decoding(max_length=12, min_length=2))
    tokenizer = train_tokenizer([caption_text(c) for e in examples for c in e.captions], recipe.tokenizer)
    tokens, preprocess = token_ids(tokenizer), preprocess_for(recipe)
    model = tiny_model("gru", vocab_size=tokens["vocab_size"])
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(0.33)  # so that any word may be the last
    loaded = Checkpoint(Path("run"), recipe, Tokenizer(tokenizer), tokens, preprocess, {}, "sha", model)
    teacher = of_checkpoint(loaded, Lazy(lambda: model))
    options = dataclasses.replace(teacher.decoding, beam=3)
    rows = load_pixels(examples, preprocess)
    plain = caption_rows(model, tokenizer, rows, len(rows), options)
    said = teacher.captions(examples, 3)
    assert sum(map(len, said)) == 60 and len({text for captions in said for text, _ in captions}) == 3
    for captions, best in zip(said, plain, strict=True):
        assert captions[0][0] == best
        logprobs = [logprob for _, logprob in captions]
        assert logprobs == sorted(logprobs, reverse=True) and len(best.split()) >= 2


def test_a_bundle_says_what_the_runtime_says(tmp_path: Path) -> None:
    bundle = write_gru_bundle(tmp_path / "tiny.edgecap", seed=11)
    examples = photos(tmp_path / "photos", pictures(4, 60))
    teacher = open_caption_teacher(bundle.path)
    assert (teacher.sha256, teacher.parameters) == (bundle.sha256, None)
    with Captioner.load(bundle.path) as captioner:
        found = captioner([example.path for example in examples], beam=3)
    limit = bundle.manifest["decoding"]["max_length"]
    plain = [[c for c in (best, *best.alternatives) if len(c.token_ids) < limit] for best in found]
    assert any(plain)
    said = teacher.captions(examples, 3)
    assert [[text for text, _ in captions] for captions in said] == [[c.text for c in captions] for captions in plain]


def test_what_cannot_speak_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "empty").mkdir()
    for source, match in (
        (tmp_path, "is a bert model; known captioners: blip, git, vision-encoder-decoder, smolvlm, idefics3, and"),
        (tmp_path / "empty", "no config.json there"),
    ):
        with pytest.raises(UsageError, match=match) as caught:
            open_caption_teacher(source)
        assert "\n" not in caught.value.message
    for kind in ("config.json", "preprocessor_config.json"):
        folder = save_captioner(tmp_path / f"no {kind}", "git")
        (folder / kind).write_text(json.dumps({"model_type": "git", "vision_config": 3, "image_processor_type": "X"}))
        with pytest.raises(UsageError, match="cannot be loaded"):
            open_caption_teacher(folder)
    # One that is found out only when it is asked: it sees photos of another size than its processor shows.
    folder = save_captioner(tmp_path / "size", "git")
    look = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**look, "size": {"height": 40, "width": 40}}))
    (example,) = photos(tmp_path / "photos", pictures(1, 60))
    with pytest.raises(UsageError, match="teacher .*size cannot caption a photo: ") as caught:
        check_captions(open_caption_teacher(folder), example, 2)
    assert "\n" not in caught.value.message

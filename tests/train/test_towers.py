"""Two towers learn to find photos and captions by each other, with both encoders untouched; the query bridge."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from edgecap.benchmarks.datasets import open_dataset
from edgecap.runtime.errors import UsageError
from edgecap.train.checkpoint import load_checkpoint
from edgecap.train.data.batches import Batch
from edgecap.train.evaluate import evaluate, score_lines
from edgecap.train.models.query import QueryBridge
from edgecap.train.models.towers import Head, build_towers
from edgecap.train.objectives.infonce import InfoNCE, contrast
from edgecap.train.optim import make_optimizer
from edgecap.train.recipe import load_recipe, recipe_from_dict
from edgecap.train.run import train
from edgecap.train.settings import Recipe, Stage
from edgecap.train.state import WEIGHTS, model_tensors, read_tensors
from edgecap.train.tokenizer import caption_text

from .tiny import ENCODER, SCENES, SIGLIP, SIZE, tiny_recipe, with_kills

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
STAGE = {"name": "align", "objective": "infonce", "epochs": 3, "batch_size": 8, "lr": 3e-3, "label_smoothing": 0.0}
CONFIG = {"model_type": "bert", "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 48, "max_position_embeddings": 40}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small encoders on disk: a MobileNetV2, and two of texts, each with a WordPiece tokenizer as BERT has it."""
    from transformers import (
        BertConfig,
        BertModel,
        DistilBertConfig,
        DistilBertModel,
        MobileNetV2Config,
        MobileNetV2Model,
        PreTrainedTokenizerFast,
    )

    captions = [caption for example in open_dataset(SCENES).splits["train"] for caption in example.captions]
    words = Counter(word for caption in captions for word in re.findall(r"\w+", caption.lower()))
    letters = sorted({letter for word in words for letter in word})
    # Not trained: that tells ties apart by chance, and what is learnt below would be another thing in every process.
    pieces = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters), *sorted(words, key=lambda w: (-words[w], w))]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces[:90]))}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.enable_padding(length=30)  # as sentence encoders have it: it must not be read as words
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    torch.manual_seed(3)
    sizes = {"vocab_size": inner.get_vocab_size(), "max_position_embeddings": 40}
    small = {"n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 48}
    bert = {key: value for key, value in CONFIG.items() if key != "model_type"} | sizes
    folders = {}
    for name, body in (
        ("distilbert", DistilBertModel(DistilBertConfig(**sizes, **small))),
        ("bert", BertModel(BertConfig(**bert))),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        with torch.no_grad():
            for parameter in body.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)  # random states of the usual size differ too little from text to text
        body.config.gradient_checkpointing = False  # older files hold settings that are gone
        body.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    body = MobileNetV2Model(MobileNetV2Config(**ENCODER["config"]), add_pooling_layer=False).train()
    pixels = np.stack([np.asarray(example.load()) for example in open_dataset(SCENES).splits["train"]])
    with torch.no_grad():
        for parameter in body.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20.0)  # or variances drown in BatchNorm's ε, and all photos look alike
        body(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)  # sets BatchNorm's statistics
    folders["encoder"] = tmp_path_factory.mktemp("encoder")
    body.save_pretrained(folders["encoder"])
    return folders


def recipe_of(source: Path | str, *stages: dict[str, Any], **text: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "towers",
            "task": "retrieval",
            "data": {"spec": SCENES, "image_size": SIZE, "captions_per_photo": 1, "flip": True},
            "encoder": ENCODER,
            "bridge": {"kind": "query", "dim": 32, "queries": 4, "layers": 1, "heads": 2, "ffn": 48, "dropout": 0.05},
            "text": {"source": str(source), "max_length": 16, "dim": 24, "dropout": 0.1, **text},
            "stages": list(stages) or [STAGE],
        }
    )


# --- the query bridge ----------------------------------------------------------------------------------------------


def test_queries_read_as_torchs_attention_does() -> None:
    """One layer against nn.MultiheadAttention with the same weights."""
    torch.manual_seed(0)
    bridge = QueryBridge(20, dim=16, queries=3, layers=1, heads=4, ffn=24).eval()
    layer, features = bridge.layers[0], torch.randn(2, 7, 20)

    def theirs(own: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
        parts = (own.query, own.key, own.value)
        with torch.no_grad():
            whole.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            whole.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            whole.out_proj.weight.copy_(own.out.weight)
            whole.out_proj.bias.copy_(own.out.bias)
        return whole(x, y, y, need_weights=False)[0]

    with torch.no_grad():
        seen = bridge.norm(bridge.project(features))
        x = bridge.queries.expand(2, -1, -1)
        y = layer.norms[0](x)
        x = x + theirs(layer.self_attention, y, y)
        x = x + theirs(layer.cross_attention, layer.norms[1](x), seen)
        x = x + layer.down(F.gelu(layer.up(layer.norms[2](x))))
        torch.testing.assert_close(bridge(features), bridge.out_norm(x), atol=1e-5, rtol=1e-4)
        assert bridge(torch.randn(2, 50, 20)).shape == (2, 3, 16)
        order = torch.randperm(7)
        torch.testing.assert_close(bridge(features[:, order]), bridge(features), atol=1e-5, rtol=1e-4)


# --- the loss ------------------------------------------------------------------------------------------------------


def test_infonce_is_cross_entropy_to_the_own_caption() -> None:
    logits, distinct = torch.randn(6, 6), torch.eye(6, dtype=torch.bool)
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, torch.arange(6), reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(contrast(logits, distinct, smoothing), expected)


def test_a_caption_that_two_photos_share_is_no_negative() -> None:
    logits = torch.randn(4, 4, requires_grad=True)
    which = torch.tensor([0, 1, 0, 2])
    contrast(logits, which[:, None] == which[None, :], 0.1).backward()
    assert logits.grad[0, 2] == logits.grad[2, 0] == 0
    assert (logits.grad[torch.tensor([0, 0, 1]), torch.tensor([1, 3, 2])] != 0).all()
    # Row 0 is what is left of it without the third caption.
    left = F.cross_entropy(logits[:1, [0, 1, 3]], torch.tensor([0]), reduction="sum")
    torch.testing.assert_close(contrast(logits, which[:, None] == which[None, :], 0.0), left + sum(
        F.cross_entropy(logits[row : row + 1, columns], torch.tensor([own]), reduction="sum")
        for row, columns, own in ((1, [0, 1, 2, 3], 1), (2, [1, 2, 3], 1), (3, [0, 1, 2, 3], 3))
    ))  # fmt: skip


# --- runs ----------------------------------------------------------------------------------------------------------


def test_learns_with_both_encoders_untouched_and_resumes_bit_by_bit(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = {**STAGE, "name": "pieces", "accumulate": 2, "epochs": 1, "lr": 1e-3, "ema": 0.9}
    source = tmp_path / "source"
    shutil.copytree(sources["distilbert"], source)
    first_stage = {**STAGE, "epochs": 30, "batch_size": 12, "lr": 5e-3, "validate_every": 10}
    recipe = recipe_of(source, first_stage, pieces, pool="mean", dropout=0.0)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, spec=f"scenes:train=12,val=16,test=16,size={SIZE}", flip=False),
        encoder=dataclasses.replace(recipe.encoder, source=str(sources["encoder"]), config={}),
    )
    first, metrics = train(recipe, tmp_path / "first")
    history = metrics["history"]
    assert metrics["finished"] and metrics["metric"] == "recall" and metrics["kind"] == "retrieval"
    assert history[2]["loss"] < 0.75 * math.log(12)  # which is chance's; it comes to half of that
    assert set(metrics["parameters"]) == {"encoder", "bridge", "text", "head"}
    assert (first / "chart.png").is_file()

    # What is frozen came through unchanged, down to the last bit.
    stored, _ = read_tensors(first / WEIGHTS)
    theirs, _ = read_tensors(source / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.equal(stored[f"text.body.{name}"], tensor), name
    seen, _ = read_tensors(sources["encoder"] / "model.safetensors")
    assert seen.keys() == {name.removeprefix("encoder.body.") for name in stored if name.startswith("encoder.")}
    for name, tensor in seen.items():
        assert torch.equal(stored[f"encoder.body.{name}"], tensor), name

    out = tmp_path / "killed"
    lives = with_kills(monkeypatch, lambda begun: train(None if begun else recipe, out, resume=begun), repeat(13))
    assert lives == 3  # of 32 steps
    assert (out / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()

    # The checkpoint needs neither source, and scores as the validation said.
    shutil.rmtree(source)
    record = evaluate(first, spec=None, split="val", limit=None, decoding={})
    assert record["scores"]["mean_recall"] == pytest.approx(metrics["best"]["recall"], abs=0.05)  # float16 features
    lines = score_lines(record)
    assert "image → text" in lines[1] and "by chance" in lines[2] and "text → image" in lines[3]
    assert json.dumps(record)
    with pytest.raises(UsageError, match="says no captions: leave out --beam"):
        evaluate(first, spec=None, split="val", limit=None, decoding={"beam": 2})
    chance = record["scores"]["text_to_image"]["recall_1"]["chance"]
    assert chance == 1 / 16

    # Two captions said of two photos are the vectors that training saw.
    model = load_checkpoint(first).model
    with torch.no_grad():
        vectors = model.text_features(["a red circle", "two dogs on a blue square"])
        torch.testing.assert_close(
            model.project_texts(vectors), model.embed_texts(["a red circle", "two dogs on a blue square"])
        )


def test_the_optimizer_sees_bridge_and_head_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    out, _ = train(recipe_of(sources["bert"], {**STAGE, "epochs": 1}, pool="mean"), tmp_path / "run")
    loaded = load_checkpoint(out)
    optimizer = make_optimizer(loaded.model, loaded.recipe.stages[0])
    seen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name.split(".")[0] for name, p in loaded.model.named_parameters() if id(p) in seen}
    assert names == {"bridge", "head"}
    assert seen == {id(p) for part in (loaded.model.bridge, loaded.model.head) for p in part.parameters()}
    loaded.model.train()
    assert not loaded.model.text.body.training and not loaded.model.encoder.training and loaded.model.bridge.training


# --- what a critic asks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, pool", [("distilbert", "cls"), ("bert", "mean")])
def test_texts_are_read_as_transformers_reads_them(
    sources: dict[str, Path], tmp_path: Path, name: str, pool: str
) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = towers_of(recipe_of(sources[name], pool=pool), tmp_path)
    texts = ["a red circle", "a small blue square left of two green triangles", "zebra"]
    tokens = AutoTokenizer.from_pretrained(sources[name])(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=16
    )
    states = AutoModel.from_pretrained(sources[name]).eval()(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
    ).last_hidden_state  # fmt: skip
    mask = tokens["attention_mask"].unsqueeze(2)
    expected = states[:, 0] if pool == "cls" else (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(model.text_features(texts), expected.detach(), atol=1e-5, rtol=1e-4)
    embedded = model.embed_texts(texts)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    long = model.encode(["circle " * 50])[0]
    assert long.shape == (1, 16) and long[0, 0] == 2 and long[0, -1] == 3


def test_soft_words_read_as_words_and_pass_gradients(sources: dict[str, Path], tmp_path: Path) -> None:
    model = towers_of(recipe_of(sources["distilbert"]), tmp_path)
    texts = ["a red circle", "a small blue square left of two green triangles"]
    ids, mask = model.encode(texts)
    soft = F.one_hot(ids, model.text.embedding.num_embeddings).float() @ model.text.embedding.weight
    soft = soft.detach().requires_grad_()
    embedded = model.embed_soft(soft, mask)
    torch.testing.assert_close(embedded, model.embed_texts(texts), atol=1e-5, rtol=1e-4)
    pixels = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    (embedded * model.embed_photos(pixels=pixels).detach()).sum().backward()
    moved = soft.grad.abs().sum(2) > 0
    assert moved[mask].all() and not moved[~mask].any()
    assert all(p.grad is None for p in model.text.parameters())


def test_the_temperature_stays_below_a_hundred_and_comes_back() -> None:
    head = Head(4, 4, 4)
    assert float(head.scale.detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        head.log_scale.fill_(9.0)

    def forward(vectors: torch.Tensor, **view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(3)[[1, 0, 2]], torch.eye(3)  # two photos are taken for each other's

    objective = InfoNCE(tiny_recipe(), Stage(label_smoothing=0.0), None, [])
    batch = Batch(torch.eye(3)[:, None], np.arange(3), features=torch.zeros(3, 1, 4))
    loss, _ = objective.loss(SimpleNamespace(head=head), forward, batch)
    loss.backward()
    assert float(head.scale.detach()) == pytest.approx(100) and float(head.log_scale.grad) > 0


def test_without_a_source_words_are_learnt_from_the_captions(tmp_path: Path) -> None:
    recipe = recipe_of("", {**STAGE, "epochs": 1}, config=CONFIG, hidden=16)
    recipe = dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, min_count=1))
    out, _ = train(recipe, tmp_path / "run")
    model = load_checkpoint(out).model
    ids, _ = model.encode([caption_text("A red circle.")])
    assert ids[0, 0] == model.tokens["bos"] and ids[0, -1] == model.tokens["eos"] and len(set(ids[0].tolist())) > 3


@pytest.mark.parametrize("side, tile, cells", [(2 * SIZE, SIZE, 5 * 16), (SIZE // 2, 0, 4)])
def test_photos_are_tiled_or_smaller_as_for_captioners(side: int, tile: int, cells: int) -> None:
    tree = recipe_of("", config=CONFIG).to_dict() | {"encoder": {**SIGLIP, "tile": tile}}
    tree["data"]["image_size"] = side
    model = build_towers(
        recipe_from_dict(tree), {"bos": 2, "eos": 3, "pad": 0, "unk": 1, "vocab_size": 600}, load_weights=True
    )
    with torch.no_grad():
        assert model.encoder(torch.zeros(1, side, side, 3, dtype=torch.uint8)).shape == (1, cells, 64)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": [{**STAGE, "encoder_lr": 1e-4}]}, "both encoders of a retrieval model are frozen"),
        ({"stages": [{"name": "words"}]}, "objective = xe is not for task = retrieval"),
        ({"data": {"spec": SCENES, "image_size": SIZE}}, "captions_per_photo = 1"),
        ({"text": {"source": "", "config": {}}}, "no source and no config.model_type"),
        ({"text": {"source": "", "config": {**CONFIG, "depth": 3}}}, "has no depth"),
        ({"text": {"source": "", "config": {**CONFIG, "vocab_size": 5}}}, "knows 5 tokens"),
        ({"text": {"source": "", "config": CONFIG, "max_length": 41}}, "reads 3 to 40"),
        ({"text": {"source": "./nowhere"}}, "no config.json there"),
        ({"bridge": {"kind": "query", "dim": 30, "heads": 4}}, "heads .4. must divide dim .30."),
    ],
)
def test_recipes_that_cannot_be_are_one_line(
    tmp_path: Path, sources: dict[str, Path], change: dict[str, Any], message: str
) -> None:
    tree = {**recipe_of(sources["bert"]).to_dict(), **change}
    with pytest.raises(UsageError, match=message) as caught:
        train(recipe_from_dict(tree), tmp_path / "run")
    assert "\n" not in caught.value.message and not (tmp_path / "run").exists()


def test_the_published_recipe_says_what_the_issue_says() -> None:
    recipe = load_recipe("query-bridge")
    stage = recipe.stages[0]
    assert (recipe.task, recipe.encoder.kind, recipe.text.config["model_type"]) == ("retrieval", "dino", "distilbert")
    assert (recipe.text.pool, recipe.text.dim, stage.batch_size, stage.accumulate) == ("cls", 512, 64, 8)
    assert recipe.mixed_precision == "auto" and stage.objective == "infonce" and stage.encoder_lr == 0


def towers_of(recipe: Recipe, folder: Path) -> Any:
    """The untrained towers of a recipe, as a run begins with them."""
    from edgecap.train.checkpoint import model_for
    from edgecap.train.tokenizer import token_ids
    from edgecap.train.towers import open_texts

    torch.manual_seed(0)
    tokenizer, recipe = open_texts(recipe, [])
    model = model_for(recipe, token_ids(tokenizer, recipe.tokenizer.ids), load_weights=True)
    assert not any(p.requires_grad for name in model.frozen_parts for p in model.parts()[name].parameters())
    assert set(model_tensors(model)) > {"head.log_scale"}
    return model.read_with(tokenizer)

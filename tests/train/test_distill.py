"""Distillation word by word: the loss against plain PyTorch, several teachers, what is kept on disk, the refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgecap.benchmarks.datasets import open_dataset
from edgecap.export.prune_vocab import shrink_vocab
from edgecap.runtime.errors import UsageError
from edgecap.runtime.tokenizer import Tokenizer
from edgecap.train.checkpoint import WEIGHTS, Checkpoint, load_checkpoint, preprocess_for, read_metrics
from edgecap.train.data import cache
from edgecap.train.data.batches import Batch, Photos, encode_captions
from edgecap.train.data.cache import load_pixels
from edgecap.train.objectives import OBJECTIVES
from edgecap.train.objectives.distill import divergence
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.settings import Stage, TokenizerSettings
from edgecap.train.start import START, Helpers, Start, read_start
from edgecap.train.teachers import words
from edgecap.train.teachers.base import Lazy
from edgecap.train.teachers.words import TeacherTopK, WordTeacher
from edgecap.train.tokenizer import caption_text, token_ids, train_tokenizer

from .tiny import ENCODER, SIZE, Killed, tiny_model, tiny_recipe, with_kills

ONE = {"epochs": 1, "batch_size": 16, "lr": 1e-3}
DISTILL = {**ONE, "objective": "distill", "epochs": 2, "temperature": 2.0, "top_k": 6}
FEW = "scenes:train=32,val=4,test=4,size=64"
CPU = torch.device("cpu")
WORDS = TokenizerSettings(min_count=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def quiet(phase: str, done: int, total: int) -> None:
    pass


def as_checkpoint(model: torch.nn.Module, tokenizer: Any, *, size: int = SIZE, name: str = "teacher") -> Checkpoint:
    recipe = tiny_recipe(image_size=size)
    return Checkpoint(
        Path(name), recipe, Tokenizer(tokenizer), token_ids(tokenizer), preprocess_for(recipe), {}, name, model
    )


def word_teacher(model: torch.nn.Module, theirs: Any, ours: Any, **options: Any) -> WordTeacher:
    loaded = as_checkpoint(model, theirs, **options)
    return WordTeacher(loaded, Lazy(lambda: loaded.model), ours)


def tiny_teacher(theirs: Any, ours: Any) -> WordTeacher:
    return word_teacher(tiny_model("gru", vocab_size=theirs.get_vocab_size()), theirs, ours)


def awake(model: torch.nn.Module, pixels: torch.Tensor) -> torch.nn.Module:
    """The model with statistics of these photos in its normalizations: without any, it sees next to nothing."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.encoder.train()(pixels)
    return model.eval()


def reference(teacher: WordTeacher, examples: list[Any], ids: torch.Tensor, *, flip: bool = False) -> torch.Tensor:
    """The teacher's logits [K, V] for our words, uncached and whole."""
    pixels = torch.from_numpy(load_pixels(examples, teacher.preprocess, flip=flip))
    where = torch.from_numpy(teacher.ids)
    with torch.no_grad():
        logits = teacher.model.get(CPU)(where[ids[:, :, :-1].clamp(min=0)], pixels=pixels)[ids[:, :, 1:] >= 0]
    return logits[:, where]


def test_distillation_is_its_formula_over_our_words() -> None:
    """With all words kept, against plain PyTorch: a teacher of more words in another order and one that sees photos in
    another size and through another encoder, and what the first one's encoder sees."""
    data = open_dataset("scenes:train=6,val=2,test=2,size=64")
    examples = list(data.splits["train"])
    captions = [caption_text(c) for e in examples for c in e.captions]
    theirs, ours = (train_tokenizer(captions, dataclasses.replace(WORDS, min_count=count)) for count in (1, 6))
    large, small = theirs.get_vocab_size(), ours.get_vocab_size()
    assert small < large
    recipe = tiny_recipe()
    pixels = torch.from_numpy(load_pixels(examples, preprocess_for(recipe)))
    first = awake(tiny_model("llama", vocab_size=large, seed=1), pixels)
    first = word_teacher(first, theirs, ours)
    assert [theirs.id_to_token(i) for i in first.ids.tolist()] == [ours.id_to_token(i) for i in range(small)]
    second = awake(tiny_model("gru", vocab_size=small, seed=2), pixels)
    second = word_teacher(second, ours, ours, size=96, name="second")

    photos = Photos(data, "train", recipe, preprocess_for(recipe))
    plain, mirrored = (encode_captions(examples, ours, max_length=8, captions=3, mirrored=m) for m in (False, True))
    ids = torch.from_numpy(np.stack([plain[0, :2], plain[1, [2, 0]], plain[2, :2], mirrored[3, 1:], plain[5, :2]]))
    places, flipped = np.array([0, 1, 2, 3, 5]), np.array([False, False, False, True, False])
    seen = pixels[places]
    seen[3] = seen[3].flip(1)
    model = awake(tiny_model("gru", vocab_size=small), pixels)
    stage = Stage(objective="distill", teacher_share=0.6, temperature=3.0, match=0.5, label_smoothing=0.1)
    keep = ids[:, :, 1:] >= 0
    with torch.no_grad():
        features, own = first.model.get(CPU).encoder(seen), model.encoder(seen)

    def loss_by(*teachers: WordTeacher, top_k: int) -> tuple[torch.Tensor, dict[str, float]]:
        rows = [
            [
                each.rows(photos, words, mirrored=bool(flip), temperature=3.0, top_k=top_k, device=CPU, progress=quiet)
                for flip, words in enumerate((plain, mirrored))
            ]
            for each in teachers
        ]
        said = TeacherTopK((plain, mirrored), rows).of(ids.numpy(), places, flipped)
        assert said["teacher_ids"].shape == (len(teachers), int(keep.sum()), min(top_k, small))
        objective = OBJECTIVES["distill"](recipe, stage, ours, examples, Helpers(teachers))
        assert objective.count(ids) == int(keep.sum())
        return objective.loss(model, model, Batch(ids, places, features=own, teacher=features, **said))

    def wanted(teacher: WordTeacher) -> torch.Tensor:
        shown = [
            reference(teacher, [examples[place]], ids[i : i + 1], flip=bool(flipped[i]))
            for i, place in enumerate(places)
        ]
        return F.softmax(torch.cat(shown) / 3, -1)

    logits = model(ids[:, :, :-1].clamp(min=0), features=own)[keep]
    captions_loss = F.cross_entropy(logits, ids[:, :, 1:][keep], label_smoothing=0.1)
    q = F.log_softmax(logits / 3, -1)
    memory = first.model.get(CPU).memory(features=features)
    far = F.mse_loss(model.memory(features=own), memory) / memory.var()

    one, two = wanted(first), wanted(second)
    apart = (one * (one.log() - q)).sum(-1).mean() * 9
    loss, figures = loss_by(first, top_k=small)
    torch.testing.assert_close(loss / keep.sum(), 0.4 * captions_loss + 0.6 * apart + 0.5 * far, rtol=1e-3, atol=1e-3)
    assert figures["divergence"] == pytest.approx(float(apart.detach()), rel=1e-3, abs=1e-3)
    assert figures["distance"] == pytest.approx(float(far.detach()), rel=1e-3)

    # Two teach what the mean of their probabilities teaches: up to what does not depend on the captioner.
    mean = (one + two) / 2
    apart = (mean * (mean.log() - q)).sum(-1).mean() * 9
    spread = sum((p * (p.log() - mean.log())).sum(-1).mean() * 9 / 2 for p in (one, two))
    loss, _ = loss_by(first, second, top_k=10_000)
    expected = 0.4 * captions_loss + 0.6 * (apart + spread) + 0.5 * far
    torch.testing.assert_close(loss / keep.sum(), expected, rtol=1e-3, atol=1e-3)
    weights = model.decoder.start.weight, model.bridge.project.weight
    for ours_, theirs_ in zip(
        torch.autograd.grad(loss / keep.sum(), weights), torch.autograd.grad(expected, weights), strict=True
    ):
        assert theirs_.norm() > 0 and (ours_ - theirs_).norm() < 2e-3 * theirs_.norm()
    assert all(not parameter.requires_grad for parameter in first.model.get(CPU).parameters())


def test_words_that_are_not_kept_count_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = ((2 * torch.randn(7, 30, generator=generator)).softmax(-1) for _ in range(2))
    likely, ids = p.topk(4)
    total = 0.0
    for row in range(7):
        rest = [i for i in range(30) if i not in ids[row].tolist()]
        theirs = torch.cat((likely[row], p[row, rest].sum(0, keepdim=True)))
        ours = torch.cat((q[row, ids[row]], q[row, rest].sum(0, keepdim=True)))
        total += float((theirs * (theirs / ours).log()).sum())
    assert float(divergence(q.log(), ids[None], likely.log()[None])) == pytest.approx(total, rel=1e-5)
    both = torch.stack((ids, ids)), torch.stack((likely, likely)).log()
    assert float(divergence(q.log(), *both)) == pytest.approx(total, rel=1e-5)
    # It is least where the captioner gives the kept words what the teacher does.
    assert float(divergence(p.log(), ids[None], likely.log()[None])) == pytest.approx(0.0, abs=1e-5)


def test_words_that_a_teacher_does_not_know_get_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = list(open_dataset("scenes:train=6,val=2,test=2,size=64").splits["train"])
    captions = [caption_text(c) for e in examples for c in e.captions]
    theirs, ours = (train_tokenizer(more, WORDS) for more in (captions, [*captions, "zebra"]))
    teacher = tiny_teacher(theirs, ours)
    assert teacher.missing == ["zebra"] and f"does not know 1 of {len(teacher.ids)} words" in teacher.line()
    teacher.check(examples, 8)
    ids = encode_captions(examples[:2], ours, max_length=8, captions=2)
    ids[0, 0, 2] = zebra = ours.token_to_id("zebra")
    data = dataclasses.replace(open_dataset("scenes:train=2,val=2,test=2,size=64"), splits={"train": examples[:2]})
    photos = Photos(data, "train", tiny_recipe(), teacher.preprocess)
    rows = teacher.rows(photos, ids, mirrored=False, temperature=1.0, top_k=999, device=CPU, progress=quiet)
    keep = ids[:, :, 1:] >= 0
    assert (rows["logp"][keep][rows["id"][keep] == zebra] == -np.inf).all()
    np.testing.assert_allclose(np.exp(rows["logp"][keep].astype(np.float64)).sum(-1), 1, atol=5e-3)
    said = TeacherTopK([ids], [[rows]]).of(ids, np.arange(2), np.zeros(2, bool))
    soft = torch.randn(int(keep.sum()), len(teacher.ids)).log_softmax(-1)
    assert torch.isfinite(divergence(soft, *said.values()))
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(words, "MOST", 1)  # photo by photo it is the same
    one = teacher.rows(photos, ids, mirrored=False, temperature=1.0, top_k=999, device=CPU, progress=quiet)
    assert (one["id"][keep] == rows["id"][keep]).mean() > 0.99
    np.testing.assert_allclose(one["logp"][keep], rows["logp"][keep], atol=1e-3)

    other = train_tokenizer(captions[:2], WORDS)
    stranger = tiny_teacher(other, ours)
    with pytest.raises(UsageError, match=r"does not know '.*' and \d+ more .*% of what the captions say") as caught:
        stranger.check(examples, 8)
    assert "\n" not in caught.value.message


def test_another_way_to_cut_text_is_refused() -> None:
    captions = [
        caption_text(c) for e in open_dataset("scenes:train=6,val=2,test=2").splits["train"] for c in e.captions
    ]
    whole, pieces, fewer = (
        train_tokenizer(captions, dataclasses.replace(WORDS, kind=kind, vocab_size=size))
        for kind, size in (("word", 999), ("bpe", 400), ("bpe", 300))
    )
    for theirs, ours in ((pieces, whole), (whole, pieces)):
        with pytest.raises(UsageError, match="cuts text into other words .* by its captions") as caught:
            tiny_teacher(theirs, ours)
        assert "\n" not in caught.value.message
    tiny_teacher(pieces, pieces)
    examples = list(open_dataset("scenes:train=6,val=2,test=2").splits["train"])
    with pytest.raises(UsageError, match="cuts text into other words"):
        tiny_teacher(fewer, pieces).check(examples, 8)
    # The other way round the teacher has all pieces and other merges.
    teacher = tiny_teacher(pieces, fewer)
    assert not teacher.missing
    with pytest.raises(UsageError, match="cuts text into other words"):
        teacher.check(examples, 8)
    # A pruned one cuts the captions it was pruned for as before.
    larger = train_tokenizer([*captions, *["zebras cross boulevards"] * 99], dataclasses.replace(WORDS, kind="bpe"))
    pruned, _ = shrink_vocab(larger, captions, 1)
    assert pruned.get_vocab_size() < larger.get_vocab_size()
    tiny_teacher(larger, pruned).check(examples, 8)


def test_teachers_speak_once_and_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two teachers of other sizes, another encoder and photo size; killed while they speak, and in every epoch."""
    one, _ = train(tiny_recipe(ONE, decoder="llama", image_size=96, spec=FEW), tmp_path / "one")
    wide = {"kind": "mobilenet_v2", "config": {**ENCODER["config"], "depth_multiplier": 0.5}}
    tree = tiny_recipe(ONE, decoder="transformer", spec=FEW).to_dict()
    two, _ = train(recipe_from_dict({**tree, "name": "wide", "encoder": wide}), tmp_path / "two")
    recipe = tiny_recipe(DISTILL, flip=True, spec=FEW)
    with pytest.raises(UsageError, match="match: the captioner sees a photo as 4 × 16 .* as 9 × 16: leave match at 0"):
        train(tiny_recipe({**DISTILL, "match": 1.0, "encoder_lr": 1e-3}, spec=FEW), tmp_path / "match", teachers=[one])
    assert not (tmp_path / "match").exists()

    logits, said = WordTeacher.logits, []

    def counted(self: WordTeacher, model: Any, memory: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
        said.append(Path(self.name).name)
        return logits(self, model, memory, ids)

    monkeypatch.setattr(WordTeacher, "logits", counted)
    lines: list[str] = []
    first, metrics = train(recipe, tmp_path / "first", teachers=[one, two], say=lines.append)
    # 32 photos in parts of 16, as they are and mirrored, and one caption to see that it can.
    assert said == ["one", "two", *["one"] * 4, *["two"] * 4]
    parts = [load_checkpoint(path) for path in (one, two)]
    assert metrics["teachers"] == [
        {
            "path": str(each.path), "sha256": each.sha256, "recipe": each.recipe.name,
            "parameters": sum(p.numel() for p in each.model.parameters()), "cider": each.metrics["best"]["cider"],
        }
        for each in parts
    ]  # fmt: skip
    assert [line.split(",")[0] for line in lines if line.startswith("teacher ")] == [
        f"teacher {one}: tiny", f"teacher {two}: wide",
    ]  # fmt: skip

    # The same teachers again: nothing is computed, and the run is the same.
    said.clear()
    again, _ = train(recipe, tmp_path / "again", teachers=[one, two])
    assert said == ["one", "two"]
    assert (again / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()

    # Without a cache, killed in the middle of the first teacher's words, then before any step and in an epoch.
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(cache, "FLUSH", 16)

    def interrupted(self: WordTeacher, model: Any, memory: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
        if len(said) == 5:
            raise Killed
        return counted(self, model, memory, ids)

    said.clear()
    out = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(WordTeacher, "logits", interrupted)
        train(recipe, out, teachers=[one, two])
    assert said == ["one", "two", "one", "one", "one"]
    with_kills(monkeypatch, lambda begun: train(None, out, resume=True), (0, 1, 99))
    metrics = read_metrics(out)
    assert said == ["one", "two", *["one"] * 4, *["two"] * 4] and metrics["finished"]
    assert (out / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    assert [each["sha256"] for each in metrics["teachers"]] == [each.sha256 for each in parts]


def test_a_start_with_one_teacher_of_before_still_loads(tmp_path: Path) -> None:
    old = {"init": "", "sha256": "", "teacher": "/a", "teacher_sha256": "0", "pruned": [], "critic": "c"}
    (tmp_path / START).parent.mkdir()
    (tmp_path / START).write_text(json.dumps(old))
    assert read_start(tmp_path) == Start(critic="c", teachers=[{"path": "/a", "sha256": "0"}])
    (tmp_path / START).write_text(json.dumps({**old, "teacher": "", "teacher_sha256": ""}))
    assert read_start(tmp_path) == Start(critic="c")

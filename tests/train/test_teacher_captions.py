"""Sequence-level distillation: which captions of a teacher are learnt, that it speaks once, and runs that learn so."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecap.benchmarks.datasets import Example, open_dataset
from edgecap.benchmarks.metrics import CiderD
from edgecap.runtime.errors import EdgecapError, UsageError
from edgecap.train import loop
from edgecap.train.checkpoint import WEIGHTS, Checkpoint, preprocess_for
from edgecap.train.data.batches import Photos
from edgecap.train.run import train
from edgecap.train.settings import Augment, Decoding, Recipe, TokenizerSettings
from edgecap.train.start import read_start
from edgecap.train.teachers import base, captioners, given
from edgecap.train.teachers.base import Lazy, Teacher
from edgecap.train.teachers.captioners import Hypotheses
from edgecap.train.teachers.captions import best_captions, generate

from .captioners import save_captioner
from .tiny import tiny_recipe

ONE = {"epochs": 2, "batch_size": 16, "lr": 3e-3}
QUIET = {"device": torch.device("cpu"), "progress": lambda phase, done, total: None}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Parrot(Teacher):
    """Says the same of every photo."""

    def __init__(self, dies_at: str = "", **settings: object) -> None:
        super().__init__("a/parrot", "0" * 64, Lazy(lambda: None))
        self.settings = {"length": 3, **settings}
        self.heard: list[str] = []
        self.dies_at = dies_at

    def captions(self, examples: Sequence[Example], beam: int, device: object = None) -> list[Hypotheses]:
        said = []
        for example in examples:
            if example.id == self.dies_at:
                raise Killed
            self.heard.append(example.id)
            said.append([(f"A {word} circle is on the left.", -float(i)) for i, word in enumerate("abcde"[:beam])])
        return said


EXAMPLES = [
    Example("0", ("A dog runs on grass.", "a brown dog runs")),
    Example("1", ("a man rides a bike", "a man on a red bike")),
    Example("2", ("two cats sleep", "cats sleep on a bed")),
]
TEACHERS = [
    [
        [("a dog runs on the grass", -1.0), ("a brown dog runs .", -1.5), ("a dog runs", -2.0)],
        [("a woman cooks", -1.0), ("a man on a bike", -2.0)],
        [("", -1.0), ("a dog", -2.0)],
    ],
    [
        [("A dog runs on the grass", -0.5), ("a brown dog runs on grass", -3.0)],
        [],
        [("two cats sleep on a bed", -1.0), ("two cats", -1.0), ("two dogs sleep", -9.0)],
    ],
]


def test_the_best_captions_are_kept_by_their_scores() -> None:
    judge = CiderD([[caption.lower().rstrip(".").split() for caption in e.captions] for e in EXAMPLES])
    # A photo's own captions, empty ones and what an earlier teacher said are no candidates.
    candidates = {
        (0, 0): ["a dog runs on the grass", "a dog runs"],
        (0, 1): ["a woman cooks", "a man on a bike"],
        (0, 2): ["a dog"],
        (1, 0): ["a brown dog runs on grass"],
        (1, 2): ["two cats sleep on a bed", "two cats", "two dogs sleep"],
    }
    scores = {
        (place, text): float(judge.score([place[1]], [text.split()])[0])
        for place, texts in candidates.items()
        for text in texts
    }
    kept, figures = best_captions(TEACHERS, EXAMPLES, count=3, keep=1.0)
    assert figures["kept"] == figures["of"] == 9 and figures["photos"] == 3
    assert figures["cider_all"] == figures["cider_kept"] == pytest.approx(np.mean(list(scores.values())))
    assert kept[0] == ("a dog runs on the grass", "a dog runs", "a brown dog runs on grass")

    kept, figures = best_captions(TEACHERS, EXAMPLES, count=1, keep=1.0)
    best = {place: max(texts, key=lambda text: scores[place, text]) for place, texts in candidates.items()}
    assert best[0, 1] == "a man on a bike" and best[1, 2] == "two cats sleep on a bed"
    assert kept == [
        (best[0, 0], "a brown dog runs on grass"),
        ("a man on a bike",),
        ("a dog", "two cats sleep on a bed"),
    ]
    assert figures["of"] == 5

    kept, figures = best_captions(TEACHERS, EXAMPLES, count=1, keep=0.6)
    ranked = sorted(best, key=lambda place: -scores[place, best[place]])[:3]
    assert figures["kept"] == 3 and figures["photos"] == len({photo for _, photo in ranked})
    assert {text for texts in kept for text in texts} == {best[place] for place in ranked}
    assert figures["cider_kept"] == pytest.approx(np.mean([scores[place, best[place]] for place in ranked]))
    assert figures["cider_kept"] > figures["cider_all"]

    one, two = figures["teachers"]
    assert (one["of"], two["of"]) == (3, 2) and one["kept"] + two["kept"] == 3
    first = [judge.score([photo], [text.split()])[0] for photo, text in ((0, "a dog runs on the grass"),)]
    assert one["cider_first"] == pytest.approx(
        np.mean([*first, *judge.score([1, 2], [["a", "woman", "cooks"], []])])
    )  # of an empty one, too

    kept, figures = best_captions([[[], [], []]], EXAMPLES, count=2, keep=0.5)
    assert kept == [(), (), ()] and figures["of"] == 0 == figures["cider_all"]
    assert figures["teachers"] == [{"kept": 0, "of": 0, "cider_first": 0.0}]


def test_a_teacher_speaks_once_and_goes_on_where_it_was_killed(own_cache: Path) -> None:
    recipe, data = tiny_recipe(), open_dataset("scenes:train=40,val=2,test=2,size=64")
    photos = Photos(data, "train", recipe, preprocess_for(recipe))
    with pytest.raises(Killed):
        generate(Parrot(dies_at=photos.examples[35].id), photos, 3, **QUIET)
    (file,) = own_cache.glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 32
    file.write_bytes(file.read_bytes()[:-10])  # killed while it wrote
    second = Parrot()
    said = generate(second, photos, 3, **QUIET)
    assert second.heard == [example.id for example in photos.examples[16:]]  # whole batches
    third = Parrot()
    assert generate(third, photos, 3, **QUIET) == said == Parrot().captions(photos.examples, 3) and not third.heard

    other = Parrot(length=4)
    generate(other, photos, 3, **QUIET)
    assert len(other.heard) == 40
    assert len(generate(third, photos, 2, **QUIET)[0]) == 2 and len(third.heard) == 40

    corrected = [dataclasses.replace(example, captions=("another",)) for example in photos.examples]
    same = Photos(dataclasses.replace(data, splits={"train": corrected}), "train", recipe, photos.preprocess)
    assert generate(third, same, 2, **QUIET) and len(third.heard) == 40  # the photos are the same
    others = open_dataset("scenes:train=40,val=2,test=2,size=64,seed=1")
    generate(third, Photos(others, "train", recipe, photos.preprocess), 2, **QUIET)
    assert len(third.heard) == 80

    for broken in (b"not json\n" * 40, b'[["a"]]\n', b"[]\n" * 41):
        file.write_bytes(broken)
        assert generate(Parrot(), photos, 3, **QUIET) == said
    (own_cache / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EdgecapError, match="set EDGECAP_CACHE"):
        patch.setenv("EDGECAP_CACHE", str(own_cache / "file"))
        generate(Parrot(), photos, 3, **QUIET)


def test_mirrored_photos_have_their_teachers_captions_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[np.ndarray]] = []

    def looks(self: loop.Trainer, stage: object, forward: object) -> None:
        seen.append([self.material, *self.material.ids])

    monkeypatch.setattr(loop.Trainer, "_epoch", looks)
    monkeypatch.setattr(loop.Trainer, "score", lambda self: {"cider": 0.0})
    monkeypatch.setattr(given, "open_caption_teacher", lambda source, parameters: Parrot())
    stages = ({**ONE, "epochs": 1, "teacher_captions": 2, "teacher_keep": 1.0}, {**ONE, "epochs": 1})
    train(tiny_recipe(*stages, flip=True), tmp_path / "out", teachers=["a/parrot"])
    (material, *taught), (_, *plain) = seen
    own = max(len(example.captions) for example in material.train.examples)
    for ids, side in zip(taught, ("left", "right"), strict=True):
        assert ids.shape[1] == own + 2
        for rows, example in zip(ids, material.train.examples, strict=True):
            said = [material.tokenizer.decode(row[row >= 0].tolist()) for row in rows if row[0] >= 0]
            assert len(said) == len(example.captions) + 2
            assert all(text.endswith(f"circle is on the {side}") for text in said[-2:])
    assert [ids.shape[1] for ids in plain] == [own, own]  # the next stage has no teacher


def speaking_recipe(*stages: dict, **data: object) -> Recipe:
    """Whose captioner says something even where it has hardly learnt."""
    decoding = Decoding(max_length=12, min_length=3, length_penalty=1.0)
    return dataclasses.replace(tiny_recipe(*stages, **data), decoding=decoding)


def test_a_run_learns_a_blips_captions_and_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blip = save_captioner(tmp_path / "blip", "blip")
    recipe = tiny_recipe({**ONE, "teacher_captions": 2, "teacher_beam": 3, "teacher_keep": 0.8})
    lines: list[str] = []
    out, metrics = train(recipe, tmp_path / "out", teachers=[str(blip)], say=lines.append)
    (told,) = metrics["teacher_captions"]
    assert told["stage"] == "words" and 0 < told["kept"] == round(0.8 * told["of"]) <= 2 * 48
    assert any(f"{told['kept']} of the teachers' {told['of']} captions" in line for line in lines)
    plain, _ = train(tiny_recipe(ONE), tmp_path / "plain")
    assert (plain / WEIGHTS).read_bytes() != (out / WEIGHTS).read_bytes()

    save = loop.Trainer._save

    def mortal(self: loop.Trainer) -> None:
        save(self)
        if self.state["epoch"]:
            raise Killed

    say = captioners.HubCaptionTeacher.captions

    def tried(self: Teacher, examples: list[Example], *args: object) -> list[Hypotheses]:
        assert len(examples) == 1, "it has spoken"
        return say(self, examples, *args)

    monkeypatch.setattr(captioners.HubCaptionTeacher, "captions", tried)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_save", mortal)
        train(recipe, tmp_path / "killed", teachers=[blip])
    again, resumed = train(None, tmp_path / "killed", resume=True)
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    assert resumed["teacher_captions"] == metrics["teacher_captions"]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_save", mortal)
        train(recipe, tmp_path / "other", teachers=[blip])
    save_captioner(blip, "blip", seed=1)
    with pytest.raises(UsageError, match="blip has changed since this run began with it as teacher"):
        train(None, tmp_path / "other", resume=True)


def test_one_checkpoint_teaches_words_and_captions_beside_a_blip(tmp_path: Path) -> None:
    teacher, its = train(speaking_recipe(ONE), tmp_path / "teacher")
    blip = save_captioner(tmp_path / "blip", "blip")
    recipe = tiny_recipe({**ONE, "objective": "distill", "teacher_captions": 3, "teacher_keep": 1.0})
    lines: list[str] = []
    pieces = dataclasses.replace(speaking_recipe(ONE), tokenizer=TokenizerSettings(kind="bpe", vocab_size=300))
    other, _ = train(dataclasses.replace(pieces, name="pieces"), tmp_path / "other")
    out, metrics = train(recipe, tmp_path / "both", teachers=[blip, teacher, other], say=lines.append)
    (learnt,) = metrics["teacher_captions"]
    assert learnt["kept"] == learnt["of"] > 20
    # By words, by captions alone.
    assert [told["path"] for told in metrics["teachers"]] == [str(teacher), str(blip), str(other)]
    assert [told["cider"] for told in metrics["teachers"]][:2] == [its["best"]["cider"], None]
    assert all(told["parameters"] > 10_000 and len(told["sha256"]) == 64 for told in metrics["teachers"])
    own = [told["captions"][0] for told in metrics["teachers"]]
    assert sum(each["kept"] for each in own) == learnt["kept"] and all(each["stage"] == "words" for each in own)
    assert all(f"first of its beams {each['cider_first']:.3f}" in "".join(lines) for each in own)
    assert [each["of"] > 0 and each["cider_first"] > 0 for each in own[:2]] == [True, True]
    told = [line for line in lines if line.startswith("teacher ")]
    assert len(told) == 3 and ["by its captions alone, for it cuts" in line for line in told] == [False, False, True]
    assert [bool(kept.get("aside")) for kept in read_start(out).teachers] == [False, False, True]
    with pytest.raises(UsageError, match="other cuts text into other words"):
        train(recipe, tmp_path / "none", teachers=[blip, other])
    assert not (tmp_path / "none").exists()
    # Captions alone come from any other words and picture size.
    recipe = tiny_recipe({**ONE, "teacher_captions": 3}, image_size=96)
    recipe = dataclasses.replace(recipe, tokenizer=TokenizerSettings(kind="bpe", vocab_size=300, max_length=30))
    _, metrics = train(recipe, tmp_path / "captions", teachers=[teacher])
    assert metrics["teacher_captions"][0]["kept"] > 10


def test_all_at_once_resumes_to_the_same_bits_and_keeps_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words and captions of one teacher, mirrored photos whose sides are dropped, simple captions first."""
    teacher, _ = train(speaking_recipe(ONE), tmp_path / "teacher")
    stage = {**ONE, "objective": "distill", "curriculum": 1, "teacher_captions": 2, "teacher_keep": 1.0}
    recipe = dataclasses.replace(tiny_recipe(stage, flip=True), augment=Augment(sides="drop"))
    load, models = base.load_again, []

    def seen(*args: str) -> Checkpoint:
        loaded = load(*args)
        models.append(weakref.ref(loaded.model))
        return loaded

    step, left = loop.Trainer._step, [99]

    def mortal(self: loop.Trainer, *args: object) -> tuple[float, int, dict[str, float]]:
        if any(model() for model in models):
            gc.collect()  # cycles go when they go
        assert not any(model() for model in models), "a teacher's model stays while the captioner learns"
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return step(self, *args)

    monkeypatch.setattr(base, "load_again", seen)
    monkeypatch.setattr(loop.Trainer, "_step", mortal)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    whole, metrics = train(recipe, tmp_path / "whole", teachers=[teacher])
    assert len(models) == 1  # for words and captions
    left[0] = 1
    with pytest.raises(Killed):
        train(recipe, tmp_path / "killed", teachers=[teacher])
    assert len(models) == 2  # it is tried, though what it says is known
    for left[0] in (2, 99):
        try:
            out, again = train(None, tmp_path / "killed", resume=True)
        except Killed:
            continue
    assert len(models) == 2 and again["teachers"] == metrics["teachers"] and again["teachers"][0]["parameters"]
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_refusals_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    both = {**ONE, "objective": "distill", "teacher_captions": 1}
    for stage, options, match in (
        ({**ONE, "teacher_captions": 1}, {}, "stages.0.teacher_captions needs --teacher"),
        (
            both,
            {"teachers": [tmp_path]},
            "objective = distill needs one; another captioner teaches by its captions alone",
        ),
        (ONE, {"teachers": [tmp_path]}, "no stage learns from it"),
        ({**ONE, "teacher_captions": 1}, {"teachers": [tmp_path / "none"]}, "no config.json there"),
    ):
        with pytest.raises(UsageError, match=match) as caught:
            train(tiny_recipe(stage), tmp_path / "out", **options)
        assert "\n" not in caught.value.message and not (tmp_path / "out").exists()
    for stage, match in (
        ({"objective": "scst", "teacher_captions": 1}, "teacher_captions: objective = scst learns no captions"),
        ({"teacher_captions": 6}, "teacher_captions = 6 is more than teacher_beam"),
        ({"teacher_captions": 1, "teacher_keep": 1.5}, "teacher_keep = 1.5 is out of range"),
        ({"teacher_captions": 1, "teacher_keep": 0.0}, "teacher_keep = 0.0 is out of range"),
    ):
        with pytest.raises(UsageError, match=match):
            tiny_recipe({**ONE, **stage})

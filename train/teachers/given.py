"""The teachers that a run was given: each teaches words, captions, or both, as its kind and the stages allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from ...benchmarks.datasets import Example
from ...runtime.errors import UsageError
from ..checkpoint import RECIPE, preprocess_for, read_checkpoint
from ..settings import Recipe
from .base import lazy_checkpoint
from .captioners import CaptionTeacher, check_captions, of_checkpoint, open_caption_teacher
from .words import WordsRefused, WordTeacher

ASIDE = "aside"  # in what is kept of a teacher: why a checkpoint does not teach words


@dataclass
class Given:
    """One --teacher; what is `kept` of it says why its words are left aside, where they are."""

    words: WordTeacher | None
    captions: CaptionTeacher | None
    aside: str = ""

    @property
    def either(self) -> WordTeacher | CaptionTeacher:
        either = self.words or self.captions
        assert either is not None
        return either

    def kept(self) -> dict[str, Any]:
        """What start.json keeps of it."""
        return self.either.told() | ({ASIDE: self.aside} if self.aside else {})


def check_sources(recipe: Recipe, sources: Sequence[str | Path]) -> None:
    """UsageError where a stage needs words and the sources, one of them or all, can give captions alone."""
    distill, listens, _ = _wants(recipe)
    others = [source for source in sources if not (Path(source) / RECIPE).is_file()]
    if distill and others and (not listens or len(others) == len(sources)):
        raise UsageError(
            f"the teacher {others[0]} is not a checkpoint: objective = distill needs one; "
            "another captioner teaches by its captions alone (teacher_captions)"
        )


def open_teacher(
    source: str | Path,
    recipe: Recipe,
    tokenizer: tokenizers.Tokenizer,
    kept: Mapping[str, Any] = MappingProxyType({}),
) -> Given:
    """A teacher by what the recipe's stages learn from, its model not loaded yet; kept: what was told of it before.

    Raises UsageError for what cannot teach so.
    """
    distill, listens, _ = _wants(recipe)
    parameters, aside = kept.get("parameters"), kept.get(ASIDE, "")
    if not (Path(source) / RECIPE).is_file():
        return Given(None, open_caption_teacher(source, parameters))
    info = read_checkpoint(source)
    model = lazy_checkpoint(info, parameters)
    captions = of_checkpoint(info, model) if listens else None
    words = None
    if distill and not aside:
        try:
            words = WordTeacher(info, model, tokenizer, recipe.tokenizer.ids)
        except WordsRefused as error:
            if captions is None:
                raise
            aside = error.why
    return _aside(Given(words, captions), aside)


def check_teachers(given: Sequence[Given], recipe: Recipe, examples: Sequence[Example], model: Any) -> None:
    """Let each teacher do what it is there for, once, for a captioner `model`; UsageError where one cannot.

    A checkpoint whose words will not do goes on as a teacher of captions, where a stage listens and another one is
    left to teach words.
    """
    distill, listens, match = _wants(recipe)
    for each in given:
        if each.words is not None:
            try:
                each.words.check(examples, recipe.tokenizer.max_length)
            except WordsRefused as error:
                if each.captions is None:
                    raise
                each.words = None
                _aside(each, error.why)
        if each.captions is not None:
            check_captions(each.captions, examples[0], listens)
    teachers = [each.words for each in given if each.words is not None]
    if distill and not teachers:
        first = next(each for each in given if each.aside)
        raise WordsRefused(first.either.name, first.aside)
    if match and len(teachers) > 1:
        raise UsageError(f"match is of one teacher and there are {len(teachers)}: leave it at 0")
    if match:
        teachers[0].check_match(examples, model, preprocess_for(recipe))


def _wants(recipe: Recipe) -> tuple[bool, int, bool]:
    """Whether a stage learns a teacher's words, the widest beam of those that learn captions (0: none does), and
    whether one learns to see as a teacher does."""
    distill = [stage for stage in recipe.stages if stage.objective == "distill"]
    beams = [stage.teacher_beam for stage in recipe.stages if stage.teacher_captions]
    return bool(distill), max(beams, default=0), any(stage.match for stage in distill)


def _aside(given: Given, why: str) -> Given:
    given.aside = why
    if why and given.captions is not None:
        given.captions.note = f"; teaches by its captions alone, for it {why}"
    return given

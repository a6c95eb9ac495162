"""The second style of scene captions: the facts of scene_captions as telegrams, the noun first, no articles or verbs.

Every word also occurs in the plain captions, so that any tokenizer learnt on those can say them; the usual ones here
are the rare ones there.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .scene_captions import NAMES, NUMBERS, PLURALS
from .scene_facts import Group, Scene, pick

SIZES = {"small": ("tiny", "little"), "large": ("huge", "big")}
# Said behind the first group and behind the second: "star red above, box blue below".
ENDS = {"left": ("left", "right"), "above": ("above", "below"), "inside": ("within", "around")}
PLACES = {
    "grass": ("field", "grass"),
    "sky": ("clouds", "sky"),
    "sand": ("desert", "beach"),
    "night": ("dark", "night"),
    "snow": ("snowy ground", "snow"),
    "water": ("lake", "sea"),
    "wall": ("brick", "wall"),
    "plain": ("plain gray", "gray"),
}


def group_words(group: Group, *, name: str = "", size: str = "", colour: bool = True) -> str:
    """'star red huge', 'boxes blue two'."""
    name = name or NAMES[group.object][-1]
    if group.count > 1:
        name = PLURALS.get(name, name + "s")
    number = NUMBERS[group.count] if group.count > 1 else ""
    return " ".join(filter(None, (name, group.colour if colour else "", size, number)))


def canonical_telegram(scene: Scene) -> str:
    """All facts in the usual words: what a captioner that saw everything would say in this style."""
    groups = [group_words(group, size=SIZES[group.size][0] if group.size else "") for group in scene.groups]
    ends = ENDS[scene.relation] if scene.relation else ("",)
    said = [f"{group} {end}".strip() for group, end in zip(groups, ends, strict=True)]
    return ", ".join([*said, PLACES[scene.background][0]])


def draw_telegrams(random: Random, scene: Scene) -> tuple[str, ...]:
    """Five different captions, as in the plain style: one complete, the others with a part of the facts."""
    return tuple(" ".join(make(random, scene).split()) for make in (_PAIR if scene.relation else _SINGLE))


def _say(random: Random, group: Group, *, colour: bool = True) -> str:
    names = NAMES[group.object]
    name = names[-1] if random.random() < 0.85 else pick(random, names)
    size = ""
    if group.size and random.random() < 0.6:
        size = SIZES[group.size][random.random() < 0.35]
    return group_words(group, name=name, size=size, colour=colour)


def _place(random: Random, scene: Scene) -> str:
    return PLACES[scene.background][random.random() < 0.35]


def _both(random: Random, scene: Scene, *, inverse: bool = False) -> str:
    said = [f"{_say(random, group)} {end}" for group, end in zip(scene.groups, ENDS[scene.relation], strict=True)]
    return ", ".join(reversed(said) if inverse else said)


# One group: place last, place first, no place, framed, vague.
_SINGLE: tuple[Callable[[Random, Scene], str], ...] = (
    lambda r, s: f"{_say(r, s.groups[0])}, {_place(r, s)}",
    lambda r, s: f"{_place(r, s)}: {_say(r, s.groups[0])}",
    lambda r, s: f"{pick(r, ('image', 'drawing'))}: {_say(r, s.groups[0])}",
    lambda r, s: f"{_say(r, s.groups[0])} seen, background {_place(r, s)}",
    lambda r, s: f"{_say(r, s.groups[0], colour=r.random() < 0.5)}, {pick(r, ('placed', 'seen'))} {_place(r, s)}",
)

# Two groups: complete, place first, no place, the other way round, without the relation.
_PAIR: tuple[Callable[[Random, Scene], str], ...] = (
    lambda r, s: f"{_both(r, s)}, {_place(r, s)}",
    lambda r, s: f"{_place(r, s)}: {_both(r, s)}",
    lambda r, s: f"{pick(r, ('image', 'drawing'))}: {_both(r, s)}",
    lambda r, s: f"{_both(r, s, inverse=True)}{f', {_place(r, s)}' if r.random() < 0.5 else ''}",
    lambda r, s: f"{_say(r, s.groups[0])}, {_say(r, s.groups[1], colour=r.random() < 0.5)}, background {_place(r, s)}",
)

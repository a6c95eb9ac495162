"""Five reference captions for a scene, each in other words and with other facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from .scene_facts import Group, Scene, pick

# The first of each is the usual wording; the others turn up now and then.
NAMES: dict[str, Sequence[str]] = {
    "circle": ("circle", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross",),
    "ring": ("ring", "hoop"),
    "tree": ("tree",),
    "house": ("house", "home"),
    "car": ("car", "vehicle"),
    "boat": ("boat", "ship"),
}
PLURALS = {"box": "boxes", "cross": "crosses"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
RELATIONS: dict[str, Sequence[str]] = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "in", "within"),
    "around": ("around", "surrounding"),
}
INVERSE = {"left": "right", "above": "below", "inside": "around"}
PLACES: dict[str, Sequence[str]] = {
    "grass": ("on the grass", "on green grass", "in a green field"),
    "sky": ("in the sky", "in a cloudy sky", "among the clouds"),
    "sand": ("on the sand", "on a beach", "in the desert"),
    "night": ("at night", "in the dark", "in the night sky"),
    "snow": ("in the snow", "on white snow", "on snowy ground"),
    "water": ("on the water", "on the sea", "on a blue lake"),
    "wall": ("by a wall", "by a brick wall", "in front of a wall"),
    "plain": ("on a gray background", "against plain gray", "on a plain background"),
}
VERBS = ("", "", "can be seen", "placed")  # how a scene of one group may go on before the place


def object_phrase(group: Group, *, name: str | None = None, size: str | None = None, colour: bool = True) -> str:
    """'a large red star', 'two blue boxes'; `size` None means the group's own plain word."""
    name = name or group.object
    if group.count > 1:
        name = PLURALS.get(name, name + "s")
    words = [group.size if size is None else size, group.colour if colour else "", name]
    phrase = " ".join(word for word in words if word)
    if group.count > 1:
        return f"{NUMBERS[group.count]} {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def canonical_caption(scene: Scene) -> str:
    """All facts in the usual words: what a captioner that saw everything would say."""
    first = object_phrase(scene.groups[0])
    place = PLACES[scene.background][0]
    if not scene.relation:
        return f"{first} {place}"
    return f"{first} {RELATIONS[scene.relation][0]} {object_phrase(scene.groups[1])} {place}"


def draw_captions(random: Random, scene: Scene) -> tuple[str, ...]:
    """Five different captions: one complete, the others with a part of the facts in another order."""
    makers = _PAIR if scene.relation else _SINGLE
    return tuple(" ".join(make(random, scene).split()) for make in makers)


def _usual(random: Random, words: Sequence[str], share: float) -> str:
    """The first of `words` with the given probability, else any of the others."""
    return words[0] if len(words) == 1 or random.random() < share else pick(random, words[1:])


def _say(random: Random, group: Group, *, colour: bool = True) -> str:
    size = group.size and (_usual(random, SIZES[group.size], 0.65) if random.random() < 0.6 else "")
    return object_phrase(group, name=_usual(random, NAMES[group.object], 0.85), size=size, colour=colour)


def _vague(random: Random, group: Group) -> str:
    """Without its colour, or several without their number."""
    if group.count > 2 and random.random() < 0.5:
        words = f"{group.colour} {PLURALS.get(group.object, group.object + 's')}"
        return f"{pick(random, ('some', 'several'))} {words}"
    return _say(random, group, colour=random.random() < 0.5)


def _be(group: Group) -> str:
    return "are" if group.count > 1 else "is"


def _place(random: Random, scene: Scene) -> str:
    return _usual(random, PLACES[scene.background], 0.65)


# One group. The five differ by construction: place last, "there is", picture of, place first, vague.
_SINGLE: tuple[Callable[[Random, Scene], str], ...] = (
    lambda r, s: f"{_say(r, s.groups[0])} {_place(r, s)}",
    lambda r, s: f"there {_be(s.groups[0])} {_say(r, s.groups[0])} {_place(r, s)}",
    lambda r, s: f"{pick(r, ('a picture of', 'an image of', 'a drawing of'))} {_say(r, s.groups[0])}",
    lambda r, s: f"{_place(r, s)} there {_be(s.groups[0])} {_say(r, s.groups[0])}",
    lambda r, s: f"{_vague(r, s.groups[0])} {pick(r, VERBS)} {_place(r, s)}",
)


def _related(r: Random, s: Scene, *, inverse: bool = False, verb: bool = False) -> str:
    first, second = reversed(s.groups) if inverse else s.groups
    relation = _usual(r, RELATIONS[INVERSE[s.relation] if inverse else s.relation], 0.7)
    return f"{_say(r, first)} {_be(first) if verb else ''} {relation} {_say(r, second)}"


# Two groups: complete, with a verb, "there is", the other way round, without the relation.
_JOINS = {
    "left": ("and", "and", "next to"),
    "above": ("and", "and", "with"),
    "inside": ("and", "and", "with"),
}


def _both(r: Random, s: Scene) -> str:
    """The two groups and the place without their relation, in any order."""
    first, second = s.groups if r.random() < 0.5 else reversed(s.groups)
    both = f"{_say(r, first)} {pick(r, _JOINS[s.relation])} {_vague(r, second)}"
    place = _place(r, s)
    return f"{both} {place}" if r.random() < 0.6 else f"{place} there {_be(first)} {both}"


_PAIR: tuple[Callable[[Random, Scene], str], ...] = (
    lambda r, s: f"{_related(r, s)} {_place(r, s)}",
    lambda r, s: _related(r, s, verb=True),
    lambda r, s: f"there {_be(s.groups[0])} {_related(r, s)}",
    lambda r, s: f"{_related(r, s, inverse=True)} {_place(r, s) if r.random() < 0.5 else ''}",
    _both,
)

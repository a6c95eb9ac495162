"""What is in a scene: the vocabulary of facts, what is held out of training, and how it is drawn by lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")

OBJECTS = (
    "circle", "square", "triangle", "star", "heart", "cross",
    "ring", "tree", "house", "car", "boat",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
BACKGROUNDS = ("grass", "sky", "sand", "night", "snow", "water", "wall", "plain")
RELATIONS = ("left", "above", "inside")  # of the first group to the second; the inverses are only other words
CONTAINERS = ("circle", "square", "ring")  # what something can be inside of
CONTENTS = ("circle", "square", "triangle", "star", "heart", "cross", "car", "house")

# Colours that would vanish in a background are never put on it.
CLASHES = {
    "grass": ("green",),
    "sky": ("blue", "white"),
    "sand": ("yellow", "orange"),
    "night": ("black", "blue", "purple"),
    "snow": ("white",),
    "water": ("blue", "green"),
    "wall": ("red", "orange"),
    "plain": ("white",),
}


@dataclass(frozen=True)
class Group:
    """`count` (1..4) equal objects of one colour; `size` is "small", "large" or "" (nothing to remark on)."""

    object: str
    colour: str
    count: int
    size: str


@dataclass(frozen=True)
class Scene:
    """One or two groups before a background; `relation` of the first to the second, "" with one group."""

    groups: tuple[Group, ...]
    relation: str
    background: str

    @property
    def unseen(self) -> bool:
        """Whether it holds a combination that never occurs in training."""
        return any(is_held_out_pair(group.colour, group.object) for group in self.groups) or (
            len(self.groups) == 2 and is_held_out_triple(self.groups[0].object, self.relation, self.groups[1].object)
        )


def is_held_out_pair(colour: str, object: str) -> bool:
    """One of the nine colours of every object (11 pairs of 99) is kept out of training."""
    # A fixed lattice spreads them: every colour and every object is still often seen, only not together.
    return (2 * COLOURS.index(colour) + 5 * OBJECTS.index(object)) % 9 == 4


def is_held_out_triple(first: str, relation: str, second: str) -> bool:
    """30 of the 242 (object, relation, object) are kept out of training."""
    a, r, b = OBJECTS.index(first), RELATIONS.index(relation), OBJECTS.index(second)
    return (7 * a + 11 * b + 5 * r) % 9 == 2


def pick(random: Random, choices: Sequence[T]) -> T:
    # Only random() is promised to give the same numbers in every Python version.
    return choices[int(random.random() * len(choices))]


def draw_scene(random: Random, split: str, index: int) -> Scene:
    """A scene by lot. In train no held-out combination occurs; in val and test every third scene has one."""
    want_unseen = split != "train" and index % 3 == 0
    while True:
        scene = _draw_any(random)
        if scene.unseen == want_unseen:
            return scene


def _draw_any(random: Random) -> Scene:
    kind = random.random()
    relation = "" if kind < 0.5 else "inside" if kind < 0.6 else "left" if kind < 0.8 else "above"
    if relation == "":
        groups = [_draw_group(random, OBJECTS, counts=(1, 1, 1, 2, 2, 3, 3, 4))]
    elif relation == "inside":
        groups = [Group(pick(random, CONTENTS), pick(random, COLOURS), 1, "")]
        groups.append(Group(pick(random, CONTAINERS), pick(random, COLOURS), 1, ""))
    else:
        groups = [_draw_group(random, OBJECTS, counts=(1, 1, 1, 1, 1, 1, 2, 2, 2, 3)) for _ in range(2)]
    colours = [group.colour for group in groups]
    if len(groups) == 2 and (
        # Two groups must be two: not of one kind, and something inside needs another colour to be seen.
        groups[0].object == groups[1].object or (relation == "inside" and colours[0] == colours[1])
    ):
        return _draw_any(random)
    backgrounds = [name for name in BACKGROUNDS if not set(colours) & set(CLASHES[name])]
    if not backgrounds:
        return _draw_any(random)
    return Scene(tuple(groups), relation, pick(random, backgrounds))


def _draw_group(random: Random, objects: Sequence[str], counts: Sequence[int]) -> Group:
    count = pick(random, counts)
    size = pick(random, ("", "small", "large")) if count == 1 else ""
    return Group(pick(random, objects), pick(random, COLOURS), count, size)

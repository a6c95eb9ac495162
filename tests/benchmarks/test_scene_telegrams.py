"""The scenes' second caption style: the same pictures and facts in other words, the plain style untouched."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from edgecap.benchmarks.datasets import open_dataset
from edgecap.benchmarks.datasets.scene_captions import canonical_caption
from edgecap.benchmarks.datasets.scene_facts import COLOURS
from edgecap.benchmarks.datasets.scene_telegrams import ENDS, canonical_telegram
from edgecap.benchmarks.metrics import caption_metrics, ptb_tokenize
from edgecap.runtime.errors import UsageError


@pytest.fixture(scope="module")
def styles():
    return {style: open_dataset(f"scenes:train=1500,style={style}") for style in ("plain", "telegram")}


def test_plain_is_what_it_was_before_styles(styles):
    written = "scenes 4 SceneOptions(train=4000, val=4000, test=1000, size=128, seed=0)"
    assert open_dataset("scenes").fingerprint == hashlib.sha256(written.encode()).hexdigest()
    assert styles["plain"].fingerprint == open_dataset("scenes:train=1500").fingerprint
    assert styles["plain"].splits["val"][5].captions == open_dataset("scenes").splits["val"][5].captions


def test_telegrams_are_other_data_of_the_same_pictures(styles):
    plain, telegram = (styles[style].splits["test"][7] for style in ("plain", "telegram"))
    assert styles["plain"].fingerprint != styles["telegram"].fingerprint
    assert plain.scene == telegram.scene and plain.id == telegram.id
    assert np.array_equal(np.asarray(plain.load()), np.asarray(telegram.load()))


def test_each_style_scores_low_against_the_other(styles):
    examples = styles["plain"].splits["test"]
    references = {name: {e.id: e.captions for e in data.splits["test"]} for name, data in styles.items()}

    def cider(say, style: str) -> float:
        return caption_metrics({e.id: say(e.scene) for e in examples}, references[style]).cider

    own = {"plain": cider(canonical_caption, "plain"), "telegram": cider(canonical_telegram, "telegram")}
    assert min(own.values()) > 4.5
    assert cider(canonical_telegram, "plain") < 0.25 * own["plain"]
    assert cider(canonical_caption, "telegram") < 0.1 * own["telegram"]


def test_telegrams_use_words_of_the_plain_captions_alone(styles):
    words = {
        style: {word for e in data.splits["train"] for caption in e.captions for word in ptb_tokenize(caption)}
        for style, data in styles.items()
    }
    assert len(words["telegram"]) > 60 and words["telegram"] <= words["plain"]


def test_telegrams_are_five_different_true_captions(styles):
    colours = re.compile(rf"\b({'|'.join(COLOURS)})\b")
    for example in styles["telegram"].splits["val"][:1000]:
        scene = example.scene
        assert len(example.captions) == 5 and len(set(example.captions)) >= 3
        for caption in example.captions:
            assert set(colours.findall(caption)) <= {group.colour for group in scene.groups}, caption
            assert not re.search(r"\b(an?|the|is|are|there|with)\b|  |, ,", caption), caption
        said = canonical_telegram(scene)
        assert all(group.colour in said for group in scene.groups)
        assert all(end in said for end in ENDS.get(scene.relation, ()))


def test_a_style_that_is_not_there_is_one_line():
    with pytest.raises(UsageError, match=r"style=plain\|telegram"):
        open_dataset("scenes:style=poem")

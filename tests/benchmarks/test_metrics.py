"""The metrics against pycocoevalcap: on corpora made up by hypothesis, and on all of Flickr8k where it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecap.benchmarks.metrics import (
    CiderD,
    bootstrap_mean,
    caption_metrics,
    paired_bootstrap,
    ptb_tokenize,
    sentence_bleu,
)
from edgecap.benchmarks.metrics.bleu import bleu
from edgecap.benchmarks.metrics.cider import cider
from edgecap.benchmarks.metrics.diversity import distinct_share, mean_length, repeated_share, repeats
from edgecap.benchmarks.metrics.rouge import lcs_length, rouge_l
from edgecap.runtime.errors import UsageError

CLOSE = {"rtol": 0, "atol": 1e-6}

# Few words, so that n-grams repeat within a caption and are shared between captions; captions may be empty.
caption_words = st.lists(st.sampled_from(["a", "dog", "runs", "red", "on", "the"]), max_size=14)
photo = st.tuples(caption_words, st.lists(caption_words, min_size=1, max_size=5))
# pycocoevalcap cannot score a corpus whose references are all empty.
corpora = st.lists(photo, min_size=1, max_size=8).filter(lambda corpus: any(any(refs) for _, refs in corpus))

Corpus = list[tuple[list[str], list[list[str]]]]


def theirs(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, np.ndarray]:
    """pycocoevalcap's figures, per photo except for BLEU."""
    reason = "pycocoevalcap is not installed"
    cider_module = pytest.importorskip("pycocoevalcap.cider.cider", reason=reason)
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu", reason=reason)
    rouge_module = pytest.importorskip("pycocoevalcap.rouge.rouge", reason=reason)
    said = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    wanted = {i: [" ".join(words) for words in refs] for i, refs in enumerate(references)}
    return {
        "cider": np.array(cider_module.Cider().compute_score(wanted, said)[1]),
        "bleu": np.array(bleu_module.Bleu(4).compute_score(wanted, said, verbose=0)[0]),
        "rouge_l": np.array(rouge_module.Rouge().compute_score(wanted, said)[1]),
    }


@settings(max_examples=150, deadline=None)
@given(corpora)
def test_equal_to_pycocoevalcap_on_made_up_corpora(corpus: Corpus) -> None:
    candidates, references = [c for c, _ in corpus], [r for _, r in corpus]
    expected = theirs(candidates, references)
    np.testing.assert_allclose(cider(candidates, references), expected["cider"], **CLOSE)
    np.testing.assert_allclose(bleu(candidates, references), expected["bleu"], **CLOSE)
    np.testing.assert_allclose(rouge_l(candidates, references), expected["rouge_l"], **CLOSE)


def test_a_mixed_fraction_is_parted_as_pycocoevalcap_parts_it() -> None:
    candidates = {1: "1 1/2 cups of sugar in a bowl", 2: "a bowl of 1 1/2 apples", 3: "a red cup"}
    references = {1: ["about 1 1/2 cups of sugar", "sugar in a bowl"], 2: ["1 apple and 1/2 an apple"], 3: ["a cup"]}
    scores = caption_metrics(candidates, references)
    expected = theirs(
        [ptb_tokenize(c) for c in candidates.values()], [[ptb_tokenize(c) for c in r] for r in references.values()]
    )
    np.testing.assert_allclose(scores.per_photo_cider, expected["cider"], **CLOSE)
    np.testing.assert_allclose(scores.bleu, expected["bleu"], **CLOSE)
    np.testing.assert_allclose(scores.per_photo_rouge_l, expected["rouge_l"], **CLOSE)


def test_figures_known_by_hand() -> None:
    scores = caption_metrics({"x": "A dog runs.", "y": "Two cats"}, {"x": ["a dog runs"], "y": ["two cats"]})
    assert scores.ids == ("x", "y")
    # Equal captions: cosine 1 for each n that they are long enough for (3 and 2 of 4), times 10.
    np.testing.assert_allclose(scores.per_photo_cider, [7.5, 5.0])
    assert scores.cider == scores.cider_d == pytest.approx(6.25)
    assert scores.bleu[0] == pytest.approx(1) and scores.rouge_l == pytest.approx(1)
    assert (scores.distinct, scores.repeated_ngrams, scores.mean_length) == (1.0, 0.0, 2.5)
    record = scores.to_dict()
    assert record["photos"] == 2 and record["bleu_1"] == scores.bleu[0]
    assert record["cider_interval"] == {"mean": pytest.approx(6.25), "low": 5.0, "high": 7.5, "level": 0.95}


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {1: ["a"]}, "no captions"),
        ({1: "a", 2: "b"}, {1: ["a"]}, "photo 2 has a caption but no references"),
        ({1: "a", 2: "b"}, {1: ["a"], 2: []}, "photo 2 has a caption but no references"),
        ({1: "a"}, {1: ["a"], 7: ["b"], 8: ["b"]}, "2 of 3 photos with references have no caption, the first is 7"),
    ],
)
def test_photos_must_match(candidates: dict, references: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        caption_metrics(candidates, references)


@settings(max_examples=100, deadline=None)
@given(corpora, st.data())
def test_the_reward_scores_ids_as_words(corpus: Corpus, data: st.DataObject) -> None:
    candidates, references = [c for c, _ in corpus], [r for _, r in corpus]
    order = data.draw(st.lists(st.integers(0, len(corpus) - 1), max_size=12))
    number: dict[str, int] = {}

    def ids(words: list[str]) -> tuple[int, ...]:
        return tuple(number.setdefault(word, len(number)) for word in words)

    reward = CiderD([[ids(ref) for ref in refs] for refs in references])
    scores = reward.score(order, [ids(candidates[i]) for i in order])
    np.testing.assert_allclose(scores, cider(candidates, references)[order], rtol=1e-12)
    assert len(reward) == len(corpus)


def test_the_end_of_sentence_counts_where_it_is_given() -> None:
    end = 2
    references = [[[5, 6, 7, 8, end]], [[9, 10, end]], [[11, 12, 13, end]]]
    whole, cut = CiderD(references).score([0, 0], [[5, 6, 7, 8, end], [5, 6, 7, 8]])
    assert whole == pytest.approx(10.0) and cut < whole


def test_sentences_have_a_smoothed_bleu_of_their_own() -> None:
    corpus = CiderD([["a b c d e".split(), "a b".split()], ["x y z z".split()]])
    said = ["a b c d e", "a b x d e", "a b c", "q", "z z z", ""]
    scores = sentence_bleu(corpus, [0, 0, 0, 0, 1, 1], [text.split() for text in said])
    # 4 words of 5, 2 pairs of 4, none of 3 triples and 2 quadruples, with 1 added to all but the first.
    some = (4 / 5 * 3 / 5 * 1 / 4 * 1 / 3) ** 0.25
    # 3 words are as near to 2 as to 4: no penalty beside the shorter one. Of "z z z" the third z has no match.
    short, repeated = 1.0, np.exp(1 - 4 / 3) * (2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25
    np.testing.assert_allclose(scores, [1, some, short, 0, repeated, 0], rtol=1e-12)


def test_the_reward_refuses_an_empty_corpus() -> None:
    with pytest.raises(UsageError, match="corpus is empty"):
        CiderD([])
    with pytest.raises(UsageError, match="photo 1 .* no references"):
        CiderD([[["a"]], []])


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_longest_common_subsequence(a: list[int], b: list[int]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert lcs_length(a, b) == table[-1][-1]


@pytest.mark.parametrize(
    ("caption", "stutters"),
    [
        ("a dog sitting sitting", True),
        ("a dog in the in the grass", True),
        ("a man in red and a man in blue", True),  # "a man in" twice
        ("a man in a hat in a boat", False),
        ("a b a b", True),
        ("a b a", False),
        ("", False),
    ],
)
def test_stutter(caption: str, stutters: bool) -> None:
    assert repeats(caption.split()) is stutters


def test_diversity_of_a_captioner_that_says_one_thing() -> None:
    captions = [["a", "dog"]] * 3 + [["a", "a", "cat"]]
    assert (distinct_share(captions), repeated_share(captions), mean_length(captions)) == (0.5, 0.25, 2.25)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        interval = bootstrap_mean(random.exponential(1.0, 200), rounds=400, seed=seed, level=0.9)
        hits += interval.low <= 1.0 <= interval.high
    assert 168 <= hits <= 192  # 180 expected, standard deviation 4.2


def test_paired_bootstrap_is_seeded_and_takes_out_what_is_common() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(0, 5, 500)
    a, b = hard + 0.3 + random.normal(0, 0.1, 500), hard + random.normal(0, 0.1, 500)
    paired = paired_bootstrap(a, b, seed=1)
    assert paired == paired_bootstrap(a, b, seed=1) != paired_bootstrap(a, b, seed=2)
    assert paired.low < 0.3 < paired.high and paired.high - paired.low < 0.05
    assert paired.mean == pytest.approx((a - b).mean())
    flipped = paired_bootstrap(b, a, seed=1)
    assert (flipped.low, flipped.high) == (pytest.approx(-paired.high), pytest.approx(-paired.low))


def test_bootstrap_does_not_depend_on_how_it_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    whole = bootstrap_mean(values, rounds=300)
    monkeypatch.setattr("edgecap.benchmarks.metrics.bootstrap.CHUNK", 173)
    assert bootstrap_mean(values, rounds=300) == whole


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_bootstrap_refuses_what_has_no_mean(bad: list) -> None:
    with pytest.raises(UsageError, match="non-empty list of finite numbers"):
        bootstrap_mean(np.array(bad))
    with pytest.raises(UsageError, match="same photos"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


@pytest.fixture(scope="module")
def flickr8k() -> dict[str, list[str]]:
    """All of Flickr8k's captions by photo."""
    root = Path(os.environ.get("EDGECAP_DATA", Path(__file__).parents[2] / ".." / "shared"))
    source = root / "data" / "flickr8k" / "Flickr8k.token.txt"
    if not source.exists():
        pytest.skip(f"no {source}: set EDGECAP_DATA to the folder that holds data/flickr8k")
    captions: dict[str, list[str]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        name, caption = line.split("\t", 1)
        captions.setdefault(name.rsplit("#", 1)[0], []).append(caption)
    return captions


@pytest.fixture(scope="module")
def java_tokens(flickr8k: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    """What pycocoevalcap's own tokenizer, the Java program, makes of all of Flickr8k's captions."""
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("no java on the PATH")
    wrapped = {name: [{"caption": caption} for caption in captions] for name, captions in flickr8k.items()}
    return {name: [c.split(" ") for c in lines] for name, lines in module.PTBTokenizer().tokenize(wrapped).items()}


def test_tokens_of_all_flickr8k_captions_are_javas(
    flickr8k: dict[str, list[str]], java_tokens: dict[str, list[list[str]]]
) -> None:
    assert len(flickr8k) == 8000 and sum(map(len, flickr8k.values())) == 40_000
    assert {name: [ptb_tokenize(c) for c in captions] for name, captions in flickr8k.items()} == java_tokens


def test_human_captions_of_flickr8k_score_as_in_pycocoevalcap(
    flickr8k: dict[str, list[str]], java_tokens: dict[str, list[list[str]]]
) -> None:
    candidates = {name: captions[0] for name, captions in flickr8k.items()}
    scores = caption_metrics(candidates, {name: captions[1:] for name, captions in flickr8k.items()})
    expected = theirs([c[0] for c in java_tokens.values()], [c[1:] for c in java_tokens.values()])
    np.testing.assert_allclose(scores.per_photo_cider, expected["cider"], **CLOSE)
    np.testing.assert_allclose(scores.bleu, expected["bleu"], **CLOSE)
    np.testing.assert_allclose(scores.per_photo_rouge_l, expected["rouge_l"], **CLOSE)
    assert scores.cider == pytest.approx(expected["cider"].mean(), abs=1e-6)

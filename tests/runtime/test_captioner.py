"""The object an app holds: every way to call it gives the same captions."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from edgecap.benchmarks.metrics import ptb_tokenize
from edgecap.runtime import Caption, Captioner, EdgecapError, UsageError, verify_golden
from edgecap.runtime import captioner as module
from edgecap.runtime.tokenizer import plain_words

from .graphs import SIZE, TOKENS, WORDS, photo


@pytest.fixture(scope="module")
def photos() -> list:
    return [photo(seed, (SIZE + seed, 2 * SIZE)) for seed in range(11)]  # more than one batch, none of the size


def test_one_photo_is_one_caption(captioner, photos, tmp_path):
    caption = captioner(photos[0])
    assert isinstance(caption, Caption) and str(caption) == caption.text
    assert caption.text == " ".join(WORDS[token] for token in caption.token_ids)
    assert caption.logprob < 0 and caption.alternatives == ()
    path = tmp_path / "photo.png"
    photos[0].save(path)
    data = path.read_bytes()
    for same in (path, str(path), data, bytearray(data), memoryview(data), np.asarray(photos[0])):
        assert captioner(same) == caption


def test_many_photos_are_a_list(captioner, photos):
    one_by_one = [captioner(each) for each in photos]
    assert len({each.text for each in one_by_one}) > 3
    pixels = np.stack([captioner.preprocess(each) for each in photos])
    for together in (captioner(photos), captioner(iter(photos)), captioner(pixels), captioner.caption_arrays(pixels)):
        assert [each.token_ids for each in together] == [each.token_ids for each in one_by_one]
        np.testing.assert_allclose([c.logprob for c in together], [c.logprob for c in one_by_one], rtol=1e-4)
    assert captioner([]) == []
    assert captioner([photos[0]]) == [one_by_one[0]]


def test_beam(captioner, photos):
    for caption in captioner(photos, beam=3):
        assert len(caption.alternatives) == 2
        scores = [caption.score, *(other.score for other in caption.alternatives)]
        assert scores == sorted(scores, reverse=True)


def test_options_reach_the_search(captioner, photos):
    assert len(captioner(photos[0], max_length=3).token_ids) <= 3
    for caption in captioner(photos, no_repeat_ngram=1, min_length=4, beam=2):
        assert len(caption.token_ids) >= 4 and len(set(caption.token_ids)) == len(caption.token_ids)


@pytest.mark.parametrize(
    "text",
    [
        "A dog,",
        "Two dogs: one can't swim!",
        "the man's T-shirt",
        "2.5 m (or 1/2)…",
        "We cannot see it’s #7",
        "“Stop!” & go.",
    ],
)
def test_prompts_become_the_words_that_captions_become(text):
    wanted = [word for word in ptb_tokenize(text) if word not in ("-lrb-", "-rrb-")]
    assert plain_words(text).split() == wanted


def test_prompt(captioner, photos):
    caption = captioner(photos[0], prompt="A red")
    assert caption.text.startswith("a red ")
    assert caption.text.split()[2:] == [WORDS[token] for token in caption.token_ids]
    session = captioner.session()
    logits = session.start(captioner.preprocess(photos[0])[None], np.array([4, 5]))
    logits[:, [TOKENS["pad"], TOKENS["bos"], TOKENS["unk"]]] = -np.inf
    assert caption.token_ids[0] == logits[0].argmax()
    assert captioner(photos[0], prompt="") == captioner(photos[0], prompt="…") == captioner(photos[0])
    assert captioner(photos[0], prompt=" “A  RED,” ") == caption
    with pytest.raises(UsageError, match="does not know"):
        captioner(photos[0], prompt="a zeppelin")


@pytest.mark.parametrize("wrong", [{"beam": 0}, {"beams": 3}, {"max_length": "9"}])
def test_bad_options(captioner, photos, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        captioner(photos[0], **wrong)


@pytest.mark.parametrize("pixels", [np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, SIZE, SIZE, 3)), [1]], ids=str)
def test_bad_pixels(captioner, pixels):
    with pytest.raises(UsageError, match="pixels must be uint8"):
        captioner.caption_arrays(pixels)


def test_a_bad_photo_is_named(captioner, photos, tmp_path):
    with pytest.raises(EdgecapError, match="nothing.jpg: there is no such file"):
        captioner([photos[0], tmp_path / "nothing.jpg"])


def test_calls_from_several_threads(captioner, photos):
    expected = [captioner(photos, beam=beam) for beam in (1, 3)]
    wrong: list[object] = []

    def work() -> None:
        for _ in range(4):
            found = [captioner(photos, beam=beam) for beam in (1, 3)]
            if found != expected:
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_close(bundle_path, photos):
    with Captioner.load(bundle_path, threads=1, verify="sizes") as captioner:
        assert captioner(photos[0]).text
    captioner.close()
    for given in (photos[0], []):
        with pytest.raises(UsageError, match="closed"):
            captioner(given)


def test_closing_lets_a_call_finish(bundle_path, photos):
    captioner = Captioner.load(bundle_path, threads=1, verify="sizes")
    expected = captioner(many := [*photos, *photos][: module.BATCH + 2])

    def given():
        for place, each in enumerate(many):
            if place == module.BATCH + 1:  # one batch is done
                captioner.close()
            yield each

    assert captioner(given()) == expected
    with pytest.raises(UsageError, match="closed"):
        captioner(photos[0])


def test_what_is_no_photo(captioner):
    for nothing in (None, 3, object()):
        with pytest.raises(UsageError, match=f"a photo is .*, not {type(nothing).__name__}"):
            captioner(nothing)


def test_batches_are_bounded(captioner, photos, monkeypatch):
    sizes: list[int] = []
    real = module.decode
    monkeypatch.setattr(
        module, "decode", lambda s, pixels, *a, **k: sizes.append(len(pixels)) or real(s, pixels, *a, **k)
    )
    captioner(photos)
    assert sizes == [module.BATCH, len(photos) - module.BATCH]


def test_broken_tokenizer(bundle_copy):
    from .test_bundle import change_manifest

    (bundle_copy / "tokenizer.json").write_text("{}")

    def change(values):
        values["files"]["tokenizer.json"]["bytes"] = 2

    change_manifest(bundle_copy, change)
    with pytest.raises(EdgecapError, match="tokenizer.json is not a tokenizer"):
        Captioner.load(bundle_copy, verify="sizes")


# --- the golden pair --------------------------------------------------------------------------------


def test_golden(captioner):
    result = verify_golden(captioner)
    assert result.ok and result.same_tokens and result.tokens_differ_at is None
    assert result.min_cosine > 0.999999 and result.max_difference < 1e-4
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True


def replace_golden(bundle, **golden) -> None:
    from .test_bundle import change_manifest

    def change(values):
        values["golden"] |= golden
        values["files"]["golden.npy"]["bytes"] = (bundle / "golden.npy").stat().st_size

    change_manifest(bundle, change)


def check(bundle):
    return verify_golden(Captioner.load(bundle, threads=1, verify="sizes"))


def test_golden_tokens_differ(bundle_copy, captioner):
    tokens = list(captioner.bundle.manifest["golden"]["token_ids"])
    tokens[1] = (tokens[1] + 1) % len(WORDS)
    replace_golden(bundle_copy, token_ids=tokens, tolerance={"same_tokens": True, "min_cosine": -1})
    result = check(bundle_copy)
    assert not result.ok and result.tokens_differ_at == 1
    replace_golden(bundle_copy, tolerance={"same_tokens": False, "min_cosine": -1})
    assert check(bundle_copy).ok


def test_golden_is_plain_greedy_whatever_the_decoding(bundle_copy):
    from .test_bundle import change_manifest

    decoding = {"beam": 3, "max_length": 2, "min_length": 1, "length_penalty": 1.0, "no_repeat_ngram": 1}
    change_manifest(bundle_copy, lambda values: {**values, "decoding": decoding})
    assert check(bundle_copy).ok


def test_golden_caption_that_ends_must_end(bundle_copy, captioner):
    golden = captioner.bundle.manifest["golden"]
    tokens = golden["token_ids"][:2]
    logits = np.load(bundle_copy / "golden.npy")[:3]
    np.save(bundle_copy / "golden.npy", logits)
    replace_golden(bundle_copy, token_ids=tokens)
    assert check(bundle_copy).ok  # cut off at two tokens: what comes next is open
    logits[2, TOKENS["eos"]] = logits[2].max() + 1e-3  # ended there: this bundle goes on
    np.save(bundle_copy / "golden.npy", logits)
    replace_golden(bundle_copy, tolerance={"same_tokens": True, "min_cosine": -1})
    result = check(bundle_copy)
    assert not result.ok and result.tokens_differ_at == 2


def test_golden_logits_differ(bundle_copy):
    logits = np.load(bundle_copy / "golden.npy")
    logits[2] = -logits[2]
    np.save(bundle_copy / "golden.npy", logits)
    result = check(bundle_copy)
    assert not result.ok and result.min_cosine < -0.99


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not numpy",
        np.zeros((2, 2)),
        np.array([{}], object),
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 999999999), }".ljust(
            128
        ),
    ],
    ids=["empty", "other", "shape", "objects", "giant"],
)
def test_golden_broken(bundle_copy, content):
    file = bundle_copy / "golden.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    replace_golden(bundle_copy)
    with pytest.raises(EdgecapError, match="golden.npy"):
        check(bundle_copy)

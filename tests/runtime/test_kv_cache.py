"""The buffer of keys and values against plain copies of every row."""

from __future__ import annotations

import numpy as np
import pytest

from edgecap.runtime.errors import BundleError, UsageError
from edgecap.runtime.kv_cache import SPARE, KVCache
from edgecap.runtime.manifest import check_manifest

from .graphs import gru_graphs, manifest, tensor

TENSORS, HEADS, DIM = 4, 2, 3


def write(cache: KVCache, random: np.random.Generator, count: int) -> np.ndarray:
    """What an engine does: `count` more positions in every row, each unlike all others. Returns all that is filled."""
    cache.reserve(count)
    for each in cache.tensors():
        each[:, :, cache.length : cache.length + count] = random.normal(size=(cache.rows, HEADS, count, DIM))
        each[:, :, cache.length + count :] = np.nan
    cache.advance(count)
    return filled(cache)


def filled(cache: KVCache) -> np.ndarray:
    return np.stack(cache.tensors())[:, :, :, : cache.length]  # [tensors, rows, heads, length, dim]


@pytest.mark.parametrize("seed", range(30))
def test_rows_go_where_their_parents_were(seed: int) -> None:
    random = np.random.default_rng(seed)
    cache = KVCache(TENSORS, HEADS, DIM, 200)
    cache.clear(int(random.integers(1, 5)))
    known = write(cache, random, int(random.integers(1, 9)))
    for _ in range(25):
        rows = int(random.integers(1, 10))
        kind = random.integers(3)
        if kind == 0:  # any rows, many of them twice
            parents = random.integers(0, cache.rows, rows).tolist()
        elif kind == 1:  # a permutation: circles
            parents = random.permutation(cache.rows).tolist()
        else:  # some captions are finished
            parents = sorted(random.permutation(cache.rows)[:rows].tolist())
        cache.reorder(parents)
        assert cache.rows == len(parents)
        known = known[:, parents]
        np.testing.assert_array_equal(filled(cache), known)
        more = int(random.integers(0, 4))
        known = np.concatenate((known, write(cache, random, more)[:, :, :, known.shape[3] :]), 3)
        np.testing.assert_array_equal(filled(cache), known)


def test_a_row_that_stays_is_not_copied_and_no_buffer_moves() -> None:
    cache, random = KVCache(TENSORS, HEADS, DIM, 64), np.random.default_rng(0)
    cache.clear(4)
    write(cache, random, 5)
    places, version = [each.ctypes.data for each in cache.tensors()], cache.version
    cache._store.flags.writeable = False  # a copy would be an error
    cache.reorder([0, 1, 2, 3])
    assert cache.version == version
    cache.reorder([0, 1, 2])
    assert cache.version > version and [each.ctypes.data for each in cache.tensors()] == places
    cache._store.flags.writeable = True
    cache.reorder([2, 1, 0])
    write(cache, random, SPARE)
    assert [each.ctypes.data for each in cache.tensors()] == places
    for each in cache.tensors(1, 2):
        assert each.flags.c_contiguous and each.shape == (1, HEADS, cache.capacity, DIM)


def test_it_grows_by_doubling_up_to_the_models_positions() -> None:
    cache, random = KVCache(TENSORS, HEADS, DIM, 300), np.random.default_rng(0)
    cache.clear(2)
    known, capacities = write(cache, random, 10), [cache.capacity]
    while cache.length < 300:
        known = np.concatenate((known, write(cache, random, 1)[:, :, :, -1:]), 3)
        capacities.append(cache.capacity)
    np.testing.assert_array_equal(filled(cache), known)
    assert sorted(set(capacities)) == [10 + SPARE, 84, 168, 300]
    with pytest.raises(UsageError, match=r"need 301 positions and the model has 300: ask for a smaller max_length"):
        cache.reserve(1)
    cache.clear(2)
    assert cache.length == 0 and cache.capacity == 300  # kept for the next photos
    with pytest.raises(UsageError, match="need 301 positions"):
        cache.reserve(301)


def test_what_a_row_has_read_is_saved_and_loaded_into_others() -> None:
    cache, random = KVCache(TENSORS, HEADS, DIM, 100), np.random.default_rng(0)
    cache.clear(3)
    known = write(cache, random, 7)
    saved = cache.save(1)
    write(cache, random, 2)
    for rows in (1, 5, 2):
        cache.load(saved, rows)
        assert (cache.rows, cache.length) == (rows, 7)
        for row in range(rows):
            np.testing.assert_array_equal(filled(cache)[:, row], known[:, 1])
        write(cache, random, 3)
    other = KVCache(TENSORS, HEADS, DIM, 6)
    with pytest.raises(UsageError, match="need 7 positions and the model has 6"):
        other.load(saved, 1)


# --- what bundle.json says of it --------------------------------------------------------------------


def with_cache() -> dict:
    """A manifest of a decoder with one layer's cache in place."""
    _, parts = gru_graphs()
    decoder = {
        "file": "decoder.onnx",
        "inputs": {
            "ids": tensor("int64", "rows", "length"),
            "past_k": tensor("float32", "rows", HEADS, "capacity", DIM),
            "past_v": tensor("float32", "rows", HEADS, "capacity", DIM),
            "filled": tensor("int32"),
        },
        "outputs": {
            "logits": tensor("float32", "rows", 14),
            "present_k": tensor("float32", "rows", HEADS, "capacity", DIM),
            "present_v": tensor("float32", "rows", HEADS, "capacity", DIM),
        },
    }
    kv = [{"input": f"past_{part}", "output": f"present_{part}", "heads": HEADS, "dim": DIM} for part in "kv"]
    session = {
        "ids": {"input": "ids", "rank": 2},
        "logits": "logits",
        "positions": 64,
        "kv": kv,
        "cache": {"filled": "filled"},
    }
    files = {name: {"bytes": 1, "sha256": "0" * 64} for name in ("encoder.onnx", "decoder.onnx", "tokenizer.json")}
    files |= {name: {"bytes": 1, "sha256": "0" * 64} for name in ("golden.png", "golden.npy")}
    graphs = {"encoder": parts["graphs"]["encoder"], "decoder": decoder}
    return {**manifest({"graphs": graphs, "session": session}), "files": files}


def test_a_manifest_may_say_that_the_cache_is_in_place() -> None:
    check_manifest(with_cache())
    grown = with_cache()  # the form of earlier bundles
    del grown["session"]["cache"], grown["session"]["positions"], grown["graphs"]["decoder"]["inputs"]["filled"]
    check_manifest(grown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["session"].pop("positions"), "session.cache needs kv, positions and ids of rank 2"),
        (lambda m: m["session"]["ids"].update(rank=1), "session.cache needs kv, positions and ids of rank 2"),
        (lambda m: m["session"].update(positions=0), "session.positions must be from 1"),
        (lambda m: m["session"].update(cache={}), "session.cache.filled is missing"),
        (lambda m: m["session"].pop("cache"), "disagree about filled"),
        (lambda m: m["graphs"]["decoder"]["inputs"].pop("filled"), "disagree about filled"),
        (lambda m: m["session"]["kv"][1].update(heads=HEADS + 1), "disagree about past_v"),
        (lambda m: m["session"]["kv"][0].update(dim=DIM + 1), "disagree about past_k"),
        (lambda m: m["graphs"]["decoder"]["outputs"]["present_v"]["shape"].pop(), "disagree about present_v"),
        (lambda m: m["graphs"]["decoder"]["inputs"]["past_v"].update(dtype="float16"), "disagree about past_v"),
        (lambda m: m["graphs"]["decoder"]["outputs"]["logits"].update(shape=["rows", "v"]), "size of the vocabulary"),
    ],
)
def test_a_manifest_whose_cache_does_not_fit_is_refused(change, message: str) -> None:
    wrong = with_cache()
    change(wrong)
    with pytest.raises(BundleError, match=message) as caught:
        check_manifest(wrong)
    assert "\n" not in caught.value.message

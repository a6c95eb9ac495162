"""The learnt positions of smaller photos: those that transformers' own vision embeddings look up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgecap.runtime import UsageError
from edgecap.runtime.positions import along, position_ids

EXACT = [*range(1, 19), 26, 27, 32]  # 26: Idefics3, 27: SmolVLM-2.2B, 32: SmolVLM-256M and 500M; 6: our small ones


def embeddings(kind: str, native: int) -> Any:
    """transformers' module, its patches empty and its positions their own numbers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    stem = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    config = getattr(transformers, f"{stem}VisionConfig")(hidden_size=1, image_size=native, patch_size=1)
    room = getattr(transformers.models, kind)
    module = getattr(getattr(room, f"modeling_{kind}"), f"{stem}VisionEmbeddings")(config)
    with torch.no_grad():
        for parameter in module.patch_embedding.parameters():
            parameter.zero_()
        module.position_embedding.weight[:, 0] = torch.arange(native * native)
    return module


def theirs(module: Any, masks: np.ndarray) -> np.ndarray:
    """Its positions for photos of masks [photos, rows, columns] patches: int64 of the same shape."""
    import torch

    pixels = torch.zeros(len(masks), 3, *masks.shape[1:])
    with torch.no_grad():
        found = module(pixels, torch.from_numpy(masks))
    return found.reshape(masks.shape).long().numpy()


@pytest.mark.parametrize("native", EXACT)
def test_every_size_up_to_the_native_one_has_the_positions_of_transformers(native):
    module = embeddings("smolvlm", native)
    for side in range(1, native + 1):
        found = theirs(module, np.ones((1, side, side), bool))
        assert np.array_equal(found.reshape(-1), position_ids(side, side, native))
    assert np.array_equal(position_ids(native, native, native), np.arange(native * native))


@pytest.mark.parametrize(("kind", "native"), [("smolvlm", 27), ("idefics3", 32)])
def test_photos_that_are_not_square_and_photos_filled_up(kind, native):
    """A mask says which part of the input is photo. Behind it all positions are 0, and attention leaves them out."""
    module = embeddings(kind, native)
    for rows, columns in ((1, native), (native, 3), (7, 20), (24, 16)):
        found = theirs(module, np.ones((1, rows, columns), bool))
        assert np.array_equal(found.reshape(-1), position_ids(rows, columns, native))
    sizes = [(rows, columns) for rows in range(1, native + 1) for columns in range(1, native + 1)]
    masks = np.zeros((len(sizes), native, native), bool)
    for mask, (rows, columns) in zip(masks, sizes, strict=True):
        mask[:rows, :columns] = True
    found = theirs(module, masks)
    assert not found[~masks].any()
    for positions, (rows, columns) in zip(found, sizes, strict=True):
        assert np.array_equal(positions[:rows, :columns].reshape(-1), position_ids(rows, columns, native))


def test_whole_numbers_are_what_float32_comes_to():
    """The module's arithmetic without the module: float32 boundaries, counted by comparison, as a graph would."""
    for native in EXACT:
        boundaries = (np.arange(1, native) / native).astype(np.float32)
        for patches in range(1, native + 1):
            places = np.arange(patches, dtype=np.float32) * (np.float32(1) / np.float32(patches))
            counted = (np.minimum(places, np.float32(1 - 1e-6))[:, None] >= boundaries).sum(1)
            assert np.array_equal(along(patches, native), counted), (native, patches)


def test_the_sizes_of_smolvlm_256m():
    assert along(32, 32).tolist() == list(range(32))
    assert along(16, 32).tolist() == list(range(0, 32, 2))
    assert along(24, 32)[:6].tolist() == [0, 1, 2, 4, 5, 6]
    assert along(24, 32).dtype == np.int64


@pytest.mark.parametrize(("rows", "columns", "native"), [(0, 1, 4), (1, 5, 4), (True, 1, 4), (1, 1, 0), (1.0, 1, 4)])
def test_impossible_sizes_are_one_line(rows, columns, native):
    with pytest.raises(UsageError, match="a side"):
        position_ids(rows, columns, native)

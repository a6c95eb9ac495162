"""Frames of photos of every size, value for value those of transformers' image processors that work in Pillow."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from edgecap.runtime import EdgecapError, UsageError, load_image
from edgecap.runtime.frames import Framing

SMALL = Framing(side=512, native=512, patch=16, scale=4, longest_edge=2048, split=True)  # SmolVLM-256M and 500M
LARGE = Framing(side=384, native=384, patch=14, scale=3, longest_edge=1536, split=True)  # SmolVLM, SmolVLM2-2.2B
TINY = Framing(side=32, native=32, patch=4, scale=2, longest_edge=96, split=True)


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    """Shapes on noise."""
    random = np.random.default_rng([width, height, seed])
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for _ in range(4):
        x, y = (int(random.integers(0, side)) for side in image.size)
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        ImageDraw.Draw(image).ellipse((x - width / 4, y - height / 4, x + width / 4, y + height / 4), fill=colour)
    return image


def processor(framing: Framing, kind: str = "smolvlm") -> Any:
    transformers = pytest.importorskip("transformers")
    stem = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    module = getattr(getattr(transformers.models, kind), f"image_processing_pil_{kind}")
    return getattr(module, f"{stem}ImageProcessorPil")(
        do_resize=bool(framing.longest_edge),
        size={"longest_edge": framing.longest_edge or 1},
        max_image_size={"longest_edge": framing.side},
        do_image_splitting=framing.split,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def check(framing: Framing, image: Image.Image, given: Image.Image | None = None, kind: str = "smolvlm") -> None:
    """Our frames of `image` are theirs of `given` (the same, where it is None)."""
    theirs = processor(framing, kind)
    asked = {"return_tensors": "np", "return_row_col_info": True}
    raw = theirs([given or image], do_rescale=False, do_normalize=False, **asked)
    ours = framing(image)
    assert ours.pixels.dtype == np.uint8 and raw["pixel_attention_mask"].all()
    assert np.array_equal(ours.pixels.transpose(0, 3, 1, 2), raw["pixel_values"][0])
    assert (ours.rows, ours.columns) == (raw["rows"][0][0], raw["cols"][0][0]) == framing.grid(*image.size)
    assert len(ours.pixels) == (ours.rows * ours.columns + 1 if ours.rows else 1)


@pytest.mark.parametrize(
    ("framing", "width", "height"),
    [
        (SMALL, 333, 500),
        (SMALL, 512, 512),
        (SMALL, 21, 17),
        (SMALL, 3, 400),
        (SMALL, 4200, 1801),
        (LARGE, 641, 479),
        (SMALL.at(512), 640, 479),
        (LARGE.at(384), 100, 901),
    ],
)
def test_published_settings(framing, width, height):
    check(framing, drawn(width, height))


@pytest.mark.parametrize("side", [256, 384, 512])
def test_the_sizes_of_a_budget(side):
    """One frame of that size, as of a processor that is asked for it; and resampled once, as of one that is told not
    to resize first."""
    framing, photo = SMALL.at(side), drawn(640, 427)
    assert framing.most == 0 and framing.tokens == {256: 16, 384: 36, 512: 64}[side]
    check(framing, photo)
    once = Framing(side, 512, 16, 4)
    check(once, photo)
    assert once(photo).pixels.shape == (1, side, side, 3)


def test_many_sizes_and_settings():
    random = np.random.default_rng(5)
    for case in range(150):
        width, height = (int(v) for v in random.integers(1, 130, 2))
        framing = Framing(
            side=int(random.choice([8, 16, 24, 32])),
            native=32,
            patch=4,
            scale=2,
            longest_edge=int(random.choice([0, 31, 32, 33, 64, 70, 95])),
            split=bool(random.integers(2)),
            resample=str(random.choice(["lanczos", "lanczos", "bicubic", "bilinear"])),
        )
        theirs = processor(framing)
        number = {"lanczos": 1, "bilinear": 2, "bicubic": 3}[framing.resample]
        image = drawn(width, height, case)
        raw = theirs([image], do_rescale=False, do_normalize=False, resample=number, return_tensors="np")
        ours = framing(image)
        assert np.array_equal(ours.pixels.transpose(0, 3, 1, 2), raw["pixel_values"][0]), (width, height, framing)
        most = framing.most
        assert most is None or max(ours.rows, ours.columns) <= most


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_both_processors_and_what_normalising_makes_of_it(kind):
    image = drawn(150, 70)
    check(TINY, image, kind=kind)
    theirs = processor(TINY, kind)([image], return_tensors="np")["pixel_values"][0]
    ours = (TINY(image).pixels * (1 / 255)).astype(np.float32)
    ours = (ours - np.float32(0.5)) / np.float32(0.5)
    assert theirs.dtype == np.float32 and np.array_equal(ours.transpose(0, 3, 1, 2), theirs)


def sizes_of_transformers(framing: Framing, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: (width, height) → (rows, columns), by the processor's own steps on pictures without pixels."""
    theirs = processor(framing)
    from transformers.image_processing_backends import PilBackend

    def empty(self: Any, image: np.ndarray, size: Any, **more: Any) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))

    monkeypatch.setattr(PilBackend, "resize", empty)
    from transformers.image_utils import SizeDict

    def sizes(width: int, height: int) -> tuple[int, int]:
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        image = theirs.resize(image, SizeDict(longest_edge=framing.longest_edge))
        image = theirs.resize_for_vision_encoder(image, framing.side)
        _, rows, columns = theirs.split_images(image, {"longest_edge": framing.side})
        return rows, columns

    return sizes


@pytest.mark.parametrize(
    "framing", [SMALL, LARGE, Framing(364, 364, 14, 2, 1456, True), Framing(512, 512, 16, 4, 5000, True)]
)
def test_grids_of_thousands_of_sizes(framing, monkeypatch):
    """Photos up to far beyond 4096 px; the last framing would have them so large, and the processor's cap holds."""
    theirs, random, seen = sizes_of_transformers(framing, monkeypatch), np.random.default_rng(1), set()
    sides = [
        *range(1, 40),
        *random.integers(1, 9000, 160).tolist(),
        363,
        364,
        365,
        511,
        512,
        513,
        2047,
        2048,
        2049,
        4097,
    ]
    for width in sides[::5]:
        for height in sides:
            grid = framing.grid(width, height)
            assert grid == theirs(width, height), (width, height)
            assert max(grid) <= framing.most
            seen.add(grid)
    assert max(seen) == (framing.most, framing.most) and len(seen) > 6


def test_most_tiles_where_the_shorter_side_is_made_even():
    odd = Framing(31, 31, 31, 1, longest_edge=31, split=True)
    assert odd.grid(50, 50) == (2, 2) and odd.most == 2  # 31 × 31 becomes 31 × 32
    check(odd, drawn(50, 50))
    assert Framing(32, 32, 4, 2, longest_edge=32, split=True).most == 0
    assert Framing(32, 32, 4, 2, split=True).most is None
    assert (SMALL.most, LARGE.most, Framing(512, 512, 16, 4, 9999, True).most) == (4, 4, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    drawn(90, 40).save(path, exif=exif)
    check(TINY, load_image(path), given=ImageOps.exif_transpose(Image.open(path)))
    assert TINY.load(path).pixels.shape == TINY(load_image(path)).pixels.shape


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_photos_of_other_modes(mode):
    image = drawn(70, 50)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    check(TINY, load_image(image), given=image)


def test_a_large_jpeg_is_read_smaller_only_where_it_is_resampled_once(tmp_path):
    path = tmp_path / "large.jpg"
    Image.radial_gradient("L").resize((1200, 900)).convert("RGB").save(path, quality=95)
    for framing in (TINY, TINY.at(32)):
        assert np.array_equal(framing.load(path).pixels, framing(load_image(path)).pixels)
    once = Framing(32, 32, 4, 2)
    loaded = once.load(path).pixels
    assert loaded.shape == (1, 32, 32, 3)
    assert np.abs(loaded.astype(int) - once(load_image(path)).pixels).max() <= 8


def test_to_and_from_json():
    for framing in (SMALL, TINY.at(16)):
        text = json.dumps(framing.to_dict())
        assert Framing.from_dict(json.loads(text)) == framing
        assert Framing.from_dict(json.loads(text) | {"later": 1}) == framing


def test_from_the_files_of_a_model(tmp_path):
    published = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_resize": True,
        "image_processor_type": "Idefics3ImageProcessor",
        "max_image_size": {"longest_edge": 512},
        "resample": 1,
        "size": {"longest_edge": 2048},
    }
    sizes = {"native": 512, "patch": 16, "scale": 4}
    assert Framing.from_processor(published, **sizes) == SMALL
    assert Framing.from_processor({}, native=364, patch=14, scale=2) == Framing(364, 364, 14, 2, 4 * 364, True)
    unsplit = published | {"do_image_splitting": False, "do_resize": False, "resample": 3}
    assert Framing.from_processor(unsplit, **sizes) == Framing(512, 512, 16, 4, resample="bicubic")
    processor(TINY).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert Framing.from_processor(saved, native=32, patch=4, scale=2) == TINY
    for change, match in (
        ({"size": {"shortest_edge": 9}}, "size has no longest_edge"),
        ({"size": 512}, "size has no longest_edge"),
        ({"max_image_size": {"longest_edge": "512"}}, "max_image_size has no longest_edge"),
        ({"resample": 0}, "resample 0 is none of"),
        ({"resample": "cubic"}, "resample 'cubic' is none of"),
        ({"resample": [1]}, "is none of"),
        ({"max_image_size": {"longest_edge": 1024}}, "a multiple of 64 px up to 512 .the nearest: 512., not 1024"),
    ):
        with pytest.raises(UsageError, match=match):
            Framing.from_processor(published | change, **sizes)


@pytest.mark.parametrize(
    ("framing", "side", "match"),
    [
        (SMALL, 250, r"a multiple of 64 px up to 512 \(the nearest: 256\), not 250"),
        (SMALL, 30, "the nearest: 64"),
        (SMALL, 576, "the nearest: 512"),
        (LARGE, 256, r"a multiple of 42 px up to 378 or 384 \(the nearest: 252\), not 256"),
        (SMALL, 0, "from 1 to 4096, not 0"),
    ],
)
def test_sizes_that_the_model_cannot_see(framing, side, match):
    with pytest.raises(UsageError, match=match):
        framing.at(side)


def test_sizes_that_it_can():
    assert [LARGE.at(side).tokens for side in (384, 378, 252, 42)] == [81, 81, 36, 1]
    assert SMALL.at(256, split=True).most == 8


JUNK = (None, True, 1.5, -1, "512", [], {}, [1], 2**40, float("nan"))


@pytest.mark.parametrize("name", sorted(SMALL.to_dict()))
def test_what_a_broken_bundle_says_is_one_line(name):
    for junk in JUNK:
        if (name, junk) == ("split", True):
            continue
        with pytest.raises(UsageError) as told:
            Framing.from_dict(SMALL.to_dict() | {name: junk})
        assert len(told.value.message) < 160 and "\n" not in str(told.value)
    if name in ("side", "native", "patch", "scale"):
        with pytest.raises(UsageError, match=f"{name} is missing"):
            Framing.from_dict({key: value for key, value in SMALL.to_dict().items() if key != name})
    for junk in JUNK:
        with pytest.raises(UsageError):
            Framing.from_dict(junk)


def test_sizes_that_do_not_fit_each_other():
    with pytest.raises(UsageError, match="whole groups of 4 patches of 14 px"):
        Framing(384, 384, 14, 4)
    with pytest.raises(UsageError, match="whole groups"):
        Framing(8, 8, 16, 1)


def test_photos_that_cannot_be_cut():
    with pytest.raises(UsageError, match="not L: open it with load_image"):
        TINY(Image.new("L", (9, 9)))
    with pytest.raises(EdgecapError, match="nothing to see"):
        TINY(Image.new("RGB", (0, 9)))
    long = Image.new("RGB", (200_000, 1))
    assert TINY(long).pixels.shape == (4, 32, 32, 3)
    with pytest.raises(EdgecapError, match="in tiles, more than .* make it smaller first"):
        Framing(512, 512, 16, 4, split=True)(long)

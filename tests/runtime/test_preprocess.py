"""Photos of every kind a user may have, drawn here, and what is none: right colours, upright, or one clear line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgecap.runtime import EdgecapError, Preprocess, UsageError, load_image
from edgecap.runtime import preprocess as module

RED, BLUE = (200, 30, 20), (10, 40, 220)


def drawing(width: int = 48, height: int = 32) -> Image.Image:
    """Red, with a blue upper left quarter."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, 0, width // 2, height // 2))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def close(image: Image.Image, expected: Image.Image, tolerance: float = 3.0) -> None:
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.abs(np.asarray(image, float) - np.asarray(expected.convert("RGB"), float))
    assert difference.mean() <= tolerance, difference.mean()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
        ("GIF", {}),
    ],
)
def test_formats(kind, options):
    close(load_image(encoded(drawing(), kind, **options)), drawing())


def test_every_way_to_give_a_photo(tmp_path):
    path = tmp_path / "photo.png"
    drawing().save(path)
    for source in (str(path), path, path.read_bytes(), drawing(), np.asarray(drawing())):
        close(load_image(source), drawing(), 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(orientation, kind):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = drawing().transpose(undo[orientation]) if orientation > 1 else drawing()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {}
    close(load_image(encoded(stored, kind, exif=exif, **options)), drawing())


@pytest.mark.parametrize("exif", [b"Exif\x00\x00broken", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"])
def test_broken_exif_does_not_cost_the_photo(exif):
    close(load_image(encoded(drawing(), "JPEG", exif=exif, quality=95)), drawing())


def test_orientation_out_of_range():
    exif = Image.Exif()
    exif[0x0112] = 77
    close(load_image(encoded(drawing(), "PNG", exif=exif)), drawing())


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "HSV", "LAB"])
def test_modes(mode):
    source = drawing().convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        source = Image.new("LAB", (48, 32), (128, 128, 128))
        expected = Image.new("RGB", (48, 32), (119, 119, 119))
        close(load_image(source), expected, 12)
    else:
        close(load_image(source), source.convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P"])
def test_modes_from_files(mode):
    source = drawing().convert("L").convert(mode) if mode == "LA" else drawing().convert(mode)
    close(load_image(encoded(source, "PNG")), source.convert("RGB"))


def half_transparent() -> tuple[Image.Image, Image.Image]:
    """The drawing with a transparent right half, and how it looks on white."""
    image = drawing().convert("RGBA")
    image.paste((0, 0, 0, 0), (24, 0, 48, 32))
    white = drawing()
    white.paste((255, 255, 255), (24, 0, 48, 32))
    return image, white


def test_transparency_is_laid_over_white():
    image, white = half_transparent()
    close(load_image(encoded(image, "PNG")), white, 0)
    close(load_image(encoded(image, "WEBP", lossless=True)), white, 0)
    close(load_image(image.convert("RGBa")), white, 1)
    close(load_image(np.asarray(image)), white, 0)


def test_half_transparency_mixes_with_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert abs(load_image(encoded(image, "PNG")).getpixel((0, 0))[0] - 127) <= 1
    grey = Image.new("LA", (8, 8), (0, 128))
    assert abs(load_image(encoded(grey, "PNG")).getpixel((0, 0))[0] - 127) <= 1


def test_palette_with_transparency():
    image = Image.new("P", (48, 32), 0)
    image.putpalette([*RED, *BLUE, 0, 0, 0])
    image.paste(1, (0, 0, 24, 16))
    image.paste(2, (24, 0, 48, 32))
    expected = drawing()
    expected.paste((255, 255, 255), (24, 0, 48, 32))
    for kind in ("PNG", "GIF"):
        close(load_image(encoded(image, kind, transparency=2)), expected, 0)


def test_colour_key_transparency():
    expected = drawing()
    expected.paste("white", (0, 0, 24, 16))
    close(load_image(encoded(drawing(), "PNG", transparency=BLUE)), expected, 0)


def test_sixteen_bit_grey():
    ramp = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    expected = Image.fromarray((ramp >> 8).astype(np.uint8))
    for kind in ("PNG", "TIFF"):
        close(load_image(encoded(Image.fromarray(ramp), kind)), expected, 0)
    close(load_image(Image.fromarray(ramp.astype(np.int32))), expected, 0)
    close(load_image(Image.fromarray((ramp / 65535).astype(np.float32))), expected, 1)


def test_sixteen_bit_colour():
    """A 16-bit RGB PNG, written by hand because Pillow cannot."""
    pixels = np.zeros((4, 4, 3), ">u2")
    pixels[:] = np.array(RED, ">u2") * 257
    rows = b"".join(b"\x00" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    close(load_image(data), Image.new("RGB", (4, 4), RED), 0)


def test_cmyk_jpeg():
    """Adobe's CMYK JPEGs are stored inverted; read wrongly they look like negatives."""
    cmyk = drawing().convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=95)
    assert b"Adobe" in data
    close(load_image(data), drawing(), 4)
    close(load_image(encoded(cmyk, "TIFF")), drawing(), 1)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in (BLUE, RED)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0],
            kind,
            save_all=True,
            append_images=frames[1:],
            duration=50,
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        close(load_image(data), frames[0], 1)


# --- what cannot be read ----------------------------------------------------------------------------


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(EdgecapError) as caught:
        load_image(source, **options)
    assert "\n" not in str(caught.value)
    return caught.value.message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_at_any_place(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / "half"
    for size in {1, 10, 30, len(data) // 4, len(data) // 2, len(data) * 3 // 4}:
        path.write_bytes(data[:size])
        assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_damaged_bytes_give_a_photo_or_one_line(kind):
    rng = np.random.default_rng(1)
    data = encoded(drawing(), kind)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(len(data))] = rng.integers(256)
        try:
            image = load_image(bytes(damaged), name="x")
        except EdgecapError as error:
            assert error.message.startswith("x: ")
        else:
            assert image.mode == "RGB"


def test_not_an_image(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("these are notes")
    assert refusal(path) == f"{path}: not an image, or of a format that is not supported"


def test_a_broken_image_that_was_opened_elsewhere():
    file = io.BytesIO()
    Image.effect_noise((80, 60), 60).save(file, "JPEG")
    image = Image.open(io.BytesIO(file.getvalue()[:-900]))
    with pytest.raises(EdgecapError, match="^the image: broken image .truncated file.$"):
        load_image(image)


def test_empty_missing_folder(tmp_path):
    (tmp_path / "empty.jpg").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.jpg")
    assert "no such file" in refusal(tmp_path / "missing.jpg")
    assert "folder" in refusal(tmp_path)
    assert "the image: the file is empty" in refusal(b"")
    assert "no such file" in refusal("a\x00b")


def test_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 50)
    drawing().save(tmp_path / "big.png")
    assert "more than the limit of 50" in refusal(tmp_path / "big.png")
    assert "holiday: " in refusal(bytes(51), name="holiday")


def test_too_many_pixels(monkeypatch):
    """The header alone decides: a decompression bomb is never unpacked."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert "pixels" in refusal(bomb)
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    assert "48×32 pixels" in refusal(drawing())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["float", "two channels", "flat", "empty"],
)
def test_bad_arrays(array):
    with pytest.raises(UsageError, match="array"):
        load_image(array)


def test_not_a_source():
    with pytest.raises(UsageError, match="not int"):
        load_image(3)


# --- preprocessing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_photo_of_the_size_is_not_resampled(mode, resample):
    array = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    assert np.array_equal(Preprocess((32, 48), mode, resample)(Image.fromarray(array)), array)


def test_squash_keeps_all_and_crop_keeps_the_middle():
    image = Image.new("RGB", (90, 30), RED)
    image.paste(BLUE, (30, 0, 60, 30))  # the middle third
    squashed = Preprocess((32, 32), "squash")(image)
    assert tuple(squashed[16, 2]) == RED and tuple(squashed[16, 16]) == BLUE and tuple(squashed[16, 29]) == RED
    cropped = Preprocess((32, 32), "crop")(image)
    assert (cropped[:, 2:-2] == np.array(BLUE)).all()  # at the edges the filter reaches over
    upright = Preprocess((32, 32), "crop")(image.transpose(Image.Transpose.ROTATE_90))
    assert (upright[2:-2] == np.array(BLUE)).all()


@pytest.mark.parametrize(("resample", "filter"), [("bilinear", 2), ("bicubic", 3)])
def test_resampling_is_pillows(resample, filter):
    array = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = Image.fromarray(array)
    expected = np.asarray(image.resize((24, 16), filter))
    assert np.array_equal(Preprocess((16, 24), "squash", resample)(image), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_shapes(size):
    for mode in ("squash", "crop"):
        assert Preprocess((16, 20), mode)(Image.new("RGB", size, RED)).shape == (16, 20, 3)


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_small(mode, orientation):
    # Smooth with a few hard edges, as photographs are.
    y, x = np.mgrid[0:1200, 0:1800] / 1800
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(14 * y - 3 * x), np.sin(20 * x * y)], axis=2)
    image = Image.fromarray((127 + 120 * waves).astype(np.uint8))
    image.paste(BLUE, (300, 200, 900, 700))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", quality=92, exif=exif)
    chosen = Preprocess((96, 128), mode)
    small = load_image(data, target=chosen.size)
    assert min(small.size) >= 2 * 128 and max(small.size) <= 900
    assert (small.width > small.height) == (orientation == 1)
    difference = np.abs(chosen.load(data).astype(int) - chosen(load_image(data)))
    assert difference.max() <= 4 and difference.mean() < 0.5


def test_round_trip():
    chosen = Preprocess((192, 224), "crop", "bicubic")
    assert Preprocess.from_dict(chosen.to_dict()) == chosen


@pytest.mark.parametrize(
    "wrong",
    [
        ((0, 3), "squash", "bilinear"),
        ((3, 3), "stretch", "bilinear"),
        ((3, 3), "crop", "nearest"),
        ((9999, 3), "crop", "bilinear"),
    ],
)
def test_bad_settings(wrong):
    with pytest.raises(UsageError, match="preprocessing"):
        Preprocess(*wrong)


def test_photographs(data_folder: Path):
    for path in sorted((data_folder / "photos").glob("*.jpg")):
        close(load_image(path), Image.open(path).convert("RGB"), 0)

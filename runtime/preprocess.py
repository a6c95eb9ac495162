"""Any photo a user may have → RGB → the uint8 pixels a graph takes. Normalisation is inside the graph."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import EdgecapError, UsageError

if TYPE_CHECKING:
    from .session import Pixels

    ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

MAX_BYTES = 128 * 2**20
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MB as RGB
MAX_SIDE = 4096  # of what a graph may ask for

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def load_image(source: ImageSource, *, name: str | None = None, target: tuple[int, int] | None = None) -> Image.Image:
    """Open a photo as upright 8-bit RGB.

    source: a path, the bytes of an image file, a PIL image, or an array uint8 [H, W], [H, W, 3] or [H, W, 4].
    Transparency is laid over white; 16-bit values keep their upper byte; of an animation the first frame counts.
    target: the (height, width) it will be reduced to. A JPEG far larger is then decoded at a fraction of its size,
    at least twice the target: for 12 megapixels a fifth of the time, and pixels at 224 that differ by 2 of 255 at most.
    Raises EdgecapError, naming `name` (default: the path), if it is missing, empty, truncated, larger than MAX_BYTES
    or MAX_PIXELS, or not an image.
    """
    if name is None:
        name = str(source) if isinstance(source, str | os.PathLike) else "the image"
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    try:
        if isinstance(source, Image.Image):
            return _finish(source, name)
        if isinstance(source, bytes | bytearray | memoryview):
            import io

            _check_bytes(memoryview(source).nbytes, name)
            with Image.open(io.BytesIO(source)) as image:
                return _finish(image, name, target)
        path = Path(source)
        if not path.is_file():
            what = "is a folder, not an image" if path.is_dir() else "there is no such file"
            raise EdgecapError(f"{name}: {what}")
        _check_bytes(path.stat().st_size, name)
        with Image.open(path) as image:
            return _finish(image, name, target)
    except EdgecapError:
        raise
    except TypeError:
        raise UsageError(f"a photo is a path, bytes, a PIL image or an array, not {type(source).__name__}") from None
    except UnidentifiedImageError:
        raise EdgecapError(f"{name}: not an image, or of a format that is not supported") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise EdgecapError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller first") from None
    except MemoryError:
        raise EdgecapError(f"{name}: not enough memory to decode it") from None
    except PermissionError:
        raise EdgecapError(f"{name}: no permission to read it") from None
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on broken files
        raise EdgecapError(f"{name}: broken image ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "truncated file" if "truncated" in text.lower() else (text[:120] or type(error).__name__)


def _check_bytes(size: int, name: str) -> None:
    if size == 0:
        raise EdgecapError(f"{name}: the file is empty")
    if size > MAX_BYTES:
        raise EdgecapError(f"{name}: {size:,} bytes, more than the limit of {MAX_BYTES:,}")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        shape = list(array.shape)
        raise UsageError(f"{name}: an array must be uint8 [height, width, 3], not {array.dtype} {shape}")
    if array.size == 0:
        raise UsageError(f"{name}: the array is empty, {list(array.shape)}")
    return _finish(Image.fromarray(np.ascontiguousarray(array)), name)


def _finish(image: Image.Image, name: str, target: tuple[int, int] | None = None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise EdgecapError(f"{name}: {width}×{height} pixels, more than {MAX_PIXELS:,}; make it smaller first")
    if target and image.format == "JPEG" and image.mode in ("RGB", "L"):
        side = 2 * max(target)  # both ways: the photo may still be turned
        image.draft(image.mode, (side, side))
    image.load()
    orientation = _orientation(image)  # after loading: Pillow turns TIFFs itself, and then drops the tag
    image = _to_rgb(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF must not cost the photo
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Two steps where Pillow has no direct way (La and RGBa are premultiplied alpha).
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey → 8-bit RGB: upper byte of 16 bits; floats in 0–1 or 0–255."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        values = values * 255 if values.size and values.max() <= 1 else values
        grey = np.clip(values, 0, 255)
    else:
        grey = np.clip(values, 0, 65535).astype(np.uint32) >> 8
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """RGB image → pixels uint8 [H, W, 3] of the size the encoder takes.

    size: (height, width). mode "squash": the whole photo, aspect ratio not kept; "crop": the largest centred
    part of the target's aspect ratio; "keep": photos stay as they are, for the frames they are cut into, which have
    this size. resample: Pillow's antialiased "bilinear" or "bicubic". A photo that
    already has the size is not resampled. Raises UsageError for other values.
    """

    size: tuple[int, int]
    mode: Literal["squash", "crop", "keep"] = "squash"
    resample: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.mode not in ("squash", "crop", "keep"):
            raise UsageError(f"preprocessing mode must be 'squash', 'crop' or 'keep', not {self.mode!r}")
        if self.resample not in _RESAMPLE:
            raise UsageError(f"preprocessing resample must be 'bilinear' or 'bicubic', not {self.resample!r}")
        good = len(self.size) == 2 and all(type(side) is int and 1 <= side <= MAX_SIDE for side in self.size)
        if not good:
            raise UsageError(f"preprocessing size must be (height, width) from 1 to {MAX_SIDE}, not {self.size!r}")

    def load(self, source: ImageSource, *, name: str | None = None) -> Pixels:
        """Open a photo (see `load_image`) → uint8 [H, W, 3]."""
        return self(load_image(source, name=name, target=None if self.mode == "keep" else self.size))

    def __call__(self, image: Image.Image) -> Pixels:
        """RGB image of any size → uint8 [H, W, 3]."""
        height, width = self.size
        if image.mode != "RGB":
            image = _to_rgb(image)
        if image.size != (width, height) and self.mode != "keep":
            image = image.resize((width, height), _RESAMPLE[self.resample], box=self._box(image))
        return np.asarray(image)  # [H, W, 3]

    def _box(self, image: Image.Image) -> tuple[float, float, float, float]:
        if self.mode == "squash":
            return (0, 0, image.width, image.height)
        height, width = self.size
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        return (
            max(left, 0),
            max(top, 0),
            min(left + width * scale, image.width),
            min(top + height * scale, image.height),
        )

    def to_dict(self) -> dict[str, Any]:
        """As written in bundle.json."""
        return {"size": list(self.size), "mode": self.mode, "resample": self.resample}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """From bundle.json (or a recipe): size, mode, resample."""
        return cls(tuple(values["size"]), values["mode"], values["resample"])

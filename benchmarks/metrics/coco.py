"""Read what `edgecap score` scores: captions in the COCO results format and references in COCO's or a plain one.

Every id becomes text, so that 42 in one file and "42" in the other are the same photo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...runtime.errors import UsageError


def read_results(path: str | Path) -> dict[str, str]:
    """Captions of a COCO results file, [{"image_id": 1, "caption": "a dog"}, ...], by photo id.

    Raises UsageError, naming file and entry, for unreadable or malformed JSON and for a photo that comes twice.
    """
    entries = _read_json(path)
    if not isinstance(entries, list):
        raise UsageError(f'{path}: expected a list of {{"image_id": ..., "caption": ...}}, found {_kind(entries)}')
    captions: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        photo, caption = _caption(path, "entry", number, entry)
        if photo in captions:
            raise UsageError(f"{path}, entry {number}: image_id {photo} has a caption already; keep one per photo")
        captions[photo] = caption
    return captions


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Reference captions by photo id, from COCO annotations ({"annotations": [{"image_id": 1, "caption": "..."}, ...]})
    or from a plain {"id": ["caption", ...]}.

    Raises UsageError, naming file and entry, for unreadable or malformed JSON.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f'{path}: expected COCO annotations or {{"id": ["caption", ...]}}, found {_kind(content)}')
    references: dict[str, list[str]] = {}
    if isinstance(content.get("annotations"), list):
        for number, entry in enumerate(content["annotations"], 1):
            photo, caption = _caption(path, "annotation", number, entry)
            references.setdefault(photo, []).append(caption)
        return references
    for photo, captions in content.items():
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise UsageError(f"{path}: the references of {photo!r} must be a list of texts")
        references[photo] = captions
    return references


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise UsageError(f"{path}: JSON nested too deep") from error


def _caption(path: str | Path, what: str, number: int, entry: Any) -> tuple[str, str]:
    """The photo id and the caption of one entry, checked."""
    if not isinstance(entry, dict):
        raise UsageError(f"{path}, {what} {number}: expected an object, found {_kind(entry)}")
    photo, caption = entry.get("image_id"), entry.get("caption")
    if not isinstance(photo, int | str) or isinstance(photo, bool):
        raise UsageError(f"{path}, {what} {number}: image_id must be a number or a text")
    if not isinstance(caption, str):
        raise UsageError(f"{path}, {what} {number} (image_id {photo}): caption must be a text")
    return str(photo), caption


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")

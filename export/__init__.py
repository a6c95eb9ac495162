"""Export: a checkpoint becomes a bundle, and the gate says what that cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import runtime  # noqa: F401  what it sets for ONNX Runtime must be set before that is imported

__all__ = ["Exported", "export"]

if TYPE_CHECKING:
    from .pipeline import Exported, export


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

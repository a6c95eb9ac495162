"""edgecap: photos with captions in, a small captioner that runs on the device out, with every step measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Caption", "Captioner", "EdgecapError", "__version__"]

if TYPE_CHECKING:
    from .runtime import Caption, Captioner, EdgecapError


def __getattr__(name: str) -> Any:
    # Lazily, so that `import edgecap` costs nothing and never pulls in an engine.
    if name in ("Caption", "Captioner", "EdgecapError"):
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

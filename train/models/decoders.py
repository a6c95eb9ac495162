"""The table of decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .gru import GRUDecoder
from .llama import LlamaDecoder

DECODERS: dict[str, Callable[..., Any]] = {"gru": GRUDecoder, "llama": LlamaDecoder}

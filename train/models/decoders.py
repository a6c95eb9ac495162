"""The table of decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .gru import GRUDecoder
from .language_models import GPT2Decoder, LlamaDecoder, OPTDecoder
from .lstm import LSTMDecoder
from .transformer import TransformerDecoder

DECODERS: dict[str, Callable[..., Any]] = {
    "gru": GRUDecoder,
    "lstm": LSTMDecoder,
    "transformer": TransformerDecoder,
    "llama": LlamaDecoder,
    "gpt2": GPT2Decoder,
    "opt": OPTDecoder,
}

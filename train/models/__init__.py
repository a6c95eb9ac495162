"""The grid encoder × bridge × decoder: one table a part, one entry a choice."""

from __future__ import annotations

from .bridges import BRIDGES
from .captioner import CaptionModel, TorchSession, build_model
from .decoders import DECODERS
from .encoders import ENCODERS

MODELS = {"encoder": ENCODERS, "bridge": BRIDGES, "decoder": DECODERS}

__all__ = ["BRIDGES", "DECODERS", "ENCODERS", "MODELS", "CaptionModel", "TorchSession", "build_model"]

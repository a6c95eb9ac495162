"""A checkpoint's weights: the whole model's, or where it stores adapters alone, those."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from .lora import read_adapter, write_adapter
from .state import ADAPTER, WEIGHTS, model_tensors, read_tensors, write_tensors


def write_weights(out: Path, model: nn.Module) -> None:
    """Replace a checkpoint's weights by the model's; where it stores adapters alone, those in peft's format."""
    if getattr(model, "stores", None):
        write_adapter(out, model)
    else:
        write_tensors(out / WEIGHTS, model_tensors(model), {"format": "pt"})


def read_weights(out: Path) -> dict[str, Tensor]:
    """What `write_weights` wrote."""
    if (out / ADAPTER).is_file():
        return read_adapter(out)
    return read_tensors(out / WEIGHTS)[0]

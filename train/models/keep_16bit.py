"""Models of more than 2 GB in fp32: their weights in the 16 bits that they were published in, widened when used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MOST = 2**31 - 2**24  # bytes of a part's weights in fp32: what one ONNX graph holds
SMALLEST = 2**16  # weights of a layer that is worth it
HALVES = (torch.bfloat16, torch.float16)


def is_large(model: Any) -> bool:
    """Whether a part of a captioner is more than one ONNX graph holds."""
    return any(sum(each.numel() * 4 for each in part.parameters()) > MOST for part in model.parts().values())


def keep_16bit(model: nn.Module) -> None:
    """Keep the weights of linear layers and embeddings in 16 bits, in place, where these hold them exactly.

    What the model computes stays the same to the bit. It is for looking at a model, not for training it.
    """
    kept: dict[int, nn.Parameter] = {}  # tied weights stay tied
    whole = []  # alive, so that an id stays theirs
    for module in model.modules():
        if type(module) not in _KEPT or module.weight.dtype != torch.float32 or module.weight.numel() < SMALLEST:
            continue
        known = id(module.weight)
        if known not in kept:
            half = _halved(module.weight.detach())
            if half is None:
                continue
            whole.append(module.weight)
            kept[known] = nn.Parameter(half, requires_grad=False)
        module.weight = kept[known]
        module.__class__ = _KEPT[type(module)]


def _halved(weight: Tensor) -> Tensor | None:
    for kind in HALVES:
        half = weight.to(kind)
        if torch.equal(half.float(), weight):
            return half
    return None


class Linear16(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias)


class Embedding16(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        # A graph gathers rows of what is widened, which its export does once; here all of it would be, at each step.
        if torch.compiler.is_exporting():
            return nn.functional.embedding(ids, self.weight.float(), self.padding_idx)
        return super().forward(ids).float()


_KEPT: dict[type, Any] = {nn.Linear: Linear16, nn.Embedding: Embedding16}

"""Optimizer groups, learning-rate schedules and the weight average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .models import CaptionModel
from .settings import Stage


def make_optimizer(model: CaptionModel, stage: Stage) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with the encoder's own rate; vectors (biases, norms) are not decayed.

    Freezes the encoder when its rate is 0, so that the optimizer sees nothing of it, nor of `model.frozen_parts`.
    """
    model.encoder.requires_grad_(stage.encoder_lr > 0)
    if stage.encoder_lr and stage.unfreeze_blocks:
        model.encoder.below(stage.unfreeze_blocks).requires_grad_(False)
    groups = []
    for name, module in model.parts().items():
        rate = stage.encoder_lr if name == "encoder" else stage.lr
        if name in model.frozen_parts:
            module.requires_grad_(False)
        parameters = [p for p in module.parameters() if p.requires_grad]
        for decayed in (True, False):
            members = [p for p in parameters if (p.ndim > 1) == decayed]
            if members:
                decay = stage.weight_decay if decayed else 0.0
                groups.append({"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, foreach=True)


def frozen_blocks(encoder: Any, stages: Sequence[Stage]) -> int:
    """How many links of the encoder's chain no stage trains, though one trains those above: what they give of a photo
    is computed once. 0 where all learn, none do, or the encoder is no chain."""
    learning = [stage.unfreeze_blocks for stage in stages if stage.encoder_lr]
    for blocks in filter(None, learning):
        encoder.below(blocks)  # so that a stage that asks for too many is refused before the first begins
    if not learning or not all(learning) or not encoder.chain:
        return 0
    return encoder.links_below(max(learning))


def lr_factor(stage: Stage, step: int, steps_per_epoch: int, plateau: float = 1.0) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (from 0) of a stage; in [0, 1]."""
    factor = 1.0
    if stage.schedule == "cosine":
        total = max(1, stage.epochs * steps_per_epoch)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    elif stage.schedule == "step":
        factor = stage.gamma ** (step // steps_per_epoch // max(1, stage.step_epochs))
    elif stage.schedule == "plateau":
        factor = plateau
    return factor * min(1.0, (step + 1) / stage.warmup) if stage.warmup else factor


def set_modes(model: CaptionModel, stage: Stage, *, from_scratch: bool) -> None:
    """Training mode as the stage wants it: dropout on or off, BatchNorm statistics moving or still."""
    model.train(stage.dropout)
    moving = stage.encoder_lr > 0 and (stage.batchnorm == "train" or (stage.batchnorm == "auto" and from_scratch))
    for name in model.frozen_parts:
        model.parts()[name].eval()
    for module in model.encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            learns = module.weight is None or module.weight.requires_grad
            module.train(moving and learns)


class WeightAverage:
    """Exponential moving average of all floating-point weights and statistics that a stage moves."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: tensor.detach().clone() for name, tensor in _moving(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        # Short memory at first, or the average would hold the start for thousands of steps.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, tensor in _moving(model):
            self.weights[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the block, and its own weights again behind it."""
        with torch.no_grad():
            own = {name: tensor.clone() for name, tensor in _moving(model)}
            for name, tensor in _moving(model):
                tensor.copy_(self.weights[name])
            try:
                yield
            finally:
                for name, tensor in _moving(model):
                    tensor.copy_(own[name])


def _moving(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield name, buffer

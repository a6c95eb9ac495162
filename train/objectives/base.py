"""What every objective has: how a stage makes it, and what a batch's loss is divided by."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from torch import Tensor, nn

from ...benchmarks.datasets import Example
from ..data.batches import Batch
from ..settings import Recipe, Stage
from ..start import ALONE, Helpers


class Objective:
    """What a stage minimises over the training `examples`; helpers: frozen models that take part."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        tokenizer: Tokenizer,
        examples: Sequence[Example],
        helpers: Helpers = ALONE,
    ) -> None:
        self.smoothing = stage.label_smoothing
        self.reward_seconds = 0.0  # spent on rewards so far

    def count(self, ids: Tensor) -> int:
        """What the loss of a batch with ids [N, C, T] is divided by: its target words."""
        return int((ids[:, :, 1:] >= 0).sum())

    def loss(self, model: nn.Module, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The summed loss of a piece of a batch, and figures for the log. `forward` is the model, wrapped or not."""
        raise NotImplementedError

"""What a stage minimises: cross-entropy on captions, and the table of all objectives."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import Batch
from ..models import CaptionModel
from .base import Objective
from .distill import Distillation
from .guided import Guided
from .infonce import InfoNCE
from .scst import SelfCritical


class CrossEntropy(Objective):
    """Next-word cross-entropy with label smoothing (Szegedy et al. 2016)."""

    def loss(self, model: CaptionModel, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """See Objective.loss."""
        logits = forward(batch.inputs, batch.keep, **batch.view)  # [K, V]
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum", label_smoothing=self.smoothing), {}


OBJECTIVES: dict[str, Any] = {
    "xe": CrossEntropy,
    "scst": SelfCritical,
    "distill": Distillation,
    "guided": Guided,
    "infonce": InfoNCE,
}

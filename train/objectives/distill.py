"""Distillation word by word: the captions, and what one or several teachers say at each of their words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...benchmarks.datasets import Example
from ..data.batches import Batch
from ..models import CaptionModel
from ..settings import Recipe, Stage
from ..start import Helpers
from .base import Objective

NOTHING = 1e-6  # a rest of probability below this is rounding


def divergence(soft: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teachers' words in nats, summed over K targets, averaged over teachers.

    soft: the student's log-probabilities [K, V]; ids, logp: of each teacher's k likeliest words, [teachers, K, k].
    Averaged so, its gradient is that of the divergence from the teachers' mean.

    All other words count as one, whose probability is what a teacher leaves over. Rescaling the k to a sum of 1 teaches
    too much confidence (Anshumann et al. 2025, arXiv:2503.16870), and spreading the rest evenly teaches what no teacher
    said.
    """
    teachers, ids, p = len(ids), ids.transpose(0, 1), logp.transpose(0, 1).exp()  # [K, teachers, k]
    q = soft.gather(1, ids.flatten(1)).view_as(p)
    apart = -torch.special.entr(p).sum() - (p * q).sum()
    if p.shape[2] < soft.shape[1]:
        rest = (1 - p.sum(2)).clamp(min=0)  # [K, teachers]
        left = torch.log1p(-q.exp().sum(2).clamp(max=1 - NOTHING))
        apart = apart - torch.special.entr(rest).sum() - (rest * left).sum()
    return apart / teachers


class Distillation(Objective):
    """Cross-entropy mixed with the teachers' word distribution at a temperature T (Hinton et al. 2015,
    arXiv:1503.02531, with their factor T²), and with `match` the distance to what the teacher's encoder sees
    (Romero et al. 2015, arXiv:1412.6550)."""

    def __init__(
        self, recipe: Recipe, stage: Stage, tokenizer: Tokenizer, examples: Sequence[Example], helpers: Helpers
    ) -> None:
        super().__init__(recipe, stage, tokenizer, examples, helpers)
        self.share, self.temperature = stage.teacher_share, stage.temperature
        self.match, self.teachers = stage.match, helpers.teachers

    def loss(self, model: CaptionModel, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """As CrossEntropy.loss; the log gets the divergence from the teachers in nats a word."""
        seen: list[Tensor] = []
        hook = model.bridge.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            logits = forward(batch.inputs, batch.keep, **batch.view).float()  # [K, V]
        finally:
            hook.remove()
        captions = F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=self.smoothing)
        soft = (logits / self.temperature).log_softmax(-1)
        apart = divergence(soft, batch.teacher_ids, batch.teacher_logp) * self.temperature**2
        loss = (1 - self.share) * captions + self.share * apart
        figures = {"divergence": float(apart.detach()) / len(logits)}
        if self.match:
            with torch.no_grad():
                memory = self.teachers[0].model.get(logits.device).memory(features=batch.teacher)
            distance = F.mse_loss(seen[0].float(), memory) / memory.var()
            loss = loss + self.match * len(logits) * distance
            figures["distance"] = float(distance.detach())
        return loss, figures

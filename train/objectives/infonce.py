"""The objective "infonce": of all captions in the batch a photo finds its own, and a caption its photo."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..models.towers import TwoTowers
from .base import Objective


class InfoNCE(Objective):
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) in CLIP's form (arXiv:2103.00020).

    The negatives are the piece's: with `accumulate` = 8 and a batch of 64, each photo is told from 7 others. A caption
    that is word for word another photo's, too, is no negative of it.
    """

    def count(self, ids: Tensor) -> int:
        """What the batch's loss is divided by: its photos."""
        return len(ids)

    def loss(self, model: TwoTowers, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The summed loss of a piece, and figures for the log. `batch.ids` holds the text tower's vectors
        [N, 1, text dim] of one caption for each photo."""
        model.head.limit()
        vectors = batch.ids[:, 0]
        photos, texts = forward(vectors, **batch.view)
        _, which = vectors.unique(dim=0, return_inverse=True)
        same = which[:, None] == which[None, :]  # [N, N]
        with torch.autocast(photos.device.type, enabled=False):  # cosines times 100 need float32
            logits = model.head.scale.float() * photos.float() @ texts.float().T  # [photos, texts]
            loss = (contrast(logits, same, self.smoothing) + contrast(logits.T, same, self.smoothing)) / 2
        right = (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
        return loss, {"scale": float(model.head.scale.detach()), "first": float(right)}


def contrast(logits: Tensor, same: Tensor, smoothing: float) -> Tensor:
    """Summed cross-entropy of each row's diagonal entry in logits [N, N], without the other entries where `same`
    holds; smoothing: share of the target that is spread over what is left."""
    out = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logprob = logits.masked_fill(out, -torch.inf).log_softmax(1)
    spread = logprob.masked_fill(out, 0.0).sum(1) / (~out).sum(1)
    return -((1 - smoothing) * logprob.diagonal() + smoothing * spread).sum()

"""Guided training: cross-entropy, and a frozen critic's opinion of what the model says about its photos.

The critic reads straight-through words: forward the model's most likely token at each place, backward the whole
distribution (Bengio et al. 2013, arXiv:1308.3432). The plain mixture of embeddings would do without the biased
gradient, but a frozen text tower never saw such mixtures: a decoder learns to please it with blends of words whose
argmax says nothing. The words are those of a teacher-forced pass: what the model says where the reference stood so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...benchmarks.datasets import Example
from ...runtime.decode import never_said
from ...runtime.errors import UsageError
from ..data.batches import Batch
from ..models import CaptionModel
from ..settings import Recipe, Stage
from ..start import Helpers
from ..tokenizer import token_ids
from .base import Objective

SPREAD = 2.0  # t of the uniformity loss, as its authors chose


def alignment_loss(said: Tensor, seen: Tensor) -> Tensor:
    """1 - the mean cosine of captions [N, D] with their photos [N, D], both of length 1: in [0, 2]."""
    return 1 - (said * seen).sum(1).mean()


def contrast_loss(said: Tensor, seen: Tensor, scale: float) -> Tensor:
    """InfoNCE both ways between captions [N, D] and photos [N, D] of length 1, in nats: log N knows nothing
    (van den Oord et al. 2018, arXiv:1807.03748; both ways as in CLIP, arXiv:2103.00020). scale: 1 / temperature."""
    with torch.autocast(said.device.type, enabled=False):  # cosines times 100 need float32
        logits = scale * said.float() @ seen.float().T  # [N, N]
        own = torch.arange(len(said), device=said.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def diversity_loss(said: Tensor) -> Tensor:
    """Log of the mean Gaussian nearness of different photos' captions [N, D] of length 1: in [-8, 0], 0 where all say
    the same (the uniformity loss of Wang & Isola 2020, arXiv:2005.10242).

    The mean cosine would be as low for two opposite captions said of half the photos each as for N different ones.
    """
    if len(said) < 2:
        return said.sum() * 0.0
    apart = torch.pdist(said).square()
    return torch.logsumexp(-SPREAD * apart, 0) - torch.log(torch.tensor(float(len(apart))))


class Guided(Objective):
    """Cross-entropy on all captions of a batch; the critic's losses on one caption of each photo, drawn anew each step.

    The stage's `alignment`, `contrast` and `diversity` are their weights; for a weight of 0 nothing is computed. Each
    is a mean over the batch (or the piece of it, where `accumulate` splits it), weighted like the mean cross-entropy.
    A mirrored photo is judged as it was.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, tokenizer: Tokenizer, examples: Sequence[Example], helpers: Helpers
    ) -> None:
        if helpers.critic is None:
            raise UsageError("objective = guided needs --critic CHECKPOINT_OR_CLIP")
        super().__init__(recipe, stage, tokenizer, examples, helpers)
        self.critic = helpers.critic
        self.weights = {"alignment": stage.alignment, "contrast": stage.contrast, "diversity": stage.diversity}
        self.special = token_ids(tokenizer, recipe.tokenizer.ids)
        self.photos = torch.tensor(self.critic.photos(examples, helpers.progress))  # [N, D]
        self.critic.read_with(tokenizer, self.special)
        self.hard = True

    def loss(self, model: CaptionModel, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """As CrossEntropy.loss; the log gets the mean cosine and each loss that has a weight."""
        if self.critic.device != batch.ids.device:
            self.critic.to(batch.ids.device)
        logits = forward(batch.inputs, batch.keep, **batch.view).float()  # [K, V]
        loss = F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=self.smoothing)
        said = self.say(logits, batch)  # [N, D]
        seen = self.photos[batch.photos].to(said.device)  # [N, D]
        terms: dict[str, Callable[[], Tensor]] = {
            "alignment": lambda: alignment_loss(said, seen),
            "contrast": lambda: contrast_loss(said, seen, self.critic.scale),
            "diversity": lambda: diversity_loss(said),
        }
        figures = {"cosine": float((said.detach() * seen).sum(1).mean())}
        for name, weight in self.weights.items():
            if weight:
                term = terms[name]()
                loss = loss + weight * len(logits) * term
                figures[name] = float(term.detach())
        return loss, figures

    def say(self, logits: Tensor, batch: Batch) -> Tensor:
        """What the critic makes of one caption a photo, from the batch's logits [K, V]: [N, D] of length 1."""
        keep, eos = batch.keep, self.special["eos"]
        there = keep[:, :, 0].sum(1)  # captions of each photo, which come first
        drawn = (torch.rand(len(there), device=there.device) * there).long().clamp(max=keep.shape[1] - 1)
        chosen = torch.zeros_like(keep)
        rows = torch.arange(len(drawn), device=keep.device)
        chosen[rows, drawn] = keep[rows, drawn]
        chosen &= batch.ids[:, :, 1:] != eos  # where a word stands
        mask = chosen[rows, drawn]  # [N, T]
        words = self.speak(logits[chosen[keep]])  # [words, E]
        sentence = words.new_zeros(*mask.shape, words.shape[1])
        sentence[mask] = words
        return self.critic.read(sentence, mask)

    def speak(self, logits: Tensor) -> Tensor:
        """Logits [K, V] → the critic's embeddings of the words [K, E]: the likeliest token's forward, the mixture's
        backward."""
        logits = logits[:, : self.special["vocab_size"]].clone()
        logits[:, list(never_said(self.special))] = -1e9
        mixture = self.critic.words(logits.softmax(-1))
        if not self.hard:
            return mixture
        return self.critic.vocabulary[logits.argmax(-1)] + mixture - mixture.detach()

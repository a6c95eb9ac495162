"""What a stage minimises: cross-entropy on captions, self-critical training; and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..benchmarks.datasets import Example
from ..benchmarks.metrics import CiderD
from ..runtime.decode import never_said
from .batches import Batch
from .distill import Distillation
from .guided import Guided
from .infonce import InfoNCE
from .models import CaptionModel
from .objective import Objective
from .settings import Recipe, Stage
from .start import ALONE, Helpers
from .tokenizer import caption_text, token_ids

END = "</s>"  # the end of a sentence is a word of the reward's n-grams, or captions learn to stop anywhere


class CrossEntropy(Objective):
    """Next-word cross-entropy with label smoothing (Szegedy et al. 2016)."""

    def loss(self, model: CaptionModel, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """See Objective.loss."""
        logits = forward(batch.inputs, batch.keep, **batch.view)  # [K, V]
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum", label_smoothing=self.smoothing), {}


class SelfCritical(Objective):
    """REINFORCE on CIDEr-D (Rennie et al. 2017, arXiv:1612.00563); each sample's baseline is the mean reward of the
    photo's other samples (Luo 2020, arXiv:2003.09971)."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        tokenizer: Tokenizer,
        examples: Sequence[Example],
        helpers: Helpers = ALONE,
    ) -> None:
        super().__init__(recipe, stage, tokenizer, examples, helpers)
        self.samples, self.max_length = max(2, stage.samples), recipe.tokenizer.max_length
        self.tokenizer, self.special = tokenizer, token_ids(tokenizer, recipe.tokenizer.ids)
        self.forbidden = list(never_said(self.special))
        self.reward = CiderD([[caption_text(c).split() + [END] for c in example.captions] for example in examples])

    def count(self, ids: Tensor) -> int:
        """What the batch's loss is divided by: its sampled captions."""
        return len(ids) * self.samples

    def loss(self, model: CaptionModel, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """As CrossEntropy.loss; the log gets the mean reward."""
        ids, words = self.sample(model, batch)
        photos = [place for place in batch.photos.tolist() for _ in range(self.samples)]
        scores = torch.from_numpy(self.reward.score(photos, words)).float().view(-1, self.samples)  # [N, S]
        others = (scores.sum(1, keepdim=True) - scores) / (self.samples - 1)
        advantage = (scores - others).to(ids.device)  # [N, S]
        sampled = Batch(ids, batch.photos, batch.pixels, batch.features)
        logits = forward(sampled.inputs, sampled.keep, **batch.view).float()  # [K, V]
        logits[:, self.forbidden] = -1e9
        logprob = logits.log_softmax(-1).gather(1, sampled.targets.unsqueeze(1)).squeeze(1)  # [K]
        weight = advantage.unsqueeze(2).expand(sampled.keep.shape)[sampled.keep]
        return -(weight * logprob).sum(), {"reward": float(scores.mean())}

    @torch.no_grad()
    def sample(self, model: CaptionModel, batch: Batch) -> tuple[Tensor, list[list[str]]]:
        """Draw captions: ids [N, S, T + 2] as in Batch, and their words, with END where the end was drawn.

        A caption that is cut at T words has neither EOS nor END: nothing is learnt about a word that was not drawn.
        """
        photo = model.photo(**batch.view)
        n, device = len(batch.ids), batch.ids.device
        bos = torch.full((n, 1), self.special["bos"], dtype=torch.long, device=device)
        logits, state = model.decoder.begin(photo, bos)
        index = torch.arange(n, device=device).repeat_interleave(self.samples)  # [N·S]
        logits = logits[index]
        state = {name: tensor[index] for name, tensor in state.items()}
        ids = torch.full((n * self.samples, self.max_length + 2), -1, dtype=torch.long, device=device)
        ids[:, 0] = self.special["bos"]
        rows = torch.arange(n * self.samples, device=device)  # still speaking
        for position in range(1, self.max_length + 1):
            logits[:, self.forbidden] = -1e9
            drawn = torch.multinomial(logits.float().softmax(-1), 1).squeeze(1)
            ids[rows, position] = drawn
            speaking = drawn != self.special["eos"]
            rows = rows[speaking]
            if not len(rows) or position == self.max_length:
                break
            state = {name: tensor[speaking] for name, tensor in state.items()}
            logits, state = model.decoder.advance(drawn[speaking], index[rows], photo, state)
        return ids.view(n, self.samples, -1), self.words(ids)

    def words(self, ids: Tensor) -> list[list[str]]:
        lines = [[i for i in line if i >= 0] for line in ids[:, 1:].tolist()]
        texts = self.tokenizer.decode_batch(lines, skip_special_tokens=True)
        ended = [self.special["eos"] in line for line in lines]
        return [text.split() + [END] * end for text, end in zip(texts, ended, strict=True)]


OBJECTIVES: dict[str, Any] = {
    "xe": CrossEntropy,
    "scst": SelfCritical,
    "distill": Distillation,
    "guided": Guided,
    "infonce": InfoNCE,
}

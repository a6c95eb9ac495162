"""Self-critical training: what the captioner itself says is drawn, rewarded, and made more or less likely."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...benchmarks.datasets import Example
from ...benchmarks.metrics import CiderD, sentence_bleu
from ...runtime.decode import never_said
from ..data.augment import mirrored_text
from ..data.batches import Batch
from ..models import CaptionModel
from ..settings import Recipe, Stage
from ..start import ALONE, Helpers
from ..tokenizer import caption_text, token_ids
from .base import Objective

END = "</s>"  # the end of a sentence is a word of the reward's n-grams, or captions learn to stop anywhere
NEVER = -1e9  # logit of what is never said


class SelfCritical(Objective):
    """REINFORCE on CIDEr-D (Rennie et al. 2017, arXiv:1612.00563); each sample's baseline is the mean reward of the
    photo's other samples (Luo 2020, arXiv:2003.09971). With `bleu` = b the reward is CIDEr-D + b · 10 · BLEU-4 of the
    sentence: both from 0 to 10. A mirrored photo's captions are rewarded with their sides swapped back.

    Document frequencies are counted once, when the stage begins: seconds for 30,000 captions, too little to be kept on
    the disk.
    """

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
        self.cider = CiderD([[caption_text(c).split() + [END] for c in example.captions] for example in examples])
        self.bleu = stage.bleu

    def count(self, ids: Tensor) -> int:
        """What the batch's loss is divided by: its sampled captions."""
        return len(ids) * self.samples

    def loss(self, model: CaptionModel, forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """As CrossEntropy.loss; the log gets the mean reward, with `bleu` its parts, too."""
        # One pass both draws and learns where a decoder's steps are cheap to keep. A wrapped model shares its gradients
        # between processes only through its own forward; a language model's steps would keep its cache once a word.
        learns = forward is model and hasattr(model.decoder, "advance_rows")
        ids, words, logprob = self.sample(model, batch, learns=learns)
        begun = time.perf_counter()
        scores, figures = self.reward(batch, words)
        self.reward_seconds += time.perf_counter() - begun
        others = (scores.sum(1, keepdim=True) - scores) / (self.samples - 1)
        advantage = (scores - others).to(ids.device)  # [N, S]
        if not learns:
            logprob = self.logprob(forward, dataclasses.replace(batch, ids=ids))
        return -(advantage * logprob).sum(), figures

    def reward(self, batch: Batch, words: list[list[str]]) -> tuple[Tensor, dict[str, float]]:
        """Float32 [N, S] of N · S captions, photo by photo, and the means for the log."""
        photos = [place for place in batch.photos.tolist() for _ in range(self.samples)]
        if batch.mirrored is not None:
            turned = batch.mirrored.repeat(self.samples)
            words = [mirrored_text(" ".join(w)).split() if t else w for w, t in zip(words, turned, strict=True)]
        scores = cider = self.cider.score(photos, words)
        figures = {}
        if self.bleu:
            bleu = sentence_bleu(self.cider, photos, words)
            scores = cider + self.bleu * 10 * bleu
            figures = {"cider_d": float(cider.mean()), "sentence_bleu4": float(bleu.mean())}
        return torch.from_numpy(scores).float().view(-1, self.samples), {"reward": float(scores.mean()), **figures}

    def logprob(self, forward: nn.Module, sampled: Batch) -> Tensor:
        """Log-probabilities [N, S] of sampled captions, by teacher forcing."""
        logits = forward(sampled.inputs, sampled.keep, **sampled.view).float()  # [K, V]
        logits[:, self.forbidden] = NEVER
        words = logits.log_softmax(-1).gather(1, sampled.targets.unsqueeze(1)).squeeze(1)  # [K]
        n, samples, _ = sampled.keep.shape
        rows = sampled.keep.flatten(0, 1).nonzero()[:, 0]
        return words.new_zeros(n * samples).index_add(0, rows, words).view(n, samples)

    def sample(
        self, model: CaptionModel, batch: Batch, *, learns: bool = False
    ) -> tuple[Tensor, list[list[str]], Tensor]:
        """Draw captions: ids [N, S, T + 2] as in Batch, their words, with END where the end was drawn, and their
        log-probabilities [N, S], through which the model can learn if it `learns`.

        A caption that is cut at T words has neither EOS nor END: nothing is learnt about a word that was not drawn.
        """
        with torch.set_grad_enabled(learns):
            ids, logprob = self._draw(model, batch)
        return ids.view(len(batch.ids), self.samples, -1), self.words(ids), logprob.view(-1, self.samples)

    def _draw(self, model: CaptionModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """The captions' ids [N · S, T + 2] and log-probabilities [N · S]."""
        photo = model.photo(**batch.view)
        n, device = len(batch.ids), batch.ids.device
        bos = torch.full((n, 1), self.special["bos"], dtype=torch.long, device=device)
        logits, state = model.decoder.begin(photo, bos)
        logits = logits.repeat_interleave(self.samples, 0)
        state = {name: tensor.repeat_interleave(self.samples, 0) for name, tensor in state.items()}
        ids = torch.full((n * self.samples, self.max_length + 2), -1, dtype=torch.long, device=device)
        ids[:, 0] = self.special["bos"]
        forbidden = torch.tensor(self.forbidden, dtype=torch.long, device=device)
        rows = torch.arange(n * self.samples, device=device)  # still speaking
        places, words = [], []
        for position in range(1, self.max_length + 1):
            logprob = logits.float().index_fill(1, forbidden, NEVER).log_softmax(-1)  # [B, V]
            drawn = draw(logprob.detach())
            places.append(rows)
            words.append(logprob.gather(1, drawn.unsqueeze(1)).squeeze(1))
            ids[rows, position] = drawn
            speaking = drawn != self.special["eos"]
            rows, drawn = rows[speaking], drawn[speaking]
            if not len(rows) or position == self.max_length:
                break
            state = {name: tensor[speaking] for name, tensor in state.items()}
            if hasattr(model.decoder, "advance_rows"):
                logits, state = model.decoder.advance_rows(drawn, rows, photo, state, captions=self.samples)
            else:
                logits, state = model.decoder.advance(drawn, rows // self.samples, photo, state)
        spoken = torch.cat(words)
        return ids, spoken.new_zeros(len(ids)).index_add(0, torch.cat(places), spoken)

    def words(self, ids: Tensor) -> list[list[str]]:
        lines = [[i for i in line if i >= 0] for line in ids[:, 1:].tolist()]
        texts = self.tokenizer.decode_batch(lines, skip_special_tokens=True)
        ended = [self.special["eos"] in line for line in lines]
        return [text.split() + [END] * end for text, end in zip(texts, ended, strict=True)]


def draw(logprob: Tensor) -> Tensor:
    """One id [B] for each row of log-probabilities [B, V], by where a random number falls among their sums: one number
    a row, where torch.multinomial draws one for each of V words."""
    sums = logprob.exp().cumsum(1)
    # Just below 1: rounded up to the whole sum, it would lie behind the last word.
    at = torch.rand(len(sums), 1, device=sums.device) * (1 - 1e-6) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).squeeze(1)

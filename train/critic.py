"""The critic of guided training: a frozen judge, two towers or a CLIP, of how near a caption lies to its photo.

It reads text, and what a decoder is about to say: a distribution over the decoder's own vocabulary, with gradients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..benchmarks.datasets import Dataset, Example
from ..benchmarks.metrics import bootstrap_mean
from ..runtime.errors import UsageError
from ..runtime.preprocess import Preprocess
from ..runtime.progress import Progress, silent
from .data.cache import cache_key, cached_rows, load_pixels
from .state import fingerprint
from .tokenizer import caption_text
from .validate import most_frequent_caption

TEXTS = 32  # read together
ROUNDING = 1e-6  # of a cosine
GENERIC = ("a photo of something", "a picture of a scene")  # captions that fit any photo, for comparison


class Judge(Protocol):
    """What a critic needs of a model: its frozen towers, and the vocabulary and embeddings of its text tower.

    scale: what cosines are multiplied by in its own contrastive loss; max_length: ids of a text, `bos` and `eos`
    included.
    """

    preprocess: Preprocess
    tokenizer: Tokenizer
    bos: int
    eos: int
    max_length: int
    scale: float
    embedding: nn.Embedding
    model: nn.Module

    def look(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] → [N, D] of length 1."""

    def read(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Token embeddings [N, T, E], BOS and EOS among them, where mask bool [N, T] → [N, D] of length 1."""


class TowersJudge:
    """A retrieval checkpoint of our own."""

    def __init__(self, loaded: Any) -> None:
        self.model = loaded.model.read_with(loaded.tokenizer.inner)
        self.preprocess, self.tokenizer = loaded.preprocess, loaded.tokenizer.inner
        self.bos, self.eos, self.max_length = self.model.tokens["bos"], self.model.tokens["eos"], self.model.max_length
        self.scale, self.embedding = min(100.0, float(self.model.head.scale.detach())), self.model.text.embedding

    def look(self, pixels: Tensor) -> Tensor:
        return self.model.embed_photos(pixels=pixels)

    def read(self, embeds: Tensor, mask: Tensor) -> Tensor:
        return self.model.embed_soft(embeds, mask)


class ClipJudge:
    """A CLIP of transformers (Radford et al. 2021, arXiv:2103.00020) by hub id or directory."""

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        from .models.hub import pretrained, read_config, reading

        kind = read_config(source, "critic").get("model_type")
        if kind != "clip":
            raise UsageError(f"critic {source} is neither a retrieval checkpoint nor a CLIP (model_type {kind!r})")
        self.model = pretrained(CLIPModel, source, role="critic")
        with reading(source, "critic") as place:
            words = AutoTokenizer.from_pretrained(place)
            try:
                seen = CLIPImageProcessor.get_image_processor_dict(place)[0]
            except OSError:
                seen = {}
        self.tokenizer = Tokenizer.from_str(words.backend_tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.bos, self.eos = words.bos_token_id, words.eos_token_id
        config, text = self.model.config, self.model.text_model
        side = config.vision_config.image_size
        self.preprocess = Preprocess(size=(side, side), mode="crop", resample="bicubic")
        self.mean = torch.tensor(seen.get("image_mean", OPENAI_CLIP_MEAN)) * 255
        self.std = torch.tensor(seen.get("image_std", OPENAI_CLIP_STD)) * 255
        self.max_length, self.embedding = config.text_config.max_position_embeddings, text.embeddings.token_embedding
        self.scale = float(self.model.logit_scale.detach().exp().clamp(max=100.0))

    def look(self, pixels: Tensor) -> Tensor:
        seen = (pixels.float() - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        photos = self.model.get_image_features(pixel_values=seen.permute(0, 3, 1, 2)).pooler_output
        return F.normalize(photos.float(), dim=-1)

    def read(self, embeds: Tensor, mask: Tensor) -> Tensor:
        # transformers' CLIP takes ids only; these are the same steps. Padding lies behind EOS, so causal is enough.
        from transformers.masking_utils import create_causal_mask

        text = self.model.text_model
        hidden = text.embeddings(inputs_embeds=embeds)
        causal = create_causal_mask(config=text.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        hidden = text.encoder(inputs_embeds=hidden, attention_mask=causal, is_causal=True).last_hidden_state
        ends = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]  # [N, dim]: at EOS
        return F.normalize(self.model.text_projection(text.final_layer_norm(ends)).float(), dim=-1)


class Critic:
    """A frozen judge that embeds photos, captions and a decoder's words in one space."""

    def __init__(self, judge: Judge, name: str, sha256: str) -> None:
        self.judge, self.name, self.sha256 = judge, name, sha256
        self.judge.model.eval().requires_grad_(False)
        self.vocabulary: Tensor | None = None  # [V, E], see read_with

    @classmethod
    def load(cls, source: str | Path) -> Critic:
        """A retrieval checkpoint, or a CLIP by hub id or directory; UsageError where it is neither."""
        from .checkpoint import RECIPE, load_checkpoint

        if (Path(source) / RECIPE).is_file():
            loaded = load_checkpoint(source)
            if loaded.recipe.task != "retrieval":
                raise UsageError(f"critic {source} is a captioner: give a retrieval checkpoint or a CLIP")
            return cls(TowersJudge(loaded), str(source), loaded.sha256)
        judge = ClipJudge(str(source))
        return cls(judge, str(source), fingerprint(judge.model.state_dict(), shapes=False))

    @property
    def scale(self) -> float:
        """The inverse of the judge's temperature."""
        return self.judge.scale

    @property
    def device(self) -> torch.device:
        return self.judge.embedding.weight.device

    def to(self, device: torch.device) -> Critic:
        """Moves the judge, and what `read_with` made."""
        self.judge.model.to(device)
        if self.vocabulary is not None:
            self.vocabulary = self.vocabulary.to(device)
        return self

    # --- photos and captions ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def look(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] of the judge's own size → float32 [N, D] of length 1."""
        size = self.judge.preprocess.size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (*size, 3):
            raise ValueError(f"the critic sees uint8 photos of {size}, not {pixels.dtype} {pixels.shape}")
        return self.judge.look(torch.from_numpy(pixels).to(self.device)).float().cpu().numpy()

    def photos(self, examples: Sequence[Example], progress: Progress = silent) -> np.ndarray:
        """The examples' photos: float32 [N, D] of length 1, kept in the cache."""
        if not examples:
            raise UsageError("the critic was given no photos")
        first = self.look(load_pixels(examples[:1], self.judge.preprocess))
        key = cache_key(
            kind="critic", critic=self.sha256, preprocess=self.judge.preprocess.to_dict(), photos=_identity(examples)
        )
        return cached_rows(
            key,
            len(examples),
            first.shape[1:],
            np.float32,
            lambda part: self.look(load_pixels(examples[part], self.judge.preprocess)),
            report=lambda done: progress("photos for the critic", done, len(examples)),
        )

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts, brought to `caption_text` form → float32 [M, D] of length 1; the same text is read once."""
        plain = [caption_text(text) for text in texts]
        places = {text: i for i, text in enumerate(sorted(set(plain), key=lambda text: (len(text), text)))}
        ordered, rows = list(places), []
        for start in range(0, len(ordered), TEXTS):
            lines = self.judge.tokenizer.encode_batch(ordered[start : start + TEXTS], add_special_tokens=False)
            words = [line.ids[: self.judge.max_length - 2] for line in lines]
            longest = max(map(len, words))
            ids = torch.full((len(words), longest), self.judge.eos)
            for row, line in zip(ids, words, strict=True):
                row[: len(line)] = torch.tensor(line, dtype=torch.long)
            mask = torch.arange(longest) < torch.tensor([len(line) for line in words])[:, None]
            rows.append(self.read(self.judge.embedding(ids.to(self.device)), mask.to(self.device)).cpu().numpy())
        return np.concatenate(rows)[[places[text] for text in plain]]

    # --- what a decoder says ------------------------------------------------------------------------------------

    def read_with(self, tokenizer: Tokenizer, tokens: Mapping[str, int]) -> Critic:
        """Learn a decoder's vocabulary: each of its tokens becomes the mean of the embeddings of the pieces that its
        text has in the judge's tokenizer. tokens: as `token_ids` gives them.

        The decoder's BOS and EOS are the judge's; a token without text of its own (padding, unknown, half a
        character) is the zero vector.
        """
        size = int(tokens["vocab_size"])
        ends = {} if tokens.get("bos_is_word") else {tokens["bos"]: self.judge.bos}
        ends[tokens["eos"]] = self.judge.eos  # the same id, often
        silent = {tokens.get("pad"), tokens.get("unk")} - set(ends)
        texts = ["" if i in ends or i in silent else tokenizer.decode([i]).strip() for i in range(size)]
        pieces = [
            line.ids if "\ufffd" not in text else []
            for text, line in zip(
                texts, self.judge.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
            )
        ]
        for ours, theirs in ends.items():
            pieces[ours] = [theirs]
        weight = self.judge.embedding.weight.detach()
        token = torch.tensor([i for i, line in enumerate(pieces) for _ in line])
        piece = torch.tensor([j for line in pieces for j in line])
        share = torch.tensor([1 / len(line) for line in pieces for _ in line])
        mapped = torch.zeros(size, weight.shape[1])
        self.vocabulary = mapped.index_add_(0, token, weight[piece].cpu() * share[:, None]).to(self.device)
        return self

    def words(self, probabilities: Tensor) -> Tensor:
        """Distributions over the decoder's tokens [..., V] → the mixture of their embeddings [..., E]."""
        if self.vocabulary is None:
            raise ValueError("the critic does not know the decoder's vocabulary yet: call read_with first")
        return probabilities @ self.vocabulary

    def read(self, words: Tensor, mask: Tensor) -> Tensor:
        """Word embeddings [B, T, E] without BOS and EOS, of which each row's first few count (mask bool [B, T]) →
        [B, D] of length 1, with gradients. What is too long for the judge is cut."""
        words, mask = words[:, : self.judge.max_length - 2], mask[:, : self.judge.max_length - 2]
        weight = self.judge.embedding.weight
        count = mask.sum(1)  # [B]
        places = torch.arange(words.shape[1] + 2, device=words.device)  # [T + 2]
        framed = F.pad(words * mask.unsqueeze(2), (0, 0, 1, 1))  # [B, T + 2, E]
        framed = torch.where((places == 0)[None, :, None], weight[self.judge.bos].to(framed.dtype), framed)
        last = (places == count[:, None] + 1).unsqueeze(2)
        framed = torch.where(last, weight[self.judge.eos].to(framed.dtype), framed)
        return self.judge.read(framed, places < count[:, None] + 2)

    def soft(self, probabilities: Tensor, mask: Tensor) -> Tensor:
        """What a decoder is about to say: distributions [B, T, V] over its tokens, where mask bool [B, T] → [B, D] of
        length 1, with gradients."""
        return self.read(self.words(probabilities), mask)

    # --- figures ------------------------------------------------------------------------------------------------

    def alignment(self, captions: Sequence[str], photos: np.ndarray) -> np.ndarray:
        """The cosine of each caption with its photo [N, D]: [N] in [-1, 1]."""
        return (self.texts(captions) * photos).sum(1)

    def check_knows(self, examples: Sequence[Example], progress: Progress = silent) -> None:
        """UsageError where captions, of up to 128 examples, lie no nearer to their own photo than to another's by two
        standard errors: such a critic judges something else than these photos."""
        picks = np.unique(np.linspace(0, len(examples) - 1, 128).round().astype(int))
        chosen = [examples[i] for i in picks]
        said, seen = self.texts([example.captions[0] for example in chosen]), self.photos(chosen, progress)
        cosines = said @ seen.T  # [P, P]
        others = (cosines.sum(1) - np.diag(cosines)) / max(1, len(picks) - 1)
        gain = np.diag(cosines) - others
        if gain.mean() <= 2 * gain.std() / np.sqrt(len(picks)):
            raise UsageError(
                f"critic {self.name} does not know these photos: their captions lie no nearer to them than to others; "
                "train it on such data, or give another --critic"
            )


def alignment_scores(
    critic: Critic, captions: Sequence[str], examples: Sequence[Example], data: Dataset, progress: Progress
) -> dict[str, Any]:
    """How captions fit their photos by the critic, beside the references and captions that fit any photo.

    Means of cosines in [-1, 1]: `captions` with its 95% bootstrap interval over photos, `references` (of each photo's
    own), `generic`: each generic caption's, the most frequent one of the training split among them, with the share of
    photos whose own caption lies nearer; `beats_generic`: the share that beats them all. `distinct`: different
    captions among all.
    """
    photos = critic.photos(examples, progress)
    own = critic.alignment(captions, photos)
    flat = [(i, text) for i, example in enumerate(examples) for text in example.captions]
    references = critic.alignment([text for _, text in flat], photos[[i for i, _ in flat]])
    frequent = most_frequent_caption(data.splits["train"])
    generics = list(dict.fromkeys((*GENERIC, frequent)))
    theirs = photos @ critic.texts(generics).T  # [N, G]
    return {
        "critic": critic.name,
        "critic_sha256": critic.sha256,
        "captions": float(own.mean()),
        "captions_interval": bootstrap_mean(own).to_dict(),
        "references": float(references.mean()),
        "generic": [
            {"caption": text, "mean": float(column.mean()), "beaten": float((own > column + ROUNDING).mean())}
            for text, column in zip(generics, theirs.T, strict=True)
        ],
        "beats_generic": float((own > theirs.max(1) + ROUNDING).mean()),
        "distinct": len(set(captions)) / len(captions),
    }


def alignment_lines(scores: dict[str, Any]) -> list[str]:
    """`alignment_scores` for people."""
    low, high = scores["captions_interval"]["low"], scores["captions_interval"]["high"]
    lines = [
        f"  alignment {scores['captions']:.4f}  (95% {low:.4f} to {high:.4f}), references {scores['references']:.4f}, "
        f"by {scores['critic']}"
    ]
    for generic in scores["generic"]:
        lines.append(
            f"    {generic['mean']:.4f} for “{generic['caption']}”, beaten on {generic['beaten']:.1%} of photos"
        )
    lines.append(f"    every generic caption beaten on {scores['beats_generic']:.1%} of photos")
    return lines


def _identity(examples: Sequence[Example]) -> str:
    """A hash of what the photos are: ids, captions, and their files' sizes and times, or the first drawn picture."""
    told: list[Any] = []
    for example in examples:
        stat = example.path.stat() if example.path else None
        told.append((example.id, example.captions, (stat.st_size, stat.st_mtime_ns) if stat else None))
    digest = hashlib.sha256(json.dumps(told).encode())
    if examples[0].path is None:
        digest.update(examples[0].jpeg())
    return digest.hexdigest()

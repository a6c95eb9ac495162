"""Two towers: photos and texts meet in one space, where a photo lies near what can be said of it.

Both encoders stay as they are; only the query bridge and the head that leads into the space learn. The model is at
once a retrieval system and the critic of the guided losses, so it keeps its frozen weights, too, and needs no source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...runtime.errors import UsageError
from ..settings import Recipe
from .bridges import BRIDGES
from .captioner import BAD_SETTINGS, build_encoder, build_part
from .hub import read_config, reading
from .siglip import fit

TEXTS = 16  # read together


class TextTower(nn.Module):
    """A transformers text encoder: its states become one vector, the first ("cls") or their mean ("mean")."""

    def __init__(self, body: nn.Module, pool: str) -> None:
        super().__init__()
        if pool not in ("cls", "mean"):
            raise UsageError(f'recipe [text]: pool = {pool!r}; choices: "cls", "mean"')
        self.body, self.pool, self.dim = body, pool, int(body.config.hidden_size)

    def settings(self) -> dict[str, Any]:
        """The body's configuration: what rebuilds it without its source."""
        unneeded = ("id2label", "label2id", "architectures", "transformers_version", "dtype", "_name_or_path")
        config, plain = self.body.config.to_diff_dict(), type(self.body.config)()
        # Old files hold settings that nothing reads any more.
        left = {key: value for key, value in config.items() if key == "model_type" or hasattr(plain, key)}
        return {key: value for key, value in left.items() if key not in unneeded and value is not None}

    @property
    def embedding(self) -> nn.Embedding:
        """The word embedding [V, E], in whose space `embed_soft` reads."""
        return self.body.get_input_embeddings()

    def forward(self, mask: Tensor, *, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        """mask [N, T] (true where there is a token) with ids int64 [N, T] or embeddings [N, T, E] → [N, dim]."""
        words = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        states = self.body(attention_mask=mask.long(), **words).last_hidden_state  # [N, T, dim]
        if self.pool == "cls":
            return states[:, 0]
        kept = mask.unsqueeze(2).to(states.dtype)
        return (states * kept).sum(1) / kept.sum(1)


class Head(nn.Module):
    """From the pooled photo [N, bridge dim] and the text vector [N, text dim] into the shared space, both [N, dim].

    hidden: units of the text's inner layer, 0 = one projection. `log_scale` is the logarithm of the learnt inverse
    temperature, which `limit` keeps at 100 at most (CLIP: Radford et al. 2021, arXiv:2103.00020).
    """

    def __init__(self, photo_dim: int, text_dim: int, dim: int = 512, hidden: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.photo = nn.Sequential(nn.Dropout(dropout), nn.Linear(photo_dim, dim))
        inner = [nn.Linear(text_dim, hidden), nn.GELU(), nn.Dropout(dropout)] if hidden else []
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Dropout(dropout), *inner)
        self.text.append(nn.Linear(hidden or text_dim, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.log_scale.exp()

    @torch.no_grad()
    def limit(self) -> None:
        """Bring the temperature back to 1 / 100 where a step went below: the parameter itself, because a clamp in the
        forward pass has no gradient that would lead back."""
        self.log_scale.clamp_(max=math.log(100))


class TwoTowers(nn.Module):
    """Frozen image encoder → bridge → mean → 512; frozen text encoder → head → 512; both of length 1.

    `tokens`: ids of bos, eos, pad and unk; texts are read as BOS, words, EOS, at most `max_length` in all.
    `read_with` gives it the tokenizer that `embed_texts` needs.
    """

    frozen_parts = ("encoder", "text")
    task = "retrieval"

    def __init__(
        self,
        encoder: nn.Module,
        bridge: nn.Module,
        text: TextTower,
        head: Head,
        *,
        tokens: dict[str, int],
        max_length: int,
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.encoder, self.bridge, self.text, self.head = encoder, bridge, text, head
        self.tokens, self.max_length, self.size = tokens, max_length, size
        self.tokenizer: Tokenizer | None = None
        for part in self.frozen_parts:
            getattr(self, part).eval().requires_grad_(False)

    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "bridge": self.bridge, "text": self.text, "head": self.head}

    def train(self, mode: bool = True) -> TwoTowers:
        """As of any module, but what is frozen keeps its dropout and statistics still."""
        super().train(mode)
        for part in self.frozen_parts:
            getattr(self, part).eval()
        return self

    def read_with(self, tokenizer: Tokenizer) -> TwoTowers:
        self.tokenizer = tokenizer
        return self

    # --- training: both sides from the frozen towers' features --------------------------------------------------

    def forward(
        self, texts: Tensor, *, pixels: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text vectors [M, text dim] (see `text_features`) with pixels uint8 [N, H, W, 3] or the encoder's features
        [N, L, encoder dim] → photos [N, dim] and texts [M, dim], of length 1, float32."""
        return self.embed_photos(pixels=pixels, features=features), self.project_texts(texts)

    def project_texts(self, vectors: Tensor) -> Tensor:
        """The text tower's vectors [M, text dim] → [M, dim] of length 1."""
        return F.normalize(self.head.text(vectors).float(), dim=-1)

    # --- what a critic asks -------------------------------------------------------------------------------------

    def embed_photos(self, *, pixels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """pixels uint8 [N, H, W, 3] or the encoder's features [N, L, encoder dim] → [N, dim] of length 1."""
        if features is None:
            features = self.encoder(pixels)
        return F.normalize(self.head.photo(self.bridge(features).mean(1)).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, in `caption_text` form as in training → [N, dim] of length 1."""
        parts = [self.text_features(texts[start : start + TEXTS]) for start in range(0, len(texts), TEXTS)]
        return self.project_texts(torch.cat(parts))

    def embed_soft(self, inputs_embeds: Tensor, mask: Tensor) -> Tensor:
        """Soft words in the text tower's embedding space [N, T, E] (`text.embedding`: BOS and EOS included, as rows
        `tokens["bos"]` and `tokens["eos"]`), mask [N, T] → [N, dim] of length 1.

        Gradients flow through the frozen tower to `inputs_embeds`. With the embeddings of `encode`'s ids this is
        `embed_texts`.
        """
        return self.project_texts(self.text(mask, embeds=inputs_embeds))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """What the frozen text tower makes of texts: [N, text dim]."""
        ids, mask = (tensor.to(self.head.log_scale.device) for tensor in self.encode(texts))
        return self.text(mask, ids=ids)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts → ids int64 [N, T] (BOS, words, EOS, then pad) and mask bool [N, T]."""
        if self.tokenizer is None:
            raise ValueError("the text tower has no tokenizer yet: call read_with first")
        lines = []
        for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False):
            words = [i for i, kept in zip(encoding.ids, encoding.attention_mask, strict=True) if kept]  # no padding
            lines.append([self.tokens["bos"], *words[: self.max_length - 2], self.tokens["eos"]])
        ids = torch.full((len(lines), max(map(len, lines))), self.tokens["pad"], dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, line in enumerate(lines):
            ids[row, : len(line)] = torch.tensor(line)
            mask[row, : len(line)] = True
        return ids, mask


def open_text_tower(source: str | None, config: dict[str, Any], pool: str) -> TextTower:
    """A text encoder (BERT, DistilBERT, MiniLM, RoBERTa, ...) by hub id or directory; without `source`, from `config`
    (with its "model_type"). UsageError where it cannot be loaded or lacks weights."""
    from transformers import AutoConfig, AutoModel

    if not source:
        return TextTower(_from_config(AutoConfig, AutoModel, config), pool)
    if "model_type" not in read_config(source, "text"):
        raise UsageError(f"text {source}: its config.json has no model_type")
    with reading(source, "text") as place:
        body, info = AutoModel.from_pretrained(place, output_loading_info=True, use_safetensors=True)
    # A pooler behind the states is not used: some encoders come without one.
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise UsageError(f"text {source} lacks {len(missing)} of the text encoder's weights, {missing[0]} first")
    return TextTower(_without_pooler(body), pool)


def _from_config(auto_config: Any, auto_model: Any, config: dict[str, Any]) -> nn.Module:
    from huggingface_hub.errors import StrictDataclassError

    kind = config.get("model_type")
    if not kind:
        raise UsageError('recipe [text]: no source and no config.model_type; give one (model_type = "distilbert")')
    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        whole = auto_config.for_model(kind, **settings)
        if unknown := [key for key in settings if not hasattr(type(whole)(), key)]:
            raise UsageError(f"recipe [text]: {type(whole).__name__} has no {', '.join(unknown)}")
        return _without_pooler(auto_model.from_config(whole))
    except (*BAD_SETTINGS, StrictDataclassError, KeyError) as error:
        raise UsageError(f"recipe [text] ({kind}): {str(error).splitlines()[0]}") from error


def _without_pooler(body: nn.Module) -> nn.Module:
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    if not hasattr(body.config, "hidden_size") or not hasattr(body, "get_input_embeddings"):
        raise UsageError(f"recipe [text]: a {body.config.model_type} is not a text encoder")
    return body.eval()


def build_towers(recipe: Recipe, tokens: dict[str, int], *, load_weights: bool) -> TwoTowers:
    """The two towers of a recipe. `tokens`: ids of bos, eos, pad, unk and vocab_size.

    `load_weights=False` builds shapes only (the weights come from a checkpoint). UsageError for what cannot be built.
    """
    for i, stage in enumerate(recipe.stages):
        if stage.encoder_lr:
            raise UsageError(f"stages.{i}.encoder_lr: both encoders of a retrieval model are frozen, leave it at 0")
    if recipe.data.captions_per_photo != 1:
        raise UsageError("task = retrieval learns one caption of a photo in a step: data.captions_per_photo = 1")
    settings, sight = recipe.text, recipe.encoder
    text = open_text_tower(settings.source if load_weights else None, settings.config, settings.pool)
    longest = getattr(text.body.config, "max_position_embeddings", settings.max_length)
    if not 3 <= settings.max_length <= longest:
        raise UsageError(f"text.max_length = {settings.max_length} is out of range: this encoder reads 3 to {longest}")
    if tokens["vocab_size"] > text.embedding.num_embeddings:
        known = f"knows {text.embedding.num_embeddings:,} tokens, its tokenizer has {tokens['vocab_size']:,}"
        raise UsageError(f"recipe [text]: the text encoder {known}")
    options = {"source": sight.source if load_weights else None, "config": sight.config, "features": sight.features}
    encoder = build_encoder({"kind": sight.kind, **options})
    fit(encoder, recipe.data.image_size, sight.tile)
    bridge = build_part(BRIDGES, "bridge", recipe.bridge, encoder.dim)
    head = Head(bridge.dim, text.dim, settings.dim, settings.hidden, settings.dropout)
    size = (recipe.data.image_size, recipe.data.image_size)
    return TwoTowers(encoder, bridge, text, head, tokens=tokens, max_length=settings.max_length, size=size).eval()

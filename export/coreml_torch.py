"""The torch modules that coremltools traces: one photo at a time, and a KV cache that beams share.

Core ML keeps a KV cache as a state that a caller can neither reorder nor grow, so the cache is a row of slots, as
llama.cpp's is: every token of every beam is appended to one cache of batch 1, and the mask says which slots a token
sees, its own ancestors. Beams then need no copying, and the photo's prefix is held once for all of them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

STATES = ("keys", "values")


class ImageEncoder(nn.Module):
    """image float [1, 3, H, W] of the values 0 to 255 → the photo tensors. Core ML hands pictures over like this."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(image.permute(0, 2, 3, 1))


class RecurrentStep(nn.Module):
    """One word for every row of one photo, as the reference computes it: ids int32 [R], the photo tensors [1, ...], the
    state [R, ...] → logits [R, V], next state. photo: decoder input → encoder output; state: its names, in order.
    """

    def __init__(self, decoder: Any, photo: dict[str, str], state: list[str]) -> None:
        super().__init__()
        self.decoder, self.sources, self.names = decoder, list(photo.values()), state

    def forward(self, ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        photo = dict(zip(self.sources, others, strict=False))
        state = dict(zip(self.names, others[len(photo) :], strict=True))
        logits, state = self.decoder.advance(ids, ids * 0, photo, state)  # all rows look at the one photo there is
        return logits, *(state[name] for name in self.names)


class SlotDecoder(nn.Module):
    """A decoder over a cache of slots; prefill and step in one. What the kinds share; each reads its photo differently.

    The R new tokens fill the slots E - R to E, E being the mask's last axis. decoder: copied; layers, kv_heads and
    head_dim are its cache's.
    """

    def __init__(self, decoder: Any, slots: int, kv_heads: int) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        for name in STATES:
            self.register_buffer(name, torch.zeros(decoder.layers, kv_heads, slots, decoder.head_dim))

    def hold(self, layer: int, keys: Tensor, values: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values [1, heads, R, size]; returns those of all slots up to `end`."""
        at, begin = slice(layer, layer + 1), end - keys.shape[2]
        self.keys[at, :, begin:end] = keys
        self.values[at, :, begin:end] = values
        return self.keys[at, :, :end], self.values[at, :, :end]


class PrefixSlots(SlotDecoder):
    """A causal language model: the photo is embeddings in front of the words.

    ids int32 [1, R]; words [1, R, 1]: 1 where there is a word, 0 where the row is of the photo's prefix;
    prefix [1, R, dim]: those rows, 0 elsewhere; positions int32 [1, R]; mask [1, 1, R, E]: 0 where a token sees a slot,
    -1e4 elsewhere; wanted int32 [K]: the rows whose logits are asked for → logits [K, V].
    """

    def __init__(self, decoder: Any, slots: int) -> None:
        super().__init__(decoder, slots, decoder.kv_heads)
        _make_static(self.decoder)
        # One key-value head serves several query heads; repeated by a gather, which needs no shape at run time.
        repeats = torch.arange(decoder.kv_heads).repeat_interleave(decoder.heads // decoder.kv_heads)
        self.register_buffer("heads", repeats)

    def forward(
        self, ids: Tensor, words: Tensor, prefix: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor
    ) -> Tensor:
        embeds = self.decoder.embedding(ids) * words + prefix  # [1, R, dim]
        out = self.decoder.lm.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=_cache(self, mask.shape[-1], ids.shape[1]),
            use_cache=True,
        )
        return self.decoder.lm.lm_head(out.last_hidden_state[0].index_select(0, wanted))


class PhotoSlots(SlotDecoder):
    """A transformer that looks at the photo in every layer: TransformerDecoder.

    photo: each layer's keys and values of the one photo [1, heads, L, size], as they come from the encoder; the rest as
    in PrefixSlots. Every row of the one batch looks at that photo, so that nothing of it is copied.
    """

    def __init__(self, decoder: Any, slots: int) -> None:
        super().__init__(decoder, slots, decoder.heads)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor, *photo: Tensor) -> Tensor:
        def remember(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return self.hold(layer, keys, values, mask.shape[-1])

        pairs = list(zip(photo[0::2], photo[1::2], strict=True))
        hidden = self.decoder.run(self.decoder.embed(ids, positions), pairs, remember, mask)  # [1, R, dim]
        return self.decoder.logits(hidden[0].index_select(0, wanted))


def _cache(slots: PrefixSlots, end: int, new: int) -> Any:
    """A transformers Cache over the slots up to `end`, the last `new` of which are written."""
    from transformers import Cache

    class Slots(Cache):
        def __init__(self) -> None:
            self.layers = []

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            seen = slots.hold(layer_idx, key_states, value_states, end)
            if len(slots.heads) == slots.keys.shape[1]:
                return seen
            return tuple(each.index_select(1, slots.heads) for each in seen)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return end - new

    return Slots()


class _RotaryTable(nn.Module):
    """Rotary embedding read from a table: computed in fp16, the angles of later positions would be far off."""

    def __init__(self, rotary: nn.Module, positions: int, dim: int) -> None:
        super().__init__()
        with torch.no_grad():
            cos, sin = rotary(torch.zeros(1, 1, dim), position_ids=torch.arange(positions).unsqueeze(0))
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids], self.sin[position_ids]


def _make_static(decoder: Any) -> None:
    base = decoder.lm.base_model
    if hasattr(base, "rotary_emb"):
        base.rotary_emb = _RotaryTable(base.rotary_emb, decoder.max_positions, decoder.dim)
    for module in base.modules():
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = 1  # the cache repeats the heads

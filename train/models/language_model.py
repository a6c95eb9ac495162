"""Causal language models of transformers as decoders: the photo is a prefix of embeddings in front of the words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...runtime.errors import UsageError
from .attention import stack_layers
from .hub import check_kind, known, pretrained, read_config

IMAGE = "{image}"  # in a prompt's text: where the photo goes
PHOTO = -1  # in a prompt: here goes an equal share of the photo's embeddings, all of them where it is there once
COMMON = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "sdpa"}
# Settings that say nothing about what the model computes, or that the recipe says in its own words.
NOT_KEPT = {
    "word_embed_proj_dim",
    "vocab_size",
    "use_cache",
    "tie_word_embeddings",
    "initializer_range",
    "init_std",
    "pretraining_tp",
    "dtype",
}


class LanguageModelDecoder(nn.Module):
    """Photo memory [N, L, D] is projected to L prefix embeddings; then BOS and words; the state is the KV cache.

    dim: hidden size; layers; heads / kv_heads: query and key-value heads; head_dim: size of an attention head, 0 =
    dim / heads (which it no longer is once heads are pruned); ffn: of the MLP; dropout: in all the places where the
    kind has one; max_positions: of prefix and caption together.
    source: hub id or directory of pretrained weights, which must have these sizes (`described` gives them); an
    embedding with more rows than vocab_size is cut. tied: the output layer shares the word embedding; project: False
    where the memory has the decoder's size already; config: other settings of transformers' configuration.
    prompt: ids that are read in front of BOS, with PHOTO where the photo's embeddings go; empty: those alone.
    """

    memory_kind = "prefix"
    # What each kind says: transformers' classes, how its configuration names our sizes, where it drops out.
    classes: ClassVar[tuple[str, str]]
    names: ClassVar[dict[str, str]]
    dropouts: ClassVar[tuple[str, ...]]
    usual: ClassVar[dict[str, int]] = {"ffn": 768}
    inside: ClassVar[tuple[str, ...]] = ()  # types of models that hold one of this kind

    def __init__(
        self,
        memory_dim: int,
        vocab_size: int,
        *,
        dim: int = 192,
        layers: int = 4,
        heads: int = 6,
        kv_heads: int = 0,
        head_dim: int = 0,
        ffn: int = 0,
        dropout: float = 0.1,
        max_positions: int = 256,
        source: str = "",
        tied: bool = True,
        project: bool = True,
        config: dict[str, Any] | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "ffn": ffn}
        for name in ("kv_heads", "head_dim"):
            if sizes[name] and name not in self.names:
                raise ValueError(f"this kind of decoder has no {name}")
        sizes = {name: size or self.usual.get(name, 0) for name, size in sizes.items()}
        kv_heads = sizes["kv_heads"] or heads
        if (dim % heads and not head_dim) or heads % kv_heads:
            raise ValueError(f"heads must divide dim ({heads}, {dim}), and kv_heads heads ({kv_heads}, {heads})")
        if not project and memory_dim != dim:
            raise ValueError(f"project = false needs a bridge of dim = {dim}, the decoder's; it has {memory_dim}")
        sizes |= {"kv_heads": kv_heads, "head_dim": head_dim or dim // heads, "max_positions": max_positions}
        self.project = nn.Linear(memory_dim, dim) if project else nn.Identity()
        self.dim, self.layers, self.heads, self.kv_heads = dim, layers, heads, kv_heads
        self.head_dim, self.max_positions = sizes["head_dim"], max_positions
        self.lm = self._language_model(sizes, dropout, vocab_size, tied, dict(config or {}), source)
        self.prompt = [int(i) for i in prompt]
        if self.prompt and PHOTO not in self.prompt:
            raise ValueError(f"the prompt has no place for the photo ({PHOTO})")
        if max(self.prompt, default=0) >= vocab_size or min(self.prompt, default=0) < PHOTO:
            raise ValueError(f"the prompt has ids outside the vocabulary of {vocab_size}")

    def _language_model(
        self, sizes: dict[str, int], dropout: float, vocab_size: int, tied: bool, config: dict[str, Any], source: str
    ) -> nn.Module:
        import transformers

        make, config_class = (getattr(transformers, name) for name in self.classes)
        known("recipe [decoder] config", config_class, config)
        settings = {self.names[name]: size for name, size in sizes.items() if name in self.names}
        settings |= {name: dropout for name in self.dropouts} | COMMON | {"tie_word_embeddings": tied} | config
        self._check(settings)
        if not source:
            return make(config_class(vocab_size=vocab_size, **settings))
        check_kind(source, {config_class.model_type, *self.inside}, "decoder")
        raw = read_config(source, "decoder")
        rows = _text(raw).get("vocab_size", config_class().vocab_size)
        if rows < vocab_size:
            raise UsageError(
                f"decoder {source} knows {rows} tokens and the tokenizer has {vocab_size}: take the tokenizer that "
                "belongs to it, tokenizer.kind = pretrained"
            )
        mapping = {r"^model\.text_model\.": "model."} if raw.get("model_type") in self.inside else {}
        lm = pretrained(
            make,
            source,
            role="decoder",
            whole=self.inside,
            config=config_class(vocab_size=rows, **settings),
            **({"key_mapping": mapping} if mapping else {}),
        )
        if rows > vocab_size:
            lm.resize_token_embeddings(vocab_size, mean_resizing=False)
        return lm

    @classmethod
    def described(cls, source: str) -> dict[str, Any]:
        """The options that rebuild the model of a hub id or directory without it; reads its config.json alone."""
        import transformers

        config_class = getattr(transformers, cls.classes[1])
        check_kind(source, {config_class.model_type, *cls.inside}, "decoder")
        raw = read_config(source, "decoder")
        tied = raw.get("tie_word_embeddings", _text(raw).get("tie_word_embeddings"))
        text = {key: value for key, value in _text(raw).items() if key not in ("model_type", "transformers_version")}
        config = known(f"decoder {source}", config_class, text, strict=False)
        cls._check({name: getattr(config, name) for name in config_class.__annotations__ if hasattr(config, name)})
        found = {name: getattr(config, setting) for name, setting in cls.names.items()}
        found["ffn"] = found["ffn"] or 4 * found["dim"]  # GPT-2's null
        usual = config_class()
        more = {}
        for name in config_class.__annotations__:
            value = getattr(config, name, None)
            named = name in cls.names.values() or name.endswith("_token_id") or name.startswith("summary_")
            if named or name in NOT_KEPT or name == "model_type" or value is None:
                continue
            if value != getattr(usual, name) or name in cls.dropouts:
                more[name] = value
        return {**found, "tied": config.tie_word_embeddings if tied is None else tied, "config": more}

    @classmethod
    def _check(cls, settings: dict[str, Any]) -> None:
        """ValueError for models of this kind that no decoder here computes."""

    @property
    def embedding(self) -> nn.Embedding:
        """The word embedding [V, dim], which is the output layer, too, where they are tied."""
        return self.lm.get_input_embeddings()

    def prompt_words(self) -> Tensor | None:
        """The embeddings of the prompt's words [W, dim]; None where there is no prompt."""
        if not self.prompt:
            return None
        weight = self.embedding.weight
        words = [i for i in self.prompt if i != PHOTO]
        return self.embedding(torch.tensor(words, dtype=torch.long, device=weight.device))

    def photo(self, memory: Tensor, words: Tensor | None = None) -> dict[str, Tensor]:
        """Everything that is computed once per photo: prefix [N, P, dim], the prompt with the photo's L embeddings in
        their place, or those alone. words: what `prompt_words` gives, where that is known already."""
        seen = self.project(memory)  # [N, L, dim]
        words = self.prompt_words() if words is None else words
        if words is None:
            return {"prefix": seen}
        n, count, _ = seen.shape
        both = torch.cat((words.to(seen.dtype).expand(n, -1, -1), seen), 1)  # [N, W + L, dim]
        return {"prefix": both[:, torch.tensor(self._order(count), device=both.device)]}

    def _order(self, count: int) -> list[int]:
        """For each position of the prefix its place among the prompt's words and, behind them, `count` embeddings."""
        places = self.prompt.count(PHOTO)
        if count % places:
            raise UsageError(f"the prompt has places for {places} photo embeddings; the bridge gives {count}")
        order, word, seen = [], 0, len(self.prompt) - places
        for i in self.prompt:
            if i == PHOTO:
                order += range(seen, seen + count // places)
                seen += count // places
            else:
                order.append(word)
                word += 1
        return order

    def forward(self, memory: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Teacher forcing: memory [N, L, D], input ids [N, C, T] → logits [N, C, T, V]; with `keep` [N, C, T], those
        positions only: [K, V]."""
        n, captions, length = ids.shape
        prefix = self.photo(memory)["prefix"]  # [N, P, dim]
        if prefix.shape[1] + length > self.max_positions:
            need = f"{prefix.shape[1]} {'prompt' if self.prompt else 'photo'} and {length} caption positions"
            raise UsageError(f"recipe [decoder]: max_positions = {self.max_positions} is too few for {need}")
        prefix = prefix.repeat_interleave(captions, dim=0)  # [N·C, P, dim]
        words = self.embedding(ids.flatten(0, 1))  # [N·C, T, dim]
        hidden = self.lm.base_model(inputs_embeds=torch.cat((prefix, words), 1), use_cache=False).last_hidden_state
        hidden = hidden[:, prefix.shape[1] :].unflatten(0, (n, captions))  # [N, C, T, dim]
        return self.lm.lm_head(hidden if keep is None else hidden[keep])

    def run(
        self, prefix: Tensor, ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """prefix [B, P, dim] (P may be 0), ids [B, T], past per layer (k, v) [B, kv_heads, length, head_dim]
        → logits of the last position [B, V], present."""
        from transformers import DynamicCache

        embeds = torch.cat((prefix, self.embedding(ids)), dim=1)  # [B, P + T, dim]
        start = past[0][0].shape[2]
        # Given, not left to the model: OPT would count them from the mask. One row of positions per caption: ONNX
        # Runtime's RotaryEmbedding does not broadcast.
        positions = (torch.arange(embeds.shape[1], device=embeds.device) + start).expand(embeds.shape[0], -1)
        mask = torch.ones(embeds.shape[0], start + embeds.shape[1], dtype=torch.long, device=embeds.device)
        out = self.lm.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache(ddp_cache_data=past),
            use_cache=True,
        )
        present = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return self.lm.lm_head(out.last_hidden_state[:, -1]), present

    def empty(self, rows: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        shape = (rows, self.kv_heads, 0, self.head_dim)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(self.layers)]

    # --- the two operations of a session, in torch -------------------------------------------------------------

    def begin(self, photo: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Prefill prefix, BOS and prompt: ids [N, P] → logits [N, V], state (k and v stacked over layers)."""
        prefix = photo["prefix"]
        logits, present = self.run(prefix, ids, self.empty(len(ids), prefix))
        return logits, stack_layers(present)

    def advance(
        self, ids: Tensor, index: Tensor, photo: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [B], state [B, layers, kv_heads, length, head_dim] → logits [B, V], next state."""
        past = [(state["k"][:, i], state["v"][:, i]) for i in range(self.layers)]
        logits, present = self.run(photo["prefix"].new_zeros(len(ids), 0, self.dim), ids.unsqueeze(1), past)
        return logits, stack_layers(present)

    # --- what pruning needs to know ----------------------------------------------------------------------------

    stack = ""  # where the layers are: a ModuleList
    embedded = ""  # the word embedding's weight

    @property
    def vocab_rows(self) -> tuple[str, ...]:
        """Parameters with a row for each word."""
        return (self.embedded, "lm.lm_head.weight")

    def follows(self, options: dict[str, int]) -> dict[str, int]:
        """The recipe's other settings that change with pruned ones."""
        return {}

    @contextmanager
    def without(self, layer: int) -> Iterator[None]:
        """Inside the block, teacher forcing skips a layer."""
        above, _, name = self.stack.rpartition(".")
        parent, config = self.get_submodule(above), self.lm.base_model.config
        layers, count = getattr(parent, name), config.num_hidden_layers
        setattr(parent, name, nn.ModuleList(block for i, block in enumerate(layers) if i != layer))
        config.num_hidden_layers = count - 1
        try:
            yield
        finally:
            setattr(parent, name, layers)
            config.num_hidden_layers = count

    # --- what the export needs to know -------------------------------------------------------------------------

    photo_outputs = ("prefix",)

    def session_roles(self) -> dict:
        """How the runtime wires the two graphs (bundle.json "session")."""
        return {
            "ids": {"input": "ids", "rank": 2},
            "logits": "logits",
            "prefix": {"input": "prefix", "from": "prefix", "dim": self.dim},
            "positions": self.max_positions,
            "kv": [
                {
                    "input": f"past_{part}_{i}",
                    "output": f"present_{part}_{i}",
                    "heads": self.kv_heads,
                    "dim": self.head_dim,
                }
                for i in range(self.layers)
                for part in ("k", "v")
            ],
        }

    def graph_inputs(self, grid_cells: int) -> dict[str, tuple[Tensor, dict[int, str]]]:
        """Example tensors (distinct sizes > 1) and dynamic axes for each input of the decoder graph, in order."""
        inputs = {
            "ids": (torch.ones(3, 5, dtype=torch.long), {0: "rows", 1: "length"}),
            "prefix": (torch.randn(3, 2, self.dim), {0: "rows", 1: "prefix_length"}),
        }
        for i in range(self.layers):
            for part in ("k", "v"):
                past = torch.randn(3, self.kv_heads, 7, self.head_dim)
                inputs[f"past_{part}_{i}"] = (past, {0: "rows", 2: "past_length"})
        return inputs

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        return ("logits", *(role["output"] for role in self.session_roles()["kv"]))

    def graph(self, ids: Tensor, prefix: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """The decoder graph's forward: prefill (past length 0) and step in one."""
        logits, present = self.run(prefix, ids, list(zip(past[0::2], past[1::2], strict=True)))
        return logits, *(tensor for pair in present for tensor in pair)


def _text(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    return raw.get("text_config", raw)

"""Causal language models of transformers as decoders: the photo is a prefix of embeddings in front of the words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...runtime.errors import UsageError
from .widths import Columns, Width, units

COMMON = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}


class LanguageModelDecoder(nn.Module):
    """Photo memory [N, L, D] is projected to L prefix embeddings; then BOS and words; the state is the KV cache.

    What the kinds share; each sets `lm`, transformers' model with tied embeddings and random weights.
    dim: hidden size; layers; heads / kv_heads: query and key-value heads; max_positions: of prefix and
    caption together.
    """

    memory_kind = "prefix"
    lm: nn.Module

    def __init__(
        self,
        memory_dim: int,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int,
        max_positions: int,
        head_dim: int = 0,
    ) -> None:
        super().__init__()
        if (dim % heads and not head_dim) or heads % kv_heads:
            raise ValueError(f"heads must divide dim ({heads}, {dim}), and kv_heads heads ({kv_heads}, {heads})")
        self.project = nn.Linear(memory_dim, dim)
        self.dim, self.layers, self.heads, self.kv_heads = dim, layers, heads, kv_heads
        self.head_dim = head_dim or dim // heads
        self.max_positions = max_positions

    @property
    def embedding(self) -> nn.Embedding:
        """The word embedding [V, dim], which is the output layer, too."""
        return self.lm.get_input_embeddings()

    def photo(self, memory: Tensor) -> dict[str, Tensor]:
        """Everything that is computed once per photo: prefix [N, L, dim]."""
        return {"prefix": self.project(memory)}

    def forward(self, memory: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Teacher forcing: memory [N, L, D], input ids [N, C, T] → logits [N, C, T, V]; with `keep` [N, C, T], those
        positions only: [K, V]."""
        n, captions, length = ids.shape
        if memory.shape[1] + length > self.max_positions:
            need = f"{memory.shape[1]} photo and {length} caption positions"
            raise UsageError(f"recipe [decoder]: max_positions = {self.max_positions} is too few for {need}")
        prefix = self.photo(memory)["prefix"].repeat_interleave(captions, dim=0)  # [N·C, L, dim]
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
        return logits, _stack(present)

    def advance(
        self, ids: Tensor, index: Tensor, photo: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [B], state [B, layers, kv_heads, length, head_dim] → logits [B, V], next state."""
        past = [(state["k"][:, i], state["v"][:, i]) for i in range(self.layers)]
        logits, present = self.run(photo["prefix"].new_zeros(len(ids), 0, self.dim), ids.unsqueeze(1), past)
        return logits, _stack(present)

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


class LlamaDecoder(LanguageModelDecoder):
    """A small llama (Touvron et al. 2023, arXiv:2302.13971): rotary positions, grouped-query attention, SwiGLU.

    head_dim: size of an attention head, 0 = dim / heads (which it no longer is once heads are pruned).
    """

    def __init__(
        self,
        memory_dim: int,
        vocab_size: int,
        *,
        dim: int = 192,
        layers: int = 4,
        heads: int = 6,
        kv_heads: int = 2,
        ffn: int = 512,
        dropout: float = 0.1,
        max_positions: int = 256,
        head_dim: int = 0,
    ) -> None:
        super().__init__(memory_dim, dim, layers, heads, kv_heads, max_positions, head_dim)
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=self.head_dim,
            intermediate_size=ffn,
            max_position_embeddings=max_positions,
            attention_dropout=dropout,
            **COMMON,
        )
        self.lm = LlamaForCausalLM(config)

    stack, embedded = "lm.model.layers", "lm.model.embed_tokens.weight"

    def widths(self) -> list[Width]:
        """Each layer's MLP units and attention heads. With grouped queries every key-value head keeps as many query
        heads as the others; without, a head goes with its keys and values."""
        found = []
        head = torch.arange(self.heads * self.head_dim).view(self.heads, self.head_dim)
        shared = self.heads // self.kv_heads
        for i in range(self.layers):
            at, ffn = f"{self.stack}.{i}", units(self.lm.config.intermediate_size)
            rows = {f"{at}.mlp.{name}_proj.weight": (0, ffn) for name in ("gate", "up")}
            found.append(Width("ffn", f"ffn of layer {i}", rows, (Columns(f"{at}.mlp.down_proj", ffn),)))
            parts = "q" if shared > 1 else "qkv"
            rows = {f"{at}.self_attn.{part}_proj.weight": (0, head) for part in parts}
            buckets = tuple(j // shared for j in range(self.heads)) if shared > 1 else ()
            readers = (Columns(f"{at}.self_attn.o_proj", head),)
            found.append(Width("heads", f"heads of layer {i}", rows, readers, buckets))
        return found

    def follows(self, options: dict[str, int]) -> dict[str, int]:
        if "heads" not in options:
            return {}
        kv_heads = self.kv_heads if self.heads > self.kv_heads else options["heads"]
        return {"kv_heads": kv_heads, "head_dim": self.head_dim}


class GPT2Decoder(LanguageModelDecoder):
    """A small GPT-2 (Radford et al. 2019): learnt positions, added to the prefix as to the words."""

    def __init__(
        self,
        memory_dim: int,
        vocab_size: int,
        *,
        dim: int = 192,
        layers: int = 4,
        heads: int = 6,
        ffn: int = 768,
        dropout: float = 0.1,
        max_positions: int = 256,
    ) -> None:
        super().__init__(memory_dim, dim, layers, heads, heads, max_positions)
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=dim,
            n_layer=layers,
            n_head=heads,
            n_inner=ffn,
            n_positions=max_positions,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            **COMMON,
        )
        self.lm = GPT2LMHeadModel(config)

    stack, embedded = "lm.transformer.h", "lm.transformer.wte.weight"

    def widths(self) -> list[Width]:
        """Each layer's MLP units; GPT-2's weights are stored [in, out]. transformers ties heads to the hidden size."""
        found, ffn = [], units(self.lm.config.n_inner)
        for i in range(self.layers):
            at = f"{self.stack}.{i}.mlp"
            rows = {f"{at}.c_fc.weight": (1, ffn), f"{at}.c_fc.bias": (0, ffn)}
            found.append(Width("ffn", f"ffn of layer {i}", rows, (Columns(f"{at}.c_proj", ffn, dim=0),)))
        return found


class OPTDecoder(LanguageModelDecoder):
    """A small OPT (Zhang et al. 2022, arXiv:2205.01068): learnt positions behind an offset of two, ReLU."""

    def __init__(
        self,
        memory_dim: int,
        vocab_size: int,
        *,
        dim: int = 192,
        layers: int = 4,
        heads: int = 6,
        ffn: int = 768,
        dropout: float = 0.1,
        max_positions: int = 256,
    ) -> None:
        super().__init__(memory_dim, dim, layers, heads, heads, max_positions)
        from transformers import OPTConfig, OPTForCausalLM

        config = OPTConfig(
            vocab_size=vocab_size,
            hidden_size=dim,
            word_embed_proj_dim=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=ffn,
            max_position_embeddings=max_positions,
            dropout=dropout,
            attention_dropout=dropout,
            pad_token_id=None,  # by default id 1, which is our BOS and would never be learnt
            **COMMON,
        )
        self.lm = OPTForCausalLM(config)

    stack, embedded = "lm.model.decoder.layers", "lm.model.decoder.embed_tokens.weight"

    def widths(self) -> list[Width]:
        """Each layer's MLP units. transformers ties OPT's heads to its hidden size."""
        found, ffn = [], units(self.lm.config.ffn_dim)
        for i in range(self.layers):
            at = f"{self.stack}.{i}"
            rows = {f"{at}.fc1.weight": (0, ffn), f"{at}.fc1.bias": (0, ffn)}
            found.append(Width("ffn", f"ffn of layer {i}", rows, (Columns(f"{at}.fc2", ffn),)))
        return found


def _stack(present: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"k": torch.stack([k for k, _ in present], 1), "v": torch.stack([v for _, v in present], 1)}

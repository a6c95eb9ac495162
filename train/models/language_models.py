"""The kinds of language models: what each one's configuration calls its sizes, and which of its widths can go."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .language_model import LanguageModelDecoder
from .siglip import VLMS
from .widths import Columns, Width, units


class LlamaDecoder(LanguageModelDecoder):
    """A llama (Touvron et al. 2023, arXiv:2302.13971): rotary positions, grouped-query attention, SwiGLU."""

    classes = ("LlamaForCausalLM", "LlamaConfig")
    names: ClassVar[dict[str, str]] = {
        "dim": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn": "intermediate_size",
        "max_positions": "max_position_embeddings",
    }
    dropouts = ("attention_dropout",)
    usual: ClassVar[dict[str, int]] = {"kv_heads": 2, "ffn": 512}
    inside = VLMS

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
    """A GPT-2 (Radford et al. 2019): learnt positions, added to the prefix as to the words."""

    classes = ("GPT2LMHeadModel", "GPT2Config")
    names: ClassVar[dict[str, str]] = {
        "dim": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "ffn": "n_inner",
        "max_positions": "n_positions",
    }
    dropouts = ("embd_pdrop", "resid_pdrop", "attn_pdrop")

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
    """An OPT (Zhang et al. 2022, arXiv:2205.01068): learnt positions behind an offset of two, ReLU."""

    classes = ("OPTForCausalLM", "OPTConfig")
    names: ClassVar[dict[str, str]] = {
        "dim": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn": "ffn_dim",
        "max_positions": "max_position_embeddings",
    }
    dropouts = ("dropout", "attention_dropout")

    @classmethod
    def _check(cls, settings: dict[str, Any]) -> None:
        dim, embed = settings["hidden_size"], settings.get("word_embed_proj_dim")
        if embed not in (None, dim):
            raise ValueError(f"word_embed_proj_dim = {embed} is not its hidden size of {dim}; take another OPT")
        if not settings.get("do_layer_norm_before", True):
            raise ValueError("an OPT that normalises behind its layers, as opt-350m does, is not known; take another")

    stack, embedded = "lm.model.decoder.layers", "lm.model.decoder.embed_tokens.weight"

    def widths(self) -> list[Width]:
        """Each layer's MLP units. transformers ties OPT's heads to its hidden size."""
        found, ffn = [], units(self.lm.config.ffn_dim)
        for i in range(self.layers):
            at = f"{self.stack}.{i}"
            rows = {f"{at}.fc1.weight": (0, ffn), f"{at}.fc1.bias": (0, ffn)}
            found.append(Width("ffn", f"ffn of layer {i}", rows, (Columns(f"{at}.fc2", ffn),)))
        return found

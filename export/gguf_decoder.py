"""A language-model decoder as the GGUF file that llama.cpp reads: names, layouts and block formats of its tensors.

The layouts are those of llama.cpp's own converter (convert_hf_to_gguf.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UsageError
from .graph import PassResult

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from ..runtime.tokenizer import Tokenizer
    from ..train.models.language_model import LanguageModelDecoder

PRECISIONS = ("f16", "q8_0", "q4_0")
BLOCK = 32  # values that share one scale in q8_0 and q4_0
EMBEDDING, POSITIONS, OUTPUT = "token_embd.weight", "position_embd.weight", "output.weight"


@dataclass(frozen=True)
class Architecture:
    """How one kind of decoder is named and laid out in llama.cpp.

    stack: where the layers are in transformers' model; layer, whole: tensor name in GGUF → parameter there.
    layout: brings a tensor [out, in] from transformers' order into llama.cpp's. settings: adds the hyperparameters.
    """

    name: str
    stack: str
    layer: dict[str, str]
    whole: dict[str, str]
    layout: Callable[[str, np.ndarray, LanguageModelDecoder], np.ndarray]
    settings: Callable[[GGUFWriter, LanguageModelDecoder], None]


def write_decoder(
    path: Path,
    decoder: LanguageModelDecoder,
    kind: str,
    precision: str,
    *,
    tokenizer: Tokenizer,
    tokens: dict[str, int],
    keep: Collection[str] = (),
    words: bool = False,
) -> PassResult:
    """Write the decoder to `path`; kind: "llama" or "gpt2"; precision: f16, q8_0 or q4_0.

    Vectors stay float32. Rows that blocks of 32 do not divide, positions and the tensors in `keep` are stored as f16;
    under q4_0 the word embedding and the output layer are q8_0 (as in llama.cpp's own quantizer). words: name
    the words even where llama.cpp has no such tokenizer; its image encoders look for markers among them.
    """
    from gguf import GGUFWriter, LlamaFileType

    architecture = ARCHITECTURES[kind]
    writer = GGUFWriter(path, architecture.name)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{precision.upper()}"])
    writer.add_quantization_version(2)
    writer.add_vocab_size(tokens["vocab_size"])
    writer.add_context_length(decoder.max_positions)
    writer.add_embedding_length(decoder.dim)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(_ffn(decoder, architecture))
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    architecture.settings(writer, decoder)
    _add_vocabulary(writer, tokenizer, tokens, words)
    chosen = ((name, tensor, _precision(name, tensor, precision, keep)) for name, tensor in tensors(decoder, kind))
    cost = finish(writer, chosen, precision)
    return PassResult("gguf", {"graph": "decoder", "architecture": architecture.name, "precision": precision}, cost)


def finish(writer: GGUFWriter, tensors: Iterable[tuple[str, np.ndarray, str]], precision: str) -> dict[str, Any]:
    """Quantize (name, float32 values, precision) and write the file; how many tensors of each, and which stayed f16."""
    from gguf import GGMLQuantizationType, quants

    stored: dict[str, list[str]] = {}
    for name, tensor, chosen in tensors:
        stored.setdefault(chosen, []).append(name)
        kind = GGMLQuantizationType[chosen.upper()]
        writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cost: dict[str, Any] = {"tensors": {chosen: len(names) for chosen, names in sorted(stored.items())}}
    if precision != "f16" and "f16" in stored:
        cost["f16"] = stored["f16"]
    return cost


def tensors(decoder: LanguageModelDecoder, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Name in GGUF and float32 values of every tensor, weights [out, in]; a tied output layer is left out."""
    architecture = ARCHITECTURES[kind]
    parameters = dict(decoder.lm.named_parameters())

    def value(name: str, parameter: str) -> tuple[str, np.ndarray]:
        array = parameters[parameter].detach().cpu().float().numpy()
        return name, np.ascontiguousarray(architecture.layout(name, array, decoder))

    for name, parameter in architecture.whole.items():
        yield value(name, parameter)
    if "lm_head.weight" in parameters:
        yield value(OUTPUT, "lm_head.weight")
    for index in range(decoder.layers):
        for name, parameter in architecture.layer.items():
            yield value(f"blk.{index}.{name}", f"{architecture.stack}.{index}.{parameter}")


def _precision(name: str, tensor: np.ndarray, precision: str, keep: Collection[str]) -> str:
    if tensor.ndim == 1:
        return "f32"
    if name == POSITIONS or name in keep or tensor.shape[-1] % BLOCK:
        return "f16"
    return "q8_0" if name in (EMBEDDING, OUTPUT) and precision == "q4_0" else precision


def _ffn(decoder: LanguageModelDecoder, architecture: Architecture) -> int | list[int]:
    """MLP size, of each layer where they differ."""
    parameters = dict(decoder.lm.named_parameters())
    up = architecture.layer["ffn_up.weight"]
    found = []
    for index in range(decoder.layers):
        shape = parameters[f"{architecture.stack}.{index}.{up}"].shape
        found.append(next((size for size in shape if size != decoder.dim), decoder.dim))
    return found[0] if len(set(found)) == 1 else found


def _add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, tokens: dict[str, int], words: bool) -> None:
    """The words, for other programs: edgecap's runtime reads tokenizer.json and needs ids alone.

    llama.cpp's tokenizers include byte-level BPE; of word and Unigram vocabularies it gets none, or names only.
    """
    import json

    from gguf import TokenType

    tree = json.loads(tokenizer.inner.to_str())
    model, bytewise = tree["model"], _byte_level(tree)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    if not (merges and bytewise) and not words:
        writer.add_tokenizer_model("none")
        return
    special = set(tokenizer.inner.get_added_tokens_decoder())
    found = [tokenizer.inner.id_to_token(index) for index in range(tokens["vocab_size"])]
    names = [f"[PAD{index}]" if name is None else name for index, name in enumerate(found)]
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(names))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if '"type": "Digits"' in json.dumps(tree["pre_tokenizer"]) else "gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([TokenType.UNUSED if found[i] is None else kind for i, kind in enumerate(kinds)])
    writer.add_token_merges(merges or [" ".join(names[:2])])  # llama.cpp wants one at least
    writer.add_bos_token_id(tokens["bos"])
    writer.add_eos_token_id(tokens["eos"])
    writer.add_pad_token_id(tokens["pad"])
    writer.add_unk_token_id(tokens["unk"])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(tokenizer.encode("a") == tokenizer.encode(" a"))


def _byte_level(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer.json spells what it does not know as GPT-2 does, in bytes with letters of their own."""
    step = tree.get("pre_tokenizer") or {}
    return any(each["type"] == "ByteLevel" for each in step.get("pretokenizers", [step]) if each)


def _llama_layout(name: str, array: np.ndarray, decoder: LanguageModelDecoder) -> np.ndarray:
    """Queries and keys: from halves (transformers' rotation) to neighbouring pairs (llama.cpp's)."""
    heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _llama_settings(writer: GGUFWriter, decoder: LanguageModelDecoder) -> None:
    config = decoder.lm.config
    usual = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    _check(config, {**usual, "rope_parameters": {**config.rope_parameters, "rope_type": "default"}})
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)


def _check(config: Any, usual: dict[str, Any]) -> None:
    """UsageError where a setting is another one than llama.cpp computes with."""
    for name, value in usual.items():
        if getattr(config, name) != value:
            found = getattr(config, name)
            raise UsageError(
                f"llama.cpp knows this architecture only with {name} = {value}, not {found}; take another target"
            )


def _gpt2_layout(name: str, array: np.ndarray, decoder: LanguageModelDecoder) -> np.ndarray:
    """transformers' Conv1D keeps its weights as [in, out]."""
    return array.T if array.ndim == 2 and name not in (EMBEDDING, POSITIONS) else array


def _gpt2_settings(writer: GGUFWriter, decoder: LanguageModelDecoder) -> None:
    if decoder.heads * decoder.head_dim != decoder.dim:
        raise UsageError(
            f"llama.cpp knows gpt2 only with dim = heads × their size; here {decoder.dim} is not {decoder.heads} × "
            f"{decoder.head_dim}: export it without pruned heads, or to another target"
        )
    usual = {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    _check(decoder.lm.config, usual)
    writer.add_layer_norm_eps(decoder.lm.config.layer_norm_epsilon)


def _weights_and_biases(names: dict[str, str]) -> dict[str, str]:
    return {f"{name}.{part}": f"{module}.{part}" for name, module in names.items() for part in ("weight", "bias")}


ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        "model.layers",
        {
            "attn_norm.weight": "input_layernorm.weight",
            "attn_q.weight": "self_attn.q_proj.weight",
            "attn_k.weight": "self_attn.k_proj.weight",
            "attn_v.weight": "self_attn.v_proj.weight",
            "attn_output.weight": "self_attn.o_proj.weight",
            "ffn_norm.weight": "post_attention_layernorm.weight",
            "ffn_gate.weight": "mlp.gate_proj.weight",
            "ffn_up.weight": "mlp.up_proj.weight",
            "ffn_down.weight": "mlp.down_proj.weight",
        },
        {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"},
        _llama_layout,
        _llama_settings,
    ),
    "gpt2": Architecture(
        "gpt2",
        "transformer.h",
        _weights_and_biases(
            {
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            }
        ),
        {EMBEDDING: "transformer.wte.weight", POSITIONS: "transformer.wpe.weight"}
        | _weights_and_biases({"output_norm": "transformer.ln_f"}),
        _gpt2_layout,
        _gpt2_settings,
    ),
}

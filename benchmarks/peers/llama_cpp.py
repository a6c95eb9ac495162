"""A SmolVLM in llama.cpp through llama-cpp-python: f16, q8_0 or q4_0 text and an mmproj, by llama.h and mtmd.h.

`MTMDChatHandler` always splits a photo into a tile and an overview (128 image tokens): half of that work is not the
task, so only the overview is encoded, and the prompt is that of an unsplit photo.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import EdgecapError, UsageError
from .llama_text import built_with, feed, opened
from .vlm import Marks, Task, VlmPeer, copy_words, main, positions, words_by

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

TEXT, MMPROJ = "text.gguf", "mmproj.gguf"
POSITIONS = "v.position_embd.weight"
BLOCK = 32  # values that share a scale in q8_0 and q4_0
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FRAME_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
FRAME = {
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "embeddings.patch_embedding.bias",
    POSITIONS: "embeddings.position_embedding.weight",
    "v.post_ln.weight": "post_layernorm.weight",
    "v.post_ln.bias": "post_layernorm.bias",
}
EXACT = ("v.patch_embd.weight", POSITIONS)  # llama.cpp wants these in float32


class LlamaCppPeer(VlmPeer):
    kind = "llama_cpp"
    needs = ("numpy", "tokenizers", "llama_cpp")
    packages = ("llama-cpp-python", "numpy", "tokenizers")

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__(request)
        self.facts["build"] = built_with(self.lib)

    @classmethod
    def make(cls, task: Task, folder: Path) -> None:
        """As llama.cpp's convert_hf_to_gguf.py does; the image encoder in f16 or q8_0."""
        config = json.loads((Path(task.model) / "config.json").read_text(encoding="utf-8"))
        write_text(Path(task.model), config, folder / TEXT, task.precision)
        vision = "f16" if task.precision == "f16" else "q8_0"
        write_mmproj(Path(task.model), config, folder / MMPROJ, vision, task.size)
        copy_words(task, folder)

    def load(self, threads: int) -> None:
        from llama_cpp import mtmd_cpp as mtmd
        from tokenizers import Tokenizer

        self.mtmd = mtmd
        self.lib, self.quiet, self.model = opened(os.fsencode(self.folder / TEXT))
        for set_log in (mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            set_log(self.quiet, ctypes.c_void_p(0))
        frame = mtmd.mtmd_context_params_default()
        frame.use_gpu, frame.print_timings, frame.n_threads = False, False, threads
        self.frame = self.model and mtmd.mtmd_init_from_file(os.fsencode(self.folder / MMPROJ), self.model, frame)
        if not self.frame:
            raise EdgecapError(f"llama.cpp cannot load {self.folder}")
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        before, after = self.task.prompt(image="\0").split("\0")
        self.tokenizer = tokenizer
        self.before, self.after = (tokenizer.encode(text, add_special_tokens=False).ids for text in (before, after))
        lib = self.lib
        context = lib.llama_context_default_params()
        context.n_ctx = len(self.before) + self.task.tokens + len(self.after) + self.longest
        context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise EdgecapError(f"llama.cpp has no context of {context.n_ctx} tokens for {self.folder}")
        vocabulary = lib.llama_model_get_vocab(self.model)
        self.rows, self.end = lib.llama_vocab_n_tokens(vocabulary), lib.llama_vocab_eos(vocabulary)
        self.dim = lib.llama_model_n_embd(self.model)

    def prepare(self, picture: Image) -> Any:
        import numpy as np

        return np.ascontiguousarray(np.asarray(picture.convert("RGB")))  # [H, W, 3]

    def run(self, inputs: Any, marks: Marks) -> list[int]:
        import numpy as np

        lib = self.lib
        embeddings = self.encode(inputs)
        marks.encode()
        lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
        place = self.feed(np.array(self.before, np.int32), 0)
        place = self.feed(embeddings, place)
        place = self.feed(np.array(self.after, np.int32), place)
        ids: list[int] = []
        while True:
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (self.rows,))
            if len(ids) < self.shortest:
                logits[self.end] = -np.inf
            best = int(logits.argmax())
            marks.token(logits)
            if best == self.end:
                return ids
            ids.append(best)
            if len(ids) == self.longest:
                return ids
            place = self.feed(np.array([best], np.int32), place)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] → float32 [tokens, dim]: the whole picture, not its tiles."""
        import numpy as np

        mtmd = self.mtmd
        height, width, _ = pixels.shape
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            marker = mtmd.mtmd_default_marker()
            text = mtmd.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if mtmd.mtmd_tokenize(self.frame, chunks, ctypes.byref(text), bitmaps, 1):
                raise EdgecapError("llama.cpp cannot prepare the photo")
            parts = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
            whole = [p for p in parts if mtmd.mtmd_input_chunk_get_type(p) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE][-1]
            if mtmd.mtmd_encode_chunk(self.frame, whole):
                raise EdgecapError("llama.cpp cannot encode the photo")
            count = mtmd.mtmd_input_chunk_get_n_tokens(whole)
            if count != self.task.tokens:
                raise EdgecapError(f"llama.cpp makes {count} tokens of a picture, not {self.task.tokens}")
            return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.frame), (count, self.dim)).copy()
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def feed(self, given: np.ndarray, place: int) -> int:
        return feed(self.lib, self.context, given, place)

    def words(self, ids: list[int]) -> str:
        return words_by(self.tokenizer, ids)


def tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the directory in float32."""
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as held:
            for name in held.keys():
                yield name, held.get_tensor(name).float().numpy()


def add(writer: Any, name: str, tensor: np.ndarray, precision: str) -> None:
    """One tensor in its precision: vectors float32, rows that blocks do not divide f16."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    if tensor.ndim == 1 or name in EXACT:
        precision = "f32"
    elif tensor.shape[-1] % BLOCK and precision != "f16":
        precision = "f16"
    elif name in ("token_embd.weight", "output.weight") and precision == "q4_0":
        precision = "q8_0"  # as llama.cpp's own quantizer keeps them above 4 bits
    kind = GGMLQuantizationType[precision.upper()]
    writer.add_tensor(name, quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_text(model: Path, config: dict[str, Any], file: Path, precision: str) -> None:
    """The language model as architecture llama."""
    from gguf import GGUFWriter, LlamaFileType

    text = config["text_config"]
    heads, kv_heads, size = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    writer = GGUFWriter(file, "llama")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{precision.upper()}"])
    writer.add_quantization_version(2)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(float(text["rope_theta"]))
    writer.add_rope_dimension_count(size)
    write_words(writer, model, text)
    names = {"lm_head.weight": "output.weight", "model.text_model.norm.weight": "output_norm.weight"}
    names["model.text_model.embed_tokens.weight"] = "token_embd.weight"
    for i in range(text["num_hidden_layers"]):
        for ours, theirs in LAYER.items():
            names[f"model.text_model.layers.{i}.{theirs}.weight"] = f"blk.{i}.{ours}.weight"
    for name, tensor in tensors(model):
        if name not in names:
            continue
        found = names.pop(name)
        count = {"attn_q": heads, "attn_k": kv_heads}.get(found.split(".")[-2])
        if count:  # from halves (transformers' rotation) to neighbouring pairs (llama.cpp's)
            rows, columns = tensor.shape
            tensor = tensor.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        add(writer, found, tensor, precision)
    names.pop("lm_head.weight" if config["tie_word_embeddings"] else "", None)
    if names:
        raise UsageError(f"{model} has no {next(iter(names))}")
    finish(writer)


def write_words(writer: Any, model: Path, text: dict[str, Any]) -> None:
    from gguf import TokenType
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    special = set(tokenizer.get_added_tokens_decoder())
    names = [tokenizer.id_to_token(i) for i in range(text["vocab_size"])]
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(names))]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"[PAD{i}]" if name is None else name for i, name in enumerate(names)])
    writer.add_token_types([TokenType.UNUSED if n is None else k for n, k in zip(names, kinds, strict=True)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(text["bos_token_id"])
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_pad_token_id(text["pad_token_id"])
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def write_mmproj(model: Path, config: dict[str, Any], file: Path, precision: str, size: int) -> None:
    """Image encoder and pixel-shuffle projector as idefics3. size: of the pictures; it knows one size only, so fewer
    positions are left in where that is smaller than the model's."""
    from gguf import GGUFType, GGUFWriter, LlamaFileType, VisionProjectorType

    frame = config["vision_config"]
    images = json.loads((model / "preprocessor_config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(file, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{precision.upper()}"])
    writer.add_quantization_version(2)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(VisionProjectorType.IDEFICS3)
    writer.add_vision_use_gelu(True)
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(size)
    writer.add_vision_patch_size(frame["patch_size"])
    writer.add_vision_embedding_length(frame["hidden_size"])
    writer.add_vision_feed_forward_length(frame["intermediate_size"])
    writer.add_vision_block_count(frame["num_hidden_layers"])
    writer.add_vision_head_count(frame["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(frame["layer_norm_eps"])
    writer.add_vision_image_mean(images["image_mean"])
    writer.add_vision_image_std(images["image_std"])
    writer.add_vision_projector_scale_factor(config["scale_factor"])
    names = {f"model.vision_model.{theirs}": ours for ours, theirs in FRAME.items()}
    names["model.connector.modality_projection.proj.weight"] = "mm.model.fc.weight"
    for i in range(frame["num_hidden_layers"]):
        for ours, theirs in FRAME_LAYER.items():
            for part in ("weight", "bias"):
                names[f"model.vision_model.encoder.layers.{i}.{theirs}.{part}"] = f"v.blk.{i}.{ours}.{part}"
    for name, tensor in tensors(model):
        if name in names:
            if (found := names.pop(name)) == POSITIONS:
                tensor = tensor[positions(frame, size)[0]]
            add(writer, found, tensor, precision)
    if names:
        raise UsageError(f"{model} has no {next(iter(names))}")
    finish(writer)


if __name__ == "__main__":
    # What is no SmolVLM has another worker: its folders, and the way they are made, tell.
    from .captioner import main as prepare
    from .llama_prefix import LlamaPrefixPeer

    if "--bundle" in sys.argv:
        prepare(LlamaPrefixPeer)
    else:
        main(LlamaCppPeer, other=LlamaPrefixPeer)

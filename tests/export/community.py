"""A folder as the hub's ONNX community lays out a SmolVLM: three graphs with the names and shapes that transformers.js
and the model cards use, made of a small random model (tests/train/vlms.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..train.vlms import NATIVE, PATCH, SCALE, image_processor, load_vlm, save_vlm

TILE = 32
FORMS = ("concat", "grouped", "multihead")  # what the decoder's cache may be


def save_community(
    folder: Path, *, kind: str = "smolvlm", form: str = "concat", open_sides: bool = False, split: bool = False
) -> Path:
    """form: of FORMS. open_sides: the vision graph takes photos of any size, where those on the hub are of one.
    split: the processor cuts photos into tiles. The torch model lies in the folder, too.
    """
    save_vlm(folder, kind)
    model = load_vlm(folder)
    model.set_attn_implementation("eager")
    if form == "multihead":
        model = _all_heads(folder, model)
    (folder / "onnx").mkdir()
    side = NATIVE if not split or not open_sides else TILE
    image_processor(2 * side if split else side, side, split=split).save_pretrained(folder)
    ends = {"bos_token_id": 1, "eos_token_id": [2, _eos(folder)], "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    with torch.no_grad():
        _vision(model, folder / "onnx/vision_encoder.onnx", open_sides)
        _embed(model, folder / "onnx/embed_tokens.onnx")
        if form == "concat":
            _traced_decoder(model, folder / "onnx/decoder_model_merged.onnx")
        else:
            onnx.save(_fused_decoder(model, form), folder / "onnx/decoder_model_merged.onnx")
    return folder


def add_half(folder: Path) -> None:
    """The fp16 variant: halves inside and for the cache, float32 for what goes in and out, as on the hub."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        model = onnx.load(folder / f"onnx/{name}.onnx")
        cache = [v.name for v in (*model.graph.input, *model.graph.output) if v.name.startswith(("past", "present"))]
        kept = [v.name for v in (*model.graph.input, *model.graph.output) if v.name not in cache]
        onnx.save(convert_float_to_float16(model, keep_io_types=kept), folder / f"onnx/{name}_fp16.onnx")


def add_quantized(folder: Path) -> None:
    """The int8 variant, by dynamic quantization, with its weights in files beside the graphs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        place = folder / f"onnx/{name}_int8.onnx"
        types = ["MatMul", "Gather"]
        options = {"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(folder / f"onnx/{name}.onnx", place, types, weight_type=QuantType.QInt8, extra_options=options)
        model = onnx.load(place)
        place.unlink()
        onnx.save(model, place, save_as_external_data=True, location=f"{place.name}_data")


def add_blocks(folder: Path) -> None:
    """The q4 variant of the decoder: matrices in blocks of 4 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    place = folder / "onnx/decoder_model_merged.onnx"
    quantizer = MatMulNBitsQuantizer(onnx.load(place), block_size=32)
    quantizer.process()
    quantizer.model.save_model_to_file(str(place).replace(".onnx", "_q4.onnx"))


def _eos(folder: Path) -> int:
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return next(token["id"] for token in tokens if token["content"] == "<end_of_utterance>")


def _all_heads(folder: Path, model: Any) -> Any:
    """The same with as many heads of keys as of queries."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] = config["text_config"]["num_attention_heads"]
    state = model.state_dict()
    for name in list(state):
        if name.endswith(("k_proj.weight", "v_proj.weight")) and "text_model" in name:
            state[name] = state[name].repeat(2, 1)
    found = type(model)(type(model.config).from_dict(config))
    found.load_state_dict(state)
    found.save_pretrained(folder)
    found.set_attn_implementation("eager")
    return found.eval()


# --- the vision graph and the embedding, traced -------------------------------------------------------


class _Vision(nn.Module):
    """Frames that are all zero are left out, as transformers does with what fills up a batch."""

    def __init__(self, model: Any, open_sides: bool) -> None:
        super().__init__()
        self.tower, self.connector, self.open = model.model.vision_model, model.model.connector, open_sides

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        batch, count, channels, height, width = pixel_values.shape
        pixels = pixel_values.view(batch * count, channels, height, width)
        real = (pixels == 0.0).sum(dim=(-1, -2, -3)) != channels * height * width
        pixels = pixels[real]
        mask = pixel_attention_mask.view(batch * count, height, width)[real]
        mask = mask.reshape(-1, height // PATCH, PATCH, width // PATCH, PATCH).sum(dim=(2, 4)) > 0
        embeddings, native = self.tower.embeddings, self.tower.embeddings.num_patches_per_side
        bounds = torch.arange(1, native, dtype=torch.float32) / native
        places = []
        for line in (mask[:, :, 0], mask[:, 0, :]):
            at = torch.arange(line.shape[1], dtype=torch.float32)[None] * (1.0 / line.sum(1, keepdim=True))
            places.append(torch.bucketize(torch.clamp(at, max=1 - 1e-6), bounds, right=True))
        where = (places[0][:, :, None] * native + places[1][:, None, :]).flatten(1)
        where = torch.where(mask.flatten(1), where, torch.zeros_like(where))
        x = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + embeddings.position_embedding(where)
        x = self.tower.post_layernorm(self.tower.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state)
        if not self.open:
            return self.connector(x)  # which takes the root of the length: a number in the traced graph
        side = height // PATCH // SCALE
        x = x.reshape(-1, side, SCALE, side, SCALE, x.shape[-1]).transpose(2, 3)
        return self.connector.modality_projection(x.reshape(-1, side * side, x.shape[-1] * SCALE * SCALE))


def _vision(model: Any, place: Path, open_sides: bool) -> None:
    size = {"height": "height", "width": "width"} if open_sides else {}
    sizes = {3 + i: name for i, name in enumerate(size)}
    pixels = torch.rand(2, 3, 3, NATIVE, NATIVE)
    mask = torch.ones(2, 3, NATIVE, NATIVE, dtype=torch.bool)
    _trace(
        _Vision(model, open_sides),
        {
            "pixel_values": (pixels, {0: "batch_size", 1: "num_images", **sizes}),
            "pixel_attention_mask": (mask, {0: "batch_size", 1: "num_images", **{k - 1: v for k, v in sizes.items()}}),
        },
        {"image_features": {0: "frames"}},
        place,
    )


def _embed(model: Any, place: Path) -> None:
    axes = {0: "batch_size", 1: "sequence_length"}
    ids = torch.ones(2, 3, dtype=torch.long)
    _trace(model.get_input_embeddings(), {"input_ids": (ids, axes)}, {"inputs_embeds": axes}, place)


def _trace(
    module: nn.Module, inputs: dict[str, tuple[Tensor, dict[int, str]]], outputs: dict[str, dict[int, str]], place: Path
) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(example for example, _ in inputs.values()),
            place,
            dynamo=False,
            opset_version=14,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={**{name: axes for name, (_, axes) in inputs.items()}, **outputs},
        )


# --- the decoder: traced, or with the operators that ONNX Runtime's tools put into it ------------------------------


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text, self.head = model.model.text_model, model.lm_head

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2], strict=True)))
        found = self.text(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        kv = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return self.head(found.last_hidden_state), *kv


def _names(model: Any) -> tuple[list[str], list[str]]:
    layers = range(model.config.text_config.num_hidden_layers)
    past = [f"past_key_values.{layer}.{what}" for layer in layers for what in ("key", "value")]
    return past, [name.replace("past_key_values", "present") for name in past]


def _traced_decoder(model: Any, place: Path) -> None:
    config = model.config.text_config
    past, present = _names(model)
    rows, new = {0: "batch_size"}, {0: "batch_size", 1: "sequence_length"}
    kv = torch.rand(2, config.num_key_value_heads, 7, config.head_dim)
    inputs = {
        "inputs_embeds": (torch.rand(2, 5, config.hidden_size), new),
        "attention_mask": (torch.ones(2, 12, dtype=torch.long), {**rows, 1: "total_sequence_length"}),
        "position_ids": (torch.arange(7, 12)[None].repeat(2, 1), new),
        **{name: (kv, {**rows, 2: "past_sequence_length"}) for name in past},
    }
    _trace(
        _Decoder(model),
        inputs,
        {"logits": new, **{name: {**rows, 2: "total_sequence_length"} for name in present}},
        place,
    )


def _fused_decoder(model: Any, form: str) -> onnx.ModelProto:
    """As ONNX Runtime's optimizer and model builder write decoders: grouped-query or multi-head attention over the
    cache, with what it needs to know taken from attention_mask."""
    config = model.config.text_config
    dim, heads, kv, size = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    past, present = _names(model)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}

    def constant(name: str, value: np.ndarray) -> str:
        constants[name] = value
        return name

    def add(op: str, inputs: list[str], outputs: list[str] | str, **attributes: Any) -> str:
        outputs = [outputs] if isinstance(outputs, str) else outputs
        own = {"SimplifiedLayerNormalization": ""}
        domain = own.get(op, "com.microsoft" if op in MICROSOFT else "")
        nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def linear(x: str, name: str, layer: nn.Linear) -> str:
        return add("MatMul", [x, constant(f"{name}.weight", layer.weight.detach().numpy().T.copy())], name)

    angles = np.outer(np.arange(256), 100000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    cos, sin = constant("cos_cache", np.cos(angles)), constant("sin_cache", np.sin(angles))
    one = constant("one", np.array([1]))
    if form == "grouped":
        add("ReduceSum", ["attention_mask", one], "counted", keepdims=0)
        add("Sub", ["counted", one], "last")
        add("Cast", ["last"], "seqlens_k", to=TensorProto.INT32)
        add("Shape", ["attention_mask"], "mask_shape")
        add("Gather", ["mask_shape", constant("first", np.array(1))], "total", axis=0)
        add("Cast", ["total"], "total_sequence_length", to=TensorProto.INT32)
    hidden = "inputs_embeds"
    eps = {"epsilon": config.rms_norm_eps, "axis": -1}
    text = model.model.text_model
    weight = constant("norm0", text.layers[0].input_layernorm.weight.detach().numpy())
    normed = add("SimplifiedLayerNormalization", [hidden, weight], "normed0", **eps)
    for i, layer in enumerate(text.layers):
        at = f"layers.{i}"
        q, k, v = (linear(normed, f"{at}.{name}", getattr(layer.self_attn, f"{name}_proj")) for name in ("q", "k", "v"))
        for name, count in ((q, heads), (k, kv)):
            add("RotaryEmbedding", [name, "position_ids", cos, sin], f"{name}_turned", num_heads=count)
        caches, results = past[2 * i : 2 * i + 2], [f"{at}.attended", *present[2 * i : 2 * i + 2]]
        turned = [f"{q}_turned", f"{k}_turned", v]
        if form == "grouped":
            more = ["seqlens_k", "total_sequence_length"]
            add("GroupQueryAttention", [*turned, *caches, *more], results, num_heads=heads, kv_num_heads=kv)
        else:
            empty = ["", "", ""]
            add("MultiHeadAttention", [*turned, *empty, *caches], results, num_heads=heads, unidirectional=1)
        out = linear(results[0], f"{at}.o", layer.self_attn.o_proj)
        weight = constant(f"{at}.norm", layer.post_attention_layernorm.weight.detach().numpy())
        skip = [f"{at}.between", "", "", f"{at}.hidden"]
        add("SkipSimplifiedLayerNormalization", [hidden, out, weight], skip, epsilon=config.rms_norm_eps)
        gate, up = linear(skip[0], f"{at}.gate", layer.mlp.gate_proj), linear(skip[0], f"{at}.up", layer.mlp.up_proj)
        add("Sigmoid", [gate], f"{at}.sigmoid")
        add("Mul", [gate, f"{at}.sigmoid"], f"{at}.silu")
        down = linear(add("Mul", [f"{at}.silu", up], f"{at}.wide"), f"{at}.down", layer.mlp.down_proj)
        following = text.layers[i + 1].input_layernorm if i + 1 < len(text.layers) else text.norm
        weight = constant(f"{at}.next", following.weight.detach().numpy())
        hidden, normed = f"{at}.out", f"{at}.normed"
        add(
            "SkipSimplifiedLayerNormalization",
            [skip[3], down, weight],
            [normed, "", "", hidden],
            epsilon=eps["epsilon"],
        )
    nodes[-1].output[:] = [normed]
    add("MatMul", [normed, constant("head", model.lm_head.weight.detach().numpy().T.copy())], "logits")
    value, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    cache = ["batch_size", kv, "past_sequence_length", size]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            value("inputs_embeds", kind, ["batch_size", "sequence_length", dim]),
            value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
            value("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            *(value(name, kind, cache) for name in past),
        ],
        [
            value("logits", kind, ["batch_size", "sequence_length", config.vocab_size]),
            *(value(name, kind, [*cache[:2], "total_sequence_length", size]) for name in present),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 14), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


MICROSOFT = ("GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding", "SkipSimplifiedLayerNormalization")

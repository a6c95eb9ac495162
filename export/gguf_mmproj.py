"""SigLIP and its pixel-shuffle bridge as an mmproj GGUF, the form in which llama.cpp holds SmolVLM's image encoder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.errors import UsageError
from .gguf_decoder import BLOCK, finish
from .graph import PassResult

if TYPE_CHECKING:
    from torch import Tensor

    from ..train.models import CaptionModel

PRECISIONS = ("f16", "q8_0")
EXACT = ("v.patch_embd.weight", "v.position_embd.weight")  # llama.cpp wants these in float32
WHOLE = {
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "embeddings.patch_embedding.bias",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.post_ln.weight": "post_layernorm.weight",
    "v.post_ln.bias": "post_layernorm.bias",
}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def write_mmproj(
    path: Path, model: CaptionModel, precision: str, *, keep: Collection[str] = ()
) -> tuple[PassResult, np.ndarray]:
    """Write encoder, bridge and the decoder's projection to `path`; precision: f16 or q8_0.

    Bridge and projection are two linear maps in a row and become one. Returns what was done and the projection's bias
    [dim], which the format has no place for: whoever runs the file adds it.
    Raises UsageError for an activation that llama.cpp has not, and for photos in tiles.
    """
    from gguf import GGUFType, GGUFWriter, LlamaFileType, VisionProjectorType

    config = model.encoder.body.config
    if config.hidden_act != "gelu_pytorch_tanh":
        raise UsageError(
            f"llama.cpp has no SigLIP with {config.hidden_act}, only gelu_pytorch_tanh: leave --mmproj out"
        )
    if model.encoder.tile:
        raise UsageError("an mmproj gives the embeddings of the whole photo, not of its tiles: leave --mmproj out")
    writer = GGUFWriter(path, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{precision.upper()}"])
    writer.add_quantization_version(2)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(VisionProjectorType.IDEFICS3)
    writer.add_vision_use_gelu(True)
    writer.add_vision_projection_dim(model.decoder.dim)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(config.num_hidden_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(list(model.encoder.mean))
    writer.add_vision_image_std(list(model.encoder.std))
    writer.add_vision_projector_scale_factor(model.bridge.scale)
    chosen = ((name, tensor, _precision(name, tensor, precision, keep)) for name, tensor in tensors(model))
    cost = finish(writer, chosen, precision)
    result = PassResult("mmproj", {"graph": "encoder", "projector": "idefics3", "precision": precision}, cost)
    return result, _array(projection(model)[1])


def tensors(model: CaptionModel) -> Iterator[tuple[str, np.ndarray]]:
    """Name in GGUF and float32 values of every tensor."""
    parameters = dict(model.encoder.body.named_parameters())
    for name, parameter in WHOLE.items():
        yield name, _array(parameters[parameter])
    for index in range(model.encoder.body.config.num_hidden_layers):
        for name, module in LAYER.items():
            for part in ("weight", "bias"):
                yield f"v.blk.{index}.{name}.{part}", _array(parameters[f"encoder.layers.{index}.{module}.{part}"])
    yield (
        "mm.model.fc.weight",
        _array(projection(model)[0] @ model.bridge.project.weight.double()),
    )  # [dim, hidden · scale²]


def projection(model: CaptionModel) -> tuple[Tensor, Tensor]:
    """The decoder's own projection of the bridge's features: weight float64 [dim, bridge dim], bias [dim]."""
    import torch

    project, dim = model.decoder.project, model.decoder.dim
    if isinstance(project, torch.nn.Linear):
        return project.weight.double(), project.bias
    return torch.eye(dim, dtype=torch.float64), torch.zeros(dim)


def _precision(name: str, tensor: np.ndarray, precision: str, keep: Collection[str]) -> str:
    if tensor.ndim == 1 or name in EXACT:
        return "f32"
    return "f16" if name in keep or tensor.shape[-1] % BLOCK else precision


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())

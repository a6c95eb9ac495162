"""What SmolVLM asks of SigLIP: its vision model out of a whole SmolVLM, smaller photos, and photos split into tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import UsageError
from .hub import known, pretrained, read_config

VLMS = ("smolvlm", "idefics3")  # types of models that hold a SigLIP vision model and a llama


def vision_model(source: str) -> Any:
    """The vision model of a SmolVLM or Idefics3 as a SiglipVisionModel, None where `source` is another model."""
    from transformers import SiglipVisionConfig, SiglipVisionModel, SmolVLMVisionConfig

    whole = read_config(source, "encoder")
    if whole.get("model_type") not in VLMS:
        return None
    said = known(f"encoder {source}", SmolVLMVisionConfig, whole.get("vision_config", {}), strict=False).to_dict()
    names = set(SiglipVisionConfig().to_dict()) - {"model_type", "transformers_version"}
    config = SiglipVisionConfig(**{k: v for k, v in said.items() if k in names}, vision_use_head=False)
    mapping = {r"^model\.vision_model\.": ""}
    body = pretrained(SiglipVisionModel, source, whole=VLMS, config=config, key_mapping=mapping)
    body.packed = True  # `fit` puts the positions in place
    return body


def fit(encoder: Any, side: int, tile: int) -> None:
    """Make an encoder take photos of side × side pixels, split into tiles where `tile` is not 0.

    SigLIP's position embeddings become those that SmolVLM looks up for a photo, or a tile, of that size. Other encoders
    stay as they are. UsageError where the sizes do not fit.
    """
    from transformers import SiglipVisionModel
    from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

    if not isinstance(encoder.body, SiglipVisionModel):
        if tile:
            raise UsageError("recipe [encoder]: only siglip splits photos into tiles; leave tile out")
        return
    config, seen = encoder.body.config, tile or side
    if side % seen:
        raise UsageError(f"photos of {side} px are not whole tiles of {tile}: change data.image_size or encoder.tile")
    if seen > config.image_size or (seen % config.patch_size and seen != config.image_size):
        wanted = f"a multiple of {config.patch_size} up to {config.image_size}"
        name = "encoder.tile" if tile else "data.image_size"
        raise UsageError(f"the encoder takes photos of {wanted} px, not {seen}: --set {name}={config.image_size}")
    packed = encoder.body.__dict__.pop("packed", False)
    if packed or seen != config.image_size:
        if config.vision_use_head:
            raise UsageError(
                f"SigLIP's pooling takes photos of {config.image_size} px, not {seen}: "
                f"--set data.image_size={config.image_size}"
            )
        rows = positions(config.image_size // config.patch_size, seen // config.patch_size)
        old = encoder.body.embeddings
        config.image_size = seen
        new = SiglipVisionEmbeddings(config)
        new.patch_embedding = old.patch_embedding
        with torch.no_grad():
            new.position_embedding.weight.copy_(old.position_embedding.weight[rows])
        encoder.body.embeddings = new
    encoder.size, encoder.tile = side, tile if side > seen else 0


def positions(known_side: int, side: int) -> Tensor:
    """Which of known_side² position embeddings each of side² patches gets: int64 [side²].

    NaViT's fractional positions (Dehghani et al. 2023, arXiv:2307.06304) as Idefics3VisionEmbeddings puts them into
    buckets, down to how float32 rounds.
    """
    boundaries = torch.arange(1 / known_side, 1.0, 1 / known_side)
    places = torch.clamp(torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side)), max=1.0 - 1e-6)
    row = torch.bucketize(places, boundaries, right=True)
    return (row[:, None] * known_side + row[None, :]).flatten()

"""Small encoders of every kind: what a recipe says of them, and the transformers models that would be their source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SIDE = 32
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
WIDE = {**VIT, "intermediate_size": 48}
STAGES = {
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2],
    "expand_ratios": [1, 4, 4],
    "num_block_repeats": [1, 1, 2],
    "width_coefficient": 0.5,
    "hidden_dim": 640,
}


@dataclass(frozen=True)
class Part:
    """kind: of the table; config: a recipe's; model, processor: transformers' classes for it; grid: cells of a photo of
    SIDE pixels; first: tokens in front of the patches."""

    kind: str
    config: dict[str, Any]
    model: str
    processor: str
    grid: int
    first: int = 0

    def source(self) -> Any:
        """The transformers model with random weights."""
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, self.model)
        config = {key: value for key, value in self.config.items() if key != "model_type"}
        return cls(cls.config_class(**config)).eval()


PARTS = {
    "mobilenet_v2": Part(
        "mobilenet_v2",
        {"depth_multiplier": 0.35, "finegrained_output": False},
        "MobileNetV2Model",
        "MobileNetV2ImageProcessorPil",
        1,
    ),
    "efficientnet": Part("efficientnet", STAGES, "EfficientNetModel", "EfficientNetImageProcessorPil", 16),
    "siglip": Part("siglip", WIDE, "SiglipVisionModel", "SiglipImageProcessorPil", 16),
    "vit": Part("vit", WIDE, "ViTModel", "ViTImageProcessorPil", 16, 1),
    "dino": Part("dino", WIDE, "ViTModel", "ViTImageProcessorPil", 16, 1),
    "dinov2": Part(
        "dino", {**VIT, "mlp_ratio": 2, "model_type": "dinov2"}, "Dinov2Model", "BitImageProcessorPil", 16, 1
    ),
    "clip": Part(
        "clip", {**WIDE, "projection_dim": 24}, "CLIPVisionModelWithProjection", "CLIPImageProcessorPil", 16, 1
    ),
}


def drawn(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Smooth random pictures uint8 [N, side, side, 3]."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, side // 8, side // 8, 3))
    fine = coarse.repeat(8, axis=1).repeat(8, axis=2) + random.integers(-20, 21, (count, side, side, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)

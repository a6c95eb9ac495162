"""Image encoders through transformers, by hub id, directory or from scratch: pixels in, a grid of features out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import UsageError
from .hub import known, pretrained


class Encoder(nn.Module):
    """Wraps a transformers vision model: uint8 [N, H, W, 3] → features float32 [N, L, dim].

    mean, std: of pixels in [0, 1], for each channel. size: height and width of the photos, None for any.
    """

    def __init__(
        self, body: nn.Module, dim: int, mean: tuple[float, ...], std: tuple[float, ...], size: int | None = None
    ) -> None:
        super().__init__()
        self.body, self.dim, self.size, self.mean, self.std = body, dim, size, mean, std
        # x / 255 normalised by mean and std, folded into one multiply and one add per channel.
        scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        # On CPUs depthwise convolutions run up to twice as fast with channels last.
        self.body.to(memory_format=torch.channels_last)

    def settings(self) -> dict[str, Any]:
        """The body's configuration where it differs from the default: what rebuilds it without its source."""
        labels = ("id2label", "label2id", "architectures", "transformers_version", "dtype", "model_type")
        return {k: v for k, v in self.body.config.to_diff_dict().items() if k not in labels and v is not None}

    def forward(self, pixels: Tensor) -> Tensor:
        if self.size is not None and pixels.shape[1:3] != (self.size, self.size):
            height, width = pixels.shape[1:3]
            raise UsageError(
                f"the encoder takes photos of {self.size} × {self.size}, not {height} × {width}: "
                f"--set data.image_size={self.size}"
            )
        x = pixels.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift  # [N, 3, H, W]
        if not torch.compiler.is_exporting():
            x = x.contiguous(memory_format=torch.channels_last)
        out = self.body(x).last_hidden_state
        return out.flatten(2).transpose(1, 2) if out.ndim == 4 else out  # [N, L, dim]


def mobilenet_v2(source: str | None, config: dict[str, Any]) -> Encoder:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) by hub id or directory; without `source`, from `config`."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    if source:
        body = pretrained(MobileNetV2Model, source, add_pooling_layer=False)
    else:
        settings = known("encoder.config", MobileNetV2Config, config)
        body = MobileNetV2Model(settings, add_pooling_layer=False)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            # transformers hardcodes 0.997 in PyTorch's convention (running statistics = the last batch).
            module.momentum = 0.1
    with torch.no_grad():
        dim = body.eval()(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape[1]
    return Encoder(body, dim, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def siglip(source: str | None, config: dict[str, Any]) -> Encoder:
    """SigLIP's image half (Zhai et al. 2023, arXiv:2303.15343) by hub id or directory; without `source`, from `config`.

    Takes square photos of the configuration's image_size only, patch_size of which are one feature; no pooling head.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    settings = {**config, "vision_use_head": False}
    if source:
        body = pretrained(SiglipVisionModel, source, whole="siglip", vision_use_head=False)
    else:
        body = SiglipVisionModel(known("encoder.config", SiglipVisionConfig, settings))
    return Encoder(body, body.config.hidden_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), size=body.config.image_size)


ENCODERS: dict[str, Callable[[str | None, dict[str, Any]], Encoder]] = {
    "mobilenet_v2": mobilenet_v2,
    "siglip": siglip,
}

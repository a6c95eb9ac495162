"""Image encoders through transformers, by hub id, directory or from scratch: pixels in, features of the photo out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...runtime.errors import UsageError
from .hub import known, pretrained, read_config, read_pixel_scaling
from .siglip import vision_model
from .tiles import split

Pixels: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in [0, 1]
HALF: Pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Pixels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Pixels = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Where transformers' own defaults are larger than what a small captioner wants: EfficientNet-B0, DeiT-Ti's shape and
# ViT-S/16.
B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
MINI = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


def cells(out: Any) -> Tensor:
    """The grid: of feature maps [N, dim, H, W] their cells, of tokens [N, L, dim] all of them."""
    maps = out.last_hidden_state
    return maps.flatten(2).transpose(1, 2) if maps.ndim == 4 else maps  # [N, L, dim]


def mean_cell(out: Any) -> Tensor:
    """The mean of the grid, [N, 1, dim]."""
    return cells(out).mean(1, keepdim=True)


def patches(out: Any) -> Tensor:
    """The tokens of the patches, row by row, without the class token in front of them: [N, L, dim]."""
    return out.last_hidden_state[:, 1:]


def class_token(out: Any) -> Tensor:
    return out.last_hidden_state[:, :1]  # [N, 1, dim]


class MeanOfMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)  # [N, C, 1, 1]


class Encoder(nn.Module):
    """Wraps a transformers vision model: uint8 [N, H, W, 3] → features float32 [N, L, dim].

    mean, std: of pixels in [0, 1], for each channel. size: height and width of the photos, None for any. read: the
    features in what the body gives. said: settings that the body's configuration does not hold or call by name.
    """

    tile = 0  # side of the tiles that photos are split into; L is then that of all of them and the overview
    links: Callable[[Any], tuple[nn.Module, ...]] | None = None  # of the body, where it is no more than a chain of them
    trunk = 0  # how many links of the chain `lower` applies, and `upper` leaves out

    def __init__(
        self,
        body: nn.Module,
        dim: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int | None = None,
        *,
        read: Callable[[Any], Tensor] = cells,
        said: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.body, self.dim, self.size, self.mean, self.std = body, dim, size, mean, std
        self.read, self.said = read, said or {}
        # x / 255 normalised by mean and std, folded into one multiply and one add per channel.
        scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        # On CPUs depthwise convolutions run up to twice as fast with channels last.
        self.body.to(memory_format=torch.channels_last)

    def settings(self) -> dict[str, Any]:
        """The body's configuration where it differs from the default, and mean and std where they differ from what is
        usual for the kind: what rebuilds it without its source."""
        labels = ("id2label", "label2id", "architectures", "transformers_version", "dtype", "model_type")
        config = {k: v for k, v in self.body.config.to_diff_dict().items() if k not in labels and v is not None}
        return config | self.said

    @property
    def chain(self) -> tuple[nn.Module, ...]:
        """What the body applies one after the other; empty where it does more than that."""
        return self.links(self.body) if self.links else ()

    def blocks(self) -> nn.ModuleList:
        """The body's blocks, from the bottom."""
        lists = [module for module in self.body.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len, default=nn.ModuleList())

    def below(self, blocks: int) -> nn.ParameterList:
        """The parameters below the top `blocks` blocks and what lies above those. UsageError where there are fewer."""
        if blocks > len(self.blocks()):
            raise UsageError(
                f"unfreeze_blocks = {blocks}: the encoder has {len(self.blocks())} blocks; 0 lets all of it learn"
            )
        lowest = next(self.blocks()[-blocks].parameters())
        parameters = list(self.body.parameters())  # in the order in which they are applied
        place = next(i for i, parameter in enumerate(parameters) if parameter is lowest)
        return nn.ParameterList(parameters[:place])

    def links_below(self, blocks: int) -> int:
        """How many links of the chain lie below the top `blocks` blocks."""
        return next(i for i, link in enumerate(self.chain) if link is self.blocks()[-blocks])

    def lower(self, pixels: Tensor) -> Tensor:
        """What the first `trunk` links of the chain give: pixels uint8 [N, H, W, 3] → [N, C, h, w]."""
        x = self._normalised(pixels)
        for link in self.chain[: self.trunk]:
            x = link(x)
        return x

    def upper(self, x: Tensor) -> Tensor:
        """What the other links make of that: [N, C, h, w] → features [N, L, dim]."""
        x = x.contiguous(memory_format=torch.channels_last)
        for link in self.chain[self.trunk :]:
            x = link(x)
        return self.read(SimpleNamespace(last_hidden_state=x))

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.read(self.body(self._normalised(pixels)))  # [N, L, dim]
        return out.reshape(len(pixels), -1, out.shape[2]) if self.tile else out

    def _normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] → [N, 3, H, W], or [N · frames, 3, tile, tile]."""
        if self.size is not None and pixels.shape[1:3] != (self.size, self.size):
            height, width = pixels.shape[1:3]
            raise UsageError(
                f"the encoder takes photos of {self.size} × {self.size}, not {height} × {width}: "
                f"--set data.image_size={self.size}"
            )
        x = pixels.permute(0, 3, 1, 2).to(torch.float32)  # [N, 3, H, W]
        if self.tile:
            x = split(x, self.tile)  # [N · frames, 3, tile, tile]
        x = x * self.scale + self.shift
        if not torch.compiler.is_exporting():
            x = x.contiguous(memory_format=torch.channels_last)
        return x


def mobilenet_v2(source: str | None, config: dict[str, Any], features: str = "grid") -> Encoder:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), for photos of any size."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    read = _choice(features, grid=cells, pooled=mean_cell)
    pixels, config, said = _pixels(source, config, HALF)
    if source:
        body = pretrained(MobileNetV2Model, source, add_pooling_layer=False)
    else:
        settings = known("encoder.config", MobileNetV2Config, config)
        body = MobileNetV2Model(settings, add_pooling_layer=False)
    _plain_momentum(body)
    with torch.no_grad():
        dim = body.eval()(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape[1]
    encoder = Encoder(body, dim, *pixels, read=read, said=said)
    encoder.links = mobilenet_links
    return encoder


def mobilenet_links(body: Any) -> tuple[nn.Module, ...]:
    return (body.conv_stem, *body.layer, body.conv_1x1)


def efficientnet(source: str | None, config: dict[str, Any], features: str = "grid") -> Encoder:
    """EfficientNet (Tan and Le 2019, arXiv:1905.11946), for photos of any size; from scratch a B0."""
    from transformers import EfficientNetConfig, EfficientNetModel

    read = _choice(features, grid=cells, pooled=mean_cell)
    pixels, config, said = _pixels(source, config, IMAGENET)
    if source:
        body = pretrained(EfficientNetModel, source)
    else:
        body = EfficientNetModel(known("encoder.config", EfficientNetConfig, B0 | config))
        _start_convolutions(body)
    # The same means, in place of a window as wide as there are channels and of what exporters make of adaptive pooling.
    body.pooler = MeanOfMap()
    for block in body.encoder.blocks:
        block.squeeze_excite.squeeze = MeanOfMap()
    _plain_momentum(body)
    dim = body.encoder.top_conv.out_channels
    return Encoder(body, dim, *pixels, read=read, said=_named(body, B0) | said)


def siglip(source: str | None, config: dict[str, Any], features: str = "grid") -> Encoder:
    """SigLIP's image half (Zhai et al. 2023, arXiv:2303.15343), also out of a whole model or a SmolVLM.

    The grid is its patches, pooled what its attention pooling makes of them.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    read = _choice(features, grid=cells, pooled=lambda out: out.pooler_output.unsqueeze(1))
    fixed = {"vision_use_head": features == "pooled"}
    body = vision_model(source) if source and features == "grid" else None
    if body is not None:
        pixels, _, said = _pixels(source, config, HALF)
        return Encoder(body, body.config.hidden_size, *pixels, size=_side(body), read=read, said=said)
    return _of_patches(SiglipVisionModel, SiglipVisionConfig, source, config, HALF, read, whole="siglip", fixed=fixed)


def vit(source: str | None, config: dict[str, Any], features: str = "grid") -> Encoder:
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929); from scratch a mini one of DeiT-Ti's shape (arXiv:2012.12877).

    The grid is its patches without the class token; pooled is the class token.
    """
    from transformers import ViTConfig, ViTModel

    read = _choice(features, grid=patches, pooled=class_token)
    return _of_patches(ViTModel, ViTConfig, source, config, HALF, read, base=MINI, add_pooling_layer=False)


def dino(source: str | None, config: dict[str, Any], features: str = "grid") -> Encoder:
    """DINO (Caron et al. 2021, arXiv:2104.14294), from scratch a ViT-S/16; or DINOv2 (Oquab et al. 2023,
    arXiv:2304.07193), from scratch with `model_type = "dinov2"`. Grid and pooled as of `vit`."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    read = _choice(features, grid=patches, pooled=class_token)
    model_type = (read_config(source, "encoder") if source else config).get("model_type")
    if model_type == Dinov2Config.model_type:
        fixed = {"use_mask_token": False}  # it is for pretraining: no weight is idle
        encoder = _of_patches(Dinov2Model, Dinov2Config, source, config, IMAGENET, read, fixed=fixed)
        encoder.said["model_type"] = model_type
        return encoder
    return _of_patches(ViTModel, ViTConfig, source, config, IMAGENET, read, base=SMALL, add_pooling_layer=False)


def clip(source: str | None, config: dict[str, Any], features: str = "grid") -> Encoder:
    """CLIP's image half (Radford et al. 2021, arXiv:2103.00020), FashionCLIP's too, also out of a whole model.

    The grid is its patches without the class token, as its last layer leaves them; pooled is its image_embeds, the
    projected class token, not scaled to length 1.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    read = _choice(features, grid=patches, pooled=lambda out: out.image_embeds.unsqueeze(1))
    cls = CLIPVisionModel if features == "grid" else CLIPVisionModelWithProjection
    there = read_config(source, "encoder") if source else {}
    # A whole model has the size of its space in its own configuration, not in its vision half's.
    fixed = {key: there[key] for key in ("projection_dim",) if key in there}
    encoder = _of_patches(cls, CLIPVisionConfig, source, config, CLIP, read, whole="clip", fixed=fixed)
    if features == "grid":
        encoder.body.post_layernorm = nn.Identity()  # the class token's: no weight is idle
    else:
        encoder.dim = encoder.body.config.projection_dim
    return encoder


def _of_patches(
    cls: Any,
    config_class: Any,
    source: str | None,
    config: dict[str, Any],
    usual: Pixels,
    read: Callable[[Any], Tensor],
    *,
    base: dict[str, Any] | None = None,
    whole: str = "",
    fixed: dict[str, Any] | None = None,
    **made: Any,
) -> Encoder:
    """A vision transformer, for square photos of its configuration's image_size.

    Where `config` gives a source another image_size, its positions are interpolated, once. base: defaults that are not
    transformers'; fixed: settings that hold whatever others say; made: options of the class.
    """
    pixels, config, said = _pixels(source, config, usual)
    base = base or {}
    if source:
        body = pretrained(cls, source, whole=whole, **(fixed or {}), **made)
        side = config.get("image_size", _side(body))
        body = body if side == _side(body) else _resized(body, side, **made)
    else:
        body = cls(known("encoder.config", config_class, base | config | (fixed or {})), **made)
    return Encoder(body, body.config.hidden_size, *pixels, size=_side(body), read=read, said=_named(body, base) | said)


def _choice(features: str, **readers: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    if features not in readers:
        raise UsageError(f"encoder.features = {features!r} is unknown; choices: {', '.join(readers)}")
    return readers[features]


def _pixels(source: str | None, config: dict[str, Any], usual: Pixels) -> tuple[Pixels, dict[str, Any], dict[str, Any]]:
    """Mean and std: what the source says, else `config`, else what is usual; the rest of `config`; and the two as
    settings, where they are not the usual ones."""
    names = ("image_mean", "image_std")
    rest = {key: value for key, value in config.items() if key not in (*names, "model_type")}
    pixels = tuple(config.get(name, value) for name, value in zip(names, usual, strict=True))
    found = (read_pixel_scaling(source, "encoder") if source else None) or pixels
    for name, value in zip(names, found, strict=True):
        numbers = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
        if not numbers or len(value) != 3 or not all(map(math.isfinite, value)):
            raise UsageError(f"encoder.config: {name} = {value!r} must be three numbers")
    mean, std = (tuple(float(item) for item in value) for value in found)
    if min(std) <= 0:
        raise UsageError(f"encoder.config: image_std = {list(std)} must be above 0")
    said = dict(zip(names, (list(mean), list(std)), strict=True)) if (mean, std) != usual else {}
    return (mean, std), rest, said


def _resized(body: Any, side: Any, **options: Any) -> Any:
    """The same weights for photos of `side` × `side` pixels: positions are interpolated as transformers does it."""
    if type(side) is not int or side < body.config.patch_size:
        raise UsageError(f"encoder.config: image_size = {side!r} must be a whole number of pixels, at least a patch")
    config = copy.deepcopy(body.config)
    config.image_size = side
    new, weights = type(body)(config, **options), body.state_dict()
    for name, tensor in new.state_dict().items():
        if tensor.shape == weights[name].shape:
            continue
        *_, count, dim = weights[name].shape
        before, after = math.isqrt(count), math.isqrt(tensor.shape[-2])
        first = count - before**2  # the class token's
        rows = weights[name].reshape(count, dim)
        grid = rows[first:].reshape(1, before, before, dim).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
        rows = torch.cat((rows[:first], grid.permute(0, 2, 3, 1).reshape(-1, dim)))
        weights[name] = rows.view(tensor.shape)
    new.load_state_dict(weights)
    return new.eval()


def _side(body: nn.Module) -> int:
    side = body.config.image_size
    sides = {side} if isinstance(side, int) else set(side)
    if len(sides) != 1:
        raise UsageError(f"encoder.config: image_size = {side} is not square; the encoder takes square photos")
    return sides.pop()


def _named(body: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """The settings that have defaults of ours: always said, whatever transformers' defaults are."""
    return {key: getattr(body.config, key) for key in base}


def _plain_momentum(body: nn.Module) -> None:
    """transformers hands TensorFlow's momentum (0.997, 0.99) to PyTorch, where it makes the running statistics those of
    the last batch."""
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def _start_convolutions(body: nn.Module) -> None:
    """As published for EfficientNet, normal with variance 2 / fan-out, and normalised to 1: transformers starts both at
    0.02, under which the signal dies."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


ENCODERS: dict[str, Callable[..., Encoder]] = {
    "mobilenet_v2": mobilenet_v2,
    "efficientnet": efficientnet,
    "siglip": siglip,
    "vit": vit,
    "dino": dino,
    "clip": clip,
}

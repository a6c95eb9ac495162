"""Photos cut into tiles with an overview, inside the encoder and so inside every graph exported from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def split(photos: Tensor, tile: int) -> Tensor:
    """Photos [N, 3, k · tile, k · tile] in 0–255 → [N · (k² + 1), 3, tile, tile]: each photo's tiles row by row, then
    the whole photo at a tile's size; k = 1: the photos themselves. As SmolVLM splits them (Marafioti et al. 2025,
    arXiv:2504.05299)."""
    n, channels, side, _ = photos.shape
    k = side // tile
    if k == 1:
        return photos
    cells = photos.reshape(n, channels, k, tile, k, tile).permute(0, 2, 4, 1, 3, 5)  # [N, k, k, 3, tile, tile]
    overview = shrink(shrink(photos, k, -1), k, -2).unsqueeze(1)  # across first, as Pillow does
    return torch.cat((cells.flatten(1, 2), overview), 1).flatten(0, 1)


def shrink(photos: Tensor, k: int, dim: int) -> Tensor:
    """A side made k times shorter by Pillow's Lanczos resampling (3 lobes), rounded to whole values as Pillow does.

    A sum of slices, because graph engines resize by other filters and quantizers would round a convolution's weights.
    """
    length = photos.shape[dim]
    reach = (5 * k + 1) // 2  # values that the first output reads in front of the photo; Pillow leaves them out
    taps = [_lanczos((t + 0.5 - reach) / k - 0.5) for t in range(2 * reach + k)]
    before, after = [0, 0], [reach, reach]
    pad = after + before if dim == -1 else before + after
    weight = torch.nn.functional.pad(torch.ones(length), (reach, reach))
    padded = torch.nn.functional.pad(photos, pad)
    total, share = torch.zeros_like(photos.narrow(dim, 0, length // k)), torch.zeros(length // k)
    for t, tap in enumerate(taps):
        if tap:
            end = t + k * (length // k - 1) + 1
            total = total + tap * (padded[..., t:end:k] if dim == -1 else padded[..., t:end:k, :])
            share = share + tap * weight[t:end:k]
    share = (1 / share).to(photos.device)
    return (total * (share if dim == -1 else share.unsqueeze(1))).clamp(0, 255).round()


def _lanczos(x: float) -> float:
    if abs(x) >= 3:
        return 0.0
    return 1.0 if x == 0 else math.sin(math.pi * x) * math.sin(math.pi * x / 3) * 3 / (math.pi * x) ** 2

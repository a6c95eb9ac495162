"""The vision graph of a SmolVLM: frames of any size that it takes → their embeddings, and nothing of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.framed import pieces

if TYPE_CHECKING:
    from ...runtime.prompt import Segments
    from .captioner import CaptionModel


class FrameGraph(nn.Module):
    """uint8 [frames, S, S, 3] → [frames, (S / patch / scale)², dim]: siglip, pixel shuffle and projections of a model.

    One graph for every S that is a multiple of patch · scale up to the photos, or tiles, that the encoder was fitted
    to: the patches of smaller ones get its learnt positions spread over all of them, as `position_ids` of
    runtime/positions.py says. Patches are rows of a matrix product, with the pixels' scaling in its weights: that is
    the convolution of non-overlapping patches, in the form that all engines quantize.
    """

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        encoder, bridge = model.encoder, model.bridge
        body = encoder.body
        self.layers, self.norm = body.encoder, body.post_layernorm
        self.patch, self.scale = body.config.patch_size, bridge.scale
        self.native = body.config.image_size // self.patch
        self.across, self.project = bridge.project, model.decoder.project
        with torch.no_grad():
            convolution = body.embeddings.patch_embedding
            weight = convolution.weight.permute(2, 3, 1, 0)  # [patch, patch, 3, D]
            scale, shift = encoder.scale.reshape(3, 1), encoder.shift.reshape(3, 1)  # of pixels from 0 to 255
            self.register_buffer("weight", (weight * scale).flatten(0, 2), persistent=False)  # [patch² · 3, D]
            bias = convolution.bias + (weight * shift).sum((0, 1, 2))
            self.register_buffer("bias", bias, persistent=False)
            positions = body.embeddings.position_embedding.weight.detach().clone()
            self.register_buffer("positions", positions, persistent=False)  # [native², D]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        frames, patch, scale = pixels.shape[0], self.patch, self.scale
        cells = pixels.shape[1] // (patch * scale)  # embeddings a side
        side = cells * scale  # patches a side
        x = pixels[:, : side * patch, : side * patch]
        x = x.reshape(frames, side, patch, side, patch, 3).transpose(2, 3).reshape(frames, side * side, -1)
        places = torch.arange(side, device=pixels.device) * self.native // side
        places = (places[:, None] * self.native + places[None, :]).reshape(-1)
        x = x.float() @ self.weight + self.bias + self.positions[places]
        x = self.norm(self.layers(inputs_embeds=x).last_hidden_state)  # [frames, side², D]
        x = x.reshape(frames, cells, scale, cells, scale, x.shape[-1]).transpose(2, 3)
        x = self.across(x.reshape(frames, cells * cells, -1))
        return (self.project(x),)


class TorchFrames:
    """A model for photos in frames, computed in torch: the reference for every backend that reads them in pieces.

    It is a `FrameModel` of runtime/framed.py, and reads prompt and photo as one prefix.
    """

    def __init__(self, model: CaptionModel) -> None:
        self.model, self.graph = model.eval(), FrameGraph(model).eval()

    def session(self) -> TorchFrameSession:
        return TorchFrameSession(self)


class TorchFrameSession:
    def __init__(self, frames: TorchFrames) -> None:
        self.graph = frames.graph
        self.inner: Any = frames.model.session()

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> None:
        """uint8 [N, F, S, S, 3]."""
        seen = self.graph(torch.from_numpy(np.ascontiguousarray(pixels)).flatten(0, 1))[0]
        self.seen = seen.unflatten(0, pixels.shape[:2])  # [N, F, tokens, dim]

    @torch.inference_mode()
    def prefill(self, prompt_ids: np.ndarray | None = None, segments: Segments | None = None) -> np.ndarray:
        """Logits [N, V]."""
        assert segments is not None
        decoder, photos = self.inner.model.decoder, len(self.seen)
        *between, last = pieces(segments, prompt_ids)
        parts = [self._words(np.array(segments.before, np.int64), photos)]
        for frame, ids in enumerate((*between, last[:0])):
            parts += [self.seen[:, frame], self._words(ids, photos)]
        ids = torch.from_numpy(np.tile(last, (photos, 1)))
        self.inner.photo = {"prefix": torch.cat(parts, 1)}
        self.inner.index = torch.arange(photos)
        logits, self.inner.state = decoder.begin(self.inner.photo, ids)
        return logits.float().numpy()

    def step(self, ids: np.ndarray, parents: np.ndarray) -> np.ndarray:
        return self.inner.step(ids, parents)

    def _words(self, ids: np.ndarray, photos: int) -> Tensor:
        return self.inner.model.decoder.embedding(torch.from_numpy(ids)).expand(photos, -1, -1)

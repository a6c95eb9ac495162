"""The captioner in torch: encoder, bridge and decoder as one module, and the reference for every export of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.errors import UsageError
from .bridges import BRIDGES
from .decoders import DECODERS
from .encoders import ENCODERS
from .framed import FrameGraph
from .siglip import fit

BAD_SETTINGS = (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError)  # what impossible sizes raise


@dataclass
class GraphPair:
    """The two graphs of a bundle as torch modules, with what an exporter must know of them."""

    encoder: nn.Module
    decoder: nn.Module
    encoder_inputs: dict[str, tuple[Tensor, dict[int, str]]]
    encoder_outputs: tuple[str, ...]
    decoder_inputs: dict[str, tuple[Tensor, dict[int, str]]]
    decoder_outputs: tuple[str, ...]
    session: dict


class CaptionModel(nn.Module):
    """pixels uint8 [N, H, W, 3] and word ids → logits. `bos_id` starts every caption."""

    def __init__(
        self, encoder: nn.Module, bridge: nn.Module, decoder: nn.Module, *, bos_id: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.encoder, self.bridge, self.decoder = encoder, bridge, decoder
        self.bos_id, self.size = bos_id, size

    frozen_parts: tuple[str, ...] = ()  # that no stage trains
    stores: Callable[[str], bool] | None = None  # which tensors a checkpoint of it holds; None: all

    def parts(self) -> dict[str, nn.Module]:
        """Its modules by the names of the recipe's tables."""
        return {"encoder": self.encoder, "bridge": self.bridge, "decoder": self.decoder}

    def forward(
        self,
        ids: Tensor,
        keep: Tensor | None = None,
        *,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        trunk: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing: ids int64 [N, C, T] (BOS first, C captions a photo) with pixels uint8 [N, H, W, 3], the
        frozen encoder's features [N, L, dim] or those of its trunk → logits [N, C, T, V], or [K, V] for the positions
        where `keep` holds."""
        return self.decoder(self.memory(pixels=pixels, features=features, trunk=trunk), ids, keep)

    def memory(
        self, *, pixels: Tensor | None = None, features: Tensor | None = None, trunk: Tensor | None = None
    ) -> Tensor:
        """What the decoder looks at: [N, L, bridge dim]."""
        if features is None:
            features = self.encoder(pixels) if trunk is None else self.encoder.upper(trunk)
        return self.bridge(features)

    def photo(
        self, *, pixels: Tensor | None = None, features: Tensor | None = None, trunk: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Everything computed once per photo."""
        return self.decoder.photo(self.memory(pixels=pixels, features=features, trunk=trunk))

    def session(self) -> TorchSession:
        return TorchSession(self)

    def graphs(self, *, framed: bool = False) -> GraphPair:
        """The encoder graph (pixels → photo tensors) and the decoder graph (prefill and step).

        framed: a SmolVLM's encoder takes single frames, of any size, and knows nothing of the prompt (FrameGraph).
        """
        if framed:
            side = self.encoder.tile or self.size[0]
            frames = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8)
            axes = {0: "frames", 1: "height", 2: "width"}
            return self._pair(FrameGraph(self), {"pixels": (frames, axes)}, cells=0)
        with torch.no_grad():
            pixels = torch.randint(0, 256, (2, *self.size, 3), dtype=torch.uint8)
            cells = self.eval().memory(pixels=pixels).shape[1]
        return self._pair(EncoderGraph(self), {"pixels": (pixels, {0: "batch"})}, cells=cells)

    def _pair(self, encoder: nn.Module, inputs: dict[str, Any], *, cells: int) -> GraphPair:
        return GraphPair(
            encoder=encoder.eval(),
            decoder=DecoderGraph(self).eval(),
            encoder_inputs=inputs,
            encoder_outputs=tuple(self.decoder.photo_outputs),
            decoder_inputs=self.decoder.graph_inputs(cells),
            decoder_outputs=tuple(self.decoder.graph_outputs),
            session=self.decoder.session_roles(),
        )


class EncoderGraph(nn.Module):
    """pixels uint8 [N, H, W, 3] → the photo tensors, in the order of `photo_outputs`."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model
        # A prompt's words are looked up here: the graph would hold the whole word embedding for a few of its rows.
        look_up = getattr(model.decoder, "prompt_words", None)
        with torch.no_grad():
            self.register_buffer("words", None if look_up is None else look_up(), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        words = () if self.words is None else (self.words,)
        photo = self.model.decoder.photo(self.model.memory(pixels=pixels), *words)
        return tuple(photo[name] for name in self.model.decoder.photo_outputs)


class DecoderGraph(nn.Module):
    """The decoder's graph as a module of its own: its `graph_form`, where it has one, or its `graph`."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        form = getattr(model.decoder, "graph_form", None)
        self.decoder = model.decoder if form is None else form()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return getattr(self.decoder, "graph", self.decoder)(*inputs)


class TorchSession:
    """The runtime's Session over the torch module: the reference that every backend is compared with."""

    def __init__(self, model: CaptionModel) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def start(self, pixels: np.ndarray, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        """uint8 [N, H, W, 3], prompt int64 [P] or None → float32 logits [N, V]."""
        return self.start_from(self.model.photo(pixels=self._tensor(pixels)), prompt_ids)

    @torch.inference_mode()
    def start_from(self, photo: dict[str, Tensor], prompt_ids: np.ndarray | None = None) -> np.ndarray:
        """As `start`, for photo tensors that are computed already (cached features)."""
        self.photo = photo
        rows = len(next(iter(photo.values())))
        prompt = [self.model.bos_id, *([] if prompt_ids is None else np.asarray(prompt_ids).tolist())]
        ids = self._tensor(np.tile(np.asarray(prompt, np.int64), (rows, 1)))  # [N, 1 + P]
        self.index = self._tensor(np.arange(rows))
        logits, self.state = self.model.decoder.begin(photo, ids)
        return logits.float().cpu().numpy()

    @torch.inference_mode()
    def step(self, ids: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """int64 [B], int64 [B] → float32 logits [B, V]; row i continues row parents[i]."""
        rows = self._tensor(parents)
        self.index = self.index[rows]
        state = {name: tensor[rows] for name, tensor in self.state.items()}
        logits, self.state = self.model.decoder.advance(self._tensor(ids), self.index, self.photo, state)
        return logits.float().cpu().numpy()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(np.asarray(array)).to(next(self.model.parameters()).device)


def build_model(
    *,
    encoder: dict[str, Any],
    bridge: dict[str, Any],
    decoder: dict[str, Any],
    vocab_size: int,
    bos_id: int,
    size: tuple[int, int],
    load_weights: bool = True,
) -> CaptionModel:
    """Build one cell of the grid. Each part: {"kind": …, **options}; the encoder's are `source`, `config`, `features`.

    `load_weights=False` builds shapes only, whatever `source` a part has (the weights come from a checkpoint).
    """
    if not load_weights:
        encoder, bridge, decoder = (
            {key: value for key, value in part.items() if key != "source"} for part in (encoder, bridge, decoder)
        )
    seen = build_encoder(encoder)
    fit(seen, size[0], encoder.get("tile", 0))
    across = build_part(BRIDGES, "bridge", bridge, seen.dim)
    return CaptionModel(
        seen, across, build_part(DECODERS, "decoder", decoder, across.dim, vocab_size), bos_id=bos_id, size=size
    ).eval()


def build_encoder(options: dict[str, Any]) -> Any:
    """An encoder of the table: {"kind": …, "source": …, "config": …, "features": …}; without a source it starts from
    its config."""
    make = _pick(ENCODERS, "encoder", options["kind"])
    try:
        return make(options.get("source"), options["config"], options.get("features", "grid"))
    except BAD_SETTINGS as error:
        raise UsageError(f"recipe [encoder] ({options['kind']}): {error}") from error


def _pick(table: dict[str, Any], part: str, kind: str) -> Any:
    if kind not in table:
        raise UsageError(f"{part}.kind = {kind!r} is unknown; choices: {', '.join(sorted(table))}")
    return table[kind]


def build_part(table: dict[str, Any], part: str, options: dict[str, Any], *sizes: int) -> Any:
    """A bridge or decoder of its table: {"kind": …, **options}, with the sizes that lie before it."""
    settings = {key: value for key, value in options.items() if key != "kind"}
    make = _pick(table, part, options["kind"])
    for key, hint in get_type_hints(make.__init__).items():
        if hint is int and key in settings and type(settings[key]) is not int:
            raise UsageError(f"recipe [{part}] ({options['kind']}): {key} = {settings[key]!r} must be a whole number")
    try:
        return make(*sizes, **settings)
    except BAD_SETTINGS as error:
        raise UsageError(f"recipe [{part}] ({options['kind']}): {error}") from error

"""Prunes a decoder: its hidden units, MLPs, attention heads and whole layers, by what leaving them out costs.

The result is a decoder of the same kind with smaller options, so that the recipe can say all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.errors import UsageError
from ..train.data.batches import Batch
from ..train.models import CaptionModel
from ..train.models.widths import Width, drop
from .prune_reconstruct import elimination, kept, moments, refit

BATCH = 16
Tensors = dict[str, Tensor]


def caption_batches(pixels: np.ndarray, captions: Sequence[Sequence[int]], tokens: dict[str, int]) -> Iterator[Batch]:
    """Calibration photos uint8 [N, H, W, 3] with one caption each (ids without BOS and EOS), as in training."""
    for start in range(0, len(pixels), BATCH):
        lines = [[tokens["bos"], *ids, tokens["eos"]] for ids in captions[start : start + BATCH]]
        ids = torch.full((len(lines), 1, max(map(len, lines))), -1)
        for row, line in enumerate(lines):
            ids[row, 0, : len(line)] = torch.tensor(line)
        places = np.arange(start, start + len(lines))
        yield Batch(ids, places, torch.from_numpy(np.array(pixels[places])))


class Captioned:
    """The calibration captions with their photos' memory, which no pruning of the decoder changes."""

    def __init__(self, model: CaptionModel, batches: Iterator[Batch]) -> None:
        self.model = model
        with torch.no_grad():
            self.rows = [(model.memory(**batch.view), batch) for batch in batches]

    @torch.no_grad()
    def loss(self) -> float:
        """Mean cross-entropy of a word, in nats."""
        total, count = 0.0, 0
        for memory, batch in self.rows:
            logits = self.model.decoder(memory, batch.inputs, batch.keep)
            total += float(F.cross_entropy(logits.float(), batch.targets, reduction="sum"))
            count += len(batch.targets)
        return total / count


def drop_layers(model: CaptionModel, count: int, seen: Captioned, report: Any) -> tuple[list[int], Tensors]:
    """Which `count` layers go, one after the other where the loss rises least, and the weights that stay."""
    decoder = model.decoder
    if not hasattr(decoder, "without"):
        raise UsageError("--prune layers: this captioner's decoder is a single recurrent layer; prune hidden=SHARE")
    if count >= decoder.layers:
        raise UsageError(f"--prune layers={count}: the decoder has {decoder.layers} layers and keeps at least one")
    gone: list[int] = []
    tried = 0
    steps = sum(decoder.layers - i for i in range(count))
    for _ in range(count):
        losses = {}
        for layer in sorted(set(range(decoder.layers)) - set(gone)):
            with ExitStack() as skipped:
                # From the top, so that the places of the others hold.
                for place in sorted([*gone, layer], reverse=True):
                    skipped.enter_context(decoder.without(place))
                losses[layer] = seen.loss()
            tried += 1
            report("prune layers", tried, steps)
        gone.append(min(losses, key=losses.__getitem__))
    keep = [layer for layer in range(decoder.layers) if layer not in gone]
    tensors: Tensors = {}
    for name, tensor in decoder.state_dict().items():
        if name.startswith(f"{decoder.stack}."):
            layer, _, rest = name.removeprefix(f"{decoder.stack}.").partition(".")
            if int(layer) in gone:
                continue
            name = f"{decoder.stack}.{keep.index(int(layer))}.{rest}"
        tensors[name] = tensor
    return sorted(gone), tensors


def narrow(model: CaptionModel, shares: dict[str, float], seen: Captioned) -> tuple[dict[str, int], Tensors]:
    """Take units out of the decoder's widths: share by the width's key → the recipe's new options and weights."""
    decoder = model.decoder
    widths = [width for width in decoder.widths() if width.key in shares]
    modules = dict(decoder.named_modules())
    with moments({width.readers[0].module: modules[width.readers[0].module] for width in widths}) as grams:
        seen.loss()
    tensors = dict(decoder.state_dict())
    options: dict[str, int] = {}
    plans = []
    for width in widths:
        step = len(set(width.buckets)) or 1
        count = min(int(width.units * shares[width.key]) // step, width.units // step - 1) * step
        if count < 1:
            continue
        first = width.readers[0]
        gram = grams[first.module]
        joint = torch.cat([_columns(tensors, reader) for reader in width.readers])  # [out, units · k]
        # The readers see the units in the order of `index`; the moments are those of the first one's whole input.
        seen_gram = gram[first.index.flatten()][:, first.index.flatten()]
        index = torch.arange(first.index.numel()).view(first.index.shape)
        order, _ = elimination(joint, seen_gram, index, _most(width, count))
        keep = kept(width.units, order, count, width.buckets)
        plans.append((width, keep, seen_gram, index))
        options[width.key] = width.units - count
    for width, keep, gram, index in plans:
        stay = torch.tensor(keep)
        gone = torch.tensor([unit for unit in range(width.units) if unit not in set(keep)])
        for reader in width.readers:
            name = f"{reader.module}.weight"
            weight = tensors[name].transpose(0, 1) if reader.dim == 0 else tensors[name]
            weight = weight.clone()
            weight[:, reader.index[stay].flatten()] = refit(
                weight[:, reader.index.flatten()], gram, index[stay].flatten()
            )
            tensors[name] = (weight.transpose(0, 1) if reader.dim == 0 else weight).contiguous()
        for name, cuts in width.slices().items():
            for dim, rows in cuts:
                tensors[name] = drop(tensors[name], dim, rows[gone])
    return options | decoder.follows(options), tensors


def _columns(tensors: Tensors, reader: Any) -> Tensor:
    weight = tensors[f"{reader.module}.weight"]
    return (weight.transpose(0, 1) if reader.dim == 0 else weight)[:, reader.index.flatten()]


def _most(width: Width, count: int) -> int:
    """With buckets the cheapest units may lie in one of them: look at enough of the order to fill each."""
    return width.units - 1 if width.buckets else count

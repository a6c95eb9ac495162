"""Prunes channels of a convolutional encoder: torch-pruning finds what hangs together, least squares what can go.

Only channels inside a block are taken (made by one convolution, read by 1×1 convolutions or a linear layer); the
residual stream, which every block adds to, keeps its width.
"""

from __future__ import annotations

import heapq
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.errors import UsageError
from ..train.models import CaptionModel
from .prune_reconstruct import elimination, kept, moments, refit

BATCH = 16
MOST = 0.85  # share of a group's channels that may go
STEPS = (16, 8, 4, 2)  # channels that a CPU computes at once: what is left of a wide group is a multiple of these


@dataclass
class Group:
    """Channels that go together: made by `producer`, read by `readers` (names in the traced network)."""

    producer: str
    channels: int
    readers: tuple[str, ...]
    last: bool  # the encoder's output
    cost: int  # parameters of one channel
    order: list[int]
    errors: list[float]


class Traced(nn.Module):
    """What is pruned as one network: the encoder's body and the bridge that reads it."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.body, self.bridge, self.read = model.encoder.body, model.bridge, model.encoder.read

    def forward(self, x: Tensor) -> Tensor:
        return self.bridge(self.read(self.body(x)))


def prune_encoder(model: CaptionModel, shares: dict[str, float], pixels: np.ndarray, report: Any) -> None:
    """Take channels out of `model` in place. shares: "encoder" of all channels, where they cost least for what they
    weigh; "features" of the encoder's output channels. pixels uint8 [N, H, W, 3]."""
    net = Traced(model).eval()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.body.modules())
    # A vision transformer's one convolution makes the patches, that is the residual stream.
    graph, groups = _groups(net, model.size) if convolutions > 1 else (None, [])
    if not groups:
        raise UsageError("--prune: this encoder has no channels that can go (no convolution inside a block)")
    chosen = [g for g in groups if g.last] if "encoder" not in shares else groups
    if not chosen:
        raise UsageError("--prune features: this encoder's output is a residual stream; prune encoder=SHARE")
    grams = _look(model, net, chosen, pixels, report)
    modules = dict(net.named_modules())
    for done, group in enumerate(chosen):
        weight = torch.cat([modules[name].weight.detach().flatten(1) for name in group.readers])
        most = int(group.channels * (shares["features"] if group.last and "features" in shares else MOST))
        index = torch.arange(group.channels).unsqueeze(1)
        group.order, group.errors = elimination(weight, grams[group.readers[0]], index, most)
        report("prune", done + 1, len(chosen))
    counts = _share_out(chosen, shares)
    for group in chosen:
        keep = torch.tensor(kept(group.channels, group.order, counts[group.producer]))
        _cut(net, graph, group, keep, grams[group.readers[0]])
    model.encoder.body.to(memory_format=torch.channels_last)
    model.encoder.dim = _dim(model)


def _groups(net: Traced, size: tuple[int, int]) -> tuple[Any, list[Group]]:
    import torch_pruning as tp

    names = {module: name for name, module in net.named_modules()}
    frozen = [p for p in net.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # the dependency graph is read off autograd's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(net, example_inputs=torch.zeros(1, 3, *size))
    for parameter in frozen:
        parameter.requires_grad_(False)
    found = []
    for members in graph.get_all_groups(root_module_types=[nn.Conv2d]):
        makers, readers, weights, whole = [], [], 0, True
        channels = len(members[0].idxs)
        for dep, places in members:
            module = dep.target.module
            name = names.get(module)
            if name is None:
                continue
            if dep.handler.__name__ == "prune_in_channels":
                if not _is_linear(module) or list(places) != list(range(channels)):
                    whole = False
                readers.append(name)
            elif isinstance(module, nn.Conv2d) and module.groups == 1:
                makers.append(name)
            elif isinstance(module, nn.Conv2d) and module.groups != module.in_channels:
                whole = False
            weights += sum(p.numel() for p in module.parameters(recurse=False)) // channels
        if whole and len(makers) == 1 and readers:
            last = any(name.startswith("bridge") for name in readers)
            found.append(Group(makers[0], channels, tuple(readers), last, weights, [], []))
    return graph, sorted(found, key=lambda group: group.producer)


def _is_linear(module: nn.Module) -> bool:
    one_by_one = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or one_by_one


def _look(model: CaptionModel, net: Traced, groups: list[Group], pixels: np.ndarray, report: Any) -> dict[str, Tensor]:
    """Second moments of what the groups' readers see on the calibration photos."""
    modules = dict(net.named_modules())
    with moments({group.readers[0]: modules[group.readers[0]] for group in groups}) as grams, torch.no_grad():
        for start in range(0, len(pixels), BATCH):
            model.memory(pixels=torch.from_numpy(np.array(pixels[start : start + BATCH])))
            report("calibrate encoder", min(start + BATCH, len(pixels)), len(pixels))
    return grams


def _share_out(groups: list[Group], shares: dict[str, float]) -> dict[str, int]:
    """How many channels of each group go: one after the other where the error is least for the parameters saved."""
    counts = dict.fromkeys((group.producer for group in groups), 0)
    fixed = {group.producer for group in groups if group.last} if "features" in shares else set()
    for group in groups:
        if group.producer in fixed:
            counts[group.producer] = len(group.order)
    free = [group for group in groups if group.producer not in fixed]
    wanted = int(sum(group.channels for group in free) * shares.get("encoder", 0.0))

    def price(place: int, last: float) -> tuple[float, int]:
        group = free[place]
        n = counts[group.producer]
        before = group.errors[n - 1] if n else 0.0
        # Never below what was paid already: the channels behind a dear one cannot be had without it.
        return max(last, (group.errors[n] - before) / group.cost), place

    heap = [price(place, 0.0) for place, group in enumerate(free) if group.order]
    heapq.heapify(heap)
    for _ in range(wanted):
        if not heap:
            break
        paid, place = heapq.heappop(heap)
        counts[free[place].producer] += 1
        if counts[free[place].producer] < len(free[place].order):
            heapq.heappush(heap, price(place, paid))
    return {group.producer: _whole_steps(group, counts[group.producer]) for group in groups}


def _whole_steps(group: Group, count: int) -> int:
    """About as many channels to take, so that what is left fills vectors: odd widths ran slower than unpruned ones."""
    if not count:
        return 0
    step = next((step for step in STEPS if group.channels >= 4 * step and group.channels % step == 0), 1)
    left = max(step, round((group.channels - count) / step) * step)
    while group.channels - left > len(group.order):
        left += step
    return group.channels - left


def _cut(net: Traced, graph: Any, group: Group, keep: Tensor, gram: Tensor) -> None:
    """Remove the channels everywhere, then refit the layers that read them."""
    import torch_pruning as tp

    modules = dict(net.named_modules())
    gone = sorted(set(range(group.channels)) - set(keep.tolist()))
    if not gone:
        return
    new = {name: refit(modules[name].weight.detach().flatten(1), gram, keep) for name in group.readers}
    graph.get_pruning_group(modules[group.producer], tp.prune_conv_out_channels, idxs=gone).prune()
    with torch.no_grad():
        for name, weight in new.items():
            modules[name].weight.copy_(weight.view_as(modules[name].weight))


def _dim(model: CaptionModel) -> int:
    with torch.no_grad():
        return model.encoder(torch.zeros(1, *model.size, 3, dtype=torch.uint8)).shape[-1]

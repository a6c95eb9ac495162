"""Pruned encoders: cuts the recipe's full-width modules down to the shapes of the stored weights.

What a recipe can say (a decoder's sizes, the vocabulary) it does say; the widths of single convolutions it cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .models import CaptionModel


def shrink_to(model: CaptionModel, tensors: dict[str, Tensor]) -> None:
    """Give the encoder, and the bridge that reads it, the shapes of `tensors` (those of `state.model_tensors`).

    Weights are left undefined: load them next, which refuses what could not be made to fit (a tensor that is larger
    than the recipe's, or missing).
    """
    for part in ("encoder", "bridge"):
        for name, module in getattr(model, part).named_modules():
            prefix = ".".join(filter(None, (part, name)))
            if any([_cut(module, own, tensors.get(f"{prefix}.{own}")) for own in _own(module)]):  # all of them
                _tell_sizes(module)
    with torch.no_grad():
        height, width = model.size
        pixels = torch.zeros(1, height, width, 3, dtype=torch.uint8)
        try:
            model.encoder.dim = model.encoder.eval()(pixels).shape[-1]
        except RuntimeError:
            pass  # shapes that do not belong together: loading names the tensor


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]


def _cut(module: nn.Module, name: str, stored: Tensor | None) -> bool:
    """Replace a module's own tensor by one of the stored shape, where that is smaller."""
    tensor = getattr(module, name)
    if stored is None or stored.shape == tensor.shape or stored.ndim != tensor.ndim:
        return False
    if any(new > old or new < 1 for new, old in zip(stored.shape, tensor.shape, strict=True)):
        return False
    cut = tensor.detach()[tuple(slice(0, size) for size in stored.shape)].clone()
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, cut)
    return True


def _tell_sizes(module: nn.Module) -> None:
    """The sizes that a module keeps beside its weights."""
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels > 1
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape

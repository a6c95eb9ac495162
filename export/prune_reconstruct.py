"""Which inputs of a linear layer can go, and new weights for the others that make up for them as well as can be.

The layer's output W x is reproduced from fewer inputs by least squares on calibration activations, which needs only
their second moments G = Σ x xᵀ. Leaving out input j adds ‖W_j‖² / (G⁻¹)_jj to the squared error (Optimal Brain
Surgeon, Hassibi & Stork 1993; for whole structures ZipLM, Kurtic et al. 2023, arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DAMPING = 1e-3  # of the mean second moment: keeps G invertible where inputs are dead or depend on each other
POSITIONS = 196  # grid cells of a photo that are looked at


@contextmanager
def moments(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Second moments [in, in] float64 of the layers' inputs while the model runs inside the block."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if isinstance(module, nn.Conv2d):
                x = x.flatten(2).transpose(1, 2)  # [N, H·W, in]
                x = x[:, :: max(1, x.shape[1] // POSITIONS)]
            x = x.reshape(-1, x.shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return observe

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def damped(gram: Tensor) -> Tensor:
    size = len(gram)
    return gram + torch.eye(size, dtype=gram.dtype) * (DAMPING * gram.diagonal().mean() + 1e-12)


def elimination(weight: Tensor, gram: Tensor, index: Tensor, most: int) -> tuple[list[int], list[float]]:
    """Units in the order in which they cost least, and the error so far, relative to the output's energy.

    weight [out, in], gram [in, in], index [units, k]: the inputs of each unit; `most` units are taken out.
    """
    weight, gram = weight.double().clone(), damped(gram)
    energy = float(((weight @ gram) * weight).sum()) or 1.0
    inverse = torch.linalg.inv(gram)
    alive = torch.ones(len(index), dtype=torch.bool)
    order, errors, error = [], [], 0.0
    single = index.shape[1] == 1
    for _ in range(most):
        if single:
            own = inverse.diagonal()[index[:, 0]].view(-1, 1, 1)
            cost = weight.square().sum(0)[index[:, 0]] / own.flatten()
        else:
            own = inverse[index.unsqueeze(2), index.unsqueeze(1)]  # [units, k, k]
            own[~alive] = torch.eye(index.shape[1], dtype=own.dtype)
            per_unit = weight[:, index].permute(1, 2, 0)  # [units, k, out]
            cost = (torch.linalg.solve(own, per_unit) * per_unit).sum((1, 2))
        cost[~alive] = torch.inf
        unit = int(cost.argmin())
        error += max(0.0, float(cost[unit]))
        order.append(unit)
        errors.append(error / energy)
        alive[unit] = False
        columns = index[unit]
        gain = torch.linalg.solve(own[unit], inverse[columns])  # [k, in]
        weight -= weight[:, columns] @ gain
        inverse -= inverse[:, columns] @ gain
        weight[:, columns] = 0.0
    return order, errors


def refit(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """[out, in] → [out, len(keep)]: the weights on the kept inputs that come nearest to the whole layer's output."""
    whole = damped(gram)
    right = whole[:, keep].T @ weight.double().T  # [kept, out]
    return torch.linalg.solve(whole[keep][:, keep], right).T.to(weight.dtype)


def kept(units: int, order: Sequence[int], count: int, buckets: Sequence[int] = ()) -> list[int]:
    """Units that stay when `count` go, in `order`; as many from each bucket."""
    room = {bucket: count // len(set(buckets)) for bucket in buckets} if buckets else {0: count}
    gone = set()
    for unit in order:
        bucket = buckets[unit] if buckets else 0
        if room[bucket]:
            room[bucket] -= 1
            gone.add(unit)
    return [unit for unit in range(units) if unit not in gone]

"""Files that survive a kill: written beside their place, flushed, and moved there in one step. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..runtime.errors import EdgecapError, UsageError
from .optim import WeightAverage

WEIGHTS = "model.safetensors"
ADAPTER = Path("adapter") / "adapter_model.safetensors"  # in its place where adapters alone are stored


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends; EdgecapError, naming `path`, if it cannot.

    Its name is always the same, so that what a killed process left is used again and not left for ever.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        why = getattr(error, "strerror", None) or error
        raise EdgecapError(f"{path} cannot be written ({why}): make room, or choose another place") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file, whole or not at all. Tensors that share memory are written once."""
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what others may do with the files that we write; safetensors lets no one read
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; one clear line where it is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise EdgecapError(f"{path} cannot be read ({error}): it is damaged, restore it or train again") from error


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared (tied) tensor once; of a model that `stores` only a part, that part."""
    seen: set[tuple[int, int]] = set()
    kept = {}
    stores = getattr(model, "stores", None) or (lambda name: True)
    for name, tensor in model.state_dict().items():
        if not stores(name):
            continue
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor
    return kept


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values."""
    return hashlib.sha256(_raw(tensor)).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor], *, shapes: bool = True) -> str:
    """SHA-256 over names and values, by default also shapes and types, of what a model stores."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() if shapes else name.encode())
        found.update(_raw(tensor))
    return found.hexdigest()


def _raw(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Fill a model from `model_tensors`; UsageError where names or shapes differ."""
    own = model_tensors(model)
    wrong = sorted(set(own) ^ set(tensors)) or [n for n in own if own[n].shape != tensors[n].shape]
    if wrong:
        raise UsageError(f"{where} does not fit its recipe: {wrong[0]} is missing, unknown or of another shape")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def save_progress(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: WeightAverage | None,
    state: dict[str, Any],
) -> None:
    """Everything that resuming needs, in one file."""
    tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    if average:
        tensors |= {f"average.{name}": tensor for name, tensor in average.weights.items()}
        state = {**state, "average_updates": average.updates}
    if optimizer:
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    write_tensors(path, tensors, {"state": json.dumps(state)})


def load_progress(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(path)
    try:
        return tensors, json.loads(metadata["state"])
    except (KeyError, json.JSONDecodeError) as error:
        raise EdgecapError(f"{path} is not a training state: remove it to start the run again") from error


def restore(
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
) -> None:
    """Put what `save_progress` wrote back where it was."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    load_model_tensors(model, part("model."), "the training state")
    if average:
        average.updates = state["average_updates"]
        for name, tensor in part("average.").items():
            average.weights[name].copy_(tensor)
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer.").items():
        i, _, slot = name.partition(".")
        slots.setdefault(int(i), {})[slot] = tensor
    whole = optimizer.state_dict()
    whole["state"] = slots
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(whole)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group["base_lr"] = before["base_lr"]

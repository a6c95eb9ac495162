"""What a stage needs of memory at least, what a device has, and what was taken."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..benchmarks.rss import peak_rss
from ..runtime.errors import EdgecapError
from .optim import make_optimizer
from .settings import Stage

SPARE = 0.95  # of the memory that is free: allocators round up


def too_large(model: nn.Module, stage: Stage, free: int | None) -> str:
    """Why a stage cannot fit, whatever its batch, or "": weights, gradients, AdamW's two moments, the average."""
    least = least_memory(model, stage)
    if free is None or least <= free * SPARE:
        return ""
    return (
        f"it does not fit: weights, gradients and optimizer of stage {stage.name} alone take {least / 1e9:,.1f} GB, "
        f"{free / 1e9:,.1f} GB are free; train fewer parts, or with [lora]"
    )


def least_memory(model: nn.Module, stage: Stage) -> int:
    """Bytes that a stage takes before the first photo: see `too_large`."""
    make_optimizer(model, stage)  # says which parameters the stage trains
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + trained * (4 if stage.ema else 3)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or for this process on the CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            entries = dict(line.split(":", 1) for line in file)
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def forget_peak(device: torch.device) -> None:
    """Start measuring anew, where the system lets us; else the peak is that of all stages so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def peak_memory(device: torch.device) -> int:
    """The most bytes since `forget_peak`: of torch on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = peak_rss()
    if peak is None:
        raise EdgecapError("this system does not tell a process's peak memory: --check works on Linux and macOS")
    return peak

"""What any teacher is: a frozen model, loaded when it is needed and let go behind that, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointInfo, load_again
from ..lora import count_parameters

CPU = torch.device("cpu")


class Lazy:
    """A teacher's model, loaded when it is asked for and kept until it is forgotten; two teachers may share one.

    parameters: None where that is not known, as of what is no torch module.
    """

    def __init__(self, load: Callable[[], Any], parameters: int | None = None) -> None:
        self._load, self._model, self.parameters = load, None, parameters

    def get(self, device: torch.device = CPU) -> Any:
        """The model, frozen and on the device; an engine stays where it is."""
        if self._model is None:
            self._model = self._load()
            if isinstance(self._model, torch.nn.Module):
                self._model.eval().requires_grad_(False)
                self.parameters = count_parameters(self._model)
        return self._model.to(device) if isinstance(self._model, torch.nn.Module) else self._model

    def forget(self) -> None:
        """Give its memory back until it is needed again."""
        self._model = None


class Teacher:
    """What is told of a teacher. name: a path or a hub id; sha256: of its weights; recipe and cider, of its own
    validation, where it is a checkpoint."""

    recipe: str | None = None
    cider: float | None = None
    note = ""  # what else people should know

    def __init__(self, name: str, sha256: str, model: Lazy) -> None:
        self.name, self.sha256, self.model = name, sha256, model

    def describe(self, info: CheckpointInfo) -> None:
        """It is this checkpoint."""
        self.recipe, self.cider = info.recipe.name, (info.metrics.get("best") or {}).get("cider")

    @property
    def parameters(self) -> int | None:
        return self.model.parameters

    def forget(self) -> None:
        """Give its memory back until it is needed again."""
        self.model.forget()

    def told(self) -> dict[str, Any]:
        """What a run's metrics say of it."""
        known = {name: getattr(self, name) for name in ("sha256", "recipe", "parameters", "cider")}
        return {"path": place(self.name), **known}

    def line(self) -> str:
        """The same for people."""
        size = "" if self.parameters is None else f", {self.parameters / 1e6:,.2f} M parameters"
        scored = "" if self.cider is None else f", validation CIDEr {self.cider:.4f}"
        return f"teacher {self.name}: {self.recipe or 'by its captions'}{size}{scored}{self.note}"


def place(source: str | Path) -> str:
    """Where a model lies, from anywhere; a hub id is its own place."""
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def lazy_checkpoint(info: CheckpointInfo, parameters: int | None = None) -> Lazy:
    """The model of this checkpoint, and of no later one in its place."""
    return Lazy(lambda: load_again(str(info.path), info.sha256, "teacher").model, parameters)

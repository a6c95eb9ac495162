"""`edgecap train --check`: one batch of every stage, for real, to tell memory and speed before hours are spent."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator

from ..benchmarks.datasets import Dataset, open_dataset
from ..runtime.progress import Progress
from ..runtime.tokenizer import Tokenizer
from .checkpoint import TOKENIZER
from .lora import count_parameters
from .memory import forget_peak, free_memory, peak_memory, too_large
from .opening import TASKS, Made, open_helpers, open_model, open_run, precision
from .report import TrainingLog
from .settings import Recipe, Stage
from .start import read_start

STEPS = 3  # the first of them warms up


@dataclass
class Fit:
    """What a recipe's stages take. parameters: part → count; stages: a row each; memory in bytes, `free` before."""

    recipe: str
    device: str
    parameters: dict[str, int]
    free: int | None
    stages: list[dict[str, Any]] = field(default_factory=list)
    refusal: str = ""

    @property
    def fits(self) -> bool:
        return not self.refusal

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "fits": self.fits}

    def text(self) -> str:
        """For people."""
        parts = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in self.parameters.items())
        lines = [f"{self.recipe}: {sum(self.parameters.values()) / 1e6:,.2f} M parameters ({parts}) on {self.device}"]
        for row in self.stages:
            seen = f", encoder alone {row['encoder_images_per_s']:,.1f} photos/s" if row["encoder_images_per_s"] else ""
            lines.append(
                f"  {row['stage']}: trains {row['trained'] / 1e6:,.2f} M, batch {row['batch']}, peak "
                f"{row['peak'] / 1e9:,.2f} GB, {row['images_per_s']:,.1f} photos/s{seen}"
            )
        free = "" if self.free is None else f" ({self.free / 1e9:,.1f} GB free before)"
        return "\n".join([*lines, f"  {self.refusal or 'it fits'}{free}"])


def check_fit(
    recipe: Recipe, *, init: Path | None = None, critic: str | None = None, progress: Progress = lambda *done: None
) -> Fit:
    """Take STEPS optimizer steps of each stage on its own data, batch size and device, in a folder that goes again.

    Peak memory is the whole process's (on a GPU: what torch has reserved there). images_per_s: of the optimizer steps,
    from cached features where the encoder is frozen; encoder_images_per_s: of filling that cache.
    """
    data = _batch_of(open_dataset(recipe.data.spec, skip_bad=recipe.data.skip_bad), recipe)
    with tempfile.TemporaryDirectory(prefix="edgecap-check-") as folder, _own_cache(Path(folder) / "cache"):
        out = Path(folder) / "run"
        out.mkdir()
        accelerator = Accelerator(mixed_precision=precision(recipe))
        device = accelerator.device
        free, made = free_memory(device), Made()
        _, recipe = open_run(recipe, data, out, init=init, critic=critic, trains=False, made=made)
        tokenizer, start = Tokenizer.load(out / TOKENIZER).inner, read_start(out)
        model = open_model(recipe, tokenizer, out, False, made)
        counts = {name: count_parameters(part) for name, part in model.parts().items()}
        fit = Fit(recipe.name, device.type, counts, free)
        probe = _probe(TASKS[recipe.task].trainer)
        trainer = probe(
            recipe, model, tokenizer, data, out, accelerator, progress, TrainingLog(None, print),
            start=start, helpers=open_helpers(recipe, start, tokenizer, progress, made),
        )  # fmt: skip
        for stage in recipe.stages:
            if stage.objective == "distill":
                continue  # without its teacher
            fit.refusal = too_large(model, stage, free)
            if not fit.refusal:
                fit.refusal = trainer.try_stage(fit, stage, free)
            if fit.refusal:
                break
        return fit


def _probe(base: type) -> Any:
    """A trainer that takes a few steps of a stage, times them, and leaves nothing behind."""

    class Timed(base.learns_from):  # type: ignore[misc]
        def open_photos(self, stage: Stage) -> None:
            begun, first = time.perf_counter(), not hasattr(self, "seconds")  # later stages find the features cached
            epochs = self.recipe.stages[self.number].epochs  # of the real stage, which decide what is seen
            super().open_photos(dataclasses.replace(stage, epochs=epochs))
            self.seconds = time.perf_counter() - begun if self.sees != "pixels" and first else None

    class Probe(base):  # type: ignore[misc]
        learns_from = Timed

        def try_stage(self, fit: Fit, stage: Stage, free: int | None) -> str:
            """Adds the stage's row to `fit`; returns why it does not fit, or ""."""
            device, self.times = self.accelerator.device, []
            self.state["stage"] = self.recipe.stages.index(stage)
            forget_peak(device)
            self.began = time.monotonic()
            try:
                self.model.to(device)
                short = {"epochs": STEPS, "validate_every": STEPS + 1, "teacher_captions": 0}
                self._stage(dataclasses.replace(stage, **short), None)
            except (torch.OutOfMemoryError, MemoryError):
                return (
                    f"it does not fit: stage {stage.name} runs out of memory; "
                    f"--set stages.{self.recipe.stages.index(stage)}.accumulate={2 * stage.accumulate} or more"
                )
            seen, views = self.material.seconds, len(self.material.views)
            photos = min(len(self.material.train), stage.batch_size)
            fit.stages.append(
                {
                    "stage": stage.name,
                    "batch": photos,
                    "accumulate": stage.accumulate,
                    "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                    "peak": peak_memory(device),
                    "images_per_s": photos / median(self.times[1:]),
                    "encoder_images_per_s": None if seen is None else len(self.material.train) * views / seen,
                }
            )
            return ""

        def _step(self, *args: Any) -> Any:
            begun = time.perf_counter()
            done = super()._step(*args)
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() - begun)
            return done

        def _validate(self, stage: Stage) -> dict[str, Any]:
            return {}

        def _keep(self, stage: Stage, record: dict[str, Any] | None) -> None:
            pass

        def _save(self) -> None:
            pass

    return Probe


def _batch_of(data: Dataset, recipe: Recipe) -> Dataset:
    """The largest batch that a stage asks for, and one photo of the other splits."""
    most = max(stage.batch_size for stage in recipe.stages)
    splits = {name: list(examples[: most if name == "train" else 1]) for name, examples in data.splits.items()}
    return dataclasses.replace(data, splits=splits)


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("EDGECAP_CACHE")
    os.environ["EDGECAP_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("EDGECAP_CACHE")
        if before is not None:
            os.environ["EDGECAP_CACHE"] = before

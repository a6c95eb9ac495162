"""The training loop: stages of epochs over batches, validated, saved whole, continued exactly where they were killed.

All randomness is a function of (seed, stage, epoch, step): nothing of a random generator has to be stored to resume.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer

from ..benchmarks.datasets import Dataset
from ..runtime.decode import DecodeOptions
from ..runtime.errors import UsageError
from ..runtime.progress import Progress
from .checkpoint import METRICS, PROGRESS, RECIPE, TOKENIZER
from .data.material import Material
from .lora import count_parameters
from .models import CaptionModel
from .objectives import OBJECTIVES
from .optim import WeightAverage, lr_factor, make_optimizer, set_modes
from .report import TrainingLog
from .settings import Recipe, Stage
from .start import ALONE, Helpers, Start
from .state import (
    load_model_tensors,
    load_progress,
    model_tensors,
    restore,
    save_progress,
    write_bytes,
    write_json,
)
from .teachers.captions import figures_line, with_captions
from .validate import caption_rows, score_captions
from .weights import read_weights, write_weights

SAVE_EVERY_S = 120.0  # within long epochs
# Of the epoch so far; the loss is divided by `count`, the reward by the steps that were `rewarded`.
EPOCH = {"batch": 0, "loss": 0.0, "count": 0, "reward": 0.0, "rewarded": 0}
TIMES = {"step_seconds": 0.0, "reward_seconds": 0.0}


class Trainer:
    """Trains `model` by `recipe` on `data` into the checkpoint directory `out`.

    For another task than captions, `learns_from`, `metric` and `score` say what is learnt and how it is judged.
    """

    learns_from: type[Material] = Material
    metric = "cider"  # the figure of a validation, higher is better, by which weights are kept

    def __init__(
        self,
        recipe: Recipe,
        model: CaptionModel,
        tokenizer: Tokenizer,
        data: Dataset,
        out: Path,
        accelerator: Accelerator,
        progress: Progress,
        log: TrainingLog,
        *,
        start: Start | None = None,
        helpers: Helpers = ALONE,
    ) -> None:
        self.recipe, self.model, self.tokenizer, self.helpers = recipe, model, tokenizer, helpers
        self.accelerator, self.progress, self.log = accelerator, progress, log
        self.material = self.learns_from(recipe, model, tokenizer, data, accelerator, progress, helpers)
        self.start, self.out = start or Start(), out
        self.metric = recipe.watch or self.metric
        self.state: dict[str, Any] = {
            "stage": 0, "epoch": 0, **EPOCH, **TIMES, "best": None, "waits": 0, "plateau": 1.0, "plateau_waits": 0,
            "history": [], "seconds": 0.0, "finished": False, "data": data.fingerprint, "teacher_captions": {},
        }  # fmt: skip

    # --- the whole run -----------------------------------------------------------------------------------------

    def run(self, begun: bool) -> dict[str, Any]:
        """Train to the end, from the saved state where one has `begun`; returns the metrics that were written."""
        self.model.to(self.accelerator.device)
        tensors = None
        if begun:
            tensors, state = load_progress(self.out / PROGRESS)
            if state.get("data", self.state["data"]) != self.state["data"]:
                raise UsageError(
                    f"{self.out} was begun on other data than {self.recipe.data.spec} holds now: "
                    "put the data back, or train anew with another --out"
                )
            self.state |= state
        self.began = time.monotonic() - self.state["seconds"]
        self.log.resume(self.state["history"])
        for teacher in self.helpers.all_teachers:
            self.log.line(teacher.line())
        while self.state["stage"] < len(self.recipe.stages):
            self._stage(self.recipe.stages[self.state["stage"]], tensors)
            tensors = None
        self._end()
        return self._write_metrics(finished=True)

    def _stage(self, stage: Stage, tensors: dict[str, torch.Tensor] | None) -> None:
        number = self.state["stage"]
        if tensors is None and self.state["best"]:
            load_model_tensors(self.model, read_weights(self.out), str(self.out))
        optimizer = make_optimizer(self.model, stage)
        self.average = WeightAverage(self.model, stage.ema) if stage.ema else None
        if tensors is not None:
            restore(tensors, self.state, self.model, optimizer, self.average)
        if told := self.material.open(stage, number):
            self.state["teacher_captions"][str(number)] = {"stage": stage.name, **told}
            self.log.line(f"stage {stage.name}: {figures_line(told)}")
        self.plan = self.material.plan
        objective = OBJECTIVES[stage.objective]
        self.objective = objective(self.recipe, stage, self.tokenizer, self.material.train.examples, self.helpers)
        self.accelerator.free_memory()  # else the last stage's optimizer, too, would unscale the gradients
        forward, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if tensors is None:
            self._save()  # before the best weights can change, which are this stage's start
        if self.start.sha256 and not self.state["history"] and not self.state["batch"]:
            # What the run starts from is a result already, and may stay the best.
            self._validate(stage)
            self._save()
        while self.state["epoch"] < stage.epochs and not self._stops_early(stage):
            self._epoch(stage, forward)
            self.state["epoch"] += 1
            last, record = self.state["epoch"] == stage.epochs, None
            if last or self.state["epoch"] % stage.validate_every == 0:
                record = self._validate(stage)
            if stage.keep_every and self.state["epoch"] % stage.keep_every == 0:
                self._keep(stage, record)
            self.state.update(EPOCH | TIMES)
            self._save()
        if self.state["epoch"] < stage.epochs:
            self.log.line(
                f"stage {stage.name}: no better {self.metric} for {self.state['waits']} validations, stopping early"
            )
        self.state.update(stage=number + 1, epoch=0, waits=0, plateau=1.0, plateau_waits=0)

    def _stops_early(self, stage: Stage) -> bool:
        return bool(stage.patience) and self.state["waits"] > stage.patience

    # --- one epoch ---------------------------------------------------------------------------------------------

    def _epoch(self, stage: Stage, forward: torch.nn.Module) -> None:
        set_modes(self.model, stage, from_scratch=not self.recipe.encoder.source)
        epoch, saved = self.state["epoch"], time.monotonic()
        phase = f"{stage.name}, stage {self.state['stage'] + 1} of {len(self.recipe.stages)}"
        for index, (places, views) in enumerate(self.plan.epoch(epoch)):
            if index < self.state["batch"]:
                continue
            step = epoch * self.plan.batches + index
            begun, rewarding = time.perf_counter(), self.objective.reward_seconds
            loss, count, figures = self._step(stage, forward, step, places, views)
            seconds = time.perf_counter() - begun
            self.state["loss"] += loss
            self.state["count"] += count
            self.state["batch"] = index + 1
            self.state["step_seconds"] += seconds
            self.state["reward_seconds"] += self.objective.reward_seconds - rewarding
            if "reward" in figures:
                self.state["reward"] += figures["reward"]
                self.state["rewarded"] += 1
                figures["captions_per_second"] = count / seconds
            self.log.step(self.state["stage"], step, loss / count, self.optimizer.param_groups[-1]["lr"], figures)
            self.progress(phase, step + 1, stage.epochs * self.plan.batches)
            if time.monotonic() - saved > SAVE_EVERY_S:
                self._save()
                saved = time.monotonic()

    def _step(
        self, stage: Stage, forward: torch.nn.Module, step: int, places: np.ndarray, views: np.ndarray
    ) -> tuple[float, int, dict[str, float]]:
        """One optimizer step on the photos at `places`, each in its view of `views`: (summed loss, its divisor,
        figures), over all processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(_mix(self.recipe.seed, self.state["stage"], step, rank))
        factor = lr_factor(stage, step, self.plan.batches, self.state["plateau"])
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        ids = self.material.captions(places, views, step)
        count = self.objective.count(ids)
        mine = np.array_split(np.arange(len(places)), world)[rank]
        # As few pieces as hold no more than the batch's share: a contrastive loss needs company in each.
        share = -(-stage.batch_size // (world * stage.accumulate))
        pieces = np.array_split(mine, -(-len(mine) // share)) if len(mine) else []
        # A process without photos (the last, small batch) still takes part in the gradient's exchange, with weight 0.
        weight = 1.0 if pieces else 0.0
        pieces = pieces or [np.arange(1)]
        total = torch.zeros((), device=self.accelerator.device)
        figures: dict[str, float] = {}
        for i, piece in enumerate(pieces):
            batch = self.material.batch(ids[piece], places[piece], views[piece])
            sync = i == len(pieces) - 1
            with _exchange(self.accelerator, forward, sync):
                with self.accelerator.autocast():
                    loss, figures = self.objective.loss(self.model, forward, batch)
                # Gradients are averaged over processes; the loss is a mean over the whole batch.
                self.accelerator.backward(loss * (weight * world / count))
            total += loss.detach() * weight
        if stage.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), stage.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.model)
        return float(self.accelerator.reduce(total, "sum")), count, figures

    # --- validation, saving ------------------------------------------------------------------------------------

    def _validate(self, stage: Stage) -> dict[str, Any]:
        """Score what has been learnt so far, and keep the weights where they are the best; returns the record."""
        state = self.state
        record: dict[str, Any] = {
            "stage": stage.name,
            "epoch": state["epoch"],
            "loss": state["loss"] / state["count"] if state["count"] else None,  # None: before the first step
            "step_seconds": round(state["step_seconds"], 2),  # of the epoch's optimizer steps
        }
        if state["rewarded"]:
            record |= {
                "reward": state["reward"] / state["rewarded"],
                "reward_seconds": round(state["reward_seconds"], 2),
                "captions_per_second": round(state["count"] / state["step_seconds"], 1),
            }
        if self.accelerator.is_main_process:
            with self._kept_weights():
                record |= self.score()
        record = self._from_main(record)
        state["seconds"] = time.monotonic() - self.began
        record["seconds"] = round(state["seconds"], 1)
        state["history"].append(record)
        better = state["best"] is None or record[self.metric] > state["best"][self.metric]
        state["waits"] = 0 if better else state["waits"] + 1
        state["plateau_waits"] = 0 if better else state["plateau_waits"] + 1
        if stage.schedule == "plateau" and state["plateau_waits"] > stage.plateau_patience:
            state.update(plateau=state["plateau"] * stage.gamma, plateau_waits=0)  # as torch's ReduceLROnPlateau
        if better:
            state["best"] = record
            with self._kept_weights():
                self._write_weights()
        self.log.validation(record, better, (state["stage"], state["epoch"] * self.plan.batches))
        return record

    def score(self) -> dict[str, float]:
        """One validation: the figures of the captions, `metric` among them."""
        seen, n = self.material, len(self.material.val)
        # Beam size is the device's business; while training, greedy tells as much and is quicker.
        options = DecodeOptions(**{**asdict(self.recipe.decoding), "beam": 1, "length_penalty": 0.0})
        captions = caption_rows(
            self.model, self.tokenizer, seen.val_rows, n, options, sees=seen.sees, ids=self.recipe.tokenizer.ids,
            report=lambda done: self.progress(f"validation {self.state['epoch']}", done, n),
        )  # fmt: skip
        scores = score_captions(captions, seen.val.examples)
        record = {
            "cider": scores.cider, "bleu4": scores.bleu[3], "rouge_l": scores.rouge_l, "distinct": scores.distinct,
            "repeated": scores.repeated_ngrams,
        }  # fmt: skip
        if critic := self.helpers.critic:
            photos = critic.to(self.accelerator.device).photos(seen.val.examples, self.progress)
            record["alignment"] = float(critic.alignment(captions, photos).mean())
        return record

    def _from_main(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.accelerator.num_processes == 1:
            return record
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([record])[0]

    def _kept_weights(self) -> AbstractContextManager[None]:
        """Inside the block the model holds what is validated and kept: the average, where there is one."""
        return self.average.applied(self.model) if self.average else nullcontext()

    def _write_weights(self) -> None:
        if self.accelerator.is_main_process:
            write_weights(self.out, self.model)
        self.accelerator.wait_for_everyone()

    def _keep(self, stage: Stage, record: dict[str, Any] | None) -> None:
        """A checkpoint of its own of this epoch, under kept/. record: its validation, where it was validated."""
        folder = self.out / "kept" / f"{self.state['stage'] + 1}-{stage.name}-{self.state['epoch']:03d}"
        if self.accelerator.is_main_process:
            with self._kept_weights():
                write_weights(folder, self.model)
            for name in (RECIPE, TOKENIZER):
                write_bytes(folder / name, (self.out / name).read_bytes())
            metrics = {**self._metrics(finished=True), "best": record, "kept": self.state["epoch"]}
            write_json(folder / METRICS, metrics)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.state["seconds"] = time.monotonic() - self.began
        if self.accelerator.is_main_process:
            # Unwrapped, so that the file's layout does not depend on how many processes wrote it.
            plain = getattr(self.optimizer, "optimizer", self.optimizer)
            save_progress(self.out / PROGRESS, self.model, plain, self.average, self.state)
            self._write_metrics(finished=False)

    def _end(self) -> None:
        self.state.update(finished=True, seconds=time.monotonic() - self.began)
        if self.accelerator.is_main_process:
            load_model_tensors(self.model, read_weights(self.out), str(self.out))
            save_progress(self.out / PROGRESS, self.model, None, None, self.state)
        self.accelerator.wait_for_everyone()

    def _metrics(self, *, finished: bool) -> dict[str, Any]:
        metrics = {
            "finished": finished,
            "metric": self.metric,
            "kind": self.recipe.task,
            "best": self.state["best"],
            "history": self.state["history"],
            "seconds": round(self.state["seconds"], 1),
            "train_photos": len(self.material.train),
            "val_photos": len(self.material.val),
            "parameters": {name: count_parameters(part) for name, part in self.model.parts().items()},
        }
        if self.recipe.lora.rank:
            metrics |= {
                "kind": "adapter",
                "base": {"checkpoint": self.start.init, "sha256": self.start.sha256},
                "adapter_parameters": sum(tensor.numel() for tensor in model_tensors(self.model).values()),
            }
        if teachers := self.helpers.all_teachers:
            metrics["teachers"] = [
                with_captions(teacher.told(), self.state["teacher_captions"]) for teacher in teachers
            ]
        if learnt := self.state["teacher_captions"]:
            metrics["teacher_captions"] = [{k: v for k, v in row.items() if k != "teachers"} for row in learnt.values()]
        if self.start.pruned:
            metrics["pruned"] = self.start.pruned  # tells how to load what follows
        return metrics

    def _write_metrics(self, *, finished: bool) -> dict[str, Any]:
        metrics = self._metrics(finished=finished)
        if self.accelerator.is_main_process:
            write_json(self.out / METRICS, metrics)
            self.log.chart(self.state["history"], self.metric, last=finished)
        return metrics


def _mix(*parts: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _exchange(accelerator: Accelerator, forward: torch.nn.Module, sync: bool) -> Any:
    return nullcontext() if sync else accelerator.no_sync(forward)

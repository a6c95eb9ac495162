"""What a run tells: a line per validation, a TensorBoard log, and the chart."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .state import replacing

# Of a validation's record.
NOT_FIGURES = ("stage", "epoch", "loss", "step_seconds", "reward", "reward_seconds", "captions_per_second", "seconds")
CHART_EVERY_S = 10.0  # drawing it takes longer than an epoch of a small model
# The figures that a line tells, by their names for people and their format.
TOLD = {
    "cider": ("CIDEr", ".4f"),
    "bleu4": ("BLEU-4", ".3f"),
    "distinct": ("distinct", ".0%"),
    "repeated": ("repeats", ".1%"),
    "alignment": ("alignment", ".3f"),
    "recall": ("mean recall", ".4f"),
    "image_to_text_10": ("image → text R@10", ".3f"),
    "text_to_image_10": ("text → image R@10", ".3f"),
}


def tell(name: str, value: float) -> str:
    """A figure of a validation with its name, for people."""
    label, form = TOLD[name]
    return f"{label} {value:{form}}"


class TrainingLog:
    """Writes `log/` (TensorBoard) and `chart.png` under the checkpoint; `say` prints a line. Silent where it is not the
    main process (`out` None)."""

    def __init__(self, out: Path | None, say: Callable[[str], None]) -> None:
        self.out, self.say = out, say
        self.writer: Any = None
        self.offsets: dict[int, int] = {}
        self.count = 0
        self.drawn = time.monotonic()

    def resume(self, history: list[dict[str, Any]]) -> None:
        if self.out is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.out / "log"))
        if history:
            self.line(f"continuing after {len(history)} validations")

    def line(self, text: str) -> None:
        if self.out is not None:
            self.say(text)

    def step(self, stage: int, step: int, loss: float, lr: float, figures: dict[str, float]) -> None:
        if self.writer is None:
            return
        for name, value in {"loss": loss, "lr": lr, **figures}.items():
            self.writer.add_scalar(f"stage {stage + 1}/{name}", value, step)

    def validation(self, record: dict[str, Any], better: bool, place: tuple[int, int]) -> None:
        if self.writer is None:
            return
        stage, step = place
        figures = {name: value for name, value in record.items() if name not in NOT_FIGURES}
        for name, value in figures.items():
            self.writer.add_scalar(f"validation {stage + 1}/{name}", value, step)
        self.writer.flush()
        reward = ""
        if "reward" in record:
            reward = f"  reward {record['reward']:.3f} at {record['captions_per_second']:,.0f} captions/s"
        loss = "" if record["loss"] is None else f"loss {record['loss']:.3f}"
        self.line(
            f"{record['stage']} epoch {record['epoch']}: {loss}{reward}  "
            f"{'  '.join(tell(name, value) for name, value in figures.items() if name in TOLD)}"
            f"  {record['seconds']:.0f} s{'  best so far' if better else ''}"
        )

    def chart(self, history: list[dict[str, Any]], metric: str, *, last: bool) -> None:
        """Loss and the validation's metric over the epochs, as chart.png; every few seconds, and the last time."""
        if self.out is None or not history or (not last and time.monotonic() < self.drawn + CHART_EVERY_S):
            return
        self.drawn = time.monotonic()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        left = figure.add_subplot()
        right = left.twinx()
        places = list(range(1, len(history) + 1))
        left.plot(
            places,
            [float("nan") if r["loss"] is None else r["loss"] for r in history],
            color="#8a8f98",
            marker="o",
            markersize=3,
            label="training loss",
        )
        right.plot(
            places,
            [r[metric] for r in history],
            color="#0b6bcb",
            marker="o",
            markersize=4,
            label=f"validation {TOLD[metric][0]}",
        )
        for i, record in enumerate(history):
            if i and record["stage"] != history[i - 1]["stage"]:
                left.axvline(i + 0.5, color="#d0d4da", linewidth=1)
        best = max(range(len(history)), key=lambda i: history[i][metric])
        right.annotate(
            f"{history[best][metric]:.3f}", (places[best], history[best][metric]), xytext=(0, 6),
            textcoords="offset points", ha="center", color="#0b6bcb",
        )  # fmt: skip
        left.set_xlabel("validations")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylabel("training loss")
        right.set_ylabel(f"validation {TOLD[metric][0]}", color="#0b6bcb")
        right.set_ylim(0, max(r[metric] for r in history) * 1.15 + 1e-6)
        left.spines["top"].set_visible(False)
        right.spines["top"].set_visible(False)
        lines = left.get_lines()[:1] + right.get_lines()[:1]
        figure.legend(lines, [line.get_label() for line in lines], frameon=False, loc="outside upper center", ncols=2)
        with replacing(self.out / "chart.png") as temporary:
            FigureCanvasAgg(figure).print_png(str(temporary))

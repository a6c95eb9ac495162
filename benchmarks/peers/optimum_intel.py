"""A SmolVLM exported and run by optimum-intel on OpenVINO: fp32, or weights in int8 or int4."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

from ...runtime.errors import UsageError
from .transformers_generate import generate, inputs, processor
from .vlm import Marks, Task, VlmPeer, main

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

# OpenVINO takes bfloat16 where a CPU has it, and keeps the cache in 8 bits; the fp32 row is to be exact.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
CACHE = {"KV_CACHE_PRECISION": "f32"}
GROUP = 64  # weights that share a scale under int4: the usual 128 does not divide SmolVLM-256M's 576


class OptimumIntelPeer(VlmPeer):
    kind = "optimum_intel"
    needs = ("torch", "transformers", "openvino", "optimum.intel")
    packages = ("optimum-intel", "openvino", "nncf", "transformers", "torch")

    @classmethod
    def make(cls, task: Task, folder: Path) -> None:
        """By its own command; `--weight-format` is for all parts, 4 bits for the language model alone."""
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", task.model]
        command += ["--task", "image-text-to-text", "--weight-format", task.precision, "--disable-convert-tokenizer"]
        more = ["--sym", "--group-size", str(GROUP), "--ratio", "1.0"] if task.precision == "int4" else []
        done = subprocess.run([*command, *more, str(folder)], stdout=sys.stderr)
        if done.returncode:
            raise UsageError(f"optimum-cli ended with {done.returncode}; its reason is above")

    def load(self, threads: int) -> None:
        from optimum.intel import OVModelForVisualCausalLM

        config = EXACT | (CACHE if self.task.precision == "fp32" else {}) | self.task.settings
        self.processor, self.marks = processor(self.task), Marks()
        self.model = OVModelForVisualCausalLM.from_pretrained(
            self.folder, ov_config={**config, "INFERENCE_NUM_THREADS": str(threads)}
        )
        embed = self.model.get_vision_embeddings

        def timed(*given: Any, **named: Any) -> Any:
            found = embed(*given, **named)
            self.marks.encode()
            return found

        self.model.get_vision_embeddings = timed

    def prepare(self, picture: Image) -> Any:
        return inputs(self.processor, self.task, picture)

    def run(self, inputs: Any, marks: Marks) -> list[int]:
        self.marks = marks
        return generate(self.model, inputs, marks, self.shortest, self.longest)

    def words(self, ids: list[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main(OptimumIntelPeer)

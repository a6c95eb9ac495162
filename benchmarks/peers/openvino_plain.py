"""A captioner in OpenVINO without edgecap: `convert_model` of torch's own ONNX graphs, `nncf.compress_weights` as it
comes, and the plain loop that feeds keys and values back as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .captioner import CaptionerPeer, Preparation, main, read

if TYPE_CHECKING:
    import numpy as np

GROUP = 32  # weights that share a scale in 4 bits; the usual 128 divides few small models' sizes
WORDS = {
    "fp32": "float32",
    "int8": "nncf.compress_weights: weights in 8 bits, computed in float32",
    "int4": f"decoder: nncf.compress_weights, 4 bits, symmetric, groups of {GROUP}; encoder as in int8",
}
# OpenVINO takes bfloat16 where a CPU has it, which float32 rows are not to.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


class Graph:
    """A compiled graph behind the one call that the loop makes of an ONNX Runtime session."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()

    def run(self, outputs: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.request.infer(feed)
        return [found[name] for name in outputs]


class OpenVinoPeer(CaptionerPeer):
    kind = "openvino"
    needs = ("numpy", "openvino")
    making = ("nncf",)

    @classmethod
    def make(cls, task: Preparation, folder: Path) -> dict[str, Any]:
        import openvino as ov

        plain = task.plain()
        known = {name: read(plain)[name] for name in ("session", "graphs")}
        for name in ("encoder", "decoder"):
            model = ov.convert_model(plain / f"{name}.onnx")
            if task.precision != "fp32":
                model = compressed(model, 4 if (name, task.precision) == ("decoder", "int4") else 8)
            ov.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)
        return {**known, "weights": WORDS[task.precision]}

    def load(self, folder: Path, threads: int) -> Any:
        import openvino as ov

        from ...runtime.backends.onnx import OnnxModel

        core, options = ov.Core(), {**EXACT, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        graphs = (core.compile_model(folder / f"{name}.xml", "CPU", options) for name in ("encoder", "decoder"))
        return OnnxModel(self.about, *map(Graph, graphs))  # type: ignore[arg-type]  # it calls `run` alone


def compressed(model: Any, bits: int) -> Any:
    import nncf

    if bits == 8:
        return nncf.compress_weights(model)
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0)


if __name__ == "__main__":
    main(OpenVinoPeer)

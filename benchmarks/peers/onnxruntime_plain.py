"""A captioner in ONNX Runtime without edgecap: torch's export, the quantizers that come with the engine, its options as
they are, and the plain loop that feeds a step's keys and values, or state, back as inputs of the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .captioner import CaptionerPeer, Preparation, main, read

WORDS = {
    "fp32": "float32",
    "int8": "quantize_dynamic of products and word embeddings; convolutions float32",
    "int4": "decoder MatMulNBits, 4 bits, blocks of 32, accuracy level 4; encoder as in int8",
}


class OnnxRuntimePeer(CaptionerPeer):
    kind = "onnxruntime"
    needs = ("numpy", "onnxruntime")

    making = ("torch", "transformers", "onnx", "onnxscript")

    @classmethod
    def make(cls, task: Preparation, folder: Path) -> dict[str, Any]:
        from .graphs import DECODER, ENCODER, dynamic_int8, export, four_bits

        if task.precision == "fp32":
            known = export(task.loaded().model, folder)
        else:
            plain = task.plain()
            known = {name: read(plain)[name] for name in ("session", "graphs")}
            dynamic_int8(plain / ENCODER, folder / ENCODER)
            decoder = dynamic_int8 if task.precision == "int8" else four_bits
            decoder(plain / DECODER, folder / DECODER)
        return {**known, "weights": WORDS[task.precision]}

    def load(self, folder: Path, threads: int) -> Any:
        import onnxruntime as ort

        from ...runtime.backends.onnx import OnnxModel

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        graphs = (self.about["graphs"][name]["file"] for name in ("encoder", "decoder"))
        providers = ["CPUExecutionProvider"]
        sessions = (ort.InferenceSession(str(folder / file), options, providers=providers) for file in graphs)
        return OnnxModel(self.about, *sessions)  # without a cache that the engine writes in place


if __name__ == "__main__":
    main(OnnxRuntimePeer)

"""Other ways to run the same weights, to be measured against. One entry here, one worker script beside it.

A peer's script runs as a process (`python -m …`), never by import, and may need anything; it calls
`edgecap.benchmarks.worker.serve` with an engine of its own. EDGECAP_PEER_<KIND>_PYTHON names the interpreter where that
is another environment's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """How `--peer KIND:ARGUMENT` is written, what it is, and the module that is its worker."""

    module: str
    argument: str
    help: str


PEERS: dict[str, Peer] = {
    "torch": Peer("edgecap.benchmarks.peers.torch_eager", "CHECKPOINT", "a checkpoint in torch eager, fp32"),
    "transformers": Peer(
        "edgecap.benchmarks.peers.transformers_generate", "FOLDER", "a SmolVLM in transformers' generate"
    ),
    "optimum_intel": Peer("edgecap.benchmarks.peers.optimum_intel", "FOLDER", "a SmolVLM in optimum-intel"),
    "openvino_genai": Peer("edgecap.benchmarks.peers.openvino_genai", "FOLDER", "a SmolVLM in OpenVINO GenAI"),
    "llama_cpp": Peer("edgecap.benchmarks.peers.llama_cpp", "FOLDER", "a SmolVLM in llama.cpp"),
    "onnxruntime_genai": Peer(
        "edgecap.benchmarks.peers.onnxruntime_genai", "FOLDER", "a SmolVLM in ONNX Runtime GenAI"
    ),
}

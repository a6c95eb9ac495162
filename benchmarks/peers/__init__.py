"""Other ways to run the same weights, to be measured against. One entry here, one worker script beside it.

A peer's script runs as a process (`python -m …`), never by import, and may need anything; it calls
`edgecap.benchmarks.worker.serve` with an engine of its own. EDGECAP_PEER_<KIND>_PYTHON names the interpreter where that
is another environment's. ../prepare_peers.py finds and makes what they load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

CHECKPOINT, PUBLISHED = "checkpoint", "published"  # whose directory holds the weights: edgecap's, a Hugging Face one


@dataclass(frozen=True)
class Model:
    """What a peer must know of a bundle before it is asked to run the same. encoder, bridge, decoder: kinds of the
    recipe; bits: of the weights; tiles: whether photos are cut; smaller: frames of fewer pixels than the model's own;
    source: CHECKPOINT, PUBLISHED, or "" where its weights were not found."""

    encoder: str
    bridge: str
    decoder: str
    bits: int = 32
    beam: int = 1
    no_repeat_ngram: int = 0
    tiles: bool = False
    smaller: bool = False
    source: str = ""

    @property
    def smolvlm(self) -> bool:
        return (self.encoder, self.bridge, self.decoder) == ("siglip", "pixel_shuffle", "llama")

    @property
    def parts(self) -> str:
        return f"{self.encoder} × {self.bridge} × {self.decoder}"


def in_frames(model: Model) -> str | None:
    return "peers see a photo in one frame: export with --no-tiles" if model.tiles else None


def greedy(model: Model) -> str | None:
    for name, only in (("beam", 1), ("no_repeat_ngram", 0)):
        if (found := getattr(model, name)) != only:
            return f"searches greedily here: {name} {only}, not {found}"
    return None


def smolvlm(engine: str) -> Callable[[Model], str | None]:
    """Why a peer that runs SmolVLM alone, from a Hugging Face directory, does not run a model."""

    def refuses(model: Model) -> str | None:
        if not model.smolvlm:
            return f"{engine} knows no captioner of {model.parts}; of these it runs SmolVLM"
        if model.source == CHECKPOINT:
            return f"{engine} reads a Hugging Face directory, and this bundle's weights are a checkpoint of edgecap"
        return in_frames(model) or greedy(model)

    return refuses


def one_size(engine: str) -> Callable[[Model], str | None]:
    """The same, for photos of the model's own size."""
    usual = smolvlm(engine)
    return lambda model: usual(model) or (f"{engine} takes photos of 512 px alone" if model.smaller else None)


def no_llama_cpp(model: Model) -> str | None:
    if model.decoder == "opt":
        return "OPT is not an architecture that llama.cpp knows"
    if model.decoder not in ("gpt2", "llama"):
        return f"llama.cpp runs language models, not this decoder ({model.decoder})"
    return in_frames(model) or greedy(model)


def no_optimum_onnx(model: Model) -> str | None:
    if model.smolvlm:
        return "optimum-onnx exports no SmolVLM"
    return f"optimum-onnx has no captioner of {model.parts}: its language models take words, no photo's embeddings"


@dataclass(frozen=True)
class Peer:
    """How `--peer KIND:ARGUMENT` is written, what it is, and the module that is its worker.

    refuses: why it cannot run a model, None where it can. precisions: bits of its weights → its own name for them;
    also: more such names, for no bundle. reads_checkpoint: a checkpoint of edgecap is its argument, and nothing is
    prepared. source: the kind that it is made from, by that one's interpreter. graphs: it is made of plain ONNX graphs,
    onnxruntime's in fp32. vlm: its script makes a folder of a SmolVLM's directory (vlm.py).
    """

    module: str
    argument: str
    help: str
    refuses: Callable[[Model], str | None]
    precisions: Mapping[int, str]
    reads_checkpoint: bool = False
    source: str = ""
    graphs: bool = False
    vlm: bool = False
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its precisions."""
        return (*self.precisions.values(), *self.also)

    def bits(self, wanted: int) -> int:
        """The number of bits for a bundle of so many: as many, or the next more, or the most that it has."""
        return min((bits for bits in self.precisions if bits >= wanted), default=max(self.precisions))


FP32, WHOLE = {32: "fp32"}, {32: "fp32", 8: "int8", 4: "int4"}
HERE = "edgecap.benchmarks.peers"
PEERS: dict[str, Peer] = {
    "torch": Peer(
        f"{HERE}.torch_eager", "CHECKPOINT", "a checkpoint in torch eager", in_frames, FP32, reads_checkpoint=True
    ),
    "torch_compile": Peer(f"{HERE}.torch_compile", "CHECKPOINT", "the same, compiled by torch", in_frames, FP32),
    "onnxruntime": Peer(
        f"{HERE}.onnxruntime_plain", "FOLDER", "any captioner in plain ONNX Runtime", in_frames, WHOLE, graphs=True
    ),
    "openvino": Peer(
        f"{HERE}.openvino_plain", "FOLDER", "any captioner in plain OpenVINO", in_frames, WHOLE, graphs=True
    ),
    "transformers": Peer(
        f"{HERE}.transformers_generate",
        "FOLDER",
        "a SmolVLM in transformers' generate",
        smolvlm("transformers"),
        FP32,
        vlm=True,
        also=("bf16",),
    ),
    "optimum_onnx": Peer(f"{HERE}.optimum_onnx", "FOLDER", "nothing so far: it exports none", no_optimum_onnx, FP32),
    "optimum_intel": Peer(
        f"{HERE}.optimum_intel", "FOLDER", "a SmolVLM in optimum-intel", one_size("optimum-intel"), WHOLE, vlm=True
    ),
    "openvino_genai": Peer(
        f"{HERE}.openvino_genai",
        "FOLDER",
        "a SmolVLM in OpenVINO GenAI",
        one_size("OpenVINO GenAI"),
        WHOLE,
        source="optimum_intel",
        vlm=True,
    ),
    "llama_cpp": Peer(
        f"{HERE}.llama_cpp",
        "FOLDER",
        "a SmolVLM, or a GPT-2 or llama with a photo in front, in llama.cpp",
        no_llama_cpp,
        {16: "f16", 8: "q8_0", 4: "q4_0"},
        graphs=True,
        vlm=True,
    ),
    "onnxruntime_genai": Peer(
        f"{HERE}.onnxruntime_genai",
        "FOLDER",
        "a SmolVLM in ONNX Runtime GenAI",
        smolvlm("ONNX Runtime GenAI"),
        WHOLE,
        vlm=True,
    ),
}

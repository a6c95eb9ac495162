"""A GPT-2 or llama with a photo's embeddings in front of the words, in llama.cpp: the decoder as GGUF; the image
encoder, which llama.cpp does not have, in plain ONNX Runtime. Run by llama_cpp.py. Greedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import EdgecapError, UsageError
from .captioner import CaptionerPeer, Preparation, read
from .llama_text import built_with, feed, opened

if TYPE_CHECKING:
    import numpy as np

TEXT = "text.gguf"
WORDS = {
    "f16": "decoder f16; encoder ONNX Runtime, float32",
    "q8_0": "decoder q8_0; encoder ONNX Runtime, quantize_dynamic (convolutions float32)",
    "q4_0": "decoder q4_0, word embeddings q8_0; encoder ONNX Runtime, quantize_dynamic (convolutions float32)",
}


class LlamaPrefixPeer(CaptionerPeer):
    kind = "llama_cpp"
    needs = ("numpy", "onnxruntime", "llama_cpp")
    making = ("torch", "transformers", "gguf")

    def __init__(self, request: dict[str, Any]) -> None:
        if request["decoding"].get("beam", 1) != 1:
            raise UsageError(f"the peer llama_cpp runs with beam 1 only, not {request['decoding']['beam']}")
        self.longest = request["decoding"].get("max_length", 24)
        super().__init__(request)
        self.facts["build"] = built_with(self.lib)

    @classmethod
    def make(cls, task: Preparation, folder: Path) -> dict[str, Any]:
        import shutil

        from ...export.gguf_decoder import write_decoder
        from .graphs import ENCODER, dynamic_int8

        plain, loaded = task.plain(), task.loaded()
        if task.precision == "f16":
            for file in plain.glob(f"{ENCODER}*"):  # and its weights
                shutil.copyfile(file, folder / file.name)
        else:
            dynamic_int8(plain / ENCODER, folder / ENCODER)
        words = {"tokenizer": loaded.tokenizer, "tokens": loaded.tokens}
        kind = loaded.recipe.decoder["kind"]
        write_decoder(folder / TEXT, loaded.model.decoder, kind, task.precision, **words)
        session, graphs = (read(plain)[name] for name in ("session", "graphs"))
        return {"session": session, "graphs": graphs, "weights": WORDS[task.precision]}

    def load(self, folder: Path, threads: int) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        encoder = ort.InferenceSession(str(folder / "encoder.onnx"), options, providers=["CPUExecutionProvider"])
        self.lib, self.quiet, self.text = opened(os.fsencode(folder / TEXT))
        self.threads, self.contexts = threads, {}
        source = self.about["session"]["prefix"]["from"]
        self.encode = lambda pixels: encoder.run([source], {encoder.get_inputs()[0].name: pixels})[0]
        self.bos = self.about["tokens"]["bos"]
        return self

    def session(self) -> PrefixSession:
        return PrefixSession(self)

    def context(self, places: int) -> Any:
        """An empty context for one photo's prefix and its caption; made once."""
        lib, need = self.lib, places + 1 + self.longest
        if need not in self.contexts:
            settings = lib.llama_context_default_params()
            settings.n_ctx, settings.no_perf = need, True
            settings.n_batch = settings.n_ubatch = max(512, places)
            settings.n_threads = settings.n_threads_batch = self.threads
            self.contexts[need] = lib.llama_init_from_model(self.text, settings)
            if not self.contexts[need]:
                raise EdgecapError(f"llama.cpp has no context of {need} tokens")
        lib.llama_memory_clear(lib.llama_get_memory(self.contexts[need]), False)
        return self.contexts[need]


class PrefixSession:
    """One photo in one context."""

    def __init__(self, peer: LlamaPrefixPeer) -> None:
        self.peer = peer
        self.rows = peer.lib.llama_vocab_n_tokens(peer.lib.llama_model_get_vocab(peer.text))

    def start(self, pixels: np.ndarray, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        self.encode(pixels)
        return self.prefill(prompt_ids)

    def encode(self, pixels: np.ndarray) -> None:
        self.prefix = self.peer.encode(pixels)[0]  # [places, dim]

    def prefill(self, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        import numpy as np

        self.context, self.place = self.peer.context(len(self.prefix)), 0
        self.feed(np.ascontiguousarray(self.prefix, np.float32))
        return self.feed(np.array([self.peer.bos, *(() if prompt_ids is None else prompt_ids)], np.int32))

    def step(self, ids: np.ndarray, parents: np.ndarray) -> np.ndarray:
        return self.feed(ids.astype("int32"))

    def feed(self, given: np.ndarray) -> np.ndarray:
        """Tokens [T] or embeddings [T, dim] → logits of the last [1, V]."""
        import numpy as np

        self.place = feed(self.peer.lib, self.context, given, self.place)
        logits = self.peer.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (1, self.rows)).copy()

"""A checkpoint in torch eager: same photos, preprocessing and search as the bundle, so only the engine
differs.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...runtime.errors import need
from ..worker import decoded, serve, special_ids, versions

if TYPE_CHECKING:
    import numpy as np


class SplitSession:
    """The torch session with `start` in the two halves that the bench times."""

    def __init__(self, session: Any) -> None:
        self.session, self.step = session, session.step

    def encode(self, pixels: np.ndarray) -> None:
        import torch

        model = self.session.model
        device = next(model.parameters()).device
        self.photo = model.photo(pixels=torch.from_numpy(pixels).to(device))

    def prefill(self, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        return self.session.start_from(self.photo, prompt_ids)

    def start(self, pixels: np.ndarray, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        return self.session.start(pixels, prompt_ids)


class TorchEngine:
    """The torch module in eval mode behind the runtime's `Session`."""

    def __init__(self, request: dict[str, Any]) -> None:
        for module in ("torch", "transformers"):
            need(module, extra="train", command="bench --peer torch")
        begin = perf_counter()
        import torch

        from ...runtime.decode import DecodeOptions, decode
        from ...train.checkpoint import load_checkpoint, require_captioner

        imported = perf_counter()
        torch.set_num_threads(request["threads"])
        checkpoint = require_captioner(load_checkpoint(request["path"]))
        loaded = perf_counter()
        self._checkpoint, self._search = checkpoint, decode
        self._inference = torch.inference_mode
        self._options = DecodeOptions.from_dict(request["decoding"])
        self._eos, self._suppress = special_ids(checkpoint.tokens)
        self.facts = {
            "import_s": imported - begin,
            "load_s": loaded - imported,
            "sha256": checkpoint.sha256,
            "precision": "fp32",
            "versions": versions("torch", "transformers"),
        }

    def pixels(self, photo: str) -> np.ndarray:
        return self._checkpoint.preprocess.load(photo)[None]  # [1, H, W, 3]

    def picture(self, photo: str) -> Any:
        return decoded(photo)

    def session(self) -> Any:
        return SplitSession(self._checkpoint.model.session())

    def decode(self, session: Any, pixels: np.ndarray) -> Any:
        with self._inference():
            found = self._search(session, pixels, self._options, eos_id=self._eos, suppress=self._suppress)
        return found[0][0]

    def caption(self, photo: Any) -> dict[str, Any]:
        best = self.decode(self.session(), self._checkpoint.preprocess.load(photo)[None])
        text = self._checkpoint.tokenizer.decode(best.token_ids)
        return {"text": text, "logprob": best.logprob, "tokens": len(best.token_ids)}


if __name__ == "__main__":
    serve(TorchEngine)

"""A checkpoint in torch eager: same photos, preprocessing and search as the bundle, so only the engine
differs. A SmolVLM as it was published is read from its own directory, which a prepared folder names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from ...runtime.errors import need
from ..worker import decoded, special_ids, versions
from .captioner import FILE, Sight, about, checked, read, run, weights, write

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

    kind: ClassVar[str] = "torch"

    def __init__(self, request: dict[str, Any]) -> None:
        self.require()
        begin = perf_counter()
        import torch

        from ...runtime.decode import DecodeOptions, decode
        from ...train.checkpoint import load_checkpoint, require_captioner

        imported = perf_counter()
        torch.set_num_threads(request["threads"])
        folder = Path(request["path"])
        if (folder / FILE).is_file():
            known = read(folder)
            checkpoint = weights(Path(known["from"]), known)
            self._sight = Sight(known["preprocess"], known["frames"])
        else:
            checkpoint = require_captioner(load_checkpoint(folder))
            self._sight = Sight(checkpoint.preprocess.to_dict(), None)
        self._checkpoint, self._search = checkpoint, decode
        self._inference = torch.inference_mode
        self._options = DecodeOptions.from_dict(request["decoding"])
        self._eos, self._suppress = special_ids(checkpoint.tokens)
        self.compile(checkpoint.model)
        loaded = perf_counter()
        self.facts = {
            "import_s": imported - begin,
            "load_s": loaded - imported,
            "sha256": checkpoint.sha256,
            "precision": "fp32",
            "versions": versions("torch", "transformers"),
        }

    @classmethod
    def require(cls) -> None:
        """Raises UsageError where what it needs is not there."""
        for module in ("torch", "transformers"):
            need(module, extra="train", command=f"bench --peer {cls.kind}")

    @classmethod
    def warm(cls, folder: Path, threads: int) -> None:
        """What preparing a folder does beyond naming the weights: nothing."""

    def compile(self, model: Any) -> None:
        """Nothing: eager."""

    def pixels(self, photo: str) -> np.ndarray:
        return self._sight.load(photo)  # [1, H, W, 3]

    def picture(self, photo: str) -> Any:
        return decoded(photo)

    def session(self) -> Any:
        return SplitSession(self._checkpoint.model.session())

    def decode(self, session: Any, pixels: np.ndarray) -> Any:
        with self._inference():
            found = self._search(session, pixels, self._options, eos_id=self._eos, suppress=self._suppress)
        return found[0][0]

    def caption(self, photo: Any) -> dict[str, Any]:
        best = self.decode(self.session(), self._sight.load(photo))
        text = self._checkpoint.tokenizer.decode(best.token_ids)
        return {"text": text, "logprob": best.logprob, "tokens": len(best.token_ids)}


def main(peer: type[TorchEngine]) -> None:
    """Serve the bench, tell whether it is installed, or prepare a folder that names a published directory."""

    def make(given: argparse.Namespace) -> None:
        known = about(given.bundle, peer.kind, given.precision)
        checked(given.weights, known)
        write(given.folder, known | {"from": str(given.weights)})
        peer.warm(given.folder, given.threads)

    run(peer, make)


if __name__ == "__main__":
    main(TorchEngine)

"""A checkpoint compiled by torch (inductor): encoder, prefill and step, with sequences of any length. Needs a C++
compiler. Compiling takes minutes, once: preparing does it, and what it made is in the cache for the processes that are
measured, whose loading finds it there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ...devices.local import cache_folder
from ...runtime.errors import UsageError
from .torch_eager import TorchEngine, main

COMPILERS = ("g++", "clang++")


class CompiledEngine(TorchEngine):
    kind = "torch_compile"

    def __init__(self, request: dict[str, Any]) -> None:
        # Before torch reads them. No processes of its own to compile: they would be measured, too.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "peers" / "inductor")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        super().__init__(request)

    @classmethod
    def require(cls) -> None:
        super().require()
        wanted = os.environ.get("CXX")
        if not any(map(shutil.which, (wanted,) if wanted else COMPILERS)):
            raise UsageError(f"torch.compile needs a C++ compiler: none of {wanted or ', '.join(COMPILERS)} is here")

    @classmethod
    def warm(cls, folder: Path, threads: int) -> None:
        cls({"path": str(folder), "threads": threads, "decoding": {"beam": 1, "max_length": 4, "min_length": 4}})

    def compile(self, model: Any) -> None:
        """By captioning a picture, twice: the first calls compile, and no photo that is timed should."""
        import numpy as np
        import torch

        model.photo = torch.compile(model.photo, dynamic=False)
        model.decoder.begin = torch.compile(model.decoder.begin, dynamic=False)
        model.decoder.advance = torch.compile(model.decoder.advance, dynamic=True)
        random = np.random.default_rng(0)
        for _ in range(2):
            picture = random.integers(0, 256, (256, 320, 3), np.uint8)
            self.decode(self.session(), self._sight.load(picture))


if __name__ == "__main__":
    main(CompiledEngine)

"""optimum-onnx runs none of the captioners here: its decoders take words alone, no photo's embeddings in front of them
(optimum's issue 880), and it exports no SmolVLM. The table's entry says so for each model; this is what a hand-made
`--peer` is told."""

from __future__ import annotations

import sys

from ...runtime.errors import UsageError
from ..worker import Engine, serve
from .vlm import INSTALLED


def engine(request: dict[str, object]) -> Engine:
    raise UsageError("optimum-onnx runs no captioner of edgecap: its decoders take no photo's embeddings")


if __name__ == "__main__" and INSTALLED not in sys.argv:
    serve(engine)

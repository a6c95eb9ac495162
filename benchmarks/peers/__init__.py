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
}

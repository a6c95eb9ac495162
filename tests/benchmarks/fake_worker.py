"""A worker without a model, run as a process: it answers as `worker.serve` does, until its mode makes it fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgecap.benchmarks.worker import serve


class Fake:
    """mode "OP:HOW": what happens (die, oom, garbage, flood, hang, slow, error) the second time that OP (pixels,
    caption) is called, and from then on."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.facts = {"import_s": 0.1, "load_s": 0.2, "versions": {"fake": "1"}}
        self.seen = 0
        if MODE == "load:child":  # a process of its own, which must not outlive the bench
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(os.environ["FAKE_CHILD_FILE"], "a") as file:
                file.write(f"{child.pid}\n")
        self._fail("load", now=True)

    def _fail(self, op: str, now: bool = False) -> None:
        where, _, how = MODE.partition(":")
        if where != op:
            return
        self.seen += 1
        if not now and self.seen < 2:
            return
        if how == "die":
            print("something on stdout that is no answer")
            print("the engine fell over", file=sys.stderr, flush=True)
            os._exit(3)
        if how == "oom":
            os.kill(os.getpid(), 9)
        if how == "garbage":
            os.write(RAW_STDOUT, b"Segfault? no: just chatter\n")
        if how == "flood":
            os.write(RAW_STDOUT, b"x" * 100_000)
            os._exit(0)
        if how == "hang":
            time.sleep(600)
        if how == "slow":
            time.sleep(0.1)
        if how == "error":
            raise RuntimeError("two\nlines of reason")

    def pixels(self, photo: str) -> np.ndarray:
        self._fail("pixels")
        return np.zeros((1, 2, 2, 3), np.uint8)

    def picture(self, photo: str) -> str:
        return photo

    def session(self) -> Any:
        return self

    def encode(self, pixels: np.ndarray) -> None:
        time.sleep(0.0002)

    def prefill(self, prompt_ids: Any) -> np.ndarray:
        time.sleep(0.0001)
        return np.zeros((1, 4), np.float32)

    def step(self, ids: Any, parents: Any) -> np.ndarray:
        time.sleep(0.0001)
        return np.zeros((1, 4), np.float32)

    def decode(self, session: Any, pixels: np.ndarray) -> SimpleNamespace:
        session.start(pixels, None)
        for _ in range(3):
            session.step(None, None)
        return SimpleNamespace(token_ids=[1, 2, 3])

    def caption(self, photo: str) -> dict[str, Any]:
        self._fail("caption")
        time.sleep(0.0007)
        return {"text": "a dog runs", "logprob": -1.0, "tokens": 3}


if __name__ == "__main__":
    MODE = sys.argv[1]
    RAW_STDOUT = os.dup(1)
    serve(Fake)

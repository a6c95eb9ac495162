"""What the peers of any captioner share: the folder that each is prepared in, its photos and words, and the search.

`python -m edgecap.benchmarks.peers.MODULE WEIGHTS FOLDER --precision P --bundle BUNDLE` prepares a folder from a
checkpoint or a SmolVLM's Hugging Face directory, as `edgecap bench --peers` does; then it is `--peer KIND:FOLDER`.
Pixels, tokens and search are the bundle's, so that only the engine differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from ...runtime.errors import EdgecapError, UsageError
from ..worker import decoded, serve, special_ids, versions
from .vlm import INSTALLED, installed

if TYPE_CHECKING:
    import numpy as np

FILE, TOKENIZER = "captioner.json", "tokenizer.json"
RECIPE = "recipe.toml"  # of a checkpoint


class Sight:
    """Photos as a bundle sees them: preprocessed, or one frame."""

    def __init__(self, preprocess: dict[str, Any], frames: dict[str, Any] | None) -> None:
        from ...runtime.preprocess import Preprocess

        self.preprocess = Preprocess.from_dict(preprocess)
        self.framing = None
        if self.preprocess.mode == "keep" and frames:
            from ...runtime.framed import read_frames

            self.framing = read_frames(frames)[0]

    def load(self, photo: Any) -> np.ndarray:
        """A photo → uint8 [1, H, W, 3]."""
        return self.preprocess.load(photo)[None] if self.framing is None else self.framing.load(photo).pixels


def read(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of itself. UsageError where it is none."""
    try:
        return dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise UsageError(f"{folder} holds no {FILE}: let edgecap bench --peers prepare it") from None


def about(bundle: Path, kind: str, precision: str) -> dict[str, Any]:
    """What every folder keeps of the bundle that it is put beside."""
    from ...runtime.bundle import Bundle

    manifest = Bundle.open(bundle, verify="sizes").manifest
    checkpoint = manifest["lineage"]["checkpoint"]
    return {
        "kind": kind,
        "precision": precision,
        "sha256": checkpoint["sha256"],
        "chat": checkpoint["recipe"].get("prompt", {}).get("chat", ""),
        "tokens": manifest["tokens"],
        "preprocess": manifest["preprocess"],
        "frames": manifest.get("frames"),
    }


def weights(place: Path, about: dict[str, Any]) -> Any:
    """The captioner in torch: a checkpoint, or a SmolVLM as it was published, seen as the bundle sees."""
    from ...train.adopt import adopt
    from ...train.checkpoint import load_checkpoint, require_captioner

    if (place / RECIPE).is_file():
        return require_captioner(load_checkpoint(place))
    found = adopt(str(place), chat=about["chat"], side=about["frames"]["side"], tiles=False)
    found.model.size = (found.framing.side,) * 2
    return found


def checked(place: Path, about: dict[str, Any]) -> Any:
    """The same, where it is what the bundle was made from. UsageError for other weights."""
    found = weights(place, about)
    if found.sha256 != about["sha256"]:
        raise UsageError(f"{place} holds other weights than those that the bundle was made from")
    return found


@dataclass
class Preparation:
    """What a folder is prepared of: weights in the precision asked for, and the folder of their plain ONNX graphs."""

    place: Path
    about: dict[str, Any]
    graphs: Path | None

    @property
    def precision(self) -> str:
        return str(self.about["precision"])

    def loaded(self) -> Any:
        """The captioner in torch, where it is what the bundle was made from. UsageError for other weights."""
        return checked(self.place, self.about)

    def plain(self) -> Path:
        """The folder of graphs. UsageError without one."""
        if self.graphs is None or read(self.graphs)["sha256"] != self.about["sha256"]:
            raise UsageError("needs --graphs, the folder of --peer onnxruntime in fp32 of the same weights")
        return self.graphs


class CaptionerPeer:
    """A captioner whose session an engine of its own computes; the search is the runtime's, over that session."""

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # modules, imported before the clock of load_s
    making: ClassVar[tuple[str, ...]] = ()  # modules that preparing a folder needs, too

    def __init__(self, request: dict[str, Any]) -> None:
        folder = Path(request["path"])
        self.about = read(folder)
        if self.about["kind"] != self.kind:
            raise UsageError(f"{folder} was prepared for --peer {self.about['kind']}, not {self.kind}")
        self.require()
        begin = perf_counter()
        for module in (*self.needs, "tokenizers"):
            import_module(module)
        from ...runtime.decode import DecodeOptions, decode
        from ...runtime.tokenizer import Tokenizer

        imported = perf_counter()
        self.model = self.load(folder, request["threads"])
        self.tokenizer = Tokenizer.load(folder / TOKENIZER)
        self.sight = Sight(self.about["preprocess"], self.about["frames"])
        loaded = perf_counter()
        self._search, self._options = decode, DecodeOptions.from_dict(request["decoding"])
        self._eos, self._suppress = special_ids(self.about["tokens"])
        sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != FILE}
        self.facts: dict[str, Any] = {
            "import_s": imported - begin,
            "load_s": loaded - imported,
            "sha256": self.about["sha256"],
            "precision": self.about["precision"],
            "weights": self.about["weights"],
            "bytes": {
                "total": sum(sizes.values()),
                "graphs": sum(size for file, size in sizes.items() if file.name != TOKENIZER),
            },
            "versions": versions(*self.needs),
        }

    @classmethod
    def require(cls) -> None:
        """Raises UsageError where the engine is not installed."""
        for module in cls.needs:
            if util.find_spec(module) is None:
                name = f"EDGECAP_PEER_{cls.kind.upper()}_PYTHON"
                raise UsageError(f"{module} is not installed for {sys.executable}: install it, or name another {name}")

    @classmethod
    def make(cls, task: Preparation, folder: Path) -> dict[str, Any]:
        """Write what `load` reads; what else it is to know of it, and "weights": what was done to those, in words."""
        raise NotImplementedError

    def load(self, folder: Path, threads: int) -> Any:
        """What has a method `session`."""
        raise NotImplementedError

    def pixels(self, photo: str) -> np.ndarray:
        return self.sight.load(photo)

    def picture(self, photo: str) -> Any:
        return decoded(photo)

    def session(self) -> Any:
        return self.model.session()

    def decode(self, session: Any, pixels: np.ndarray) -> Any:
        return self._search(session, pixels, self._options, eos_id=self._eos, suppress=self._suppress)[0][0]

    def caption(self, photo: Any) -> dict[str, Any]:
        best = self.decode(self.session(), self.sight.load(photo))
        ids = [int(i) for i in best.token_ids]
        return {"text": self.tokenizer.decode(ids), "logprob": best.logprob, "tokens": len(ids), "ids": ids}


def arguments(module: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Prepare a peer's folder.")
    parser.add_argument("weights", type=Path, help="A checkpoint, or a SmolVLM's Hugging Face directory.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="The bundle that it is put beside.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--graphs", type=Path, help="The folder of --peer onnxruntime in fp32, where one is needed.")
    return parser.parse_args()


def main(peer: type[CaptionerPeer]) -> None:
    """Serve the bench, tell whether the engine is installed, or prepare a folder."""

    def make(given: argparse.Namespace) -> None:
        prepare(peer, Preparation(given.weights, about(given.bundle, peer.kind, given.precision), given.graphs), given)

    run(peer, make)


def run(peer: Any, make: Callable[[argparse.Namespace], None]) -> None:
    """What a peer's script does: serve without arguments, `make` a folder of the `arguments` there are."""
    if len(sys.argv) < 2:
        serve(peer)
    elif sys.argv[1:] == [INSTALLED]:
        installed(peer.require)
    else:
        try:
            make(arguments(peer.__module__))
        except EdgecapError as error:
            sys.exit(error.message)


def prepare(peer: type[CaptionerPeer], task: Preparation, given: argparse.Namespace) -> None:
    """Fill a peer's folder. Raises EdgecapError where it cannot be."""
    peer.require()
    for module in peer.making:
        if util.find_spec(module) is None:
            raise UsageError(f"preparing {peer.kind} needs {module}: install edgecap[export] for {sys.executable}")
    given.folder.mkdir(parents=True, exist_ok=True)
    known = task.about | peer.make(task, given.folder)
    shutil.copyfile(given.bundle / TOKENIZER, given.folder / TOKENIZER)
    write(given.folder, known | {"from": os.path.abspath(given.weights)})


def write(folder: Path, known: dict[str, Any]) -> None:
    (folder / FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

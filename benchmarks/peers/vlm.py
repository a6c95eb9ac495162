"""What the peers of a SmolVLM share: the task of each, the prompt, the picture, and where the bench holds its clock.

A peer's folder is made once, by `python -m edgecap.benchmarks.peers.MODULE MODEL FOLDER --precision P` from a Hugging
Face directory, and then named to the bench as `--peer KIND:FOLDER`. Every peer gets the same pixels (Pillow makes the
photo square), the same prompt, the same number of image tokens (one frame, no tiles) and the same number of new tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata, util
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ...runtime.errors import UsageError
from ..worker import Marks, decoded, serve
from . import PEERS

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ..worker import Loader

TASK = "peer.json"
CHAT = "Can you describe this image?"  # as in the published examples
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
INSTALLED = "--installed"
WEIGHTS = {".safetensors", ".bin", ".xml", ".onnx", ".data", ".gguf"}


@dataclass(frozen=True)
class Task:
    """What a peer was made for. size: pixels a side; tokens: embeddings of the picture; settings: the engine's own;
    failed: why it could not be made."""

    kind: str
    model: str
    precision: str
    chat: str
    size: int
    tokens: int
    settings: dict[str, str] = field(default_factory=dict)
    failed: str = ""

    @classmethod
    def read(cls, folder: Path) -> Task:
        """The task of a peer's folder. Raises UsageError where there is none."""
        try:
            return cls(**json.loads((folder / TASK).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UsageError(f"{folder} holds no {TASK}: make it with python -m edgecap.benchmarks.peers.…") from None

    def write(self, folder: Path) -> None:
        (folder / TASK).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def prompt(self, image: str | None = None) -> str:
        """The whole prompt as Idefics3Processor writes it for a photo that is not split. image: stands for the picture
        instead of its tokens."""
        picture = IMAGE * self.tokens if image is None else image
        return f"<|im_start|>User:{FAKE}{GLOBAL}{picture}{FAKE}{self.chat}<end_of_utterance>\nAssistant:"


def new_task(
    kind: str, model: Path, precision: str, size: int, *, chat: str = CHAT, settings: dict[str, str] | None = None
) -> Task:
    """The task of a model's directory. UsageError where it is no SmolVLM's, or for a size that it cannot take."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        patch, largest = config["vision_config"]["patch_size"], config["vision_config"]["image_size"]
        unit = patch * config["scale_factor"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{model} is no SmolVLM's directory: {error}") from None
    if not unit <= size <= largest or size % unit:
        raise UsageError(f"pictures of this model have a multiple of {unit} pixels a side, up to {largest}, not {size}")
    return Task(kind, os.path.abspath(model), precision, chat, size, (size // unit) ** 2, settings or {})


class VlmPeer:
    """A captioner that searches by itself, behind the worker's requests. Greedy."""

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # modules, imported before the clock of load_s
    packages: ClassVar[tuple[str, ...]]  # distributions whose versions the record holds

    def __init__(self, request: dict[str, Any]) -> None:
        self.folder = Path(request["path"])
        self.task = Task.read(self.folder)
        if self.task.kind != self.kind:
            raise UsageError(f"{self.folder} was made for --peer {self.task.kind}, not {self.kind}")
        if self.task.failed:
            raise UsageError(f"could not be made: {self.task.failed}")
        decoding = dict(request["decoding"])
        for name, only in (("beam", 1), ("no_repeat_ngram", 0)):
            if decoding.get(name, only) != only:
                raise UsageError(f"the peer {self.kind} runs with {name} {only} only, not {decoding[name]}")
        self.longest, self.shortest = decoding.get("max_length", 24), decoding.get("min_length", 0)
        self.require()
        begin = perf_counter()
        for module in self.needs:
            import_module(module)
        imported = perf_counter()
        self.load(request["threads"])
        loaded = perf_counter()
        files = self.files()
        self.facts = {
            "import_s": imported - begin,
            "load_s": loaded - imported,
            "precision": self.task.precision,
            "image_tokens": self.task.tokens,
            "settings": self.task.settings,
            "bytes": {
                "total": sum(file.stat().st_size for file in files),
                "graphs": sum(file.stat().st_size for file in files if file.suffix in WEIGHTS),
            },
            "versions": {"python": platform.python_version()} | {p: version(p) for p in self.packages},
        }

    @classmethod
    def require(cls) -> None:
        """Raises UsageError where the engine is not installed."""
        for module in cls.needs:
            if util.find_spec(module.partition(".")[0]) is None:
                raise UsageError(
                    f"{module} is not installed for {sys.executable}: install benchmarks/peers/{cls.kind}.txt into an "
                    f"environment of its own and name its interpreter in EDGECAP_PEER_{cls.kind.upper()}_PYTHON"
                )

    @classmethod
    def make(cls, task: Task, folder: Path) -> Task | None:
        """Write what `load` reads into the folder, from the directory task.model; the task where it changes."""
        raise NotImplementedError

    def load(self, threads: int) -> None:
        raise NotImplementedError

    def files(self) -> list[Path]:
        """What would have to be shipped."""
        return [file for file in self.folder.rglob("*") if file.is_file() and file.name != TASK]

    def prepare(self, picture: Image) -> Any:
        """A picture of the task's size → what `run` takes."""
        raise NotImplementedError

    def run(self, inputs: Any, marks: Marks) -> list[int]:
        """Caption; marks.encode() after the picture's embeddings, where that can be seen, and marks.token() at every
        token, with its logits where they can be seen. Returns the ids without prompt and end."""
        raise NotImplementedError

    def words(self, ids: list[int]) -> str:
        raise NotImplementedError

    def picture(self, photo: str) -> Image:
        return decoded(photo)

    def square(self, photo: str | Image) -> Image:
        """The pixels that every peer gets."""
        from PIL.Image import Resampling

        picture = decoded(photo) if isinstance(photo, str) else photo
        size = (self.task.size, self.task.size)
        return picture if picture.size == size else picture.resize(size, Resampling.LANCZOS)

    def pixels(self, photo: str | Image) -> Any:
        """What `run` takes; the engine's own image processing counts as preprocessing where it is a step of its own."""
        return self.prepare(self.square(photo))

    def caption(self, photo: str | Image) -> dict[str, Any]:
        ids = self.run(self.pixels(photo), Marks())
        return {"text": self.words(ids), "logprob": None, "tokens": len(ids), "ids": ids}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def words_by(tokenizer: Any, ids: list[int]) -> str:
    """Text of ids by a tokenizers.Tokenizer."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def positions(vision: dict[str, Any], size: int) -> np.ndarray:
    """Which of the encoder's positions the patches of a square picture have: int64 [1, patches], in fractions of a side
    as transformers counts them."""
    import numpy as np

    side, grid = size // vision["patch_size"], vision["image_size"] // vision["patch_size"]
    steps = np.arange(side, dtype=np.int64) * grid // side
    return (steps[:, None] * grid + steps).reshape(1, -1)


def copy_words(task: Task, folder: Path) -> None:
    """The tokenizer's files beside what was exported."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(Path(task.model) / name, folder / name)


def installed(require: Callable[[], None]) -> None:
    """End with the reason where the engine is not there."""
    try:
        require()
    except UsageError as error:
        sys.exit(error.message)


def main(peer: type[VlmPeer], *, other: type | None = None) -> None:
    """Serve the bench, tell whether its engine is installed, or make a folder where there are arguments.

    other: the peer of the same kind for captioners that are no SmolVLM: it loads folders that hold a captioner.json.
    """
    if len(sys.argv) < 2:

        def load(request: dict[str, Any]) -> Any:
            held = Path(request["path"], "captioner.json").is_file()
            return other(request) if other is not None and held else peer(request)

        serve(cast("Loader", load))  # the bench needs no session of a peer that has `run`
        return
    if sys.argv[1:] == [INSTALLED]:
        installed(peer.require)
        return
    parser = argparse.ArgumentParser(prog=f"python -m {peer.__module__}", description=f"Make a folder for {peer.kind}.")
    parser.add_argument("model", type=Path, help="A SmolVLM as a Hugging Face directory.")
    parser.add_argument("folder", type=Path)
    if not PEERS[peer.kind].source:  # else it is that one's
        parser.add_argument("--precision", choices=PEERS[peer.kind].names, required=True)
    parser.add_argument("--chat", default=CHAT, help="What is asked of the picture.")
    parser.add_argument("--size", type=int, default=512, help="Pixels a side.")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="A setting of the engine.")
    given = parser.parse_args()
    try:
        settings = dict(item.split("=", 1) for item in given.set)
    except ValueError:
        sys.exit("--set takes NAME=VALUE")
    try:
        precision = getattr(given, "precision", "")
        task = new_task(peer.kind, given.model, precision, given.size, chat=given.chat, settings=settings)
        given.folder.mkdir(parents=True, exist_ok=True)
        task = peer.make(task, given.folder) or task
    except UsageError as error:
        sys.exit(error.message)
    task.write(given.folder)
    print(given.folder)

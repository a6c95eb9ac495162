"""What lies in a folder that optimum or the hub's ONNX community made of a SmolVLM, read and checked, without torch.

The layout is that of transformers.js: config.json, preprocessor_config.json, tokenizer.json, a chat template,
generation_config.json, and onnx/{vision_encoder,embed_tokens,decoder_model_merged}[_VARIANT].onnx, whose weights may
lie in .onnx_data files beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..runtime.errors import UsageError
from ..runtime.frames import Framing
from ..runtime.prompt import IMAGE, Prompt
from ..runtime.tokenizer import Tokenizer

KINDS = ("smolvlm", "idefics3")
PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SHORT = {"vision": PARTS[0], "embed": PARTS[1], "decoder": PARTS[2]}
# What a file's name ends in → what it holds. transformers.js calls the plain one fp32.
VARIANTS = {
    **{"fp32": "fp32", "fp16": "fp16", "int8": "int8", "uint8": "int8", "quantized": "int8"},
    **{"q4": "int4", "q4f16": "int4", "bnb4": "int4"},
}
MAX_BYTES = 2**31 - 2**20  # of one graph with its weights inside: protobuf's limit
CHAT = "Can you describe this image?"  # as in the published examples


@dataclass(frozen=True)
class Community:
    """A folder that was found whole.

    files: part → its graph. variants: part → of which of VARIANTS that is. config, processor: config.json and
    preprocessor_config.json. end: the id that ends captions. others: further ones that its generation_config.json
    names.
    """

    folder: Path
    files: dict[str, Path]
    variants: dict[str, str]
    config: dict[str, Any]
    processor: dict[str, Any]
    tokenizer: Tokenizer
    template: str
    end: int
    others: tuple[int, ...]

    @property
    def precision(self) -> str:
        """That of its decoder, which most of the bytes are."""
        return VARIANTS[self.variants[PARTS[2]]]

    @property
    def dim(self) -> int:
        return self._size("text_config", "hidden_size")

    @property
    def vocab(self) -> int:
        return self._size("text_config", "vocab_size")

    @property
    def positions(self) -> int:
        return self._size("text_config", "max_position_embeddings", 2048)

    def framing(self) -> Framing:
        """How its processor cuts photos."""
        native, patch = (self._size("vision_config", name) for name in ("image_size", "patch_size"))
        scale = self.config.get("scale_factor", 2)
        return Framing.from_processor(self.processor, native=native, patch=patch, scale=scale)

    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """What its processor makes of a pixel of 0 to 255: times [3], plus [3]."""
        said = self.processor
        factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
        mean, std = said.get("image_mean", [0.5] * 3), said.get("image_std", [0.5] * 3)
        if not said.get("do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        try:
            numbers = [np.broadcast_to(np.asarray(value, np.float64), (3,)) for value in (factor, mean, std)]
        except (TypeError, ValueError):
            raise UsageError(f"{self.folder}: image_mean and image_std are not three numbers each") from None
        if not np.isfinite(numbers).all() or not numbers[2].all():
            raise UsageError(f"{self.folder}: image_mean and image_std are not numbers to scale pixels by")
        return numbers[0] / numbers[2], -numbers[1] / numbers[2]

    def prompt(self, chat: str, framing: Framing) -> Prompt:
        """The words around a photo and `chat`, the user's, as far as the answer, with those of as many tiles as the
        tokenizer names: photos that are not split may be. UsageError where the framing cuts more."""
        prompt = Prompt.build(self.tokenizer, _dialogue(self.template, chat, self.folder), tiles=None)
        if (framing.most or framing.split) > min(prompt.most):
            raise UsageError(
                f"photos become {framing.most or 'any'} tiles a side, and the tokenizer names {min(prompt.most)}"
            )
        return prompt

    def bytes(self, *parts: str) -> int:
        """Of these graphs' files, with those of their weights."""
        found = 0
        for part in parts:
            path = self.files[part]
            found += sum(each.stat().st_size for each in (path, *path.parent.glob(f"{path.name}_data*")))
        return found

    def load(self, part: str) -> onnx.ModelProto:
        """One of the graphs, its weights inside. UsageError where it cannot be read."""
        path = self.files[part]
        try:
            return onnx.load(str(path))
        except Exception as error:  # protobuf's, onnx's and the system's share no base class
            raise UsageError(f"{path} cannot be read: {_first(error)}") from None

    def _size(self, part: str, name: str, usual: int | None = None) -> int:
        table = self.config.get(part)
        value = table.get(name, usual) if isinstance(table, dict) else None
        if type(value) is not int or value < 1:
            raise UsageError(f"{self.folder}: config.json says no {part}.{name}")
        return value


def find(folder: Path, variants: Iterable[str] = ()) -> Community:
    """Read a folder. variants: one of VARIANTS for all three graphs, or PART=VARIANT for one of them; by default the
    plain ones, or the only ones that are there for all. UsageError for what is missing, or another architecture's.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder with {PARTS[2]}.onnx; weights are exported by --target")
    config = _json(folder, "config.json")
    kind = config.get("model_type")
    if kind not in KINDS:
        raise UsageError(f"{folder} holds a {str(kind)[:40]} model; --from takes {' and '.join(KINDS)}")
    names = ("preprocessor_config.json", "processor_config.json")
    processor = next((_json(folder, name) for name in names if (folder / name).is_file()), None)
    if processor is None:
        raise UsageError(f"{folder} has no {names[0]}, which says how photos are cut")
    processor = processor.get("image_processor", processor)
    chosen = _variants(folder, variants)
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{folder} has no tokenizer.json")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    end, others = _ends(folder, config, tokenizer)
    files = {part: _place(folder, part, variant) for part, variant in chosen.items()}
    found = Community(folder, files, chosen, config, processor, tokenizer, _template(folder), end, others)
    for parts in (PARTS[:1], PARTS[1:]):
        if found.bytes(*parts) > MAX_BYTES:
            raise UsageError(
                f"{' and '.join(files[part].name for part in parts)} have {found.bytes(*parts) / 1e9:.1f} GB, and one "
                "graph holds 2.1 GB: take another --variant"
            )
    return found


def _variants(folder: Path, asked: Iterable[str]) -> dict[str, str]:
    """Part → variant. UsageError for one that is not there."""
    there = {part: [name for name in VARIANTS if _place(folder, part, name).is_file()] for part in PARTS}
    for part, found in there.items():
        if not found:
            older = " (decoder_model.onnx without a cache, of an older export, will not do)" * (
                part == PARTS[2] and _place(folder, "decoder_model", "fp32").is_file()
            )
            raise UsageError(f"{folder} has no onnx/{part}.onnx{older}; what has weights is exported by --target")
    chosen: dict[str, str] = {}
    for text in asked:
        part, _, variant = text.rpartition("=")
        part = SHORT.get(part, part)
        if variant not in VARIANTS or part not in ("", *PARTS):
            raise UsageError(
                f"--variant {text}: take {', '.join(VARIANTS)}, or PART=VARIANT with {', '.join(SHORT)} for PART"
            )
        chosen |= dict.fromkeys([part] if part else PARTS, variant)
    usual = next((name for name in VARIANTS if all(name in found for found in there.values())), "")
    for part in PARTS:
        variant = chosen.setdefault(part, usual)
        if variant not in there[part]:
            have = "; ".join(f"{name}: {', '.join(found)}" for name, found in there.items())
            what = f"no {part} of variant {variant}" if variant else "no variant with all three graphs"
            raise UsageError(f"{folder} has {what} (there are {have}); choose with --variant PART=VARIANT")
    return {part: chosen[part] for part in PARTS}


def _place(folder: Path, part: str, variant: str) -> Path:
    """Where a graph lies: in onnx/, or, as optimum leaves it, in the folder itself."""
    name = f"{part}.onnx" if variant == "fp32" else f"{part}_{variant}.onnx"
    return folder / "onnx" / name if (folder / "onnx").is_dir() else folder / name


def _ends(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, tuple[int, ...]]:
    """The id that ends an answer, and others that are said to."""
    said: Any = None
    if (folder / "generation_config.json").is_file():
        said = _json(folder, "generation_config.json").get("eos_token_id")
    text = config.get("text_config") or {}
    said = next(
        (each for each in (said, config.get("eos_token_id"), text.get("eos_token_id")) if each is not None), None
    )
    ids = [each for each in (said if isinstance(said, list) else [said]) if type(each) is int]
    own: Any = (
        _json(folder, "tokenizer_config.json").get("eos_token") if _has(folder, "tokenizer_config.json") else None
    )
    name = own.get("content") if isinstance(own, dict) else own
    known = tokenizer.inner.token_to_id(name) if isinstance(name, str) else None
    if not ids and known is None:
        raise UsageError(f"{folder}: neither generation_config.json nor the tokenizer says which token ends a text")
    end = known if known is not None and (not ids or known in ids) else ids[0]
    return end, tuple(each for each in ids if each != end)


def _template(folder: Path) -> str:
    """The chat template, where the folder has one of its places for it."""
    if _has(folder, "chat_template.jinja"):
        return _text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = _json(folder, name).get("chat_template") if _has(folder, name) else None
        if isinstance(found, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    raise UsageError(f"{folder} has no chat template (chat_template.jinja, chat_template.json, tokenizer_config.json)")


def _dialogue(template: str, chat: str, folder: Path) -> str:
    """A dialogue of a photo and the user's words, up to where the answer begins, with IMAGE for the photo.

    As transformers' apply_chat_template renders it (trimmed blocks; a sandbox, for a template is a program).
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    room.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    room.globals["raise_exception"] = refuse
    content = [{"type": "image"}, {"type": "text", "text": chat}]
    try:
        said = room.from_string(template).render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True, bos_token="", eos_token=""
        )
    except Exception as error:  # a template is a program of its author's
        raise UsageError(f"{folder}: the chat template fails: {_first(error)}") from None
    if said.count(IMAGE) != 1:
        raise UsageError(
            f"{folder}: the chat template puts {said.count(IMAGE)} photos into the prompt, where one is known"
        )
    return said


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {_first(error)}") from None


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise UsageError(f"{folder} has no {name}; --from takes a folder with config.json and onnx/*.onnx")
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {_first(error)}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a JSON object")
    return found


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

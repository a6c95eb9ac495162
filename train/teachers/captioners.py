"""Captioners that teach by what they say: a checkpoint or bundle of edgecap's, SmolVLM, or a captioner of transformers.

Whatever words, photos and graphs they have of their own, a student learns from their sentences alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from ...benchmarks.datasets import Example
from ...runtime.bundle import MANIFEST, Bundle
from ...runtime.decode import DecodeOptions, decode, never_said
from ...runtime.errors import EdgecapError, UsageError
from ...runtime.preprocess import MAX_SIDE, Preprocess
from ...runtime.tokenizer import Tokenizer
from ..checkpoint import (
    RECIPE,
    CheckpointInfo,
    identity,
    model_for,
    preprocess_for,
    read_checkpoint,
    require_captioner,
)
from ..data.cache import load_pixels
from ..models.hub import pretrained, read_config, read_json, reading, weights_sha256
from ..models.siglip import VLMS
from ..pretrained import load_tokenizer, open_captions
from ..settings import Data, Prompt, Recipe, TokenizerSettings
from ..smolvlm import with_vlm
from ..tokenizer import token_ids
from .base import CPU, Lazy, Teacher, lazy_checkpoint

MAX_TOKENS = 40  # of a caption by a captioner that names no limit of its own
CHAT = "Describe this image in one short sentence."  # what a model that follows instructions is told
HUB = {  # types that caption a photo without a prompt, behind one token that begins the text
    "blip": "BlipForConditionalGeneration",
    "git": "GitForCausalLM",
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
}

Hypotheses: TypeAlias = list[tuple[str, float]]  # of a photo, best first: captions and log-probabilities in nats


class CaptionTeacher(Protocol):
    """What a teacher of captions is (the rest: see Teacher). settings: all that its captions depend on."""

    name: str
    sha256: str
    settings: dict[str, Any]
    note: str

    @property
    def parameters(self) -> int | None: ...

    def captions(self, examples: Sequence[Example], beam: int, device: torch.device = CPU) -> list[Hypotheses]:
        """Each photo's up to `beam` captions; those that were cut off before they ended are left out."""

    def forget(self) -> None: ...

    def told(self) -> dict[str, Any]: ...

    def line(self) -> str: ...


class SessionCaptionTeacher(Teacher):
    """Whatever opens a decoding session: a checkpoint's model, or the engine of a bundle.

    settings: what it depends on beside its search.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        model: Lazy,
        tokenizer: Tokenizer,
        tokens: dict[str, int],
        preprocess: Preprocess,
        decoding: DecodeOptions,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(name, sha256, model)
        self.tokenizer, self.tokens, self.preprocess, self.decoding = tokenizer, tokens, preprocess, decoding
        self.settings = {**settings, "decoding": asdict(decoding)}

    def captions(self, examples: Sequence[Example], beam: int, device: torch.device = CPU) -> list[Hypotheses]:
        """See CaptionTeacher.captions; lengths and their penalty are the captioner's own."""
        found = decode(
            self.model.get(device).session(),
            load_pixels(examples, self.preprocess),
            replace(self.decoding, beam=beam),
            eos_id=self.tokens["eos"],
            suppress=never_said(self.tokens),
        )
        return [[(self.tokenizer.decode(h.token_ids), h.logprob) for h in beams if h.finished] for beams in found]


class HubCaptionTeacher(Teacher):
    """A captioner of transformers, of the types in HUB, with transformers' own beam search and settings."""

    def __init__(self, source: str, kind: str, parameters: int | None = None) -> None:
        import transformers

        make = getattr(transformers, HUB[kind])
        model = Lazy(lambda: pretrained(make, source, role="teacher"), parameters)
        super().__init__(source, weights_sha256(source, "teacher"), model)
        self.tokenizer = load_tokenizer(source)
        with reading(source, "teacher") as there:
            self.processor = transformers.AutoImageProcessor.from_pretrained(there, backend="pil")
        self.settings = {
            "weights": self.sha256,
            "config": read_json(source, "config.json", "teacher"),
            "generation": read_json(source, "generation_config.json", "teacher"),
            "max_tokens": MAX_TOKENS,
            "preprocess": self.processor.to_dict(),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
        }

    @torch.inference_mode()
    def captions(self, examples: Sequence[Example], beam: int, device: torch.device = CPU) -> list[Hypotheses]:
        """See CaptionTeacher.captions."""
        model, words = self.model.get(device), self.tokenizer
        photos = self.processor(images=[example.load() for example in examples], return_tensors="pt")["pixel_values"]
        out = model.generate(
            pixel_values=photos.to(device),
            num_beams=beam,
            num_return_sequences=beam,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            return_dict_in_generate=True,
            output_scores=True,
        )
        gains = model.compute_transition_scores(
            out.sequences, out.scores, getattr(out, "beam_indices", None), normalize_logits=beam == 1
        ).cpu()  # [N · beam, T]
        eos = model.generation_config.eos_token_id
        ends = {*(eos if isinstance(eos, list) else [eos]), words.eos_token_id, words.sep_token_id} - {None}
        ids = out.sequences[:, 1:].cpu()  # [N · beam, T]
        ended = torch.isin(ids, torch.tensor(sorted(ends)))
        gains[(ended.cumsum(1) - ended.long()) > 0] = 0.0  # behind the end
        texts = words.batch_decode(ids, skip_special_tokens=True)
        rows = list(zip(texts, gains.sum(1).tolist(), ended.any(1).tolist(), strict=True))
        return [
            [(text.strip(), logprob) for text, logprob, whole in rows[at : at + beam] if whole]
            for at in range(0, len(rows), beam)
        ]


def open_caption_teacher(source: str | Path, parameters: int | None = None) -> CaptionTeacher:
    """A checkpoint or a bundle of edgecap's, or a captioner of transformers by hub id or directory, as a teacher whose
    model is not loaded yet; parameters: as it was told before.

    Raises UsageError where it is none of these, or of a type that is not known to caption.
    """
    folder = Path(source).expanduser()
    if (folder / RECIPE).is_file():
        info = read_checkpoint(folder)
        return of_checkpoint(info, lazy_checkpoint(info, parameters))
    if (folder / MANIFEST).is_file():
        return _of_bundle(folder)
    kind = read_config(str(source), "teacher").get("model_type")
    if kind in VLMS:
        return _of_vlm(str(source), parameters)
    if kind in HUB:
        return HubCaptionTeacher(str(source), kind, parameters)
    known = ", ".join((*HUB, *VLMS))
    raise UsageError(f"teacher {source} is a {kind} model; known captioners: {known}, and what edgecap makes")


def check_captions(teacher: CaptionTeacher, example: Example, beam: int) -> None:
    """Let it caption one photo; UsageError where it cannot."""
    try:
        teacher.captions([example], beam)
    except EdgecapError:
        raise
    except Exception as error:  # of models and settings that others wrote, whatever they make the libraries raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"teacher {teacher.name} cannot caption a photo: {first}") from error


def of_checkpoint(info: CheckpointInfo, model: Lazy) -> SessionCaptionTeacher:
    """A checkpoint as a teacher of captions; UsageError for a retrieval model."""
    require_captioner(info)
    decoding = DecodeOptions(**asdict(info.recipe.decoding))
    teacher = SessionCaptionTeacher(
        str(info.path), info.sha256, model, info.tokenizer, info.tokens, info.preprocess, decoding, identity(info)
    )
    teacher.describe(info)
    return teacher


def _of_bundle(folder: Path) -> SessionCaptionTeacher:
    from ...runtime import Captioner

    bundle = Bundle.open(folder, "sizes")  # the files' hashes when it is loaded
    manifest, tokenizer = bundle.manifest, Tokenizer.load(bundle.file("tokenizer.json"))
    return SessionCaptionTeacher(
        str(folder), bundle.sha256, Lazy(lambda: Captioner.load(folder)), tokenizer, manifest["tokens"],
        Preprocess.from_dict(manifest["preprocess"]), DecodeOptions.from_dict(manifest["decoding"]),
        {"bundle": bundle.sha256},
    )  # fmt: skip


def _of_vlm(source: str, parameters: int | None) -> SessionCaptionTeacher:
    """A SmolVLM or Idefics3 in the grid's parts, its photos whole at the size it is made for."""
    recipe = with_vlm(
        Recipe(
            data=Data(image_size=MAX_SIDE, resample="bicubic"),  # too large: it becomes the model's own
            tokenizer=TokenizerSettings(max_length=MAX_TOKENS),
            prompt=Prompt(chat=CHAT),
        ),
        source,
    )
    tokenizer, recipe = open_captions(recipe, [])
    tokens, preprocess = token_ids(tokenizer, recipe.tokenizer.ids), preprocess_for(recipe)
    sha256 = weights_sha256(source, "teacher")
    info = CheckpointInfo(Path(source), recipe, Tokenizer(tokenizer), tokens, preprocess, {}, sha256)
    model = Lazy(lambda: model_for(recipe, tokens, load_weights=True), parameters)
    decoding = DecodeOptions(max_length=MAX_TOKENS)
    return SessionCaptionTeacher(source, sha256, model, info.tokenizer, tokens, preprocess, decoding, identity(info))

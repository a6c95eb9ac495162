"""Captioners that teach by what they say: a checkpoint or bundle of edgecap's, SmolVLM, or a captioner of transformers.

Whatever words, photos and graphs they have of their own, a student learns from their sentences alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from ...benchmarks.datasets import Example
from ...runtime.bundle import MANIFEST
from ...runtime.decode import DecodeOptions, decode, never_said
from ...runtime.errors import UsageError
from ...runtime.preprocess import MAX_SIDE, Preprocess
from ...runtime.session import Session
from ...runtime.tokenizer import Tokenizer
from ..checkpoint import RECIPE, Checkpoint, load_checkpoint, model_for, preprocess_for, require_captioner
from ..data.cache import load_pixels
from ..lora import count_parameters
from ..models.hub import pretrained, read_config, reading
from ..models.siglip import VLMS
from ..settings import Data, Prompt, Recipe, TokenizerSettings
from ..smolvlm import with_vlm
from ..start import Helpers
from ..state import fingerprint, model_tensors
from ..tokenizer import token_ids

MAX_TOKENS = 40  # of a caption by a captioner that names no limit of its own
CHAT = "Describe this image in one short sentence."  # what a model that follows instructions is told
HUB = {  # types that caption a photo without a prompt, behind one token that begins the text
    "blip": "BlipForConditionalGeneration",
    "git": "GitForCausalLM",
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
}

Said: TypeAlias = list[tuple[str, float]]  # of one photo, best first: texts and their log-probabilities in nats


class Speaker(Protocol):
    """What a teacher of captions is. sha256: of its weights; settings: all else that its captions depend on;
    parameters: None where that is not known."""

    name: str
    sha256: str
    settings: dict[str, Any]
    parameters: int | None

    def captions(self, examples: Sequence[Example], beam: int) -> list[Said]:
        """Each photo's up to `beam` captions; those that were cut off before they ended are left out."""

    def to(self, device: torch.device | str) -> None:
        """Compute there from now on."""

    def told(self) -> dict[str, Any]:
        """What a run's metrics say of it; recipe and cider, of its own validation, where it is a checkpoint."""

    def line(self) -> str:
        """The same for people."""


class Told:
    """What is told of any teacher of captions."""

    name: str
    sha256: str
    parameters: int | None
    recipe: str | None = None
    cider: float | None = None

    def told(self) -> dict[str, Any]:
        """See Speaker.told."""
        path = str(Path(self.name).resolve()) if Path(self.name).exists() else self.name  # or a hub id
        known = {name: getattr(self, name) for name in ("sha256", "recipe", "parameters", "cider")}
        return {"path": path, **known}

    def line(self) -> str:
        """See Speaker.line."""
        size = "" if self.parameters is None else f", {self.parameters / 1e6:,.2f} M parameters"
        scored = "" if self.cider is None else f", validation CIDEr {self.cider:.4f}"
        return f"teacher {self.name}: {self.recipe or 'by its captions'}{size}{scored}"


class SessionSpeaker(Told):
    """Whatever opens a decoding session: a checkpoint's model, or the engine of a bundle (`model` None)."""

    def __init__(
        self,
        name: str,
        sha256: str,
        session: Callable[[], Session],
        tokenizer: Tokenizer,
        tokens: dict[str, int],
        preprocess: Preprocess,
        decoding: DecodeOptions,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.name, self.sha256, self.session, self.model = name, sha256, session, model
        self.tokenizer, self.tokens, self.preprocess, self.decoding = tokenizer, tokens, preprocess, decoding
        self.parameters = None if model is None else count_parameters(model)
        self.settings = {
            "decoding": asdict(decoding),
            "preprocess": preprocess.to_dict(),
            "tokenizer": tokenizer.inner.to_str(),
        }

    def captions(self, examples: Sequence[Example], beam: int) -> list[Said]:
        """See Speaker.captions; lengths and their penalty are the captioner's own."""
        found = decode(
            self.session(),
            load_pixels(examples, self.preprocess),
            replace(self.decoding, beam=beam),
            eos_id=self.tokens["eos"],
            suppress=never_said(self.tokens),
        )
        return [[(self.tokenizer.decode(h.token_ids), h.logprob) for h in said if h.finished] for said in found]

    def to(self, device: torch.device | str) -> None:
        """See Speaker.to; a bundle's engine stays where it is."""
        if self.model is not None:
            self.model.to(device)


class HubSpeaker(Told):
    """A captioner of transformers, of the types in HUB, with transformers' own beam search and settings."""

    def __init__(self, source: str, kind: str) -> None:
        import transformers

        from ..pretrained import load_tokenizer

        self.model = pretrained(getattr(transformers, HUB[kind]), source, role="teacher").eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(source)
        with reading(source, "teacher") as place:
            self.look = transformers.AutoImageProcessor.from_pretrained(place, backend="pil")
        self.name, self.sha256 = source, fingerprint(self.model.state_dict(), shapes=False)
        self.parameters = count_parameters(self.model)
        generation = self.model.generation_config
        eos = generation.eos_token_id
        ends = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
        self.ends = torch.tensor(sorted(ends - {None}))
        self.settings = {
            "generation": {**generation.to_dict(), "transformers_version": None},
            "max_tokens": MAX_TOKENS,
            "preprocess": self.look.to_dict(),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
        }

    @torch.inference_mode()
    def captions(self, examples: Sequence[Example], beam: int) -> list[Said]:
        """See Speaker.captions."""
        photos = self.look(images=[example.load() for example in examples], return_tensors="pt")["pixel_values"]
        out = self.model.generate(
            pixel_values=photos.to(self.model.device),
            num_beams=beam,
            num_return_sequences=beam,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            return_dict_in_generate=True,
            output_scores=True,
        )
        gains = self.model.compute_transition_scores(
            out.sequences, out.scores, getattr(out, "beam_indices", None), normalize_logits=beam == 1
        ).cpu()  # [N · beam, T]
        words = out.sequences[:, 1:].cpu()  # [N · beam, T]
        ended = torch.isin(words, self.ends)
        gains[(ended.cumsum(1) - ended.long()) > 0] = 0.0  # behind the end
        texts = self.tokenizer.batch_decode(words, skip_special_tokens=True)
        rows = list(zip(texts, gains.sum(1).tolist(), ended.any(1).tolist(), strict=True))
        return [
            [(text.strip(), logprob) for text, logprob, whole in rows[at : at + beam] if whole]
            for at in range(0, len(rows), beam)
        ]

    def to(self, device: torch.device | str) -> None:
        """See Speaker.to."""
        self.model.to(device)


def open_speaker(source: str | Path) -> Speaker:
    """A checkpoint or a bundle of edgecap's, or a captioner of transformers by hub id or directory, as a teacher.

    Raises UsageError where it is none of these, or of a type that is not known to caption.
    """
    folder = Path(source).expanduser()
    if (folder / RECIPE).is_file():
        return speaker_of(load_checkpoint(folder))
    if (folder / MANIFEST).is_file():
        return _of_bundle(folder)
    kind = read_config(str(source), "teacher").get("model_type")
    if kind in VLMS:
        return _of_vlm(str(source))
    if kind in HUB:
        return HubSpeaker(str(source), kind)
    known = ", ".join((*HUB, *VLMS))
    raise UsageError(f"teacher {source} is a {kind} model; known captioners: {known}, and what edgecap makes")


def speaker_of(loaded: Checkpoint) -> SessionSpeaker:
    """A loaded checkpoint as a teacher of captions; UsageError for a retrieval model."""
    require_captioner(loaded)
    speaker = SessionSpeaker(
        str(loaded.path),
        loaded.sha256,
        loaded.model.session,
        loaded.tokenizer,
        loaded.tokens,
        loaded.preprocess,
        DecodeOptions(**asdict(loaded.recipe.decoding)),
        loaded.model.requires_grad_(False),
    )
    speaker.recipe, speaker.cider = loaded.recipe.name, (loaded.metrics.get("best") or {}).get("cider")
    return speaker


def only_speaking(helpers: Helpers) -> list[Speaker]:
    """The teachers that teach by their captions alone."""
    others = {teacher.sha256 for teacher in helpers.teachers}
    return [speaker for speaker in helpers.speakers if speaker.sha256 not in others]


def _of_bundle(folder: Path) -> SessionSpeaker:
    from ...runtime import Captioner

    opened = Captioner.load(folder)
    decoding = DecodeOptions.from_dict(opened.bundle.manifest["decoding"])
    return SessionSpeaker(
        str(folder), opened.bundle.sha256, opened.session, opened.tokenizer, opened.tokens, opened.preprocess, decoding
    )


def _of_vlm(source: str) -> SessionSpeaker:
    """A SmolVLM or Idefics3 in the grid's parts, its photos whole at the size it is made for."""
    from ..opening import open_captions

    recipe = with_vlm(
        Recipe(
            data=Data(image_size=MAX_SIDE, resample="bicubic"),  # too large: it becomes the model's own
            tokenizer=TokenizerSettings(max_length=MAX_TOKENS),
            prompt=Prompt(chat=CHAT),
        ),
        source,
    )
    tokenizer, recipe = open_captions(recipe, [])
    tokens = token_ids(tokenizer, recipe.tokenizer.ids)
    model = model_for(recipe, tokens, load_weights=True).eval().requires_grad_(False)
    speaker = SessionSpeaker(
        source,
        fingerprint(model_tensors(model)),
        model.session,
        Tokenizer(tokenizer),
        tokens,
        preprocess_for(recipe),
        DecodeOptions(max_length=MAX_TOKENS),
        model,
    )
    speaker.settings["prompt"] = recipe.decoder["prompt"]
    return speaker

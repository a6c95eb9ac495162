"""How the photos of a trained SmolVLM become frames among its prompt's words, as the runtime is to do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..runtime.errors import UsageError
from ..runtime.framed import write_frames
from ..runtime.frames import Framing
from ..runtime.prompt import FAKE, GLOBAL, Prompt
from .models.language_model import PHOTO, LanguageModelDecoder
from .pretrained import not_continuing
from .smolvlm import is_vlm, tiles

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


def frames_of(loaded: Checkpoint) -> dict[str, Any] | None:
    """The manifest's "frames" of a SmolVLM whose decoder is a language model; None for other captioners."""
    recipe, model = loaded.recipe, loaded.model
    framing = getattr(loaded, "framing", None)
    if framing is not None:  # a published model's own
        prompt = _prompt(loaded, 0)
        if (framing.most or 0) > len(prompt.tiles):
            raise UsageError(
                f"photos become {framing.most} tiles a side, which the tokenizer has no names for: add --no-tiles"
            )
        return write_frames(framing, prompt)
    if not is_vlm(recipe) or not isinstance(getattr(model, "decoder", None), LanguageModelDecoder):
        return None
    config, scale = model.encoder.body.config, model.bridge.scale
    side = model.encoder.tile or model.size[0]
    if config.image_size // config.patch_size % scale:
        return None
    framing = Framing(side, config.image_size, config.patch_size, scale, split=bool(model.encoder.tile))
    return write_frames(framing, _prompt(loaded, tiles(recipe)))


def _prompt(loaded: Checkpoint, k: int) -> Prompt:
    """The words around the frames of a photo in k × k tiles, 0 = unsplit; and around those of fewer, where the
    tokenizer has SmolVLM's own tokens for them."""
    ids, bos, tokenizer = loaded.model.decoder.prompt, loaded.tokens["bos"], loaded.tokenizer
    if not ids:
        return Prompt((), (bos,))
    first, last = ids.index(PHOTO), len(ids) - 1 - ids[::-1].index(PHOTO)
    known = {name: tokenizer.inner.token_to_id(name) for name in (FAKE, GLOBAL)}
    if None in known.values() or ids[last - 2 : last] != [known[FAKE], known[GLOBAL]]:
        if k:
            raise UsageError("its prompt does not name the tiles of a photo, which the runtime would cut")
        return Prompt(tuple(ids[:first]), (*ids[last + 1 :], bos))
    fake, whole = known[FAKE], (known[FAKE], known[GLOBAL])
    names, plain = _tile_names(tokenizer.inner), not_continuing(tokenizer.inner)
    prompt = Prompt(
        before=tuple(ids[: ids.index(fake)]),
        after=(*ids[last + 2 :], bos),
        whole=whole,
        end=(fake,),
        row=tuple(plain.encode("\n").ids) if names else (),
        rows=tuple(plain.encode("\n\n").ids) if names else (),
        tiles=tuple(tuple((fake, name) for name in row) for row in names),
    )
    if prompt.segments(k, k).flat(PHOTO, 1) != [*ids, bos]:
        raise UsageError("its prompt does not surround the frames of a photo as SmolVLM's does")
    return prompt


def _tile_names(tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of as many rows of as many tiles as the tokenizer has names for."""
    side = 0
    while tokenizer.token_to_id(f"<row_{side + 1}_col_{side + 1}>") is not None:
        side += 1
    found = [[tokenizer.token_to_id(f"<row_{r}_col_{c}>") for c in range(1, side + 1)] for r in range(1, side + 1)]
    return found if all(name is not None for row in found for name in row) else []

"""SmolVLM and Idefics3 as a cell of the grid: siglip × pixel_shuffle × llama, and the prompt around their photos.

Marafioti et al. 2025, arXiv:2504.05299; Laurençon et al. 2024, arXiv:2408.12637.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers import Tokenizer

from ..runtime.errors import UsageError
from .models.hub import check_kind, read_config
from .models.language_model import IMAGE, PHOTO
from .models.language_models import LlamaDecoder
from .models.siglip import VLMS
from .settings import Recipe

FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
CHAT = "Can you describe this image?"  # as in the published examples


def with_vlm(recipe: Recipe, source: str) -> Recipe:
    """The recipe with encoder, bridge, decoder and tokenizer of one SmolVLM or Idefics3, by hub id or directory.

    The recipe's photo size, its tiles, its limit of positions, dropout and prompt stay where the model can have them.
    Reads the source's config.json alone. UsageError where it is another model.
    """
    check_kind(source, set(VLMS), "vlm")
    vision, scale, dim, words = _sizes(read_config(source, "vlm"), source)
    text = LlamaDecoder.described(source)
    native, grid = vision["image_size"], vision["patch_size"] * scale
    side, tile = recipe.data.image_size, recipe.encoder.tile
    if tile:
        k = max(1, side // tile)
        tile = min(tile, native)
        side = k * tile
    elif side > native or side % grid:
        side = native
    prompt = recipe.prompt
    if not prompt.text and not prompt.chat:
        prompt = dataclasses.replace(prompt, chat=CHAT)
    kept = {k: recipe.decoder[k] for k in ("max_positions", "dropout") if k in recipe.decoder}
    if "max_positions" in kept:
        kept["max_positions"] = min(kept["max_positions"], text["max_positions"])
    same = recipe.bridge.get("kind") == "pixel_shuffle"
    bridge = {k: recipe.bridge[k] for k in ("dropout",) if same and k in recipe.bridge}
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, image_size=side),
        encoder=dataclasses.replace(
            recipe.encoder,
            kind="siglip",
            source=source,
            config={name: vision[name] for name in VISION},  # for --from-scratch
            features="grid",
            tile=tile,
        ),
        bridge={"kind": "pixel_shuffle", "dim": dim, "scale": scale, **bridge, "source": source},
        decoder={"kind": "llama", "source": source, "project": False, **text, **kept},
        tokenizer=dataclasses.replace(recipe.tokenizer, kind="pretrained", source=source, ids={}, vocab_size=words),
        prompt=prompt,
    )


def _sizes(config: dict[str, Any], source: str) -> tuple[dict[str, Any], int, int, int]:
    """The vision model's settings, how many features a side the bridge puts together, the language model's size and
    its words."""
    from transformers import CONFIG_MAPPING

    try:
        whole = CONFIG_MAPPING[config["model_type"]](**config)
        text = whole.text_config
        return whole.vision_config.to_dict(), whole.scale_factor, text.hidden_size, text.vocab_size
    except Exception as error:  # of a file that others wrote
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"vlm {source}: its config.json is not one of a SmolVLM: {first}") from error


def is_vlm(recipe: Recipe) -> bool:
    """Whether a recipe is a SmolVLM in its parts."""
    return recipe.encoder.kind == "siglip" and recipe.bridge.get("kind") == "pixel_shuffle"


def tiles(recipe: Recipe) -> int:
    """Tiles a side of a photo, 0 = not split."""
    k = recipe.data.image_size // recipe.encoder.tile if recipe.encoder.tile else 0
    return k if k > 1 else 0


def with_frames(recipe: Recipe) -> Recipe:
    """The recipe with a bridge that knows how many frames, tiles and overview, a photo becomes."""
    k = tiles(recipe)
    if not k or not is_vlm(recipe):
        return recipe
    return dataclasses.replace(recipe, bridge={**recipe.bridge, "frames": k * k + 1})


def around_photo(recipe: Recipe, text: str, tokenizer: Tokenizer | None = None) -> str:
    """A prompt with the tokens that SmolVLM expects around a photo, and IMAGE for each frame's embeddings, as
    Idefics3Processor writes them; as it is for other captioners and where the text holds these tokens already.

    tokenizer: a pretrained one, which must know them: one that has none of them is no SmolVLM's.
    """
    if IMAGE not in text or not is_vlm(recipe) or FAKE in text:
        return text
    if tokenizer is not None and tokenizer.token_to_id(FAKE) is None:
        return text
    frames, k = "", tiles(recipe)
    for row in range(1, k + 1):
        for column in range(1, k + 1):
            name = f"<row_{row}_col_{column}>"
            if tokenizer is not None and tokenizer.token_to_id(name) is None:
                raise UsageError(
                    f"the tokenizer has no {name}: photos of {recipe.data.image_size} px are too many tiles of "
                    f"{recipe.encoder.tile}; lower data.image_size"
                )
            frames += f"{FAKE}{name}{IMAGE}"
        frames += "\n"
    frames += "\n" * bool(k) + f"{FAKE}{GLOBAL}{IMAGE}{FAKE}"
    return text.replace(IMAGE, frames, 1)


def check_length(recipe: Recipe) -> None:
    """UsageError where prompt and caption cannot fit into the decoder's positions, as far as the recipe tells.

    The photo's embeddings are counted where the encoder's patches are known.
    """
    prompt, limit = recipe.decoder.get("prompt"), recipe.decoder.get("max_positions")
    if not is_vlm(recipe) or not limit or not prompt:
        return
    each = _embeddings(recipe)
    photo = prompt.count(PHOTO) * each
    words, caption = len(prompt) - prompt.count(PHOTO) + 1, recipe.tokenizer.max_length
    if photo + words + caption > limit:
        size = f"{recipe.data.image_size} px" + (f" in tiles of {recipe.encoder.tile}" if recipe.encoder.tile else "")
        raise UsageError(
            f"a prompt of {words} tokens, a photo of {photo} ({size}) and a caption of {caption} exceed "
            f"decoder.max_positions = {limit}: raise --max-seq-len, or lower --image-longest-edge, "
            "tokenizer.max_length or the prompt"
        )


def _embeddings(recipe: Recipe) -> int:
    """How many embeddings the bridge gives for each frame."""
    patch = _vision(recipe).get("patch_size", 16)
    side = (recipe.encoder.tile or recipe.data.image_size) // patch // recipe.bridge.get("scale", 2)
    return side * side


def native_side(recipe: Recipe) -> int:
    """Pixels a side of the photos, or tiles, that the recipe's SigLIP is made for."""
    return _vision(recipe).get("image_size", 224)


def _vision(recipe: Recipe) -> dict[str, Any]:
    """The SigLIP's settings: its source's, or the recipe's own."""
    source = recipe.encoder.source
    if not source:
        return recipe.encoder.config
    found = read_config(source, "encoder")
    return _sizes(found, source)[0] if found.get("model_type") in VLMS else found.get("vision_config", found)

"""Pretrained weights by hub id or local directory, and configurations: whatever is wrong with them is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...runtime.errors import UsageError


def pretrained(
    cls: Any, source: str, *, role: str = "encoder", whole: str | tuple[str, ...] = "", **options: Any
) -> Any:
    """A transformers model (`cls`) with all the weights of `source`, safetensors only, without a load report.

    role: the recipe's part, for messages; whole: type (or types) of the model that this one is a part of, where that
    will do, too; options: as of from_pretrained. Float32, whatever the file holds. UsageError where it cannot be loaded
    or lacks weights.
    """
    check_kind(source, {cls.config_class.model_type, *([whole] if isinstance(whole, str) else whole)}, role)
    with reading(source, role) as place:
        model, info = cls.from_pretrained(
            place, output_loading_info=True, use_safetensors=True, dtype="float32", **options
        )
    # transformers would start these at random; what is there beyond them (a classifier) is not needed.
    wrong = sorted(info["missing_keys"]) + sorted(name for name, *_ in info.get("mismatched_keys", ()))
    if wrong:
        raise UsageError(f"{role} {source} lacks {len(wrong)} of the {role}'s weights, {wrong[0]} first")
    return model


def read_config(source: str, role: str) -> dict[str, Any]:
    """The config.json of a hub id or directory, without its weights."""
    from transformers import PreTrainedConfig

    with reading(source, role) as place:
        return PreTrainedConfig.get_config_dict(place)[0]


def read_pixel_scaling(source: str, role: str) -> tuple[list[float], list[float]] | None:
    """What a hub id's or directory's image processor does to pixels in [0, 1], as (mean, std) of each channel; None
    where it says nothing of it."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    with reading(source, role) as place:
        said = get_image_processor_config(place)
        if "image_mean" not in said or "image_std" not in said:
            return None
        factor = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255.0
        offset = 1.0 if said.get("rescale_offset") else 0.0  # taken off before mean
        mean, std = said["image_mean"], said["image_std"]
        if not said.get("do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        # EfficientNet's processor divides by std twice, once more for the weights' own sake.
        kind = str(said.get("image_processor_type") or said.get("feature_extractor_type"))
        twice = kind.startswith("EfficientNet") and said.get("include_top", True)
        return (
            [(m + offset) / factor for m in mean],
            [(s * t if twice else s) / factor for s, t in zip(std, said["image_std"], strict=True)],
        )


def check_kind(source: str, wanted: set[str], role: str) -> None:
    """UsageError where `source` is a model of another type than `wanted`."""
    kind, wanted = read_config(source, role).get("model_type"), wanted - {""}
    if kind and kind not in wanted:
        raise UsageError(f"{role} {source} is a {kind} model; {role}.kind needs a {' or '.join(sorted(wanted))} model")


def read_tensor(source: str, name: str, role: str) -> Any:
    """One tensor, float32, of the safetensors files of a hub id or directory; the rest of them is not read."""
    import json

    from safetensors import safe_open
    from transformers.utils import cached_file

    with reading(source, role) as place:
        file = "model.safetensors"
        index = cached_file(place, f"{file}.index.json", _raise_exceptions_for_missing_entries=False)
        if index:  # several files
            file = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"][name]
        with safe_open(cached_file(place, file), framework="pt") as tensors:
            return tensors.get_tensor(name).float()


def read_json(source: str, name: str, role: str) -> dict[str, Any] | None:
    """A file of a hub id or directory; None where it has none of that name."""
    import json

    from transformers.utils import cached_file

    with reading(source, role) as place:
        path = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def weights_sha256(source: str, role: str) -> str:
    """SHA-256 of the safetensors files of a hub id or directory, one behind the other."""
    import hashlib

    from transformers.utils import cached_file

    index = read_json(source, "model.safetensors.index.json", role)
    files = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    found = hashlib.sha256()
    with reading(source, role) as place:
        for name in files:
            with open(cached_file(place, name), "rb") as file:
                while part := file.read(1 << 22):
                    found.update(part)
    return found.hexdigest()


@contextmanager
def reading(source: str, role: str, needs: tuple[str, ...] = ("config.json",)) -> Iterator[str]:
    """The place to load `source` from, a hub id or a directory with one of the files `needs`; what transformers says
    or raises inside the block is one UsageError."""
    from transformers.utils import logging

    looks_local = Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    path = Path(source).expanduser()
    if (looks_local or path.is_dir()) and not any((path / name).is_file() for name in needs):
        raise UsageError(f"{role} {source}: no {needs[0]} there; give a transformers model directory or a hub id")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield str(path) if path.exists() else source
    except UsageError:
        raise
    except Exception as error:  # of files that others wrote, whatever they make the libraries raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{role} {source} cannot be loaded: {first}") from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def known(where: str, config_class: Any, config: dict[str, Any], *, strict: bool = True) -> Any:
    """A configuration of these settings; UsageError, beginning with `where`, for values it does not take and, if
    `strict`, for names."""
    from huggingface_hub.errors import StrictDataclassError

    settings = config_class()
    unknown = [key for key in config if not hasattr(settings, key)]
    if unknown and strict:
        raise UsageError(f"{where}: {config_class.__name__} has no {', '.join(unknown)}")
    try:
        return config_class(**config)
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{where}: {error}") from error

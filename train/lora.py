"""Low-rank adapters on the language model, injected through peft: they alone are trained and stored, in peft's format.

LoRA: Hu et al. 2021, arXiv:2106.09685. QLoRA, the frozen weights in 4 bits: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import UsageError, need
from .models import CaptionModel
from .settings import Lora, Recipe
from .state import ADAPTER, model_tensors, read_tensors, write_json, write_tensors

WEIGHTS, CONFIG = ADAPTER, ADAPTER.with_name("adapter_config.json")  # what peft.PeftModel.from_pretrained reads
NAME = "default"  # the adapter's name inside the model, which peft leaves out of files
OURS, THEIRS = "decoder.lm.", "base_model.model."
ALL = "all-linear"
BLOCK = 64  # weights of NF4 that share a scale


def add_adapters(model: CaptionModel, settings: Lora, *, seed: int = 0) -> None:
    """Put adapters beside the language model's linear layers, in place; they change nothing until they have learnt.

    From here on they alone want gradients and are what `state.model_tensors` stores. The seed is of their weights. With
    bits = 4 the frozen layers become NF4 of bitsandbytes (the output layer stays).
    Raises UsageError where the decoder is no language model or has no such layers, MissingExtra without peft (and, for
    4 bits, bitsandbytes).
    """
    lm = getattr(model.decoder, "lm", None)
    if lm is None:
        raise UsageError("recipe [lora]: adapters go on a language model; decoder.kind must be llama, gpt2 or opt")
    _need_extras(settings)
    from peft import LoraConfig, inject_adapter_in_model

    layers = linear_layers(lm)
    targets = _targets(settings.targets, layers)
    model.requires_grad_(False)
    transposed = any(not isinstance(layer, nn.Linear) for layer in layers.values())  # GPT-2's are stored [in, out]
    if settings.bits == 4:
        _quantize(lm, layers)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft multiplies by alpha / r, whole or not
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is right for 4-bit layers, and of old names in transformers
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm, adapter_name=NAME)
    model.frozen_parts = tuple(part for part in model.parts() if part != "decoder")
    model.stores = is_adapter


def _need_extras(settings: Lora) -> None:
    need("peft", extra="lora", command="a recipe with [lora]")
    if settings.bits == 4:
        need("bitsandbytes", extra="qlora", command="lora.bits = 4")


def is_adapter(name: str) -> bool:
    """Whether a tensor of the model is one of its adapters'."""
    return ".lora_A." in name or ".lora_B." in name


def linear_layers(lm: nn.Module) -> dict[str, nn.Module]:
    """A language model's linear layers by name, the output layer left out (it is the word embedding, too)."""
    from transformers.pytorch_utils import Conv1D

    head = lm.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _targets(wanted: str, layers: dict[str, nn.Module]) -> list[str]:
    """The last parts of the names of the layers that get an adapter."""
    known = sorted({name.rpartition(".")[2] for name in layers})
    if wanted.strip() == ALL:
        return known
    names = sorted({name.strip() for name in wanted.split(",") if name.strip()})
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"the decoder has no layer {unknown[0]!r}" if unknown else "no layer is named"
        raise UsageError(f"recipe [lora]: targets: {what}; choices: {ALL}, {', '.join(known)}")
    return names


def _quantize(lm: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Replace linear layers by 4-bit NF4 ones with doubly quantized scales.

    Those whose rows are no whole blocks stay as they are: on CPUs with AVX-512 bitsandbytes (0.50) reads their blocks
    at the wrong rows. (Language models' widths are multiples of 64.)
    """
    import bitsandbytes as bnb

    for name, layer in layers.items():
        weight: Tensor = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T  # type: ignore[assignment]
        rows, columns = weight.shape
        if columns % BLOCK:
            continue
        small = bnb.nn.Linear4bit(columns, rows, bias=layer.bias is not None, quant_type="nf4")
        small.weight = bnb.nn.Params4bit(
            weight.detach().contiguous(), requires_grad=False, quant_type="nf4", module=small
        )
        if layer.bias is not None:
            small.bias = layer.bias
        # Else bitsandbytes repacks the weights for bfloat16 on the first validation, and training after it gets no
        # gradients through them.
        small.support_avx512bf16_for_cpu = False
        small.train(layer.training)
        lm.set_submodule(name, small.to(weight.device))
    lm.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft looks here for what lies under an adapter


# --- files ---------------------------------------------------------------------------------------------------------


def write_adapter(out: Path, model: CaptionModel) -> None:
    """Write a run's adapter/: what peft.PeftModel.from_pretrained loads onto the same language model."""
    config = model.decoder.lm.peft_config[NAME].to_dict()  # type: ignore[union-attr, index]
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_json(out / CONFIG, {**config, "inference_mode": True})
    tensors = {_theirs(name): tensor for name, tensor in model_tensors(model).items()}
    write_tensors(out / WEIGHTS, tensors, {"format": "pt"})


def read_adapter(out: Path) -> dict[str, Tensor]:
    """The tensors of a run's adapter/ by the names they have in the model."""
    return {_ours(name): tensor for name, tensor in read_tensors(out / WEIGHTS)[0].items()}


def _theirs(name: str) -> str:
    return THEIRS + name.removeprefix(OURS).replace(f".{NAME}.", ".")


def _ours(name: str) -> str:
    layer, _, kind = name.removeprefix(THEIRS).rpartition(".lora_")  # kind: A.weight or B.weight
    return f"{OURS}{layer}.lora_{kind.replace('.', f'.{NAME}.', 1)}"


# --- the model under the adapters ----------------------------------------------------------------------------------


@torch.no_grad()
def merged_tensors(model: CaptionModel) -> dict[str, Tensor]:
    """What `state.model_tensors` would give without adapters, each added to the float32 weights under it.

    W + alpha / rank · B A (arXiv:2106.09685, section 4.1). The model stays as it is; it must not be in 4 bits.
    """
    from peft.tuners.lora import LoraLayer

    added: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            added[f"{name}.base_layer.weight"] = module.get_delta_weight(NAME)
    stores, model.stores = model.stores, None
    try:
        whole = model_tensors(model)
    finally:
        model.stores = stores
    return {
        name.replace(".base_layer.", "."): tensor + added[name] if name in added else tensor
        for name, tensor in whole.items()
        if not is_adapter(name)
    }


def switch_off(model: CaptionModel) -> None:
    """Let the model say what its base says."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)


def take_off(model: CaptionModel) -> CaptionModel:
    """The base alone again, in place; it must not be in 4 bits."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.base_layer)
    del model.decoder.lm.peft_config
    model.stores, model.frozen_parts = None, ()
    return model


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module; of a 4-bit layer, the weights and not the bytes they lie in."""
    sizes = (getattr(p, "quant_state", None) for p in module.parameters())
    return sum(
        p.numel() if packed is None else packed.shape.numel()
        for p, packed in zip(module.parameters(), sizes, strict=True)
    )


# --- which runs have adapters --------------------------------------------------------------------------------------


def has_adapter(run: Path) -> bool:
    return (run / WEIGHTS).is_file()


def require_adapter(run: Path) -> None:
    if not has_adapter(run):
        raise UsageError(f"{run} has no adapter: it must be a run that was trained with [lora] (lora.rank)")


def refuse_adapter(run: Path) -> None:
    """UsageError where a whole model is needed and a run is an adapter."""
    if has_adapter(run):
        raise UsageError(f"{run} is an adapter: bake it into its base first: edgecap merge {run}")


def check_base(recipe: Recipe, init: Path | None, *, trained: bool = True) -> None:
    """UsageError where a recipe asks for adapters that cannot be trained as it says, MissingExtra without peft (and,
    for 4 bits, bitsandbytes).

    trained: what they go on must have learnt something (its size is enough to tell memory and speed).
    """
    if recipe.task != "caption":
        raise UsageError("recipe [lora]: adapters go on captioners: leave lora.rank at 0")
    for number, stage in enumerate(recipe.stages):
        if stage.encoder_lr:
            raise UsageError(f"recipe [lora]: the adapters alone learn: --set stages.{number}.encoder_lr=0")
    _need_extras(recipe.lora)
    sources = (recipe.encoder.source, recipe.bridge.get("source"), recipe.decoder.get("source"))
    if trained and init is None and not all(sources):
        raise UsageError("recipe [lora]: adapters need a trained captioner under them: --init CHECKPOINT, or --vlm")

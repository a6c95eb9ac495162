"""Adapters: what learns, what is stored, what peft makes of it, also on 4 bits."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from edgecap.runtime.errors import MissingExtra, UsageError
from edgecap.train import lora
from edgecap.train.models import CaptionModel
from edgecap.train.optim import make_optimizer, set_modes
from edgecap.train.settings import Stage
from edgecap.train.state import ADAPTER, model_tensors
from edgecap.train.weights import write_weights

from .adapter_parts import KINDS, LORA, needs_4_bits
from .tiny import DECODERS, SIZE, tiny_model


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def views(seed: int = 0) -> dict[str, torch.Tensor]:
    """Photos and captions: pixels [3, H, W, 3], ids [3, 2, 7]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    return {"ids": torch.randint(4, 40, (3, 2, 7), generator=generator), "pixels": pixels}


@torch.no_grad()
def logits(model: CaptionModel, seed: int = 0) -> torch.Tensor:
    return model.eval()(**views(seed))


def adapted(kind: str, **settings: Any) -> tuple[CaptionModel, CaptionModel]:
    """A captioner with an adapter that has learnt something, and the captioner without it."""
    base = tiny_model(kind)
    model = copy.deepcopy(base)
    lora.add_adapters(model, dataclasses.replace(LORA, **settings))
    teach(model)
    return model, base


@torch.no_grad()
def teach(model: CaptionModel) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(0, 0.2)


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_learn(kind: str) -> None:
    base = tiny_model(kind)
    model = copy.deepcopy(base)
    lora.add_adapters(model, dataclasses.replace(LORA, dropout=0.5))
    assert torch.equal(logits(model), logits(base))  # until they have learnt something
    stage = Stage(lr=0.1)
    optimizer = make_optimizer(model, stage)
    seen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in seen}
    assert names == set(model_tensors(model)) and names and all(lora.is_adapter(name) for name in names)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_modes(model, stage, from_scratch=True)
    for _ in range(2):  # A moves once B is no longer zero
        optimizer.zero_grad()
        model(**views()).logsumexp(-1).sum().backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == names
    torch.manual_seed(0)
    one = model(**views())
    assert not torch.equal(one, model(**views()))  # dropout
    model.eval()
    assert torch.equal(model(**views()), model(**views()))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    """The same language model under peft's own loader gives our logits, and peft's own merge our merged weights."""
    peft = pytest.importorskip("peft")
    model, base = adapted(kind)
    write_weights(tmp_path, model)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base.decoder.lm), str((tmp_path / ADAPTER).parent))
    assert type(wrapped).__name__ == "PeftModelForCausalLM"
    theirs = copy.deepcopy(base)
    theirs.decoder.lm = wrapped.base_model.model
    ours = logits(model)
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-6)
    assert (ours - logits(base)).abs().max() > 0.1
    merged = lora.merged_tensors(model)
    theirs.decoder.lm = wrapped.merge_and_unload()
    expected = model_tensors(theirs)
    assert list(merged) == list(expected) == list(model_tensors(base))
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_which_layers_get_an_adapter() -> None:
    model, _ = adapted("gpt2", targets="c_attn, c_fc")
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in model_tensors(model)}
    assert layers == {"c_attn", "c_fc"}
    rank = {tensor.shape[0] for name, tensor in model_tensors(model).items() if ".lora_A." in name}
    assert rank == {LORA.rank}
    with pytest.raises(UsageError, match=r"no layer 'q_proj'; choices: all-linear, c_attn, c_fc, c_proj"):
        adapted("gpt2", targets="q_proj")
    with pytest.raises(UsageError, match="no layer is named"):
        adapted("gpt2", targets=" , ")
    with pytest.raises(UsageError, match="decoder.kind must be llama, gpt2 or opt"):
        adapted("gru")


def test_missing_extras_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    present = importlib.util.find_spec
    for gone, bits, extra in (("peft", 0, "lora"), ("bitsandbytes", 4, "qlora")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, gone=gone: None if name == gone else present(name))
            with pytest.raises(MissingExtra, match=rf"{gone}, which is not installed.*edgecap\[{extra}\]"):
                adapted("llama", bits=bits)


# --- 4 bits --------------------------------------------------------------------------------------------------------


@needs_4_bits
@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_weights_lie_in_4_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NF4's own definition (arXiv:2305.14314): blocks of 64, scaled by their largest, 16 levels."""
    import bitsandbytes as bnb

    monkeypatch.setitem(DECODERS, kind, {**DECODERS[kind], "dim": 64, "ffn": 128})
    model, base = adapted(kind, bits=4)
    layers = {name: m for name, m in model.decoder.lm.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == len(lora.linear_layers(base.decoder.lm))
    levels = next(iter(layers.values())).weight.quant_state.code
    assert len(levels) == 16
    for name, layer in layers.items():
        plain = base.decoder.lm.get_submodule(name.removesuffix(".base_layer"))
        weight = plain.weight if isinstance(plain, torch.nn.Linear) else plain.weight.T
        found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        blocks = weight.detach().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = levels[(blocks.div(scale).unsqueeze(-1) - levels).abs().argmin(-1)] * scale
        # The scales are quantized, too, to 8 bits.
        torch.testing.assert_close(found, nearest.view_as(weight), rtol=0, atol=0.02 * float(scale.max()))
        assert layer.weight.numel() == weight.numel() // 2
    assert lora.count_parameters(model.decoder) == lora.count_parameters(base.decoder) + sum(
        tensor.numel() for tensor in model_tensors(model).values()
    )


@needs_4_bits
def test_rows_that_are_no_whole_blocks_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes as bnb

    monkeypatch.setitem(DECODERS, "llama", {**DECODERS["llama"], "dim": 64, "ffn": 96})
    model, _ = adapted("llama", bits=4)
    widths = {isinstance(m, bnb.nn.Linear4bit): m.in_features for m in model.decoder.lm.modules() if is_base(m)}
    assert widths == {True: 64, False: 96}


def is_base(module: torch.nn.Module) -> bool:
    """A linear layer that is no part of an adapter."""
    return isinstance(module, torch.nn.Linear) and module.in_features >= 64 and module.out_features >= 64


@needs_4_bits
def test_adapters_on_4_bits_learn_after_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captioning must not turn the weights into a form that gradients do not pass."""
    monkeypatch.setitem(DECODERS, "llama", {**DECODERS["llama"], "dim": 64, "ffn": 128})
    model, _ = adapted("llama", bits=4)
    before = logits(model)
    for _ in range(2):
        set_modes(model, Stage(), from_scratch=True)
        model.zero_grad()
        model(**views()).logsumexp(-1).sum().backward()
        first = [p.grad for name, p in model.named_parameters() if ".layers.0." in name and lora.is_adapter(name)]
        assert first and all(gradient is not None and gradient.abs().sum() > 0 for gradient in first)
        assert torch.equal(logits(model), before)

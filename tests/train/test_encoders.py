"""Every encoder of the table against transformers' own model and image processor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecap.runtime.errors import UsageError
from edgecap.train.data.batches import encoder_digest
from edgecap.train.models import ENCODERS, build_model
from edgecap.train.models.encoders import Encoder
from edgecap.train.state import digest, fingerprint

from .encoder_parts import PARTS, SIDE, Part, drawn

BRIDGE, DECODER = {"kind": "linear", "dim": 16}, {"kind": "gru", "hidden": 24, "embed": 16, "heads": 2}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest) -> Part:
    return PARTS[request.param]


def make(part: Part, source: Path | None = None, features: str = "grid", **config) -> Encoder:
    torch.manual_seed(1)
    said = config if source else {**part.config, **config}
    return ENCODERS[part.kind](source and str(source), said, features).eval()


def see(encoder: Encoder, pixels: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels))


def theirs(part: Part, model, processor, pixels: np.ndarray, features: str) -> torch.Tensor:
    """What transformers makes of the pictures: [N, L, dim]."""
    ready = processor(list(pixels), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(torch.as_tensor(ready).float())
    states = out.last_hidden_state
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
    if features == "grid":
        return states[:, part.first :]
    if "image_embeds" in out:
        return out.image_embeds.unsqueeze(1)
    if part.kind == "siglip":
        return out.pooler_output.unsqueeze(1)
    return states[:, :1] if part.first else states.mean(1, keepdim=True)


def test_every_encoder_of_the_table_is_tested() -> None:
    assert {part.kind for part in PARTS.values()} == {kind for kind in ENCODERS if kind != "small"}


@pytest.mark.parametrize("features", ["grid", "pooled"])
def test_features_are_transformers(part: Part, features: str, tmp_path: Path) -> None:
    """By directory, with its image processor's mean and std; and rebuilt from its settings without the directory."""
    import transformers

    model = part.source()
    model.save_pretrained(tmp_path)
    processor = getattr(transformers, part.processor)(image_mean=MEAN, image_std=STD)
    processor.save_pretrained(tmp_path)
    encoder, pixels = make(part, tmp_path, features), drawn(2)
    seen = see(encoder, pixels)
    assert seen.shape == (2, part.grid if features == "grid" else 1, encoder.dim)
    torch.testing.assert_close(seen, theirs(part, model, processor, pixels, features), atol=2e-4, rtol=1e-4)
    again = ENCODERS[part.kind](None, json.loads(json.dumps(encoder.settings())), features).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(see(again, pixels), seen)
    assert again.settings() == encoder.settings()
    assert again.mean == encoder.mean and again.std == encoder.std


def test_the_usual_mean_and_std_are_left_unsaid(part: Part, tmp_path: Path) -> None:
    part.source().save_pretrained(tmp_path)
    encoder = make(part, tmp_path)
    assert "image_mean" not in encoder.settings() and (encoder.mean, encoder.std) == (make(part).mean, make(part).std)
    said = make(part, tmp_path, image_mean=MEAN, image_std=STD)  # the directory does not say
    assert (said.mean, said.std) == (tuple(MEAN), tuple(STD))


def test_no_weight_is_idle(part: Part) -> None:
    """A weight without a gradient would stop training on several GPUs."""
    for features in ("grid", "pooled"):
        encoder = make(part, features=features).train()
        encoder(torch.from_numpy(drawn(4, 64 if encoder.size is None else SIDE))).square().sum().backward()
        idle = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
        assert not idle, idle


def test_running_statistics_are_slow(part: Part) -> None:
    """The statistics of the photos that were seen, not of the last batch."""
    norms = [m for m in make(part).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)
    assert bool(norms) == (part.kind in ("mobilenet_v2", "efficientnet"))


def test_the_signal_lives_from_scratch(part: Part) -> None:
    """In training, features of different photos differ by about as much as they are large."""
    encoder = make(part).train()
    seen = see(encoder, drawn(8, 64 if encoder.size is None else SIDE))
    assert seen.std(0).mean() > 0.05 * seen.abs().mean() and seen.abs().mean() > 0.05


def test_another_model_is_refused_in_one_line(part: Part, tmp_path: Path) -> None:
    other = PARTS["vit" if part.kind not in ("vit", "dino") else "clip"]
    other.source().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="encoder.kind needs a") as caught:
        make(part, tmp_path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"wings": 2}, "wings"),
        ({"image_mean": [0.5, 0.5]}, "image_mean = .* must be three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std = .* must be above 0"),
        ({"image_mean": "half"}, "image_mean = .* must be three numbers"),
    ],
)
def test_wrong_settings_are_one_line(part: Part, config: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make(part, **config)
    assert "\n" not in caught.value.message


def test_unknown_features_are_one_line(part: Part) -> None:
    with pytest.raises(UsageError, match="encoder.features = 'corners' is unknown; choices: grid, pooled"):
        make(part, features="corners")


def test_photos_of_another_size(part: Part, tmp_path: Path) -> None:
    """Conv nets take them; transformers say what they take, and take another size with interpolated positions."""
    encoder = make(part)
    if encoder.size is None:
        assert see(encoder, drawn(1, 2 * SIDE)).shape[1] == 4 * part.grid
        return
    with pytest.raises(UsageError, match="photos of 32 × 32, not 64 × 64: --set data.image_size=32"):
        see(encoder, drawn(1, 64))
    model = part.source()
    model.save_pretrained(tmp_path)
    larger = make(part, tmp_path, image_size=48)
    pixels = drawn(2, 48)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) * larger.scale + larger.shift
    interpolate = {} if part.model == "Dinov2Model" else {"interpolate_pos_encoding": True}  # DINOv2 always does
    with torch.no_grad():
        expected = model(x, **interpolate).last_hidden_state[:, part.first :]
    torch.testing.assert_close(see(larger, pixels), expected, atol=1e-4, rtol=1e-4)
    assert larger.settings()["image_size"] == 48
    for wrong in (3, "large"):
        with pytest.raises(UsageError, match="image_size = "):
            make(part, tmp_path, image_size=wrong)


@pytest.mark.parametrize("features", ["grid", "pooled"])
def test_clip_loads_from_the_whole_model_and_from_the_vision_model(features: str, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {key: value for key, value in PARTS["clip"].config.items() if key != "projection_dim"}
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=config, text_config=text | {"vocab_size": 9}, projection_dim=24)).eval()
    whole.save_pretrained(tmp_path)
    encoder, pixels = ENCODERS["clip"](str(tmp_path), {}, features).eval(), drawn(2)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) * encoder.scale + encoder.shift
    with torch.no_grad():
        out = whole.vision_model(x)
        expected = out.last_hidden_state[:, 1:]
        if features == "pooled":
            expected = whole.visual_projection(out.pooler_output).unsqueeze(1)
    torch.testing.assert_close(see(encoder, pixels), expected, atol=1e-5, rtol=1e-4)


def test_a_captioner_is_built_of_each(part: Part) -> None:
    """Through the recipe's options, the features it asks for included."""
    for features, rows in (("grid", part.grid), ("pooled", 1)):
        model = build_model(
            encoder={"kind": part.kind, "config": part.config, "features": features},
            bridge=BRIDGE,
            decoder=DECODER,
            vocab_size=9,
            bos_id=1,
            size=(SIDE, SIDE),
        )
        with torch.no_grad():
            assert model.memory(pixels=torch.from_numpy(drawn(2))).shape == (2, rows, 16)


def test_hashes_are_of_names_and_values_and_stay_what_they_are() -> None:
    """Caches of hours and runs that go on are found by them."""
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(2, dtype=torch.int64)}
    raw = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    assert digest(tensors["b"]) == hashlib.sha256(raw["b"]).hexdigest()
    named = b"a" + raw["a"] + b"b" + raw["b"]
    assert fingerprint(tensors, shapes=False) == hashlib.sha256(named).hexdigest()
    told = b"a () torch.int64\n" + raw["a"] + b"b (3, 2) torch.float32\n" + raw["b"]
    assert fingerprint(tensors) == hashlib.sha256(told).hexdigest()


def test_features_are_cached_apart() -> None:
    """The same weights read in two ways, normalised in two, or under two configurations, are not the same features."""
    encoders = [make(PARTS["vit"]), make(PARTS["vit"], features="pooled"), make(PARTS["vit"], image_mean=MEAN)]
    for encoder in encoders[1:]:
        encoder.load_state_dict(encoders[0].state_dict())
    assert len({encoder_digest(encoder, "vit") for encoder in encoders}) == 3
    padded = [make(PARTS["mobilenet_v2"], tf_padding=there) for there in (True, False)]
    padded[1].load_state_dict(padded[0].state_dict())
    assert len({encoder_digest(encoder, "mobilenet_v2") for encoder in padded}) == 2

"""The mlp and prefix bridges against PyTorch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgecap.runtime.errors import UsageError
from edgecap.train.models import BRIDGES, build_model

from .tiny import DECODERS, ENCODER, SIZE


def test_the_mlp_widens_and_narrows() -> None:
    torch.manual_seed(0)
    bridge, features = BRIDGES["mlp"](6, dim=5, hidden=24, tokens=3).eval(), torch.randn(2, 4, 6)
    theirs = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 15))
    theirs[0].load_state_dict(bridge.widen.state_dict())
    theirs[2].load_state_dict(bridge.narrow.state_dict())
    found = bridge(features)
    assert found.shape == (2, 12, 5) and bridge.dim == 5
    # A feature's embeddings lie side by side, in the order of the last layer's rows.
    torch.testing.assert_close(found.view(2, 4, 3, 5), theirs(features).view(2, 4, 3, 5))


def test_the_prefix_is_what_pytorchs_transformer_makes_of_the_constants() -> None:
    torch.manual_seed(0)
    bridge = BRIDGES["prefix"](6, dim=16, length=3, layers=2, heads=4, tokens=2).eval()
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for ours, other in zip(bridge.blocks, theirs.layers, strict=True):
        other.self_attn.in_proj_weight.data.copy_(ours.attend.qkv.weight)
        other.self_attn.in_proj_bias.data.copy_(ours.attend.qkv.bias)
        for mine, yours in (
            (ours.attend.out, other.self_attn.out_proj),
            (ours.feed.up, other.linear1),
            (ours.feed.down, other.linear2),
            (ours.attend_norm, other.norm1),
            (ours.feed_norm, other.norm2),
        ):
            yours.load_state_dict(mine.state_dict())
    features = torch.randn(5, 4, 6)
    seen = bridge.project(features).view(5, 8, 16)
    with torch.no_grad():
        expected = theirs(torch.cat((seen, bridge.constants.expand(5, 3, 16)), 1))[:, 8:]
        torch.testing.assert_close(bridge(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "prefix"])
def test_gradients_reach_all_of_a_bridge(kind: str) -> None:
    torch.manual_seed(0)
    bridge, features = BRIDGES[kind](6, dim=16), torch.randn(2, 4, 6, requires_grad=True)
    bridge(features).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in bridge.parameters())
    assert (features.grad.abs().sum(2) > 0).all()


@pytest.mark.parametrize(
    ("bridge", "tokens"), [({"kind": "mlp", "hidden": 48, "tokens": 2}, 8), ({"kind": "prefix", "length": 3}, 3)]
)
@pytest.mark.parametrize("decoder", ["gru", "llama"])
def test_they_join_any_encoder_and_decoder(bridge: dict, tokens: int, decoder: str) -> None:
    parts = {"encoder": ENCODER, "bridge": {**bridge, "dim": 16}, "decoder": DECODERS[decoder]}
    model = build_model(**parts, vocab_size=20, bos_id=1, size=(SIZE, SIZE))
    pixels = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    with torch.no_grad():
        assert model.memory(pixels=pixels).shape == (2, tokens, 16)  # of a grid of 4
        assert model(torch.ones(2, 3, 4, dtype=torch.long), pixels=pixels).shape == (2, 3, 4, 20)


def test_sizes_that_cannot_be_are_one_line() -> None:
    parts = {"encoder": ENCODER, "decoder": DECODERS["gru"]}
    for bridge, message in (
        ({"kind": "mlp", "tokens": 0}, "tokens must be 1 or more, not 0"),
        ({"kind": "mlp", "hidden": -1}, "recipe .bridge."),
        ({"kind": "prefix", "length": 0}, "length must be 1 or more, not 0"),
        ({"kind": "prefix", "dim": 16, "heads": 3}, "heads .3. must divide dim .16."),
        ({"kind": "prefix", "layers": 1.5}, "layers = 1.5 must be a whole number"),
    ):
        with pytest.raises(UsageError, match=message):
            build_model(**parts, bridge=bridge, vocab_size=9, bos_id=1, size=(SIZE, SIZE))

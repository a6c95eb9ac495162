"""Every encoder of the table as an ONNX graph, fp32 and int8, against torch; and what pruning says of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgecap.export.int8_static import quantize_static
from edgecap.export.pixels import fold_pixels
from edgecap.export.prune_encoder import prune_encoder
from edgecap.export.trunk import trace
from edgecap.runtime.errors import UsageError
from edgecap.train.models import ENCODERS, build_model
from edgecap.train.models.encoders import Encoder

from ..train.encoder_parts import PARTS, SIDE, drawn
from .nets import calibrate, run

CONVOLUTIONAL = ("mobilenet_v2", "efficientnet")
POOLED = ("siglip", "clip")  # whose pooled features have weights of their own


def test_every_encoder_of_the_table_is_exported() -> None:
    assert {part.kind for part in PARTS.values()} == {kind for kind in ENCODERS if kind != "small"}


def traced(encoder: Encoder) -> onnx.ModelProto:
    pixels = torch.from_numpy(drawn(2))
    return trace(encoder, {"pixels": (pixels, {0: "batch"})}, ("features",), 18)


def learn(encoder: Encoder, steps: int = 25) -> None:
    """A little, what colour the quarters of a picture have: int8 says nothing about random convolutions."""
    head = nn.Linear(encoder.dim, 12)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 3e-3)
    encoder.train()
    for step in range(steps):
        pixels = torch.from_numpy(drawn(12, seed=100 + step))
        colours = nn.functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2) / 255 - 0.5, 2).flatten(1) * 4
        optimizer.zero_grad()
        nn.functional.mse_loss(head(encoder(pixels).mean(1)), colours).backward()
        optimizer.step()
    encoder.eval()


@pytest.mark.parametrize("name", [name for name in PARTS if name != "mobilenet_v2"])  # test_passes has its parts
def test_fp32_is_torch_and_int8_is_near(name: str) -> None:
    part, pixels = PARTS[name], drawn(3)
    torch.manual_seed(0)
    encoder = ENCODERS[part.kind](None, part.config).eval()
    if part.kind == "efficientnet":
        learn(encoder)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(pixels)).numpy()
    model = traced(encoder)
    assert not {"IsNaN", "Where", "Gather"} & set(Counter(node.op_type for node in model.graph.node))
    for rows in (3, 1):  # a batch of any size
        np.testing.assert_allclose(run(model, {"pixels": pixels[:rows]})[0], expected[:rows], atol=1e-4)
    assert fold_pixels(model).cost["changed"]
    if part.kind not in CONVOLUTIONAL:  # patches have no border that is padded: exact
        np.testing.assert_allclose(run(model, {"pixels": pixels})[0], expected, atol=1e-4)
    quantized = quantize_static(model, calibrate(model, [{"pixels": photo[None]} for photo in drawn(16, seed=9)]))
    assert quantized.cost["layers"] >= 13
    near = run(model, {"pixels": pixels})[0]
    assert cosine(near, expected) > (0.98 if part.kind == "efficientnet" else 0.999)
    for row in range(3):  # alone as in the batch
        np.testing.assert_allclose(run(model, {"pixels": pixels[row : row + 1]})[0][0], near[row], atol=1e-4)


@pytest.mark.parametrize("name", POOLED)
def test_pooled_features_are_exported(name: str) -> None:
    part, pixels = PARTS[name], drawn(3)
    encoder = ENCODERS[part.kind](None, part.config, "pooled").eval()
    with torch.no_grad():
        expected = encoder(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(run(traced(encoder), {"pixels": pixels})[0], expected, atol=1e-4)


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean cosine of the features, each without its mean."""
    ours, theirs = (rows - rows.mean(-1, keepdims=True) for rows in (ours, theirs))
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return float(((ours * theirs).sum(-1) / norms).mean())


@pytest.mark.parametrize("name", PARTS)
def test_pruning_takes_channels_or_says_in_one_line_that_there_are_none(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="pruning needs it: pip install 'edgecap[export]'")
    part = PARTS[name]
    torch.manual_seed(0)
    model = build_model(
        encoder={"kind": part.kind, "config": part.config},
        bridge={"kind": "linear", "dim": 16},
        decoder={"kind": "gru", "hidden": 24, "embed": 16, "heads": 2},
        vocab_size=9,
        bos_id=1,
        size=(SIDE, SIDE),
    )
    before = sum(parameter.numel() for parameter in model.encoder.parameters())
    if part.kind not in CONVOLUTIONAL:
        with pytest.raises(UsageError, match="--prune") as caught:
            prune_encoder(model, {"encoder": 0.3}, drawn(8), lambda *_: None)
        assert "\n" not in caught.value.message
        return
    prune_encoder(model, {"encoder": 0.3}, drawn(8), lambda *_: None)
    with torch.no_grad():
        assert model.encoder(torch.from_numpy(drawn(2))).shape == (2, part.grid, model.encoder.dim)
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) < before

"""The mlp, prefix and query bridges in the encoder graph: every engine, and int8, against torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgecap.export.graph import save
from edgecap.export.int8_static import quantize_static
from edgecap.export.pixels import fold_pixels
from edgecap.export.trunk import trace
from edgecap.train.models import CaptionModel, build_model

from .nets import DECODERS, SIZE, calibrate, photos, run
from .small_source import cosine

BRIDGES = {
    "mlp": {"kind": "mlp", "dim": 16, "hidden": 48, "tokens": 2},
    "prefix": {"kind": "prefix", "dim": 16, "length": 3, "layers": 1, "heads": 2},
    "query": {"kind": "query", "dim": 16, "queries": 3, "layers": 1, "heads": 2, "ffn": 24},
}


@pytest.fixture(scope="module", params=BRIDGES)
def model(request: pytest.FixtureRequest, small: None) -> CaptionModel:
    torch.manual_seed(0)
    made = build_model(
        encoder={"kind": "small", "config": {}},
        bridge=BRIDGES[request.param],
        decoder=DECODERS["llama"],
        vocab_size=20,
        bos_id=1,
        size=(SIZE, SIZE),
    )
    with torch.no_grad():
        for parameter in made.bridge.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return made


@pytest.fixture(scope="module")
def graph(model: CaptionModel) -> onnx.ModelProto:
    pair = model.graphs()
    return trace(pair.encoder, pair.encoder_inputs, pair.encoder_outputs, 18)


def torch_says(model: CaptionModel, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.photo(pixels=torch.from_numpy(pixels))["prefix"].numpy()  # [N, L, dim]


def near(found: np.ndarray, wanted: np.ndarray, least: float) -> None:
    assert found.shape == wanted.shape
    assert cosine(*(rows.reshape(-1, rows.shape[-1]) for rows in (found, wanted))) >= least


def test_onnx_in_batches_of_any_size_and_int8(model: CaptionModel, graph: onnx.ModelProto) -> None:
    for count in (1, 5):
        pixels = photos(count, seed=count)
        np.testing.assert_allclose(run(graph, {"pixels": pixels})[0], torch_says(model, pixels), atol=2e-5)
    whole = onnx.ModelProto.FromString(save(graph))
    fold_pixels(whole)
    result = quantize_static(whole, calibrate(whole, [{"pixels": photo[None]} for photo in photos(16, seed=1)]))
    assert result.cost["layers"] >= 7  # the convolutions, the bridge's matrices and the decoder's projection
    pixels = photos(4, seed=9)
    near(run(whole, {"pixels": pixels})[0], torch_says(model, pixels), 0.97)


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino: pip install 'edgecap[openvino]'")
def test_openvino(model: CaptionModel, graph: onnx.ModelProto, tmp_path: Path) -> None:
    import openvino as ov

    from edgecap.export.openvino_graphs import convert

    compiled = ov.Core().compile_model(convert(graph, tmp_path / "x.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = photos(3, seed=2)
    np.testing.assert_allclose(compiled(pixels)[0], torch_says(model, pixels), atol=1e-4)


@pytest.mark.skipif(find_spec("coremltools") is None, reason="needs coremltools: pip install 'edgecap[coreml]'")
def test_core_ml(model: CaptionModel, tmp_path: Path) -> None:
    from edgecap.export import coreml
    from edgecap.export.coreml_program import Program
    from edgecap.train.quiet import quiet

    with quiet():
        module, described = coreml._encoder(model, model.graphs())
        coreml.convert(module, described, "iOS16").save(str(tmp_path / "encoder.mlpackage"))
    pixels = photos(1, seed=2)
    found = Program(tmp_path / "encoder.mlpackage").predict({"image": pixels[0]})["prefix"]
    near(found, torch_says(model, pixels), 0.9999)

"""Export needs torch and onnx; a small encoder joins the table so that no test traces a whole MobileNet twice."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

for module in ("torch", "transformers", "accelerate", "onnx", "onnxscript"):
    pytest.importorskip(module, reason=f"export tests need {module}: pip install 'edgecap[export]'")


@pytest.fixture(scope="session", autouse=True)
def small():
    """ENCODERS["small"] for this session."""
    from edgecap.train.models.encoders import ENCODERS

    from .nets import small_encoder

    ENCODERS["small"] = small_encoder
    yield
    del ENCODERS["small"]


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Trace a model once for all targets, tests and processes of the session: tracing is most of an export's time. For
    Core ML, which traces it in its own way, once for all precisions of one process."""
    import onnx
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from edgecap.export import artifact, coreml
    from edgecap.export.trunk import OnnxPair
    from edgecap.train.models.keep_16bit import is_large

    original, convert, own = artifact.to_onnx, coreml.convert, tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traced"
    folder.mkdir(exist_ok=True)
    converted: dict[str, Any] = {}

    def to_onnx(model: Any, *, framed: bool = False, report: Any = lambda done: None, **options: Any) -> Any:
        if is_large(model):  # its weights lie in files of the export's own
            return original(model, framed=framed, report=report, **options)
        place = folder / fingerprint(model, framed, model.size)
        if place.exists():
            report(1), report(2)
        else:
            pair = original(model, framed=framed, report=report, **options)
            graphs = [graph.SerializeToString() for graph in (pair.encoder, pair.decoder)]
            mine = folder / f"{place.name}.{os.getpid()}"
            mine.write_bytes(pickle.dumps((graphs, pair.session, pair.passes)))
            mine.replace(place)
        graphs, session, passes = pickle.loads(place.read_bytes())
        return OnnxPair(*map(onnx.load_from_string, graphs), session, passes)

    def convert_once(module: Any, described: dict[str, Any], target: str) -> Any:
        key = fingerprint(module, target, [tuple(each.shape) for each in described["example"]])
        if key not in converted:
            converted[key] = convert(module, described, target)
        return converted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "to_onnx", to_onnx)
        patch.setattr(coreml, "convert", convert_once)
        # torch collects its translations of operators anew for each graph, a seventh of the time of a small one.
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield original, convert


@pytest.fixture
def trace_anew(traced_once: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called where tracing itself is tested: from there to the test's end nothing is taken from before."""
    from edgecap.export import artifact, coreml

    def forget() -> None:
        monkeypatch.setattr(artifact, "to_onnx", traced_once[0])
        monkeypatch.setattr(coreml, "convert", traced_once[1])

    return forget


def fingerprint(model: Any, *facts: Any) -> str:
    """Of all that makes a model's graphs: its modules with their settings, and every weight to the last bit."""
    import torch

    found = hashlib.sha256(repr((facts, model)).encode())
    for name, module in model.named_modules():
        plain = bool | int | float | str | tuple | list | dict
        own = {key: value for key, value in vars(module).items() if key[0] != "_" and isinstance(value, plain)}
        own.pop("training")
        config = getattr(module, "config", None)
        found.update(repr((name, sorted(own.items()), config.to_dict() if hasattr(config, "to_dict") else 0)).encode())
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found.update(repr((key, tensor.dtype, tensor.shape)).encode())
            found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, small: None) -> Callable[[str], Any]:
    """Kind of decoder → its Source, traced once for all tests that build targets of it."""
    from .small_source import small_source

    made: dict[str, Any] = {}

    def source(kind: str) -> Any:
        if kind not in made:
            made[kind] = small_source(tmp_path_factory.mktemp("source"), kind)
        return made[kind]

    return source

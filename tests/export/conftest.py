"""Export needs torch and onnx; a small encoder joins the table so that no test traces a whole MobileNet twice."""

from __future__ import annotations

from collections.abc import Callable
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

"""Export needs torch and onnx; a small encoder joins the table so that no test traces a whole MobileNet twice."""

from __future__ import annotations

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

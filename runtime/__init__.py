"""A bundle and a photo in, a caption out. No torch: numpy, Pillow, tokenizers and the bundle's engine.

```python
from edgecap.runtime import Captioner
caption = Captioner.load("x.edgecap")("photo.jpg", beam=3)
print(caption.text, caption.logprob)
```
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BundleError, EdgecapError, MissingExtra, UsageError

# Official builds of ONNX Runtime ≥ 1.29 send telemetry to Microsoft (sessions, hashes of models, a device id that they
# keep on disk). Nothing here may do that unasked; what the user has set stays. It counts before the first import only.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# OpenVINO and NNCF report their imports and conversions to Google Analytics through this package, which knows no such
# variable; where it cannot be imported they do without.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from .backends import BACKENDS, load_model
    from .bundle import Bundle, write_bundle
    from .captioner import Caption, Captioner, Options
    from .decode import CancelToken, DecodeOptions, Hypothesis
    from .preprocess import Preprocess, load_image
    from .session import Model, Session
    from .streaming import AsyncStream, Stream
    from .tokenizer import Tokenizer
    from .verify import Verification, verify_golden

__all__ = [
    "AsyncStream",
    "BACKENDS",
    "Bundle",
    "BundleError",
    "CancelToken",
    "Caption",
    "Captioner",
    "DecodeOptions",
    "EdgecapError",
    "Hypothesis",
    "MissingExtra",
    "Model",
    "Options",
    "Preprocess",
    "Session",
    "Stream",
    "Tokenizer",
    "UsageError",
    "Verification",
    "load_image",
    "load_model",
    "verify_golden",
    "write_bundle",
]

# Imported when first asked for: `edgecap --help` needs the errors, and neither numpy nor Pillow.
# A name that is also a module's (the function decode.decode) cannot be here: the module would win.
_MODULES = {
    "backends": ("BACKENDS", "load_model"),
    "bundle": ("Bundle", "write_bundle"),
    "captioner": ("Caption", "Captioner", "Options"),
    "decode": ("CancelToken", "DecodeOptions", "Hypothesis"),
    "preprocess": ("Preprocess", "load_image"),
    "session": ("Model", "Session"),
    "streaming": ("AsyncStream", "Stream"),
    "tokenizer": ("Tokenizer",),
    "verify": ("Verification", "verify_golden"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value

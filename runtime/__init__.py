"""A bundle and a photo in, a caption out. No torch: numpy, Pillow, tokenizers and the bundle's engine.

```python
from edgecap.runtime import Captioner
caption = Captioner.load("x.edgecap")("photo.jpg", beam=3)
print(caption.text, caption.logprob)
```
"""

from __future__ import annotations

from .backends import BACKENDS, load_model
from .bundle import Bundle, write_bundle
from .captioner import Caption, Captioner
from .decode import DecodeOptions, Hypothesis, decode
from .errors import EdgecapError, MissingExtra, UsageError
from .preprocess import Preprocess, load_image
from .session import Model, Session
from .tokenizer import Tokenizer

__all__ = [
    "BACKENDS",
    "Bundle",
    "Caption",
    "Captioner",
    "DecodeOptions",
    "EdgecapError",
    "Hypothesis",
    "MissingExtra",
    "Model",
    "Preprocess",
    "Session",
    "Tokenizer",
    "UsageError",
    "decode",
    "load_image",
    "load_model",
    "write_bundle",
]

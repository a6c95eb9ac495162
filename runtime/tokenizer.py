"""Text to ids and back: a thin wrapper over the `tokenizers` library (tokenizer.json)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import BundleError

# Words as captions are learnt: "don't" is "do n't", "dog's" is "dog 's"; "t-shirt" and "2.5" stay whole.
_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\bcan(?=not\b)|\w+(?:[-.,/]\w+)*|[#&]")


def plain_words(text: str) -> str:
    """Text in the form captions are learnt in: lower case, single spaces, no punctuation."""
    return " ".join(_WORD.findall(text.lower().replace("’", "'")))


class Tokenizer:
    """A tokenizer.json. BOS, EOS and the rest are never added here: they belong to session and decoder."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner  # tokenizers.Tokenizer, for training and export

    @classmethod
    def load(cls, source: str | Path | bytes) -> Tokenizer:
        """Read a tokenizer.json (a path, or its bytes). Raises BundleError if it is not one."""
        from tokenizers import Tokenizer as Inner

        name = "tokenizer.json" if isinstance(source, bytes) else str(source)
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            inner = Inner.from_str(data.decode("utf-8"))
            # What the file says of these would cut a prompt or fill it up, to any length that it likes.
            inner.no_truncation()
            inner.no_padding()
            return cls(inner)
        except OSError as error:
            raise BundleError(f"cannot read {name}: {error.strerror}") from None
        except BaseException as error:  # tokenizers raises plain Exception, and a panic of its Rust is none
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise BundleError(f"{name} is not a tokenizer of the tokenizers library: {str(error)[:300]}") from None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS or EOS."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are skipped."""
        return self.inner.decode(list(ids), skip_special_tokens=True).strip()

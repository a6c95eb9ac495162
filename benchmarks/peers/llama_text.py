"""llama.cpp's text models by llama.h: opened, and fed tokens or embeddings."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

from ...runtime.errors import EdgecapError

if TYPE_CHECKING:
    import numpy as np


def opened(file: bytes) -> tuple[Any, Any, Any]:
    """The library, silenced, what keeps it so, and a GGUF's model in it."""
    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *_: None)  # llama.cpp keeps only its address
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(file, settings)
    if not model:
        raise EdgecapError(f"llama.cpp cannot load {os.fsdecode(file)}")
    return lib, quiet, model


def built_with(lib: Any) -> str:
    """What the engine was compiled to use: how fast it is hangs on that."""
    return " ".join(lib.llama_print_system_info().decode().strip(" |").split())


def feed(lib: Any, context: Any, given: np.ndarray, place: int) -> int:
    """Tokens [T] or embeddings [T, dim] from a position on; logits of the last. The next position."""
    import numpy as np

    count = len(given)
    places, ones = np.arange(place, place + count, dtype=np.int32), np.ones(count, np.int32)
    row, wanted = np.zeros(1, np.int32), np.zeros(count, np.int8)
    wanted[-1] = 1
    rows = np.full(count, row.ctypes.data, np.uintp)
    embedded = given.ndim == 2
    batch = lib.llama_batch(
        n_tokens=count,
        token=None if embedded else pointer(given, ctypes.c_int32),
        embd=pointer(given, ctypes.c_float) if embedded else None,
        pos=pointer(places, ctypes.c_int32),
        n_seq_id=pointer(ones, ctypes.c_int32),
        seq_id=pointer(rows, ctypes.POINTER(ctypes.c_int32)),
        logits=pointer(wanted, ctypes.c_int8),
    )
    if code := lib.llama_decode(context, batch):
        raise EdgecapError(f"llama.cpp failed with code {code}")
    return place + count


def pointer(array: np.ndarray, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

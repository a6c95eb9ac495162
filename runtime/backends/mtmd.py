"""An image encoder in llama.cpp (its mtmd library): photos → prefix embeddings, from an mmproj GGUF."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp as lib
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

from ..errors import EdgecapError, UsageError
from .llama import LlamaModel, callback, clear_error, last_error, threads_now

if TYPE_CHECKING:
    from ..session import Pixels


class MtmdEncoder:
    """Photos of the encoder's own size only: mtmd would scale others its own way.

    side: that size, where it is known. bias [dim] is added to what the file gives. Raises EdgecapError if llama.cpp
    cannot load the file, or it does not fit the decoder.
    """

    def __init__(self, path: Path, decoder: LlamaModel, bias: np.ndarray, side: int | None = None) -> None:
        self.decoder, self.bias, self.side = decoder, bias.astype(np.float32), side
        vocabulary = lib.llama_model_get_vocab(decoder.pointer)
        if lib.llama_vocab_type(vocabulary) == lib.LLAMA_VOCAB_TYPE_NONE:  # looking for a marker would end the process
            raise EdgecapError(f"{path} needs a decoder that names its words; export the bundle again")
        for quiet in (mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            quiet(callback, ctypes.c_void_p(0))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        self.threads = params.n_threads = threads_now(decoder.threads)
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # on CPUs it adds up in half precision
        clear_error()
        self.pointer = mtmd.mtmd_init_from_file(os.fsencode(path), decoder.pointer, params)
        if not self.pointer:
            raise EdgecapError(f"{path} cannot be loaded by llama.cpp ({last_error()[:200]}); export the bundle again")
        weakref.finalize(self, mtmd.mtmd_free, self.pointer)
        self._text = mtmd.mtmd_default_marker()
        self._lock = threading.Lock()  # a context holds the output of the last photo

    def __call__(self, pixels: Pixels) -> np.ndarray:
        """Photos uint8 [N, H, W, 3] → float32 [N, L, dim]. UsageError for another size."""
        if self.side and pixels.shape[1:3] != (self.side, self.side):
            raise UsageError(f"llama.cpp's encoder sees photos of {self.side} px only: leave image_size out")
        if threads_now(self.threads) != self.threads:
            raise UsageError(
                "llama.cpp's encoder lost its threads when this process was forked: load the bundle again here, or "
                "start processes by 'spawn'"
            )
        with self._lock:
            return np.stack([self._encode(np.ascontiguousarray(photo)) for photo in pixels]) + self.bias

    def _encode(self, photo: np.ndarray) -> np.ndarray:
        height, width, _ = photo.shape
        data = photo.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, data)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            text = mtmd.mtmd_input_text(self._text, len(self._text), False, True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            clear_error()
            if mtmd.mtmd_tokenize(self.pointer, chunks, ctypes.byref(text), bitmaps, 1):
                raise EdgecapError(f"llama.cpp cannot prepare the photo ({last_error()[:200]})")
            # Tiles of the picture, then the whole picture, with words between them that are not used.
            parts = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
            whole = [p for p in parts if mtmd.mtmd_input_chunk_get_type(p) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE][-1]
            if mtmd.mtmd_encode_chunk(self.pointer, whole):
                raise EdgecapError(f"llama.cpp cannot encode the photo ({last_error()[:200]})")
            shape = (mtmd.mtmd_input_chunk_get_n_tokens(whole), self.decoder.dim)
            return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.pointer), shape).copy()
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

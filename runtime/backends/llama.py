"""llama.cpp below the gguf backend: a model file, and contexts in which rows of tokens are decoded side by side.

Everything that would make llama.cpp abort the process (a position the model has not, too many sequences) is checked
here first.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp as lib
import numpy as np

from ..errors import EdgecapError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 512  # tokens of one call
MICRO_BATCH = 128  # tokens computed at once: how large the buffers are
MAX_ROWS: int = lib.llama_max_parallel_sequences()  # of one context
ERROR, CONTINUED = 4, 5  # levels of llama.cpp's log

_threaded = False  # whether llama.cpp has computed here with threads, which OpenMP keeps
# Whether those stayed behind in the process that forked this one: OpenMP would wait for them for ever.
_orphaned = False

_last = threading.local()  # llama.cpp complains in the thread that called it; others may be at work


def _keep_error(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        _last.error = text.decode("utf-8", "replace").strip()


callback = lib.llama_log_callback(_keep_error)  # llama.cpp keeps only its address


def threads_now(threads: int) -> int:
    """How many of so many threads a computation may have: one in a process that was forked from one that had more."""
    global _threaded
    if _orphaned:
        return 1
    _threaded = _threaded or threads > 1
    return threads


def _in_child() -> None:
    global _orphaned
    _orphaned = _orphaned or _threaded


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def clear_error() -> None:
    _last.error = ""


def last_error() -> str:
    """What llama.cpp complained about last since `clear_error`, without its function's name."""
    return getattr(_last, "error", "").rpartition(": ")[2] or "no reason given"


class LlamaModel:
    """A GGUF file's weights, shared by all contexts.

    threads: None takes as many as this process has CPUs. Raises EdgecapError if llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise UsageError(f"threads must be a whole number from 1 to 1024, not {threads!r}")
        self.threads = threads or _cpus()
        lib.llama_log_set(callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        clear_error()
        self.pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise EdgecapError(f"{path} cannot be loaded by llama.cpp ({last_error()[:200]}); export the bundle again")
        weakref.finalize(self, lib.llama_model_free, self.pointer)
        self.dim: int = lib.llama_model_n_embd(self.pointer)
        self.positions: int = lib.llama_model_n_ctx_train(self.pointer)
        self.vocab_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.pointer))


class Pool:
    """Contexts of one model: making one takes as long as decoding a word, so those given back are used again."""

    def __init__(self, model: LlamaModel) -> None:
        self.model = model
        self._idle: list[Context] = []
        self._lock = threading.RLock()  # a dropped session gives its contexts back wherever it is collected

    def take(self, cells: int, rows: int) -> Context:
        """An empty context with room for so many tokens and rows."""
        with self._lock:
            fitting = [each for each in self._idle if each.cells >= cells and each.rows >= rows]
            if self._idle:  # one too small makes place for a larger one
                best = min(fitting or self._idle, key=lambda each: each.cells)
                self._idle.remove(best)
                if fitting:
                    return best
        return Context(self.model, cells, rows)

    def give_back(self, contexts: list[Context]) -> None:
        """Contexts that are no longer needed; empties the list."""
        for context in contexts:
            context.clear()
        with self._lock:
            self._idle += contexts
        contexts.clear()


class Context:
    """A KV cache of `cells` tokens shared by up to `rows` sequences: what rows have in common is stored once."""

    def __init__(self, model: LlamaModel, cells: int, rows: int) -> None:
        self.model = model
        self.cells, self.rows = cells, rows = _power_of_two(cells), min(_power_of_two(rows), MAX_ROWS)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, BATCH, MICRO_BATCH
        params.n_seq_max, params.kv_unified = rows, True
        self.threads = params.n_threads = params.n_threads_batch = threads_now(model.threads)
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # on CPUs it adds up in half precision
        params.no_perf = True
        clear_error()
        self.pointer = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise EdgecapError(f"llama.cpp has no memory for {cells} tokens in {rows} rows ({last_error()[:200]})")
        weakref.finalize(self, lib.llama_free, self.pointer)
        self.memory = lib.llama_get_memory(self.pointer)

    def clear(self) -> None:
        lib.llama_memory_clear(self.memory, False)

    def grown(self, cells: int, rows: int) -> Context:
        """A larger context with the same contents, or this one where it is large enough."""
        if cells <= self.cells and rows <= self.rows:
            return self
        larger = Context(self.model, max(self.cells, cells), max(self.rows, rows))
        size = lib.llama_state_get_size(self.pointer)
        state = (ctypes.c_uint8 * size)()
        written = lib.llama_state_get_data(self.pointer, state, size)
        if lib.llama_state_set_data(larger.pointer, state, written) != written:
            raise EdgecapError(f"llama.cpp cannot enlarge its cache to {cells} tokens in {rows} rows")
        return larger

    def copy(self, parent: int, row: int) -> None:
        """Let the empty `row` continue what `parent` holds."""
        lib.llama_memory_seq_cp(self.memory, parent, row, -1, -1)

    def saved(self, row: int) -> bytes:
        """What a row holds."""
        size = lib.llama_state_seq_get_size(self.pointer, row)
        state = (ctypes.c_uint8 * size)()
        return bytes(memoryview(state)[: lib.llama_state_seq_get_data(self.pointer, state, size, row)])

    def load(self, row: int, saved: bytes) -> None:
        """Let an empty row hold what another one did."""
        state = (ctypes.c_uint8 * len(saved)).from_buffer_copy(saved)
        if not lib.llama_state_seq_set_data(self.pointer, state, len(saved), row):
            raise EdgecapError("llama.cpp cannot take up a text that it has read before")

    def drop(self, row: int) -> None:
        lib.llama_memory_seq_rm(self.memory, row, -1, -1)

    def decode(
        self, inputs: NDArray[np.int32] | NDArray[np.float32], positions: NDArray[np.int32], rows: NDArray[np.int32]
    ) -> None:
        """Feed tokens [T] or embeddings [T, dim], each at its position and to its row; no logits."""
        self._decode(inputs, positions, rows, np.zeros(len(rows), np.int8))

    def logits(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        rows: NDArray[np.int32],
        wanted: NDArray[np.int8] | None = None,
    ) -> NDArray[np.float32]:
        """Feed tokens [T] and return logits [K, vocab] of those where `wanted` is 1 (default: all)."""
        wanted = np.ones(len(tokens), np.int8) if wanted is None else wanted
        found = self._decode(tokens, positions, rows, wanted)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _decode(
        self, inputs: np.ndarray, positions: np.ndarray, rows: np.ndarray, wanted: np.ndarray
    ) -> list[NDArray[np.float32]]:
        if len(positions) and positions.max() >= self.model.positions:
            raise EdgecapError(
                f"the decoder has {self.model.positions} positions for photo, prompt and caption together: "
                "ask for a shorter caption (max_length)"
            )
        found = []
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            found.append(self._call(inputs[part], positions[part], rows[part], wanted[part]))
        return found

    def _call(
        self, inputs: np.ndarray, positions: np.ndarray, rows: np.ndarray, wanted: np.ndarray
    ) -> NDArray[np.float32]:
        count = len(rows)
        inputs, positions, rows, wanted = (np.ascontiguousarray(each) for each in (inputs, positions, rows, wanted))
        one = np.ones(count, np.int32)
        each_row = rows.ctypes.data + rows.itemsize * np.arange(count, dtype=np.uintp)  # pointers to lists of one row
        embedded = inputs.ndim == 2
        batch = lib.llama_batch(
            n_tokens=count,
            token=None if embedded else _pointer(inputs, ctypes.c_int32),
            embd=_pointer(inputs, ctypes.c_float) if embedded else None,
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(one, ctypes.c_int32),
            seq_id=_pointer(each_row, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(wanted, ctypes.c_int8),
        )
        if (threads := threads_now(self.threads)) != self.threads:
            lib.llama_set_n_threads(self.pointer, threads, threads)
            self.threads = threads
        clear_error()
        code = lib.llama_decode(self.pointer, batch)
        if code:
            raise EdgecapError(f"llama.cpp {lib.__version__} failed with code {code} ({last_error()[:200]})")
        outputs = int(wanted.sum())
        if not outputs:
            return np.zeros((0, self.model.vocab_size), np.float32)
        found = np.empty((outputs, self.model.vocab_size), np.float32)
        ctypes.memmove(found.ctypes.data, lib.llama_get_logits(self.pointer), found.nbytes)
        return found


def _pointer(array: np.ndarray, kind: type) -> ctypes._Pointer:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _power_of_two(value: int) -> int:
    """The next one up."""
    return 1 << (value - 1).bit_length()


def _cpus() -> int:
    """CPUs this process may use: llama.cpp's own default is 4 threads, whatever the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

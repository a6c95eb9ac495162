"""ONNX Runtime sessions whose decoder writes its KV cache in place: buffers bound once, and again when they move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from ..errors import EdgecapError
from ..kv_cache import KVCache
from .onnx import OnnxSession, failed

if TYPE_CHECKING:
    from ..prompt import Segments
    from ..session import Ids, Logits
    from .onnx import OnnxModel

OPENINGS = 16  # fixed texts that a process remembers


class CachedSession(OnnxSession):
    """The state of one batch, whose keys and values lie in buffers that the graph takes as past and as present.

    Beyond `Session` it can read in pieces: `begin` or `open`, then `read` any number of times.
    """

    def __init__(self, model: OnnxModel) -> None:
        super().__init__(model)
        kv = model.roles["kv"]
        kind = model.dtypes[kv[0]["input"]]
        self.cache = KVCache(len(kv), kv[0]["heads"], kv[0]["dim"], model.roles["positions"], kind)
        logits = model.manifest["graphs"]["decoder"]["outputs"][model.roles["logits"]]
        self._logits = (logits["shape"][1], np.dtype(logits["dtype"]))
        self._binding = model.decoder.io_binding()
        self._bound = (-1, 0, 0)  # the cache's version and the rows that the engine was told
        self._inputs: dict[str, np.ndarray] = {}  # what else it was told: written in place while the shapes stay

    def begin(self, rows: int) -> None:
        """Begin with `rows` rows that have read nothing."""
        self.cache.clear(rows)
        self._count = rows

    def open(self, ids: Ids, rows: int) -> None:
        """Begin with `rows` rows that have read the fixed text `ids` [length], which a process computes once."""
        key = tuple(np.asarray(ids).tolist())
        if not key:
            self.begin(rows)
            return
        saved = self.model.openings.get(key)
        if saved is None:
            self.begin(1)
            self.read(np.array([key], np.int64))
            saved = self.cache.save()
            if len(self.model.openings) < OPENINGS:
                self.model.openings[key] = saved
        self.cache.load(saved, rows)
        self._count = rows

    def read(self, ids: Ids, prefix: np.ndarray | None = None) -> Logits:
        """Read on: prefix [rows, places, dim] or None, then ids [rows, length], one of them not empty → next-token
        logits [rows, vocab]. Rows that have read something already read on one by one where it is more than one place:
        the operator takes no batch of them. Raises UsageError beyond the model's positions.
        """
        count = ids.shape[1] + (0 if prefix is None else prefix.shape[1])
        cache = self.cache
        cache.reserve(count)
        if count > 1 and cache.length and cache.rows > 1:
            logits = [self._part(ids, prefix, count, row, row + 1) for row in range(cache.rows)]
        else:
            logits = [self._part(ids, prefix, count, 0, cache.rows)]
        cache.advance(count)
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def prefill(self, prompt_ids: Ids | None = None, segments: Segments | None = None) -> Logits:
        """See `OnnxSession.prefill`."""
        if segments is not None:
            return self._between(segments, prompt_ids)
        prefix, ids = self._first(prompt_ids)
        for name, value in self._fixed.items():
            self._feed(name, value)
        self.begin(len(ids))
        return self.read(ids, prefix)

    def step(self, ids: Ids, parents: Ids) -> Logits:
        """See `Session.step`."""
        order = np.asarray(parents).tolist()
        if order != list(range(self._count)):
            self.cache.reorder(order)
            self._rows = {name: value[parents] for name, value in self._rows.items()}
            self._count = len(order)
        return self.read(np.asarray(ids, np.int64)[:, None])

    def _part(self, ids: Ids, prefix: np.ndarray | None, count: int, start: int, stop: int) -> Logits:
        """Rows start to stop through the graph."""
        model, roles, binding = self.model, self.model.roles, self._binding
        self._bind_cache(start, stop)
        self._feed(roles["ids"]["input"], ids[start:stop])
        self._feed(roles["cache"]["filled"], np.array(self.cache.length + count))
        if "prefix" in roles:
            none = np.zeros((stop - start, 0, roles["prefix"]["dim"]))
            self._feed(roles["prefix"]["input"], none if prefix is None else prefix[start:stop])
        for name, value in self._rows.items():
            self._feed(name, value[start:stop])
        vocab, kind = self._logits
        logits = np.empty((stop - start, vocab), kind)
        binding.bind_ortvalue_output(roles["logits"], ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            model.decoder.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise failed(error) from None
        return logits.astype(np.float32, copy=False)

    def _bind_cache(self, start: int, stop: int) -> None:
        """Tell the engine where the keys and values of these rows lie, where it does not know."""
        if self._bound == (self.cache.version, start, stop):
            return
        for entry, tensor in zip(self.model.roles["kv"], self.cache.tensors(start, stop), strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(tensor)
            if value.data_ptr() != tensor.ctypes.data:
                raise EdgecapError(
                    f"ONNX Runtime {ort.__version__} copies what it should share: install another version"
                )
            self._binding.bind_ortvalue_input(entry["input"], value)
            self._binding.bind_ortvalue_output(entry["output"], value)
        self._bound = (self.cache.version, start, stop)

    def _feed(self, name: str, value: np.ndarray) -> None:
        held = self._inputs.get(name)
        if held is not None and held.shape == value.shape:
            held[...] = value
            return
        self._inputs[name] = held = np.array(value, self.model.dtypes[name], order="C")
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(held))

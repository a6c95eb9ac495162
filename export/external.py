"""Constants of graphs that no ModelProto can hold (2 GB): beside their graph, made whenever a pass reads them.

A graph then has thin tensors, which say type, shape and place. What a place gives is an array, or a function that makes
it: of a torch parameter, or of other places (turned, concatenated), so that a decoder of 7 GB never lies there twice.
The passes know nothing of it: `Graph.constant` and `Graph.set_constant` read and write such tensors like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import onnx
from onnx import TensorProto

from ..runtime.errors import EdgecapError

Maker: TypeAlias = Callable[[], np.ndarray]

SMALLEST = 4096  # bytes of a constant that lies outside (not below graph.BESIDE); smaller ones are shapes and scales
KEY = "edgecap.external"  # the graph's metadata that names its ExternalData
_open: WeakValueDictionary[str, ExternalData] = WeakValueDictionary()
_numbers = count(1)


class ExternalData:
    """The constants of one pair of graphs. folder: where files are written for engines; before: what a copy's graphs
    still read from.

    It lives as long as somebody holds it: an OnnxPair does.
    """

    def __init__(self, folder: Path, before: ExternalData | None = None) -> None:
        self.folder, self.before = folder, before
        self.name = f"{KEY}{next(_numbers)}"
        self._makers: list[Maker] = []
        _open[self.name] = self

    def own(self, model: onnx.ModelProto) -> None:
        """From here on this graph's new constants lie here."""
        del model.metadata_props[:]
        model.metadata_props.add(key=KEY, value=self.name)

    def put(self, name: str, dtype: np.dtype, shape: tuple[int, ...], make: Maker) -> TensorProto:
        """The thin tensor of a constant that `make` gives."""
        self._makers.append(make)
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=self.name)
        tensor.external_data.add(key="offset", value=str(len(self._makers) - 1))
        return tensor


def external_of(model: onnx.ModelProto) -> ExternalData | None:
    """Where a graph's constants lie; None where they are in it."""
    for entry in model.metadata_props:
        if entry.key == KEY:
            return _named(entry.value)
    return None


def maker(tensor: TensorProto) -> Maker | None:
    """What makes a thin tensor's value; None for any other tensor, one with its values in a file among them."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place["location"].startswith(KEY):
        return None
    return _named(place["location"])._makers[int(place["offset"])]


def _named(name: str) -> ExternalData:
    held = _open.get(name)
    if held is None:
        raise EdgecapError(
            "the constants of this graph are gone: they live as long as the pair of graphs that has them"
        )
    return held

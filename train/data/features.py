"""A frozen torch module on ONNX Runtime: on a CPU it looks at photos several times as fast as torch does."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..quiet import quiet

Look: TypeAlias = Callable[[Tensor], Tensor]
OPSET = 18
FAR = 1e-3  # of the largest value: more than this and the engine is not trusted


class Applied(nn.Module):
    """A function of photos as a module, with the module it belongs to."""

    def __init__(self, look: Look, owner: nn.Module) -> None:
        super().__init__()
        self.look, self.owner = look, owner

    def forward(self, pixels: Tensor) -> Tensor:
        return self.look(pixels)


class FeatureExtractor:
    """What looks at photos: `look`, of pixels uint8 [N, H, W, 3] on the device of the frozen module `owner`."""

    def __init__(self, look: Look, owner: nn.Module) -> None:
        self.look, self.owner = look, owner
        self.device = next(owner.parameters()).device
        self.engine: Look | None = None  # of many photos: `look` itself where no faster one could be made

    def quickens(self, pixels: np.ndarray) -> bool:
        """Does a faster engine look at many photos? It is made here, by example `pixels`, if it was not before."""
        if self.engine is None:
            photos, able = torch.from_numpy(pixels), can_quicken(self.device)
            self.engine = quick(self.look, self.owner, photos) if able else self.look
        return self.engine is not self.look

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, *, many: bool = False) -> np.ndarray:
        """uint8 [N, H, W, 3] → float16 [N, ...]; many: part of so many photos that a faster engine is worth it."""
        look = self.engine if many and self.quickens(pixels) else self.look
        return look(torch.from_numpy(pixels).to(self.device)).half().cpu().numpy()


def can_quicken(device: torch.device) -> bool:
    """Whether a faster engine can be tried: on a CPU, with the `export` extra."""
    return device.type == "cpu" and all(find_spec(name) for name in ("onnx", "onnxscript"))


def quick(look: Look, owner: nn.Module, pixels: Tensor) -> Look:
    """`look`, of pixels uint8 [N, H, W, 3] on the CPU, by the frozen module `owner`, through ONNX Runtime; or itself
    where it cannot be exported or the engine gives something else of the example `pixels`."""
    try:
        engine = _engine(Applied(look, owner).eval(), pixels)
        with torch.inference_mode():
            wanted, got = look(pixels), engine(pixels)
    except Exception:  # an exporter raises anything; torch itself always works
        return look
    near = got.shape == wanted.shape and bool((got - wanted).abs().max() <= FAR * wanted.abs().max())
    return engine if near else look


def _engine(module: nn.Module, pixels: Tensor) -> Look:
    import onnxruntime

    with quiet():
        program = torch.onnx.export(
            module,
            (pixels[:1].repeat(3, 1, 1, 1),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            dynamic_shapes={"pixels": {0: torch.export.Dim.DYNAMIC}},
            verbose=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda photos: torch.from_numpy(session.run(None, {"pixels": photos.numpy()})[0])

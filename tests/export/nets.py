"""Small graphs and checkpoints for the export tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from edgecap.export.int8_static import static_statistics
from edgecap.export.statistics import Feeds, Statistics
from edgecap.train.checkpoint import METRICS, RECIPE, TOKENIZER, WEIGHTS, model_for
from edgecap.train.models import encoders
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.state import model_tensors, write_bytes, write_json, write_tensors
from edgecap.train.tokenizer import token_ids, train_tokenizer

SIZE = 32
SCENES = f"scenes:train=24,val=12,test=4,size={SIZE}"


class SmallNet(nn.Module):
    """What a MobileNet is made of, in four layers: TF padding, BatchNorm, ReLU6, depthwise, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.wide = nn.Sequential(depthwise, nn.BatchNorm2d(16), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.last = nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU6())
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = self.stem(nn.functional.pad(x, (0, 1, 0, 1)))
        x = x + self.narrow(self.wide(x))
        return self.last(x).flatten(2).transpose(1, 2)  # [N, L, 24]


class SmallBody(nn.Module):
    """SmallNet as an encoder's body: normalised pixels [N, 3, H, W] → last_hidden_state [N, 24, H/8, W/8]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()
        self.config = SimpleNamespace(to_diff_dict=dict)

    def forward(self, x: torch.Tensor):
        x = self.net.stem(nn.functional.pad(x, (0, 1, 0, 1)))
        x = nn.functional.avg_pool2d(self.net.last(x + self.net.narrow(self.net.wide(x))), 4)
        return SimpleNamespace(last_hidden_state=x)


def small_encoder(source, config, features="grid") -> encoders.Encoder:
    return encoders.Encoder(SmallBody(), 24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


DECODERS = {
    "gru": {"kind": "gru", "hidden": 24, "embed": 16, "heads": 2},
    "lstm": {"kind": "lstm", "hidden": 24, "embed": 16, "heads": 2},
    "transformer": {"kind": "transformer", "dim": 32, "layers": 2, "heads": 4, "ffn": 48},
    "llama": {"kind": "llama", "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48},
    "gpt2": {"kind": "gpt2", "dim": 32, "layers": 2, "heads": 4, "ffn": 48},
    "opt": {"kind": "opt", "dim": 32, "layers": 2, "heads": 4, "ffn": 48},
}


def save_run(folder: Path, decoder: str = "gru", *, finished: bool = True, seed: int = 0) -> Path:
    """A checkpoint with random weights. Needs ENCODERS["small"] (fixture `small`)."""
    from edgecap.benchmarks.datasets import open_dataset
    from edgecap.train.tokenizer import caption_text

    recipe = recipe_from_dict(
        {
            "name": "small",
            "data": {"spec": SCENES, "image_size": SIZE},
            "tokenizer": {"min_count": 1, "max_length": 12},
            "encoder": {"kind": "small"},
            "bridge": {"kind": "linear", "dim": 16},
            "decoder": DECODERS[decoder],
            "decoding": {"max_length": 8},
        }
    )
    captions = [caption_text(c) for example in open_dataset(SCENES).splits["train"] for c in example.captions]
    tokenizer = train_tokenizer(captions, recipe.tokenizer)
    torch.manual_seed(seed)
    model = model_for(recipe, token_ids(tokenizer), load_weights=False)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # captions that differ from photo to photo
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / TOKENIZER, tokenizer.to_str().encode())
    write_bytes(folder / RECIPE, recipe.to_toml().encode())
    write_tensors(folder / WEIGHTS, model_tensors(model), {"format": "pt"})
    write_json(folder / METRICS, {"finished": finished, "best": {"cider": 0.1, "seconds": 3}})
    return folder


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, optimize: bool = True) -> list[np.ndarray]:
    return engine(model, optimize=optimize).run(None, feeds)


def engine(model: onnx.ModelProto, *, optimize: bool = True, save: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def calibrate(model: onnx.ModelProto, feeds: Iterable[Feeds]) -> Statistics:
    """What `quantize_static` asks of calibration, of these inputs."""
    known = static_statistics(model)
    for each in feeds:
        known.add(each)
    return known


def photos(count: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """Smooth random pictures uint8 [N, size, size, 3]."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, size // 8, size // 8, 3))
    fine = coarse.repeat(8, axis=1).repeat(8, axis=2) + random.integers(-20, 21, (count, size, size, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)

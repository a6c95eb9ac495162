"""What a target's build starts from, of a small checkpoint with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgecap.export.artifact import Artifact, Source
from edgecap.export.calibration import Calibration, teacher_force
from edgecap.runtime.backends.onnx import OnnxModel, session_options
from edgecap.train.checkpoint import load_checkpoint

from .nets import photos, save_run


def small_source(folder: Path, decoder: str = "gru") -> Source:
    loaded = load_checkpoint(save_run(folder / decoder, decoder))
    random = np.random.default_rng(1)
    words = [random.integers(4, loaded.tokens["vocab_size"], 7).tolist() for _ in range(8)]
    return Source(loaded, Calibration(photos(8, seed=1), words, loaded.tokens), folder)


def forced_logits(source: Source, artifact: Artifact) -> np.ndarray:
    """Teacher-forced logits of the calibration photos and captions, [positions, vocab]."""
    import onnxruntime as ort

    engines = [
        ort.InferenceSession(artifact.files[f"{part}.onnx"], session_options(1), providers=["CPUExecutionProvider"])
        for part in ("encoder", "decoder")
    ]
    calibration = source.calibration
    manifest = {"session": artifact.session, "tokens": calibration.tokens, "graphs": artifact.graphs}
    return teacher_force(OnnxModel(manifest, *engines).session(), calibration.pixels, calibration.captions)


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean cosine of rows, each without its mean (which softmax ignores)."""
    ours, theirs = (rows - rows.mean(1, keepdims=True) for rows in (ours, theirs))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(1) / norms).mean())

"""Records made up for tests, without measuring anything."""

from __future__ import annotations

from typing import Any

import numpy as np

STAGES = ("preprocess", "encode", "first_token", "ttft", "next_token", "decode", "picture_to_text", "end_to_end")


def made_up_row(name: str = "tiny", *, factor: float = 1.0, seed: int = 0, **more: Any) -> dict:
    """A row whose times scatter by 2% around milliseconds, all of them times `factor`."""
    random = np.random.default_rng(seed)
    medians = {
        stage: (0.001 * (i + 1) * factor * random.lognormal(0, 0.02, 20)).tolist() for i, stage in enumerate(STAGES)
    }
    latency = {
        stage: {"runs": 60, "p50": float(np.median(m)), "p90": max(m), "p99": max(m), "min": min(m)}
        | {"mean": float(np.mean(m))}
        for stage, m in medians.items()
    }
    starts = (0.4 * factor * random.lognormal(0, 0.02, 5)).tolist()
    captions = {
        f"photo {i}": {"text": f"a dog {i}", "logprob": -2.5, "cider": float(c)}
        for i, c in enumerate(random.uniform(0, 1, 12))
    }
    cider = float(np.mean([c["cider"] for c in captions.values()]))
    row = {
        "name": name,
        "kind": "bundle",
        "status": "ok",
        "error": None,
        "sha256": f"{seed:064d}",
        "bytes": {"total": 5_000_000, "graphs": 4_500_000},
        "decoding": {"beam": 1, "max_length": 20},
        "facts": {"target": "onnx-int8", "precision": "int8"},
        "latency": latency
        | {"load": {"runs": 5, "p50": 0.02, "p90": 0.02, "p99": 0.02, "min": 0.02, "mean": 0.02}}
        | {"tokens_per_caption": 9.5, "tokens_per_s": 1 / float(np.median(medians["next_token"]))},
        "rounds": medians,
        "timed_by": "parts",
        "near": {
            "decoder": {"bytes": 2_800_000, "gb_s": 3.0, "share": 0.12},
            "encoder": {"fp32_gop": 0.0, "int8_gop": 0.64, "share": 0.4},
        },
        "operators": {"encoder": {"Conv": 2e-3, "Add": 2e-4}, "decoder": {"MatMul": 4e-4, "Gemm": 1e-4}},
        "speedup": {},
        "times_encode": {},
        "memory": {"peak_rss": 90_000_000, "over_idle": 70_000_000},
        "cold_start": {
            "seconds": float(np.median(starts)),
            "runs": starts,
            "import_s": 0.2,
            "load_s": 0.02,
            "peak_rss": 88_000_000,
            "times_reference": 1.6,
            "rss_over_reference": 20_000_000,
        },
        "quality": {
            "photos": 12,
            "cider": cider,
            "cider_interval": {"mean": cider, "low": cider - 0.1, "high": cider + 0.1, "level": 0.95},
            "cider_d": cider,
            **{f"bleu_{n}": 0.2 for n in range(1, 5)},
            "rouge_l": 0.4,
            "distinct": 0.9,
            "repeated_ngrams": 0.0,
            "mean_length": 9.5,
        },
        "captions": captions,
    }
    return row | more


def made_up_record(*rows: dict[str, Any], created: str = "2026-01-02T03:04:05+00:00") -> dict[str, Any]:
    cpu = {"model": "Test CPU", "isa": "x86_64", "flags": ["avx2"], "cores": 4, "memory_mb": 8000, "system": "Linux 6"}
    return {
        "format": "edgecap-bench",
        "version": 1,
        "created": created,
        "device": {"name": "cpu", "kind": "local", "cpu": cpu, "load": 0.1, "pinned": [0], "memory_limit": None},
        "versions": {"python": "3.11.7", "edgecap": "0.1.0", "numpy": "2.3.5", "pillow": "12", "onnxruntime": "1.31.0"}
        | {"tokenizers": "0.22"},
        "settings": {"threads": 1, "rounds": 20, "min_runs": 30, "min_seconds": 2.0, "warmup": 5, "cold_starts": 5}
        | {"start_seconds": 10.0, "slow_seconds": 1.0}
        | {"memory_photos": 8, "limit_seconds": 0.4, "timeout": 300.0, "omp_wait_policy": "passive"},
        "data": {"spec": "scenes:test=12", "fingerprint": "f" * 64, "split": "test", "photos": 12},
        "limits": {"read_gb_s": 25.0, "fp32_gflops": 90.0, "int8_gops": 190.0},
        "reference": {"imports": ["numpy", "onnxruntime"], "error": None, "seconds": 0.25, "peak_rss": 60_000_000}
        | {"idle_rss": 10_000_000},
        "stopped": None,
        "problems": [],
        "rows": list(rows) or [made_up_row()],
    }

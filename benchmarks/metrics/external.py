"""METEOR and SPICE: Java programs, run through pycocoevalcap where it and Java are installed.

METEOR's jar comes with the package. SPICE downloads Stanford's models on its first run; that download was not
reachable where this was written, so SPICE is untested beyond its call.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Hashable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from ...runtime.errors import EdgecapError, UsageError, need
from .captions import check_same_photos
from .ptb import ptb_tokenize

# name → (module of pycocoevalcap, class)
SCORERS = {"meteor": ("meteor.meteor", "Meteor"), "spice": ("spice.spice", "Spice")}


def require_java(metric: str) -> None:
    """Raise UsageError or MissingExtra in one line when `metric` (a key of SCORERS) cannot run here."""
    need("pycocoevalcap", extra="bench", command=metric.upper())
    if shutil.which("java") is None:
        raise UsageError(
            f"{metric.upper()} needs Java, and there is no `java` on the PATH: install a Java runtime (17)"
        )


def java_metric(metric: str, candidates: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]) -> float:
    """The corpus' METEOR or SPICE (0 to 1), on the same PTB tokens as every other metric.

    Raises UsageError when it cannot run here, EdgecapError when the Java program fails.
    """
    require_java(metric)
    check_same_photos(candidates, references)
    # Numbers for ids: SPICE sorts them and writes them to JSON.
    said = {n: [" ".join(ptb_tokenize(caption))] for n, caption in enumerate(candidates.values())}
    wanted = {n: [" ".join(ptb_tokenize(ref)) for ref in references[i]] for n, i in enumerate(candidates)}
    module, name = SCORERS[metric]
    try:
        with redirect_stdout(sys.stderr):  # they print progress, and standard output may be our JSON
            scorer: Any = getattr(import_module(f"pycocoevalcap.{module}"), name)()
            score, _ = scorer.compute_score(wanted, said)
    except Exception as error:  # a broken pipe, an empty answer, a failed download: all say that Java gave no score
        hint = "; it downloads models on its first run" if metric == "spice" else ""
        raise EdgecapError(f"{metric.upper()} gave no score ({type(error).__name__}: {error}){hint}") from error
    return float(score)

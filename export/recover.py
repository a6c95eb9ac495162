"""`--recover`: where the gate fails, raise the precision of the layers that suffer most until it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from ..runtime.errors import EdgecapError, UsageError
from .graph import PassResult
from .sensitivity import sensitivities

if TYPE_CHECKING:
    from .artifact import Artifact, Source
    from .gate import GateResult

NAME = "recover"
BITS = {"int8": 8, "int4": 4}
BACKENDS = ("onnx", "openvino")  # whose targets follow options.keep by the names of the trunk's layers
NAMED = 4  # layers that a note names


def recover(
    source: Source,
    target_name: str,
    build: Callable[[Source], Artifact],
    gate: Callable[[Artifact], GateResult],
    *,
    first: tuple[Artifact, GateResult] | None = None,
) -> tuple[Artifact, GateResult, PassResult]:
    """Build a target and raise the precision of single layers (options.keep) until the gate holds.

    Each layer's sensitivity is measured by itself (see `sensitivities`); layers are then raised in that order, int4 to
    int8 and, should all of that not do, to fp32; int8 to fp32. Their number is doubled until the gate passes and then
    halved back to find a small one that still does. first: what was built and judged already, without any layer raised.
    Returns the best found; its gate may still have failed, with everything raised.
    Raises UsageError for a target that has nothing to raise.
    """
    bits = layer_bits(target_name)
    source.trunk()  # traced here, once, for all tries
    tries = _Tries(source, build, gate)
    before = tries.at([]) if first is None else tries.remember(*first)
    if before[1].passed:
        return (*before, PassResult(NAME, _params(before[1]), {"raised": [], "gate_runs": tries.runs}))
    found = sensitivities(
        source, bits, progress=lambda done, total: source.progress("measure layers", done, total)
    )  # most sensitive first
    quarters = [each.layer for each in found if bits == 4 and each.bits == 4]  # these have two steps to go
    whole = [f"{each.layer}:fp32" if bits == 4 else each.layer for each in found]

    def kept(count: int) -> list[str]:
        """The first `count` raises; a layer raised to fp32 is no longer one raised to int8."""
        last = whole[: max(0, count - len(quarters))]
        return last + [layer for layer in quarters[:count] if f"{layer}:fp32" not in last]

    total = len(quarters) + len(whole)
    low, high = 0, 1
    best = tries.at(kept(high))
    while not best[1].passed and high < total:
        low, high = high, min(2 * high, total)
        best = tries.at(kept(high))
    if best[0] is before[0]:
        raise EdgecapError(f"--recover cannot raise single layers of {target_name}: use a more precise target")
    while best[1].passed and high - low > max(1, high // 4):
        middle = (low + high) // 2
        tried = tries.at(kept(middle))
        if tried[1].passed:
            high, best = middle, tried
        else:
            low = middle
    errors = {each.layer: each.error for each in found}
    raised = [{"layer": name, "error": errors[name.removesuffix(":fp32")]} for name in kept(high)]
    cost = {
        "raised": raised,
        "layers": len(found),
        "gate_runs": tries.runs,
        "drop_before": before[1].drop.mean,
        "drop_after": best[1].drop.mean,
    }
    return (*best, PassResult(NAME, _params(best[1]), cost))


def layer_bits(target_name: str) -> int:
    """Bits of the layers that can be raised in a target. Raises UsageError where none can be."""
    from .targets import TARGETS

    target = TARGETS[target_name]
    if target.precision not in BITS:
        raise UsageError(f"--recover raises the precision of int8 and int4 layers: {target_name} has none")
    if target.backend not in BACKENDS:
        raise UsageError(f"--recover is for the {' and '.join(BACKENDS)} targets; {target_name} keeps no single layers")
    return BITS[target.precision]


def note(result: PassResult) -> str:
    """One line for the user saying what `recover` did."""
    cost = result.cost
    if not cost["raised"]:
        return "--recover: the gate passes, no layer was raised"
    names = [entry["layer"] for entry in cost["raised"]]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"--recover raised the precision of {len(names)} of {cost['layers']} layers, the most sensitive first "
        f"({', '.join(names[:NAMED])}{more}): CIDEr drop {cost['drop_before']:+.4f} → {cost['drop_after']:+.4f} "
        f"in {cost['gate_runs']} more {'run' if cost['gate_runs'] == 1 else 'runs'} of the gate"
    )


@dataclass
class _Tries:
    """Builds and judges; remembers every artifact, so that nothing is judged twice and none changes under the gate."""

    source: Source
    build: Callable[[Source], Artifact]
    gate: Callable[[Artifact], GateResult]
    known: dict[str, tuple[Artifact, GateResult]] = field(default_factory=dict)
    builds: int = 0
    runs: int = 0

    def at(self, kept: list[str]) -> tuple[Artifact, GateResult]:
        options = replace(self.source.options, keep=self.source.options.keep | frozenset(kept))
        scratch = self.source.scratch / f"recover{self.builds}"  # no build overwrites another's files
        scratch.mkdir()
        self.builds += 1
        artifact = self.build(replace(self.source, options=options, scratch=scratch))
        if _digest(artifact) in self.known:  # raised what this target keeps at that precision anyway
            return self.known[_digest(artifact)]
        self.runs += 1
        return self.remember(artifact, self.gate(artifact))

    def remember(self, artifact: Artifact, result: GateResult) -> tuple[Artifact, GateResult]:
        self.known[_digest(artifact)] = (artifact, result)
        return artifact, result


def _params(result: GateResult) -> dict[str, float]:
    return {"limit": result.limit}


def _digest(artifact: Artifact) -> str:
    found = sha256()
    for name, file in sorted(artifact.files.items()):
        content = file if isinstance(file, bytes) else file.read_bytes()
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()

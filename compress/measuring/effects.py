"""Does a technique do anything here? What it could change on its runtime, and what it did."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.artifacts.artifact import Description
    from compress.measuring.measure import Measurement


AS_FLOATS = ("float", "packed", "integer")
"""Kinds of weights that PyTorch multiplies as floats, however few bytes they take on disk."""
LESS_MEMORY, OF_PEAK = 1.05, 0.02
"""Two processes that load one artifact differ by less: as a factor, and as a share of all that a process has resident,
which a library more or less moves."""


def describe_effects(description: Description, measured: Measurement, baseline: Measurement) -> dict[str, str]:
    """One phrase for each of ``size``, ``speed`` and ``memory``: by what factor it is better than the baseline, and
    where it is not, whether it could be: fewer bytes on disk were promised, or what runs is another runtime, fewer
    weights, or kernels for weights that are no floats."""
    runs_otherwise = (
        not description.runtime.startswith("torch")
        or measured.parameters < baseline.parameters
        or description.weights not in AS_FLOATS
    )
    found = {
        "size": describe_factor(
            "size", any(done.shrinks for done in description.history), baseline.size_bytes / measured.size_bytes, 1.005
        )
    }
    if measured.speedup:
        low, high = measured.speedup.low, measured.speedup.high
        certain = low > 1 or high < 1
        found["speed"] = describe_factor("speed", runs_otherwise, measured.speedup.value if certain else 1.0)
    if measured.memory and baseline.memory:
        before, after = baseline.memory, measured.memory
        clear = abs(before.model_bytes - after.model_bytes) > OF_PEAK * before.peak_bytes
        factor = before.model_bytes / after.model_bytes if clear else 1.0
        found["memory"] = describe_factor("memory", runs_otherwise, factor, LESS_MEMORY)
    return found


def describe_factor(what: str, possible: bool, factor: float, least: float = 1.0) -> str:
    """``factor`` is how many times better; within ``least`` of 1 it is nothing."""
    better, worse = {"size": ("smaller", "larger"), "speed": ("faster", "slower"), "memory": ("less", "more")}[what]
    noun = " memory" if what == "memory" else ""
    if factor > least:
        return f"{factor:.2f}x {better}{noun}" + ("" if possible else ", which nothing here explains")
    if factor < 1 / least:
        return f"{1 / factor:.2f}x {worse}{noun}"
    return f"no {what}" + (", though it could" if possible else "")


def is_only_sparser(description: Description, measured: Measurement, baseline: Measurement) -> bool:
    """Whether weights became zero and nothing else happened that could save anything."""
    share = measured.nonzeros / measured.parameters
    more = share < baseline.nonzeros / baseline.parameters - 0.005
    whole = measured.parameters == baseline.parameters
    return more and whole and description.weights == "float" and description.runtime == "torch"

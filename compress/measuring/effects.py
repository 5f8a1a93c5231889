"""Report whether a technique has an effect: which costs it could lower on its runtime, and which it lowered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.runtimes.runtime import import_runtime

if TYPE_CHECKING:
    from compress.artifacts.artifact import Description
    from compress.measuring.measure import Measurement


AS_FLOATS = ("float", "packed", "integer")
"""Kinds of weights that PyTorch multiplies as floats, whatever their size on disk."""
LESS_MEMORY, OF_PEAK = 1.05, 0.02
"""Two processes that load the same artifact differ by less than this factor and this share of the peak memory.
The share covers changes in the libraries that are loaded."""


def describe_effects(description: Description, measured: Measurement, baseline: Measurement) -> dict[str, str]:
    """Return a phrase for each of ``size``, ``speed`` and ``memory``: the factor over the baseline, or no gain.

    A phrase without a gain states whether a gain was possible. A smaller size is possible if a stage promises fewer
    bytes on disk. Speed and memory can improve on another runtime, with fewer weights, or with kernels for weights that
    are not floats.
    """
    runs_otherwise = (
        import_runtime(description.runtime).STAGE is not None
        or measured.parameters < baseline.parameters
        or description.weights not in AS_FLOATS
    )
    effects = {
        "size": describe_factor(
            "size", any(done.shrinks for done in description.history), baseline.size_bytes / measured.size_bytes, 1.005
        )
    }
    if measured.speedup:
        low, high = measured.speedup.low, measured.speedup.high
        certain = low > 1 or high < 1
        effects["speed"] = describe_factor("speed", runs_otherwise, measured.speedup.value if certain else 1.0)
    if measured.memory and baseline.memory:
        before, after = baseline.memory, measured.memory
        clear = abs(before.model_bytes - after.model_bytes) > OF_PEAK * before.peak_bytes
        factor = before.model_bytes / after.model_bytes if clear else 1.0
        effects["memory"] = describe_factor("memory", runs_otherwise, factor, LESS_MEMORY)
    return effects


def describe_factor(quantity: str, possible: bool, factor: float, least: float = 1.0) -> str:
    """Return the phrase for an improvement by ``factor``. A factor within ``least`` of 1 is no gain."""
    better, worse = {"size": ("smaller", "larger"), "speed": ("faster", "slower"), "memory": ("less", "more")}[quantity]
    noun = " memory" if quantity == "memory" else ""
    if factor > least:
        return f"{factor:.2f}x {better}{noun}" + ("" if possible else ", cause unknown")
    if factor < 1 / least:
        return f"{1 / factor:.2f}x {worse}{noun}"
    return f"no gain in {quantity}" + (", though possible" if possible else "")


def is_only_sparser(description: Description, measured: Measurement, baseline: Measurement) -> bool:
    """Return whether weights became zero and nothing else changed that could lower a cost."""
    share = measured.nonzeros / measured.parameters
    more = share < baseline.nonzeros / baseline.parameters - 0.005
    whole = measured.parameters == baseline.parameters
    return more and whole and description.weights == "float" and description.runtime == "torch"

"""Fine-tune, prune, distil, quantize and export language models: one technique, or a chain of them."""

from __future__ import annotations

__version__ = "0.1.0"

_PLACES = {
    "compress": "compress.api",
    "measure": "compress.api",
    "load": "compress.artifacts.artifact:load_artifact",
    "Technique": "compress.technique",
    "UserError": "compress.errors",
    "PostconditionError": "compress.errors",
}


def __getattr__(name: str) -> object:
    # Looked up at first use, so that `import compress` stays free of torch.
    from importlib import import_module

    place = {**_PLACES, **_find_stages()}.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, *_find_stages()})


def _find_stages() -> dict[str, str]:
    """Return the module of every stage's class: ``{"Prune": "compress.techniques.prune"}``."""
    import re

    from compress.install import CONF

    targets = (
        re.search(r"^_target_: (\S+)\.(\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        for file in (CONF / "technique" / "stage").glob("*.yaml")
    )
    return {target[2]: target[1] for target in targets if target}

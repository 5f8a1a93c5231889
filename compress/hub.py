"""Check whether the Hugging Face Hub can be reached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Switch the hub's clients offline if a connection fails; they would retry for half a minute."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not is_reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def is_reachable(url: str, timeout_s: float = 5) -> bool:
    """Return whether ``url`` answers, through the environment's proxies, as the hub's own client would ask."""
    import httpx

    try:
        httpx.head(url, timeout=timeout_s)
    except httpx.HTTPError:
        return False
    return True

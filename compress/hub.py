"""Check whether the Hugging Face Hub can be reached."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

log = logging.getLogger(__name__)
ENVIRONMENT = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_DIR", "SSL_CERT_FILE")
"""What the hub's client reads, in either case."""


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
    """Return whether ``url`` answers, through the environment's proxies, as the hub's own client would ask. Log what is
    wrong with the environment if the client cannot start in it."""
    import httpx

    try:
        httpx.head(url, timeout=timeout_s)
    except httpx.HTTPError:
        return False
    except (httpx.InvalidURL, ImportError, OSError, ValueError) as error:
        names = sorted(name for name in os.environ if name.upper() in ENVIRONMENT)
        log.warning(f"The hub cannot be asked: {str(error).rstrip('.')}. Correct or unset {', '.join(names)}.")
        return False
    return True

"""Silence libraries that print and log on a normal run."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def silence_libraries() -> None:
    """Turn off the libraries' notices, hints and warnings; errors are still raised."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("POSSIBLE_USER_WARNINGS", "off")  # Lightning's tips
    warnings.filterwarnings("ignore")
    silence_logs()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def silence_logs() -> None:
    """Restrict the libraries' loggers to errors, without importing the libraries."""
    for name in (
        "pytorch_lightning",
        "lightning",
        "lightning_utilities",
        "transformers",
        "bitsandbytes",
        "datasets",
        "filelock",
        "matplotlib",
        "tensorboard",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def disable_telemetry() -> None:
    """Keep OpenVINO and NNCF from reporting every conversion to their makers; call it before they are imported.

    Each report forks this process, with the model in its memory, and a graph causes dozens. Both libraries work without
    the package that sends them.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it fails


def escape_unencodable_output() -> None:
    """Have standard output and error write characters that the terminal's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of calls that take only a moment."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def silence_exporters() -> Iterator[None]:
    """Silence exporters and converters, which warn, log and print on a normal run; errors are still raised."""
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), hide_progress_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logged)

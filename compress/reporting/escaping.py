"""Write labels, paths and reasons of any characters so that every medium shows them as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.reporting.rows import Row


UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters, line breaks, overrides of the writing direction, and what neither UTF-8 nor XML can hold."""
MARKUP = re.compile(
    r"[\\`*|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # not between letters: f1_macro
    r"|<(?=[A-Za-z/!?])|&(?=#|\w+;)"  # not p < 0.05
    r"|\[(?=.*\][(:\[])|^\[(?=[ xX]\])"  # links and boxes, not intervals
    r"|(?<!\S)#|^[>+-]|^\d+(?=[.)])"
)
"""What Markdown reads as formatting."""
BREAK = re.compile(r"\s*[\r\n]+\s*")
PATHS = ("folder", "predictions")
"""Columns that are opened as files, not only shown."""
LONGEST_NAME = 200  # bytes of a file's name, which file systems limit to 255
LONGEST_LABEL = 80  # characters beside a plot


def make_printable(text: str) -> str:
    r"""Return ``text`` on one line, with an escape for each character that is not shown but acts.

    >>> make_printable("a\nb")
    'a\\nb'
    """
    return UNSAFE.sub(lambda unsafe: unsafe[0].encode("unicode_escape").decode(), text)


def make_rows_printable(rows: list[Row]) -> list[Row]:
    """Return the rows with printable texts. A reason of several lines becomes one line."""

    def show(key: str, value: object) -> object:
        if isinstance(value, list):
            return [show(key, item) for item in value]
        if not isinstance(value, str) or key in PATHS:
            return value
        return make_printable(BREAK.sub(" ", value) if key == "reason" else value)

    return [{key: show(key, value) for key, value in row.items()} for row in rows]


def escape_markdown(text: str) -> str:
    r"""Return Markdown that is shown as ``text``.

    >>> escape_markdown("*best* of <b> | p < 0.05 for f1_macro")
    '\\*best\\* of \\<b> \\| p < 0.05 for f1_macro'
    """

    def escape(found: re.Match[str]) -> str:
        return found[0] + "\\" if found[0].isdigit() else "\\" + found[0]

    return MARKUP.sub(escape, make_printable(text))


def shorten_label(text: str) -> str:
    """Return printable ``text`` that leaves room for a plot."""
    text = make_printable(text)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def make_file_name(text: str, taken: Collection[str] = ()) -> str:
    """Return a name for a file or a folder that is like ``text`` and differs from those ``taken``."""
    name = re.sub(r"[^\w+.= -]+", "-", text).strip(" .") or "-"
    name = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{name} ({len(taken)})" if name in taken else name


@contextmanager
def plain_figures() -> Iterator[None]:
    """Draw and save figures whose texts are shown as they are.

    Mathematics between dollars and TeX are off. An SVG keeps its texts as texts, so that a browser sets scripts and
    emoji that matplotlib's font lacks; a PNG shows boxes there, without a warning for each.
    """
    import matplotlib

    with (
        matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)
        yield

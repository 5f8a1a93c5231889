"""Draw the README's table as docs/overview.svg and overview-dark.svg: `python docs/overview.py`."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COLOURS = {"": ("#1f2328", "#59636e", "#d8dee4"), "-dark": ("#e6edf3", "#9198a1", "#3d444d")}
TEAL, AMBER = "#009688", "#e6942a"
ROW, LEFT, BAR, GAP = 46, 380, 210, 95


class Row(NamedTuple):
    method: str
    change: str
    smaller: str
    faster: str


def read_rows() -> list[Row]:
    """Return the rows of the README's measured table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"^\| method .*?\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert lines, "the README has no measured table"
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines[1].splitlines()]
    return [Row(method.replace("`", ""), change, smaller, faster) for method, _, change, _, smaller, faster in cells]


def draw(rows: list[Row], colours: tuple[str, str, str]) -> str:
    """Return an SVG with two bars for each row: how much smaller, and how much faster with its interval."""
    strong, weak, line = colours
    most = max(float(row.faster.split("x")[0]) for row in rows if row.faster)
    parts = []

    def text(x: float, y: float, words: str, colour: str = strong, size: int = 15, more: str = "") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}"{more}>{escape(words)}</text>')

    def bar(x: float, y: float, value: str, colour: str) -> None:
        number = float(value.split("x")[0]) if value else 1.0
        shade = "" if value else ' opacity="0.45"'
        width = BAR * number / most
        parts.append(f'<rect x="{x}" y="{y - 15}" width="{width:.1f}" height="20" rx="3" fill="{colour}"{shade}/>')
        text(x + width + 8, y, f"{number:.2f}x" if value else "1")

    for x, words in ((20, "MiniLM on SST-2"), (LEFT, "smaller on disk"), (LEFT + BAR + GAP, "faster, one text, CPU")):
        text(x, 30, words, more=' font-weight="600"')
    for number, row in enumerate(rows):
        y = 72 + number * ROW
        parts.append(
            f'<line x1="20" x2="{LEFT + 2 * BAR + 2 * GAP - 20}" y1="{y - 26}" y2="{y - 26}" stroke="{line}"/>'
        )
        method, _, rest = row.method.partition(", ")
        size = 14 if len(method) < 30 else 11
        text(20, y - 4, method, size=size, more=' font-family="ui-monospace, monospace"')
        said = f"accuracy {row.change}" if row.change else "the baseline"
        text(20, y + 13, f"{said}, {rest}" if rest else said, weak, 12)
        bar(LEFT, y + 2, row.smaller, TEAL)
        bar(LEFT + BAR + GAP, y + 2, row.faster, AMBER)
    width, height = LEFT + 2 * BAR + 2 * GAP, 72 + len(rows) * ROW - 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def draw_all() -> dict[str, str]:
    """Return the pictures by their file names."""
    rows = read_rows()
    return {f"overview{theme}.svg": draw(rows, colours) for theme, colours in COLOURS.items()}


if __name__ == "__main__":
    for name, picture in draw_all().items():
        (ROOT / "docs" / name).write_text(picture, encoding="utf-8")

"""What the site takes from the repository: settings from conf/, rows from measured tables. mkdocs calls `on_...`.

A page asks for it by a comment, which other viewers of Markdown hide:

    <!-- settings: technique/stage/prune.yaml -->
    <!-- choices: model -->
    <!-- rows: measured.md | Criteria of pruning | perplexity -->
    <!-- rows: studies.md | BERT on SemEval | none, int8 | method, f1_micro, change -->
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
CONF, DOCS = ROOT / "conf", ROOT / "docs"
SCHEMA = {"technique/stage": None, "hardware": "Hardware", "task": "Task", "model": "Backbone"}
"""The type in docs/schema/train.json of the files of a folder; None: that of the file's name."""
UNBROKEN = re.compile(r"(?<=[\dx*t]) (?=\[[+\d-]|pt\b)|(?<=\d,) (?=[+-]?\d)")
"""The spaces in `-0.69 pt [-2.29, +0.92]`."""
FETCHED = re.compile(
    r'<(?:script|img|iframe|source|link(?! rel="?canonical))\b[^>]*?\b(?:src|href)="?(?:https?:)?//[^">]+'
)


class Setting(NamedTuple):
    key: str
    value: str
    comment: str


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the comments of a page by what they ask for."""

    def replace(match: re.Match[str]) -> str:
        indent, name, words = match[1], match[2], [word.strip() for word in match[3].split("|")]
        try:
            return textwrap.indent(ANSWERS[name](page.file.src_uri, *words), indent)
        except (LookupError, ValueError, TypeError, OSError) as error:
            raise PluginError(f"{page.file.src_uri}: {match[0]} cannot be answered: {error}") from error

    markdown = re.sub(rf"^( *)<!-- ({'|'.join(ANSWERS)}): (.+?) -->$", replace, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^\|.*$", lambda line: UNBROKEN.sub("\N{NO-BREAK SPACE}", line[0]), markdown, flags=re.MULTILINE)
    return link_notes(markdown) if page.file.src_uri == "compatibility.md" else markdown


def on_post_build(config: Any) -> None:
    """Refuse a site that fetches anything from elsewhere.

    Raises:
        PluginError: a page or a style sheet does.
    """
    for path in Path(config.site_dir).rglob("*.html"):
        if found := FETCHED.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.name} fetches {found[0]}. Keep a copy in docs/assets.")
    for path in Path(config.site_dir).rglob("*.css"):
        if found := re.search(r"(?:url\(|@import\s+)['\"]?(?:https?:)?//[^)]+", path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.name} fetches {found[0]}. Keep a copy in docs/assets.")


def quote_settings(page: str, file: str, which: str = "all") -> str:
    """Return a table of a YAML's settings: default, type and comment of each; with ``own`` those of the file alone."""
    folder, _, name = file.rpartition("/")
    schema = json.loads((DOCS / "schema" / "train.json").read_text(encoding="utf-8"))
    kind = SCHEMA.get(folder, "") or (name.removesuffix(".yaml") if folder in SCHEMA else "")
    node = {"$ref": f"#/$defs/{kind}"} if kind else schema if file != "evaluate.yaml" else {}
    elsewhere = {one.key: one.comment for one in read_settings("train.yaml")}
    lines = ["| setting | default | values | |", "|---|---|---|---|"]
    text = (CONF / file).read_text(encoding="utf-8")
    for key, value, comment in parse_settings(text) if which == "own" else read_settings(file):
        refers = re.fullmatch(r"\$\{([\w.]+)\}", value)
        default = f"as `{refers[1]}`" if refers else f"`{value}`" if value not in ("", "???") else ""
        meaning = comment or (elsewhere.get(refers[1], "") if refers else "")
        type_ = describe_type(find_type(node, key.split("."), schema["$defs"])) if value else ""
        type_ = "required" if value == "???" else type_
        lines.append(f"| `{key}` | {default} | {escape_cell(type_)} | {escape_cell(meaning)} |")
    return wrap_table("settings", lines)


def escape_cell(text: str) -> str:
    """Return a comment as Markdown in a cell: mappings as code, other signs as they are."""
    parts = re.split(r"('?\{(?:[^{}`]|\{[^{}`]*\})*\}'?)", text)
    escaped = [f"`{part}`" if i % 2 else re.sub(r"([|*])", r"\\\1", part) for i, part in enumerate(parts)]
    return "".join(escaped).replace("``", "` `")


def read_settings(file: str) -> list[Setting]:
    """Return the settings of a YAML in conf/ with those of its defaults list that are beside it, comments included."""
    path = CONF / file
    text = path.read_text(encoding="utf-8")
    defaults = (yaml.safe_load(text) or {}).get("defaults") or []
    settings: dict[str, Setting] = {}
    for default in defaults:
        name, _, package = default.partition("@") if isinstance(default, str) else ("", "", "")
        beside = path.parent / f"{name}.yaml"
        if name not in ("", "_self_", "_output") and beside.is_file():
            for one in read_settings(str(Path(file).parent / f"{name}.yaml")):
                key = f"{package}.{one.key}" if package else one.key
                settings[key] = Setting(key, one.value, one.comment)
    own = {one.key: one for one in parse_settings(text)}
    settings = own | settings | own  # in the order of the file, with its values
    first = {key.split(".")[0]: place for place, key in reversed(list(enumerate(settings)))}
    return sorted(settings.values(), key=lambda one: first[one.key.split(".")[0]])


def parse_settings(text: str) -> list[Setting]:
    """Return the leaves of a YAML, each with the comment behind or above it."""
    settings: list[Setting] = []
    above: list[str] = []
    stack: list[tuple[int, str]] = []
    begun = False
    for line in text.splitlines():
        if whole := re.match(r"\s*# ?(.*)", line):
            above += [whole[1]] * begun
            continue
        begun = True
        match = re.match(r"^( *)([\w.]+):(?: +(.*?))?(?:  # (.*))?$", line)
        if not match:
            above = []
            continue
        indent, key, value, comment = len(match[1]), match[2], match[3] or "", match[4] or ""
        if value.startswith("# "):
            value, comment = "", value[2:]
        stack = [(depth, name) for depth, name in stack if depth < indent] + [(indent, key)]
        names = [name for _, name in stack]
        comment = " ".join([*above, comment]).strip()
        above = []
        if names[0] in ("defaults", "_target_", "name") and (value or names[0] != "name"):
            continue
        if value:
            settings.append(Setting(".".join(names), value, comment))
        elif comment:
            settings.append(Setting(".".join(names), "", comment))
    return settings


def find_type(node: dict[str, Any], keys: list[str], kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of which a nested setting follows one; none if it is unknown."""
    for key in keys:
        options = expand_options(node, kinds)
        node = next((option["properties"][key] for option in options if key in option.get("properties", {})), {})
    return expand_options(node, kinds)


def expand_options(node: dict[str, Any], kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the alternatives of a schema, without interpolations."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return [] if name == "interpolation" else expand_options(kinds[name], kinds)
    return [option for one in node["anyOf"] for option in expand_options(one, kinds)] if "anyOf" in node else [node]


def describe_type(options: list[dict[str, Any]]) -> str:
    """Return what a setting can be, in words."""
    return " or ".join(dict.fromkeys(filter(None, map(describe_option, options))))


def describe_option(node: dict[str, Any]) -> str:
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = node.get("type", "")
    if kind == "null":
        return "null"
    name = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "array": "list"}
    bounds = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
    limits = [phrase.format(node[bound]) for bound, phrase in bounds.items() if bound in node]
    return " ".join([name.get(kind, "group" if kind == "object" else ""), *limits]).strip()


def quote_choices(page: str, group: str) -> str:
    """Return a table of the choices of a group of conf/, with the command in each file's first line."""
    lines = ["| choice | what it is | a command |", "|---|---|---|"]
    for path in sorted((CONF / group).glob("[!_]*.yaml")):
        text = path.read_text(encoding="utf-8")
        command = next(line[2:] for line in text.splitlines() if line.startswith("# python"))
        values = yaml.safe_load(text) or {}
        said = re.search(r"^(?:name: [^$\s]+|defaults:|scale: \S+|\{\}|path: null) +# (.+)$", text, re.MULTILINE)
        what = said[1] if said else values.get("path") or values.get("kind") or ""
        lines.append(f"| `{path.stem}` | {escape_cell(str(what))} | `{command}` |")
    return wrap_table("choices", lines)


def quote_rows(page: str, source: str, heading: str, methods: str, columns: str = "") -> str:
    """Return rows of a measured table, so that a page cannot say other figures than the measurement.

    Args:
        page: the page that asks.
        source: the page of the table.
        heading: the section of the table.
        methods: the first cells of the rows, separated by commas outside brackets; ``*`` for all.
        columns: beginnings of the column names, separated by commas; empty for all.

    Raises:
        LookupError: there is no such section, row or column.
    """
    section = find_section((DOCS / source).read_text(encoding="utf-8"), heading)
    wanted = re.split(r", (?![^(]*\))", methods)
    header, rows = find_table(section, wanted)
    kept = rows if methods == "*" else [row for one in wanted for row in rows if row[0] == one]
    places = range(len(header))
    if columns:
        places = [find_column(header, one.strip()) for one in columns.split(",")]  # type: ignore[assignment]
    lines = ["| " + " | ".join(row[i] for i in places) + " |" for row in (header, ["---"] * len(header), *kept)]
    up = "../" * page.count("/")
    link = f"[{heading}]({up}{source}#{slugify(heading, '-')})"
    return wrap_table("rows", [*lines, "", f"Measured: {link}"])


def find_table(section: str, methods: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the first table with these first cells; ``*`` is the first table.

    Raises:
        LookupError: no table has all of them.
    """
    for header, rows in list_tables(section):
        if methods == ["*"] or set(methods) <= {row[0] for row in rows}:
            return header, rows
    raise LookupError(f"no table has the rows {methods}")


def wrap_table(style: str, lines: list[str]) -> str:
    return "\n".join([f'<div class="{style}" markdown>', "", *lines, "", "</div>"])


def find_section(text: str, heading: str) -> str:
    """Return the text under a heading, up to the next of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise LookupError(f"there is no heading {heading!r}")
    return found[2]


def list_tables(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Return the header and the rows of each Markdown table."""
    tables = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.strip().splitlines()]
        tables.append((rows[0], rows[2:]))
    return tables


def find_column(header: list[str], beginning: str) -> int:
    place = next((i for i, name in enumerate(header) if name.startswith(beginning)), None)
    if place is None:
        raise LookupError(f"no column of {header} begins with {beginning!r}")
    return place


def link_notes(markdown: str) -> str:
    """Return the page of compatibility with narrow tables, whose numbers are links to the sentences below."""
    linked = re.sub(r"(?<=\| )\[(\d+)\](?= \|)", r"[\1](#note-\1)", markdown)
    linked = re.sub(r"^(\d+)\. ", r'\1. <span id="note-\1"></span>', linked, flags=re.MULTILINE)
    tables = re.compile(r"(?:^\| family.*\|$\n)(?:^\|.*\|$\n?)+", re.MULTILINE)
    return tables.sub(lambda match: wrap_table("matrix", match[0].splitlines()) + "\n", linked)


ANSWERS = {"settings": quote_settings, "choices": quote_choices, "rows": quote_rows}

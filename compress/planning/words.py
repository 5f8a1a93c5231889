"""Read the words of a command line, and write them as Hydra and the shell read them."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import ListConfig, OmegaConf

from compress.errors import UserError

GROUPS = ("model", "task", "technique", "hardware")
"""The groups of which every run has a choice."""


def arrange_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the flags before the overrides: ``-m`` may be anywhere, but Hydra's
    parser takes no override after a flag that follows one.

    Raises:
        UserError: a flag is unknown or lacks a value, or Hydra cannot read an override.
    """
    for word in words:
        if re.search(r"[\ud800-\udfff]", word):
            shown = word.encode(errors="replace").decode()
            raise UserError(f"`{shown}` has characters that this locale cannot read. Set PYTHONUTF8=1 and repeat.")
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        given, unknown = parser.parse_known_intermixed_args([word for word in words if word != "--"])
    except ArgumentError as error:
        raise UserError(f"{error}. Type --hydra-help for the flags.") from None
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(given).items() if name != "overrides"}
    if unknown:
        raise UserError(_explain_unknown_flag(unknown[0], list(flags)))
    check_overrides(given.overrides)
    chosen = [flag if value is True else f"{flag}={value}" for flag, value in flags.items() if value]
    return [*chosen, *given.overrides]


def _explain_unknown_flag(flag: str, known: list[str]) -> str:
    """Return an error message for a flag that Hydra does not know."""
    bare = flag.lstrip("-")
    if "=" in bare:
        return f"`{flag}` is no flag; a setting is typed without dashes. Type {bare}"
    near = get_close_matches(flag, known, 1)
    return f"`{flag}` is no flag{f' (did you mean `{near[0]}`?)' if near else ''}; expected one of {', '.join(known)}."


def check_overrides(words: Sequence[str]) -> None:
    """Raise UserError if Hydra cannot read a word, or if it leaves a group without a choice or with several."""
    for word in words:
        override = read_override(word)
        key = override.key_or_group
        if key == "technique.name":
            raise UserError(f"`{word}` sets the name of the chain, which `technique` sets. Type technique=NAME.")
        if key not in GROUPS or override.is_sweep_override():
            continue
        value = None if override.is_delete() else override.value()
        if value in (None, ""):
            raise UserError(
                f"`{word}` chooses no {key}. Set {key}= to a choice that `--help` lists, or remove the word."
            )
        if isinstance(value, list):
            raise UserError(f"{key} is a list; one choice is expected. For a sweep type -m {key}={_join(value)}")
        if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD):
            raise UserError(f"`{word}` adds a {key}, and every run has one. Type {word.lstrip('+')}")


def _join(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def read_override(word: str) -> Override:
    """Return a word as Hydra reads it.

    Raises:
        UserError: Hydra cannot read it.
    """
    parser = OverridesParser.create()
    key, equals, value = word.partition("=")
    with suppress(HydraException):
        if key:
            return parser.parse_override(word)
    if not equals or not key:
        raise UserError(f"`{word}` is no setting; expected KEY=VALUE. Type --help for examples.")
    try:
        parser.parse_override(f"{key}=1")
    except HydraException:
        raise UserError(f"`{word}` sets `{key}`, which is no key; expected KEY=VALUE. Type --help.") from None
    raise UserError(
        f"`{word}` cannot be read; a value with `=`, `~`, brackets, commas, quotes or accents needs quotes that the "
        f"shell leaves. Type {quote_word(key, value)}"
    )


def list_words(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that Hydra recorded as they were typed; iterating over its list would resolve ``${...}``."""
    if isinstance(overrides, ListConfig):
        return [str(word) for word in OmegaConf.to_container(overrides, resolve=False)]
    return list(overrides)


def quote_word(key: str, value: str) -> str:
    """Return a setting with a text as it is typed in a shell.

    >>> print(quote_word("task.path", "~/a=b"))
    'task.path="~/a=b"'
    """
    mark = "'" if '"' in value and "'" not in value else '"'
    return shlex.quote(f"{key}={_quote_text(value, mark)}")


def _quote_text(text: str, mark: str) -> str:
    """Return a text in quotation marks. Hydra halves the backslashes before a mark, and no others."""
    escaped = re.sub(rf"(\\*){mark}", rf"\1\1\\{mark}", text)
    return mark + re.sub(r"(\\+)\Z", r"\1\1", escaped) + mark


def quote_value(value: Any) -> str:
    """Return a value as Hydra's command line reads it.

    >>> quote_value([1, None, True, "it's"])
    "[1,null,true,'it\\\\'s']"
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{quote_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(quote_value, value)) + "]"
    if isinstance(value, str | Path):
        return _quote_text(str(value), "'")
    return repr(value)

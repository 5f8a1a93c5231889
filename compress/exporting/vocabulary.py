"""Describe a tokenizer as llama.cpp reads it: its tokens, their types, and the merges or scores that join them."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
RULES = {
    (f"{CASES}\\p{{N}}{{1,3}}{REST}", True): "llama-bpe",
    (f"{CASES}\\p{{N}}{{1,3}}{REST}", False): "dbrx",
    (f"{CASES}\\p{{N}}{REST}", False): "qwen2",
}
"""Names in llama.cpp of the rules that cut a text before byte-level BPE merges bytes: the regular expression, and
whether a piece that is a token is taken whole (``ignore_merges``)."""
NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = range(1, 7)
"""Types of tokens in the format."""
NEVER = -1e9
"""Score of a token that no merge makes."""
SPACE = "▁"
NO_SPACE = "llama.cpp puts no space before a text, as the tokenizer does: begin texts for it with a space"


class Vocabulary(NamedTuple):
    """A tokenizer in the words of the format, for :func:`compress.exporting.gguf.write_file`."""

    model: str
    """The algorithm: ``gpt2`` is byte-level BPE, ``llama`` is SentencePiece's BPE, ``none`` no tokenizer at all."""
    tokens: list[str]
    types: list[int]
    rule: str = "default"
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: tuple[tuple[str, int], ...] = ()
    """Numbers of special tokens by name: ``bos``, ``eos``, ``unk`` and ``pad``."""
    adds: tuple[bool, bool] = (False, False)
    """Whether a text gets the first token ``bos`` and the last token ``eos``."""
    prefix: bool = False
    """Whether a text gets a space in front."""
    template: str | None = None
    note: str = ""
    """What llama.cpp does otherwise than the tokenizer."""


NONE = Vocabulary("none", [], [])


def describe_tokenizer(tokenizer: Any, size: int) -> Vocabulary | str:
    """Return the vocabulary of a ``tokenizer`` for a model of ``size`` tokens, or why llama.cpp cannot have it."""
    if not getattr(tokenizer, "is_fast", False):
        return "is written in Python"
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        return f"is of the type {model['type']}"
    if len(tokenizer) > size:
        return f"has {len(tokenizer):,} tokens, and the model {size:,}"
    tokens, types = list_tokens(tokenizer, size)
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    vocabulary = Vocabulary("llama", tokens, types, prefix=adds_space(rules))
    first = next((step for step in flatten(rules["pre_tokenizer"]) if step["type"] == "ByteLevel"), None)
    if model["byte_fallback"]:
        vocabulary = vocabulary._replace(scores=tuple(score_tokens(tokens, merges)))
    elif first and (rule := name_rule(rules)):
        note = NO_SPACE if first["add_prefix_space"] else ""
        joined = tuple(map(" ".join, merges))
        vocabulary = vocabulary._replace(model="gpt2", rule=rule, merges=joined, prefix=False, note=note)
    else:
        return "cuts texts before merging by a rule that llama.cpp does not have"
    names = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    ids = tokenizer("a")["input_ids"]
    return vocabulary._replace(
        special=tuple((name, number) for name, number in names.items() if number is not None),
        adds=(ids[0] == names["bos"], ids[-1] == names["eos"]),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def list_tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each of ``size`` tokens; those that the tokenizer does not have are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = text, BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = CONTROL if token.special else OWN
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def score_tokens(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return a score for each token, higher the earlier a merge makes it: llama.cpp joins the pair of neighbours whose
    token has the highest score, where the tokenizer applies the earliest merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks[token]) if token in ranks else NEVER for token in tokens]


def flatten(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a sequence."""
    if step is None:
        return []
    inside = step.get("pretokenizers", step.get("normalizers"))
    return [step] if inside is None else [each for part in inside for each in flatten(part)]


def adds_space(rules: dict[str, Any]) -> bool:
    """Return whether SentencePiece's rules put a space before a text."""
    prepends = any(step["type"] == "Prepend" for step in flatten(rules["normalizer"]))
    return prepends or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"
        for step in flatten(rules["pre_tokenizer"])
    )


def name_rule(rules: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the rule that cuts a text, or None if it has no such rule."""
    *before, last = flatten(rules["pre_tokenizer"])
    kinds = [step["type"] for step in before]
    if last["type"] != "ByteLevel":
        return None
    if last["use_regex"] and not rules["model"]["ignore_merges"]:
        if not kinds:
            return "gpt-2"
        return "smollm" if kinds == ["Digits"] and before[0]["individual_digits"] else None
    if kinds == ["Split"] and not last["use_regex"]:
        return RULES.get((before[0]["pattern"].get("Regex"), rules["model"]["ignore_merges"]))
    return None

"""Build or load the student of a distillation, and check that it fits its teacher."""

from __future__ import annotations

import copy
import math
import re
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import UserError
from compress.models.backbone import check_added_tokens, find_auto_class, has_labels
from compress.models.depth import (
    INVALID,
    check_depth,
    drop_blocks,
    explain_fixed,
    is_removable,
    make_skeleton,
    select_removable,
)
from compress.models.families import find_conventions
from compress.models.layers import detect_task_kind, find_blocks
from compress.models.loading import build_skeleton, choose_attention, from_pretrained, load_weights, refuse_quantized
from compress.models.skeletons import can_run


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Student:
    """The model to distil into.

    It is a model of its own (``path``, a Hugging Face id or folder), or a part of the chain's model: ``layers`` is a
    number of evenly spaced blocks or the indices of blocks (from 0), which keep their weights. With another
    ``hidden_size`` it has random weights.
    """

    path: str | None = None
    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    hidden_size: Annotated[int, Field(ge=1)] | None = None

    def check_settings(self, key: str) -> None:
        """Raise UserError if the settings, which are at ``key``, contradict each other."""
        if self.path and (self.layers or self.hidden_size):
            raise UserError(f"{key}.path is {self.path}, a whole model. Remove {key}.layers and {key}.hidden_size.")


def space_layers(layers: int, total: int, key: str) -> list[int]:
    """Return the indices of ``layers`` of ``total`` blocks, evenly spaced from the first to the last: 3 of 6 are 0, 2
    and 5, and one alone is the last. (DistilBERT's choice, Sanh et al., arXiv:1910.01108, but always with the last.)

    Raises:
        UserError: the model has fewer blocks.
    """
    if layers > total:
        raise UserError(f"{key}.layers is {layers} and the model has {total}. Set {total - 1} or fewer.")
    if layers == 1:
        return [total - 1]
    return [int(i * (total - 1) / (layers - 1)) for i in range(layers)]


def build_student(model: PreTrainedModel, student: Student, key: str) -> PreTrainedModel:
    """Return a student that is cut from a copy of ``model``, or a narrower one of its architecture at random weights.

    Raises:
        UserError: the model cannot do without the other layers, or be built in this width.
    """
    dropped = choose_dropped(model, student.layers, key)
    if student.hidden_size is None:
        cut = copy.deepcopy(model)
        drop_blocks(cut, dropped)
        return cut
    shallow = make_skeleton(model, model.config)
    if dropped:
        drop_blocks(shallow, dropped)
    config = narrow_config(shallow.config, student.hidden_size, key)
    try:
        fits = can_run(make_skeleton(model, config)) or not can_run(shallow)
    except INVALID:
        fits = False
    if not fits:
        raise UserError(
            f"{key}.hidden_size is {student.hidden_size}; the config of `{config.model_type}` describes no model of "
            f"this width with the other settings of the chain's model. Set {key}.hidden_size=null and {key}.layers, or "
            f"{key}.path."
        )

    def create() -> PreTrainedModel:
        return choose_attention(type(model)._from_config(config, dtype=model.dtype))  # type: ignore[no-any-return]

    if model.device.type == "meta":
        return build_skeleton(create)  # type: ignore[no-any-return]
    with torch.device(model.device):
        return create()


def choose_dropped(model: PreTrainedModel, layers: int | tuple[int, ...] | None, key: str) -> set[int]:
    """Return the indices of the blocks that a student of these ``layers`` lacks.

    Raises:
        UserError: the layers do not exist, or the model cannot do without the others.
    """
    if layers is None:
        return set()
    check_depth(model, f"{key}.layers", f"Set {key}.hidden_size instead, or {key}.path.")
    count = len(find_blocks(model)[1])
    keep = list(layers) if isinstance(layers, tuple) else space_layers(layers, count, key)
    if wrong := [i for i in keep if i >= count]:
        raise UserError(
            f"{key}.layers names the block {wrong[0]} and the model's are 0 to {count - 1}. Set {key}.layers to some "
            "of these."
        )
    dropped = [i for i in range(count) if i not in keep]
    if isinstance(layers, int):
        dropped = select_removable(model, [*dropped, *reversed(keep)], count - layers)
        possible = len(dropped) == count - layers
    else:
        possible = is_removable(model, dropped)
    if not possible:
        raise UserError(f"{key}.layers is {layers}; {explain_fixed(model, range(count))}. Set other {key}.layers.")
    return set(dropped)


WIDTHS = re.compile(r"dim|(.*_)?(hidden_size|embedding_size|embed_proj_dim|embed_dim|n_embd|d_model)")
"""Names in configs of a width of hidden states."""
HEADS = re.compile(r"(.*_)?(attention_heads|num_heads|n_heads?|kv_heads|key_value_heads)")
"""Names of a number of heads."""
CHANNELS = re.compile(r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_inner|d_ff|hidden_dim)")
"""Names of an FFN's width."""


def narrow_config(config: PretrainedConfig, hidden_size: int, key: str) -> PretrainedConfig:
    """Return the config of another width: heads keep their size, and their number and the FFN shrink in proportion.

    Raises:
        UserError: the heads cannot be divided so.
    """
    narrow, width = copy.deepcopy(config), config.hidden_size
    ffn = find_conventions(config).ffn_size
    numbers = {name: value for name, value in config.to_dict().items() if type(value) is int and value}
    # One key and value head for all queries stays one.
    heads = {name: value for name, value in numbers.items() if HEADS.fullmatch(name) and value > 1}
    if any(value * hidden_size % width for value in heads.values()):
        step = width // math.gcd(width, *heads.values())
        raise UserError(
            f"{key}.hidden_size is {hidden_size} and heads keep their size; for {width} dimensions the model has "
            f"{', '.join(f'{name}={value}' for name, value in heads.items())}. Set a multiple of {step}."
        )
    for name, value in numbers.items():
        if name in heads:
            setattr(narrow, name, value * hidden_size // width)
        elif name == ffn or CHANNELS.fullmatch(name):
            setattr(narrow, name, max(1, round(value * hidden_size / width)))
        elif value == width and WIDTHS.fullmatch(name):
            setattr(narrow, name, hidden_size)
    if hasattr(narrow, "compress"):
        del narrow.compress  # the shapes of blocks of the old width
    return narrow


def load_student(
    path: str, model: PreTrainedModel, key: str, tokenizer: PreTrainedTokenizerBase | None = None, weights: bool = True
) -> PreTrainedModel:
    """Return the model at ``path`` with the head of ``model``; without ``weights``, on the meta device.

    Raises:
        UserError: there is no such model, its vocabulary is not that of ``tokenizer``, the chain's tokenizer, or it has
            no embedding for a token that this adds to texts.
    """
    what = "Student"
    config = from_pretrained(AutoConfig, path, what, key)
    refuse_quantized(config, path, key)
    for name in ("id2label", "label2id", "problem_type", "pad_token_id"):
        setattr(config, name, getattr(model.config, name, None))
    auto = find_auto_class(detect_task_kind(model), config)
    skeleton: PreTrainedModel = build_skeleton(lambda: choose_attention(auto.from_config(config)))
    if not weights:
        return skeleton
    if tokenizer is not None:
        check_same_vocabulary(tokenizer.get_vocab(), from_pretrained(AutoTokenizer, path, what, key).get_vocab(), key)
        check_added_tokens(tokenizer, skeleton, path, key)
    student, _ = load_weights(auto, path, what, key, config=config, ignore_mismatched_sizes=True)
    return student


def check_same_labels(teacher: PretrainedConfig, student: PretrainedConfig, key: str) -> None:
    """Raise UserError if the labels of teacher and student, or their order, differ.

    Unnamed labels are trusted, upper and lower case are the same, and the name of a regression's number is ignored.
    """
    if not has_labels(teacher, list(student.id2label.values())):
        raise UserError(
            f"{key} is a model for the labels {', '.join(map(str, teacher.id2label.values()))} and the student's are "
            f"{', '.join(map(str, student.id2label.values()))}. Choose a teacher that was trained for this task."
        )


def check_same_vocabulary(ours: dict[str, int], theirs: dict[str, int], key: str, advice: str = "") -> None:
    """Raise UserError, with ``advice`` at its end, if the vocabulary ``theirs`` of the model at ``key`` differs from
    ``ours``, the chain's."""
    if ours != theirs:
        shared = len(set(theirs.items()) & set(ours.items()))
        raise UserError(
            f"{key} is a model with another vocabulary: of its {len(theirs)} tokens {shared} have the id that they "
            f"have in the chain's model, which has {len(ours)}. Teacher and student must read the same tokens. Choose "
            "a model with the same tokenizer (distilbert has bert's), and use `prune_vocab` after the distillation."
            f"{advice}"
        )

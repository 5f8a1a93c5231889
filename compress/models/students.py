"""Build or load the student of a distillation, and check that it fits its teacher."""

from __future__ import annotations

import copy
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import UserError
from compress.models.backbone import find_auto_class
from compress.models.families import find_conventions
from compress.models.layers import detect_task_kind, find_blocks
from compress.models.loading import from_pretrained, load_weights, refuse_quantized
from compress.models.shapes import drop_blocks


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
        UserError: the layers do not exist, or the heads do not divide the width.
    """
    count = len(find_blocks(model)[1])
    layers = student.layers or count
    keep = sorted(layers) if isinstance(layers, tuple) else space_layers(layers, count, key)
    if wrong := [i for i in keep if i >= count]:
        raise UserError(
            f"{key}.layers names the block {wrong[0]} and the model's are 0 to {count - 1}. Set {key}.layers to some "
            "of these."
        )
    if student.hidden_size is None:
        cut = copy.deepcopy(model)
        drop_blocks(cut, set(range(count)) - set(keep))
        return cut
    return type(model)._from_config(narrow_config(model.config, student.hidden_size, len(keep), key), dtype=model.dtype)


def narrow_config(config: PretrainedConfig, hidden_size: int, layers: int, key: str) -> PretrainedConfig:
    """Return the config of another width: heads keep their size, and their number and the FFN shrink in proportion.

    Raises:
        UserError: the width is no multiple of a head's.
    """
    narrow = copy.deepcopy(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hidden_size % head:
        raise UserError(
            f"{key}.hidden_size is {hidden_size} and a head has {head} dimensions. Set a multiple of {head}."
        )
    heads = hidden_size // head
    groups = getattr(config, "num_key_value_heads", None)
    narrow.num_attention_heads = heads
    if groups is not None:
        queries = config.num_attention_heads // groups
        if heads % queries:
            raise UserError(
                f"{key}.hidden_size is {hidden_size} and {queries} heads of {head} dimensions share a key and value. "
                f"Set a multiple of {queries * head}."
            )
        narrow.num_key_value_heads = heads // queries
    ffn = find_conventions(config).ffn_size
    setattr(narrow, ffn, round(getattr(config, ffn) * hidden_size / config.hidden_size))
    narrow.hidden_size = hidden_size
    narrow.num_hidden_layers = layers
    return narrow


def load_student(
    path: str, model: PreTrainedModel, key: str, tokenizer: PreTrainedTokenizerBase | None = None, weights: bool = True
) -> PreTrainedModel:
    """Return the model at ``path`` with the head of ``model``; without ``weights``, on the meta device.

    Raises:
        UserError: there is no such model, or its vocabulary is not that of ``tokenizer``, the chain's tokenizer.
    """
    what = "Student"
    config = from_pretrained(AutoConfig, path, what, key)
    refuse_quantized(config, path, key)
    for name in ("id2label", "label2id", "problem_type", "pad_token_id"):
        setattr(config, name, getattr(model.config, name, None))
    auto = find_auto_class(detect_task_kind(model), config)
    if not weights:
        with torch.device("meta"):
            return auto.from_config(config)
    if tokenizer is not None:
        check_same_vocabulary(tokenizer.get_vocab(), from_pretrained(AutoTokenizer, path, what, key).get_vocab(), key)
    student, _ = load_weights(auto, path, what, key, config=config, ignore_mismatched_sizes=True)
    return student


def check_same_labels(teacher: PretrainedConfig, student: PretrainedConfig, key: str) -> None:
    """Raise UserError if the labels of teacher and student, or their order, differ."""
    if list(teacher.id2label.values()) != list(student.id2label.values()):
        raise UserError(
            f"{key} is a model for the labels {', '.join(map(str, teacher.id2label.values()))} and the student's are "
            f"{', '.join(map(str, student.id2label.values()))}. Choose a teacher that was trained for this task."
        )


def check_same_vocabulary(ours: dict[str, int], theirs: dict[str, int], key: str) -> None:
    """Raise UserError if the vocabulary ``theirs`` of the model at ``key`` differs from ``ours``, the chain's."""
    if ours != theirs:
        shared = len(set(theirs.items()) & set(ours.items()))
        raise UserError(
            f"{key} is a model with another vocabulary: of its {len(theirs)} tokens {shared} have the id that they "
            f"have in the chain's model, which has {len(ours)}. Teacher and student must read the same tokens. Choose "
            "a model with the same tokenizer (distilbert has bert's), and use `prune_vocab` after the distillation."
        )

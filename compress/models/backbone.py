"""Build a model and its tokenizer from pretrained weights, or from an architecture at random weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from compress.cache.digests import fingerprint_files
from compress.cache.files import expand_path
from compress.errors import UserError
from compress.models.layers import find_blocks
from compress.models.loading import (
    build_skeleton,
    choose_attention,
    from_pretrained,
    join_lines,
    load_weights,
    refuse_quantized,
)
from compress.models.shapes import build_cut_class
from compress.tasks.embedding import is_decoder
from compress.tasks.kinds import KINDS
from compress.tasks.tokenizers import describe_unknown_token

if TYPE_CHECKING:
    from compress.tasks.task import Task

SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
"""Keys of a config with the numbers of special tokens."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Backbone:
    """A model without a task's head.

    With a ``path`` (Hugging Face id, local folder or .gguf file) weights and tokenizer are pretrained. With
    ``path=None`` the architecture is built from ``config`` at random weights, its tokenizer is trained on the task's
    own text, and nothing is downloaded.
    """

    name: str
    path: str | None = None
    config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    learning_rate: float = 5e-5
    from_scratch: bool = False
    """Whether weights are always random, so that ``path`` cannot be set."""

    def __post_init__(self) -> None:
        if self.from_scratch and self.path is not None:
            raise UserError(
                f"model.path is {self.path}; `{self.name}` has random weights and a tokenizer trained on the task's "
                f"text. Set model=pretrained model.path={self.path}."
            )
        if self.path is None and self.config is None:
            raise UserError(
                f"Model `{self.name}` has neither weights nor an architecture. Set model.path to a Hugging Face id or "
                "a local folder, or model.config to an architecture that is built at random weights."
            )

    def configuration(self, task: Task) -> PretrainedConfig:
        """Return the architecture with the head that ``task`` needs; only ``config.json`` is read.

        Raises:
            UserError: the weights are quantized already, or the architecture has no such head.
        """
        config = self._pretrained(AutoConfig) if self.path else self._from_config()
        if self.path:
            refuse_quantized(config, self.path, "model.path")
        kind = KINDS[task.kind]
        if kind.generates and not is_decoder(config):
            raise UserError(
                f"Task `{task.name}` is language modelling and `{config.model_type}` is an encoder. Choose a "
                "decoder (model=tiny_llama) or a classification task (task=toy)."
            )
        if type(config) not in getattr(transformers, kind.auto_class)._model_mapping:
            head = f"head for {kind.pipeline.replace('-', ' ')}" if kind.has_own_head else "classification head"
            raise UserError(
                f"Task `{task.name}` needs a {head} and transformers has none for `{config.model_type}`. Choose "
                "another model."
            )
        kind.configure(config, task)
        if kind.num_labels == 0:
            return config
        config.num_labels = task.num_labels
        config.problem_type = kind.problem_type
        if task.labels:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
        return config

    def skeleton(self, task: Task) -> PreTrainedModel:
        """Return the model on the meta device, without reading weights or taking memory. Two labels stand in for
        labels that only the data knows."""
        if task.labels is None and KINDS[task.kind].num_labels is None:
            task = dataclasses.replace(task, labels=("0", "1"))
        config = self.configuration(task)
        try:
            auto = find_auto_class(task.kind, config)
            return build_skeleton(lambda: choose_attention(auto.from_config(config)))  # type: ignore[no-any-return]
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"model.config is not a valid architecture ({join_lines(error)[:200]}). Correct it, or set model.path."
            ) from error

    def fingerprint(self, task: Task, known: Path | None = None) -> str | None:
        """Return an identity of the weights: a digest of the folder's or file's content, or the hub's id and commit.

        The folder ``known`` keeps the checksums of files, so that they are read once and not for every job.
        """
        if self.path is None:
            return None
        folder = expand_path(self.path)
        if folder.exists():
            return fingerprint_files(folder, known)
        return f"{self.path}@{self.configuration(task)._commit_hash}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer stored with the weights at ``path``."""
        return self._pretrained(AutoTokenizer)

    def build(self, task: Task, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
        """Return the model, its tokenizer, and whether all weights, including the head for ``task``, are trained.
        ``texts`` train a tokenizer if the model has none.

        Raises:
            UserError: the weights cannot be read, or lack tensors of the transformer blocks.
        """
        config = self.configuration(task)
        dtype = getattr(torch, self.dtype)
        trained = False
        if self.path:
            same_labels = has_task_labels(self._pretrained(AutoConfig), task)
            tokenizer = self.tokenizer()
            model, missing = load_weights(
                find_auto_class(task.kind, config),
                self.path,
                f"Model `{self.name}`",
                "model.path",
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # a head for other labels is replaced
            )
            if inside := [name for name in missing if name.startswith(find_blocks(model)[0])]:
                raise UserError(
                    f"Model `{self.name}`: {self.path} holds no weights for {len(inside)} tensors of the transformer "
                    f"blocks ({inside[0]}...). Set model.path to a checkpoint of this architecture."
                )
            trained = same_labels and not missing
        else:
            tokenizer = train_tokenizer(texts, config)
            KINDS[task.kind].set_template(tokenizer, task.template, new=True)
            for key in SPECIAL:
                if hasattr(config, key) or getattr(tokenizer, key) is not None:
                    setattr(config, key, getattr(tokenizer, key))
            if config.is_encoder_decoder:
                config.decoder_start_token_id = tokenizer.pad_token_id
            model = choose_attention(find_auto_class(task.kind, config).from_config(config, dtype=dtype))
        set_pad_token(model, tokenizer)
        KINDS[task.kind].prepare_tokenizer(tokenizer, model.config)
        return model, tokenizer, trained

    def _from_config(self) -> PretrainedConfig:
        try:
            config = AutoConfig.for_model(**(self.config or {}))
        except (ValueError, TypeError) as error:
            reason = join_lines(error)[:200]
            raise UserError(
                f"model.config is not an architecture of transformers ({reason}). Correct it, or set model.path."
            ) from error
        for key in SPECIAL:  # the family's own; the tokenizer that is trained later has others
            number = getattr(config, key, None)
            if isinstance(number, int) and number >= getattr(config, "vocab_size", math.inf):
                setattr(config, key, None)
        return config

    def _pretrained(self, auto: Any, **kwargs: Any) -> Any:
        assert self.path is not None
        return from_pretrained(auto, self.path, f"Model `{self.name}`", "model.path", **kwargs)


def has_task_labels(config: PretrainedConfig, task: Task) -> bool:
    """Return whether a classifier's labels are the task's, in the same order, in whatever case. Unnamed labels are
    trusted, and so is the name of a single number."""
    if task.num_labels == 0:
        return True
    return has_labels(config, task.labels or [f"LABEL_{i}" for i in range(task.num_labels)])


def has_labels(config: PretrainedConfig, labels: Sequence[str]) -> bool:
    """Return whether a classifier's labels are ``labels``, in the same order. Upper and lower case are the same,
    unnamed labels on either side are trusted, and a single number may have any name."""
    ours, theirs = ([str(name).lower() for name in names] for names in (config.id2label.values(), labels))
    unnamed = any(all(name == f"label_{i}" for i, name in enumerate(names)) for names in (ours, theirs))
    return len(ours) == len(theirs) and (len(ours) == 1 or unnamed or ours == theirs)


def find_auto_class(kind: str, config: PretrainedConfig) -> Any:
    """Return the transformers class that builds an architecture with the head of a task of this ``kind``. It also
    builds models that were cut to shapes that a plain config cannot describe."""
    auto: Any = getattr(transformers, KINDS[kind].auto_class)
    base = auto._model_mapping[type(config)]
    adapted = KINDS[kind].adapt_class(base)
    if hasattr(config, "compress"):
        return build_cut_class(adapted)
    return auto if adapted is base else adapted


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the same pad token in tokenizer and model, and padding on the right.

    A decoder's classification head reads the last token that is not padding, so the pad token must not occur in texts.
    A tokenizer without a pad token uses the end-of-sequence token, because texts are tokenised without it.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id


def limit_length(model: Any, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Return ``wanted``, or the number of tokens that the model has positions for if that is smaller."""
    return min(wanted, count_positions(model) or wanted, tokenizer.model_max_length)


def count_positions(model: Any) -> int | None:
    """Return the number of tokens that a model, or the config of an exported one, has positions for; None if there is
    no limit. A table of positions with a padding index is read from the row after it on."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(model, nn.Module) and type(model.config) in AutoModel._model_mapping:
        model = build_skeleton(partial(AutoModel.from_config, model.config))
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        table, padding = getattr(module, "weight", None), getattr(module, "padding_idx", None)
        if "position" in name.rpartition(".")[2] and table is not None and padding is not None:
            positions = min(positions or len(table), len(table) - padding - 1)
    return positions


def count_tokens(model: Any) -> int | None:
    """Return the number of tokens that the model has embeddings for; None if it has no table of tokens."""
    if not isinstance(model, nn.Module):
        return getattr(model.config, "vocab_size", None)
    table = find_token_table(model)
    return None if table is None else len(table)


def find_token_table(model: Any) -> Tensor | None:
    """Return the embeddings of tokens, ``[tokens, width]``; None if the model has no such table: CANINE hashes
    characters."""
    try:
        return model.get_input_embeddings().weight  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def check_added_tokens(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, path: str | None, key: str = "model.path"
) -> None:
    """Raise UserError if the tokenizer at ``path``, the setting ``key``, adds a token to every text or batch that the
    ``model``, maybe a skeleton, has no embedding for. (Other tokens without an embedding may never occur; Gemma 3 1B
    has such a token.)"""
    known = count_tokens(model)
    pad = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    added = {*tokenizer("a", "b")["input_ids"], *tokenizer("a")["input_ids"]}
    if pad is not None:
        added.add(tokenizer.convert_tokens_to_ids(pad))
    if known is not None and (last := max(added)) >= known:
        sentence = describe_unknown_token(tokenizer, last, known, key)
        raise UserError(f"{key} is {path}, whose tokenizer adds {sentence}")


def train_tokenizer(texts: list[str], config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Train byte-level BPE of at most ``config.vocab_size`` tokens, with BERT's special tokens for an encoder and
    Llama's for a decoder. (WordPiece training gives different tokens every time, so runs could not be repeated.)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if is_decoder(config):
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        single, pair = "<s> $A", "<s> $A $B:1"
    else:
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["mask_token"] = "[MASK]"
        if config.is_encoder_decoder:  # its classification head reads the end of the text
            names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=list(dict.fromkeys(names.values())),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    used = [token for token in dict.fromkeys(names.values()) if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in used]
    )
    positions = getattr(config, "max_position_embeddings", None)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=positions, padding_side="right", **names
    )

"""Where a model comes from, and which of its layers compression may touch."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from compress.cache.digests import fingerprint_files
from compress.errors import UserError
from compress.hub import offline_if_unreachable
from compress.models.families import find_conventions
from compress.models.layers import find_blocks
from compress.models.shapes import build_cut_class
from compress.tasks.kinds import KINDS

if TYPE_CHECKING:
    from compress.tasks.task import Task


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Backbone:
    """A model before a task's head is put on it.

    With a ``path`` (Hugging Face id or local folder) weights and tokenizer are the pretrained ones. With ``path=None``
    the architecture is built from ``config`` at random weights and its tokenizer is trained on the task's own text, so
    that nothing is downloaded.
    """

    name: str
    path: str | None = None
    config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    learning_rate: float = 5e-5
    from_scratch: bool = False
    """Weights are always random: there is no ``path`` to set."""

    def __post_init__(self) -> None:
        if self.from_scratch and self.path is not None:
            raise UserError(
                f"model.path is {self.path}; `{self.name}` has random weights and a tokenizer trained on the task's "
                f"text. Set model=pretrained model.path={self.path}."
            )
        if self.path is None and self.config is None:
            raise UserError(
                f"Model `{self.name}` has neither weights nor an architecture: set model.path to a Hugging Face id or "
                "a local folder, or model.config to an architecture that is built at random weights."
            )

    def configuration(self, task: Task) -> PretrainedConfig:
        """The architecture with the head that ``task`` needs; nothing but ``config.json`` is read."""
        config = self._pretrained(AutoConfig) if self.path else self._from_config()
        kind = KINDS[task.kind]
        if kind.generates and not is_decoder(config):
            raise UserError(
                f"Task `{task.name}` is language modelling and `{config.model_type}` is an encoder: choose a "
                "decoder (model=tiny_llama) or a classification task (task=toy)."
            )
        if type(config) not in getattr(transformers, kind.auto_class)._model_mapping:
            raise UserError(
                f"Task `{task.name}` needs a classification head and transformers has none for "
                f"`{config.model_type}`: choose another model."
            )
        if kind.num_labels == 0:
            return config
        config.num_labels = task.num_labels
        config.problem_type = kind.problem_type
        if task.labels:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
        return config

    def skeleton(self, task: Task) -> PreTrainedModel:
        """The model's shapes on the meta device: no weights are read, no memory is taken. Labels that only the data
        will tell are taken for two."""
        if task.labels is None and KINDS[task.kind].num_labels is None:
            task = dataclasses.replace(task, labels=("0", "1"))
        config = self.configuration(task)
        try:
            with torch.device("meta"):
                return find_auto_class(task.kind, config).from_config(config)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"model.config cannot be built ({join_lines(error)[:200]}): mend it.") from error

    def fingerprint(self, task: Task) -> str | None:
        """What the weights are known by: the content of a folder, or the hub's id and commit."""
        if self.path is None:
            return None
        folder = Path(self.path).expanduser()
        return fingerprint_files(folder) if folder.is_dir() else f"{self.path}@{self.configuration(task)._commit_hash}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that comes with the weights at ``path``."""
        return self._pretrained(AutoTokenizer)

    def build(self, task: Task, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
        """Model, tokenizer, and whether all the weights that ``task`` needs were trained, its head included; ``texts``
        train a tokenizer where the model has none.

        Raises:
            UserError: there are no such weights, or they leave transformer blocks without their own.
        """
        config = self.configuration(task)
        dtype = getattr(torch, self.dtype)
        trained = False
        if self.path:
            theirs = has_task_labels(self._pretrained(AutoConfig), task)
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
                    f"blocks ({inside[0]}...): set model.path to a checkpoint of this architecture."
                )
            trained = theirs and not missing
        else:
            tokenizer = train_tokenizer(texts, config)
            for key in ("pad", "bos", "eos"):
                setattr(config, f"{key}_token_id", getattr(tokenizer, f"{key}_token_id"))
            model = find_auto_class(task.kind, config).from_config(config, dtype=dtype)
        set_pad_token(model, tokenizer)
        return model, tokenizer, trained

    def _from_config(self) -> PretrainedConfig:
        try:
            return AutoConfig.for_model(**(self.config or {}))
        except (ValueError, TypeError) as error:
            reason = join_lines(error)[:200]
            raise UserError(f"model.config is no architecture that transformers knows ({reason}): mend it.") from error

    def _pretrained(self, auto: Any, **kwargs: Any) -> Any:
        assert self.path is not None
        return from_pretrained(auto, self.path, f"Model `{self.name}`", "model.path", **kwargs)


def from_pretrained(auto: Any, path: str, what: str, key: str, **kwargs: Any) -> Any:
    """``auto.from_pretrained(path)``, its many ways to fail told as one sentence.

    Raises:
        UserError: ``path`` is no readable model folder and no model on a hub that can be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{what}: the folder {path} holds no config.json: set {key} to a folder in Hugging Face format "
            "(config.json, tokenizer files, *.safetensors)."
        )
    try:
        with nullcontext() if folder.is_dir() else offline_if_unreachable():
            return auto.from_pretrained(str(folder) if folder.is_dir() else path, **kwargs)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = join_lines(error)[:300]
        if folder.is_dir():
            raise UserError(f"{what}: the folder {path} could not be loaded ({reason}).") from error
        raise UserError(
            f"{what}: `{path}` is neither a local folder nor a model that the Hugging Face hub gives out from here: "
            f"set {key} to a folder with its files (config.json, tokenizer, *.safetensors), or to null to build the "
            f"architecture at random weights. (The library says: {reason[:160]})"
        ) from error


def join_lines(error: Exception) -> str:
    """A library's message without its line breaks, to be quoted in a sentence."""
    return " ".join(str(error).split())


def load_weights(auto: Any, path: str, what: str, key: str, **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its tensors that the checkpoint held no weights for: those are random."""
    model, found = from_pretrained(auto, path, what, key, output_loading_info=True, **kwargs)
    mismatched = [name if isinstance(name, str) else name[0] for name in found["mismatched_keys"]]
    return model, sorted({*found["missing_keys"], *mismatched})


def has_task_labels(config: PretrainedConfig, task: Task) -> bool:
    """Whether a classifier's labels are the task's, in its order; labels without names are taken on trust."""
    if task.num_labels == 0:
        return True
    names = [str(name).lower() for name in config.id2label.values()]
    unnamed = all(name == f"label_{i}" for i, name in enumerate(names))
    return len(names) == task.num_labels and (unnamed or names == [label.lower() for label in task.labels or ()])


def find_auto_class(kind: str, config: PretrainedConfig) -> Any:
    """The transformers class that puts the head of a task of this ``kind`` on any architecture, one that was cut to
    other shapes than its config can say included."""
    auto: Any = getattr(transformers, KINDS[kind].auto_class)
    return build_cut_class(auto._model_mapping[type(config)]) if hasattr(config, "compress") else auto


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether the architecture reads left to right. BERT can be built as a causal model too, so that a causal head
    exists decides nothing; that it was made for masked language modelling does."""
    name = config.model_type
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model one pad token, on the right.

    A decoder's classification head reads the last token that is not padding, so the pad token must not occur in texts:
    the end-of-sequence token serves where there is none of its own, as texts are tokenised without it.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id


def limit_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """``wanted`` tokens, or as many as the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or wanted
    if find_conventions(model).positions_after_padding:
        positions -= model.config.pad_token_id + 1
    return min(wanted, positions, tokenizer.model_max_length)


def train_tokenizer(texts: list[str], config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``config.vocab_size`` tokens, with BERT's special tokens for an encoder and Llama's for
    a decoder. (WordPiece training gives other tokens every time, and a run could not be repeated.)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if is_decoder(config):
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        single, pair = "<s> $A", "<s> $A $B:1"
    else:
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["mask_token"] = "[MASK]"
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=list(names.values()),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    used = [token for token in names.values() if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in used]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=config.max_position_embeddings, padding_side="right", **names
    )

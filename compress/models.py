"""Where a model comes from, and which of its layers compression may touch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from compress.errors import UserError

if TYPE_CHECKING:
    from compress.tasks import Task

PROBLEM_TYPES = {
    "multiclass": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


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

    def __post_init__(self) -> None:
        if self.path is None and self.config is None:
            raise UserError(
                f"Model `{self.name}` has neither weights nor an architecture: set model.path to a Hugging Face id or "
                "a local folder, or model.config to an architecture that is built at random weights."
            )

    def configuration(self, task: Task) -> PretrainedConfig:
        """The architecture with the head that ``task`` needs; nothing but ``config.json`` is read."""
        config = self._pretrained(AutoConfig) if self.path else AutoConfig.for_model(**(self.config or {}))
        decoder = is_decoder(config)
        if task.kind == "lm":
            if not decoder:
                raise UserError(
                    f"Task `{task.name}` is language modelling and `{config.model_type}` is an encoder: choose a "
                    "decoder (model=tiny_llama) or a classification task (task=toy)."
                )
            return config
        if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise UserError(
                f"Task `{task.name}` needs a classification head and transformers has none for "
                f"`{config.model_type}`: choose another model."
            )
        config.num_labels = task.num_labels
        config.problem_type = PROBLEM_TYPES[task.kind]
        if task.labels:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
        return config

    def skeleton(self, task: Task) -> PreTrainedModel:
        """The model's shapes on the meta device: no weights are read, no memory is taken."""
        with torch.device("meta"):
            return auto_class(task.kind).from_config(self.configuration(task))

    def build(self, task: Task, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer, the head ready for ``task``; ``texts`` train a tokenizer where the model has none."""
        config = self.configuration(task)
        dtype = getattr(torch, self.dtype)
        if self.path:
            tokenizer = self._pretrained(AutoTokenizer)
            model = self._pretrained(auto_class(task.kind), config=config, dtype=dtype)
        else:
            tokenizer = train_tokenizer(texts, config)
            for key in ("pad", "bos", "eos"):
                setattr(config, f"{key}_token_id", getattr(tokenizer, f"{key}_token_id"))
            model = auto_class(task.kind).from_config(config, dtype=dtype)
        set_pad_token(model, tokenizer)
        return model, tokenizer

    def _pretrained(self, auto: Any, **kwargs: Any) -> Any:
        assert self.path is not None
        return from_pretrained(auto, self.path, f"Model `{self.name}`", "model.path", **kwargs)


def from_pretrained(auto: Any, path: str, what: str, key: str, **kwargs: Any) -> Any:
    """``auto.from_pretrained(path)``, its many ways to fail told as one sentence.

    Raises:
        UserError: ``path`` is no readable model folder and no model on a hub that can be reached.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"{what}: the folder {path} holds no config.json: set {key} to a folder in Hugging Face format "
            "(config.json, tokenizer files, *.safetensors)."
        )
    try:
        return auto.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{what}: the folder {path} could not be loaded ({reason}).") from error
        raise UserError(
            f"{what}: `{path}` is neither a local folder nor a model that the Hugging Face hub gives out from here: "
            f"set {key} to a folder with its files (config.json, tokenizer, *.safetensors), or to null to build the "
            "architecture at random weights."
        ) from error


def auto_class(kind: str) -> Any:
    """The transformers class that puts the head of a task of this ``kind`` on any architecture."""
    return AutoModelForCausalLM if kind == "lm" else AutoModelForSequenceClassification


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


def max_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """``wanted`` tokens, or as many as the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or wanted
    if getattr(model.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= model.config.pad_token_id + 1  # their positions are counted from the pad id on
    return min(wanted, positions, tokenizer.model_max_length)


def train_tokenizer(texts: list[str], config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """WordPiece for encoders, byte-level BPE for decoders, of at most ``config.vocab_size`` tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    trainer: Any
    if is_decoder(config):
        special = ["<unk>", "<s>", "</s>", "<pad>"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        start, end = "<s>", None
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=config.vocab_size, special_tokens=special, show_progress=False)
        start, end = "[CLS]", "[SEP]"
        names = {
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
    tokenizer.train_from_iterator(texts, trainer)
    close = f" {end}" if end else ""
    pair = f"{start} $A{close} $B:1{close and f' {end}:1'}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A{close}",
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end) if token],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=config.max_position_embeddings, padding_side="right", **names
    )


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks: the longest ``ModuleList`` of the model.

    Raises:
        UserError: the model has no list of blocks.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"`{type(model).__name__}` has no list of transformer blocks (a torch.nn.ModuleList): compression works "
            "on transformers from the Hugging Face library and modules shaped like them."
        )
    return max(lists, key=lambda item: len(item[1]))


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that compression works on: every ``Linear`` inside a transformer block.

    Embeddings, the pooler and the head stand outside the blocks and keep full precision.
    """
    prefix, stack = blocks(model)
    for name, module in stack.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{prefix}.{name}", module


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where each pruned layer is exactly zero (bool, the weight's shape). An exact zero in a block's Linear *is* the
    mask: nothing else is kept beside the weights."""
    return {name: found for name, linear in linears(model) if (found := linear.weight == 0).any()}

"""A model on its way out of PyTorch: made ready to be traced, and how far the export's answers are from its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from compress import qdq
from compress.calibration import Batch
from compress.errors import UserError
from compress.models import Layer, kind_of, select
from compress.techniques import trait
from compress.techniques.sensitivity import evenly_spread, validation_batches

AGREEMENT = "agreement.json"
GROUPED = "grouped"  # an attention of transformers' by this name
EXAMPLES = 128  # of the validation split, which would take minutes of two models as a whole


class Logits(nn.Module):
    """The model as a function of the tensors ``names``, in this order, that answers with its logits alone."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.how = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs)), **self.how).logits


class Cached(nn.Module):
    """A causal language model as a function of the tensors ``names``, in this order, and of each block's keys and
    values for the tokens before, that answers with its logits and with keys and values for all."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        past, cache = inputs[len(self.names) :], DynamicCache()
        for keys, values in zip(past[::2], past[1::2]):
            layer = DynamicLayer()  # filled by hand: one that fills itself begins with a tensor without dimensions
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        answer = self.model(**dict(zip(self.names, inputs)), past_key_values=cache, use_cache=True)
        return answer.logits, *parts(answer.past_key_values)


def parts(cache: Any) -> list[Tensor]:
    """The keys and the values of every block in turn, ``[batch, heads, tokens, width]``."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def to_trace(model: Any, example: Batch) -> tuple[nn.Module, Batch, list[Tensor]]:
    """What is traced of the model, and with which inputs: those of the ``example``, or where it decodes those of the
    example's second half (the mask stays that of both) and the keys and values of the first."""
    example = any_shape(example)
    if not (kind_of(model) == "lm" and model.can_generate()):
        return Logits(model, example), example, []
    half = example["input_ids"].shape[1] // 2
    first = {name: value[:, :half] for name, value in example.items()}
    past = parts(model(**first, past_key_values=DynamicCache(), use_cache=True).past_key_values)
    second = {name: value if name == "attention_mask" else value[:, half:] for name, value in example.items()}
    return Cached(model, example), second, past


class Export(pl.Callback):
    """What the stages have in common that leave a graph for a runtime without PyTorch.

    Of each: ``key``, its settings in the configuration; ``rounds``, the precisions for which weights are rounded that
    no stage before may have rounded.
    """

    needs: tuple[str, ...] = ("float", "packed", "integer")
    changes = False
    key: str
    rounds: tuple[str, ...]

    def __init__(self, precision: str | None, skip: tuple[str, ...], source: Path | None) -> None:
        self.precision = precision
        self.skip = skip
        self.source = source
        self.limits = ""
        self.shrinks = False
        self.exported: Any = None
        self.agreement: Agreement | None = None

    @property
    def lowers(self) -> bool:
        """Whether it makes floats less precise."""
        return self.precision not in (None, "fp32")

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        readable(self.key, before)
        qdq.check(self.key, self.precision, before)
        if self.precision in self.rounds:
            round_once(f"{self.key}.precision", self.precision, before)
        self.chosen(skeleton)

    def chosen(self, model: nn.Module) -> dict[str, Layer]:
        """The layers that ``skip`` leaves to integers."""
        return select(model, self.skip, f"{self.key}.skip")

    def report(self, folder: Path) -> None:
        if self.agreement is not None:
            (folder / AGREEMENT).write_text(json.dumps(asdict(self.agreement), indent=2))


def round_once(setting: str, precision: str, before: list[Any]) -> None:
    """Raise UserError where a stage ``before`` has rounded the weights, which the ``precision`` would round again."""
    if any(trait(stage, "leaves") in ("packed", "bitsandbytes") for stage in before):
        raise UserError(
            f"{setting}={precision} would round weights again that a stage before has rounded on its own grid: set "
            f"{setting}=null, or leave that stage out."
        )


def readable(key: str, before: list[Any]) -> None:
    """Raise UserError where a stage ``before`` saves integers in a format that the export ``key`` does not read."""
    for stage in before:
        if getattr(stage, "format", "compressed-tensors") != "compressed-tensors":
            setting = f"technique.{type(stage).__module__.rpartition('.')[2]}.format"
            raise UserError(
                f"`{key.rpartition('.')[2]}` does not read the integers of {setting}={stage.format}: set "
                f"{setting}=compressed-tensors, whose integers it keeps."
            )


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """What transformers' eager attention computes of ``query`` ``[batch, heads, new tokens, width]`` and ``key`` and
    ``value`` ``[batch, groups, tokens, width]``, without a copy of those for every head of a group."""
    texts, _, new, _ = query.shape
    groups, width = int(key.shape[1]), int(key.shape[3])  # which are the same for all texts: constants of a graph
    heads = query.reshape(texts, groups, -1, new, width)
    scores = heads @ key.unsqueeze(2).transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask.unsqueeze(2)
    found = scores.softmax(-1) @ value.unsqueeze(2)
    return found.reshape(texts, -1, new, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """With attention written out in matrix products, and afterwards as it was."""
    before = model.config._attn_implementation
    grouped = any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules())
    model.set_attn_implementation(GROUPED if grouped else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def inputs_of(batch: Batch) -> Batch:
    """What a model reads of the batch, on the CPU."""
    return {key: value.cpu() for key, value in batch.items() if key != "labels"}


def any_shape(example: Batch) -> Batch:
    """Two rows of the example with some padding: what is 1 or unmasked there must not be traced as always so."""
    twice = {name: value[:1].repeat(2, 1) for name, value in example.items()}
    if "attention_mask" in twice:
        twice["attention_mask"][1, -1] = 0
    return twice


def is_float32(model: Any) -> bool:
    """Whether the stages before left plain float32 weights, that a lower precision makes smaller."""
    return model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")


def plain_config(model: Any) -> PretrainedConfig:
    """The model's config without what only concerns its weights in PyTorch."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "compress"):
        if hasattr(config, name):
            delattr(config, name)
    return config


@dataclass(frozen=True)
class Agreement:
    """Over ``examples``, padding left out: by how much the logits differ at most, how large the model's own are, and
    the share of labels (tokens, for a language model) on which both agree; None where a number is predicted."""

    examples: int
    max_logit_difference: float
    largest_logit: float
    label_agreement: float | None


def agreed(folder: Path) -> Agreement | None:
    """What the report of a stage in ``folder`` says of its export; None where it exported nothing."""
    told = folder / AGREEMENT
    return Agreement(**json.loads(told.read_text())) if told.is_file() else None


def on_validation_text(trainer: pl.Trainer, model: Any, exported: Any) -> Agreement | None:
    """Their agreement on texts from all over the validation split; None where the Trainer has none."""
    if not trainer.enable_validation:
        return None
    batches = validation_batches(trainer)
    count = min(EXAMPLES, sum(len(batch["input_ids"]) for batch in batches))
    return agreement(model, exported, evenly_spread(batches, count))


@torch.inference_mode()
def agreement(model: Any, exported: Any, batches: Iterable[Batch]) -> Agreement:
    """How far the logits of ``exported`` are from those of ``model``."""
    examples, difference, largest = 0, 0.0, 0.0
    same: list[Tensor] = []
    for batch in map(inputs_of, batches):
        ours, theirs = exported(**batch).logits.float(), model(**batch).logits.float()
        if theirs.ndim == 3 and "attention_mask" in batch:
            real = batch["attention_mask"].bool()
            ours, theirs = ours[real], theirs[real]
        examples += len(batch["input_ids"])
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, theirs.abs().max().item())
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            same.append(((ours > 0) == (theirs > 0)).flatten())
        elif theirs.shape[-1] > 1:
            same.append(ours.argmax(-1) == theirs.argmax(-1))
    return Agreement(examples, difference, largest, torch.cat(same).float().mean().item() if same else None)
